"""NamedPipeServer and NamedPipeClient: accepting, instances in several processes, states, and how everybody dies."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import random
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
from handoff_peers import descriptors, patiently, running
from pipe_world import pair, remains, world_of
from sync_world import in_thread

import portway
from portway import (
    NamedPipeClient,
    NamedPipeServer,
    call_pipe,
    errors,
    list_pipes,
    wait_pipe,
)  # fmt: skip
from portway.wire.pipe import Direction

pytestmark = pytest.mark.usefixtures("pipe_root")


@pytest.fixture
def made() -> Any:
    with contextlib.ExitStack() as stack:
        yield lambda one: stack.enter_context(one)


def accepting(server: NamedPipeServer, threads: int = 1) -> None:
    """Returns when so many threads wait in accept()."""
    patiently(lambda: server.serving._waiters >= threads)


# -- accept ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [0, 0.001, 0.05])
def test_accept_gives_up_after_its_timeout(timeout: float, made: Any) -> None:
    server = made(NamedPipeServer("p"))
    before = time.monotonic()
    with pytest.raises(errors.OperationTimeout, match="waiting for a client of the pipe p"):
        server.accept(timeout)
    assert time.monotonic() - before >= timeout
    made(NamedPipeClient("p"))
    server.accept(timeout).close()  # a client that is there needs no time


def test_accept_waits_for_its_client(made: Any) -> None:
    server = made(NamedPipeServer("p"))
    accept = in_thread(lambda: server.accept())
    accepting(server)
    client = made(NamedPipeClient("p"))
    with accept() as pipe:
        client.send(b"x")
        assert pipe.receive(1) == b"x"


def test_cancel_ends_those_who_wait_now_and_nobody_else(made: Any) -> None:
    server = made(NamedPipeServer("p"))
    server.cancel()  # nobody waits: nothing happens
    for threads in (1, 3):
        waiting = [in_thread(lambda: server.accept(20)) for _ in range(threads)]
        accepting(server, threads)
        server.cancel()
        for join in waiting:
            with pytest.raises(errors.OperationAborted, match="cancelled"):
                join()
    with pytest.raises(errors.OperationTimeout):
        server.accept(0.01)
    accept = in_thread(lambda: server.accept(20))
    made(NamedPipeClient("p"))
    accept().close()


def test_close_ends_those_who_wait() -> None:
    server = NamedPipeServer("p")
    waiting = [in_thread(lambda: server.accept()) for _ in range(3)]
    accepting(server, 3)
    server.close()
    for join in waiting:
        with pytest.raises(errors.ObjectClosed):
            join()
    for call in (server.accept, server.fileno):
        with pytest.raises(errors.ObjectClosed):
            call()
    server.close()


def test_every_thread_in_accept_gets_its_client(made: Any) -> None:
    """Clients that come in one moment are all taken, whoever looks first."""
    server = made(NamedPipeServer("p", mode="message", backlog=8))
    clients = [made(NamedPipeClient("p")) for _ in range(8)]
    for number, client in enumerate(clients):
        client.send(b"%d" % number)
    server.accept(0).close()
    with selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        for _ in range(7):
            assert selector.select(5), "a client is there, and nobody would learn it"
            server.accept(0).close()
        assert not selector.select(0)
    waiting = [in_thread(lambda: server.accept(20)) for _ in range(6)]
    accepting(server, 6)
    more = [made(NamedPipeClient("p", timeout=20)) for _ in range(6)]
    for number, client in enumerate(more):
        client.send(b"%d" % number)
    pipes = [join() for join in waiting]
    assert sorted(pipe.receive() for pipe in pipes) == [b"%d" % number for number in range(6)]
    for pipe in pipes:
        pipe.close()


def test_cancel_while_others_take_clients(made: Any) -> None:
    """The bell of a cancel is not unrung by a client that is taken in the same moment."""
    server = made(NamedPipeServer("p", backlog=2))
    for _ in range(30):
        waiting = in_thread(lambda: server.accept(20))
        accepting(server)
        client = NamedPipeClient("p", timeout=20)
        server.cancel()
        with contextlib.suppress(errors.OperationTimeout):
            server.accept(0).close()
        try:
            waiting().close()
        except errors.OperationAborted:
            pass
        client.close()
        with contextlib.suppress(errors.OperationTimeout):
            server.accept(0).close()


def test_serve_answers_each_client_and_ends_with_close(made: Any) -> None:
    server = made(NamedPipeServer("p", mode="message"))
    serve = in_thread(lambda: server.serve(lambda pipe: [pipe.send(one.upper()) for one in pipe]))
    assert call_pipe("p", b"hello", timeout=20) == b"HELLO"
    clients = [made(NamedPipeClient("p", timeout=20)) for _ in range(5)]
    for client in clients:
        client.send(b"a")
    assert [client.receive(timeout=20) for client in clients] == [b"A"] * 5
    server.close()
    serve()
    for client in clients:  # their conversations go on
        client.send(b"b")
        assert client.receive(timeout=20) == b"B"


def test_what_a_handler_raises_is_reported_and_ends_its_conversation_only(made: Any, monkeypatch: Any) -> None:
    reported: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: reported.append(args.exc_value))
    server = made(NamedPipeServer("p", mode="message"))

    def handler(pipe: Any) -> None:
        request = pipe.receive()
        if request == b"raise":
            raise KeyError("asked for")
        if request == b"leave":
            pipe.receive()
        pipe.send(request)

    serve = in_thread(lambda: server.serve(handler))
    with pytest.raises(errors.BrokenPipe):
        call_pipe("p", b"raise", timeout=20)
    with NamedPipeClient("p", timeout=20) as leaver:
        leaver.send(b"leave")
    assert call_pipe("p", b"good", timeout=20) == b"good"
    server.close()
    serve()
    assert [type(one) for one in reported] == [KeyError]  # a client that leaves is no error


def test_serve_keeps_to_its_number_of_threads(made: Any) -> None:
    server = made(NamedPipeServer("p", mode="message", backlog=2))
    go, inside, most = threading.Event(), [0], [0]

    def handler(pipe: Any) -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        go.wait(20)
        inside[0] -= 1

    serve = in_thread(lambda: server.serve(handler, threads=2))
    clients = [made(NamedPipeClient("p", timeout=20)) for _ in range(3)]
    patiently(lambda: inside[0] == 2)
    go.set()
    for client in clients:
        with pytest.raises(errors.BrokenPipe):
            client.receive(1, timeout=20)
    server.close()
    serve()
    assert most[0] == 2


def test_iteration_over_clients_and_over_messages(made: Any) -> None:
    server = made(NamedPipeServer("p", mode="message"))

    def serve() -> list[list[bytes]]:
        seen = []
        for pipe in server:
            with pipe:
                seen.append(list(pipe))
        return seen

    serving = in_thread(serve)
    for number in range(3):
        with NamedPipeClient("p", timeout=20) as client:
            for part in range(number):
                client.send(b"%d" % part)
    patiently(lambda: all(one.state == "listening" for one in list_pipes()[0].detail))
    server.close()
    assert sorted(serving()) == [[], [b"0"], [b"0", b"1"]]


def test_descriptors_and_selectors(made: Any) -> None:
    server = made(NamedPipeServer("p", mode="message"))
    with selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        assert not selector.select(0)
        client = made(NamedPipeClient("p"))
        assert selector.select(5)
        pipe = made(server.accept(0))
        assert not selector.select(0)
        selector.register(pipe, selectors.EVENT_READ)
        assert not selector.select(0)
        client.send(b"x")
        ((key, _),) = selector.select(5)
        assert key.fileobj is pipe
        assert pipe.receive(timeout=0) == b"x"
        assert not selector.select(0)


# -- files -------------------------------------------------------------------------------------------------------------


def test_makefile(made: Any) -> None:
    _, pipe, client = map(made, pair(mode="byte"))
    with client.makefile("w", encoding="utf-8", newline="\n") as out, pipe.makefile("r", encoding="utf-8") as into:
        out.write("één\ntwee\n")
        out.flush()
        assert (into.readline(), into.readline()) == ("één\n", "twee\n")
    with client.makefile("rwb") as both:
        pipe.send(b"line\nrest")
        assert both.readline() == b"line\n"
        both.write(b"back")
        both.flush()
        assert pipe.receive(10) == b"back"
        assert both.read1() == b"rest"
    with pipe.makefile("rb", buffering=0) as raw:
        assert isinstance(raw, io.RawIOBase) and raw.readable() and not raw.writable() and raw.fileno() == pipe.fileno()
        client.send(b"end")
        client.close()
        assert raw.read() == b"end"
    assert not pipe.closed, "a file's close leaves the pipe open"
    for mode in ("x", "rb+", "a", "", "rbb"):
        with pytest.raises(ValueError):
            pipe.makefile(mode)


def test_messages_are_no_file_unless_read_as_bytes(made: Any) -> None:
    _server, pipe, client = map(made, pair())
    with pytest.raises(errors.BadPipe):
        pipe.makefile("rb")
    pipe.read_mode = "byte"
    client.send(b"ab\n")
    client.send(b"cd\n")
    with pipe.makefile("rb") as into:
        assert [into.readline(), into.readline()] == [b"ab\n", b"cd\n"]


# -- instances ---------------------------------------------------------------------------------------------------------


def test_busy_at_once_while_an_unaccepted_client_holds_the_only_instance(made: Any) -> None:
    server = made(NamedPipeServer("p", mode="message", max_instances=1))
    first = made(NamedPipeClient("p"))
    before = time.monotonic()
    with pytest.raises(errors.PipeBusy, match="1 of 1 exist, all in use; give timeout=") as caught:
        NamedPipeClient("p")
    assert time.monotonic() - before < 1 and caught.value.code == 231
    assert list_pipes()[0].in_use == 1
    with pytest.raises(errors.OperationTimeout):  # claimed, although nobody has accepted: it does not count
        wait_pipe("p", 0.05)
    with pytest.raises(errors.OperationTimeout, match=r"timed out after 0\.05 s"):
        NamedPipeClient("p", timeout=0.05)
    first.close()
    with pytest.raises(errors.PipeBusy):
        NamedPipeClient("p")
    server.accept(0).close()
    made(NamedPipeClient("p"))


def test_timeout_waits_and_gets_the_instance_that_is_freed(made: Any) -> None:
    server, pipe, _ = map(made, pair(max_instances=1))
    waiting = in_thread(lambda: (wait_pipe("p", 20), NamedPipeClient("p", timeout=20))[1])
    with pytest.raises(errors.PipeBusy):
        NamedPipeClient("p")
    pipe.close()
    with waiting() as client, server.accept(5) as pipe:
        client.send(b"mine")
        assert pipe.receive() == b"mine"


def test_default_wait_is_the_servers(made: Any) -> None:
    made(NamedPipeServer("p", mode="message", max_instances=1, default_wait=0.2))
    made(NamedPipeClient("p"))
    for call in (lambda: wait_pipe("p"), lambda: call_pipe("p", b"x")):
        before = time.monotonic()
        with pytest.raises(errors.OperationTimeout):
            call()
        assert time.monotonic() - before >= 0.2
    made(NamedPipeServer("q", mode="message", max_instances=1))
    made(NamedPipeClient("q"))
    before = time.monotonic()
    with pytest.raises(errors.OperationTimeout):
        wait_pipe("q")
    assert time.monotonic() - before >= 0.05


def test_not_found_at_once_saying_where_it_looked(pipe_root: str) -> None:
    for call in (lambda: NamedPipeClient("p", timeout=20), lambda: wait_pipe("p", 20), lambda: call_pipe("p", b"")):
        with pytest.raises(errors.PipeNotFound) as caught:
            call()
        assert f"{pipe_root}/portway-pipe-{os.geteuid()}" in str(caught.value)
        assert f"{pipe_root}/tmp/CoreFxPipe_p" in str(caught.value) and "appear=True" in str(caught.value)
    assert isinstance(caught.value, FileNotFoundError) and caught.value.code == 2


def test_appear_waits_for_the_name_too(made: Any) -> None:
    with pytest.raises(errors.OperationTimeout):
        NamedPipeClient("p", appear=True, timeout=0.03)
    waiting = in_thread(lambda: NamedPipeClient("p", appear=True, timeout=20))
    server = made(NamedPipeServer("p"))
    with waiting(), server.accept(20):
        pass


def test_first_instance(made: Any) -> None:
    server = made(NamedPipeServer("p", first_instance=True))
    with pytest.raises(errors.AccessDenied, match="exists already"):
        NamedPipeServer("P", first_instance=True)
    made(NamedPipeServer("P"))
    client = made(NamedPipeClient("p"))
    server.close()
    with pytest.raises(errors.AccessDenied):
        NamedPipeServer("p", first_instance=True)
    client.close()


def test_the_maximum_holds_across_processes(made: Any, peer: Any, pipe_root: str) -> None:
    one, other = peer(), peer()
    for process in (one, other):
        process.run("os.environ.update(env)", env=world_of(pipe_root))
        process.run("s = portway.NamedPipeServer('p', mode='message', max_instances=3, instances=1)")
    server = made(NamedPipeServer("p", max_instances=200))  # what the first said holds
    assert server.max_instances == 3 and server.mode == "message"
    for make in (lambda: NamedPipeServer("p"), lambda: peer_make(one)):
        with pytest.raises(errors.PipeBusy, match="all 3 instances"):
            make()
    clients = [made(NamedPipeClient("p")) for _ in range(3)]
    with pytest.raises(errors.PipeBusy, match="3 of 3"):
        NamedPipeClient("p")
    answers = [one.run("c = s.accept(5); c.send(b'1')"), other.run("c = s.accept(5); c.send(b'2')")]
    with server.accept(5) as pipe:
        pipe.send(b"0")
        assert answers and sorted(client.receive(timeout=5) for client in clients) == [b"0", b"1", b"2"]
    (info,) = list_pipes()
    assert {line.server_pid for line in info.detail} == {one.pid, other.pid, os.getpid()}
    other.kill()
    assert sum(ended(client) for client in clients) == 2  # its own, and the one that was closed here
    made(NamedPipeServer("p", instances=1)).close()  # its place is free at once


def ended(client: NamedPipeClient) -> bool:
    try:
        client.receive(timeout=0)
    except errors.OperationTimeout:
        return False
    except errors.BrokenPipe:
        return True
    raise AssertionError("more than was sent")


def peer_make(process: Any) -> None:
    process.run("portway.NamedPipeServer('p')")


@pytest.mark.parametrize("instances", [1, 2, 5])
def test_instances_limits_this_object_only(instances: int, made: Any) -> None:
    server = made(NamedPipeServer("p", max_instances=8, instances=instances))
    pipes = []
    for _ in range(instances):
        made(NamedPipeClient("p"))
        pipes.append(made(server.accept(5)))
    with pytest.raises(errors.PipeBusy, match=f"{instances} of 8 exist"):
        NamedPipeClient("p")
    other = made(NamedPipeServer("p", instances=1))
    made(NamedPipeClient("p"))
    made(other.accept(5))


@pytest.mark.parametrize("backlog", [1, 2, 7])
def test_backlog_is_how_many_can_come_before_accept(backlog: int, made: Any) -> None:
    server = made(NamedPipeServer("p", backlog=backlog))
    for _ in range(backlog):
        NamedPipeClient("p").close()
    with pytest.raises(errors.PipeBusy):
        NamedPipeClient("p")
    for _ in range(backlog):
        server.accept(0).close()
    made(NamedPipeClient("p"))


def test_255_instances(made: Any) -> None:
    server = made(NamedPipeServer("p", mode="message", backlog=255))
    clients = [made(NamedPipeClient("p")) for _ in range(255)]
    with pytest.raises(errors.PipeBusy, match="255 of 255"):
        NamedPipeClient("p")
    with pytest.raises(errors.PipeBusy):
        NamedPipeServer("p")
    for number, client in enumerate(clients):
        client.send(b"%d" % number)
    assert [made(server.accept(5)).receive() for _ in clients] == [b"%d" % number for number in range(255)]


def test_the_oldest_listening_instance_is_first_over_all_servers(made: Any) -> None:
    servers = [made(NamedPipeServer("p", mode="message", instances=1)) for _ in range(3)]
    for turn in range(2):
        clients = [made(NamedPipeClient("p")) for _ in servers]
        for number, client in enumerate(clients):
            client.send(b"%d" % number)
        order = servers if turn == 0 else [servers[1], servers[2], servers[0]]
        pipes = [made(server.accept(5)) for server in order]
        assert [pipe.receive() for pipe in pipes] == [b"0", b"1", b"2"]
        for number in (1, 2, 0):  # so they listen again in this order
            pipes[number].close() if turn == 0 else None


def test_a_slot_that_another_server_gave_back_is_used(made: Any) -> None:
    """Also of a name too long for .NET, whose path nobody watches."""
    name = "n" * 200
    one = made(NamedPipeServer(name, max_instances=2, backlog=1, instances=1))
    other = made(NamedPipeServer(name, backlog=2))
    made(NamedPipeClient(name))
    made(one.accept(5))
    made(NamedPipeClient(name))
    made(other.accept(5))
    with pytest.raises(errors.PipeBusy):
        NamedPipeClient(name)
    one.serving.used and one.close()
    gc.collect()
    with pytest.raises(errors.PipeBusy):
        NamedPipeClient(name)  # its conversation goes on
    [one.serving.release(instance) for instance in list(one.serving.used)]
    made(NamedPipeClient(name, timeout=20))


def test_a_client_opens_writes_and_leaves_before_accept(made: Any) -> None:
    server = made(NamedPipeServer("p", mode="message"))
    with NamedPipeClient("p") as client:
        client.send(b"one")
        client.send(b"")
        client.send(b"two")
    with server.accept(0) as pipe:
        assert list(pipe) == [b"one", b"", b"two"]
        with pytest.raises(errors.NoData):
            pipe.send(b"too late")


@pytest.mark.parametrize("mode", ["byte", "message"])
def test_disconnect(mode: Any, made: Any) -> None:
    server, pipe, client = map(made, pair(mode=mode, max_instances=1))
    client.send(b"not read")
    pipe.send(b"not read either")
    pending = in_thread(lambda: (client.receive(99), client.receive(99)))  # the first may be faster than disconnect
    pipe.disconnect()
    with pytest.raises(errors.PipeNotConnected):
        pending()
    for call in (lambda: client.receive(1), lambda: client.send(b"x"), lambda: client.peek(1), client.flush):
        with pytest.raises(errors.PipeNotConnected):
            call()
    assert pipe.closed
    with pytest.raises(errors.ObjectClosed):
        pipe.disconnect()
    for _ in range(10):  # longer than the list of disconnected generations
        with NamedPipeClient("p", timeout=5) as other, server.accept(5) as again:
            other.send(b"new")
            assert again.receive(3) == b"new"
            again.disconnect()
    with pytest.raises(errors.PipeNotConnected):
        client.receive(1)


def test_disconnect_of_a_client_that_has_seen_nothing_yet_after_many_others(made: Any) -> None:
    """A client whose unread data was thrown away never reads it, however late it looks."""
    server, pipe, client = map(made, pair(max_instances=1))
    pipe.send(b"lost")
    pipe.disconnect()
    for _ in range(8 - 1):  # the record remembers the last eight
        with NamedPipeClient("p", timeout=5), server.accept(5) as again:
            again.disconnect()
    with pytest.raises(errors.PipeNotConnected):
        client.receive(9, timeout=1)


def test_close_loses_nothing_and_frees_the_instance(made: Any) -> None:
    server, pipe, client = map(made, pair(max_instances=1))
    for part in (b"a", b"", b"c" * 100_000):
        pipe.send(part)
    client.send(b"never read")
    pipe.close()
    pipe.close()
    assert list(client) == [b"a", b"", b"c" * 100_000]
    with NamedPipeClient("p") as other:
        other.send(b"next")
        with server.accept(5) as pipe:
            assert pipe.receive() == b"next"


def test_close_from_two_threads_frees_the_instance_once(made: Any) -> None:
    server = made(NamedPipeServer("p", max_instances=2, backlog=1))
    for _ in range(50):
        with NamedPipeClient("p", timeout=5):
            pipe = server.accept(5)
            closing = [in_thread(pipe.close) for _ in range(2)]
            for join in closing:
                join()
            assert len(server.serving.listening) == len(set(server.serving.listening)) and not server.serving.used


def test_a_servers_close_leaves_conversations_and_the_name(made: Any, pipe_root: str) -> None:
    server, pipe, client = pair()
    waiting = NamedPipeClient("p")
    server.close()
    with pytest.raises(errors.BrokenPipe):  # claimed, never accepted
        waiting.receive(timeout=5)
    waiting.close()
    with pytest.raises(errors.PipeBusy):
        NamedPipeClient("p")
    client.send(b"still")
    assert pipe.receive() == b"still"
    pipe.close()
    with pytest.raises(errors.PipeNotFound):
        NamedPipeClient("p")
    client.close()
    assert remains(pipe_root) == []


def test_forgotten_objects_are_closed(made: Any, pipe_root: str) -> None:
    server, pipe, client = pair()
    del server, pipe
    gc.collect()
    with client, pytest.raises(errors.BrokenPipe):
        client.receive(timeout=5)
    with pytest.raises(errors.PipeNotFound):
        NamedPipeClient("p")
    assert remains(pipe_root) == []


# -- directions, messages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["byte", "message"])
@pytest.mark.parametrize("direction", ["inbound", "outbound", "duplex"])
def test_directions_and_what_each_refuses(direction: str, mode: Any, made: Any) -> None:
    server, pipe, client = map(made, pair(mode=mode, direction=direction))
    other = {"inbound": Direction.OUTBOUND, "outbound": Direction.INBOUND, "duplex": Direction.DUPLEX}[direction]
    assert server.direction is pipe.direction is Direction[direction.upper()] and client.direction is other
    for wanted in ("inbound", "outbound", "duplex"):
        if Direction[wanted.upper()] & ~other:
            with pytest.raises(errors.AccessDenied, match=f"is {direction} for its server"):
                NamedPipeClient("p", direction=wanted)
        else:
            made(NamedPipeClient("p", direction=wanted))
    for end, to in ((pipe, client), (client, pipe)):
        if end.direction & Direction.OUTBOUND:
            end.send(b"data")
            assert to.receive(9, timeout=5) == b"data"
        else:
            for call in (lambda end=end: end.send(b"x"), lambda end=end: end.flush()):
                with pytest.raises(errors.AccessDenied):
                    call()
        if not end.direction & Direction.INBOUND:
            for call in (lambda end=end: end.receive(1, timeout=0), lambda end=end: end.peek(0),
                         lambda end=end: end.receive_into(bytearray(1))):  # fmt: skip
                with pytest.raises(errors.AccessDenied):
                    call()


def test_a_narrower_client_of_a_duplex_pipe(made: Any) -> None:
    server = made(NamedPipeServer("p", mode="message"))
    client = made(NamedPipeClient("p", direction="outbound"))
    client.send(b"x")
    with pytest.raises(errors.AccessDenied):
        client.receive(timeout=0)
    assert made(server.accept(5)).receive() == b"x"


def test_more_data_and_the_rest(made: Any) -> None:
    _server, pipe, client = map(made, pair())
    client.send(b"0123456789")
    with pytest.raises(errors.MoreData) as caught:
        pipe.receive(4)
    assert (caught.value.data, caught.value.count, caught.value.left) == (b"0123", 4, 6)
    buffer = bytearray(3)
    with pytest.raises(errors.MoreData) as caught:
        pipe.receive_into(buffer)
    assert (bytes(buffer), caught.value.data, caught.value.count, caught.value.left) == (b"456", b"", 3, 3)
    assert pipe.peek(9) == (b"789", 3, 0)
    assert pipe.receive() == b"789"


@pytest.mark.parametrize("size", [1001, 65_536, 200_000])
def test_above_max_message_it_can_still_be_read_in_parts(size: int, made: Any) -> None:
    server = made(NamedPipeServer("p", mode="message", max_message=1000))
    client = made(NamedPipeClient("p"))
    data = os.urandom(size)
    send = in_thread(lambda: (client.send(data), client.send(b"x" * 1000)))
    pipe = made(server.accept(5))
    for _ in range(2):
        with pytest.raises(errors.MessageTooLarge, match="max_message"):
            pipe.receive(timeout=5)
    parts = []
    while True:
        try:
            parts.append(pipe.receive(999, timeout=5))
            break
        except errors.MoreData as more:
            parts.append(more.data)
    assert b"".join(parts) == data
    assert pipe.receive(timeout=5) == b"x" * 1000
    send()


def test_cancel_ends_what_waits_at_this_end_and_loses_nothing(made: Any) -> None:
    _server, pipe, client = map(made, pair())
    client.cancel()
    for _ in range(20):
        waiting = [in_thread(lambda: pipe.receive()) for _ in range(2)]
        client.send(b"a")
        pipe.cancel()
        got = []
        for join in waiting:
            with contextlib.suppress(errors.OperationAborted):
                patiently(lambda join=join: not join.thread.is_alive() or pipe.cancel())
                got.append(join())
        with contextlib.suppress(errors.OperationTimeout):
            got.append(pipe.receive(timeout=0))
        assert got == [b"a"]


def test_a_cancelled_send_inside_a_message_is_told_to_the_reader(made: Any) -> None:
    _server, pipe, client = map(made, pair())
    send = in_thread(lambda: client.send(b"x" * (32 << 20)))
    assert len(patiently(lambda: pipe.peek(1)[0])) == 1
    patiently(lambda: not send.thread.is_alive() or client.cancel())
    with pytest.raises(errors.OperationAborted):
        send()
    next_one = in_thread(lambda: client.send(b"next"))
    with pytest.raises(errors.MessageAbandoned):
        pipe.receive(timeout=5)
    assert pipe.receive(timeout=5) == b"next"
    next_one()


def test_a_reader_that_loses_its_writer_inside_a_message(made: Any, start: Any) -> None:
    server = made(NamedPipeServer("p", mode="message"))

    def work(tell: Any) -> None:
        client = NamedPipeClient("p")
        client.send(b"whole")
        tell(1)
        client.send(b"x" * (32 << 20))

    child = start(work)
    child.hear()
    pipe = made(server.accept(5))
    assert pipe.receive() == b"whole"
    patiently(lambda: pipe.peek(0)[1])
    child.kill()
    with pytest.raises(errors.BrokenPipe):
        pipe.receive(timeout=5)


def test_wrong_arguments() -> None:
    for wrong in (
        {"mode": "messages"}, {"direction": "both"}, {"direction": None}, {"max_instances": 0}, {"max_instances": 256},
        {"instances": 0}, {"backlog": 0}, {"out_buffer": -1}, {"in_buffer": 1 << 32}, {"default_wait": -1},
        {"remote_clients": "maybe"},
    ):  # fmt: skip
        with pytest.raises(errors.InvalidParameter, match=next(iter(wrong))):
            NamedPipeServer("p", **wrong)  # type: ignore[arg-type]
    with NamedPipeServer("p"):
        with pytest.raises(errors.InvalidParameter, match="byte pipe"):
            NamedPipeClient("p", read_mode="message")
        with pytest.raises(errors.InvalidParameter):
            call_pipe("p", b"", timeout=1)
        NamedPipeClient("p").close()  # neither used an instance up for good
    for name in (None, b"p", 3):
        with pytest.raises(TypeError):
            NamedPipeServer(name)  # type: ignore[arg-type]


# -- facts -------------------------------------------------------------------------------------------------------------


def test_list_pipes_tells_what_is(made: Any, pipe_root: str) -> None:
    assert list_pipes() == []
    server = made(NamedPipeServer("One", mode="message", max_instances=5, backlog=2, direction="inbound"))
    made(NamedPipeServer("two", security=portway.Security.everyone()))
    one, two = list_pipes()
    assert (one.name, one.kind, one.mode, one.direction, one.owner) == (
        "One",
        "portway",
        "message",
        "inbound",
        os.geteuid(),
    )
    assert (one.instances, one.in_use, one.max_instances, one.shared) == (2, 0, 5, False)
    assert (two.name, two.mode, two.direction, two.shared, two.dotnet_state) == ("two", "byte", "duplex", True, "ours")
    assert two.dotnet_path == f"{pipe_root}/tmp/CoreFxPipe_two"
    made(NamedPipeClient("one"))
    assert sorted(line.state for line in list_pipes()[0].detail) == ["connected", "listening"]
    made(server.accept(5))
    (one, _) = list_pipes()
    assert (one.instances, one.in_use) == (3, 1)
    (line,) = [line for line in one.detail if line.state == "connected"]
    assert (line.server_pid, line.client_pid, line.client_uid) == (os.getpid(), os.getpid(), os.geteuid())
    assert abs(time.time() - line.since) < 60
    for _ in range(3):  # nobody was connected to
        list_pipes()
    with pytest.raises(errors.OperationTimeout):
        server.accept(0)


def test_repr_and_pickle(made: Any) -> None:
    import pickle

    server, pipe, client = map(made, pair("Name"))
    assert "'Name'" in repr(server) and "1 in use" in repr(server)
    assert "'Name' message duplex fd=" in repr(pipe)
    for end in (pipe, client):
        with pytest.raises(TypeError):
            pickle.dumps(end)
        end.close()
        assert "closed" in repr(end)


# -- death -------------------------------------------------------------------------------------------------------------

SERVER = """
import random, sys, time
import portway
noise = random.Random(int(sys.argv[1]))
while True:
    with portway.NamedPipeServer("p", mode=sys.argv[2], max_instances=200, instances=6, backlog=3) as server:
        print("serving", flush=True)
        until = time.monotonic() + noise.random() / 20
        while time.monotonic() < until:
            try:
                pipe = server.accept(0.003)
            except portway.errors.OperationTimeout:
                continue
            data = pipe.receive(10)
            pipe.send(data.upper())
            noise.choice([pipe.close, pipe.disconnect, pipe.close])()
"""


@pytest.mark.parametrize("mode", ["byte", "message"])
def test_servers_killed_at_random_points_leave_nothing_after_one_look(mode: str, pipe_root: str) -> None:
    noise = random.Random(mode)
    for turn in range(6):
        servers = [
            subprocess.Popen([sys.executable, "-c", SERVER, str(noise.random() * 1e9).split(".")[0], mode],
                             stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]  # fmt: skip
        try:
            for server in servers:
                assert server.stdout and server.stdout.readline() == "serving\n"
            served, until = 0, time.monotonic() + noise.random() / 4
            while time.monotonic() < until or not served:
                try:
                    with NamedPipeClient("p", timeout=5, appear=True) as client:
                        client.send(b"x")
                        assert client.receive(9, timeout=5) == b"X"
                        served += 1
                except (errors.BrokenPipe, errors.PipeNotConnected):
                    continue
        finally:
            for server in servers:
                server.kill()
                server.wait()
                assert server.stdout
                server.stdout.close()
        with pytest.raises(errors.PipeNotFound):  # free at once, whatever lies there
            NamedPipeClient("p")
        if turn % 2:
            with NamedPipeServer("p", first_instance=True, mode="message", max_instances=1):
                assert [one.max_instances for one in list_pipes()] == [1]
        assert list_pipes() == []
        assert remains(pipe_root) == []


def kill_at(step: int) -> None:
    """This process kills itself after its `step`-th call that changes a file or a lock."""
    from portway.kernel import ofdlock, pipe_front, pipe_record

    done = [0]

    def counted(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            try:
                return function(*args, **options)
            finally:
                done[0] += 1
                if done[0] == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        return call

    for module, names in (
        (os, "mkdir rename chmod fchmod link unlink rmdir pwrite posix_fallocate open setxattr"),
        (ofdlock, "try_lock unlock"), (pipe_record, "try_lock unlock"), (pipe_front, "_rename"),
        (socket.socket, "bind listen shutdown"),
    ):  # fmt: skip
        for name in names.split():
            setattr(module, name, counted(getattr(module, name)))


@pytest.mark.parametrize("also", [False, True], ids=["alone", "joining"])
@pytest.mark.parametrize("mode", ["byte", "message"])
def test_a_server_killed_at_every_step_leaves_nothing_after_one_look(
    mode: Any, also: bool, pipe_root: str, start: Any
) -> None:
    def work(tell: Any, step: int) -> None:
        kill_at(step)
        with NamedPipeServer("p", mode=mode, backlog=2, instances=2) as server, NamedPipeClient("p"):
            server.accept(5).disconnect()
        with NamedPipeServer("p", mode=mode, backlog=2, instances=2) as server:
            for _ in range(3):
                with NamedPipeClient("p", timeout=5), server.accept(5):
                    pass

    stack = contextlib.ExitStack()
    if also:
        _other, pipe, client = map(stack.enter_context, pair(mode=mode, instances=1))
    step, code = 0, -1
    while code:
        step += 1
        child = start(work, step)
        code = child.wait()
        assert code in (0, -signal.SIGKILL), step
        child.close()
        with pytest.raises(errors.PipeBusy if also else errors.PipeNotFound):
            NamedPipeClient("p")
        seen = [(one.name, one.instances, one.dotnet_state) for one in list_pipes()]
        if also:
            assert [one[:2] for one in seen] == [("p", 1)], step
            assert len(remains(pipe_root)) == 4, step  # the folder, the record; the front and .NET's path
            client.send(b"%d" % step)
            assert pipe.receive(9) == b"%d" % step
        else:
            assert seen == [] and remains(pipe_root) == [], step
    stack.close()
    assert remains(pipe_root) == []
    assert step > 50


def test_clients_killed_at_random_points(made: Any, start: Any) -> None:
    server = made(NamedPipeServer("p", mode="message", max_instances=20, backlog=3))
    serve = in_thread(lambda: server.serve(lambda pipe: [pipe.send(one) for one in pipe]))

    def work(tell: Any) -> None:
        tell(0)
        while True:
            with NamedPipeClient("p", timeout=10) as client:
                client.send(b"x" * 1000)
                client.receive(timeout=10)

    noise = random.Random(5)
    for _ in range(15):
        children = [start(work) for _ in range(3)]
        for child in children:
            child.hear()
        time.sleep(noise.random() / 50)
        for child in children:
            child.kill()
    assert call_pipe("p", b"good", timeout=10) == b"good"
    patiently(lambda: list_pipes()[0].in_use == 0)
    server.close()
    serve()


# -- resources ---------------------------------------------------------------------------------------------------------


def test_no_descriptor_is_left_by_any_path(made: Any) -> None:
    with NamedPipeServer("warm"):
        pass
    with NamedPipeServer("keep"):  # so that the reaper's thread stays
        before = descriptors()
        for mode in ("byte", "message"):
            server, pipe, client = pair(mode=mode, max_instances=2)
            with contextlib.ExitStack() as stack:
                stack.enter_context(server), stack.enter_context(pipe), stack.enter_context(client)
                left = NamedPipeClient("p")
                for call in (
                    lambda: NamedPipeClient("p"), lambda: wait_pipe("p", 0),
                    lambda: NamedPipeServer("p", first_instance=True),
                    lambda: NamedPipeServer("p", direction="inbound"), lambda: NamedPipeServer("p"),
                    lambda: NamedPipeClient("nobody"), lambda: NamedPipeClient("p", direction="x"),
                ):  # fmt: skip
                    with pytest.raises(errors.PortwayError):
                        call()
                left.close()
                list_pipes()
                pipe.disconnect()
        gc.collect()
        patiently(lambda: descriptors() == before)


NO_DESCRIPTORS = """
import resource
used = max(map(int, os.listdir("/proc/self/fd"))) + 1
resource.setrlimit(resource.RLIMIT_NOFILE, (used, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
spare = []
try:
    while True:
        spare.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
"""


@pytest.mark.parametrize("mode", ["byte", "message"])
def test_without_descriptors_the_server_keeps_serving(mode: str, peer: Any, pipe_root: str, made: Any) -> None:
    process = peer()
    process.run("os.environ.update(env)", env=world_of(pipe_root))
    process.run("""
s = portway.NamedPipeServer("p", mode=mode, backlog=2)
t = threading.Thread(target=s.serve, args=(lambda pipe: pipe.send(pipe.receive(99)),), daemon=True)
t.start()
""", mode=mode)  # fmt: skip
    process.run(NO_DESCRIPTORS)
    client = made(NamedPipeClient("p", call_timeout=10))
    client.send(b"patience")
    with pytest.raises(errors.TooManyDescriptors):
        process.run("s.accept(0)")
    for call in ("portway.NamedPipeServer('q')", "portway.NamedPipeClient('p')"):
        with pytest.raises(errors.TooManyDescriptors):
            process.run(call)
    with pytest.raises(errors.OperationTimeout):
        client.receive(99, timeout=0.05)
    process.run("[os.close(one) for one in spare]")
    assert client.receive(99) == b"patience"
    with NamedPipeClient("p", timeout=10, call_timeout=10) as other:
        other.send(b"more")
        assert other.receive(99) == b"more"
    assert process.run("t.is_alive()")


def test_without_descriptors_the_door_of_others_stays(peer: Any, pipe_root: str) -> None:
    """A client that knows only .NET's path waits until there is a descriptor for it."""
    process = peer()
    process.run("os.environ.update(env)", env=world_of(pipe_root))
    process.run("""
s = portway.NamedPipeServer("p", backlog=2)
t = threading.Thread(target=s.serve, args=(lambda pipe: pipe.send(pipe.receive(99)),), daemon=True)
t.start()
""")
    process.run(NO_DESCRIPTORS)
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.settimeout(10)
        stranger.connect(f"{pipe_root}/tmp/CoreFxPipe_p")
        stranger.sendall(b"patience")
        patiently(lambda: process.run("not s.serving._door_open"))  # the reaper's thread has tried
        process.run("[os.close(one) for one in spare]")
        assert stranger.recv(99) == b"patience"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
@pytest.mark.parametrize("blocks", [1, 2, 3, 6, 12])
def test_a_full_file_system_is_one_clear_error(blocks: int, tmp_path: Any, monkeypatch: Any) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"nr_inodes=64,nr_blocks={blocks},mode=1777", "tmpfs", small],
                      capture_output=True).returncode:  # fmt: skip
        pytest.skip("cannot mount here")
    try:
        monkeypatch.setenv("PORTWAY_ROOT", str(small))
        with pytest.raises(errors.NotEnoughMemory, match=str(small)) if blocks < 10 else contextlib.nullcontext():
            NamedPipeServer("p").close()
        assert remains(str(small)) == []
        assert list_pipes() == []
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
@pytest.mark.parametrize("inodes", range(2, 12))
def test_no_inodes_left(inodes: int, tmp_path: Any, monkeypatch: Any) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"nr_inodes={inodes},size=1m,mode=1777", "tmpfs", small],
                      capture_output=True).returncode:  # fmt: skip
        pytest.skip("cannot mount here")
    try:
        monkeypatch.setenv("PORTWAY_ROOT", str(small))
        try:
            with (
                NamedPipeServer("p", mode="message") as server,
                NamedPipeClient("p") as client,
                server.accept(5) as pipe,
            ):
                client.send(b"fits")
                assert pipe.receive() == b"fits"
        except errors.NotEnoughMemory as error:
            assert str(small) in str(error)
        assert list_pipes() == [] and remains(str(small)) == []
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_server_that_ends_without_closing_leaves_nothing(pipe_root: str) -> None:
    code = "import portway; s = portway.NamedPipeServer('p'); c = portway.NamedPipeClient('p'); a = s.accept(1)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert remains(pipe_root) == []


def test_many_objects_of_one_name_in_threads(made: Any, pipe_root: str) -> None:
    """Servers that come and go, clients that retry: each answer is its client's own."""
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            with NamedPipeServer("p", mode="message", max_instances=8, instances=2, backlog=2) as server:
                for _ in range(5):
                    with contextlib.suppress(errors.OperationTimeout, errors.BrokenPipe), server.accept(0.05) as pipe:
                        pipe.send(pipe.receive(timeout=5))

    def ask(who: int) -> int:
        served = 0
        for number in range(25):
            data = b"%d %d" % (who, number)
            while True:
                try:
                    assert call_pipe("p", data, timeout=20) == data
                    served += 1
                    break
                except (errors.PipeNotFound, errors.PipeBusy, errors.BrokenPipe):
                    continue
        return served

    servers = [in_thread(serve) for _ in range(3)]
    asking = [in_thread(lambda who=who: ask(who)) for who in range(4)]
    try:
        for join in asking:
            join.thread.join(60)
            assert join() == 25
    finally:
        stop.set()
        for join in servers:
            join()
    assert remains(pipe_root) == []
    assert running(os.getpid())


def test_servers_share_a_small_maximum(made: Any, peer: Any, pipe_root: str) -> None:
    """Instances that only wait for clients are spared for another server of the name, down to one each."""
    made(NamedPipeServer("p", mode="message", max_instances=2))
    assert list_pipes()[0].instances == 2
    other = peer()
    other.run("os.environ.update(env); s = portway.NamedPipeServer('p', max_instances=2)", env=world_of(pipe_root))
    (info,) = list_pipes()
    assert sorted(line.server_pid for line in info.detail) == sorted([os.getpid(), other.pid])
    with pytest.raises(errors.PipeBusy, match="all 2 instances"):
        NamedPipeServer("p", max_instances=2)
    for client in [made(NamedPipeClient("p")) for _ in range(2)]:
        client.send(b"to either")
    with pytest.raises(errors.PipeBusy):
        NamedPipeClient("p")
    other.kill()
