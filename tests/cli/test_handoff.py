"""`portway handoff` against real processes that know nothing of it, and some that do."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import portway
from portway.kernel.fdpass import receive_descriptors

# A program of somebody else's: listens, accepts one connection, and waits to be ended.
STRANGER = """
import socket, sys
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], server.fileno(), flush=True)
connection, _ = server.accept()
print(connection.fileno(), flush=True)
sys.stdin.read()
"""
TAKER = """
import os, sys, portway
print(os.getpid(), flush=True)
sock = portway.socket_from(sys.stdin.readline())
print(sock.getsockname()[1], flush=True)
"""


def run(*words: str, check: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "portway", "handoff", *words], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == check, done.stderr
    return done


@contextmanager
def program(text: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def said(process: subprocess.Popen[str]) -> list[int]:
    assert process.stdout is not None
    return [int(word) for word in process.stdout.readline().split()]


def test_ls_and_grab_of_a_stranger() -> None:
    with program(STRANGER) as stranger:
        port, fd = said(stranger)
        with socket.create_connection(("127.0.0.1", port)) as client:
            (accepted,) = said(stranger)
            rows = [json.loads(line) for line in run("ls", str(stranger.pid), "--json").stdout.splitlines()]
            by_fd = {row["fd"]: row for row in rows}
            assert by_fd[fd]["state"] == "listen" and by_fd[fd]["local"] == f"127.0.0.1:{port}"
            assert by_fd[accepted]["peer"] == f"127.0.0.1:{client.getsockname()[1]}"
            assert f"127.0.0.1:{port}" in run("ls", str(stranger.pid)).stdout
            client.sendall(b"waiting bytes")
            about = json.loads(run("grab", str(stranger.pid), str(accepted), "--peek", "99", "--json").stdout)
            assert about["state"] == "connected" and about["waiting"] == "waiting bytes"
            code = "import socket,sys; s=socket.socket(fileno=int(sys.argv[1])); s.sendall(s.recv(99).upper())"
            run("grab", str(stranger.pid), str(accepted), "--", sys.executable, "-c", code, "{fd}")
            assert client.recv(99) == b"WAITING BYTES"


def test_send_into_an_inbox() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, portway.HandoffInbox() as inbox:
        me = str(os.getpid())
        sent = json.loads(run("send", "--from", me, "--fd", str(server.fileno()), "--to", me, "--json").stdout)
        assert sent["way"] == "message" and sent["state"] == "listening"
        with inbox.receive(5) as sock:
            assert sock.getsockname() == server.getsockname() and sock.information.listening


def test_send_by_record_to_a_process_without_an_inbox() -> None:
    with program(TAKER) as taker:
        (pid,) = said(taker)
        with subprocess.Popen(
            [sys.executable, "-m", "portway", "handoff", "send", "--bind", "127.0.0.1:0", "--to", str(pid), "--json"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as sender:  # fmt: skip
            assert sender.stdout is not None and taker.stdin is not None
            taker.stdin.write(json.loads(sender.stdout.readline())["record"] + "\n")
            taker.stdin.flush()
            (port,) = said(taker)
            sent = json.loads(sender.communicate(timeout=20)[0])
        assert sent["way"] == "pid" and sent["local"][1] == port


def test_send_to_any_program_that_takes_scm_rights(tmp_path: os.PathLike[str]) -> None:
    path = os.path.join(tmp_path, "line")
    with socket.socket(socket.AF_UNIX) as line:
        line.bind(path)
        line.listen()
        sent = json.loads(run("send", "--bind", "127.0.0.1:0", "--to-socket", path, "--json").stdout)
        connection, _ = line.accept()
        with connection:
            data, fds = receive_descriptors(connection, timeout=5)
    with socket.socket(fileno=fds[0]) as sock:
        assert data == b"socket" and len(fds) == 1 and sock.getsockname()[1] == sent["local"][1]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["ls", "4194303"], 1, "pid 4194303: no such process"),
        (["grab", "4194303", "3"], 1, "pid 4194303: no such process"),
        (["grab", str(os.getpid()), "9999"], 1, "has no descriptor 9999"),
        (["send", "--bind", "127.0.0.1:0"], 2, "exactly one of --to and --to-socket"),
        (["send", "--to", "1"], 2, "exactly one of --from"),
        (["send", "--to", "1", "--bind", "nowhere"], 2, "no port"),
    ],
)
def test_bad_words_get_one_clear_line(words: list[str], code: int, says: str) -> None:
    error = run(*words, check=code).stderr
    assert says in error and error.count("\n") == 1 and "Traceback" not in error
