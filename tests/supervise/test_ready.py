"""Readiness means it: every sign, on real processes, and what does not count as one."""

from __future__ import annotations

import os
import socket
import sys

import pytest
from running import PLAIN, World, get, until

QUICK = ("--ready-hold", "0.1", "--ready-timeout", "1.2")
WEB = ("--name", "web", "--bind", "127.0.0.1:0")
BLOCKS = {
    "accept": "s.accept()[0].close()",
    "poll": "p = select.poll(); p.register(s, 1); p.poll(); s.accept()[0].close()",
    "select": "select.select([s], [], []); s.accept()[0].close()",
    "epoll": "p = select.epoll(); p.register(s, 1); p.poll(); s.accept()[0].close()",
    "thread": "t = threading.Thread(target=s.accept); t.start(); t.join()",
}


@pytest.mark.parametrize("way", BLOCKS)
def test_accepting_sees_every_way_to_wait(world: World, way: str) -> None:
    code = f"import socket, select, threading, time\ns = socket.socket(fileno=3)\nwhile True:\n    {BLOCKS[way]}"
    web = world.start(*WEB, *QUICK, "--", sys.executable, "-c", code)
    web.serves(1)


@pytest.mark.parametrize("code", ["time.sleep(60)", "p = select.epoll(); p.register(s, 0); p.poll()",
                                  "s.listen(); socket.create_connection(s.getsockname()); time.sleep(60)"])  # fmt: skip
def test_listening_is_not_accepting(world: World, code: str) -> None:
    done = world.run("run", *WEB, *QUICK, "--", sys.executable, "-c",
                     f"import socket, select, time\ns = socket.socket(fileno=3)\n{code}")  # fmt: skip
    assert done.returncode == 4
    assert "worker 0 (pid " in done.stderr and "does not accept on 127.0.0.1-0" in done.stderr


def test_every_worker_and_every_bind_counts(world: World) -> None:
    code = (
        "import os, socket, select, time\n"
        "s = socket.socket(fileno=3)\n"
        "time.sleep(60) if os.environ['PORTWAY_WORKER'] == '1' else s.accept()"
    )
    done = world.run("run", *WEB, *QUICK, "--workers", "2", "--", sys.executable, "-c", code)
    assert done.returncode == 4 and "worker 1 (pid" in done.stderr
    code = "import socket; socket.socket(fileno=3).accept()"
    done = world.run("run", *WEB, "--bind", "127.0.0.1:0,name=second", *QUICK, "--", sys.executable, "-c", code)
    assert done.returncode == 4 and "does not accept on second" in done.stderr


def test_notify(world: World) -> None:
    web = world.start(*WEB, *QUICK, "--ready", "notify", "--", "env", "PLAIN_NOTIFY=1", *PLAIN)
    report = web.serves(1)
    assert report["generations"][0]["workers"][0]["text"] == "fine"
    done = web.reload(*PLAIN)
    assert done.returncode == 4 and "worker 0 did not send READY=1" in done.stderr
    assert get(web.address()).startswith("1 ")


def test_notify_from_another_user_does_not_count(world: World) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    web = world.start(*WEB, "--ready-hold", "0.1", "--ready", "notify", "--ready-timeout", "3", "--", *PLAIN)
    until(lambda: "generation 1 started" in web.said(), web.said())
    name = web.status()["generations"][0]["workers"][0]["notify"]
    pid = os.fork()
    if pid == 0:
        try:
            os.setuid(65534)
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
                line.sendto(b"READY=1", "\0" + name)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    assert web.ends() == 4
    assert "did not send READY=1" in web.said()


def test_fd(world: World) -> None:
    code = "import os, sys, time; os.write(int(sys.argv[1]), b'up\\n'); time.sleep(60)"
    web = world.start(*WEB, *QUICK, "--ready", "fd", "--", sys.executable, "-c", code, "{ready_fd}")
    web.serves(1)
    done = web.reload(sys.executable, "-c", "import time; time.sleep(60)")
    assert done.returncode == 4 and "did not send a line on {ready_fd}" in done.stderr


def test_delay(world: World) -> None:
    web = world.start(*WEB, "--ready-hold", "0", "--ready", "delay:0.2", "--", sys.executable, "-c",
                      "import time; time.sleep(60)")  # fmt: skip
    web.serves(1)


@pytest.mark.parametrize("bind", ["127.0.0.1:0", "[::1]:0", ":0", "unix"])
def test_http_asks_the_new_generation_and_not_the_old(world: World, bind: str) -> None:
    path = str(world.root / "s")
    bind = f"unix:{path}" if bind == "unix" else bind
    web = world.start("--name", "web", "--bind", bind, *QUICK, "--ready", "http:/health", "--", *PLAIN)
    web.serves(1)
    address = path if bind.startswith("unix") else web.address()
    if bind == ":0":
        address = ("127.0.0.1", web.address()[1])
    done = web.reload("env", "PLAIN_UNWELL=1", *PLAIN)
    assert done.returncode == 4
    assert "GET /health: answered HTTP/1.1 503" in done.stderr
    assert get(address).startswith("1 ")
    assert web.reloaded() == 3
    assert get(address).startswith("3 ")


def test_hold_catches_what_crashes_after_its_sign(world: World) -> None:
    web = world.start(*WEB, "--ready-hold", "1", "--", *PLAIN)
    web.serves(1)
    done = web.reload("env", "PLAIN_CRASH_AFTER=0.4", *PLAIN)
    assert done.returncode == 4 and "exited with code 7" in done.stderr
    assert get(web.address()).startswith("1 ")


def test_gunicorn_that_is_ready_before_its_application_is_imported(world: World) -> None:
    """It says READY=1, and exits a moment later because the application does not exist."""
    gunicorn = [sys.executable, "-m", "gunicorn"]
    web = world.start(*WEB, "--ready", "notify", "--ready-hold", "1.5", "--", *gunicorn, "asgi:wsgi")
    web.serves(1)
    done = web.reload(*gunicorn, "no_such_module:app")
    assert done.returncode == 4
    assert "no_such_module" in done.stderr
    assert get(web.address()).startswith("1 ")
