"""`portway sync`: every verb on every kind, exit codes, what ls shows."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("portway._native.sync")
from verbs import Portway, end

import portway as library
from portway.kernel.dotnet_mutex import DotnetMutex

SLEEP = ("sh", "-c", "echo asleep; exec sleep 60")


@pytest.fixture
def portway(root: str) -> Portway:
    return Portway(root)


@pytest.fixture
def objects(root: str) -> Iterator[dict[str, Any]]:
    with ExitStack() as stack:
        made = {
            "m": library.Mutex("m", root=root), "s": library.Semaphore(1, 3, "s", root=root),
            "e": library.Event("e", root=root), "man": library.Event("man", manual_reset=True, root=root),
            "t": library.WaitableTimer("t", root=root),
        }  # fmt: skip
        for one in made.values():
            stack.callback(one.close)
        yield made


def test_ls(portway: Portway, objects: dict[str, Any], root: str) -> None:
    objects["m"].acquire()
    objects["man"].set()
    objects["t"].set(1000, 5)
    rows = {row["name"]: row for row in portway.lines("sync", "ls")}
    assert {name: row["state"] for name, row in rows.items() if name != "t"} == {
        "m": "held", "s": "1 of 3", "e": "not set, auto-reset", "man": "set, manual-reset",
    }  # fmt: skip
    assert rows["t"]["state"].startswith("due in ")
    assert {row["kind"] for row in rows.values()} == {"mutex", "semaphore", "event", "timer"}
    assert all(row["holders"] == [os.getpid()] and row["waiters"] == 0 for row in rows.values())
    assert (rows["s"]["count"], rows["s"]["maximum"], rows["m"]["abandoned"]) == (1, 3, False)
    objects["m"].release()
    text = portway.run("sync", "ls").stdout.decode()
    assert all(word in text for word in ("holders", "waiters", "1 of 3", "not set, auto-reset"))


def test_ls_shows_waiters_and_abandoned(portway: Portway, objects: dict[str, Any]) -> None:
    held = portway.start("sync", "wait", "m", "--json", "--", *SLEEP, until="asleep")
    try:
        assert _mutex(portway)["state"] == "held"
        waiting = subprocess.Popen(portway.command("sync", "wait", "e"), env=portway.env, stdout=subprocess.DEVNULL)
        try:
            while {row["name"]: row["waiters"] for row in portway.lines("sync", "ls")}["e"] != 1:
                assert waiting.poll() is None
        finally:
            waiting.kill()
            waiting.wait()
    finally:
        end(held, kill=True)
        _kill_sleep()
    row = _mutex(portway)
    assert (row["state"], row["abandoned"]) == ("abandoned", True)
    assert portway.json("sync", "wait", "m") == {"index": 0, "kind": "mutex", "name": "m", "abandoned": True}
    assert portway.json("sync", "wait", "m")["abandoned"] is False


def _mutex(portway: Portway) -> Any:
    return next(row for row in portway.lines("sync", "ls") if row["name"] == "m")


def _kill_sleep() -> None:
    """The command that a killed `portway sync wait` leaves: found by its environment, it is ours."""
    for one in Path("/proc").iterdir():
        if one.name.isdigit():
            try:
                ours = f"PORTWAY_TEST_PARENT={os.getpid()}\0".encode() in (one / "environ").read_bytes()
                if ours and (one / "comm").read_text() in ("sleep\n", "sh\n"):
                    os.kill(int(one.name), 9)
            except OSError:
                continue


def test_create_holds(portway: Portway) -> None:
    process = portway.start("sync", "create", "semaphore", "Global\\jobs", "--initial", "0", "--maximum", "9")
    try:
        row = portway.lines("sync", "ls")[0]
        assert (row["name"], row["state"], row["holders"]) == ("Global\\jobs", "0 of 9", [process.pid])
        assert portway.json("sync", "release", "Global\\jobs", "--count", "4")["previous"] == 0
        assert portway.json("sync", "wait", "Global\\jobs")["index"] == 0
        assert portway.lines("sync", "ls")[0]["count"] == 3
    finally:
        assert end(process) == 0
    assert portway.lines("sync", "ls") == []


def test_create_for_a_while_and_with_a_command(portway: Portway) -> None:
    done = portway.run("sync", "create", "event", "x", "--manual", "--set", "--for", "0.01", "--json")
    assert (done.returncode, b'"existed": false' in done.stdout) == (0, True)
    assert portway.run("sync", "create", "mutex", "x", "--", "sh", "-c", "exit 3").returncode == 3
    assert portway.run("sync", "create", "timer", "x", "--", "sh", "-c", "kill -TERM $$").returncode == 128 + 15


def test_wait_any_all_and_timeouts(portway: Portway, objects: dict[str, Any]) -> None:
    objects["man"].set()
    assert portway.json("sync", "wait", "e", "man", "s")["name"] == "man"
    assert portway.json("sync", "wait", "e", "s", "man") == {
        "index": 1, "kind": "semaphore", "name": "s", "abandoned": False,
    }  # fmt: skip
    done = portway.run("sync", "wait", "--all", "man", "s", "--timeout", "0.05")
    assert (done.returncode, done.stdout) == (5, b"")
    assert b"timed out" in done.stderr
    objects["s"].release()
    assert [row["name"] for row in portway.lines("sync", "wait", "--all", "man", "s", "m")] == ["man", "s", "m"]
    assert objects["s"].value == 0
    objects["m"].acquire(0)  # released at the command's end


def test_wait_runs_the_command_holding(portway: Portway, objects: dict[str, Any]) -> None:
    inner = " ".join(portway.command("sync", "wait", "m", "--timeout", "0"))
    done = portway.run("sync", "wait", "m", "--", "sh", "-c", f"{inner}; exit $((40 + $?))")
    assert done.returncode == 45
    objects["m"].acquire(0)


def test_signals(portway: Portway, objects: dict[str, Any]) -> None:
    assert portway.json("sync", "set", "e")["set"] is True
    assert objects["e"].wait(0)
    assert portway.json("sync", "set", "man")["state"] == "set, manual-reset"
    assert portway.json("sync", "reset", "man")["set"] is False
    assert portway.json("sync", "pulse", "man")["set"] is False
    assert portway.json("sync", "set", "t", "--due", "900", "--period", "2")["period"] == 2
    assert portway.json("sync", "reset", "t")["due"] is None
    assert portway.json("sync", "set", "t")["set"] is True
    assert portway.json("sync", "release", "s", "--count", "2")["previous"] == 1


def test_pulse_lets_through_who_waits(portway: Portway, objects: dict[str, Any]) -> None:
    waiting = subprocess.Popen(portway.command("sync", "wait", "man"), env=portway.env, stdout=subprocess.DEVNULL)
    try:
        while objects["man"].waiters != 1:
            assert waiting.poll() is None
        assert portway.run("sync", "pulse", "man").returncode == 0
        assert waiting.wait(20) == 0
    finally:
        waiting.kill()
        waiting.wait()
    assert not objects["man"].is_set()


@pytest.mark.parametrize(
    "words, code, says",
    [
        (("wait", "nobody"), 3, "no object named nobody"),
        (("wait", "box"), 1, "is a mapping"),
        (("wait", "--all", "s", "s"), 2, "twice"),
        (("wait",), 2, "NAMES"),
        (("wait", "m", "--", "/nowhere/command"), 127, "/nowhere/command"),
        (("wait", "--dotnet", "a", "b"), 2, "one name"),
        (("wait", "--dotnet", "a/b"), 2, "without /"),
        (("release", "m"), 1, "does not belong"),
        (("release", "e"), 1, "is an event, not a semaphore"),
        (("release", "s", "--count", "3"), 1, "above the maximum"),
        (("release", "s", "--count", "0"), 2, "0"),
        (("set", "m"), 1, "is a mutex, not an event or a timer"),
        (("set", "e", "--due", "1"), 2, "for timers"),
        (("pulse", "t"), 1, "is a timer, not an event"),
        (("reset", "s"), 1, "is a semaphore"),
        (("create", "mutex", "s"), 1, "is a semaphore, not a mutex"),
        (("create", "mutex", "x", "--manual"), 2, "not for this kind"),
        (("create", "semaphore", "x", "--initial", "5", "--maximum", "4"), 2, "initial=5"),
        (("create", "event", "e", "--exclusive"), 1, "exists already"),
        (("create", "event", "x\\y"), 2, "backslash"),
        (("create", "job", "x"), 2, "job"),
    ],
)
def test_bad_input(
    portway: Portway, objects: dict[str, Any], root: str, words: tuple[str, ...], code: int, says: str
) -> None:
    with library.FileMapping.create("box", 1, root=root):
        done = portway.run("sync", *words)
    assert done.returncode == code, done.stderr
    assert says in done.stderr.decode()
    assert b"Traceback" not in done.stderr
    assert (objects["s"].value, objects["e"].is_set(), objects["m"].state) == (1, False, "free")


@contextmanager
def dotnet(name: str) -> Iterator[DotnetMutex]:
    with closing(DotnetMutex(name)) as mutex:
        yield mutex


def test_dotnet(portway: Portway) -> None:
    name = f"Global\\portway-test-cli-{os.getpid()}"
    with dotnet(name) as mutex:
        mutex.acquire()
        assert portway.run("sync", "wait", "--dotnet", name, "--timeout", "0.05").returncode == 5
        mutex.release()
        said = portway.json("sync", "wait", "--dotnet", name)
        assert (said["kind"], said["abandoned"]) == ("dotnet-mutex", False)
        held = portway.start("sync", "wait", "--dotnet", name, "--", *SLEEP, until="asleep")
        with pytest.raises(library.PortwayError):
            mutex.acquire(0)
        end(held, kill=True)
        _kill_sleep()
        assert mutex.acquire(10)
        assert mutex.abandoned
        mutex.release()
