"""`portway.DotnetMutex` against real .NET: exclusion, abandonment both ways, refusal of what is not .NET's."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from talk import Failed, Talker, until

pytest.importorskip("portway._native.dotnet")
from portway import errors
from portway.kernel.dotnet_mutex import DotnetMutex

NETPEER = os.environ.get("PORTWAY_NETPEER") or str(Path(__file__).parents[3] / "shared/peers/netpeer")
netpeer = [
    pytest.mark.netpeer,
    pytest.mark.skipif(not os.access(NETPEER, os.X_OK), reason="netpeer is missing: set PORTWAY_NETPEER"),
]
MUTEX = "from portway.kernel.dotnet_mutex import DotnetMutex; m = DotnetMutex({!r}, **{!r})"
FREE = struct.pack("<BB6xIIIII20xIIQ?", 0, 1, 0, 0, 0, 0, 0x91, 2**32 - 1, 0, 2**64 - 1, False)
HERE = "Global\\portway-test-" + str(os.getpid())


def net(*words: str) -> subprocess.CompletedProcess[str]:
    command = [NETPEER, "mem", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)


@contextlib.contextmanager
def net_holding(*words: str) -> Iterator[subprocess.Popen[str]]:
    """A .NET process that has said "held"; released by quit()."""
    with subprocess.Popen([NETPEER, "mem", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as peer:
        try:
            assert peer.stdout is not None
            for line in peer.stdout:
                if '"held"' in line:
                    break
            yield peer
        finally:
            peer.kill()


@pytest.fixture
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    name = f"{HERE}-{request.node.name[:60].replace('/', '').replace(chr(92), '')}"
    yield name
    with contextlib.suppress(OSError):
        os.unlink(f"/tmp/.dotnet/shm/global/{name[7:]}")


@pytest.fixture
def mutex(name: str) -> Iterator[DotnetMutex]:
    with contextlib.closing(DotnetMutex(name)) as mutex:
        yield mutex


def took(mutex: DotnetMutex, timeout: float) -> bool:
    """Acquires; whether it was abandoned."""
    assert mutex.acquire(timeout) is True
    return mutex.abandoned


def peer_with(name: str, **options: object) -> Talker:
    peer = Talker()
    peer.do(MUTEX.format(name, options))
    return peer


class TestWithDotnet:
    pytestmark = netpeer

    def test_held_by_dotnet(self, mutex: DotnetMutex, name: str) -> None:
        with net_holding("mutex-hold", name) as peer:
            assert mutex.already_exists is False  # ours was first
            with pytest.raises(errors.OperationTimeout):
                mutex.acquire(0)
            with pytest.raises(errors.OperationTimeout, match=r"timed out after 0\.05 s"):
                mutex.acquire(0.05)
            with pytest.raises(errors.NotOwner):
                mutex.release()
            peer.stdin.write("quit\n")  # type: ignore[union-attr]
            peer.stdin.flush()  # type: ignore[union-attr]
            assert took(mutex, 10) is False

    def test_held_by_us(self, mutex: DotnetMutex, name: str) -> None:
        mutex.acquire()
        mutex.acquire()
        assert net("mutex-try", name, "50").returncode == 3
        mutex.release()
        with mutex as same:
            assert same is mutex
        assert net("mutex-try", name, "0").returncode == 3
        mutex.release()
        assert net("mutex-try", name, "0").returncode == 0

    def test_dotnet_made_it(self, name: str) -> None:
        with net_holding("mutex-hold", name), contextlib.closing(DotnetMutex(name, initially_owned=True)) as mutex:
            assert mutex.already_exists
            assert mutex.depth == 0
            content = Path(mutex.path).read_bytes()
            assert len(content) == 4096
            assert content[:2] == FREE[:2]

    def test_our_bytes_are_dotnets(self, name: str) -> None:
        with contextlib.closing(DotnetMutex(name)) as mutex:
            ours = Path(mutex.path).read_bytes()
            assert os.stat(mutex.path).st_mode & 0o7777 == 0o666
        with net_holding("mutex-hold", name) as peer:
            peer.stdin.write("quit\n")  # type: ignore[union-attr]
            peer.stdin.flush()  # type: ignore[union-attr]
            with contextlib.closing(DotnetMutex(name)) as mutex:
                mutex.acquire(10)
                mutex.release()
                theirs = Path(mutex.path).read_bytes()
        assert ours[:2] + ours[8:] == FREE[:2] + FREE[8:] + bytes(4096 - len(FREE))
        assert theirs[24:28] == ours[24:28] and theirs[48:] == ours[48:]  # kind, owner, abandoned

    def test_abandoned_by_dotnet(self, mutex: DotnetMutex, name: str) -> None:
        assert net("mutex-abandon", name).returncode == -signal.SIGKILL
        assert took(mutex, 5) is True
        mutex.release()
        assert took(mutex, 5) is False  # told once

    def test_dotnet_killed_while_we_wait(self, mutex: DotnetMutex, name: str) -> None:
        with net_holding("mutex-hold", name) as holder, peer_with(name) as waiter:
            waiter.start("[m.acquire(20), m.abandoned][1]")
            until(waiter.sleeping)
            holder.kill()
            assert waiter.answer() is True

    @pytest.mark.parametrize("end", ["kill", "exec", "thread", "close"])
    def test_abandoned_by_us(self, mutex: DotnetMutex, name: str, end: str) -> None:
        with peer_with(name) as owner:
            if end == "thread":
                owner.do("t = threading.Thread(target=m.acquire); t.start(); t.join()")
                until(lambda: Path(mutex.path).read_bytes()[64] == 1)
            else:
                owner.get("m.acquire()")
            waiting = subprocess.Popen([NETPEER, "mem", "mutex-try", name, "20000"], stdout=subprocess.DEVNULL)
            if end == "kill":
                owner.kill()
            elif end == "exec":
                owner.start("os.execvp('sleep', ['sleep', '30'])")
            elif end == "close":
                owner.get("m.close()")
            assert waiting.wait(30) == 4
        assert net("mutex-try", name, "0").returncode == 0

    @pytest.mark.slow
    def test_counting_together(self, mutex: DotnetMutex, name: str, tmp_path: Path) -> None:
        file, rounds = tmp_path / "count", 2000
        count = (
            f"\ndef count():\n for _ in range({rounds}):\n  m.acquire()\n  try:\n"
            f"   text = open({str(file)!r}).read() if os.path.exists({str(file)!r}) else ''\n"
            f"   open({str(file)!r}, 'w').write(str(int(text or 0) + 1))\n  finally:\n   m.release()\n"
        )
        theirs = [
            subprocess.Popen([NETPEER, "mem", "mutex-count", name, str(file), str(rounds)], stdout=subprocess.DEVNULL)
            for _ in range(2)
        ]
        with peer_with(name) as one, peer_with(name) as two:
            two.do(count)
            one.do(count)
            two.start("[t := [threading.Thread(target=count) for _ in range(2)], [x.start() for x in t],"
                      " [x.join() for x in t]] and 0")  # fmt: skip
            one.get("count()", 60)
            two.answer(60)
        assert [process.wait(60) for process in theirs] == [0, 0]
        assert file.read_text() == str(5 * rounds)

    def test_session_and_user_scopes(self, name: str) -> None:
        bare = name[7:]
        for given, words in ((bare, ()), ("Local\\" + bare, ()), (name, ()), (bare, ("--user-only",))):
            with contextlib.closing(DotnetMutex(given, current_user_only=bool(words))) as mutex:
                mutex.acquire()
                assert net("mutex-try", given, "0", *words).returncode == 3, given
                mutex.release()
                if words:
                    assert os.stat(mutex.path).st_mode & 0o7777 == 0o600
                    assert net("mutex-try", given, "0").returncode == 0  # the plain name is another one
            assert not os.path.exists(mutex.path)

    def test_the_file_goes_with_the_last(self, name: str) -> None:
        mutex = DotnetMutex(name)
        with net_holding("mutex-hold", name) as peer:
            mutex.close()
            assert os.path.exists(mutex.path)
            peer.stdin.write("quit\n")  # type: ignore[union-attr]
            peer.stdin.flush()  # type: ignore[union-attr]
            peer.wait(10)
        assert not os.path.exists(mutex.path)


def test_recursion_and_ownership(mutex: DotnetMutex, name: str) -> None:
    with contextlib.closing(DotnetMutex(name)) as second:  # another handle, the same thread
        assert second.already_exists
        mutex.acquire()
        second.acquire(0)
        assert mutex.depth == second.depth == 2 and mutex.owned
        refused: list[BaseException] = []

        def elsewhere() -> None:
            for call in (lambda: mutex.acquire(0), mutex.release):
                try:
                    call()
                except errors.PortwayError as error:
                    refused.append(error)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert [type(error) for error in refused] == [errors.OperationTimeout, errors.NotOwner]
        mutex.release()
        mutex.release()
        with pytest.raises(errors.NotOwner, match="does not own"):
            mutex.release()


def test_a_thread_that_ends_abandons(mutex: DotnetMutex) -> None:
    thread = threading.Thread(target=mutex.acquire)
    thread.start()
    thread.join()
    assert took(mutex, 10) is True
    mutex.release()
    assert took(mutex, 0) is False


def test_a_fork_childs_close_changes_nothing(name: str) -> None:
    with Talker() as peer:
        peer.do(MUTEX.format(name, {}))
        peer.get("m.acquire()")
        peer.do("pid = os.fork()\nif pid == 0:\n m.close(); os._exit(0)\nos.waitpid(pid, 0)")
        assert peer.get("m.depth") == 1
        assert peer.get("os.path.exists(m.path)")
        with contextlib.closing(DotnetMutex(name)) as mutex, pytest.raises(errors.OperationTimeout):
            mutex.acquire(0)


def test_the_child_of_a_fork_owns_nothing(name: str) -> None:
    with Talker() as peer:
        peer.do(MUTEX.format(name, {}))
        peer.get("m.acquire()")
        peer.do(
            "r, w = os.pipe()\npid = os.fork()\nif pid == 0:\n"
            " out = []\n"
            " for call in (m.release, lambda: m.acquire(0)):\n"
            "  try: call()\n"
            "  except Exception as e: out.append(type(e).__name__)\n"
            " os.write(w, repr((out, m.depth)).encode()); os._exit(0)\n"
            "os.waitpid(pid, 0)"
        )
        assert peer.get("os.read(r, 100).decode()") == "(['NotOwner', 'OperationTimeout'], 0)"
        assert peer.get("m.depth") == 1


def test_the_child_keeps_the_name_when_the_parent_closes(name: str) -> None:
    with Talker() as peer:
        peer.do(MUTEX.format(name, {}))
        peer.do(
            "r, w = os.pipe()\npid = os.fork()\nif pid == 0:\n"
            " os.close(w); os.read(r, 1)\n"
            " m.acquire(); path = m.path; ok = os.path.exists(path); m.close()\n"
            " os._exit(0 if ok and not os.path.exists(path) else 1)\n"
            "os.close(r); m.close()"
        )
        assert peer.get("os.path.exists(m.path)")
        peer.do("os.close(w)")
        assert peer.get("os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])") == 0


def test_killed_owner_told_once_among_waiters(mutex: DotnetMutex, name: str) -> None:
    with peer_with(name) as one, peer_with(name) as two:
        for _ in range(20):
            with peer_with(name) as owner:
                owner.get("m.acquire()")
                for waiter in (one, two):
                    waiter.start("[m.acquire(20), m.abandoned, m.release()][1]")
                    until(waiter.sleeping)
                owner.kill()
                assert sorted([one.answer(), two.answer()]) == [False, True]


@pytest.mark.slow
def test_a_waiter_killed_when_woken_hands_the_wake_on(name: str) -> None:
    """Release and kill the first waiter in one breath, all on one core: the second must not sleep on.

    It waits in a thread, which unlike the main thread never looks again by itself.
    """
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        with contextlib.closing(DotnetMutex(name)) as mutex, peer_with(name) as second:
            second.do("def wait(): m.acquire(20); m.release(); done.set()\ndone = threading.Event()")
            for _ in range(60):
                mutex.acquire()
                with peer_with(name) as first:
                    first.start("m.acquire(20)")
                    until(first.sleeping)
                    second.do("done.clear(); t = threading.Thread(target=wait); t.start(); tid = t.native_id")
                    tid = second.get("tid")
                    until(lambda tid=tid: futex_waits(second.pid, tid))
                    mutex.release()
                    os.kill(first.pid, signal.SIGKILL)
                    assert second.get("done.wait(5)") == 1
                    second.do("t.join()")
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.slow
def test_kills_at_random_points(mutex: DotnetMutex) -> None:
    """Children lock and write two numbers; one is killed at any instant: nobody is wedged, torn only when told."""
    shared, dice, told = mmap.mmap(-1, 4096), random.Random(7), 0

    def work() -> None:
        while True:
            with mutex:
                first = int.from_bytes(shared[:8], "little") + 1
                shared[:8] = first.to_bytes(8, "little")
                shared[8:16] = first.to_bytes(8, "little")

    def start() -> int:
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                work()
            os._exit(1)
        return pid

    def repaired() -> int:
        with mutex:
            whole = shared[:8] == shared[8:16]
            assert whole or mutex.abandoned
            shared[8:16] = shared[:8]
            return int(mutex.abandoned)

    for _ in range(300):
        child = start()
        before = shared[:8]
        until(lambda before=before: shared[:8] != before)
        end = time.perf_counter() + dice.random() * 0.002
        while time.perf_counter() < end:
            pass
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        told += repaired()
        assert repaired() == 0  # once
    assert 0 < told < 300
    shared.close()


def test_setuid_reaches_the_keeper(name: str) -> None:
    """glibc changes the uid of every thread by a signal, of the sleeping one too."""
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    with Talker() as peer:
        peer.do(MUTEX.format(name, {}))
        peer.get("m.acquire()")
        peer.do("os.setgid(65534); os.setuid(65534)", timeout=10)
        tasks = Path(f"/proc/{peer.pid}/task").iterdir()
        uids = [next(line for line in (one / "status").read_text().splitlines() if line[:3] == "Uid") for one in tasks]
        assert len(uids) == 2 and all("65534\t65534" in one for one in uids)
        peer.get("m.release()")


def futex_waits(pid: int, tid: int) -> bool:
    """Whether a thread sleeps in the futex call on a shared word (the thread's own start-up waits are private)."""
    words = Path(f"/proc/{pid}/task/{tid}/syscall").read_text().split()
    return words[0] == "202" and int(words[2], 16) & 0x7F == 0 and int(words[2], 16) & 0x80 == 0


def test_ctrl_c_ends_the_wait(mutex: DotnetMutex, name: str) -> None:
    mutex.acquire()
    with peer_with(name) as waiter:
        waiter.start("m.acquire()")
        until(waiter.sleeping)
        os.kill(waiter.pid, signal.SIGINT)
        with pytest.raises(Failed) as told:
            waiter.answer(5)
        assert told.value.kind == "KeyboardInterrupt"
        mutex.release()
        assert waiter.get("[m.acquire(5), m.abandoned]") == [True, False]


def test_a_normal_exit_leaves_nothing(name: str) -> None:
    code = (
        "import sys, threading, portway\nm = portway.DotnetMutex(sys.argv[1]); m.acquire(); print(m.path)\n"
        "threading.Thread(target=m.acquire, daemon=True).start()"
    )
    said = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, check=True)
    assert said.stderr == ""
    assert not os.path.exists(said.stdout.strip())


def test_closing_ends_the_waits_of_other_threads(name: str) -> None:
    with Talker() as owner:
        owner.do(MUTEX.format(name, {}))
        owner.get("m.acquire()")
        mutex, ended = DotnetMutex(name), []

        def wait() -> None:
            try:
                mutex.acquire(30)
            except errors.PortwayError as error:
                ended.append(type(error))

        thread = threading.Thread(target=wait)
        thread.start()
        until(lambda: thread.native_id is not None and futex_waits(os.getpid(), thread.native_id))
        mutex.close()
        thread.join()
        assert ended == [errors.ObjectClosed]
        assert name[7:] not in Path("/proc/self/maps").read_text()
        assert owner.get("m.depth") == 1


@pytest.mark.parametrize(
    "bad", ["", "Global\\", "a/b", "a\\b", "Session\\x", "Local\\a\\b", ".", "Global\\..", "x\0y", "n" * 256, "é" * 128]
)
def test_names_dotnet_refuses(bad: str) -> None:
    with pytest.raises(errors.InvalidAddress):
        DotnetMutex(bad)


def test_missing_and_closed(name: str) -> None:
    with pytest.raises(errors.ObjectNotFound, match=r"no \.NET mutex has the name"):
        DotnetMutex.open(name)
    mutex = DotnetMutex(name, initially_owned=True)
    assert mutex.depth == 1
    mutex.release()
    mutex.close()
    mutex.close()
    for call in (mutex.acquire, mutex.release, lambda: mutex.owned):
        with pytest.raises(errors.ObjectClosed):
            call()
    with pytest.raises(errors.ObjectNotFound):
        DotnetMutex.open(name)


def _planted(name: str, content: bytes, held: bool = True) -> int:
    """A file at the mutex's place, made and held as a process of another .NET would."""
    with contextlib.closing(DotnetMutex(name + "-folder")):  # makes the folders, and keeps them from being removed
        fd = os.open(f"/tmp/.dotnet/shm/global/{name[7:]}", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    os.write(fd, content)
    if held:
        fcntl.flock(fd, fcntl.LOCK_SH)
    return fd


OTHER_LAYOUTS = {
    "version": FREE[:1] + b"\2" + FREE[2:],
    "type": b"\1" + FREE[1:],
    "net11-free": FREE[:52] + b"\xff" * 4 + b"\0" * 9,
    "net11-held": FREE[:52] + b"\1\0\0\0" + b"\0" * 9,
    "musl": FREE[:8] + struct.pack("<I", 0x84) + bytes(36) + FREE[48:],
    "32-bit": FREE[:8] + struct.pack("<IIIIIII", 0, 0, 0, 0x91, 0, 0, 0) + bytes(40),
    "plain-mutex": FREE[:24] + struct.pack("<I", 0x81) + FREE[28:],
}


@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
def test_another_layout_is_refused_and_left_alone(name: str, layout: str) -> None:
    content = OTHER_LAYOUTS[layout].ljust(4096, b"\0")
    fd = _planted(name, content)
    try:
        with pytest.raises(errors.NotSupported, match="layout"):
            DotnetMutex(name)
        assert os.pread(fd, 5000, 0) == content
    finally:
        os.close(fd)


def test_a_file_of_another_size_is_refused(name: str) -> None:
    fd = _planted(name, b"x" * 100)
    try:
        with pytest.raises(errors.NotSupported, match="100 bytes"):
            DotnetMutex(name)
    finally:
        os.close(fd)


def test_what_a_dead_one_left_is_made_anew(name: str) -> None:
    os.close(_planted(name, b"\xff" * 9000, held=False))
    with contextlib.closing(DotnetMutex(name)) as mutex:
        assert mutex.already_exists is False
        assert took(mutex, 0) is False
        mutex.release()


def test_strangers_links_are_refused(name: str, tmp_path: Path) -> None:
    with contextlib.closing(DotnetMutex(name + "-folder")):
        _strangers_links(name, tmp_path)


def _strangers_links(name: str, tmp_path: Path) -> None:
    place = Path("/tmp/.dotnet/shm/global")
    mine = tmp_path / "mine"
    mine.write_bytes(b"precious")
    for make in (lambda: os.symlink(mine, place / name[7:]), lambda: (place / name[7:]).mkdir(),
                 lambda: os.mkfifo(place / name[7:])):  # fmt: skip
        make()
        with pytest.raises(errors.AccessDenied):
            DotnetMutex(name)
        with contextlib.suppress(OSError):
            os.rmdir(place / name[7:])
            continue
        os.unlink(place / name[7:])
    hard = place / name[7:]
    hard_source = place / (name[7:] + ".other")
    hard_source.write_bytes(b"precious")
    os.link(hard_source, hard)
    try:
        with pytest.raises(errors.AccessDenied, match="one name"):
            DotnetMutex(name)
    finally:
        os.unlink(hard)
        assert hard_source.read_bytes() == mine.read_bytes() == b"precious"
        os.unlink(hard_source)


def test_a_cut_file_is_an_error(mutex: DotnetMutex) -> None:
    mutex.acquire()
    os.truncate(mutex.path, 0)
    for call in (mutex.release, lambda: mutex.acquire(0)):
        with pytest.raises(errors.ObjectCorrupt):
            call()


def test_a_cut_file_ends_a_wait(name: str) -> None:
    with contextlib.closing(DotnetMutex(name)) as mutex, peer_with(name) as waiter:
        mutex.acquire()
        waiter.start("m.acquire(0.5)")
        until(waiter.sleeping)
        os.truncate(mutex.path, 0)
        with pytest.raises(Failed) as told:
            waiter.answer()
        assert told.value.kind in ("ObjectCorrupt", "OperationTimeout")


@pytest.mark.slow
def test_random_bytes_never_crash_or_hang(name: str) -> None:
    dice = random.Random(4)
    with contextlib.closing(DotnetMutex(name)) as mutex, peer_with(name) as victim, open(mutex.path, "r+b", 0) as file:
        victim.do(
            "from portway.errors import PortwayError\n"
            "def play():\n"
            " for _ in range(200):\n"
            "  for call in (lambda: m.acquire(0.0005), m.release):\n"
            "   try: call()\n"
            "   except PortwayError: pass\n"
            " return 'alive'\n"
        )
        for _ in range(40):
            victim.start("play()")
            end = time.monotonic() + 0.1
            while time.monotonic() < end:
                file.seek(dice.choice([0, 8, 12, 16, 24, 32, 40, 48, 52, 56, 64, dice.randrange(0, 100)]))
                file.write(dice.choice([dice.randbytes(8), FREE[8:], bytes(4), b"\xff" * 4]))
            assert victim.answer(60) == "alive"


def test_the_folders_lock_held_for_ever_is_a_timeout(name: str) -> None:
    DotnetMutex(name).close()
    fd = os.open("/tmp/.dotnet/shm", os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with pytest.raises(errors.OperationTimeout, match="lock on"):
            DotnetMutex(name, timeout=0.05)
    finally:
        os.close(fd)


def test_nothing_stays_open(name: str) -> None:
    DotnetMutex(name).close()
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(20):
        DotnetMutex(name).close()
        with contextlib.suppress(errors.PortwayError):
            DotnetMutex.open(name)
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert name not in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_another_user(name: str) -> None:
    """A plain name is everybody's; a private one is not, and a private folder of another uid is refused."""
    with contextlib.closing(DotnetMutex(name)) as mutex, Talker() as other:
        other.do("from portway.kernel.dotnet_mutex import DotnetMutex\nos.setgid(65534); os.setuid(65534)")
        mutex.acquire()
        other.do(f"m = DotnetMutex({name!r})")
        with pytest.raises(Failed, match="OperationTimeout"):
            other.get("m.acquire(0)")
        mutex.release()
        assert other.get("[m.acquire(5), m.abandoned]") == [True, False]
        other.do(f"private = DotnetMutex({name!r}, current_user_only=True)")
        assert "/.dotnet-uid65534/" in other.get("private.path")
        other.do("private.close()")
        with contextlib.closing(DotnetMutex(name, current_user_only=True)) as ours:
            with pytest.raises(Failed, match=r"PermissionError|AccessDenied"):
                other.do(f"os.open({ours.path!r}, os.O_RDWR)")


def test_without_native_modules() -> None:
    code = (
        "import sys; sys.modules['portway._native.dotnet'] = None\n"
        "import portway\n"
        "try: portway.DotnetMutex\nexcept Exception as e: print(type(e).__name__)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "MissingExtra"


def test_without_glibc(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from portway._native import dotnet

    monkeypatch.setattr(dotnet, "SUPPORTED", False)
    with pytest.raises(errors.NotSupported, match="glibc"):
        DotnetMutex(name)
