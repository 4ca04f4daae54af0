"""By process id: taken once, released in time, and every wrong record is one clear error."""

from __future__ import annotations

import os
import socket
import struct
import time
from typing import Any

import pytest
from handoff_peers import descriptors, patiently, running

import portway
from portway import SocketInformation
from portway.errors import (
    InformationExpired,
    InformationUsed,
    InvalidInformation,
    OperationTimeout,
    PortwayError,
    ProcessNotFound,
    SourceGone,
    TooManyDescriptors,
    WrongProcess,
)
from portway.kernel import offer as offers
from portway.kernel.process import start_time
from portway.wire import handoff as wire

TAKE = """
def take(text):
    try:
        with portway.socket_from(text) as sock: sock.send(b"!")
        return "won"
    except errors.InformationUsed:
        return "used"
"""


def changed(info: SocketInformation, **fields: Any) -> SocketInformation:
    """The record with other fields in its head: what a forger would write."""
    head = info.head._replace(**fields)
    return SocketInformation(wire._HEAD.pack(*head) + bytes(info)[96:])


@pytest.fixture
def pair() -> Any:
    ours, theirs = socket.socketpair()
    ours.settimeout(20)
    yield ours, theirs
    ours.close()
    theirs.close()


def test_taken_once_by_many_threads_at_once(peer: Any) -> None:
    """Hundreds of rounds, eight takers each: the kernel lets exactly one dequeue."""
    source, target = peer(), peer()
    source.run("a, b = socket.socketpair()")
    target.run(TAKE + """
from concurrent.futures import ThreadPoolExecutor
pool = ThreadPoolExecutor(8)
def round(text):
    gate = threading.Barrier(8)
    def one(_):
        gate.wait(10)
        return take(text)
    return sorted(pool.map(one, range(8)))
""")
    for _ in range(300):
        info = source.run("portway.duplicate_socket(b, pid)", pid=target.pid)
        assert target.run("round(text)", text=info.to_text()) == ["used"] * 7 + ["won"]
        assert source.run("a.recv(10)") == b"!"
    target.run("pool.shutdown()")
    source.run("patiently(lambda: not offer._offers)")


def test_a_claim_ends_the_offer(peer: Any) -> None:
    source, target = peer(), peer()
    source.run("a, b = socket.socketpair()")
    before, theirs = source.descriptors(), target.descriptors()
    for _ in range(20):
        info = source.run("portway.duplicate_socket(b, pid)", pid=target.pid)
        assert len(source.descriptors()) > len(before)
        target.run("portway.socket_from(info).close()", info=info)
        source.run("portway.wait_claimed(info, 10)", info=info)
    patiently(lambda: source.descriptors() == before)
    assert target.descriptors() == theirs


def test_several_offers_live_side_by_side(peer: Any) -> None:
    source, target = peer(), peer()
    source.run("pairs = [socket.socketpair() for _ in range(40)]")
    infos = source.run("[portway.duplicate_socket(b, pid) for a, b in pairs]", pid=target.pid)
    for at in reversed(range(40)):
        target.run("with portway.socket_from(info) as s: s.send(b'%d' % at)", info=infos[at], at=at)
    assert source.run("[int(a.recv(9)) for a, b in pairs]") == list(range(40))


def test_after_the_source_it_is_gone(peer: Any, pair: Any) -> None:
    source, target = peer(), peer()
    source.give(sock=pair[1])
    info = source.run("portway.duplicate_socket(sock, pid)", pid=target.pid)
    source.kill()
    with pytest.raises(SourceGone, match=f"pid {source.pid}, ended"):
        target.run("portway.socket_from(info)", info=info)
    assert pair[0].recv(5) == b""


def test_a_source_that_is_a_zombie_is_gone(pair: Any, peer: Any) -> None:
    source = peer()
    code = """
child = os.fork()
if child == 0:
    os.write(w, portway.duplicate_socket(sock, pid).to_text().encode())
    os._exit(0)
"""
    source.give(sock=pair[1])
    source.run("r, w = os.pipe()\n" + code + "text = os.read(r, 4096).decode()", pid=os.getpid())
    zombie = source.run("child")
    patiently(lambda: os.path.exists(f"/proc/{zombie}") and not running(zombie))
    with pytest.raises(SourceGone):
        portway.socket_from(source.run("text"))


def test_it_expires_and_is_released(pair: Any, peer: Any) -> None:
    source, target = peer(), peer()
    source.give(sock=pair[1])
    before = len(source.descriptors())
    info = source.run("info = portway.duplicate_and_close(sock, pid, expires=0.2)", pid=target.pid)
    info = source.run("info")
    assert pair[0].recv(5) == b""  # nobody has it any more
    with pytest.raises(InformationExpired, match=f"pid {source.pid} has expired"):
        target.run("portway.socket_from(info)", info=info)
    patiently(lambda: len(source.descriptors()) < before)
    with pytest.raises(InformationExpired):
        source.run("portway.wait_claimed(info, 5)")


def test_waiting_for_the_claim(pair: Any, peer: Any) -> None:
    target = peer()
    info = portway.duplicate_socket(pair[1], target.pid)
    with pytest.raises(OperationTimeout, match=f"pid {target.pid} to claim"):
        portway.wait_claimed(info, 0.01)
    target.start("portway.socket_from(info)", info=info)
    portway.wait_claimed(info, 10)
    portway.wait_claimed(info, 0)
    with pytest.raises(ValueError, match="made by pid"):
        portway.wait_claimed(changed(info, source_pid=1))
    soon = portway.duplicate_socket(pair[1], target.pid, expires=0.1)
    with pytest.raises(InformationExpired):
        portway.wait_claimed(soon, 10)
    with pytest.raises(InformationExpired):  # also when it is asked late
        portway.wait_claimed(soon, 10)


# -- wrong records ---------------------------------------------------------------------------------------------------


def test_records_that_were_changed_in_any_byte_are_refused(pair: Any) -> None:
    info = portway.duplicate_socket(pair[1], os.getpid())
    raw = bytes(info)
    for at in range(len(raw)):
        other = bytearray(raw)
        other[at] ^= 1
        with pytest.raises(PortwayError):
            portway.socket_from(bytes(other))
    for size in range(len(raw)):
        with pytest.raises(InvalidInformation):
            portway.socket_from(raw[:size])
    portway.socket_from(raw).close()  # none of it has used the record up


@pytest.mark.parametrize("way", ["pid", "message"])
def test_forged_fields(way: Any, pair: Any) -> None:
    forged: list[tuple[dict[str, Any], type[PortwayError]]] = [
        ({"expires_ns": time.monotonic_ns() + 10**15}, InvalidInformation),
        ({"expires_ns": time.monotonic_ns() - 1}, InformationExpired),
        ({"expires_ns": -(2**63)}, InformationExpired),
        ({"flags": 2 | 4 | (16 if way == "pid" else 0)}, InvalidInformation),
        ({"target_pid": 1}, WrongProcess),
        ({"target_start": 5}, WrongProcess),
        ({"family": 2}, InvalidInformation),
        ({"descriptors": 1}, InvalidInformation),
    ]
    if way == "pid":
        forged += [
            ({"source_start": 5}, SourceGone),
            ({"source_fd": -1}, InformationUsed),
            ({"source_fd": 0}, InformationUsed),
            ({"source_fd": 10**6}, InformationUsed),
            ({"source_fd": pair[1].fileno()}, InformationUsed),
            ({"nonce": bytes(16)}, InvalidInformation),
            ({"source_pid": 4_000_000}, SourceGone),
        ]
    else:
        forged += [({"nonce": bytes(16)}, InformationUsed), ({"flags": 2 | 32}, InvalidInformation)]
    with portway.HandoffInbox():
        info = portway.duplicate_socket(pair[1], os.getpid(), way=way)
        for fields, error in forged:
            with pytest.raises(error):
                portway.socket_from(changed(info, **fields))
        portway.socket_from(info).close()


def test_a_used_number_may_be_anothers_by_now(pair: Any, peer: Any) -> None:
    """The first record names a descriptor that the next offer has got."""
    source, target = peer(), peer()
    source.give(sock=pair[1])
    first = source.run("portway.duplicate_socket(sock, pid)", pid=target.pid)
    target.run("portway.socket_from(info).close()", info=first)
    source.run("patiently(lambda: not offer._offers)")
    second = source.run("portway.duplicate_socket(sock, pid)")
    assert first.head.source_fd == second.head.source_fd
    with pytest.raises((InvalidInformation, InformationUsed)):
        target.run("portway.socket_from(info)", info=first)
    target.run("portway.socket_from(info).send(b'second')", info=second)
    assert pair[0].recv(9) == b"second"


@pytest.mark.parametrize("there", ["os.memfd_create('x')", "socket.socket().detach()", "os.pipe()[0]", "select.epoll()",
                                   "socket.socketpair()[0].detach()",
                                   "socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)[0].detach()"])  # fmt: skip
def test_a_number_that_leads_to_something_else(there: str, pair: Any, peer: Any) -> None:
    source = peer()
    source.run(f"it = {there}\nn = it if isinstance(it, int) else it.fileno()")
    info = portway.duplicate_socket(pair[1], os.getpid())
    forged = changed(info, source_pid=source.pid, source_start=start_time(source.pid), source_fd=source.run("n"))
    with pytest.raises(InformationUsed):
        portway.socket_from(forged)
    portway.socket_from(info).close()


def test_a_record_for_another_process(pair: Any, peer: Any) -> None:
    one, other = peer(), peer()
    info = portway.duplicate_socket(pair[1], one.pid)
    with pytest.raises(WrongProcess, match=f"for pid {one.pid}, .* this is pid {other.pid}"):
        other.run("portway.socket_from(info)", info=info)
    with pytest.raises(WrongProcess):
        portway.socket_from(info)
    one.run("portway.socket_from(info).send(b'mine')", info=info)
    assert pair[0].recv(9) == b"mine"
    portway.wait_claimed(info, 10)


def test_processes_that_are_not_there(pair: Any, peer: Any) -> None:
    dead = peer()
    dead.kill()
    for pid in (dead.pid, 0, -1, -5, 2**22 + 1, 2**31, 2**40):
        for way in ("auto", "pid", "message"):
            with pytest.raises(ProcessNotFound, match=str(pid)):
                portway.duplicate_socket(pair[1], pid, way=way)  # type: ignore[arg-type]
        with pytest.raises(ProcessNotFound):
            portway.HandoffSession(pid)


def test_a_thread_is_no_process(pair: Any, peer: Any) -> None:
    target = peer()
    target.run("gate = threading.Event()\nt = threading.Thread(target=gate.wait, daemon=True)\nt.start()")
    tid = target.run("t.native_id")
    for way in ("auto", "pid", "message"):
        with pytest.raises(ProcessNotFound, match=f"thread of process {target.pid}"):
            portway.duplicate_socket(pair[1], tid, way=way)  # type: ignore[arg-type]
    with pytest.raises(ProcessNotFound, match="thread"):
        portway.HandoffSession(tid)


def test_a_pid_that_is_another_process_by_now(pair: Any, peer: Any) -> None:
    target = peer()
    right = start_time(target.pid)
    for way in ("auto", "pid", "message"):
        with pytest.raises(ProcessNotFound, match="another process by now"):
            portway.duplicate_socket(pair[1], target.pid, way=way, start_time=right - 1)  # type: ignore[arg-type]
    info = portway.duplicate_socket(pair[1], target.pid, start_time=right)
    target.run("s = portway.socket_from(info)", info=info)
    portway.wait_claimed(info, 10)


def next_pid(pid: int) -> bool:
    """Asks the kernel to use `pid` next; False where it does not let us."""
    try:
        with open("/proc/sys/kernel/ns_last_pid", "w") as file:
            file.write(str(pid - 1))
        return True
    except OSError:
        return False


def test_a_pid_that_is_really_used_again(pair: Any, peer: Any) -> None:
    """The source dies, and a process of the same number starts; then the same with the target."""
    source, target = peer(), peer()
    source.give(sock=pair[1])
    info = source.run("portway.duplicate_socket(sock, pid)", pid=target.pid)
    source.kill()
    tick = os.sysconf("SC_CLK_TCK")
    patiently(lambda: time.clock_gettime(time.CLOCK_BOOTTIME) * tick > info.head.source_start + 2)
    for _ in range(50):  # others may start processes, too
        if not next_pid(source.pid):
            pytest.skip("/proc/sys/kernel/ns_last_pid cannot be written here")
        again = peer()
        if again.pid == source.pid:
            break
    else:
        pytest.skip("others took the number each time")
    assert start_time(again.pid) != info.head.source_start
    with pytest.raises(SourceGone, match="ended before"):
        target.run("portway.socket_from(info)", info=info)
    mine = changed(info, target_pid=again.pid)
    with pytest.raises(WrongProcess):
        again.run("portway.socket_from(info)", info=mine)


# -- limits ----------------------------------------------------------------------------------------------------------


def test_a_target_without_room_can_claim_later(pair: Any, peer: Any) -> None:
    source, target = peer(), peer()
    source.give(sock=pair[1])
    info = source.run("portway.duplicate_socket(sock, pid)", pid=target.pid)
    target.run("limit = resource.getrlimit(resource.RLIMIT_NOFILE)")
    used = len(target.descriptors())
    for room in range(2):
        target.run(f"resource.setrlimit(resource.RLIMIT_NOFILE, ({used + room}, limit[1]))")
        before = target.descriptors()
        with pytest.raises(TooManyDescriptors):
            target.run("portway.socket_from(info)", info=info)
        assert target.descriptors() == before
    target.run("resource.setrlimit(resource.RLIMIT_NOFILE, limit)\nportway.socket_from(info).send(b'now')")
    assert pair[0].recv(5) == b"now"


def test_a_source_without_room_keeps_all(pair: Any, peer: Any) -> None:
    source, target = peer(), peer()
    source.give(sock=pair[1])
    target.run("box = portway.HandoffInbox()")
    used = len(source.descriptors())
    source.run("limit = resource.getrlimit(resource.RLIMIT_NOFILE)")
    for way in ("pid", "message"):
        for room in range(2):
            source.run(f"resource.setrlimit(resource.RLIMIT_NOFILE, ({used + room}, limit[1]))")
            before = source.descriptors()
            with pytest.raises(TooManyDescriptors):
                source.run("portway.duplicate_and_close(sock, pid, way=way)", pid=target.pid, way=way)
            assert source.descriptors() == before
            source.run("resource.setrlimit(resource.RLIMIT_NOFILE, limit)\nsock.send(b'mine')")
            assert pair[0].recv(9) == b"mine"


def test_what_is_remembered_of_expired_offers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offers, "_REMEMBERED", 3)
    for _ in range(10):
        one = offers.Offer()
        one.nonce = os.urandom(16)
        one.withdraw()
        one = offers.Offer()
        one.nonce = struct.pack("<16s", b"x")
        one.taken = True
        one.withdraw()
    assert len(offers._lapsed) <= 3


# -- other children --------------------------------------------------------------------------------------------------


def test_forked_children_hold_no_offer_no_session_and_no_inbox(pair: Any, peer: Any) -> None:
    source, target = peer(), peer()
    source.give(sock=pair[1])
    target.run("box = portway.HandoffInbox()")
    info = source.run("session = portway.HandoffSession(pid)\nportway.duplicate_socket(sock, pid, way='pid')",
                      pid=target.pid)  # fmt: skip
    target.run("sess = portway.HandoffSession(os.getpid())\nsess.send(socket.socket())\nbox._pump()")
    ours = source.run("""
(o,) = offer._offers.values()
[x.fileno() for x in (o.line, o.queue, session._line, session._process)]
""")
    theirs = target.run("""
lines = [y.sock for y in box._lines.values()]
[x.fileno() for x in (box._listener, box._ready, sess._line, sess._process, *lines)] + [box._bell, box._queue[0][2][0]]
""")
    for one, numbers in ((source, ours), (target, theirs)):
        assert len(set(numbers)) == len(numbers) >= 4
        child = one.run("r, w = os.pipe()\nchild = os.fork()\nif child == 0: os.close(w), os.read(r, 1), os._exit(0)")
        child = one.run("child")
        held = {what for number, what in one.descriptors().items() if number in numbers and "anon" not in what}
        patiently(lambda: not held & set(descriptors(child).values()))  # noqa: B023
        there = descriptors(child)
        assert not any("event" in what or "pidfd" in what for what in there.values()), there
    source.run("sock.close()\nsession.close()")
    target.run("portway.socket_from(info).close()\nbox.close()", info=info)
    for one in (source, target):
        one.run("os.write(w, b'x')\nos.waitpid(child, 0)")


def test_a_child_forked_while_another_thread_receives_can_close(peer: Any) -> None:
    target = peer()
    target.run("""
box = portway.HandoffInbox()
session = portway.HandoffSession(os.getpid())
box._lock.acquire(); session._lock.acquire()
def child():
    box.close(); session.close()
    try: portway.HandoffInbox().close()
    except BaseException: os._exit(1)
    os._exit(0)
def forks(seen):
    pid = os.fork()
    if pid == 0: child()
    seen.append(os.waitpid(pid, 0)[1])
seen = []
thread = threading.Thread(target=forks, args=(seen,))  # it does not own the locks
thread.start(); thread.join(20)
""")
    assert target.run("seen") == [0]


@pytest.mark.parametrize("way", ["pid", "message"])
def test_executed_children_inherit_nothing(way: str, pair: Any, peer: Any) -> None:
    source, target = peer(), peer()
    source.give(sock=pair[1])
    target.run("box = portway.HandoffInbox()")
    info = source.run("session = portway.HandoffSession(pid)\nportway.duplicate_socket(sock, pid, way=way)",
                      pid=target.pid, way=way)  # fmt: skip
    target.run("got = portway.socket_from(info)", info=info)
    count = """
import subprocess
subprocess.run([sys.executable, "-c", "import os; print(len(os.listdir('/proc/self/fd')))"], close_fds=False,
               capture_output=True, text=True).stdout
"""
    for one in (source, target):
        assert one.run(count) == "4\n"  # 0, 1, 2 and the folder
        inheritable = [n for n in one.descriptors() if n > 2 and one.run(f"os.get_inheritable({n})")]
        assert not inheritable
