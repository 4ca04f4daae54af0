"""Source and target are killed at random points, hundreds of times: nothing is left behind."""

from __future__ import annotations

import os
import random
import socket
from typing import Any

import pytest
from handoff_peers import Zygote, descriptors, patiently

ROUNDS = 400

# Both sides run as fast as they can until they are killed; records go from one to the other over `wire`.
TARGET = """
def take():
    while True:
        data = wire.recv(65536)
        try:
            with portway.socket_from(data) as sock: sock.send(b"t")
        except errors.HandoffError: pass
        if box is not None:
            while True:
                try: box.receive(0).close()
                except errors.OperationTimeout: break
box = portway.HandoffInbox() if way == "message" else None
"""
SOURCE = """
def give():
    while True:
        info = portway.duplicate_socket(sock, pid, way=way, unread=b"u" * 100)
        wire.send(bytes(info))
        if way == "message":
            with portway.HandoffSession(pid) as session:
                session.send_many([sock] * 3)
                session.send(sock, unread=b"x" * 150_000)
"""


def inboxes(pids: set[int]) -> set[str]:
    """The abstract names that processes of these numbers hold."""
    with open("/proc/net/unix") as file:
        names = {line.split()[-1] for line in file if "@portway/handoff/1/" in line}
    return {name for name in names if int(name.split("/")[3]) in pids}


def tcp_states(ports: set[int]) -> dict[int, set[str]]:
    """port -> states of the connections from or to it; 06 (TIME_WAIT) needs no process."""
    seen: dict[int, set[str]] = {}
    with open("/proc/net/tcp") as file:
        for line in list(file)[1:]:
            fields = line.split()
            for address in fields[1:3]:
                port = int(address.split(":")[1], 16)
                if port in ports:
                    seen.setdefault(port, set()).add(fields[3])
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("way", ["message", "pid"])
def test_both_sides_killed_at_random_points(way: str, zygote: Zygote, tmp_path: Any) -> None:
    rng = random.Random(way)
    before, ports, pids = descriptors(), set[int](), set[int]()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for turn in range(ROUNDS):
            far = socket.create_connection(listener.getsockname())
            near, _ = listener.accept()
            ports.add(far.getsockname()[1])
            pids |= one_round(way, rng, turn, zygote, far, near, str(tmp_path))
            far.close()
    patiently(lambda: not inboxes(pids))
    assert descriptors() == before
    patiently(lambda: all(states <= {"06"} for states in tcp_states(ports).values()))
    assert os.listdir(tmp_path) == []


def one_round(
    way: str, rng: random.Random, turn: int, zygote: Zygote, far: socket.socket, near: socket.socket, folder: str
) -> set[int]:
    """Either side first, or both at once; the connection ends when both have. The pids."""
    source, target = zygote.peer(), zygote.peer()
    try:
        a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        source.give(sock=near, wire=a)
        target.give(wire=b)
        for one in (source, target):
            one.run("os.chdir(folder)\nos.environ['TMPDIR'] = folder", folder=folder)
        target.run(TARGET, way=way)
        source.run(SOURCE, way=way, pid=target.pid)
        target.start("take()")
        source.start("give()")
        spin(rng.randrange(1, 60_000))
        first, second = rng.sample([source, target], 2)
        first.kill()
        if turn % 2:
            spin(rng.randrange(1, 20_000))
        second.kill()
        read_to_the_end(far)
        return {source.pid, target.pid}
    finally:
        source.close()
        target.close()


def spin(turns: int) -> None:
    """Some time, without a clock."""
    for _ in range(turns):
        pass


def read_to_the_end(far: socket.socket) -> None:
    """The peer sees the end of the stream (or a reset) once both are gone."""
    far.settimeout(20)
    try:
        while far.recv(65536):
            pass
    except ConnectionResetError:
        pass


@pytest.mark.slow
def test_a_survivor_holds_nothing_of_those_that_were_killed(zygote: Zygote) -> None:
    """One target, a hundred sources killed in the middle of a push; one source, a hundred targets killed likewise."""
    rng = random.Random(5)
    target, source = zygote.peer(), zygote.peer()
    target.run("box = portway.HandoffInbox()")
    source.run("a, b = socket.socketpair()\nsock = b")
    held, theirs = target.descriptors(), source.descriptors()
    for _ in range(100):
        short = zygote.peer()
        short.run("sock = socket.socket()\n", pid=target.pid)
        short.start("""
with portway.HandoffSession(pid) as session:
    while True:
        session.send(sock, unread=b"x" * 100_000)
        session.duplicate(sock)
""")
        spin(rng.randrange(1, 40_000))
        short.close()
        target.run("""
while True:
    try: box.receive(0).close()
    except errors.OperationTimeout: break
for nonce, (_, fds) in list(box._addressed.items()):
    for fd in fds: os.close(fd)
    del box._addressed[nonce]
""")
    patiently(lambda: target.run("len(box._lines)") == 0)
    target.run("while True:\n    try: box.receive(0).close()\n    except errors.OperationTimeout: break")
    target.run("for _, fds in box._addressed.values():\n    for fd in fds: os.close(fd)\nbox._addressed.clear()")
    patiently(lambda: same_but_the_reaper(target.descriptors(), held))
    for _ in range(100):
        short = zygote.peer()
        short.start("portway.socket_from(info)" if rng.random() < 0.5 else "1", info=source.run(
            "portway.duplicate_socket(sock, pid, way='pid', expires=0.3)", pid=short.pid))  # fmt: skip
        spin(rng.randrange(1, 20_000))
        short.close()
    source.run("patiently(lambda: not offer._offers)")
    patiently(lambda: same_but_the_reaper(source.descriptors(), theirs))
    for one in (source, target):
        one.close()


def same_but_the_reaper(now: dict[int, str], before: dict[int, str]) -> bool:
    def count(there: dict[int, str]) -> int:
        return sum("eventfd" not in what for what in there.values())

    return count(now) == count(before)
