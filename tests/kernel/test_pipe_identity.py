"""Who a peer is, and one thread being it, against processes of other users."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from handoff_peers import Peer, descriptors, patiently

from portway import _accel
from portway.errors import AccessDenied, BadPipe, NotSupported, PipeNotConnected
from portway.kernel import pipe_identity
from portway.kernel.pipe_identity import Identity, identity_of, impersonate, run_as
from portway.kernel.process import start_time

LIBC = ctypes.CDLL(None, use_errno=True)
GET_DUMPABLE, SET_DUMPABLE, SET_PDEATHSIG, GET_PDEATHSIG = 3, 4, 1, 2
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
FIELDS = ("Uid", "Gid", "Groups", "CapEff", "CapPrm", "CapInh", "CapAmb")


def client(uid: int = 4321, gid: int | None = None, groups: tuple[int, ...] = (), pid: int = 1) -> Identity:
    return Identity(pid, uid, uid if gid is None else gid, groups, None)


def status(task: int | None = None) -> dict[str, list[str]]:
    """Identity and capabilities of a thread, as proc shows them."""
    with open(f"/proc/self/task/{threading.get_native_id() if task is None else task}/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    return {name: lines[name].split() for name in FIELDS}


def dumpable() -> int:
    return int(LIBC.prctl(GET_DUMPABLE, 0, 0, 0, 0))


@contextmanager
def connected(tmp_path: Path, peer: Peer) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A listener of ours and the accepted socket of a client that is `peer`; it keeps its end as `end`."""
    path = f"/tmp/portway-identity-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        try:
            os.chmod(path, 0o666)
            listener.listen()
            peer.run("end = socket.socket(socket.AF_UNIX); end.connect(path)", path=path)
        finally:
            os.unlink(path)
        with listener.accept()[0] as accepted:
            yield listener, accepted


@pytest.fixture(autouse=True)
def _unchanged() -> Iterator[None]:
    """Whatever a test does, this thread is then who it was and the process as dumpable."""
    before = status(), dumpable(), os.umask(0o22)
    os.umask(before[2])
    yield
    assert (status(), dumpable()) == before[:2]


@pytest.fixture
def spinner() -> Iterator[int]:
    """The number of another thread, there all the time."""
    stop, started = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: (started.set(), stop.wait()))
    thread.start()
    started.wait()
    assert thread.native_id
    yield thread.native_id
    stop.set()
    thread.join()


@pytest.fixture
def open_folder(tmp_path: Path) -> Iterator[Path]:
    """Where everybody may write and get to."""
    path = Path(f"/tmp/portway-identity-{os.getpid()}.d")
    path.mkdir()
    path.chmod(0o777)
    yield path
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


# -- who it is ---------------------------------------------------------------------------------------------------------


def test_both_ends_of_a_connection(peer: Callable[..., Peer], tmp_path: Path) -> None:
    other = peer()
    with connected(tmp_path, other) as (_, accepted):
        seen = identity_of(accepted.fileno())
        assert seen[:3] == (other.pid, os.geteuid(), os.getegid())
        assert set(seen.groups) == set(os.getgroups())
        assert seen.start_time == start_time(other.pid)
        assert not seen.is_nobody
        code = "from portway.kernel.pipe_identity import identity_of; tuple(identity_of(end.fileno()))"
        theirs = Identity(*other.run(code))
        assert theirs[:3] == (os.getpid(), os.geteuid(), os.getegid())
        assert theirs.start_time == start_time(os.getpid())
        other.run("end.close()")


def test_a_client_of_another_user(peer: Callable[..., Peer], tmp_path: Path) -> None:
    other = peer(4321)
    with connected(tmp_path, other) as (_, accepted):
        seen = identity_of(accepted.fileno())
        assert seen == Identity(other.pid, 4321, 4321, (), start_time(other.pid))
        assert seen.user == "4321" and seen._replace(uid=0).user == "root"
        other.run("end.close()")


@as_root
@pytest.mark.parametrize("count", [1, 3, 400])
def test_supplementary_groups(peer: Callable[..., Peer], tmp_path: Path, count: int) -> None:
    groups = [5000 + number for number in range(count)]
    other = peer()
    other.run("os.setgroups(groups); os.setgid(4322); os.setuid(4321)", groups=groups)
    with connected(tmp_path, other) as (_, accepted):
        assert identity_of(accepted.fileno())[1:4] == (4321, 4322, tuple(groups))


def test_groups_are_those_of_the_connect(peer: Callable[..., Peer], tmp_path: Path) -> None:
    other = peer(0)
    other.run("os.setgroups([7, 8])")
    with connected(tmp_path, other) as (_, accepted):
        other.run("os.setgroups([9]); os.setuid(4321)")
        seen = identity_of(accepted.fileno())
        assert (seen.uid, seen.groups) == (0, (7, 8))
        assert seen.start_time == start_time(other.pid)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
def test_a_pair_is_of_who_made_it(kind: int) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    with ours, theirs:
        assert identity_of(ours.fileno()).pid == os.getpid()


def _without_peerpidfd(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a kernel before 6.5: the option has a number that none knows."""
    monkeypatch.setattr(pipe_identity, "_SO_PEERPIDFD", 12345)


@pytest.mark.parametrize("old", [False, True])
def test_a_process_that_has_gone(
    peer: Callable[..., Peer], tmp_path: Path, old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if old:
        _without_peerpidfd(monkeypatch)
    other = peer()
    with connected(tmp_path, other) as (_, accepted):
        assert identity_of(accepted.fileno()).start_time == start_time(other.pid)
        other.kill()
        assert identity_of(accepted.fileno())[::4] == (other.pid, None)


@pytest.mark.parametrize("old", [False, True])
def test_a_process_not_yet_waited_for_has_gone(old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if old:
        _without_peerpidfd(monkeypatch)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(name := f"\0portway-identity-{os.getpid()}")
        listener.listen()
        code = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({name!r})"
        with subprocess.Popen([sys.executable, "-c", code]) as child, listener.accept()[0] as accepted:
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
            assert identity_of(accepted.fileno())[::4] == (child.pid, None)


@as_root
@pytest.mark.parametrize("old", [False, True])
def test_a_pid_used_again_is_not_the_peer(old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client connects and ends; its number is given to another process by ns_last_pid in a pid namespace."""
    script = f"""
import os, socket
from portway.kernel import pipe_identity
if {old}:
    pipe_identity._SO_PEERPIDFD = 12345
listener = socket.socket(socket.AF_UNIX)
listener.bind("\\0portway-identity-again-{os.getpid()}")
listener.listen()
def child(work, number=0):
    if number:
        open("/proc/sys/kernel/ns_last_pid", "w").write(str(number - 1))
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    return pid
def connect():
    end = socket.socket(socket.AF_UNIX)
    os.setuid(4321)
    end.connect(listener.getsockname())
first = child(connect)
accepted, _ = listener.accept()
os.waitpid(first, 0)
reader, writer = os.pipe()
second = child(lambda: (os.close(writer), os.read(reader, 1)), first)
seen = pipe_identity.identity_of(accepted.fileno())
os.close(writer)
os.waitpid(second, 0)
print(first == second, seen.pid == first, seen.start_time)
"""
    command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", script]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if "unshare" in ran.stderr or "ns_last_pid" in ran.stderr:
        pytest.skip(f"no pid can be chosen here: {ran.stderr.strip()[-100:]}")
    assert ran.stdout.split() == ["True", "True", "None"], ran.stderr


def test_what_has_no_peer(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as alone, socket.socket() as tcp, open(tmp_path / "x", "w") as file:
        for sock in (alone, tcp):
            with pytest.raises(PipeNotConnected, match="has no peer"):
                identity_of(sock.fileno())
        with pytest.raises(BadPipe):
            identity_of(file.fileno())
    with pytest.raises(OSError, match="Bad file descriptor"):
        identity_of(-1)


# -- being it ----------------------------------------------------------------------------------------------------------


@as_root
def test_inside_and_afterwards(spinner: int, open_folder: Path) -> None:
    secret = open_folder / "secret"
    secret.write_text("x")
    secret.chmod(0o600)
    shared = open_folder / "shared"
    shared.write_text("y")
    os.chown(shared, 0, 5001)
    shared.chmod(0o640)
    before, other = status(), status(spinner)
    LIBC.prctl(SET_PDEATHSIG, signal.SIGUSR2, 0, 0, 0)
    who = client(4321, 4322, (5000, 5001))
    with impersonate(who) as seen:
        assert seen is who
        (made := open_folder / "made").write_text("z")
        with pytest.raises(PermissionError):
            secret.read_text()
        with pytest.raises(PermissionError):
            os.chown(made, 0, 0)
        assert shared.read_text() == "y"
        assert not os.access(secret, os.R_OK, effective_ids=True)
        uids, gids, groups = _accel.identity.thread_identity()
        assert uids == (0, 4321, 0) and gids == (0, 4322, 0) and groups == (5000, 5001)
        assert dumpable() != 1
    assert (made.stat().st_uid, made.stat().st_gid) == (4321, 4322)
    assert status() == before and status(spinner) == other
    death = ctypes.c_int()
    LIBC.prctl(GET_PDEATHSIG, ctypes.byref(death), 0, 0, 0)
    LIBC.prctl(SET_PDEATHSIG, 0, 0, 0, 0)
    assert death.value == signal.SIGUSR2
    assert secret.read_text() == "x"


@as_root
def test_other_threads_stay_who_they_are(spinner: int) -> None:
    before, ready, leave = status(), threading.Event(), threading.Event()
    inside: list[int] = []

    def work() -> None:
        with impersonate(client(4321, 4322, (5000,))):
            inside.append(threading.get_native_id())
            ready.set()
            leave.wait()

    thread = threading.Thread(target=work)
    thread.start()
    assert ready.wait(20)
    try:
        for task in os.listdir("/proc/self/task"):
            with suppress(FileNotFoundError):
                seen = status(int(task))
                if int(task) == inside[0]:
                    assert seen["Uid"] == ["0", "4321", "0", "4321"] and seen["Gid"] == ["0", "4322", "0", "4322"]
                    assert seen["Groups"] == ["5000"] and int(seen["CapEff"][0], 16) == 0
                else:
                    assert seen == before
        assert spinner in map(int, os.listdir("/proc/self/task"))
    finally:
        leave.set()
        thread.join()


@as_root
def test_the_client_cannot_signal_us_meanwhile(peer: Callable[..., Peer]) -> None:
    other = peer(4321)
    with impersonate(client(4321)):
        for number in (os.getpid(), threading.get_native_id()):
            with pytest.raises(PermissionError):
                other.run("os.kill(number, 0)", number=number)


@as_root
def test_an_exception_inside() -> None:
    before = status()
    with pytest.raises(KeyError, match="mine"), impersonate(client()):
        raise KeyError("mine")
    assert status() == before and dumpable() == 1


@as_root
def test_signals_meanwhile_leave_nothing_behind() -> None:
    """KeyboardInterrupt out of a handler at any instant: this thread is itself again."""
    before, hits = status(), 0

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(2000):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.00003)
                for _ in range(50):
                    with impersonate(client()):
                        pass
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                hits += 1
            assert _accel.identity.thread_identity()[0] == (0, 0, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert hits and status() == before and dumpable() == 1


@as_root
def test_nested_is_refused() -> None:
    with impersonate(client()):
        with pytest.raises(NotSupported, match="impersonates somebody already"), impersonate(client(4322)):
            pass
        assert _accel.identity.thread_identity()[0][1] == 4321
    block = impersonate(client())
    for _ in range(2):  # one after the other is fine, with the same object too
        with block:
            pass
    with pytest.raises(NotSupported, match="not in this block"):
        block.__exit__(None, None, None)


@as_root
def test_one_block_is_of_one_thread() -> None:
    block = impersonate(client())

    def enter() -> None:
        with block:
            pass

    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()  # its thread is there before
        with block:
            with pytest.raises(NotSupported, match="another thread"):
                pool.submit(enter).result()
            with pytest.raises(NotSupported, match="not in this block"):
                pool.submit(block.__exit__, None, None, None).result()


@as_root
def test_twenty_clients_at_once(open_folder: Path) -> None:
    barrier, before = threading.Barrier(20, timeout=30), status()

    def work(number: int) -> set[Any]:
        seen = set()
        for turn in range(20):
            with impersonate(client(5000 + number, 6000 + number, (7000 + number,))):
                barrier.wait()
                seen.add(_accel.identity.thread_identity())
                (open_folder / f"{number}.{turn}").touch()
                barrier.wait()
            assert _accel.identity.thread_identity()[0] == (0, 0, 0)
        return seen

    with ThreadPoolExecutor(20) as pool:
        for number, seen in enumerate(pool.map(work, range(20))):
            assert seen == {((0, 5000 + number, 0), (0, 6000 + number, 0), (7000 + number,))}
    for file in open_folder.iterdir():
        number = int(file.name.partition(".")[0])
        assert (file.stat().st_uid, file.stat().st_gid) == (5000 + number, 6000 + number)
    assert status() == before and dumpable() == 1


@as_root
def test_what_was_not_dumpable_stays_so() -> None:
    LIBC.prctl(SET_DUMPABLE, 0, 0, 0, 0)
    try:
        with impersonate(client()):
            pass
        assert dumpable() == 0
    finally:
        LIBC.prctl(SET_DUMPABLE, 1, 0, 0, 0)


@as_root
def test_a_thread_started_inside_keeps_the_identity() -> None:
    """What the documentation warns of."""
    leave, seen = threading.Event(), []
    thread = threading.Thread(target=lambda: (leave.wait(), seen.append(_accel.identity.thread_identity()[0][1])))
    with impersonate(client()):
        thread.start()
    leave.set()
    thread.join()
    assert seen == [4321]


@as_root
def test_a_program_started_inside_has_our_real_uid() -> None:
    """What the documentation warns of."""
    with impersonate(client()):
        ran = subprocess.run(["id"], capture_output=True, text=True)
    assert ran.stdout.startswith("uid=0(root) gid=0(root) euid=4321")


@as_root
def test_a_fork_while_another_thread_is_inside() -> None:
    """The child has not that thread: it is dumpable again, and can enter."""
    ready, leave = threading.Event(), threading.Event()

    def work() -> None:
        with impersonate(client()):
            ready.set()
            leave.wait()

    thread = threading.Thread(target=work)
    thread.start()
    assert ready.wait(20)
    pid = os.fork()
    if pid == 0:
        good = False
        with suppress(BaseException):
            good = dumpable() == 1
            with impersonate(client()):
                good = good and dumpable() != 1
            good = good and dumpable() == 1
        os._exit(0 if good else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert dumpable() != 1
    leave.set()
    thread.join()
    assert dumpable() == 1


@as_root
def test_a_fork_inside_goes_back_in_both(peer: Callable[..., Peer]) -> None:
    code = """
from portway import _accel
from portway.kernel.pipe_identity import Identity, impersonate
libc = ctypes.CDLL(None)
with impersonate(Identity(1, 4321, 4321, (), None)):
    pid = os.fork()
if pid == 0:
    try:
        good = _accel.identity.thread_identity()[0] == (0, 0, 0) and libc.prctl(3, 0, 0, 0, 0) == 1
    finally:
        os._exit(0 if good else 1)
os.waitpid(pid, 0)[1], _accel.identity.thread_identity()[0]
"""
    assert peer().run(code) == (0, (0, 0, 0))


@as_root
def test_no_way_back_aborts() -> None:
    """The saved uid is thrown away inside; root's rights cannot be had back."""
    code = """
import ctypes, resource, portway
from portway.kernel.pipe_identity import Identity, impersonate
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
with impersonate(Identity(1, 4321, 4321, (), None)):
    assert ctypes.CDLL(None).setresuid(4321, 4321, 4321) == 0
print("still here")
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.returncode == -signal.SIGABRT and ran.stdout == ""
    assert "cannot go back to uid 0: setresuid: Operation not permitted" in ran.stderr


# -- who may not, and where not ----------------------------------------------------------------------------------------


ATTEMPT = """
from portway.kernel.pipe_identity import Identity, impersonate
def attempt(uid, gid, groups=()):
    with impersonate(Identity(1, uid, gid, groups, None)):
        return os.geteuid()
"""


def test_without_the_right(peer: Callable[..., Peer]) -> None:
    other = peer(0)
    other.run(ATTEMPT)
    other.run("os.setgroups([7, 8]); os.setgid(4321); os.setuid(4321)")
    assert other.run("attempt(4321, 4321, (8, 7))") == 4321
    with pytest.raises(AccessDenied, match="4322 from uid 4321 this process needs CAP_SETUID and CAP_SETGID; the"):
        other.run("attempt(4322, 4321, (7, 8))")
    with pytest.raises(AccessDenied, match=r"with groups \[7, 4321\] instead of \[7, 8, 4321\]"):
        other.run("attempt(4321, 4321, (7,))")
    with pytest.raises(AccessDenied, match="CAP_SETGID"):
        other.run("attempt(4321, 8, (7, 4321))")


def test_half_of_the_right_is_not_enough(peer: Callable[..., Peer]) -> None:
    other = peer(0)
    other.run(ATTEMPT)
    drop = """
import struct
libc, caps = ctypes.CDLL(None), 1 << 7  # CAP_SETUID only
libc.syscall(126, struct.pack("Ii", 0x20080522, 0), struct.pack("6I", caps, caps, 0, 0, 0, 0))
"""
    if os.uname().machine != "x86_64":
        pytest.skip("capset has another number here")
    assert other.run(drop) == 0
    with pytest.raises(AccessDenied, match="needs CAP_SETGID;"):
        other.run("attempt(4321, 4321)")


def test_capabilities_of_a_user_that_is_not_root_are_put_aside(peer: Callable[..., Peer]) -> None:
    """The kernel takes them away only from uid 0."""
    other = peer(0)
    if os.uname().machine != "x86_64":
        pytest.skip("capset has another number here")
    code = """
import struct
from portway.kernel.pipe_identity import Identity, impersonate
libc, caps = ctypes.CDLL(None), 1 << 7 | 1 << 6 | 1 << 1  # setuid, setgid, dac_override
libc.prctl(8, 1, 0, 0, 0)  # keep them
os.setgroups([]); os.setresgid(4000, 4000, 4000); os.setresuid(4000, 4000, 4000)
libc.syscall(126, struct.pack("Ii", 0x20080522, 0), struct.pack("6I", caps, caps, 0, 0, 0, 0))
def look():
    lines = dict(line.split(":", 1) for line in file().splitlines())
    return [lines[name].split() for name in ("Uid", "CapEff")]
def file():
    os.lseek(fd, 0, 0)
    return os.read(fd, 10000).decode()
fd = os.open(f"/proc/self/task/{threading.get_native_id()}/status", os.O_RDONLY)
seen = [look()]
with impersonate(Identity(1, 4321, 4321, (5,), None)):
    seen.append(look())
seen.append(look())
os.close(fd)
seen
"""
    before, inside, after = other.run(code)
    assert before == after == [["4000"] * 4, ["00000000000000c2"]]
    assert inside == [["4000", "4321", "4000", "4321"], ["0000000000000000"]]


def test_nobody_is_refused() -> None:
    who = client(65534)
    assert who.is_nobody and client(0xFFFFFFFF).is_nobody
    with pytest.raises(AccessDenied, match="unknown in this user namespace"), impersonate(who):
        pass


def test_a_user_outside_of_our_user_namespace_is_nobody(peer: Callable[..., Peer]) -> None:
    """The server is root in a namespace that maps only itself; whoever connects from outside has no name there."""
    other = peer(4321 if os.geteuid() == 0 else None)
    code = """
from portway.kernel.pipe_identity import identity_of, impersonate
uid, gid, libc = os.geteuid(), os.getegid(), ctypes.CDLL(None)
libc.prctl(4, 1, 0, 0, 0)  # dumpable, or the files in proc are root's
entered = libc.unshare(0x10000000)  # CLONE_NEWUSER
if entered == 0:
    for file, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{file}", "w") as proc:
            proc.write(text)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"\\0portway-identity-outside-{os.getpid()}")
    listener.listen()
entered, os.geteuid()
"""
    if other.run(code) != (0, 0):
        pytest.skip("no user namespace to be had")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(f"\0portway-identity-outside-{other.pid}")
        started = other.run("end = listener.accept()[0]; seen = identity_of(end.fileno()); seen.start_time")
        assert started == start_time(os.getpid())
        if os.geteuid() == 0:  # else we are the one uid that has a name there
            assert other.run("seen.is_nobody, seen.uid") == (True, 65534)
            with pytest.raises(AccessDenied, match="65534 stands for users unknown"):
                other.run("with impersonate(seen): pass")
    with pytest.raises(AccessDenied, match=r"setgroups for uid 7.*forbids it"):
        other.run("with impersonate(seen._replace(uid=7, gid=7, groups=())): pass")
    other.run("listener.close(); end.close()")


@as_root
def test_refused_on_the_thread_of_a_loop() -> None:
    async def main() -> None:
        with pytest.raises(NotSupported, match="run_as"), impersonate(client()):
            pass
        await asyncio.to_thread(allowed)

    def allowed() -> None:
        with impersonate(client()):
            assert _accel.identity.thread_identity()[0][1] == 4321

    asyncio.run(main())


@as_root
def test_run_as(spinner: int, open_folder: Path) -> None:
    def make(path: Path, text: str) -> tuple[str, int]:
        path.write_text(text)
        return threading.current_thread().name, _accel.identity.thread_identity()[0][1]

    def fail() -> None:
        raise StopIteration if _accel.identity.thread_identity()[0][1] == 4321 else AssertionError

    def exit_() -> None:
        raise SystemExit(3)

    async def main() -> None:
        name, uid = await run_as(client(), make, open_folder / "made", "hello")
        assert uid == 4321 and name == "portway run_as uid 4321"
        info = (open_folder / "made").stat()
        assert (info.st_uid, stat.S_IMODE(info.st_mode) & 0o700) == (4321, 0o600)
        with pytest.raises(PermissionError):
            await run_as(client(), os.listdir, "/root")
        with pytest.raises(RuntimeError, match="StopIteration"):
            await run_as(client(), fail)
        with pytest.raises(AccessDenied):
            await run_as(client(65534), int)
        seen = await asyncio.gather(*(run_as(client(5000 + n), _accel.identity.thread_identity) for n in range(20)))
        assert [one[0][1] for one in seen] == [5000 + n for n in range(20)]
        entered, leave = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()
        task = asyncio.create_task(
            run_as(client(), lambda: (loop.call_soon_threadsafe(entered.set), leave.wait()))
        )
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        leave.set()

    asyncio.run(main())
    patiently(lambda: not [one for one in threading.enumerate() if one.name.startswith("portway run_as")])


def test_descriptors_stay(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        before = descriptors()
        for _ in range(50):
            identity_of(ours.fileno())
        assert descriptors() == before
