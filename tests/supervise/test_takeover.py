"""kill -9 of the supervisor, of new generations and of workers: what serves goes on serving, and the next `portway run`
of that name takes it over."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time

import pytest
from running import PLAIN, Running, World, alive, ask, connect, get, until

QUICK = ("--ready-hold", "0.1")
UVICORN = [sys.executable, "-m", "uvicorn", "--fd", "{fd}", "asgi:app"]


def killed(web: Running) -> list[int]:
    """The supervisor is gone; its serving workers."""
    workers = web.workers()
    web.process.kill()
    web.process.wait(10)
    return workers


def sockets(pid: int) -> set[str]:
    found = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        target = os.readlink(f"/proc/{pid}/fd/{name}")
        if target.startswith("socket:"):
            found.add(target)
    return found


@pytest.mark.parametrize("bind", ["127.0.0.1:0", "unix"])
def test_workers_serve_on_and_are_taken_over(world: World, bind: str) -> None:
    path = str(world.root / "s")
    bind = f"unix:{path}" if bind == "unix" else bind
    arguments = ("--name", "web", "--bind", bind, *QUICK, "--", *UVICORN)
    web = world.start(*arguments)
    web.serves(1)
    address = path if bind.startswith("unix") else web.address()
    (worker,) = killed(web)
    assert get(address) == f"1 {worker}"
    assert json.loads(world.run("status", "--json").stdout)[0]["state"] == "orphaned"
    done = world.run("reload", "web")
    assert done.returncode == 3 and "its workers still serve" in done.stderr

    again = world.start(*arguments)
    again.serves(2)
    assert "took over from a killed supervisor" in again.said()
    assert get(address).startswith("2 ")
    until(lambda: not alive(worker), "the orphan drains")
    again.gone(1)
    assert again.reloaded() == 3
    assert get(address).startswith("3 ")
    again.stop()
    assert os.listdir(world.root / "run") == []


def test_taken_over_generation_keeps_serving_when_the_next_one_fails(world: World) -> None:
    web = world.start("--name", "web", "--bind", "127.0.0.1:0", *QUICK, "--", *PLAIN)
    web.serves(1)
    address, (worker,) = web.address(), killed(web)
    again = world.start("--name", "web", "--bind", "127.0.0.1:0", *QUICK, "--", "env", "PLAIN_CRASH=before", *PLAIN)
    until(lambda: "generation 2 did not take over" in again.said(), again.said())
    assert get(address) == f"1 {worker}"
    # Its worker is watched by pidfd: should it crash, the new supervisor starts it again.
    os.kill(worker, signal.SIGKILL)
    assert get(address).startswith("1 ")
    assert again.reloaded(*PLAIN) == 3
    again.stop()


def test_other_binds_are_refused_and_nothing_changes(world: World) -> None:
    web = world.start("--name", "web", "--bind", "127.0.0.1:0", *QUICK, "--", *PLAIN)
    web.serves(1)
    address, (worker,) = web.address(), killed(web)
    done = world.run("run", "--name", "web", "--bind", "[::1]:0", *QUICK, "--", *PLAIN)
    assert done.returncode == 2
    assert f"pid {worker}" in done.stderr and "serve on 127.0.0.1:0, not on [::1]:0" in done.stderr
    assert get(address) == f"1 {worker}"
    again = world.start("--name", "web", "--bind", "127.0.0.1:0", *QUICK, "--", *PLAIN)
    again.serves(2)
    again.stop()


def test_dead_workers_are_no_obstacle(world: World) -> None:
    path = str(world.root / "s")
    arguments = ("--name", "web", "--bind", f"unix:{path}", *QUICK, "--", *PLAIN)
    web = world.start(*arguments)
    web.serves(1)
    for pid in killed(web):
        os.kill(pid, signal.SIGKILL)
        until(lambda pid=pid: not alive(pid), "its end")
    again = world.start(*arguments)
    again.serves(1)
    assert get(path).startswith("1 ")
    again.stop()


def test_where_pidfd_getfd_is_forbidden_the_refusal_is_clear(world: World) -> None:
    web = world.start("--name", "web", "--bind", "127.0.0.1:0", *QUICK, "--", *PLAIN)
    web.serves(1)
    address, (worker,) = web.address(), killed(web)
    # A seccomp filter of the kernel's own on the new supervisor: pidfd_getfd gives EPERM.
    filtered = (
        "import ctypes, struct, sys, os, platform;"
        "code=[(0x20,0,0,0),(0x15,0,1,438),(6,0,0,0x50001),(6,0,0,0x7fff0000)];"
        "p=b''.join(struct.pack('=HBBI', *i) for i in code);"
        "b=ctypes.create_string_buffer(p); f=ctypes.create_string_buffer(struct.pack('@HP', 4, ctypes.addressof(b)));"
        "l=ctypes.CDLL(None); assert l.prctl(38,1,0,0,0)==0 and l.prctl(22,2,f,0,0)==0;"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )  # fmt: skip
    other = world.start("--name", "web", "--bind", "127.0.0.1:0", *QUICK, "--", *PLAIN,
                        prefix=(sys.executable, "-c", filtered))  # fmt: skip
    assert other.ends() == 1
    assert "cannot be taken over" in other.said() and "Traceback" not in other.said()
    assert get(address) == f"1 {worker}"
    again = world.start("--name", "web", "--bind", "127.0.0.1:0", *QUICK, "--", *PLAIN)
    again.serves(2)
    again.stop()


@pytest.mark.slow
@pytest.mark.parametrize("reloading", [False, True], ids=["steady", "reloading"])
def test_supervisor_killed_at_random_points(world: World, reloading: bool) -> None:
    """Whatever the moment: one generation serves, the next supervisor takes over. Between reloads no connection is
    lost; in the middle of one a few are (why is not established): the bound is what was seen, not what is wanted."""
    arguments = ("--name", "web", "--bind", "127.0.0.1:0", "--ready-hold", "0", "--settle", "0.05", "--", *PLAIN)
    chance, kills = random.Random(20), 12
    web = world.start(*arguments)
    web.serves(1)
    address, failed, done, served = web.address(), [], threading.Event(), 0

    def load() -> None:
        nonlocal served
        while not done.is_set():
            try:
                get(address, timeout=20)
                served += 1
            except OSError as error:
                failed.append(repr(error))

    thread = threading.Thread(target=load)
    thread.start()
    try:
        for _ in range(kills):
            if reloading:
                web.process.send_signal(signal.SIGHUP)
            time.sleep(chance.uniform(0, 0.35))  # not to wait for something: to hit another moment each time
            web.process.kill()
            web.process.wait(10)
            web = world.start(*arguments)
            until(lambda web=web: " serves; " in web.said(), web.said())
            if not reloading:
                until(lambda web=web: " ended" in web.said(), web.said())
    finally:
        done.set()
        thread.join()
    assert len(failed) <= (kills // 4 if reloading else 0), failed
    assert served > 100 * kills
    web.stop()
    until(lambda: not [pid for pid in world.marked() if alive(pid)], "all of it ends")


@pytest.mark.slow
def test_new_generations_and_workers_killed_at_random_points(world: World) -> None:
    web = world.start(
        "--name", "web", "--bind", "127.0.0.1:0", "--ready-hold", "0.15", "--settle", "0.05", "--", *PLAIN
    )
    web.serves(1)
    address, chance = web.address(), random.Random(21)
    for _ in range(12):
        results: list = []
        thread = threading.Thread(target=lambda results=results: results.append(web.reload()))
        before = web.status()["serving"]
        thread.start()
        time.sleep(chance.uniform(0, 0.3))
        report = web.status()
        newest = max(g["number"] for g in report["generations"])
        pids = [w["pid"] for g in report["generations"] for w in g["workers"] if w["pid"] and g["number"] == newest]
        victim = chance.choice(pids) if pids else 0
        if victim:
            os.kill(victim, signal.SIGKILL)
        thread.join()
        assert get(address, timeout=20).split()[0] in {str(before), str(web.status()["serving"])}
        assert results[0].returncode in (0, 4), results[0].stderr
    assert web.reloaded()
    web.stop()


def test_upgrade_keeps_process_children_and_sockets(world: World) -> None:
    web = world.start("--name", "web", "--bind", "127.0.0.1:0", *QUICK, "--workers", "2", "--", *PLAIN)
    web.serves(1)
    address, workers, pid = web.address(), web.workers(), web.pid
    assert pid == web.process.pid
    held = sockets(pid)
    with connect(address) as kept:
        first = ask(kept)
        done = world.run("upgrade", "web", "--json")
        assert done.returncode == 0, done.stderr + web.said()
        assert json.loads(done.stdout)["pid"] == pid
        assert "upgraded in place" in web.said()
        assert web.workers() == workers and web.pid == pid
        assert ask(kept) == first
    # Listeners, inbox, lines, notify sockets and the control socket are the same kernel objects; only the two ends of
    # the loop's own wakeup pair are new.
    assert len(held - sockets(pid)) <= 2
    assert get(address).startswith("1 ")
    os.kill(workers[0], signal.SIGKILL)
    until(lambda: "started again" in web.said(), web.said())
    assert web.reloaded() == 2
    web.gone(1)
    assert world.run("upgrade", "web").returncode == 0
    assert get(address).startswith("2 ")
    web.stop()
    assert os.listdir(world.root / "run") == []


def test_upgrade_that_cannot_load_changes_nothing(world: World) -> None:
    web = world.start("--name", "web", "--bind", "127.0.0.1:0", *QUICK, "--", *PLAIN)
    web.serves(1)
    broken = world.root / "python"
    broken.write_text("#!/bin/sh\necho no such module >&2; exit 1\n")
    broken.chmod(0o755)
    fds = len(os.listdir(f"/proc/{web.pid}/fd"))
    done = world.run("upgrade", "web", "--python", str(broken))
    assert done.returncode == 4 and "no such module" in done.stderr
    assert world.run("upgrade", "web", "--python", str(world.root / "missing")).returncode == 127
    assert len(os.listdir(f"/proc/{web.pid}/fd")) == fds
    assert get(web.address()).startswith("1 ")
    assert "upgraded" not in web.said()


def test_killed_after_an_upgrade_and_taken_over(world: World) -> None:
    arguments = ("--name", "web", "--bind", "127.0.0.1:0", *QUICK, "--", *PLAIN)
    web = world.start(*arguments)
    web.serves(1)
    assert world.run("upgrade", "web").returncode == 0
    address, (worker,) = web.address(), killed(web)
    assert get(address) == f"1 {worker}"
    again = world.start(*arguments)
    again.serves(2)
    assert world.run("upgrade", "web").returncode == 0
    assert get(address).startswith("2 ")
    again.stop()
