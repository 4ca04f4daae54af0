"""The hook with real workers. Where a test has to misbehave as a successor would not, it reads the inbox itself."""

from __future__ import annotations

import os
import resource
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hook_harness import ROOT, Service, service, until

from portway.deadline import Deadline
from portway.supervise.hook_target import Adopted, Batch, Receiver

EXAMPLES = ROOT / "examples"
SERVERS = pytest.mark.parametrize("server", ["line_server.py", "threaded_line_server.py"])


class Client:
    """Speaks with a line server and knows what the next answer has to be."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.sock = socket.create_connection(address, timeout=20)
        self.file = self.sock.makefile("rb")
        self.count = 0

    def ask(self, line: bytes, *, sent: int = 0) -> None:
        """Sends what of `line` was not `sent` before, and reads its answer."""
        self.sock.sendall(line[sent:] + b"\n")
        self.expect(line)

    def expect(self, line: bytes) -> None:
        self.count += 1
        assert self.file.readline() == b"%d %b\n" % (self.count, line)

    def close(self) -> None:
        self.file.close()
        self.sock.close()


@contextmanager
def clients(address: tuple[str, int], count: int) -> Iterator[list[Client]]:
    found = [Client(address) for _ in range(count)]
    try:
        yield found
    finally:
        for one in found:
            one.close()


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@SERVERS
def test_half_lines_and_counts_move(server: str) -> None:
    with service(str(EXAMPLES / server)) as it:
        it.start(1)
        with clients(it.address, 150) as all_of_them:
            for one in all_of_them:
                one.ask(b"first")
            for _ in range(3):
                for one in all_of_them:
                    one.sock.sendall(b"half of")
                old = it.workers[-1]
                it.reload()
                old.wait_for("drained")
                old.end()  # -9: whatever still hung on it would be seen
                for one in all_of_them:
                    one.ask(b"half of a line", sent=7)


@SERVERS
def test_a_large_payload_follows_on_the_reply_socket(server: str) -> None:
    with service(str(EXAMPLES / server)) as it:
        it.start(1)
        with clients(it.address, 3) as all_of_them:
            large = bytes(range(32, 127)) * 8000  # 760,000 bytes
            for one in all_of_them:
                one.sock.sendall(large)
            until(lambda: all_read(it.address[1]), "all of it is in the server's memory")
            old = it.workers[0]
            it.reload()
            old.wait_for("drained")
            old.end()
            for one in all_of_them:
                one.ask(large, sent=len(large))


def all_read(port: int) -> bool:
    """Whether no byte for the server's port is on its way or in a receive queue: then the server has it in memory."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, state, queues, *_ = line.split()
        sending, receiving = (int(part, 16) for part in queues.split(":"))
        waiting = (int(local[-4:], 16) == port and receiving) or (int(remote[-4:], 16) == port and sending)
        if state == "01" and waiting:
            return False
    return True


@SERVERS
def test_a_large_payload_needs_no_luck(server: str) -> None:
    """Without a successor that reads, the source waits; the worker started later finds the message."""
    with service(str(EXAMPLES / server)) as it:
        it.start(1)
        with clients(it.address, 2) as (first, second):
            first.ask(b"one")
            second.sock.sendall(b"x" * 300_000)
            it.inboxes[2] = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            it.workers[0].drain(2, it.inboxes[2][1])
            until(lambda: select.select([it.inboxes[2][0]], [], [], 0)[0], "a message in the inbox")
            it.start(2)
            it.workers[0].wait_for("drained")
            first.ask(b"two")
            second.ask(b"x" * 300_000 + b"y", sent=300_000)


@SERVERS
def test_no_successor_that_adopts(server: str) -> None:
    with service(str(EXAMPLES / server)) as it:
        it.start(1)
        with clients(it.address, 5) as all_of_them:
            for one in all_of_them:
                one.ask(b"a")
            it.workers[0].drain(2, None)
            for _ in range(3):
                for one in all_of_them:
                    one.ask(b"still here")
            # and when one comes after all, they go there
            it.start(3)
            if server == "line_server.py":
                it.workers[0].drain(3, it.inboxes[3][1])
                it.workers[0].wait_for("drained")
                for one in all_of_them:
                    one.ask(b"moved")


def test_two_sources_and_two_receivers_share_an_inbox() -> None:
    with service(str(EXAMPLES / "line_server.py")) as it:
        for generation in (1, 1, 2, 2):
            it.start(generation)
        with clients(it.address, 200) as all_of_them:
            for one in all_of_them:
                one.ask(b"a")
                one.sock.sendall(b"ha")
            for old in it.workers[:2]:
                old.drain(2, it.inboxes[2][1])
            for old in it.workers[:2]:
                old.wait_for("drained")
                old.end()
            for one in all_of_them:
                one.ask(b"half", sent=2)


# The test as the successor


@contextmanager
def successor(it: Service) -> Iterator[Receiver]:
    it.inboxes[2] = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    receiver = Receiver(it.inboxes[2][0])
    it.workers[0].drain(2, it.inboxes[2][1])
    try:
        yield receiver
    finally:
        receiver.close()


def next_batch(receiver: Receiver) -> Batch:
    deadline = Deadline(20)
    while not receiver.ready:
        assert receiver.wait(deadline), "no message came"
        receiver.step(1)
    return receiver.ready.popleft()


def accept_all(batch: Batch, check: Callable[[Adopted], str | None] | None = None) -> list[Adopted]:
    found = []
    while batch.fds:
        adopted = batch.accept(check)
        if adopted is not None:
            found.append(adopted)
    return found


@SERVERS
def test_accepted_connections_are_complete_and_private(server: str) -> None:
    with service(str(EXAMPLES / server)) as it:
        it.start(1)
        with clients(it.address, 1) as (one,):
            one.ask(b"a")
            one.sock.sendall(b"unfini")
            until(lambda: all_read(it.address[1]), "read by the server")
            with successor(it) as receiver:
                (adopted,) = accept_all(next_batch(receiver))
                assert (adopted.kind, adopted.unread, adopted.state) == ("line/1", b"unfini", b"1")
                assert adopted.generation == 1 and "6 bytes unread" in repr(adopted)
                assert not os.get_inheritable(adopted.sock.fileno())
                assert adopted.sock.getblocking() and os.get_blocking(adopted.sock.fileno())
                it.workers[0].wait_for("drained")
                it.workers[0].end()
                one.sock.sendall(b"shed\n")
                assert adopted.sock.recv(100) == b"shed\n"
                adopted.sock.sendall(b"2 unfinished\n")
                one.expect(b"unfinished")
                adopted.sock.close()
                assert one.file.readline() == b""


@SERVERS
def test_refused_connections_go_on_at_the_source(server: str) -> None:
    with service(str(EXAMPLES / server)) as it:
        it.start(1)
        with clients(it.address, 20) as all_of_them:
            for one in all_of_them:
                one.ask(b"a")
                one.sock.sendall(b"ha")
            with successor(it) as receiver:
                refused = 0
                while refused < 20:
                    batch = next_batch(receiver)
                    refused += len(batch.fds)
                    assert accept_all(batch, lambda adopted: "not today") == []
                it.forget_inbox(2)
                for one in all_of_them:
                    one.ask(b"half", sent=2)
                assert not it.workers[0].heard("drained")


@SERVERS
def test_a_successor_that_ends_before_it_answers(server: str) -> None:
    with service(str(EXAMPLES / server)) as it:
        it.start(1)
        with clients(it.address, 10) as all_of_them:
            for one in all_of_them:
                one.ask(b"a")
            with successor(it) as receiver:
                batch = next_batch(receiver)
                it.forget_inbox(2)
                batch.close()
            for one in all_of_them:
                one.ask(b"b")


@SERVERS
def test_the_source_never_resumes_on_its_own(server: str) -> None:
    """Unanswered is unanswered: the line sent meanwhile waits in the kernel and is the successor's to answer."""
    with service(str(EXAMPLES / server)) as it:
        it.start(1)
        with clients(it.address, 1) as (one,):
            one.ask(b"a")
            with successor(it) as receiver:
                batch = next_batch(receiver)
                one.sock.sendall(b"b\n")
                time.sleep(2)  # not synchronisation: the time in which nothing may happen
                assert not select.select([one.sock], [], [], 0)[0]
                (adopted,) = accept_all(batch)
                assert adopted.sock.recv(100) == b"b\n"
                adopted.sock.close()


def test_at_most_512_are_unanswered() -> None:
    with service("-m", "portway.supervise.asgi", "asgi_app:app") as it:
        it.start(1)
        with clients(it.address, 700):
            with successor(it) as receiver:
                batches = [next_batch(receiver)]
                while sum(len(batch.fds) for batch in batches) < 512:
                    batches.append(next_batch(receiver))
                assert not receiver.wait(Deadline(0.5))
                assert sum(len(batch.fds) for batch in batches) == 512
                assert max(len(batch.fds) for batch in batches) <= 252
                adopted = [one for batch in batches for one in accept_all(batch)]
                while len(adopted) < 700:
                    adopted += accept_all(next_batch(receiver))
                it.workers[0].wait_for("drained")
                for one in adopted:
                    one.sock.close()


def test_a_receiver_without_room_refuses() -> None:
    """MSG_CTRUNC: what came is closed, the connections stay at the source."""
    with service(str(EXAMPLES / "line_server.py")) as it:
        it.start(1)
        with clients(it.address, 40) as all_of_them:
            for one in all_of_them:
                one.ask(b"a")
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            with successor(it) as receiver:
                until(lambda: receiver.wait(Deadline(0)), "a message")
                before = descriptors(os.getpid())
                used = {int(fd) for fd in os.listdir("/proc/self/fd")}
                free = [number for number in range(len(used) + 11) if number not in used]
                try:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (free[10], hard))
                    receiver.step(1)
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                assert receiver.dropped == 1 and not receiver.ready
                assert descriptors(os.getpid()) == before
                it.forget_inbox(2)
            for one in all_of_them:
                one.ask(b"b")


@pytest.mark.parametrize("data", [b"", b"x", b"PWM\x01" + b"\xff" * 12, b"PWM\x01\0\0\x01\0" + b"\0" * 20])
@SERVERS
def test_garbage_in_the_inbox(server: str, data: bytes) -> None:
    with service(str(EXAMPLES / server)) as it:
        it.start(1)
        with clients(it.address, 1) as (one,):
            one.ask(b"a")
            before = descriptors(it.workers[0].pid)
            for _ in range(5):
                socket.send_fds(it.inboxes[1][1], [data or b"\0"], [it.listener.fileno()] * 3)
            old = it.workers[0]
            it.start(2)
            until(lambda: not select.select([it.inboxes[1][0]], [], [], 0)[0], "the inbox is empty")
            until(lambda: descriptors(old.pid) == before, "nothing leaked")
            one.ask(b"b")


# Without a supervisor

OUTSIDE = """
import os, socket, sys, portway
from portway.errors import HandoffRefused
g = portway.generation()
assert g is portway.generation()
assert (g.number, g.name, g.successor, g.drain_limit) == (0, "", None, None), g
assert g.adopted() is None and list(g) == [] and not g.draining.is_set() and not g.supervised
g.ready(); g.drained(); g.status(3)
a, b = socket.socketpair()
try: g.hand_over(a, "k")
except HandoffRefused as error: assert "go on" in str(error)
else: sys.exit("accepted by nobody")
assert a.fileno() >= 0
print(list(g.sockets))
"""

OUTSIDE_AIO = """
import asyncio, socket, sys, portway.aio
from portway.errors import HandoffRefused
async def main():
    g = portway.aio.generation()
    assert g is portway.aio.generation() and g.number == 0 and not g.draining.is_set()
    assert await g.adopted() is None and [one async for one in g] == []
    a, b = socket.socketpair()
    try: await g.hand_over(a, "k")
    except HandoffRefused: print(list(g.sockets))
asyncio.run(main())
asyncio.run(main())
"""


def run(script: str, **environ: str) -> subprocess.CompletedProcess[str]:
    base = {key: value for key, value in os.environ.items() if not key.startswith(("LISTEN_", "PORTWAY_GEN"))}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script], env={**base, "PYTHONPATH": str(ROOT / "src"), **environ},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize(("script", "times"), [(OUTSIDE, 1), (OUTSIDE_AIO, 2)])
def test_outside_of_portway_run(script: str, times: int) -> None:
    done = run(script)
    assert (done.stdout, done.returncode) == ("[]\n" * times, 0), done.stderr


def test_sockets_of_another_process_are_not_ours() -> None:
    done = run(OUTSIDE, LISTEN_FDS="1", LISTEN_PID=str(os.getpid()), PORTWAY_GENERATION="7")
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({"LISTEN_FDS": "many"}, "LISTEN_FDS='many'"),
        ({"LISTEN_FDS": "1"}, "descriptor 3 is not a socket"),
        ({"PORTWAY_GENERATION": "-1"}, "PORTWAY_GENERATION='-1'"),
        ({"PORTWAY_GENERATION": "1", "PORTWAY_INBOX": "1"}, "PORTWAY_INBOX=1: not"),
        ({"PORTWAY_GENERATION": "1", "PORTWAY_CONTROL": "999"}, "PORTWAY_CONTROL=999: not an open socket"),
    ],
)
def test_a_contradicting_environment(environ: dict[str, str], names: str) -> None:
    script = "import os; os.environ['LISTEN_PID'] = str(os.getpid()); import portway; portway.generation()"
    done = run(script, **environ)
    assert done.returncode == 1 and "ConfigurationError" in done.stderr and names in done.stderr, done.stderr


def test_hello_is_a_promise_and_not_a_side_effect() -> None:
    """A program that only asks for its number must still get the stop signal."""
    script = "import portway, time; g = portway.generation(); g.ready(); time.sleep(60)"
    with service("-c", script) as it:
        worker = it.start(1)
        assert not worker.heard("hello")
