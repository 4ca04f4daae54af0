"""`portway asgi`'s worker: what moves, what stays until it may, and that the client sees nothing of it."""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hook_harness import ROOT, Service, service, until

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
SLOW = b"GET /slow?0.4 HTTP/1.1\r\nHost: localhost\r\n\r\n"
KINDS = [("h11", "asyncio"), ("httptools", "uvloop")]
ALL_KINDS = [*KINDS, ("h11", "uvloop"), ("httptools", "asyncio")]
every_kind = pytest.mark.parametrize("kind", ALL_KINDS, indirect=True, ids="-".join)


@pytest.fixture(params=KINDS, ids="-".join)
def kind(request: pytest.FixtureRequest) -> list[str]:
    http, loop = request.param
    for needed in {http, loop} - {"asyncio"}:
        pytest.importorskip(needed)
    return ["--http", http, "--loop", loop]


def worker(*options: str) -> list[str]:
    return ["-m", "portway.supervise.asgi", "asgi_app:app", "--no-access-log", "--log-level", "warning", *options]


@pytest.fixture
def two(kind: list[str]) -> Iterator[Service]:
    with service(*worker(*kind, "--timeout-keep-alive", "60", "--root-path", "/root")) as it:
        it.start(1)
        yield it


class Client:
    """One kept connection; `answer` reads exactly one response, so that a byte too many fails the next."""

    def __init__(self, address: tuple[str, int], context: ssl.SSLContext | None = None) -> None:
        self.sock = socket.create_connection(address, timeout=20)
        if context is not None:
            self.sock = context.wrap_socket(self.sock, server_hostname="localhost")
        self.file = self.sock.makefile("rb")

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def answer(self) -> dict[str, Any]:
        """The decoded body, with the status and header names in ``_status`` and ``_headers``."""
        status, headers = self.head()
        body = json.loads(self.file.read(int(headers["content-length"])))
        return {**body, "_status": status, "_headers": headers}

    def head(self) -> tuple[int, dict[str, str]]:
        first = self.file.readline()
        assert first, "the connection ended instead of an answer"
        headers = {}
        while (line := self.file.readline()) not in (b"\r\n", b""):
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        return int(first.split()[1]), headers

    def ask(self, request: bytes = GET) -> dict[str, Any]:
        self.send(request)
        return self.answer()

    def close(self) -> None:
        self.file.close()
        self.sock.close()


@pytest.fixture
def connect() -> Iterator[Any]:
    made: list[Client] = []

    def connect(it: Service, context: ssl.SSLContext | None = None) -> Client:
        made.append(Client(it.address, context))
        return made[-1]

    yield connect
    for one in made:
        one.close()


def reload(it: Service) -> None:
    """Until the old worker has nothing left, and has been killed: an answer after this is the new one's."""
    old = it.workers[-1]
    it.reload()
    old.wait_for("drained")
    old.end()


def test_idle_connections_move_and_know_who_they_are(two: Service, connect: Any) -> None:
    idle, fresh = [connect(two) for _ in range(40)], [connect(two) for _ in range(5)]
    before = [one.ask() for one in idle]
    for generation in (2, 3):
        reload(two)
        for one, first in zip(idle, before, strict=True):
            after = one.ask()
            assert after["generation"] == generation
            assert after["client"] == list(one.sock.getsockname())
            for same in ("client", "server", "scheme", "root_path", "path"):
                assert after[same] == first[same]
            assert "connection" not in after["_headers"] and "date" in after["_headers"]
    assert {one.ask()["generation"] for one in fresh} == {3}  # never sent anything before


@every_kind
def test_heads_cut_anywhere(two: Service, connect: Any) -> None:
    head = b"GET /path HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"v" * 300 + b"\r\n\r\n"
    cuts = [*range(1, 40), 100, len(head) - 4, len(head) - 3, len(head) - 2, len(head) - 1]
    cut = [(connect(two), at) for at in cuts]
    for number, (one, at) in enumerate(cut):
        if number % 2:
            one.ask()
        one.send(head[:at])
    reload(two)
    for one, at in cut:
        one.send(head[at:])
        answer = one.answer()
        assert (answer["generation"], answer["path"]) == (2, "/root/path"), at
        assert one.ask()["generation"] == 2


def test_a_running_response_finishes_where_it_is(two: Service, connect: Any) -> None:
    slow = [connect(two) for _ in range(10)]
    for one in slow:
        one.send(SLOW)
    old = two.workers[0]
    two.reload()
    for one in slow:
        answer = one.answer()
        assert answer["generation"] == 1 and "connection" not in answer["_headers"]
    old.wait_for("drained")
    old.end()
    assert {one.ask()["generation"] for one in slow} == {2}


@every_kind
def test_pipelined_requests_are_all_answered_in_order(two: Service, connect: Any) -> None:
    paths = [b"/slow?0.4", b"/one", b"/two", b"/three"]
    one = connect(two)
    one.send(b"".join(b"GET %b HTTP/1.1\r\nHost: localhost\r\n\r\n" % path for path in paths) + b"GET /four HT")
    reload(two)
    got = [one.answer()["path"] for _ in paths]
    assert got == ["/root/slow", "/root/one", "/root/two", "/root/three"]
    one.send(b"TP/1.1\r\nHost: localhost\r\n\r\n")
    answer = one.answer()
    assert (answer["path"], answer["generation"]) == ("/root/four", 2)


def test_a_chunk_that_spans_two_requests(two: Service, connect: Any) -> None:
    """The end of one request, with a body, and the beginning of the next in one read."""
    ones = [connect(two) for _ in range(20)]
    for length, one in enumerate(ones):
        body = b"\r\n\r\nGET /" + b"b" * length
        one.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body + GET[: length + 1])
        assert one.answer()["body"] == length + 9
    reload(two)
    for length, one in enumerate(ones):
        one.send(GET[length + 1 :])
        assert one.answer()["generation"] == 2


def test_a_half_read_body_stays(two: Service, connect: Any) -> None:
    one = connect(two)
    one.send(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n" + b"b" * 60_000)
    old = two.workers[0]
    two.reload()
    other = connect(two)
    other.ask()
    one.send(b"b" * 40_000)
    answer = one.answer()
    assert (answer["generation"], answer["body"]) == (1, 100_000)
    old.wait_for("drained")
    old.end()
    assert one.ask()["generation"] == 2


@every_kind
def test_unsent_output_goes_out_first(two: Service, connect: Any) -> None:
    one = connect(two)
    one.send(b"GET /big?8000000 HTTP/1.1\r\nHost: localhost\r\n\r\n")
    length = int(one.head()[1]["content-length"])  # the rest does not fit into the buffers
    old = two.workers[0]
    two.reload()
    first = one.file.read(1_000_000)
    assert not old.heard("drained")
    assert json.loads(first + one.file.read(length - len(first)))["generation"] == 1
    old.wait_for("drained")
    old.end()
    assert one.ask()["generation"] == 2


def test_the_keep_alive_timer_goes_along(kind: list[str], connect: Any) -> None:
    with service(*worker(*kind, "--timeout-keep-alive", "1")) as it:
        it.start(1)
        asked, fresh = connect(it), connect(it)
        asked.ask()
        reload(it)
        assert asked.file.readline() == b""  # closed by the new generation once its second is over
        assert fresh.ask()["generation"] == 2  # asked nothing yet: no timer, as in uvicorn


def test_a_successor_that_adopts_nothing(two: Service, connect: Any) -> None:
    """A reload to a server without the hook: kept connections end politely, after an answer."""
    kept, slow = connect(two), connect(two)
    kept.ask()
    slow.send(SLOW)
    until(lambda: two.workers[0].heard("hello"), "hello")
    two.workers[0].drain(2, None)
    until(lambda: "close" in slow.answer()["_headers"].get("connection", "") or pytest.fail("no close"), "an answer")
    answer = kept.ask()
    assert answer["generation"] == 1 and answer["_headers"]["connection"] == "close"
    assert kept.file.readline() == b""
    two.workers[0].wait_for("drained")


@pytest.mark.parametrize("victim", ["successor", "source"])
def test_kill_9_between_the_generations(two: Service, connect: Any, victim: str) -> None:
    ones = [connect(two) for _ in range(100)]
    for one in ones:
        one.ask()
    old, new = two.workers[0], two.start(2)
    old.drain(2, two.inboxes[2][1])
    (new if victim == "successor" else old).end()
    if victim == "successor":
        two.forget_inbox(2)
    survivor = 1 if victim == "successor" else 2
    for one in ones:
        try:
            one.send(GET)
            if one.file.peek(1):  # else it was the killed one's
                assert one.answer()["generation"] == survivor
        except (ConnectionResetError, BrokenPipeError):
            pass
    assert connect(two).ask()["generation"] == survivor


def test_tls_is_told_to_close(kind: list[str], connect: Any) -> None:
    pem = str(Path(__file__).parent / "localhost.pem")
    context = ssl.create_default_context(cafile=pem)
    with service(*worker(*kind, "--ssl-certfile", pem, "--ssl-keyfile", pem)) as it:
        it.start(1)
        idle, slow = connect(it, context), connect(it, context)
        assert idle.ask()["scheme"] == "https"
        slow.send(SLOW)
        old = it.workers[0]
        it.reload()
        for answer in (slow.answer(), idle.ask()):
            assert (answer["generation"], answer["_headers"]["connection"]) == (1, "close")
        assert idle.file.readline() == slow.file.readline() == b""
        idle.close()
        slow.close()
        old.wait_for("drained")
        assert connect(it, context).ask()["generation"] == 2


def test_websockets_stay_until_the_limit(kind: list[str]) -> None:
    client = pytest.importorskip("websockets.sync.client")
    exceptions = pytest.importorskip("websockets.exceptions")
    with service(*worker(*kind)) as it:
        it.start(1)
        host, port = it.address
        with client.connect(f"ws://{host}:{port}/", close_timeout=5) as one:
            one.send("a")
            assert one.recv(timeout=20) == "a"
            it.reload(limit=2.0)
            one.send("b")
            assert one.recv(timeout=20) == "b"
            with pytest.raises(exceptions.ConnectionClosed) as closed:
                one.recv(timeout=20)
            assert closed.value.rcvd is not None and closed.value.rcvd.code == 1012
        it.workers[0].wait_for("drained")


def test_stop_finishes_and_runs_the_lifespan(kind: list[str], tmp_path: Path, connect: Any) -> None:
    (tmp_path / "marked.py").write_text(
        "import asgi_app, pathlib\n"
        "async def app(scope, receive, send):\n"
        "    if scope['type'] == 'lifespan':\n"
        "        pathlib.Path(__file__).with_name((await receive())['type']).touch()\n"
        "        await send({'type': 'lifespan.startup.complete'})\n"
        "        pathlib.Path(__file__).with_name((await receive())['type']).touch()\n"
        "        await send({'type': 'lifespan.shutdown.complete'})\n"
        "    else:\n"
        "        await asgi_app.app(scope, receive, send)\n"
    )
    command = ["-m", "portway.supervise.asgi", "marked:app", "--app-dir", str(tmp_path), *kind]
    with service(*command) as it:
        it.start(1)
        slow = connect(it)
        slow.send(SLOW)
        until(lambda: (tmp_path / "lifespan.startup").exists(), "the startup event")
        time.sleep(0.1)  # the request is read; a stop before that may refuse it
        it.workers[0].control.send(b'{"verb": "stop"}')
        assert slow.answer()["_status"] == 200
        assert it.workers[0].process.wait(20) == 0
        assert (tmp_path / "lifespan.shutdown").exists()


def run(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    path = f"{ROOT / 'src'}:{ROOT / 'examples'}:{os.environ.get('PYTHONPATH', '')}"
    return subprocess.run(
        [sys.executable, *words], env={"PYTHONPATH": path, "PATH": "/bin", **environ},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_an_application_that_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("async def app(scope, receive, send): raise RuntimeError('no database')\n")
    script = (
        "import os, socket, sys; s = socket.create_server(('127.0.0.1', 0)); os.dup2(s.fileno(), 3);"
        "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()));"
        "from portway.supervise.asgi.__main__ import main;"
        f"sys.exit(main(['broken:app', '--app-dir', {str(tmp_path)!r}, '--lifespan', 'on']))"
    )
    done = run("-c", script)
    assert done.returncode == 3 and "no database" in done.stderr


@pytest.mark.parametrize("program", [["-m", "portway", "asgi"], ["-m", "portway.supervise.asgi"]])
@pytest.mark.parametrize(
    ("version", "names"),
    [(None, "not installed"), ("0.34.3", "uvicorn 0.34.3 is installed"), ("0.55.0", "uvicorn 0.55.0 is installed")],
)
def test_without_a_fitting_uvicorn(program: list[str], version: str | None, names: str, tmp_path: Path) -> None:
    text = "raise ImportError('hidden')" if version is None else f"__version__ = {version!r}"
    (tmp_path / "uvicorn.py").write_text(text)
    done = run(*program, "asgi_app:app", PYTHONPATH=f"{tmp_path}:{ROOT / 'src'}")
    assert done.returncode == 1 and names in done.stderr and "pip install 'portway[asgi]'" in done.stderr, done.stderr


@pytest.mark.parametrize("program", [["-m", "portway", "asgi"], ["-m", "portway.supervise.asgi"]])
def test_a_protocol_that_cannot_move(program: list[str]) -> None:
    done = run(*program, "asgi_app:app", "--http", "zttp")
    assert done.returncode in (1, 2) and "'zttp'" in done.stderr and "h11" in done.stderr  # uvicorn < 0.36 knows a list
