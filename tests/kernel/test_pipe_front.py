""".NET's path of a pipe: what lies in the way, strangers that come at any moment, and that nothing of theirs is lost.

The strangers here are plain sockets that do what .NET does: remove the path, bind, listen, and remove it at the end.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import stat
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from dotnet_pipes import World, serving, world
from handoff_peers import patiently
from sync_world import Process

pytest.importorskip("portway._native.pipe")
from portway import NamedPipeClient, NamedPipeServer, Security, errors, list_pipes
from portway.kernel import pipe_front
from portway.kernel.pipe_serving import PipeNameTaken

__all__ = ["world"]


class Stranger:
    """A server as .NET's: takes the path from whoever has it."""

    def __init__(self, path: str) -> None:
        self.path = path
        with suppress(FileNotFoundError):
            os.unlink(path)
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.bind(path)
        self.sock.listen()
        self.inode = os.lstat(path).st_ino

    def has_it(self) -> bool:
        with suppress(FileNotFoundError):
            return os.lstat(self.path).st_ino == self.inode
        return False

    def reached(self) -> bool:
        """Whether who connects to the path comes here."""
        with socket.socket(socket.AF_UNIX) as client, suppress(OSError):
            client.connect(self.path)
            self.sock.settimeout(5)
            self.sock.accept()[0].close()
            return True
        return False

    def killed(self) -> None:
        self.sock.close()

    def dispose(self) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self.path)
        self.sock.close()


def answers(path: str) -> bool:
    """Whether a client that knows only the path gets its echo."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        try:
            client.connect(path)
        except OSError:
            return False
        client.sendall(b"ping")
        return client.recv(4) == b"ping"


def portway_is_served(name: str) -> None:
    with NamedPipeClient(name, timeout=5) as pipe:
        pipe.send(b"x")
        assert pipe.receive(timeout=5) == b"x"


# -- what lies in the way ----------------------------------------------------------------------------------------------


def regular(path: str) -> None:
    Path(path).write_text("precious")


def folder(path: str) -> None:
    os.mkdir(path)


def fifo(path: str) -> None:
    os.mkfifo(path)


def link_to_a_file(path: str) -> None:
    regular(f"{path}.target")
    os.symlink(f"{path}.target", path)


def dangling_link(path: str) -> None:
    os.symlink(f"{path}.nowhere", path)


def link_to_a_dead_socket(path: str) -> None:
    Stranger(f"{path}.target").killed()
    os.symlink(f"{path}.target", path)


def another_users_dead_socket(path: str) -> None:
    if os.geteuid():
        pytest.skip("only root can make one")
    Stranger(path).killed()
    os.chown(path, 1234, 1234)


OBSTACLES = [regular, folder, fifo, link_to_a_file, dangling_link, link_to_a_dead_socket, another_users_dead_socket]


@pytest.mark.parametrize("make", OBSTACLES)
def test_an_obstacle_stays_and_is_told_once(make: Callable[[str], None], world: World) -> None:
    path = world.dotnet("p")
    make(path)
    before = os.lstat(path), world.files()
    with pytest.warns(PipeNameTaken, match="portway's do") as told, serving(NamedPipeServer("p")) as server:
        assert server.dotnet_state == "blocked" and path in server.serving.front.why  # type: ignore[union-attr]
        portway_is_served("p")
        for _ in range(3):
            server.serving._look()
            portway_is_served("p")
        assert [one.dotnet_state for one in list_pipes()] == ["blocked"]
    assert len(told) == 1 and path in str(told[0].message)
    after = os.lstat(path), world.files()
    assert (before[0].st_ino, before[0].st_mtime_ns, before[1]) == (after[0].st_ino, after[0].st_mtime_ns, after[1])
    for name in world.files():
        full = f"{world.path}/{name}"
        os.rmdir(full) if stat.S_ISDIR(os.lstat(full).st_mode) else os.unlink(full)


def test_when_the_obstacle_goes_the_path_is_ours(world: World) -> None:
    regular(world.dotnet("p"))
    with pytest.warns(PipeNameTaken), serving(NamedPipeServer("p")) as server:
        portway_is_served("p")
        patiently(lambda: server.serving._warned)
        os.unlink(world.dotnet("p"))
        patiently(lambda: server.dotnet_state == "ours", 2)
        assert answers(world.dotnet("p"))


def test_a_link_to_a_living_server_is_a_server(world: World) -> None:
    stranger = Stranger(f"{world.path}/elsewhere")
    os.symlink(stranger.path, world.dotnet("p"))
    with pytest.raises(errors.AccessDenied, match="another program"):
        NamedPipeServer("p")
    stranger.dispose()
    os.unlink(world.dotnet("p"))


def test_a_dead_socket_of_ours_is_nobodys(world: World) -> None:
    Stranger(world.dotnet("p")).killed()
    with serving(NamedPipeServer("p")) as server:
        assert server.dotnet_state == "ours" and answers(world.dotnet("p"))


def test_strangers_of_other_users_in_a_sticky_folder(world: World, start: Callable[..., Process]) -> None:
    """As somebody who is not root: what is another's stays, living or dead (which cannot be told)."""
    if os.geteuid():
        pytest.skip("only root can be two users")
    dead, alive = Stranger(world.dotnet("dead")), Stranger(world.dotnet("alive"))
    dead.killed()
    try:

        def work(tell: Callable[[Any], None]) -> None:
            os.setresgid(1234, 1234, 1234)
            os.setresuid(1234, 1234, 1234)
            for name in ("dead", "alive"):
                try:
                    NamedPipeServer(name)
                except errors.AccessDenied as error:
                    tell(str(error))

        process = start(work)
        assert "may be served by another program of uid 0" in process.hear()
        assert "may be served by another program of uid 0" in process.hear()
        assert process.wait() == 0
        assert dead.has_it() and alive.has_it() and alive.reached()
    finally:
        dead.dispose()
        alive.dispose()


def test_folders_that_cannot_be_used(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", f"{world.path}/missing")
    with pytest.warns(PipeNameTaken, match="missing: No such file") as told, serving(NamedPipeServer("p")) as server:
        assert server.dotnet_state == "blocked"
        portway_is_served("p")
        os.mkdir(f"{world.path}/missing")
        patiently(lambda: server.dotnet_state == "ours", 2)
        assert answers(f"{world.path}/missing/CoreFxPipe_p")
    assert len(told) == 1
    os.rmdir(f"{world.path}/missing")
    monkeypatch.setenv("TMPDIR", os.fsdecode(f"{world.path}/".encode() + b"\xff"))  # .NET cannot say that either
    with serving(NamedPipeServer("p")) as server:
        assert server.dotnet_state == "none" and server.dotnet_path is None
        portway_is_served("p")
    with pytest.raises(errors.AccessDenied, match="No such file"):
        NamedPipeServer(f"{world.path}/missing/p")
    monkeypatch.setenv("TMPDIR", ".")
    monkeypatch.chdir(world.path)
    with serving(NamedPipeServer("p")) as server:
        monkeypatch.chdir("/")
        assert server.dotnet_path == world.dotnet("p") and answers(world.dotnet("p"))


def test_an_emptied_folder(world: World) -> None:
    """A cleaner has removed every socket: the front comes back, a new one."""
    with serving(NamedPipeServer("p", max_instances=2)) as server:
        assert answers(world.dotnet("p"))
        for one in world.files():
            if "portway-pipe-" not in one:
                os.unlink(f"{world.path}/{one}")
        patiently(lambda: answers(world.dotnet("p")), 2)
        assert server.dotnet_state == "ours"
        with NamedPipeClient("p", timeout=5), NamedPipeClient("p", timeout=5):  # now it must go, and come back
            patiently(lambda: server.dotnet_state == "closed")
        patiently(lambda: answers(world.dotnet("p")), 2)


def test_the_closed_path_keeps_the_rights_of_the_open_one(world: World) -> None:
    with NamedPipeServer("p", max_instances=1, security=Security.everyone()) as server:
        mode = stat.S_IMODE(os.lstat(world.dotnet("p")).st_mode)
        client = NamedPipeClient("p")
        patiently(lambda: server.dotnet_state == "closed")
        assert stat.S_IMODE(os.lstat(world.dotnet("p")).st_mode) & 0o777 == mode
        assert list_pipes()[0].dotnet_state == "closed"
        server.accept(5).close()
        client.close()
        patiently(lambda: server.dotnet_state == "ours")


# -- strangers at every moment -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["byte", "message"])
@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_stranger_between_two_steps(world: World, monkeypatch: pytest.MonkeyPatch, kind: Any, step: int) -> None:
    """Before each of the first `step` renames of one settling a new stranger takes the path: the last one keeps it."""
    path, real, came = world.dotnet("p"), pipe_front._rename, []

    def rename(old: str, new: str, how: int) -> None:
        if len(came) < step and path in (old, new):
            came.append(Stranger(path))
        real(old, new, how)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PipeNameTaken)
        with NamedPipeServer("p", mode=kind, max_instances=1) as server:
            first = Stranger(path)
            server.serving._look()
            assert server.dotnet_state == "taken"
            first.killed()  # its file is left over: to be exchanged for ours
            monkeypatch.setattr(pipe_front, "_rename", rename)
            server.serving._look()
            assert len(came) == min(step, len(came)) >= 1
            assert came[-1].has_it() and came[-1].reached()
            assert server.dotnet_state == "taken"
            monkeypatch.undo()
        assert came[-1].has_it() and came[-1].reached()
        for one in came:
            one.killed()
        os.unlink(path)
    monkeypatch.setenv("PORTWAY_ROOT", world.path)


@pytest.mark.parametrize("bound", [True, False])
def test_a_stranger_while_the_last_server_leaves(world: World, monkeypatch: pytest.MonkeyPatch, bound: bool) -> None:
    path, real, came = world.dotnet("p"), os.rename, []

    def rename(old: str, new: str) -> None:
        if not came and path in (old, new):
            came.append(Stranger(path))
            if not bound:
                came[0].dispose()
        real(old, new)

    with NamedPipeServer("p", max_instances=1), NamedPipeClient("p"):
        monkeypatch.setattr(pipe_front.os, "rename", rename)
    monkeypatch.setattr(pipe_front.os, "rename", real)
    assert came and came[0].has_it() is bound and came[0].reached() is bound
    if bound:
        came[0].dispose()


def test_a_file_system_without_exchange(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_exchange(old: str, new: str, how: int) -> None:
        raise NotImplementedError

    monkeypatch.setattr(pipe_front, "_rename", no_exchange)
    with serving(NamedPipeServer("p", max_instances=1)) as server:
        assert answers(world.dotnet("p"))
        with NamedPipeClient("p", timeout=5) as pipe:
            pipe.send(b"x")
            assert pipe.receive() == b"x"
            patiently(lambda: server.dotnet_state == "closed")
        patiently(lambda: server.dotnet_state == "ours")
        assert answers(world.dotnet("p"))


STRANGER = """
import os, random, socket, sys, time
path, seconds, seed = sys.argv[1], float(sys.argv[2]), random.Random(int(sys.argv[3]))
end, turns = time.monotonic() + seconds, 0
while time.monotonic() < end:
    try: os.unlink(path)
    except FileNotFoundError: pass
    s = socket.socket(socket.AF_UNIX)
    try: s.bind(path)
    except OSError: s.close(); continue  # portway was faster
    s.listen()
    mine, limit = os.stat(s.fileno()), time.monotonic() + 5
    inode = None
    s.setblocking(False)
    time.sleep(seed.random() * 0.003)
    while True:  # who connects to the path comes here, after a moment at most
        c = socket.socket(socket.AF_UNIX)
        c.setblocking(False)
        try:
            c.connect(path); s.accept()[0].close(); c.close(); break
        except OSError as error:
            c.close()
            if time.monotonic() > limit:
                sys.exit(f"lost after {turns} turns: {error}, {os.listdir(os.path.dirname(path))}")
            time.sleep(0.0005)
    turns += 1
    if seed.random() < 0.5: os.unlink(path)
    s.close()
    time.sleep(seed.random() * 0.002)
print(turns)
try: os.unlink(path)
except FileNotFoundError: pass
"""


@pytest.mark.parametrize("where", ["/dev/shm", "/tmp"])
@pytest.mark.parametrize("servers", [1, 2])
def test_a_stranger_that_comes_and_goes_all_the_time(
    world: World, monkeypatch: pytest.MonkeyPatch, where: str, servers: int
) -> None:
    """Its file is never lost, whatever the file system does with the numbers of files; portway's clients are served."""
    folder = f"{where}/pw-front-{os.getpid()}"
    os.mkdir(folder)
    monkeypatch.setenv("TMPDIR", folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PipeNameTaken)
            made = [NamedPipeServer("p", max_instances=2, instances=1) for _ in range(servers)]
            command = [sys.executable, "-c", STRANGER, f"{folder}/CoreFxPipe_p", "2", str(servers)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
                noise = random.Random(servers)
                while process.poll() is None:
                    one = noise.choice(made)
                    one.serving._look()
                    if noise.random() < 0.3:  # the path closes, and opens again
                        with (
                            NamedPipeClient("p", timeout=5),
                            noise.choice(made).accept(0.5) if servers == 1 else (_any(made)),
                        ):
                            one.serving._look()
                out, wrong = process.communicate()
            assert process.returncode == 0, wrong
            assert int(out) > 20
            for one in made:
                patiently(lambda one=one: one.dotnet_state in ("ours", "another"), 3)
                one.close()
        assert os.listdir(folder) == []
    finally:
        shutil.rmtree(folder)


def _any(servers: list[NamedPipeServer]) -> Any:
    """The connection of whichever server has it."""
    limit = time.monotonic() + 5
    while time.monotonic() < limit:
        for one in servers:
            with suppress(errors.OperationTimeout):
                return one.accept(0)
    raise AssertionError("no server has the client")
