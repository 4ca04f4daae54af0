"""A forked child holds no name, no lock, no listener, and can spoil nothing of its parent's."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from handoff_peers import descriptors, patiently
from pipe_world import pair, remains
from sync_world import in_thread

import portway
from portway import NamedPipeClient, NamedPipeServer, errors, list_pipes
from portway import win32pipe as w

pytestmark = pytest.mark.usefixtures("pipe_root")


@pytest.fixture
def made() -> Any:
    with contextlib.ExitStack() as stack:
        yield lambda one: stack.enter_context(one)


def waits_for_ever(tell: Any) -> None:
    tell("there")
    threading.Event().wait()


@pytest.mark.parametrize("mode", ["byte", "message"])
def test_the_parent_is_killed_and_the_name_is_free_while_the_child_lives(mode: str, start: Any, pipe_root: str) -> None:
    def parent(tell: Any) -> None:
        server = NamedPipeServer("p", mode=mode, max_instances=3)  # type: ignore[arg-type]
        client = NamedPipeClient("p")
        with server.accept(5):
            child = os.fork()
            if not child:
                tell(os.getpid())
                threading.Event().wait()
            tell(client)  # cannot be pickled: never reached by the child

    process = start(lambda tell: parent(tell))
    child = process.hear()
    try:
        process.kill()
        with pytest.raises(errors.PipeNotFound):
            NamedPipeClient("p")
        with NamedPipeServer("p", first_instance=True, mode="message", max_instances=1):
            assert list_pipes()[0].max_instances == 1
        assert list_pipes() == [] and remains(pipe_root) == []
        os.kill(child, 0)
    finally:
        os.kill(child, 9)


def test_the_child_has_none_of_the_descriptors(start: Any, made: Any, pipe_root: str) -> None:
    server, _, _ = map(made, pair(mode="byte"))
    waiting = made(NamedPipeClient("p"))

    def child(tell: Any) -> None:
        tell([what for what in descriptors().values() if pipe_root in what or "eventpoll" in what])

    assert start(child).hear() == []
    server.accept(5).close()
    with pytest.raises(errors.BrokenPipe):
        waiting.receive(1, timeout=5)


def test_the_childs_objects_are_closed_and_harmless(start: Any, made: Any, pipe_root: str) -> None:
    """Whatever the child calls or collects: the parent's files, locks and clients stay."""
    server, pipe, client = pair(mode="message", max_instances=4)
    native = made(w.CreateNamedPipe(r"\\.\pipe\n", 3, 4, 2))
    before = remains(pipe_root)

    ends = {"server": server, "pipe": pipe, "client": client}

    def child(tell: Any) -> None:
        told: list[Any] = [server.closed]
        for call in (
            lambda: server.accept(0), server.fileno, lambda: w.ConnectNamedPipe(native, timeout=0), pipe.disconnect,
        ):  # fmt: skip
            try:
                told.append(call())
            except errors.PortwayError as error:
                told.append(type(error).__name__)
        server.cancel()
        pipe.close()
        server.close()
        native.Close()
        ends.clear()
        gc.collect()
        tell(told)

    process = start(child)
    told = process.hear()
    assert told[0] is True and told[1:] == ["ObjectClosed"] * 4, told
    assert process.wait() == 0
    with contextlib.ExitStack() as stack:
        for one in (server, pipe, client):
            stack.enter_context(one)
        assert remains(pipe_root) == before
        client.send(b"still")
        assert pipe.receive(timeout=5) == b"still"
        with NamedPipeClient("p") as other, server.accept(5) as another:
            other.send(b"new")
            assert another.receive(timeout=5) == b"new"
        made(w.CreateFile(r"\\.\pipe\n", w.GENERIC_READ))
        assert w.ConnectNamedPipe(native) == w.ERROR_PIPE_CONNECTED


def test_a_child_that_exits_in_order_removes_nothing(start: Any, made: Any, pipe_root: str) -> None:
    made(NamedPipeServer("p"))
    before = remains(pipe_root)
    pid = os.fork()
    if not pid:
        try:
            import atexit

            atexit._run_exitfuncs()
        finally:
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert remains(pipe_root) == before
    made(NamedPipeClient("p"))


def test_preforked_servers_each_open_the_name(start: Any, made: Any) -> None:
    parent = made(NamedPipeServer("p", mode="message", max_instances=4, instances=1))

    def child(tell: Any) -> None:
        with NamedPipeServer("p", max_instances=4, instances=1) as server:
            tell("serves")
            with server.accept(20) as pipe:
                pipe.send(b"%d" % os.getpid() + pipe.receive())

    children = [start(child) for _ in range(3)]
    assert [one.hear() for one in children] == ["serves"] * 3
    clients = [made(NamedPipeClient("p")) for _ in range(4)]
    with pytest.raises(errors.PipeBusy, match="4 of 4"):
        NamedPipeClient("p")
    for client in clients:
        client.send(b"!")
    with parent.accept(5) as pipe:
        pipe.send(b"%d" % os.getpid() + pipe.receive())
        answers = {client.receive(timeout=20) for client in clients}
    assert answers == {b"%d!" % pid for pid in (os.getpid(), *(one.pid for one in children))}
    assert [one.wait() for one in children] == [0] * 3


def test_a_fork_while_other_threads_accept(start: Any, made: Any) -> None:
    """The locks that they hold at that moment are not the child's; it can serve and call at once."""
    server = made(NamedPipeServer("p", mode="message"))
    serve = in_thread(lambda: server.serve(lambda pipe: [pipe.send(one) for one in pipe]))
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            assert portway.call_pipe("p", b"a", timeout=20) == b"a"

    asking = [in_thread(ask) for _ in range(2)]

    def child(tell: Any, number: int) -> None:
        with NamedPipeServer(f"own {number}", mode="message") as own, NamedPipeClient(f"own {number}") as client:
            client.send(b"x")
            with own.accept(5) as pipe:
                own_answer = pipe.receive(timeout=5)
        tell((own_answer, portway.call_pipe("p", b"b", timeout=20)))

    for number in range(20):
        process = start(child, number)
        assert process.hear(30) == (b"x", b"b")
        assert process.wait() == 0
    stop.set()
    for join in asking:
        join()
    server.close()
    serve()


def test_a_childs_child_and_its_own_server(start: Any, made: Any) -> None:
    made(NamedPipeServer("p"))

    def child(tell: Any) -> None:
        server = NamedPipeServer("c", mode="message")
        if not os.fork():
            os._exit(0 if server.closed else 1)
        tell(os.waitstatus_to_exitcode(os.wait()[1]))
        with server, NamedPipeClient("c") as client, server.accept(5) as pipe:
            client.send(b"x")
            tell(pipe.receive())

    process = start(child)
    assert (process.hear(), process.hear(), process.wait()) == (0, b"x", 0)


def spawned(name: str, root: str, tmp: str) -> None:
    os.environ.update(PORTWAY_ROOT=root, TMPDIR=tmp)
    with NamedPipeServer(f"of {name}", mode="message"):
        assert portway.call_pipe("p", name.encode(), timeout=20) == name.encode()


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_multiprocessing_children(method: str, made: Any, pipe_root: str) -> None:
    server = made(NamedPipeServer("p", mode="message"))
    serve = in_thread(lambda: server.serve(lambda pipe: [pipe.send(one) for one in pipe]))
    context = multiprocessing.get_context(method)
    process = context.Process(target=spawned, args=(method, pipe_root, f"{pipe_root}/tmp"))
    process.start()  # type: ignore[attr-defined]
    process.join(60)  # type: ignore[attr-defined]
    assert process.exitcode == 0  # type: ignore[attr-defined]
    process.close()  # type: ignore[attr-defined]
    server.close()
    serve()
    assert remains(pipe_root) == []


def test_an_executed_child_has_nothing(made: Any, pipe_root: str) -> None:
    server, pipe, client = map(made, pair())
    pid = os.posix_spawn("/bin/sleep", ["sleep", "60"], dict(os.environ))
    try:
        patiently(lambda: "sleep" in Path(f"/proc/{pid}/comm").read_text())
        assert [one for one in descriptors(pid).values() if pipe_root in one or "socket" in one] == []
        pipe.close()
        with pytest.raises(errors.BrokenPipe):
            client.receive(timeout=5)
        server.close()
        assert list_pipes() == []
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
