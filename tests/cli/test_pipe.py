"""`portway pipe`: real processes on both sides, .NET's too; what is printed, and exit codes for scripts."""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("portway._native.pipe")
from handoff_peers import patiently
from verbs import Portway

import portway as library

Start = Callable[..., "Listening"]


class Listening:
    """A running `portway pipe listen`; the pipe exists when it is made. It prints to a file and so never waits."""

    def __init__(self, portway: Portway, *words: str) -> None:
        self.out = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(portway.command("pipe", "listen", *words), stdout=self.out,
                                        stderr=subprocess.PIPE, text=True, env=portway.env)  # fmt: skip
        self.pid = self.process.pid
        assert self.process.stderr is not None
        said = self.process.stderr.readline()
        assert said.startswith("portway: serving the pipe"), said

    def finished(self, code: int = 0) -> tuple[list[str], str]:
        """The lines it printed, and its remarks after the first; it has ended by itself."""
        _, remarks = self.process.communicate(timeout=30)
        assert self.process.returncode == code, remarks
        self.out.seek(0)
        return self.out.read().decode().splitlines(), remarks

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        self.process.communicate(timeout=30)
        return self.process.returncode

    def close(self) -> None:
        self.end(signal.SIGKILL)
        self.out.close()


@pytest.fixture
def portway(root: str, monkeypatch: pytest.MonkeyPatch) -> Portway:
    monkeypatch.setenv("TMPDIR", root)  # where .NET's names live
    monkeypatch.setenv("PORTWAY_ROOT", root)
    return Portway(root)


@pytest.fixture
def listen(portway: Portway) -> Iterator[Start]:
    running: list[Listening] = []

    def begin(*words: str) -> Listening:
        running.append(Listening(portway, *words))
        return running[-1]

    yield begin
    for one in running:
        one.close()


def test_ls_shows_who_uses_a_pipe_and_connects_to_nobody(portway: Portway, listen: Start) -> None:
    server = listen("Hello", "--max-instances", "7")
    before = portway.lines("pipe", "ls")
    assert [(row["name"], row["kind"], row["mode"], row["direction"]) for row in before] == [
        ("Hello", "portway", "message", "duplex")
    ]
    assert (before[0]["in_use"], before[0]["max_instances"], before[0]["clients"]) == (0, 7, [])
    assert before[0]["dotnet_path"] == f"{portway.env['PORTWAY_ROOT']}/CoreFxPipe_Hello"
    assert before[0]["dotnet_state"] == "ours"
    with library.NamedPipeClient("hello") as pipe:
        pipe.send(b"x")
        pipe.flush(timeout=20)  # the server has read it: it knows its client
        row = portway.lines("pipe", "ls")[0]
        assert (row["in_use"], row["clients"]) == (1, [os.getpid()])
        states = [one for one in portway.lines("pipe", "ls", "--instances") if one["state"] == "connected"]
        assert [(one["name"], one["server_pid"], one["client_pid"], one["client_uid"]) for one in states] == [
            ("Hello", server.pid, os.getpid(), os.geteuid())
        ]
        text = portway.run("pipe", "ls").stdout.decode()
        assert "1 of 7" in text and str(os.getpid()) in text and "ours" in text
    assert server.end(signal.SIGTERM) == 0
    done = portway.run("pipe", "ls")
    assert (done.returncode, done.stderr) == (0, b"no pipes\n")
    assert [one for one in os.listdir(portway.env["PORTWAY_ROOT"]) if "CoreFx" in one or one.startswith(".")] == []


def test_ls_shows_dotnet_and_strangers_without_disturbing_them(portway: Portway) -> None:
    # A listener that tells whether anybody ever connected: what .NET's server is to the kernel.
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.bind(f"{portway.env['PORTWAY_ROOT']}/CoreFxPipe_Theirs")
        stranger.listen()
        stranger.setblocking(False)
        rows = portway.lines("pipe", "ls")
        assert [(row["name"], row["kind"]) for row in rows] == [("Theirs", "dotnet")]
        assert portway.run("doctor").returncode in (0, 1)
        with pytest.raises(BlockingIOError):
            stranger.accept()


def test_ls_after_the_server_was_killed_leaves_nothing(portway: Portway, listen: Start) -> None:
    listen("gone", "--mode", "byte").end(signal.SIGKILL)
    assert portway.lines("pipe", "ls") == []
    left = [path for path in Path(portway.env["PORTWAY_ROOT"]).rglob("*") if not path.is_dir()]
    assert left == []


def test_control_characters_of_names_do_not_reach_the_terminal(portway: Portway) -> None:
    with library.NamedPipeServer("a\x1b[31mb[bold]"):
        out = portway.run("pipe", "ls").stdout
    assert b"\x1b" not in out and b"a?[31mb[bold]" in out


def test_messages_as_text_hex_and_json(portway: Portway, listen: Start) -> None:
    text = listen("t", "--count", "3")
    assert portway.json("pipe", "send", "T", "one", "two three", "") == {
        "name": "T", "mode": "message", "messages": 3, "bytes": 12, "server": text.pid,
    }  # fmt: skip
    assert text.finished()[0] == ["one", "two three", ""]
    digits = listen("h", "--hex", "--count", "1")
    portway.json("pipe", "send", "h", stdin=b"\x00\xffa")
    assert digits.finished()[0] == ["00ff61"]
    objects = listen("j", "--json", "--count", "2")
    sender = subprocess.Popen(portway.command("pipe", "send", "j", "héllo"), env=portway.env, stdout=subprocess.DEVNULL)
    assert sender.wait(30) == 0
    portway.json("pipe", "send", "j", stdin=b"\xff\xfe")
    first, second = map(json.loads, objects.finished()[0])
    assert first["client"] == {"pid": sender.pid, "uid": os.geteuid()}
    assert (first["name"], first["size"], first["text"], first["base64"]) == ("j", 6, "héllo", None)
    assert (second["size"], second["text"], base64.b64decode(second["base64"])) == (2, None, b"\xff\xfe")


def test_stdin_is_one_message_or_one_a_line(portway: Portway, listen: Start) -> None:
    data = random.Random(5).randbytes(300_000)
    server = listen("s", "--json", "--count", "4")
    assert portway.json("pipe", "send", "s", "--flush", stdin=data)["messages"] == 1
    assert portway.json("pipe", "send", "s", "--lines", stdin=b"a\n\nlast")["messages"] == 3
    first, *rest = map(json.loads, server.finished()[0])
    assert base64.b64decode(first["base64"]) == data
    assert [one["text"] for one in rest] == ["a", "", "last"]


def test_bytes_go_through_unchanged(portway: Portway, tmp_path: Path) -> None:
    data = random.Random(7).randbytes(1_000_000)
    command = portway.command("pipe", "listen", "b", "--mode", "byte", "--count", "1")
    with open(tmp_path / "out", "wb") as out:
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL, env=portway.env)
    try:
        said = portway.json("pipe", "send", "b", "--appear", "--timeout", "20", stdin=data)
        assert (said["messages"], said["bytes"]) == (None, len(data))
        assert server.wait(30) == 0
    finally:
        server.kill()
        server.wait()
    assert (tmp_path / "out").read_bytes() == data


def test_call(portway: Portway, listen: Start) -> None:
    echo = listen("e", "--echo", "--hex", "--count", "3")
    data = random.Random(9).randbytes(200_000)
    assert portway.run("pipe", "call", "E", stdin=data).stdout == data
    assert portway.run("pipe", "call", "e", "abc", "--hex").stdout == b"616263\n"
    assert portway.json("pipe", "call", "e", "abc") == {
        "name": "e", "size": 3, "text": "abc", "base64": None, "server": {"pid": echo.pid, "uid": os.geteuid()},
    }  # fmt: skip
    echo.finished()
    reply = listen("r", "--reply", "pong", "--count", "2")
    assert portway.run("pipe", "call", "r", "ping").stdout == b"pong"
    assert portway.run("pipe", "call", "r", "ping", "--size", "2").returncode == 1  # MoreData
    assert reply.finished()[0] == ["ping", "ping"]


def test_a_reply_that_nobody_waits_for_costs_no_message(portway: Portway, listen: Start) -> None:
    server = listen("r", "--reply", "pong", "--count", "2")
    portway.json("pipe", "send", "r", "one", "two")
    assert server.finished()[0] == ["one", "two"]


def test_a_command_answers(portway: Portway, listen: Start) -> None:
    upper = listen("m", "--count", "2", "--", "tr", "a-z", "A-Z")
    assert portway.run("pipe", "call", "m", "hello").stdout == b"HELLO"
    assert portway.run("pipe", "call", "m", stdin=b"x" * 100_000).stdout == b"X" * 100_000
    upper.finished()
    inetd = listen("b", "--mode", "byte", "--count", "1", "--", "sed", "-u", "s/^/got /")
    done = portway.run("pipe", "call", "b", "a\nb\n", "--byte", "--size", "12", "--timeout", "20")
    assert done.stdout == b"got a\ngot b\n", done.stderr
    inetd.finished()
    missing = listen("x", "--", "/nowhere/command")
    portway.run("pipe", "send", "x", "abc")
    assert "/nowhere/command" in missing.finished(127)[1]


def test_directions(portway: Portway, listen: Start) -> None:
    tells = listen("o", "--direction", "outbound", "--reply", "the time", "--count", "2")
    for _ in range(2):
        with library.NamedPipeClient("o") as pipe:
            assert list(pipe) == [b"the time"]
    tells.finished()
    hears = listen("i", "--direction", "inbound", "--count", "1")
    done = portway.run("pipe", "call", "i", "x")
    assert done.returncode == 1 and b"inbound" in done.stderr
    portway.json("pipe", "send", "i", "x")
    assert hears.finished()[0] == ["x"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_cleanly_with_clients_connected(portway: Portway, listen: Start, number: int) -> None:
    server = listen("s", "--echo")
    with library.NamedPipeClient("s") as pipe:
        pipe.send(b"x")
        assert pipe.receive(timeout=20) == b"x"
        server.process.send_signal(number)
        assert server.finished() == (["x"], "")
        with pytest.raises(library.errors.BrokenPipe):
            pipe.receive(timeout=20)


def test_a_signal_that_was_ignored_from_the_start_stays_so(portway: Portway) -> None:
    command = portway.command("pipe", "listen", "s", "--count", "1")
    nohup = f"trap '' HUP; exec {' '.join(command)}"
    with subprocess.Popen(["sh", "-c", nohup], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=portway.env) as one:
        try:
            assert one.stderr is not None and b"serving" in one.stderr.readline()
            one.send_signal(signal.SIGHUP)
            portway.json("pipe", "send", "s", "still here")
            assert one.communicate(timeout=30)[0] == b"still here\n" and one.returncode == 0
        finally:
            one.kill()


def test_exit_codes_for_scripts(portway: Portway, listen: Start) -> None:
    done = portway.run("pipe", "send", "nobody", "x")
    assert done.returncode == 3
    places = done.stderr.decode().partition("looked in ")[2].partition(" and ")[0].split(", ")
    assert len(places) == len(set(places))
    assert portway.run("pipe", "call", "nobody", "x", "--appear", "--timeout", "0.05").returncode == 5
    listen("one", "--max-instances", "1")
    with library.NamedPipeClient("one"):
        assert portway.run("pipe", "send", "one", "x").returncode == 7
        assert portway.run("pipe", "send", "one", "x", "--timeout", "0.05").returncode == 5
        failed = portway.run("pipe", "call", "one", "x", "--json")
        error = json.loads(failed.stdout)["error"]
        assert (failed.returncode, error["exit"]) == (7, 7)
    done = portway.run("pipe", "call", "one", "x", "--timeout", "0.05")  # it reads, and never answers
    assert done.returncode == 5
    late = portway.run("pipe", "listen", "late", "--timeout", "0.05")
    assert (late.returncode, late.stdout) == (5, b"")


@pytest.mark.parametrize(
    "words, code, says",
    [
        (("listen", "x", "--echo", "--reply", "y"), 2, "one of"),
        (("listen", "x", "--echo", "--", "cat"), 2, "one of"),
        (("listen", "x", "--direction", "inbound", "--echo"), 2, "inbound"),
        (("listen", "x", "--direction", "outbound"), 2, "outbound"),
        (("listen", "x", "--max-instances", "256"), 2, "256"),
        (("listen", "x", "--uid", "no-such-user"), 2, "no user named"),
        (("listen", ""), 2, "empty name"),
        (("listen", "n" * 257), 2, "256"),
        (("send", r"\\other\pipe\x", "y"), 1, "other machines"),
        (("send", "x", "y", "--lines"), 2, "stdin"),
        (("send", "x", "y", "--server-uid", "4294967294"), 3, "no pipe named x"),
        (("call", "x", "y", "--size", "0"), 2, "0"),
        (("bench", "x", "--rounds", "0"), 2, "0"),
    ],
)
def test_bad_input(portway: Portway, words: tuple[str, ...], code: int, says: str) -> None:
    done = portway.run("pipe", *words)
    assert done.returncode == code, done.stderr
    assert says in done.stderr.decode()
    assert b"Traceback" not in done.stderr


def test_a_byte_pipe_has_no_messages_to_call_with(portway: Portway, listen: Start) -> None:
    listen("b", "--mode", "byte", "--echo")
    assert portway.run("pipe", "call", "b", "x").returncode == 2
    assert portway.run("pipe", "call", "b", "xyz", "--byte", "--size", "3").stdout == b"xyz"


def test_bench(portway: Portway, listen: Start) -> None:
    rows = portway.lines("pipe", "bench", "--rounds", "2")
    assert [(row["mode"], row["size"]) for row in rows] == [("message", 32), ("message", 4096), ("message", 65536)]
    assert all(0 < row["best_us"] <= row["median_us"] for row in rows)
    listen("b", "--mode", "byte", "--echo")
    assert [row["mode"] for row in portway.lines("pipe", "bench", "b", "--rounds", "1")] == ["byte"] * 3
    listen("wrong", "--reply", "something else")
    done = portway.run("pipe", "bench", "wrong")
    assert done.returncode == 1 and b"must echo" in done.stderr


@pytest.mark.netpeer
def test_dotnet_by_name(portway: Portway, listen: Start, netpeer: Path) -> None:
    def dotnet(*words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [netpeer, "pipe", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=portway.env
        )

    ours = listen("Ours", "--mode", "byte", "--echo", "--hex", "--count", "1")
    client = dotnet("client", "--name", "Ours", "--mode", "echo", "--size", "1000", "--reps", "3", "--timeout", "20000")
    out, _ = client.communicate(timeout=60)
    assert client.returncode == 0, out
    ours.finished()
    theirs = dotnet("server", "--name", "Theirs", "--mode", "echo")
    try:
        assert theirs.stdout is not None and json.loads(theirs.stdout.readline())["event"] == "listening"
        assert [(row["name"], row["kind"]) for row in portway.lines("pipe", "ls")] == [("Theirs", "dotnet")]
        done = portway.run("pipe", "call", "theirs", "hello", "--byte", "--size", "5", "--timeout", "20")
        assert done.stdout == b"hello", done.stderr
        connected: Any = json.loads(theirs.stdout.readline())
        assert connected["event"] == "connected"  # the first and only one: listing was none
    finally:
        theirs.communicate("quit\n", timeout=30)


def test_a_name_that_another_program_took(portway: Portway, listen: Start) -> None:
    path = f"{portway.env['PORTWAY_ROOT']}/CoreFxPipe_Mine"
    server = listen("Mine", "--mode", "byte", "--count", "2")
    os.unlink(path)  # as .NET's server does
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(path)
        theirs.listen()
        theirs.setblocking(False)
        patiently(lambda: [one["dotnet_state"] for one in portway.lines("pipe", "ls")] == ["taken", "ours"])
        assert [one["kind"] for one in portway.lines("pipe", "ls")] == ["portway", "dotnet"]
        found = {one["what"]: one for one in map(json.loads, portway.run("doctor", "--json").stdout.splitlines())}
        assert "CoreFxPipe_Mine: served by other programs" in found["files of .NET's pipes"]["says"]
        for text in ("a", "b"):
            portway.json("pipe", "send", "mine", text)
        with pytest.raises(BlockingIOError):
            theirs.accept()
    out, remarks = server.finished()
    assert out == ["ab"]
    assert remarks.count("CoreFxPipe_Mine") == 1 and "Traceback" not in remarks
