"""Real .NET at the other end: listening and connected sockets go to it and come back, by plain SCM_RIGHTS."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import portway
from portway.kernel.fdpass import receive_descriptors, send_descriptors

pytestmark = pytest.mark.netpeer


class Netpeer:
    """One running ``netpeer handover``; its events are read in order."""

    def __init__(self, program: Path, *arguments: str, fds: tuple[int, ...] = ()) -> None:
        self.process = subprocess.Popen(
            [program, "handover", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=fds
        )

    def event(self, name: str) -> dict[str, Any]:
        """The next event, which must be this one."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"netpeer ended before it said {name!r}"
        said: dict[str, Any] = json.loads(line)
        assert said["event"] == name, said
        return said

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def start(netpeer: Path) -> Iterator[Any]:
    running: list[Netpeer] = []

    def begin(*arguments: str, **options: Any) -> Netpeer:
        running.append(Netpeer(netpeer, *arguments, **options))
        return running[-1]

    yield begin
    for one in running:
        one.close()


@pytest.fixture
def path() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="pw")
    yield f"{folder}/s"
    shutil.rmtree(folder)


def echo(sock: socket.socket, data: bytes) -> None:
    sock.settimeout(20)
    sock.sendall(data)
    got = b""
    while len(got) < len(data):
        part = sock.recv(65536)
        assert part, f"the end after {len(got)} bytes"
        got += part
    assert got == data


def connect(path: str) -> socket.socket:
    line = socket.socket(socket.AF_UNIX)
    line.settimeout(20)
    line.connect(path)
    return line


def test_a_connected_socket_goes_to_dotnet(start: Any, path: str, tcp: Any) -> None:
    far, near = tcp()
    dotnet = start("receive", "--socket", path, "--listen", "--ack")
    dotnet.event("listening")
    with connect(path) as line:
        far.sendall(b"sent before")  # bytes already received travel with it
        send_descriptors(line, b"here", [near.fileno()], timeout=20)
        assert line.recv(10) == b"ok"
    near.close()
    assert dotnet.event("received") == {"event": "received", "count": 1, "data": "here"}
    adopted = dotnet.event("adopted")
    assert (adopted["family"], adopted["type"], adopted["connected"]) == ("InterNetwork", "Stream", True)
    far.settimeout(20)
    assert far.recv(11, socket.MSG_WAITALL) == b"sent before"
    echo(far, os.urandom(200_000))
    far.shutdown(socket.SHUT_WR)
    assert dotnet.event("closed")["bytes"] == 200_011


def test_a_listening_socket_goes_to_dotnet_and_is_used_by_both(start: Any, path: str) -> None:
    dotnet = start("receive", "--socket", path, "--listen", "--ack")
    dotnet.event("listening")
    with socket.create_server(("127.0.0.1", 0)) as listener, connect(path) as line:
        send_descriptors(line, b"x", [listener.fileno()], timeout=20)
        assert line.recv(10) == b"ok"
        dotnet.event("received")
        assert dotnet.event("listening")["port"] == listener.getsockname()[1]
        address = listener.getsockname()
        with socket.create_connection(address) as client:
            echo(client, b"answered by .NET")
            dotnet.event("accepted")
    with socket.create_connection(address) as client:  # after our own is closed
        echo(client, b"still")


def test_inherited_sockets_are_adopted(start: Any, tcp: Any) -> None:
    far, near = tcp()
    near.set_inheritable(True)
    dotnet = start("adopt", "--fd", str(near.fileno()), fds=(near.fileno(),))
    near.close()
    dotnet.event("adopted")
    echo(far, b"adopted")


@pytest.mark.parametrize("on", ["receive", "portway"])
def test_a_listening_socket_comes_from_dotnet(on: str, start: Any, path: str, peer: Any) -> None:
    """Then it goes on to a third process, by portway."""
    dotnet = start("send", "--socket", path, "--listen", "--wait")
    dotnet.event("listening")
    with connect(path) as line:
        data, fds = receive_descriptors(line, timeout=20)
        assert data == b"socket" and len(fds) == 1 and not os.get_inheritable(fds[0])
        assert dotnet.event("sent")["kind"] == "listen"
        line.sendall(b"ok")
        dotnet.event("answer")
    assert dotnet.process.wait(20) == 0  # .NET is gone, its socket is ours
    listener = portway.SharedSocket(fileno=fds[0])
    address = listener.getsockname()
    if on == "portway":
        target = peer()
        info = portway.duplicate_and_close(listener, target.pid)
        target.run("listener = portway.socket_from(info)", info=info)
        portway.wait_claimed(info, 20)
        target.start("conn, _ = listener.accept()\nwith conn: conn.sendall(conn.recv(100))")
        with socket.create_connection(address) as client:
            echo(client, b"over three processes")
        target.result()
        return
    with listener, socket.create_connection(address) as client:
        conn, _ = listener.accept()
        with conn:
            conn.sendall(b"hi")
            assert client.recv(5) == b"hi"


def test_a_connected_socket_comes_from_dotnet_and_goes_back(start: Any, path: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dotnet = start("send", "--socket", path, "--listen", "--kind", "connected", "--port",
                       str(listener.getsockname()[1]), "--wait")  # fmt: skip
        dotnet.event("listening")
        far, _ = listener.accept()
    with far, connect(path) as line:
        _, fds = receive_descriptors(line, timeout=20)
        dotnet.event("sent")
        with portway.SharedSocket(fileno=fds[0]) as sock:
            sock.sendall(b"from Python over a .NET socket")
            assert far.recv(100) == b"from Python over a .NET socket"
            line.sendall(b"ok")
            dotnet.event("answer")
            assert dotnet.process.wait(20) == 0
            sock.sendall(b"after .NET closed its own")
            assert far.recv(100) == b"after .NET closed its own"
            again = start("receive", "--socket", path, "--listen", "--ack")
            again.event("listening")
            with connect(path) as back:
                send_descriptors(back, b"back", [sock.fileno()], timeout=20)
                assert back.recv(10) == b"ok"
        echo(far, b"and back in .NET")


def test_sixteen_at_once(start: Any, path: str) -> None:
    dotnet = start("receive", "--socket", path, "--listen", "--ack")
    dotnet.event("listening")
    pairs = [socket.socketpair() for _ in range(16)]
    with connect(path) as line:
        send_descriptors(line, b"16", [b.fileno() for _, b in pairs], timeout=20)
        assert line.recv(10) == b"ok"
    for a, b in pairs:
        b.close()
        echo(a, os.urandom(1000))
        a.close()


def test_async_use_in_dotnet_sets_the_shared_flag_and_ours_does_not_care(start: Any, path: str, tcp: Any) -> None:
    """As recorded of .NET: async use sets O_NONBLOCK on the shared description. Here the flag is set by us in its
    stead; a SharedSocket of ours over a connection that .NET has, too, waits all the same."""
    far, near = tcp()
    dotnet = start("receive", "--socket", path, "--listen", "--ack")
    dotnet.event("listening")
    with connect(path) as line:
        send_descriptors(line, b"x", [near.fileno()], timeout=20)
        assert line.recv(10) == b"ok"
    dotnet.event("received")
    dotnet.event("adopted")
    with portway.SharedSocket.adopt(near) as shared:
        os.set_blocking(shared.fileno(), False)
        shared.sendall(b"from us")
        assert far.recv(10) == b"from us"
        shared.settimeout(0.05)
        with pytest.raises(TimeoutError):
            shared.recv(1)
