"""Who is at the other end, and acting as that user: on one thread only, and back."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from handoff_peers import patiently

import portway
from portway import aio, errors
from portway._accel import identity as native
from portway.kernel.pipe_identity import Identity, identity_of, impersonate, run_as
from portway.kernel.process import start_time
from portway.kernel.security import Security

pytestmark = pytest.mark.usefixtures("no_leaks")
ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not ROOT, reason="only root can become another user")
SOMEBODY = Identity(1, 1234, 1234, (4321, 4322), None)


def status(thread: int | str = "self") -> dict[str, list[int]]:
    """Uid and Gid (real, effective, saved, file system) and Groups of one thread, as the kernel tells."""
    lines = Path(f"/proc/self/task/{thread}/status" if thread != "self" else "/proc/thread-self/status").read_text()
    fields = dict(line.split(":", 1) for line in lines.splitlines())
    return {name: [int(one) for one in fields[name].split()] for name in ("Uid", "Gid", "Groups")}


def test_the_peer_is_who_the_kernel_says(tmp_path: Path, peer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    uid = 1234 if ROOT else None
    tmp_path.chmod(0o1777)
    for parent in tmp_path.parents[:3]:
        if parent.stat().st_uid == os.geteuid() and parent != Path("/tmp"):
            parent.chmod(0o755)
    server = portway.NamedPipeServer("who", security=Security.everyone(), root=tmp_path)
    client = peer(uid)
    theirs = client.run("c = portway.NamedPipeClient('who', root=root); c.peer", root=str(tmp_path))
    with server, server.accept(timeout=5) as pipe:
        assert pipe.peer.pid == client.pid
        assert (pipe.peer.uid, pipe.peer.gid) == ((uid, uid) if uid else (os.geteuid(), os.getegid()))
        assert pipe.peer.start_time == start_time(client.pid)
        assert not pipe.peer.is_nobody
        client.kill()
        assert pipe.peer.start_time is None  # never another process's that has the number now
    assert (theirs.pid, theirs.uid, theirs.start_time) == (os.getpid(), os.geteuid(), start_time(os.getpid()))


def test_groups_of_the_peer() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert set(identity_of(ours.fileno()).groups) == set(os.getgroups())


@needs_root
def test_one_thread_acts_as_the_client_and_comes_back(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents[:3]:
        if parent != Path("/tmp"):
            parent.chmod(0o755)
    secret = tmp_path / "secret"
    secret.write_text("root's")
    secret.chmod(0o600)
    before, main = status(), threading.get_native_id()
    other, stop = [], threading.Event()
    bystander = threading.Thread(target=lambda: (other.append(threading.get_native_id()), stop.wait(20)))
    bystander.start()
    patiently(lambda: other)
    try:
        with impersonate(SOMEBODY) as identity:
            assert identity is SOMEBODY
            now = status()
            assert (now["Uid"][1], now["Uid"][3], now["Gid"][1], now["Gid"][3]) == (1234,) * 4
            assert sorted(now["Groups"]) == [4321, 4322]
            assert (now["Uid"][0], now["Uid"][2]) == (0, 0)  # or the client's user could kill this process
            assert status(other[0]) == before
            with pytest.raises(PermissionError):
                secret.read_text()
            made = tmp_path / "made"
            made.write_text("x")
            assert (made.stat().st_uid, made.stat().st_gid) == (1234, 1234)
            with pytest.raises(errors.InvalidParameter), impersonate(SOMEBODY):
                pass
        with pytest.raises(ZeroDivisionError), impersonate(SOMEBODY):
            raise ZeroDivisionError
    finally:
        stop.set()
        bystander.join()
    assert status(main) == before
    assert secret.read_text() == "root's"
    assert native.dumpable() == 1


@needs_root
def test_many_threads_each_as_somebody_else() -> None:
    meet = threading.Barrier(20, timeout=20)

    def act(uid: int) -> tuple[int, list[int]]:
        with impersonate(Identity(1, uid, uid, (uid,), None)):
            meet.wait()
            seen = status()
            meet.wait()
        return seen["Uid"][1], seen["Groups"]

    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(act, range(2000, 2020))) == [(uid, [uid]) for uid in range(2000, 2020)]
        assert all(one == status() for one in pool.map(lambda _: status(), range(40)))


def test_nobody_is_never_impersonated() -> None:
    overflow = int(Path("/proc/sys/kernel/overflowuid").read_text())
    with pytest.raises(errors.AccessDenied, match="no number"), impersonate(Identity(0, overflow, 5, (), None)):
        pass


@needs_root
def test_an_ordinary_user_becomes_nobody_else(peer: Any) -> None:
    client = peer(1234)
    code = """
from portway.kernel.pipe_identity import Identity, impersonate
with impersonate(Identity(1, 1234, 1234, (), None)): before = os.geteuid()
try:
    with impersonate(Identity(1, 0, 0, (), None)): after = os.geteuid()
except errors.AccessDenied as error: after = str(error)
before, after, os.geteuid()
"""
    before, after, now = client.run(code)
    assert (before, now) == (1234, 1234)
    assert "CAP_SETUID" in after


@needs_root
def test_an_event_loop_stays_itself_and_calls_in_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    async def main() -> None:
        with pytest.raises(errors.AccessDenied, match="event loop"), impersonate(SOMEBODY):
            pass
        assert await run_as(SOMEBODY, os.geteuid) == 1234
        with pytest.raises(PermissionError):
            await run_as(SOMEBODY, os.listdir, "/root")
        assert os.geteuid() == 0
        async with aio.NamedPipeServer("who", root=tmp_path) as server:
            async with aio.NamedPipeClient("who", root=tmp_path), await server.accept(5) as pipe:
                assert await pipe.run_as_client(os.geteuid) == 0
                with pytest.raises(errors.AccessDenied):
                    pipe.impersonate()

    asyncio.run(main())
