"""Every kind of socket, both ways, between processes related in every way."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from handoff_peers import Peer, patiently

import portway
from portway import SocketInformation
from portway.errors import HandoffRefused, UnsupportedSocket

WAYS = ["message", "pid"]
Made = tuple[socket.socket, Callable[[], socket.socket]]  # what is handed over, and how the test talks to it


def listening(family: int, kind: int, address: Any) -> Made:
    listener = socket.socket(family, kind)
    listener.bind(address)
    listener.listen()

    def talk() -> socket.socket:
        client = socket.socket(family, kind)
        client.connect(name)
        return client

    name = listener.getsockname()
    return listener, talk


def connected(family: int, kind: int, address: Any) -> Made:
    listener, talk = listening(family, kind, address)
    with listener:
        client = talk()
        server, _ = listener.accept()
    return server, lambda: client


def datagram(family: int, address: Any, own: Any) -> Made:
    bound = socket.socket(family, socket.SOCK_DGRAM)
    bound.bind(address)
    name = bound.getsockname()

    def talk() -> socket.socket:
        client = socket.socket(family, socket.SOCK_DGRAM)
        client.bind(own)
        client.connect(name)
        return client

    return bound, talk


LOCAL, SIX = ("127.0.0.1", 0), ("::1", 0)
KINDS: dict[str, Callable[[str], Made]] = {
    "tcp4-listening": lambda at: listening(socket.AF_INET, socket.SOCK_STREAM, LOCAL),
    "tcp4-connected": lambda at: connected(socket.AF_INET, socket.SOCK_STREAM, LOCAL),
    "tcp6-listening": lambda at: listening(socket.AF_INET6, socket.SOCK_STREAM, SIX),
    "tcp6-connected": lambda at: connected(socket.AF_INET6, socket.SOCK_STREAM, SIX),
    "udp4": lambda at: datagram(socket.AF_INET, LOCAL, LOCAL),
    "udp6": lambda at: datagram(socket.AF_INET6, SIX, SIX),
    "unix-stream-path": lambda at: listening(socket.AF_UNIX, socket.SOCK_STREAM, f"{at}/s"),
    "unix-stream-abstract": lambda at: listening(socket.AF_UNIX, socket.SOCK_STREAM, f"\0{at}/s"),
    "unix-stream-connected": lambda at: connected(socket.AF_UNIX, socket.SOCK_STREAM, f"{at}/s"),
    "unix-seqpacket-path": lambda at: listening(socket.AF_UNIX, socket.SOCK_SEQPACKET, f"{at}/s"),
    "unix-seqpacket-connected": lambda at: connected(socket.AF_UNIX, socket.SOCK_SEQPACKET, f"\0{at}/s"),
    "unix-dgram-path": lambda at: datagram(socket.AF_UNIX, f"{at}/d", f"{at}/own"),
    "unix-dgram-abstract": lambda at: datagram(socket.AF_UNIX, f"\0{at}/d", f"\0{at}/own"),
}
ECHO = """
if listening:
    conn, _ = s.accept()
    with conn: conn.sendall(conn.recv(100).upper())
elif s.type == socket.SOCK_DGRAM and not info.connected:
    data, address = s.recvfrom(100)
    s.sendto(data.upper(), address)
else:
    s.sendall(s.recv(100).upper())
"""


@pytest.fixture
def short(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A folder whose name fits a Unix address."""
    import shutil
    import tempfile

    folder = tempfile.mkdtemp(prefix="pw")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind: str, way: str, peer: Callable[..., Peer], short: str) -> None:
    sock, talk = KINDS[kind](short)
    source, target = peer(), peer()
    facts = sock.family, sock.type, sock.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL), sock.getsockname()
    source.give(sock=sock)
    if way == "message":
        target.run("box = portway.HandoffInbox()")
    info = source.run("portway.duplicate_and_close(sock, pid, way=way)", pid=target.pid, way=way)
    assert (info.family, info.type, info.protocol, info.local_address) == facts
    assert info.listening == ("listening" in kind or kind in ("unix-stream-path", "unix-stream-abstract",
                                                              "unix-seqpacket-path"))  # fmt: skip
    assert info.connected == kind.endswith("connected") and info.way == way
    target.run("s = portway.socket_from(info)", info=info)
    assert target.run("s.family, s.type, s.proto, s.getsockname()") == facts
    target.start(ECHO, listening=info.listening)
    with talk() as client:
        client.settimeout(20)
        client.sendall(b"hello")
        assert client.recv(100) == b"HELLO"
        target.result()
    target.run("s.close()")
    assert not source.run("len(offer._offers)") or patiently(lambda: not source.run("len(offer._offers)"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("mode", "expected"), [(None, None), (0.0, 0.0), (2.5, 2.5)])
def test_the_mode_travels(way: str, mode: float | None, expected: float | None, peer: Any, tcp: Any) -> None:
    _, server = tcp()
    server.settimeout(mode)
    with portway.HandoffInbox():
        for given, seen in (({}, expected), ({"target_timeout": 7.0}, 7.0), ({"target_timeout": None}, None)):
            info = portway.duplicate_socket(server, os.getpid(), way=way, **given)  # type: ignore[arg-type]
            assert info.timeout == seen and info.blocking == (seen != 0.0)
            with portway.socket_from(info) as sock:
                assert sock.gettimeout() == seen


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("who", ["we", "they"])
def test_half_closed(way: str, who: str, peer: Any, tcp: Any) -> None:
    client, server = tcp()
    if who == "we":
        server.shutdown(socket.SHUT_WR)
    else:
        client.sendall(b"last words")
        client.shutdown(socket.SHUT_WR)
    target = peer()
    if way == "message":
        target.run("box = portway.HandoffInbox()")
    source = peer()
    source.give(sock=server)
    info = source.run("portway.duplicate_and_close(sock, pid, way=way)", pid=target.pid, way=way)
    target.run("s = portway.socket_from(info)", info=info)
    if who == "we":
        assert client.recv(10) == b""
        client.sendall(b"still")
        assert target.run("s.recv(10)") == b"still"
    else:
        assert target.run("s.recv(10), s.recv(10)") == (b"last words", b"")
        target.run("s.sendall(b'answer')")
        assert client.recv(10) == b"answer"


# -- ways to be related ----------------------------------------------------------------------------------------------


def claim(conn: Any, inbox: bool) -> None:
    """In the child: says who it is, claims what it gets, echoes once."""
    box = portway.HandoffInbox() if inbox else None
    conn.send(os.getpid())
    with portway.socket_from(conn.recv()) as sock:
        sock.sendall(sock.recv(100).upper())
    if box:
        box.close()


def stop_helpers() -> None:
    """What multiprocessing started for itself and would keep until the end."""
    from multiprocessing import forkserver, resource_tracker

    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]


@pytest.mark.parametrize("inbox", [True, False], ids=WAYS)
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_of_multiprocessing(method: str, inbox: bool, tcp: Any) -> None:
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    child = context.Process(target=claim, args=(theirs, inbox))
    child.start()
    theirs.close()
    try:
        client, server = tcp()
        assert ours.poll(30)
        ours.send(portway.duplicate_and_close(server, ours.recv()))
        client.sendall(b"abc")
        assert client.recv(10) == b"ABC"
    finally:
        child.join(30)
        if child.is_alive():
            child.kill()
            child.join()
        code = child.exitcode
        child.close()
        ours.close()
        stop_helpers()
    assert code == 0


def test_an_unrelated_program_gets_text_on_its_standard_input(tcp: Any) -> None:
    client, server = tcp()
    code = "import sys, portway\nwith portway.socket_from(sys.stdin.readline()) as s: s.sendall(s.recv(9).upper())"
    program = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True)
    try:
        client.sendall(b"text")
        program.communicate(portway.duplicate_and_close(server, program.pid).to_text() + "\n", timeout=30)
        assert client.recv(9) == b"TEXT" and program.returncode == 0
    finally:
        program.kill()
        program.wait()


# -- the own process -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_another_thread_of_this_process(way: str, tcp: Any) -> None:
    client, server = tcp()
    client.sendall(b"abc")
    seen: list[Any] = []

    def work(info: SocketInformation) -> None:
        with portway.socket_from(info) as sock:
            seen.append(sock.recv(10))

    with portway.HandoffInbox():
        info = portway.duplicate_and_close(server, os.getpid(), way=way)
        thread = threading.Thread(target=work, args=(info,))
        thread.start()
        thread.join(20)
    assert seen == [b"abc"]


def test_the_own_process_by_itself_is_by_pid_for_every_interpreter(tcp: Any) -> None:
    with portway.HandoffInbox():
        info = portway.duplicate_socket(tcp()[1], os.getpid())
        assert info.way == "pid"
        portway.socket_from(info).close()


def interpreters() -> Any:
    """(create, run, destroy) of this Python, or a skip."""
    try:
        import _interpreters as module  # 3.13
    except ImportError:
        module = pytest.importorskip("_xxsubinterpreters", reason="this Python has no subinterpreters to try")
    return module


IN_INTERPRETER = """
import sys
sys.path[:] = {path!r}
import os
os.environ["PORTWAY_IMPL"] = "python"  # Cython modules load in the first interpreter only
import portway
with portway.socket_from({text!r}) as sock:
    sock.sendall(sock.recv(10).upper())
"""


def test_another_interpreter_of_this_process() -> None:
    """In a program of its own: an interpreter may keep modules, and so descriptors, until the end."""
    interpreters()
    code = f"""
import os, socket, sys
try: import _interpreters as module
except ImportError: import _xxsubinterpreters as module
import portway
a, b = socket.socketpair()
info = portway.duplicate_socket(b, os.getpid())
a.sendall(b"abc")
one = module.create()
failed = module.run_string(one, {IN_INTERPRETER!r}.format(path=sys.path, text=info.to_text()))
assert failed is None, failed
a.settimeout(10)
print(a.recv(10).decode())
portway.wait_claimed(info, 10)
module.destroy(one)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "ABC\n", done.stderr


# -- what cannot be duplicated ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [None, 5, "socket", object()])
def test_what_is_no_socket(bad: Any) -> None:
    with pytest.raises((UnsupportedSocket, AttributeError), match="no socket"):
        portway.duplicate_socket(bad, os.getpid(), provider="kernel")


def test_sockets_that_cannot_travel(tcp: Any) -> None:
    import ssl

    closed = socket.socket()
    closed.close()
    with pytest.raises(UnsupportedSocket, match="closed"):
        portway.duplicate_socket(closed, os.getpid())
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as netlink:
        with pytest.raises(UnsupportedSocket, match="address family 16"):
            portway.duplicate_socket(netlink, os.getpid())
    _, server = tcp()
    with ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).wrap_socket(
        server, server_side=True, do_handshake_on_connect=False
    ) as tls:
        with pytest.raises(UnsupportedSocket, match="TLS"):
            portway.duplicate_socket(tls, os.getpid())


def test_after_an_error_the_source_still_has_it(tcp: Any) -> None:
    client, server = tcp()
    with pytest.raises(HandoffRefused, match="no open HandoffInbox"):
        portway.duplicate_and_close(server, os.getpid(), way="message")
    with pytest.raises(ValueError, match="'by-magic'"):
        portway.duplicate_and_close(server, os.getpid(), way="by-magic")  # type: ignore[arg-type]
    for bad in (0, -1, float("nan"), float("inf"), 1e30):
        with pytest.raises(ValueError, match="expires="):
            portway.duplicate_and_close(server, os.getpid(), expires=bad)
    for bad in (-1, float("nan"), float("inf"), 1e300):
        with pytest.raises(ValueError, match="for the target"):
            portway.duplicate_and_close(server, os.getpid(), target_timeout=bad)
    server.sendall(b"here")
    assert client.recv(10) == b"here"


def test_records_travel_by_pickle(tcp: Any) -> None:
    info = portway.duplicate_socket(tcp()[1], os.getpid())
    portway.socket_from(pickle.loads(pickle.dumps(info))).close()
    portway.wait_claimed(info, 10)
