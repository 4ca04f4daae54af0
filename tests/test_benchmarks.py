"""The benchmarks run and print what they promise, and the load generator sees every way in which a server can fail."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import handoff, harness, reload, startup  # noqa: E402
from benchmarks.load import Load, build  # noqa: E402

needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


def run(*arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            out, remarks = process.communicate(timeout=90)
        except subprocess.TimeoutExpired:
            process.terminate()  # not kill: it ends the servers that it started
            _, remarks = process.communicate()
            pytest.fail(f"not within 90 s: {remarks}")
    assert process.returncode == 0, remarks
    return [json.loads(line) for line in out.splitlines()]


def check(lines: list[dict[str, Any]]) -> set[tuple[str, str, str]]:
    for line in lines:
        assert list(line)[:7] == ["work", "contender", "metric", "median", "min", "max", "n"]
        assert line["min"] <= line["median"] <= line["max"]
        assert line["n"] >= 1
    return {(line["work"], line["contender"], line["metric"]) for line in lines}


# -- every benchmark, tiny ---------------------------------------------------------------------------------------------


def test_handoff() -> None:
    lines = run("handoff", "--quick", "--json", "--pin")
    seen = check(lines)
    named = ("portway", "send_fds", "mp.send_handle", "mp.pipe")
    assert seen >= {("handoff.one", name, "us") for name in named}
    assert seen >= {("handoff.batch", name, "per_s") for name in named}
    answered = [line for line in lines if line["metric"] == "answered"]
    assert [line["contender"] for line in answered] == ["portway", "send_fds"]
    assert all(line["min"] == line["connections"] for line in answered)


def test_startup() -> None:
    assert check(run("startup", "--quick", "--json")) == {
        ("startup.import", "portway", "ms"), ("startup.import", "python", "ms"), ("startup.help", "portway", "ms")
    }  # fmt: skip


HTTP = [name for name in reload.CONTENDERS if name != "portway"]
METRICS = ("failed", "p99_ms", "worst_ms", "requests")


def tiny_reload(contender: str, *works: str) -> set[tuple[str, str, str]]:
    chosen = [word for work in works for word in ("--work", work)]
    lines = run("reload", "--quick", "--json", "--only", contender, *chosen)
    assert all(line["median"] == 1 for line in lines if line["metric"] == "reloads")
    assert all(line["median"] > 0 for line in lines if line["metric"] == "requests")
    return check(lines)


@needs_cc
@pytest.mark.slow
@pytest.mark.parametrize("contender", HTTP)
def test_reload(contender: str) -> None:
    if contender.startswith("gunicorn"):
        pytest.importorskip("gunicorn")
    seen = tiny_reload(contender, "reload.new", "reload.kept")
    assert seen >= {(work, contender, metric) for work in ("reload.new", "reload.kept") for metric in METRICS}


@needs_cc
@pytest.mark.slow
def test_reload_slow() -> None:
    seen = tiny_reload("portway-asgi", "reload.slow")
    assert seen >= {("reload.slow", "portway-asgi", metric) for metric in METRICS}


@needs_cc
@pytest.mark.slow
def test_reload_tcp() -> None:
    seen = tiny_reload("portway", "reload.tcp")
    assert seen >= {("reload.tcp", "portway", metric) for metric in ("failed", "bytes_lost", "requests")}


def test_usage_errors_name_what_there_is() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "handoff", "--only", "nobody"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "--only nobody: handoff has portway, send_fds" in done.stderr
    assert not done.stdout


def test_the_promised_names() -> None:
    assert {"portway", "send_fds", "mp.send_handle", "mp.pipe"} <= set(handoff.CONTENDERS)
    assert {"uvicorn", "gunicorn", "portway-run", "portway-asgi", "portway"} <= set(reload.CONTENDERS)
    assert "startup.import" in startup.WORKS


def test_figures_add_up() -> None:
    figures = harness.Figures()
    for value, causes in ((3, {"reset": 3}), (1, {"reset": 1, "ended": 1}), (2, {})):
        figures.add("w", "c", "failed", value, causes=causes)
    assert list(figures.lines()) == [
        {"work": "w", "contender": "c", "metric": "failed", "median": 2, "min": 1, "max": 3, "n": 3,
         "causes": {"reset": 4, "ended": 1}}
    ]  # fmt: skip


def test_a_worker_that_ends_is_an_error_not_a_wait() -> None:
    def serve() -> Callable[..., Any]:
        return lambda: sys.exit(3)

    with harness.workers([lambda: harness.Worker("quitter", serve)]) as [worker]:
        with pytest.raises(harness.Failed, match="quitter: its process ended"):
            worker.ask()


def test_machine() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--machine"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert re.search(r"^- kernel: Linux \d", done.stdout, re.MULTILINE)
    assert "- python: CPython 3." in done.stdout


# -- the generator against servers that misbehave in one way each ------------------------------------------------------

Behaviour = Callable[[socket.socket, bytes], bool]
"""Answers one request or line; False: close the connection."""


@contextmanager
def serving(behave: Behaviour, end: bytes) -> Iterator[int]:
    """A threaded server on the port it yields; one thread for each connection, all joined at the end."""
    threads: list[threading.Thread] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve(sock: socket.socket) -> None:
            with sock:
                buffer = b""
                while data := _receive(sock):
                    *whole, buffer = (buffer + data).split(end)
                    try:
                        if not all(behave(sock, one) for one in whole):
                            return
                    except OSError:
                        return

        def accept() -> None:
            while True:
                try:
                    sock, _ = server.accept()
                except OSError:
                    return
                threads.append(threading.Thread(target=serve, args=(sock,)))
                threads[-1].start()

        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
            accepting.join()
    for thread in threads:  # the generator has ended, so every connection has
        thread.join()


def _receive(sock: socket.socket) -> bytes:
    try:
        return sock.recv(4096)
    except OSError:
        return b""


def http(behave: Behaviour, **options: object) -> dict[str, Any]:
    generator: dict[str, object] = {"rate": 100, "seconds": 0.5, "kept": 4, "timeout": 0.5, **options}
    with serving(behave, b"\r\n\r\n") as port, Load(port, **generator) as load:
        return load.end(30)


def answer(head: bytes, more: bytes = b"", status: bytes = b"200 OK", flip: bool = False) -> bytes:
    found = re.search(rb"\?id=([0-9a-f]{16}) ", head)
    assert found
    body = (found[1][::-1] if flip else found[1]) + b"\n"
    return b"HTTP/1.1 %b\r\nContent-Length: %d\r\n%b\r\n%b" % (status, len(body), more, body)


def says(**how: Any) -> Behaviour:
    def behave(sock: socket.socket, head: bytes) -> bool:
        sock.sendall(answer(head, **how))
        return True

    return behave


def truncated(sock: socket.socket, head: bytes) -> bool:
    sock.sendall(answer(head)[:-5])
    return False


def ends(sock: socket.socket, head: bytes) -> bool:
    return False


def silent(sock: socket.socket, head: bytes) -> bool:
    return True


def doubled(sock: socket.socket, head: bytes) -> bool:
    sock.sendall(answer(head) * 2)
    return True


def closes_after(sock: socket.socket, head: bytes) -> bool:
    sock.send(answer(head), socket.MSG_MORE)  # the end goes out with the answer: no race with the next request
    return False


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    if shutil.which("cc"):
        build()


@needs_cc
@pytest.mark.parametrize("split", [0, 50])
def test_right_answers(split: int) -> None:
    report = http(says(), split=split)
    for part in ("new", "kept"):
        assert report[part]["requests"] == report[part]["answered"] > 20
        assert report[part]["failed"] == report[part]["reopened"] == report[part]["polite"] == 0
    assert report["kept"]["opened"] == 4
    assert report["all"]["requests"] == report["new"]["requests"] + report["kept"]["requests"]
    assert report["all"]["worst_ms"] == max(report["new"]["worst_ms"], report["kept"]["worst_ms"]) > 0


@needs_cc
@pytest.mark.parametrize(
    ("behave", "causes"),
    [
        (says(flip=True), {"body"}), (says(status=b"503 No"), {"status"}), (truncated, {"ended"}),
        (ends, {"ended", "reset"}), (silent, {"timeout"}), (doubled, {"extra"}),
    ],
    ids=["wrong id", "503", "truncated", "no answer", "silent", "doubled"],
)  # fmt: skip
def test_failures_are_counted(behave: Behaviour, causes: set[str]) -> None:
    report = http(behave)
    for part in ("new", "kept"):
        assert report[part]["failed"] == report[part]["requests"] > 20
        assert report[part]["answered"] == 0
        assert set(report[part]["causes"]) <= causes
        assert sum(report[part]["causes"].values()) == report[part]["failed"]


@needs_cc
def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with Load(port, rate=100, seconds=0.3) as load:
        report = load.end(30)
    assert report["all"]["failed"] == report["all"]["requests"] == report["all"]["causes"]["refused"]


@needs_cc
def test_an_end_that_was_announced_is_polite() -> None:
    kept = http(says(more=b"Connection: close\r\n"))["kept"]
    assert kept["failed"] == kept["reopened"] == 0
    assert kept["polite"] == kept["requests"] - 4
    assert kept["opened"] == kept["requests"]


@needs_cc
def test_an_end_that_has_arrived_is_reopened() -> None:
    kept = http(closes_after)["kept"]
    assert kept["failed"] == kept["polite"] == 0
    assert kept["reopened"] == kept["requests"] - 4


def lines(behave: Behaviour) -> dict[str, Any]:
    with serving(behave, b"\n") as port, Load(port, mode="lines", rate=300, seconds=0.5, kept=4, timeout=1) as load:
        report: dict[str, Any] = load.end(30)["lines"]
        return report


def counting(change: Callable[[bytes, int], bytes]) -> Behaviour:
    counts: dict[socket.socket, int] = {}

    def behave(sock: socket.socket, line: bytes) -> bool:
        counts[sock] = counts.get(sock, 0) + 1
        reply = change(line, counts[sock])
        sock.sendall(reply)
        return bool(reply)

    return behave


@needs_cc
def test_lines_right() -> None:
    report = lines(counting(lambda line, count: b"%d %b\n" % (count, line)))
    assert report["failed"] == report["bytes_lost"] == 0
    assert report["requests"] == report["answered"] > 20
    assert report["opened"] == 4


@needs_cc
@pytest.mark.parametrize(
    "change",
    [
        lambda line, count: b"%d %b\n" % (count, line[:-1] if count == 5 else line),
        lambda line, count: b"%d %b\n" % (count if count < 5 else 1, line),
        lambda line, count: b"%d %b\n" % (count, line) * (2 if count == 5 else 1),
        lambda line, count: b"%d %b\n" % (count, line) if count < 5 else b"",
    ],
    ids=["byte lost", "state lost", "answer doubled", "connection closed"],
)
def test_lines_wrong(change: Callable[[bytes, int], bytes]) -> None:
    report = lines(counting(change))
    assert report["failed"] > 0
    assert report["bytes_lost"] > 0 or report["causes"].keys() & {"extra", "ended"}
    assert report["opened"] > 4
