"""`portway run`, reload, status, logs and stop on the servers people use, unchanged."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
from pathlib import Path

import pytest
from running import PLAIN, World, alive, ask, connect, get, until

UVICORN = [sys.executable, "-m", "uvicorn", "--fd", "{fd}", "asgi:app"]
GUNICORN = [sys.executable, "-m", "gunicorn", "asgi:wsgi"]
HYPERCORN = [sys.executable, "-m", "hypercorn", "--bind", "fd://{fd}", "asgi:app"]
QUICK = ("--ready-hold", "0.1")


@pytest.mark.parametrize(
    "command", [UVICORN, GUNICORN, HYPERCORN, PLAIN], ids=["uvicorn", "gunicorn", "hypercorn", "plain"]
)
def test_unchanged_servers_reload(world: World, command: list[str]) -> None:
    web = world.start("--name", "web", "--bind", "127.0.0.1:0", *QUICK, "--", *command)
    web.serves(1)
    address = web.address()
    assert get(address).startswith("1 ")
    assert web.reloaded() == 2
    assert get(address).startswith("2 ")
    web.gone(1)
    assert get(address).startswith("2 ")
    web.stop()
    with pytest.raises(OSError):
        connect(address)


@pytest.mark.slow
def test_no_new_connection_is_lost_while_it_reloads(world: World) -> None:
    web = world.start("--name", "web", "--bind", "127.0.0.1:0", *QUICK, "--workers", "2", "--", *UVICORN)
    web.serves(1)
    address, done, failed, counted = web.address(), threading.Event(), [], [0, 0]

    def load(number: int) -> None:
        while not done.is_set():
            try:
                get(address)
                counted[number] += 1
            except OSError as error:
                failed.append(repr(error))

    threads = [threading.Thread(target=load, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    try:
        for number in range(2, 6):
            assert web.reloaded() == number
            web.gone(number - 1)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not failed, failed[:5]
    assert min(counted) > 100


def test_kept_connection_is_answered_until_its_generation_is_told_to_drain(world: World) -> None:
    web = world.start("--name", "web", "--bind", "127.0.0.1:0", *QUICK, "--settle", "3", "--", *PLAIN)
    web.serves(1)
    with connect(web.address()) as kept:
        assert ask(kept).startswith("1 ")
        assert web.reloaded() == 2
        assert ask(kept).startswith("1 ")


def test_unix_socket_with_mode_is_replaced_by_rename(world: World) -> None:
    path = str(world.root / "web.sock")
    web = world.start("--name", "web", "--bind", f"unix:{path},mode=0600", *QUICK, "--", *PLAIN)
    web.serves(1)
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert get(path).startswith("1 ")
    before = os.stat(path).st_ino
    assert web.reloaded() == 2
    assert get(path).startswith("2 ")
    assert os.stat(path).st_ino != before
    web.gone(1)
    web.stop()
    assert [p for p in os.listdir(world.root) if "web.sock" in p] == []


def test_two_binds_names_and_placeholders(world: World) -> None:
    script = (
        "import os, socket, sys, select;"
        "print('ARGS', *sys.argv[1:], os.environ['LISTEN_FDNAMES'], flush=True);"
        "ls=[socket.socket(fileno=3), socket.socket(fileno=4)];"
        "\nwhile True:\n for l in select.select(ls,[],[])[0]:\n"
        "  c,_=l.accept(); c.sendall(b'%d' % ls.index(l)); c.close()"
    )
    web = world.start("--name", "web", "--bind", "127.0.0.1:0,name=main", "--bind", "[::1]:0,name=admin", *QUICK,
                      "--", sys.executable, "-c", script, "{fd}", "{fd1}", "{fdmain}", "x{fdadmin}y")  # fmt: skip
    web.serves(1)
    until(lambda: "ARGS 3 4 3 x4y main:admin" in web.printed(), web.printed())
    for place in (0, 1):
        with connect(web.address(place)) as sock:
            assert sock.recv(10) == b"%d" % place
    web.stop()


def test_udp_socket_is_shared(world: World) -> None:
    script = (
        "import os, socket, selectors; s=socket.socket(fileno=3); p=selectors.DefaultSelector();"
        "p.register(s, 1); me=os.environ['PORTWAY_GENERATION'].encode()"
        "\nwhile True:\n p.select(); d,a=s.recvfrom(100); s.sendto(me, a)"
    )
    web = world.start("--name", "web", "--bind", "udp:127.0.0.1:0", *QUICK, "--", sys.executable, "-c", script)
    report = web.serves(1)
    port = int(report["sockets"][0]["address"].rpartition(":")[2])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(10)
        client.sendto(b"?", ("127.0.0.1", port))
        assert client.recv(10) == b"1"
        assert web.reloaded() == 2
        web.gone(1)
        client.sendto(b"?", ("127.0.0.1", port))
        assert client.recv(10) == b"2"
    web.stop()


def test_sighup_reloads_sigterm_stops_and_nothing_stays(world: World) -> None:
    web = world.start("--name", "web", "--bind", "127.0.0.1:0", *QUICK, "--", *PLAIN)
    web.serves(1)
    workers = web.workers()
    web.process.send_signal(signal.SIGHUP)
    web.serves(2)
    web.gone(1)
    workers += web.workers()
    web.process.send_signal(signal.SIGTERM)
    assert web.ends() == 0
    assert not any(alive(pid) for pid in workers)
    assert os.listdir(world.root / "run") == []


def test_broken_release_leaves_the_old_one_serving(world: World) -> None:
    web = world.start("--name", "web", "--bind", "127.0.0.1:0", *QUICK, "--", *PLAIN)
    web.serves(1)
    address = web.address()
    done = web.reload("env", "PLAIN_CRASH=before", *PLAIN)
    assert done.returncode == 4
    assert "this release is broken" in done.stderr
    assert "exited with code 3" in done.stderr
    error = json.loads(done.stdout)["error"]
    assert error["kind"] == "GenerationFailed" and error["exit"] == 4
    assert any("this release is broken" in line for line in error["lines"])
    assert get(address).startswith("1 ")
    # The command that failed is not what the next reload runs.
    assert web.reloaded() == 3
    assert get(address).startswith("3 ")


def test_never_ready_and_killed_generations_leave_the_old_one(world: World) -> None:
    web = world.start("--name", "web", "--bind", "127.0.0.1:0", "--ready-hold", "0.1", "--ready-timeout", "1.5",
                      "--", *PLAIN)  # fmt: skip
    web.serves(1)
    address = web.address()
    done = web.reload("env", "PLAIN_DEAF=1", *PLAIN)
    assert done.returncode == 4
    assert "does not accept on" in done.stderr and "not ready within 1.5 s" in done.stderr
    assert get(address).startswith("1 ")
    background = threading.Thread(target=lambda: results.append(web.reload("env", "PLAIN_DEAF=1", *PLAIN)))
    results: list = []
    background.start()
    until(lambda: "generation 3 started" in web.said(), web.said())
    os.kill(web.workers(3)[0], signal.SIGKILL)
    background.join()
    assert results[0].returncode == 4 and "SIGKILL" in results[0].stderr
    assert get(address).startswith("1 ")


def test_missing_and_forbidden_commands(world: World, tmp_path: Path) -> None:
    web = world.start("--name", "web", "--bind", "127.0.0.1:0", *QUICK, "--", *PLAIN)
    web.serves(1)
    assert web.reload(str(tmp_path / "missing")).returncode == 127
    fds = len(os.listdir(f"/proc/{web.pid}/fd"))  # with the listener that is spare now
    plain = tmp_path / "plain"
    plain.write_text("no program")
    assert web.reload(str(tmp_path / "missing")).returncode == 127
    assert web.reload(str(plain)).returncode == 126
    assert get(web.address()).startswith("1 ")
    assert len(os.listdir(f"/proc/{web.pid}/fd")) == fds
    assert (
        world.run("run", "--name", "other", "--bind", "127.0.0.1:0", "--", str(tmp_path / "missing")).returncode == 127
    )
    assert os.listdir(world.root / "run") == ["web"]


def test_first_generation_that_fails_ends_the_run(world: World) -> None:
    done = world.run("run", "--name", "web", "--bind", "127.0.0.1:0", *QUICK, "--", *PLAIN, PLAIN_CRASH="before")
    assert done.returncode == 4
    assert "exited with code 3" in done.stderr and "this release is broken" in done.stdout
    assert os.listdir(world.root / "run") == []


def test_busy_port_and_name_in_use(world: World) -> None:
    web = world.start("--name", "web", "--bind", "127.0.0.1:0", *QUICK, "--", *PLAIN)
    web.serves(1)
    port = web.address()[1]
    done = world.run("run", "--name", "other", "--bind", f"127.0.0.1:{port}", "--", *PLAIN)
    assert done.returncode == 1 and f"127.0.0.1:{port} is in use by pid" in done.stderr
    done = world.run("run", "--name", "web", "--bind", "127.0.0.1:0", "--", *PLAIN)
    assert done.returncode == 6 and "web runs already" in done.stderr
    assert get(web.address()).startswith("1 ")
    path = world.root / "file"
    path.write_text("not a socket")
    done = world.run("run", "--name", "other", "--bind", f"unix:{path}", "--", *PLAIN)
    assert done.returncode == 1 and "is no socket" in done.stderr
    assert path.read_text() == "not a socket"


def test_verbs_of_a_service_that_does_not_run(world: World) -> None:
    for words in (["reload", "web"], ["stop", "web"], ["status", "web"], ["upgrade", "web"], ["logs", "web"]):
        done = world.run(*words)
        assert done.returncode == 3, words
        assert "not running" in done.stderr and "Traceback" not in done.stderr
    assert world.run("status").returncode == 0
    assert json.loads(world.run("status", "--json").stdout) == []


def test_crashed_worker_starts_again(world: World) -> None:
    web = world.start("--name", "web", "--bind", "127.0.0.1:0", *QUICK, "--", *PLAIN)
    web.serves(1)
    address, (first,) = web.address(), web.workers()
    os.kill(first, signal.SIGKILL)
    # What the kernel queues meanwhile waits for the next process.
    body = get(address)
    assert body.startswith("1 ") and int(body.split()[1]) != first
    report = web.status()
    assert report["generations"][0]["workers"][0]["restarts"] == 1
    assert "was ended by SIGKILL; again in 0.1 s" in web.said()
    assert web.reloaded() == 2


def test_reloads_that_come_meanwhile_become_one(world: World) -> None:
    web = world.start("--name", "web", "--bind", "127.0.0.1:0", "--ready-hold", "1", "--", *PLAIN)
    web.serves(1)
    results: list = []
    threads = [threading.Thread(target=lambda: results.append(web.reloaded()))]
    threads[0].start()
    until(lambda: "generation 2 started" in web.said(), web.said())
    threads += [threading.Thread(target=lambda: results.append(web.reloaded())) for _ in range(3)]
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [2, 3, 3, 3]
    assert web.status()["serving"] == 3


def test_term_during_a_reload_drops_the_new_generation(world: World) -> None:
    web = world.start(
        "--name", "web", "--bind", "127.0.0.1:0", "--ready-hold", "20", "--ready", "delay:0", "--", *PLAIN
    )
    until(lambda: "generation 1 started" in web.said(), web.said())
    web.process.send_signal(signal.SIGTERM)
    assert web.ends() == 0
    assert "the service was stopped" in web.said()


def test_stop_during_a_reload_drops_the_new_generation(world: World) -> None:
    web = world.start("--name", "web", "--bind", "127.0.0.1:0", "--ready-hold", "2", "--", *PLAIN)
    web.serves(1)
    results: list = []
    thread = threading.Thread(target=lambda: results.append(web.reload()))
    thread.start()
    until(lambda: "generation 2 started" in web.said(), web.said())
    new = web.workers(2)
    web.stop()
    thread.join()
    assert results[0].returncode != 0 and "stopped" in results[0].stderr
    assert not any(alive(pid) for pid in new)


def test_status_counts_connections_per_generation(world: World) -> None:
    web = world.start(
        "--name", "web", "--bind", "127.0.0.1:0", *QUICK, "--drain", "forever", "--", *PLAIN, PLAIN_SLOW="0"
    )
    web.serves(1)
    kept = [connect(web.address()) for _ in range(3)]
    try:
        for sock in kept:
            ask(sock)
        report = web.status()
        assert [g["connections"] for g in report["generations"]] == [3]
        text = world.run("status", "web").stdout
        assert "generation 1: serving" in text and "3 connections" in text
        listed = json.loads(world.run("status", "--json").stdout)
        assert [(one["name"], one["state"]) for one in listed] == [("web", "running")]
    finally:
        for sock in kept:
            sock.close()


def test_logs_with_prefix_and_after_reload(world: World) -> None:
    web = world.start("--name", "web", "--bind", "127.0.0.1:0", *QUICK, "--", *PLAIN)
    web.serves(1)
    web.reloaded()
    until(lambda: "[2.0] hello from generation 2" in web.printed(), web.printed())
    assert "[1.0] hello from generation 1" in web.printed()
    shown = world.run("logs", "web").stdout
    assert "[1.0] hello from generation 1" in shown and "[2.0] hello from generation 2" in shown
    assert "generation 1" not in world.run("logs", "web", "-g", "2").stdout
    line = json.loads(world.run("logs", "web", "-g", "2", "--json").stdout)
    assert line == {"generation": 2, "worker": 0, "line": "hello from generation 2"}


def test_output_inherit(world: World) -> None:
    web = world.start("--name", "web", "--bind", "127.0.0.1:0", *QUICK, "--output", "inherit", "--", *PLAIN)
    web.serves(1)
    until(lambda: web.printed() == "hello from generation 1\n", web.printed())
    web.stop()
