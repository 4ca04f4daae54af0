"""Ends of pipes that move to unrelated processes: nothing unread is lost, the instance and the name go along."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import pytest

import portway
from portway import errors
from portway.kernel.ofdlock import all_locked, try_lock
from portway.kernel.pipe_handoff import PipeHandoff

pytestmark = pytest.mark.usefixtures("no_leaks")
RECEIVE = "end = portway.socket_from(record); (end.mode, end.name, end.is_server, end.timeout)"


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return str(tmp_path)


def conversation(world: str, **options: Any) -> tuple[Any, Any, Any]:
    server = portway.NamedPipeServer("Moving", root=world, **options)
    client = portway.NamedPipeClient("moving", root=world)
    return server, client, server.accept(timeout=5)


def settled(world: str) -> list[str]:
    """What one listing leaves on disk."""
    assert portway.list_pipes(root=world) == []
    return [str(path) for path in Path(world).rglob("*") if not path.name.startswith("portway-pipe-")]


@pytest.mark.parametrize("side", ["server", "client"])
@pytest.mark.parametrize("way", ["message", "pid"])
def test_a_half_read_message_goes_along(world: str, peer: Any, side: str, way: str) -> None:
    server, client, end = conversation(world, mode="message")
    moving, staying = (end, client) if side == "server" else (client, end)
    moving.timeout = 7.5
    target = peer()
    if way == "message":
        target.run("box = portway.HandoffInbox()")
    staying.send(b"0123456789")
    staying.send(b"second")
    with pytest.raises(errors.MoreData) as more:
        moving.receive(4)
    assert more.value.data == b"0123"
    info = portway.duplicate_and_close(moving, target.pid, provider="pipe", way=way)
    assert moving.closed or way == "pid"
    facts = target.run(RECEIVE, record=bytes(info))
    assert facts == ("message", "Moving" if side == "server" else "moving", side == "server", 7.5)
    assert target.run("end.receive(), end.receive()") == (b"456789", b"second")
    target.run("end.send(b'from there')")
    assert staying.receive(timeout=10) == b"from there"
    target.run("end.close(); box.close()" if way == "message" else "end.close()")
    with pytest.raises(errors.BrokenPipe):
        staying.receive(timeout=10)
    for one in (staying, moving, server):
        one.close()
    assert settled(world) == []


def test_a_message_gathered_in_part_goes_along(world: str, peer: Any) -> None:
    server, client, end = conversation(world, mode="message")
    message = os.urandom(800_000)  # more than the queue holds: the sender waits in the middle
    target = peer()
    target.run("box = portway.HandoffInbox()")
    sender = peer()
    sender.run("box = portway.HandoffInbox()")
    info = portway.duplicate_and_close(client, sender.pid, provider="pipe")
    sender.run(RECEIVE, record=bytes(info))
    sender.start("end.send(message)", message=message)
    with pytest.raises(errors.OperationTimeout):
        while True:
            end.receive(timeout=0)  # takes what has come so far, then gives up: now it lies in this process
    gathered = end.travel_state()[0]
    info = portway.duplicate_and_close(end, target.pid, provider="pipe")
    target.run(RECEIVE, record=bytes(info))
    assert target.run("end.receive(timeout=20)") == message
    assert message.startswith(gathered)
    assert sender.result() == len(message)
    for one in (target, sender):
        one.run("end.close(); box.close()")
    server.close()


@pytest.mark.parametrize("side", ["server", "client"])
def test_a_stream_moves(world: str, peer: Any, side: str) -> None:
    server, client, end = conversation(world)
    moving, staying = (end, client) if side == "server" else (client, end)
    target = peer()
    target.run("box = portway.HandoffInbox()")
    staying.send(b"abcdef")
    assert moving.receive(2) == b"ab"
    target.run(RECEIVE, record=bytes(portway.duplicate_and_close(moving, target.pid, provider="pipe")))
    assert target.run("end.receive()") == b"cdef"
    target.run("end.close(); box.close()")
    staying.close()
    server.close()
    assert settled(world) == []


def test_the_instance_moves_with_its_end(world: str, peer: Any) -> None:
    """It counts while the end lives there, whatever becomes of the server; so does the name."""
    server, client, end = conversation(world, mode="message", max_instances=1)
    target = peer()
    target.run("box = portway.HandoffInbox()")
    target.run(RECEIVE, record=bytes(portway.duplicate_and_close(end, target.pid, provider="pipe")))
    (pipe,) = portway.list_pipes(root=world)
    assert (pipe.instances, pipe.in_use) == (1, 1)
    assert pipe.detail[0].server_pid == target.pid
    with pytest.raises(errors.PipeBusy):
        portway.NamedPipeClient("moving", root=world)
    server.close()
    with pytest.raises(errors.PipeBusy):  # the name exists as long as the conversation
        portway.NamedPipeClient("moving", root=world)
    with pytest.raises(errors.PipeBusy):
        portway.NamedPipeServer("Moving", mode="message", root=world)
    target.kill()
    with pytest.raises(errors.BrokenPipe):
        client.receive(timeout=10)
    client.close()
    with pytest.raises(errors.PipeNotFound):
        portway.NamedPipeClient("moving", root=world)
    assert settled(world) == []


def test_a_moved_server_end_disconnects(world: str, peer: Any) -> None:
    server, client, end = conversation(world, mode="message")
    target = peer()
    target.run("box = portway.HandoffInbox()")
    target.run(RECEIVE, record=bytes(portway.duplicate_and_close(end, target.pid, provider="pipe")))
    target.run("end.send(b'never read'); end.disconnect(); box.close()")
    with pytest.raises(errors.PipeNotConnected):
        client.receive(timeout=10)
    client.close()
    server.close()


def test_a_moved_client_end_is_disconnected(world: str, peer: Any) -> None:
    server, client, end = conversation(world, mode="message")
    target = peer()
    target.run("box = portway.HandoffInbox()")
    target.run(RECEIVE, record=bytes(portway.duplicate_and_close(client, target.pid, provider="pipe")))
    end.send(b"never read")
    end.disconnect()
    with pytest.raises(errors.PipeNotConnected):
        target.run("end.receive(timeout=10)")
    target.run("end.close(); box.close()")
    server.close()


def test_both_keep_a_duplicate(world: str, peer: Any) -> None:
    """duplicate_socket: the connection lives until the last duplicate closes, and so does its place."""
    server, client, end = conversation(world, mode="message", max_instances=2, backlog=1)
    target = peer()
    target.run("box = portway.HandoffInbox()")
    target.run(RECEIVE, record=bytes(portway.duplicate_socket(end, target.pid, provider="pipe")))
    end.close()
    target.run("end.send(b'still here')")
    assert client.receive(timeout=10) == b"still here"
    (pipe,) = portway.list_pipes(root=world)
    assert pipe.instances == 2
    target.run("end.close(); box.close()")
    with pytest.raises(errors.BrokenPipe):
        client.receive(timeout=10)
    client.close()
    server.close()
    assert settled(world) == []


def test_what_is_no_end_or_comes_damaged_is_refused(world: str, peer: Any) -> None:
    server, client, end = conversation(world, mode="message")
    with pytest.raises(errors.UnsupportedSocket):
        portway.duplicate_socket(object(), os.getpid(), provider="pipe")
    parcel = PipeHandoff().duplicate(client, 1)
    whole = parcel.reserved
    for cut in range(len(whole)):
        parcel.reserved = whole[:cut]
        with pytest.raises(errors.InvalidInformation):
            PipeHandoff().restore(parcel)
    nan = struct.pack("<d", float("nan"))
    for at, bad in ((0, b"\2"), (1, b"\xff"), (2, b"\0"), (3, b"\xff"), (17, nan)):
        parcel.reserved = whole[:at] + bad + whole[at + len(bad) :]
        with pytest.raises(errors.InvalidInformation):
            PipeHandoff().restore(parcel)
    client.send(b"unharmed")
    assert end.receive(timeout=5) == b"unharmed"
    for one in (client, end, server):
        one.close()


def test_every_lock_of_other_descriptions_is_seen(tmp_path: Path) -> None:
    """The kernel tells of one lock at a time, in no order, and joins neighbours of one owner."""
    path = tmp_path / "locks"
    fds = [os.open(path, os.O_RDWR | os.O_CREAT) for _ in range(4)]
    for fd, at in ((fds[0], 9), (fds[1], 3), (fds[1], 4), (fds[2], 7), (fds[0], 5), (fds[2], 40)):
        assert try_lock(fd, at)
    assert all_locked(fds[3], 0, 30) == [3, 4, 5, 7, 9]
    assert all_locked(fds[3], 4, 4) == [4, 5, 7]
    for fd in fds:
        os.close(fd)
