"""Under systemd, and as process 1 of a container. systemd does not run here: its own small programs and real notify
sockets do."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import sys
from pathlib import Path

import pytest
from running import PLAIN, World, alive, get, until

QUICK = ("--ready-hold", "0.1")
WEB = ("--name", "web", "--bind", "127.0.0.1:0")


class Manager:
    """systemd's end of NOTIFY_SOCKET."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(self.path)
        self.sock.setblocking(False)
        self.heard: list[str] = []

    def has(self, *lines: str) -> bool:
        try:
            while True:
                self.heard.append(self.sock.recv(65536).decode())
        except BlockingIOError:
            return any(set(lines) <= set(packet.splitlines()) for packet in self.heard)


@pytest.fixture
def manager(world: World):
    found = Manager(world.root / "notify")
    yield found
    found.sock.close()


def test_type_notify_and_watchdog(world: World, manager: Manager) -> None:
    web = world.start(*WEB, *QUICK, "--", *PLAIN, NOTIFY_SOCKET=manager.path, WATCHDOG_USEC="200000")
    until(lambda: manager.has("READY=1", f"MAINPID={web.process.pid}"), "READY")
    assert "generation 1 serves" in web.said(), "not before it serves"
    before = len(manager.heard)
    until(lambda: manager.has("WATCHDOG=1") and len(manager.heard) > before + 3, "the watchdog is fed")
    manager.heard.clear()
    assert web.reload("env", "PLAIN_CRASH=before", *PLAIN).returncode == 4
    until(lambda: manager.has("RELOADING=1") and manager.has("READY=1"), "a failed reload is over too")
    assert any(re.search(r"MONOTONIC_USEC=\d+", packet) for packet in manager.heard)
    assert world.run("upgrade", "web").returncode == 0
    manager.heard.clear()
    until(lambda: manager.has("WATCHDOG=1"), "fed after an upgrade too")
    assert web.reloaded()
    until(lambda: manager.has("READY=1"), "READY again")
    web.stop()
    assert manager.has("STOPPING=1")


def test_workers_do_not_see_the_supervisors_variables(world: World, manager: Manager) -> None:
    code = (
        "import os, time; print(os.environ['NOTIFY_SOCKET'], os.environ.get('WATCHDOG_USEC'), flush=True);"
        "time.sleep(99)"
    )
    web = world.start("--name", "web", "--ready", "delay:0", *QUICK, "--", sys.executable, "-c", code,
                      NOTIFY_SOCKET=manager.path, WATCHDOG_USEC="5000000")  # fmt: skip
    web.serves(1)
    until(lambda: "[1.0] @portway/" in web.printed() and " None" in web.printed(), web.printed())


def test_socket_activation_by_systemds_own_program(world: World) -> None:
    activate = shutil.which("systemd-socket-activate")
    if activate is None:
        pytest.skip("systemd-socket-activate is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = free.getsockname()
    kept = [f"-E{key}" for key in world.environ]
    web = world.start("--name", "web", "--bind", "fd:web", *QUICK, "--", *PLAIN,
                      prefix=(activate, *kept, "-l", f"127.0.0.1:{address[1]}", "--fdname=web"))  # fmt: skip
    until(lambda: "Listening on" in web.said(), web.said())
    assert get(address, timeout=30).startswith("1 ")  # the connection that started it
    assert web.reloaded() == 2
    web.gone(1)
    assert get(address).startswith("2 ")
    assert web.status()["sockets"][0] | {"inodes": None} == {
        "name": "web", "kind": "fd", "address": f"127.0.0.1:{address[1]}", "inodes": None,
    }  # fmt: skip
    web.stop()


def test_inherited_sockets_without_a_bind_and_wrong_ones(world: World) -> None:
    starter = (
        "import os, socket, sys; s = socket.create_server(('127.0.0.1', 0));"
        "os.dup2(s.fileno(), 3); os.set_inheritable(3, True);"
        "print(s.getsockname()[1], flush=True);"
        "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1'); os.execv(sys.argv[1], sys.argv[1:])"
    )
    web = world.start("--name", "web", *QUICK, "--", *PLAIN, prefix=(sys.executable, "-c", starter))
    web.serves(1)
    assert get(("127.0.0.1", int(web.printed().split()[0]))).startswith("1 ")
    web.stop()
    other = world.start("--name", "web", "--bind", "fd:nope", "--", *PLAIN, prefix=(sys.executable, "-c", starter))
    assert other.ends() == 2 and "no such inherited socket; there is 0" in other.said()
    done = world.run("run", "--name", "web", "--bind", "fd:web", "--", *PLAIN)
    assert done.returncode == 2 and "LISTEN_FDS is not set" in done.stderr


def test_systemd_notify_in_a_worker(world: World) -> None:
    notify = shutil.which("systemd-notify")
    if notify is None:
        pytest.skip("systemd-notify is not installed")
    web = world.start("--name", "web", "--ready", "notify", *QUICK, "--", "/bin/sh", "-c",
                      f"{notify} --ready --status=up; exec sleep 100")  # fmt: skip
    report = web.serves(1)
    assert report["generations"][0]["workers"][0]["text"] == "up"


def test_worker_that_misses_its_watchdog_is_replaced(world: World) -> None:
    code = (
        "import os, socket, time\n"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); to = '\\0' + os.environ['NOTIFY_SOCKET'][1:]\n"
        "assert os.environ['WATCHDOG_PID'] == str(os.getpid()) and os.environ['WATCHDOG_USEC'] == '600000'\n"
        "for _ in range(8): s.sendto(b'WATCHDOG=1', to); time.sleep(0.1)\n"
        "time.sleep(100)"
    )
    web = world.start(
        "--name", "web", "--ready", "delay:0", *QUICK, "--watchdog", "0.6", "--", sys.executable, "-c", code
    )
    web.serves(1)
    until(lambda: "missed its watchdog: killed" in web.said() and "started again" in web.said(), web.said())


def innermost(pid: int) -> str:
    """Its pid in its own pid namespace."""
    return Path(f"/proc/{pid}/status").read_text().split("NSpid:")[1].split("\n")[0].split()[-1]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a pid namespace")
def test_process_1_of_a_container_reaps_everything(world: World) -> None:
    orphans = 'for i in 1 2 3; do (sleep 0.05 & exec sleep 0.01) & done; exec "$@"'
    web = world.start(*WEB, *QUICK, "--", "/bin/sh", "-c", orphans, "sh", *PLAIN,
                      prefix=("unshare", "--pid", "--fork", "--mount-proc", "--kill-child"))  # fmt: skip
    until(lambda: "generation 1 serves" in web.said(), web.said())
    assert "pid 1, 127.0.0.1:" in web.said()
    port = int(re.findall(r"pid 1, 127.0.0.1:(\d+)", web.said())[0])
    (first,) = (pid for pid in world.marked() if innermost(pid) == "1")

    def zombies() -> list[str]:
        children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
        return [pid for pid in children if not alive(int(pid))]

    until(lambda: not zombies(), "nothing stays unreaped")
    os.kill(first, signal.SIGHUP)
    until(lambda: "generation 1 ended" in web.said(), web.said())
    assert get(("127.0.0.1", port)).startswith("2 ")
    os.kill(first, signal.SIGTERM)
    assert web.ends() == 0
