"""How old generations end: what runs is finished, limits are kept, nothing is left."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading

import pytest
from running import PLAIN, World, alive, ask, connect, get, until

QUICK = ("--ready-hold", "0.1", "--settle", "0.05")
WEB = ("--name", "web", "--bind", "127.0.0.1:0")

# Speaks the contract of docs/explanation/worker-contract.md by hand.
HOOK = """
import json, os, signal, socket, sys, threading, time
line = socket.socket(fileno=int(os.environ["PORTWAY_CONTROL"]))
inbox = socket.socket(fileno=int(os.environ["PORTWAY_INBOX"]))
listener = socket.socket(fileno=3)
def say(**message): line.send(json.dumps(message).encode())
def accept():
    while True: listener.accept()[0].close()
def receive():
    while True:
        data = inbox.recv(4096)
        if not data: return  # the supervisor was killed
        print("INBOX", os.environ["PORTWAY_GENERATION"], data.decode(), flush=True)
signal.signal(signal.SIGTERM, lambda *_: (print("TERM", flush=True), os._exit(0)))
threading.Thread(target=accept, daemon=True).start()
threading.Thread(target=receive, daemon=True).start()
say(verb="hello", pid=os.getpid(), hook=1, adopts=True)
say(verb="status", connections=42, text="busy")
say(verb="from the future", x=1)
line.send(b"no json"); line.send(b"[1]")
while True:
    data, fds, _, _ = socket.recv_fds(line, 65536, 4)
    order = json.loads(data)
    print("ORDER", json.dumps(order), len(fds), flush=True)
    if fds: socket.socket(fileno=fds[0]).send(b"from " + os.environ["PORTWAY_GENERATION"].encode())
    if os.environ.get("HOOK_NEVER") : continue
    say(verb="drained")
"""


def test_running_requests_are_finished(world: World) -> None:
    web = world.start(*WEB, *QUICK, "--", *PLAIN, PLAIN_SLOW="1.5")
    web.serves(1)
    answers: list[str] = []
    address = web.address()
    with connect(address) as early:
        thread = threading.Thread(target=lambda: answers.append(ask(early)))
        thread.start()
        until(lambda: web.status()["generations"][0]["connections"] == 1, "the request is there")
        assert web.reloaded() == 2
        thread.join()
    assert answers[0].startswith("1 ")
    web.gone(1)
    assert "killed" not in web.said()


def test_forced_end_at_the_limit(world: World) -> None:
    web = world.start(*WEB, *QUICK, "--drain", "0.5", "--", "env", "PLAIN_STUBBORN=1", *PLAIN)
    web.serves(1)
    (worker,) = web.workers()
    web.reloaded()
    web.gone(1)
    assert "was not done after 0.5 s: killed" in web.said()
    assert not alive(worker)
    web.process.send_signal(signal.SIGTERM)
    assert web.ends() == 0


@pytest.mark.slow
def test_forever_lets_several_generations_live(world: World) -> None:
    web = world.start(*WEB, *QUICK, "--drain", "forever", "--", *PLAIN, PLAIN_SLOW="0.01")
    web.serves(1)
    kept = []
    for number in (1, 2, 3, 4):
        kept.append(connect(web.address()))
        assert ask(kept[-1]).startswith(f"{number} ")
        if number < 4:
            assert web.reloaded() == number + 1
    until(lambda: [g["phase"] for g in web.status()["generations"]] == ["draining"] * 3 + ["serving"], "all four live")
    for number, sock in enumerate(kept, 1):
        assert ask(sock).startswith(f"{number} ")
        sock.close()
    for number in (1, 2, 3):
        web.gone(number)
    # And again: their listeners have become spares or were closed, in whatever order.
    for number in (5, 6, 7):
        assert web.reloaded() == number
        for _ in range(5):
            assert get(web.address()).startswith(f"{number} ")
    web.stop()


def test_hook_is_told_and_says_when_it_is_drained(world: World) -> None:
    web = world.start(*WEB, *QUICK, "--drain", "7", "--", sys.executable, "-c", HOOK)
    web.serves(1)
    until(lambda: web.status()["generations"][0]["workers"][0]["hook"], "hello arrived")
    assert web.status()["generations"][0]["connections"] == 42
    assert web.reloaded() == 2
    web.gone(1)
    until(lambda: "INBOX 2 from 1" in web.printed(), web.printed())
    (order,) = re.findall(r"\[1.0\] ORDER (.*) 1\n", web.printed())
    assert json.loads(order) == {"verb": "drain", "generation": 2, "limit": pytest.approx(7, abs=1)}
    assert "[1.0] TERM" in web.printed()
    web.stop()
    (order,) = re.findall(r"\[2.0\] ORDER (.*) 0\n", web.printed())
    assert json.loads(order) == {"verb": "stop", "limit": pytest.approx(7, abs=1)}


def test_hook_that_never_finishes_is_stopped_at_the_limit(world: World) -> None:
    web = world.start(*WEB, *QUICK, "--drain", "0.6", "--", "env", "HOOK_NEVER=1", sys.executable, "-c", HOOK)
    web.serves(1)
    until(lambda: web.status()["generations"][0]["workers"][0]["hook"], "hello arrived")
    web.reloaded()
    web.gone(1)
    assert "[1.0] TERM" in web.printed() and "killed" not in web.said()


def test_hook_line_survives_the_supervisor(world: World) -> None:
    """The next supervisor takes up the line again, and drains by order, not by signal."""
    arguments = (*WEB, *QUICK, "--", sys.executable, "-c", HOOK)
    web = world.start(*arguments)
    web.serves(1)
    until(lambda: web.status()["generations"][0]["workers"][0]["hook"], "hello arrived")
    web.process.kill()
    web.process.wait(10)
    again = world.start(*arguments)
    again.serves(2)
    again.gone(1)
    until(lambda: "INBOX 2 from 1" in again.printed(), again.printed())
    again.stop()


def test_stop_finishes_what_runs_and_now_does_not(world: World) -> None:
    web = world.start(*WEB, *QUICK, "--", *PLAIN, PLAIN_SLOW="1")
    web.serves(1)
    answers: list[str] = []
    with connect(web.address()) as early:
        thread = threading.Thread(target=lambda: answers.append(ask(early)))
        thread.start()
        until(lambda: web.status()["generations"][0]["connections"] == 1, "the request is there")
        web.stop()
        thread.join()
    assert answers == [answers[0]] and answers[0].startswith("1 ")

    web = world.start(*WEB, *QUICK, "--", "env", "PLAIN_STUBBORN=1", *PLAIN)
    web.serves(1)
    assert world.run("stop", "web", "--timeout", "0.3").returncode == 5
    assert world.run("stop", "web", "--now").returncode == 0
    assert web.ends() == 0


def test_second_term_is_a_forced_end(world: World) -> None:
    web = world.start(*WEB, *QUICK, "--drain", "forever", "--", "env", "PLAIN_STUBBORN=1", *PLAIN)
    web.serves(1)
    web.process.send_signal(signal.SIGTERM)
    until(lambda: "stopping" in web.said(), web.said())
    assert web.process.poll() is None
    web.process.send_signal(signal.SIGTERM)
    assert web.ends() == 0


def test_what_a_worker_leaves_behind_is_ended(world: World) -> None:
    """The process at the head dies; its children, in its group, must not go on accepting."""
    code = (
        "import os, sys, time, subprocess\n"
        "child = subprocess.Popen([sys.executable, *sys.argv[1:]], pass_fds=[3])\n"
        "print('CHILD', child.pid, flush=True)\n"
        "time.sleep(100)"
    )
    accepts = "import socket; s = socket.socket(fileno=3)\nwhile True: s.accept()[0].close()"
    web = world.start(*WEB, *QUICK, "--", sys.executable, "-c", code, "-c", accepts)
    web.serves(1)
    until(lambda: "CHILD" in web.printed(), web.printed())
    child = int(web.printed().split("CHILD ")[1].split()[0])
    os.kill(web.workers()[0], signal.SIGKILL)
    until(lambda: not alive(child), "the child ends with it")
    until(lambda: "started again" in web.said(), web.said())
