"""`SharedSocket`: both processes use one connection at once, whatever the other does with the shared O_NONBLOCK."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import io
import os
import select
import selectors
import socket
import threading
from typing import Any

import pytest
from handoff_peers import patiently

import portway
from portway import SharedSocket


def flag(sock: socket.socket) -> bool:
    return bool(fcntl.fcntl(sock.fileno(), fcntl.F_GETFL) & os.O_NONBLOCK)


@pytest.fixture
def shared(tcp: Any) -> Any:
    """(the peer at the far end, one SharedSocket, another over the same connection)."""
    far, near = tcp()
    info = portway.duplicate_socket(near, os.getpid())
    one, other = SharedSocket.adopt(near), portway.socket_from(info)
    yield far, one, other
    one.close()
    other.close()


def in_thread(call: Any) -> tuple[threading.Thread, list[Any]]:
    seen: list[Any] = []

    def work() -> None:
        try:
            seen.append(call())
        except BaseException as error:
            seen.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, seen


def test_two_processes_read_and_write_at_once(peer: Any, tcp: Any) -> None:
    """Both write whole lines and both read; every byte arrives once."""
    far, near = tcp()
    source, target = peer(), peer()
    source.give(sock=near)
    info = source.run("sock = portway.SharedSocket.adopt(sock)\nportway.duplicate_socket(sock, pid)", pid=target.pid)
    target.run("sock = portway.socket_from(info)", info=info)
    work = """
def work(me):
    for n in range(300): sock.sendall(b"%s %04d\\n" % (me, n))
    got = b""
    while not got.endswith(b"E"): got += sock.recv(5)
    return len(got)
work(me)
"""
    source.start(work, me=b"A")
    target.start(work, me=b"B")
    lines, file = [], far.makefile("rb")
    with file:
        lines = [file.readline() for _ in range(600)]
    for letter in (b"A", b"B"):
        assert [one for one in lines if one[:1] == letter] == [b"%s %04d\n" % (letter, n) for n in range(300)]
    far.sendall(b"x" * 1000)
    got = ends = 0
    pending = {source, target}
    while pending:  # each needs an end of its own, and one may read both
        far.sendall(b"E")
        ends += 1
        done = {one for one in pending if one._line.poll(0.01)}
        got += sum(one.result() for one in done)
        pending -= done
    assert 1002 <= got <= 1000 + ends


@pytest.mark.parametrize("mode", [None, 20.0])
@pytest.mark.parametrize("flip", [True, False], ids=["O_NONBLOCK", "blocking"])
def test_receiving_survives_the_other_sides_flag(mode: float | None, flip: bool, shared: Any) -> None:
    far, one, other = shared
    one.settimeout(mode)
    plain = socket.socket(fileno=os.dup(other.fileno()))  # the other side as most programs have it
    with plain:
        thread, seen = in_thread(lambda: one.recv(10))
        for turn in range(20):
            plain.setblocking(bool(turn % 2) is not flip)
        assert thread.is_alive()
        far.sendall(b"data")
        thread.join(20)
        assert seen == [b"data"]


@pytest.mark.parametrize("blocking", [True, False])
def test_sending_survives_the_other_sides_flag(blocking: bool, shared: Any) -> None:
    far, one, other = shared
    one.setblocking(True)
    data = os.urandom(4_000_000)
    with socket.socket(fileno=os.dup(other.fileno())) as plain:
        thread, seen = in_thread(lambda: one.sendall(data))
        got = bytearray()
        while len(got) < len(data):
            plain.setblocking(blocking)
            got += far.recv(65536)
            plain.setblocking(not blocking)
        thread.join(20)
    assert seen == [None] and hashlib.sha256(got).digest() == hashlib.sha256(data).digest()


@pytest.mark.parametrize("blocking", [True, False])
def test_not_waiting_survives_the_other_sides_flag(blocking: bool, shared: Any) -> None:
    """A plain ``setblocking(True)`` elsewhere would make a plain non-blocking recv() wait for ever."""
    far, one, other = shared
    one.setblocking(False)
    with socket.socket(fileno=os.dup(other.fileno())) as plain:
        plain.setblocking(blocking)
        for call in (lambda: one.recv(5), lambda: one.recv_into(bytearray(5)), lambda: one.recvfrom(5),
                     lambda: one.recvmsg(5), lambda: one.recvmsg_into([bytearray(5)])):  # fmt: skip
            with pytest.raises(BlockingIOError):
                call()
        with pytest.raises(BlockingIOError):
            while True:
                one.send(bytes(1 << 20))
    assert far.recv(1) == b"\0"


@pytest.mark.parametrize("mode", [None, 20.0])
def test_accepting_survives_the_other_sides_flag(mode: float | None) -> None:
    listener = SharedSocket.adopt(socket.create_server(("127.0.0.1", 0)))
    listener.settimeout(mode)
    with listener, socket.socket(fileno=os.dup(listener.fileno())) as plain:
        thread, seen = in_thread(listener.accept)
        for turn in range(20):
            plain.setblocking(bool(turn % 2))
        with socket.create_connection(listener.getsockname()) as client:
            thread.join(20)
            conn, address = seen[0]
            with conn:
                assert type(conn) is socket.socket and conn.gettimeout() is None and address == client.getsockname()
                assert not flag(conn)


def test_timeouts_are_kept(shared: Any) -> None:
    _, one, other = shared
    for limit in (0.01, 0.05):
        one.settimeout(limit)
        other.setblocking(False)
        for call in (lambda: one.recv(5), lambda: one.recv_into(bytearray(5)), lambda: one.recvfrom(5),
                     lambda: one.recvmsg(5), lambda: one.recvfrom_into(bytearray(5)),
                     lambda: one.sendall(bytes(50_000_000))):  # fmt: skip
            with pytest.raises(TimeoutError):
                call()
    with SharedSocket.adopt(socket.create_server(("127.0.0.1", 0))) as listener:
        listener.settimeout(0.01)
        with pytest.raises(TimeoutError):
            listener.accept()
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_the_mode_is_its_own(shared: Any) -> None:
    _, one, other = shared
    assert one.gettimeout() is None is one.timeout and one.getblocking() and not flag(one)
    one.settimeout(3)
    assert (one.gettimeout(), one.timeout, one.getblocking()) == (3.0, 3.0, True)
    assert other.gettimeout() is None and not flag(one)
    one.setblocking(False)
    assert one.gettimeout() == 0.0 and not one.getblocking() and flag(other) and other.getblocking()
    one.setblocking(True)
    assert flag(other)  # never cleared: the other side may rely on it
    for bad in (-1, float("nan")):
        with pytest.raises(ValueError, match="timeout"):
            one.settimeout(bad)


def test_a_default_timeout_of_the_program_changes_nothing_for_others(tcp: Any) -> None:
    far, near = tcp()
    near.settimeout(None)
    infos = [portway.duplicate_socket(near, os.getpid(), target_timeout=mode) for mode in (None, 2.0)]
    socket.setdefaulttimeout(7)
    try:
        socks = [portway.socket_from(info) for info in infos]
        own = SharedSocket(socket.AF_INET, socket.SOCK_STREAM)
    finally:
        socket.setdefaulttimeout(None)
    with socks[0], socks[1], own:
        assert [one.gettimeout() for one in (*socks, own)] == [None, 2.0, 7.0]
        socks[1].settimeout(0.01)
        with pytest.raises(TimeoutError):
            socks[1].recv(1)
        thread, seen = in_thread(lambda: socks[0].recv(5))
        far.sendall(b"later")
        thread.join(20)
        assert seen == [b"later"]


def test_closing_one_side_never_shuts_the_other_down(shared: Any) -> None:
    far, one, other = shared
    one.close()
    one.close()
    far.settimeout(0.05)
    with pytest.raises(TimeoutError):
        far.recv(1)
    far.settimeout(20)
    other.sendall(b"still here")
    assert far.recv(20) == b"still here"
    other.close()
    assert far.recv(1) == b""


def test_shutdown_is_everybodys(shared: Any) -> None:
    """The documented trap."""
    far, one, other = shared
    one.shutdown(socket.SHUT_WR)
    with pytest.raises(BrokenPipeError):
        other.send(b"x")
    assert far.recv(1) == b""


def test_the_trap_with_a_plain_socket(tcp: Any) -> None:
    """Why SharedSocket exists: two plain sockets over one connection disturb each other."""
    _, near = tcp()
    with socket.socket(fileno=os.dup(near.fileno())) as plain:
        near.setblocking(True)
        plain.settimeout(5)  # sets O_NONBLOCK for both
        with pytest.raises(BlockingIOError):
            near.recv(1)


def test_the_trap_with_a_descriptor_left_in_an_epoll_set(tcp: Any) -> None:
    """Closing does not take a duplicated socket out of the source's epoll set; unregister it first."""
    far, near = tcp()
    with select.epoll() as ready:
        ready.register(near, select.EPOLLIN)
        number = near.fileno()
        with portway.socket_from(portway.duplicate_and_close(near, os.getpid())):
            far.sendall(b"x")
            patiently(lambda: ready.poll(0))
            assert ready.poll(0) == [(number, select.EPOLLIN)]  # events of a number that is not ours any more
        assert ready.poll(0) == []


def test_every_way_to_receive(shared: Any) -> None:
    far, one, _ = shared
    far.sendall(b"abcdefghijklmnop")
    patiently(lambda: len(one.recv(20, socket.MSG_PEEK)) == 16)
    assert one.recv(2) == b"ab"
    buffer = bytearray(4)
    assert one.recv_into(buffer, 2) == 2 and buffer == b"cd\0\0"
    assert one.recvfrom(2)[0] == b"ef"
    assert one.recvfrom_into(buffer)[0] == 4 and buffer == b"ghij"
    assert one.recvmsg(2)[0] == b"kl"
    first, second = bytearray(1), bytearray(3)
    assert one.recvmsg_into([first, second])[0] == 4 and first + second == b"mnop"


def test_every_way_to_send(shared: Any, tmp_path: Any) -> None:
    far, one, _ = shared
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    assert one.send(b"ab") == 2
    one.sendall(memoryview(b"cd"))
    one.sendall(bytearray(b"ef"))
    assert one.sendmsg([b"g", b"h"]) == 2
    with path.open("rb") as file:
        assert one.sendfile(file, 2, 5) == 5
    one.sendall(b"")
    patiently(lambda: far.recv(100, socket.MSG_PEEK)[12:])
    assert far.recv(100) == b"abcdefgh23456"


def test_datagrams() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as far:
        far.bind(("127.0.0.1", 0))
        far.settimeout(20)
        with SharedSocket.adopt(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as one:
            one.bind(("127.0.0.1", 0))
            one.settimeout(20)
            assert one.sendto(b"1", far.getsockname()) == 1
            assert one.sendto(b"2", 0, far.getsockname()) == 1
            assert one.sendmsg([b"3"], [], 0, far.getsockname()) == 1
            assert [far.recv(5) for _ in range(3)] == [b"1", b"2", b"3"]
            one.connect(far.getsockname())
            one.sendall(b"")  # an empty datagram is one
            assert far.recvfrom(5) == (b"", one.getsockname())
            far.sendto(b"back", one.getsockname())
            assert one.recvfrom(9) == (b"back", far.getsockname())


@pytest.mark.parametrize("mode", [None, 20.0])
def test_connecting(mode: float | None, tmp_path: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with SharedSocket(socket.AF_INET, socket.SOCK_STREAM) as one:
            one.settimeout(mode)
            one.connect(listener.getsockname())
            accepted, _ = listener.accept()
            with accepted:
                one.sendall(b"hi")
                assert accepted.recv(5) == b"hi"
        address = listener.getsockname()
    with SharedSocket(socket.AF_INET, socket.SOCK_STREAM) as one, pytest.raises(ConnectionRefusedError):
        one.settimeout(mode)
        one.connect(address)
    with SharedSocket(socket.AF_UNIX, socket.SOCK_STREAM) as one, pytest.raises(FileNotFoundError):
        one.connect(f"/tmp/{os.getpid()}-not-there")


def test_connecting_to_a_unix_listener_with_a_full_queue() -> None:
    name = f"\0portway-full-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(name)
        listener.listen(0)
        first.connect(name)
        with SharedSocket(socket.AF_UNIX, socket.SOCK_STREAM) as late:
            late.settimeout(0.02)
            with pytest.raises(TimeoutError):
                late.connect(name)
            late.settimeout(20)
            thread, seen = in_thread(lambda: late.connect(name))
            for _ in range(2):
                listener.accept()[0].close()
            thread.join(20)
            assert seen == [None] and late.getpeername() == name.encode()


def test_files_over_it(shared: Any) -> None:
    far, one, other = shared
    other.setblocking(False)
    with one.makefile("rwb") as file:
        far.sendall(b"line one\nline two\n")
        assert file.readline() == b"line one\n"
        file.write(b"answer\n")
        file.flush()
        assert far.recv(20) == b"answer\n"
        one.close()
        assert file.readline() == b"line two\n"  # the file keeps the descriptor
        assert isinstance(file, io.BufferedRWPair)
    assert one.fileno() == -1


def test_selectors(shared: Any) -> None:
    far, one, _ = shared
    with selectors.DefaultSelector() as selector:
        selector.register(one, selectors.EVENT_READ)
        assert selector.select(0) == []
        far.sendall(b"x")
        assert [key.fileobj for key, _ in selector.select(20)] == [one]
        assert one.recv(5) == b"x"


def test_asyncio_streams(shared: Any) -> None:
    far, one, _ = shared

    async def talk() -> bytes:
        reader, writer = await asyncio.open_connection(sock=one)
        writer.write(b"from asyncio\n")
        await writer.drain()
        line = await reader.readline()
        writer.close()
        await writer.wait_closed()
        return line

    far.sendall(b"to asyncio\n")
    assert asyncio.run(talk()) == b"to asyncio\n"
    assert far.recv(20) == b"from asyncio\n"


def test_asyncio_socket_calls() -> None:
    async def serve() -> bytes:
        loop = asyncio.get_running_loop()
        with SharedSocket.adopt(socket.create_server(("127.0.0.1", 0))) as listener, socket.socket() as client:
            listener.setblocking(False)
            client.setblocking(False)
            await loop.sock_connect(client, listener.getsockname())
            conn, _ = await loop.sock_accept(listener)
            with SharedSocket.adopt(conn) as shared:
                await loop.sock_sendall(client, b"hi")
                return await loop.sock_recv(shared, 5)

    assert asyncio.run(serve()) == b"hi"


def test_adopting_and_duplicating_keep_what_it_is(tcp: Any) -> None:
    far, near = tcp()
    near.settimeout(4)
    one = SharedSocket.adopt(near)
    assert near.fileno() == -1 and one.gettimeout() == 4 and one.information is None and one.unread == b"" == one.state
    info = portway.duplicate_socket(one, os.getpid(), unread=b"u", state=b"s")
    with one, portway.socket_from(info) as two, two.dup() as three:
        assert two.information == three.information == info
        assert (three.unread, three.state, three.gettimeout()) == (b"u", b"s", 4.0)
        assert type(three) is SharedSocket and not os.get_inheritable(three.fileno())
        three.sendall(b"x")
        assert far.recv(1) == b"x"
        again = portway.socket_from(portway.duplicate_socket(two, os.getpid()))
        with again:
            assert again.unread == b""  # luggage is given anew each time


def test_detach_gives_the_descriptor_away(shared: Any) -> None:
    far, one, _ = shared
    number = one.detach()
    with socket.socket(fileno=number) as plain:
        plain.sendall(b"x")
    assert one.fileno() == -1 and far.recv(1) == b"x"
