"""Who may talk to a supervisor, what it does with nonsense, and where it keeps its things."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from running import PLAIN, World, get, until

QUICK = ("--ready-hold", "0.1")
WEB = ("--name", "web", "--bind", "127.0.0.1:0")
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")


def as_other_user(call) -> str:
    """What `call` returns or raises in a process of uid 65534."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read)
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            try:
                said = repr(call())
            except BaseException as error:
                said = f"{type(error).__name__}: {error}"
            os.write(write, said.encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as file:
        said = file.read()
    os.waitpid(pid, 0)
    return said


def raw(path: str, data: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(10)
        sock.connect(path)
        try:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        answer = b""
        try:
            while piece := sock.recv(65536):
                answer += piece
        except ConnectionResetError:
            pass
        return answer


@ROOT
def test_other_uids_are_refused(world: World) -> None:
    web = world.start(*WEB, *QUICK, "--", *PLAIN)
    web.serves(1)
    folder = world.root / "run" / "web"
    path = str(folder / "control")
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert os.stat(folder / "state.json").st_mode & 0o777 == 0o600
    request = b'{"verb": "stop", "now": true}\n'
    assert as_other_user(lambda: raw(path, request)).startswith("PermissionError")
    # And if somebody opened the doors, the kernel still says who knocks.
    for one in (world.root, world.root / "run", folder):
        os.chmod(one, 0o755)
    os.chmod(path, 0o666)
    said = as_other_user(lambda: raw(path, request))
    assert "uid 65534 (nobody) is refused" in said
    os.chmod(folder, 0o700)
    os.chmod(world.root / "run", 0o700)
    assert get(web.address()).startswith("1 ")


def test_nonsense_is_answered_or_dropped_and_harms_nothing(world: World) -> None:
    web = world.start(*WEB, *QUICK, "--", *PLAIN)
    web.serves(1)
    path = str(world.root / "run" / "web" / "control")
    for data in (b"\n", b"{}\n", b"[]\n", b"nonsense\n", b'{"verb": []}\n', b'{"verb": "fly"}\n', b"[" * 99_999 + b"\n",
                 b'{"verb": "reload", "command": "text"}\n', b'{"verb": "reload", "command": [1]}\n'):  # fmt: skip
        answer = json.loads(raw(path, data).splitlines()[-1])
        assert answer["error"]["message"], data
    raw(path, b"x" * (2 << 20))
    raw(path, b'{"verb": "status"')
    chance = random.Random(30)
    for _ in range(200):
        raw(path, chance.randbytes(chance.randrange(200)) + b"\n")
    fds = len(os.listdir(f"/proc/{web.process.pid}/fd"))
    waiting = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(80)]
    for sock in waiting:
        sock.connect(path)
    for sock in waiting:
        sock.close()
    assert web.reloaded() == 2
    until(lambda: len(os.listdir(f"/proc/{web.process.pid}/fd")) <= fds + 8, "clients are forgotten")
    assert get(web.address()).startswith("2 ")
    assert "Traceback" not in web.said()


def test_timeout_of_a_command_leaves_the_reload_alone(world: World) -> None:
    web = world.start(*WEB, "--ready-hold", "1", "--", *PLAIN)
    web.serves(1)
    done = world.run("reload", "web", "--timeout", "0.2")
    assert done.returncode == 5 and "it goes on in the supervisor" in done.stderr
    web.serves(2)


def test_runtime_folder_of_somebody_else_is_refused(world: World) -> None:
    link = world.root / "link"
    link.symlink_to(world.root)
    wide = world.root / "wide"
    wide.mkdir(mode=0o755)
    os.chmod(wide, 0o755)
    file = world.root / "file"
    file.write_text("")
    for one in (link, wide, file):
        done = world.run("run", *WEB, "--", *PLAIN, PORTWAY_RUNTIME_DIR=str(one))
        assert done.returncode in (1, 2), done.stderr
        assert str(one) in done.stderr and "Traceback" not in done.stderr
    done = world.run("run", *WEB, "--", *PLAIN, PORTWAY_RUNTIME_DIR=str(world.root / "no" / "such"))
    assert done.returncode == 2 and "No such file" in done.stderr


def test_long_runtime_folder(world: World) -> None:
    """Longer than a Unix socket's name may be."""
    path = world.root / ("x" * 120)
    world.environ["PORTWAY_RUNTIME_DIR"] = str(path)
    web = world.start(*WEB, *QUICK, "--", *PLAIN)
    web.serves(1)
    assert web.reloaded() == 2
    web.stop()


@ROOT
def test_workers_run_as_another_user(world: World) -> None:
    os.chmod(world.root, 0o755)
    shell = ["/bin/sh", "-c", "id -u; id -g; id -G; echo $HOME; echo again >> /dev/stdout; exec sleep 100"]
    web = world.start("--name", "web", "--ready", "delay:0.1", *QUICK, "--user", "nobody", "--", *shell)
    web.serves(1)
    until(lambda: "[1.0] again" in web.printed(), web.printed())
    lines = [line.removeprefix("[1.0] ") for line in web.printed().splitlines()]
    assert lines[:2] == ["65534", "65534"] and lines[2].split() == ["65534"]
    done = world.run("run", "--name", "x", "--user", "no-such-user", "--", "true")
    assert done.returncode == 2 and "no-such-user" in done.stderr
    web.stop()


def test_fuzz_target_runs() -> None:
    fuzz = Path(__file__).parents[2] / "fuzz" / "fuzz_supervise.py"
    done = subprocess.run([sys.executable, str(fuzz), "--smoke"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "40000 inputs" in done.stdout


def test_commands_that_end_at_once_fail_clearly(world: World) -> None:
    """Also when the process is gone before we have looked at it."""
    for _ in range(5):
        done = world.run("run", *WEB, *QUICK, "--", "true")
        assert done.returncode == 4 and "exited with code 0 before it took over" in done.stderr
