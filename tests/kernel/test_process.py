"""Processes, descriptors in messages, and the reaper: what the hand-over stands on."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from typing import Any

import pytest
from handoff_peers import descriptors, patiently

from portway.errors import OperationTimeout, ProcessNotFound, TooManyDescriptors
from portway.kernel import reaper
from portway.kernel.fdpass import receive_descriptors, send_descriptors
from portway.kernel.process import Peer, Pidfd, peer_of, start_time, take_descriptor, uid_of, within_limits


def pair(kind: int = socket.SOCK_STREAM) -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, kind)


# -- descriptors in messages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
@pytest.mark.parametrize("count", [0, 1, 253])
def test_descriptors_travel(kind: int, count: int) -> None:
    ours, theirs = pair(kind)
    reader, writer = os.pipe()
    with ours, theirs:
        send_descriptors(ours, b"hello", [writer] * count)
        data, fds = receive_descriptors(theirs)
        assert data == b"hello" and len(fds) == count
        for fd in fds:
            assert not os.get_inheritable(fd)
            os.write(fd, b"x")
            os.close(fd)
        assert not count or os.read(reader, 1000) == b"x" * count
    os.close(reader)
    os.close(writer)


def test_the_end_of_the_stream() -> None:
    ours, theirs = pair()
    with theirs:
        ours.close()
        assert receive_descriptors(theirs) == (b"", [])
        with pytest.raises(BrokenPipeError):
            send_descriptors(theirs, b"x", [])


def test_what_cannot_be_sent() -> None:
    ours, theirs = pair()
    with ours, theirs:
        with pytest.raises(ValueError, match="data is empty"):
            send_descriptors(ours, b"", [0])
        with pytest.raises(TooManyDescriptors, match="254"):
            send_descriptors(ours, b"x", [0] * 254)
        with pytest.raises(OSError, match="Bad file descriptor"):
            send_descriptors(ours, b"x", [10**6])
        with pytest.raises(OperationTimeout, match="receiving"):
            receive_descriptors(theirs, timeout=0.01)
        with pytest.raises(OperationTimeout, match=r"after 0 s receiving"):
            receive_descriptors(theirs, timeout=0)


def test_a_full_line_is_a_timeout_and_a_long_message_goes_on() -> None:
    ours, theirs = pair()
    with ours, theirs:
        data = os.urandom(3_000_000)
        with pytest.raises(OperationTimeout, match="sending"):
            send_descriptors(ours, data, [0], timeout=0.05)
    ours, theirs = pair()
    with ours, theirs:
        thread = threading.Thread(target=send_descriptors, args=(ours, data, [ours.fileno()]))
        thread.start()
        got, fds = bytearray(), []
        while len(got) < len(data):
            part, more = receive_descriptors(theirs, timeout=20)
            got += part
            fds += more
        thread.join(20)
        assert got == data and len(fds) == 1
        os.close(fds[0])


def test_more_than_the_receiver_takes_is_closed() -> None:
    ours, theirs = pair()
    with ours, theirs:
        before = descriptors()
        send_descriptors(ours, b"x", [0, 1, 2])
        with pytest.raises(TooManyDescriptors, match="3 came, max_fds=2"):
            receive_descriptors(theirs, max_fds=2)
        assert descriptors() == before
        send_descriptors(ours, b"abc", [])
        assert receive_descriptors(theirs, max_bytes=2) == (b"ab", [])


def test_a_receiver_without_room(peer: Any) -> None:
    target = peer()
    ours, theirs = pair()
    target.give(line=theirs)
    with ours:
        send_descriptors(ours, b"x", [0] * 50)
        target.run("limit = resource.getrlimit(resource.RLIMIT_NOFILE)")
        before = target.descriptors()
        target.run(f"resource.setrlimit(resource.RLIMIT_NOFILE, ({len(before) + 10}, limit[1]))")
        with pytest.raises(TooManyDescriptors):
            target.run("fdpass.receive_descriptors(line, timeout=5)")
        assert target.descriptors() == before
        send_descriptors(ours, b"y", [0])
        assert target.run("data, fds = fdpass.receive_descriptors(line, timeout=5)\ndata, len(fds)") == (b"y", 1)


def test_an_interrupting_signal_is_not_an_error() -> None:
    ours, theirs = pair()
    seen: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: seen.append(number))
    try:
        with ours, theirs:
            signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
            with pytest.raises(OperationTimeout):
                receive_descriptors(theirs, timeout=0.1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert seen


# -- processes -------------------------------------------------------------------------------------------------------


def test_who_a_process_is(peer: Any) -> None:
    other = peer()
    assert uid_of(other.pid) == os.geteuid()
    assert 0 < start_time(1) <= start_time(os.getpid()) <= start_time(other.pid)
    ours, theirs = pair()
    with ours, theirs:
        assert peer_of(ours) == Peer(os.getpid(), os.geteuid(), os.getegid())
    with Pidfd(other.pid) as handle:
        assert handle.alive
        number = other.run("r, w = os.pipe()\nw")
        writer = take_descriptor(handle, number)
        assert not os.get_inheritable(writer)
        os.write(writer, b"taken")
        os.close(writer)
        assert other.run("os.read(r, 10)") == b"taken"
        with pytest.raises(OSError, match="Bad file descriptor"):
            take_descriptor(handle, 10**6)
        other.kill()
        patiently(lambda: not handle.alive)
        with pytest.raises(ProcessNotFound, match="has ended"):
            take_descriptor(handle, number)
    for call in (start_time, uid_of, Pidfd):
        with pytest.raises(ProcessNotFound, match=str(other.pid)):
            call(other.pid)  # type: ignore[operator]


def test_a_name_with_parentheses_and_spaces_does_not_confuse(peer: Any) -> None:
    other = peer()
    before = start_time(other.pid)
    other.run("open('/proc/self/comm', 'w').close()\nctypes.CDLL(None).prctl(15, b') Z (a b) c', 0, 0, 0)")
    assert start_time(other.pid) == before


def test_within_limits_names_what_for() -> None:
    with pytest.raises(TooManyDescriptors, match="no descriptor left for tea; close some"), within_limits("tea"):
        raise OSError(24, "EMFILE")
    with pytest.raises(PermissionError), within_limits("tea"):
        raise PermissionError(13, "no")


# -- the reaper ------------------------------------------------------------------------------------------------------


def watching() -> int:
    return len(reaper._reaper.watched)


def test_the_reaper_calls_when_it_is_time_or_there_is_news() -> None:
    seen: list[str] = []
    reader, writer = os.pipe()

    def say(what: str) -> None:
        seen.append(what)

    reaper.watch("a", None, 0.05, lambda: say("late"))
    reaper.watch("b", reader, 100, lambda: say("news"))
    keys = ["c"]
    reaper.watch(keys, None, 100, lambda: say("never"))
    os.write(writer, b"x")
    patiently(lambda: "news" in seen and "late" in seen)
    reaper.forget(keys)
    reaper.forget(keys)
    patiently(lambda: reaper._reaper.thread is None)
    assert sorted(seen) == ["late", "news"] and watching() == 0
    os.close(reader)
    os.close(writer)


def test_the_reaper_calls_again_after_what_it_was_told() -> None:
    seen: list[float] = []

    def call() -> float | None:
        seen.append(time.monotonic())
        return 0.01 if len(seen) < 5 else None

    reaper.watch(seen, None, 0, call)
    patiently(lambda: reaper._reaper.thread is None)
    assert len(seen) == 5


def test_a_failing_call_is_reported_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", reported.append)
    seen: list[str] = []

    def fails() -> None:
        raise RuntimeError("mine")

    one, other = ["one"], ["other"]
    reaper.watch(one, None, 0, fails)
    reaper.watch(other, None, 0.02, lambda: seen.append("other"))
    patiently(lambda: seen and reaper._reaper.thread is None)
    assert [str(one.exc_value) for one in reported] == ["mine"]


def test_a_call_may_watch_again_under_the_same_key() -> None:
    seen: list[str] = []
    key = ["key"]

    def first() -> None:
        seen.append("first")
        reaper.watch(key, None, 0, lambda: seen.append("second"))

    reaper.watch(key, None, 0, first)
    patiently(lambda: reaper._reaper.thread is None)
    assert seen == ["first", "second"]


def test_many_threads_watch_at_once() -> None:
    seen: list[int] = []
    keys = [[at] for at in range(200)]

    def work(part: list[list[int]]) -> None:
        for key in part:
            reaper.watch(key, None, 0.001, lambda key=key: seen.append(key[0]))  # type: ignore[misc]

    threads = [threading.Thread(target=work, args=(keys[at::4],)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    patiently(lambda: len(seen) == 200 and reaper._reaper.thread is None)
    assert sorted(seen) == list(range(200))


def test_a_forked_child_has_no_reaper(peer: Any) -> None:
    other = peer()
    other.run("""
from portway.kernel import reaper
key = []
reaper.watch(key, None, 100, lambda: None)
bell = reaper._reaper.bell
r, w = os.pipe()
child = os.fork()
if child == 0:
    try: os.fstat(bell); gone = b"0"
    except OSError: gone = b"1"
    os.write(w, gone + (b"1" if reaper._reaper.thread is None and not reaper._reaper.watched else b"0"))
    os._exit(0)
os.waitpid(child, 0)
reaper.forget(key)
""")
    assert other.run("os.read(r, 5)") == b"11"


def test_poll_sees_through_a_pidfd(peer: Any) -> None:
    other = peer()
    with Pidfd(other.pid) as handle:
        poll = select.poll()
        poll.register(handle.fileno(), select.POLLIN)
        assert poll.poll(0) == []
        other.kill()
        assert poll.poll(20_000)
