"""``sync``: locks that survive kill -9.

sync.mutex      ns            an uncontended ``m.acquire(); m.release()``
sync.pingpong   us            a round trip of two auto-reset events between two processes on one core
sync.abandoned  missed, worst_ms, trials  a holder is killed while two wait: told within 50 ms, and exactly one of them
sync.killed     wedged, torn, trials      two semaphores only ever taken together, their takers killed; and left: files
map.open        us, after_crash_us        open a named mapping and close it; create it when all its holders were killed

c-sem and c-robust are C programs (sync_native/sync.c), cython-empty calls that do nothing. mp.Lock and posix_ipc take
part in sync.abandoned with a time limit of 0.2 s: their locks stay locked.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
import timeit
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import portway

from .harness import Failed, Figures, Options, Worker, remark, rounds_of
from .sync_native import build

__all__ = ["CONTENDERS", "PINNABLE", "WORKS", "run"]

CONTENDERS = ("portway", "mp.Lock", "posix_ipc", "c-sem", "c-robust", "cython-empty", "shared_memory")
WORKS = ("sync.mutex", "sync.pingpong", "sync.abandoned", "sync.killed", "map.open")
PINNABLE = True
LIMIT_MS = 50


def run(options: Options, figures: Figures) -> None:
    root = f"/dev/shm/portway-bench-{os.getpid()}"
    os.environ["PORTWAY_ROOT"] = root
    works: dict[str, Callable[[Options, Figures], None]] = {
        "sync.mutex": _mutex, "sync.pingpong": _pingpong, "sync.abandoned": _abandoned, "sync.killed": _killed,
        "map.open": _open,
    }  # fmt: skip
    try:
        for name, work in works.items():
            if options.wants_work(name):
                work(options, figures)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _trying(options: Options, work: str, contenders: dict[str, Callable[[], Any]]) -> Iterator[tuple[str, Any]]:
    for name, make in contenders.items():
        if options.wants(name):
            try:
                yield name, make()
            except Failed as error:
                remark(f"{work}: {name} is left out: {error}")


def _posix(initial: int) -> Any:
    try:
        import posix_ipc  # type: ignore[import-not-found]
    except ImportError:
        raise Failed("posix_ipc is not installed: pip install posix_ipc") from None
    name = f"/portway-bench-{os.getpid()}-{random.getrandbits(32)}"
    made = posix_ipc.Semaphore(name, posix_ipc.O_CREX, initial_value=initial)
    posix_ipc.unlink_semaphore(name)
    return made


def _c(what: str, count: int) -> float:
    done = subprocess.run([str(build.program()), what, str(count)], capture_output=True, text=True, check=True)
    return float(done.stdout)


# -- time --------------------------------------------------------------------------------------------------------------


def _mutex(options: Options, figures: Figures) -> None:
    count = 1000 if options.quick else 200_000

    def pair(lock: Any) -> Callable[[], float]:
        timer = timeit.Timer("m.acquire(); m.release()", globals={"m": lock})
        return lambda: timer.timeit(count) / count * 1e9

    made: dict[str, Callable[[], Any]] = {
        "portway": lambda: pair(portway.Mutex("bench")),
        "mp.Lock": lambda: pair(multiprocessing.Lock()),
        "posix_ipc": lambda: pair(_posix(1)),
        "c-sem": lambda: build.program() and (lambda: _c("pair-sem", count)),
        "c-robust": lambda: build.program() and (lambda: _c("pair-robust", count)),
        "cython-empty": lambda: pair(build.empty()),
    }
    ready = dict(_trying(options, "sync.mutex", made))
    for _ in range(rounds_of(options, 9)):
        for name, measure in ready.items():
            figures.add("sync.mutex", name, "ns", measure())


class _Echo:
    """The other end of a ping-pong, in its own process on the same core."""

    def __init__(self, wait: Callable[[], Any], post: Callable[[], Any]) -> None:
        self.wait, self.post = wait, post

    def __call__(self, count: int) -> int:
        for _ in range(count):
            self.wait()
            self.post()
        return count


def _pingpong(options: Options, figures: Figures) -> None:
    count = 200 if options.quick else 20_000
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    ping, pong = portway.Event("ping"), portway.Event("pong")

    def round_trips(post: Any, wait: Any, echo: _Echo) -> Callable[[], float]:
        def measure() -> float:
            worker = Worker("echo", lambda: echo)
            try:
                worker.order(count)
                began = time.perf_counter_ns()
                for _ in range(count):
                    post()
                    wait()
                took = time.perf_counter_ns() - began
                worker.answer()
            finally:
                worker.close()
            return took / count / 1000

        return measure

    def locks(a: Any, b: Any) -> Callable[[], float]:
        return round_trips(a.release, b.acquire, _Echo(a.acquire, b.release))

    def mp_locks() -> Callable[[], float]:
        a, b = multiprocessing.Lock(), multiprocessing.Lock()
        a.acquire()
        b.acquire()
        return locks(a, b)

    made: dict[str, Callable[[], Any]] = {
        "portway": lambda: round_trips(ping.set, pong.wait, _Echo(ping.wait, pong.set)),
        "mp.Lock": mp_locks,
        "posix_ipc": lambda: locks(_posix(0), _posix(0)),
        "c-sem": lambda: build.program() and (lambda: _c("pingpong", count)),
    }
    try:
        ready = dict(_trying(options, "sync.pingpong", made))
        for _ in range(rounds_of(options, 7)):
            for name, measure in ready.items():
                figures.add("sync.pingpong", name, "us", measure())
    finally:
        os.sched_setaffinity(0, before)


# -- death -------------------------------------------------------------------------------------------------------------


def _fork(work: Callable[[], Any]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _until(condition: Callable[[], Any], seconds: float) -> bool:
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            return False
        time.sleep(0.0002)
    return True


def _portway_take() -> Callable[[float], tuple[bool, int] | None]:
    mutex = portway.Mutex.open("victim")

    def take(limit: float) -> tuple[bool, int] | None:
        try:
            mutex.acquire(limit)
        except portway.errors.OperationTimeout:
            return None
        got, told = time.monotonic_ns(), mutex.abandoned
        mutex.release()
        return told, got

    return take


def _plain_take(lock: Any) -> Callable[[float], tuple[bool, int] | None]:
    def take(limit: float) -> tuple[bool, int] | None:
        until = time.monotonic() + limit
        while not lock.acquire(False):
            if time.monotonic() > until:
                return None
            time.sleep(0.001)
        lock.release()
        return True, time.monotonic_ns()

    return take


class _Nonblocking:
    """posix_ipc's semaphore with the face of a lock."""

    def __init__(self, one: Any) -> None:
        self.one, self.release = one, one.release

    def acquire(self, block: bool = True) -> bool:
        import posix_ipc

        try:
            self.one.acquire(None if block else 0)
            return True
        except posix_ipc.BusyError:
            return False


def _abandoned(options: Options, figures: Figures) -> None:
    victim = portway.Mutex("victim")
    made: dict[str, Callable[[], Any]] = {
        "portway": lambda: (victim, _portway_take, 20 if options.quick else 1000, 5.0),
        "mp.Lock": lambda: _rival(multiprocessing.Lock()),
        "posix_ipc": lambda: _rival(_Nonblocking(_posix(1))),
    }
    for name, (lock, take, trials, limit) in _trying(options, "sync.abandoned", made):
        missed, worst = _holders_killed(lock, take, trials, limit)
        for metric, value in (("missed", missed), ("worst_ms", worst), ("trials", trials)):
            figures.add("sync.abandoned", name, metric, value)


def _rival(lock: Any) -> tuple[Any, Callable[[], Any], int, float]:
    return lock, lambda: _plain_take(lock), 1, 0.2  # it is wedged after the first


def _holders_killed(lock: Any, take: Callable[[], Any], trials: int, limit: float) -> tuple[int, float]:
    """How often not exactly one was told within the limit, and the longest wait of the first of them, in ms."""
    holds, missed, worst = mmap.mmap(-1, 4096), 0, 0.0
    mine, taker = take(), (Worker("first", take), Worker("second", take))  # three wait, or come after it

    def hold() -> None:
        while True:
            lock.acquire()
            holds[0] = 1
            for _ in range(random.randrange(2000)):
                pass
            holds[0] = 0
            lock.release()

    try:
        for _ in range(trials):
            holds[0] = 0
            pid = _fork(hold)
            _until(lambda: holds[0], 5)
            for one in taker:
                one.order(limit)
            time.sleep(random.random() * 0.002)
            killed = time.monotonic_ns()
            _kill(pid)
            held = holds[0]
            answers = [mine(limit), *(one.answer() for one in taker)]
            told = sum(answer is not None and answer[0] for answer in answers)
            after = [answer[1] for answer in answers if answer and answer[1] > killed]
            waited = (min(after) - killed) / 1e6 if after else limit * 1000
            worst = max(worst, waited)
            wrong = None in answers or told > 1 or (held and told != 1)
            missed += wrong or waited > LIMIT_MS
    finally:
        for one in reversed(taker):
            one.close()
    return missed, worst


def _killed(options: Options, figures: Figures) -> None:
    if not options.wants("portway"):
        return
    trials, wedged, torn = (100 if options.quick else 10_000), 0, 0
    a, b = portway.Semaphore(0, None, "a"), portway.Semaphore(0, None, "b")
    before, begun = len(os.listdir("/proc/self/fd")), mmap.mmap(-1, 4096)

    def take() -> None:
        mine = [portway.Semaphore.open("b"), portway.Semaphore.open("a")]
        begun[0] = 1
        while True:
            portway.wait_all(mine)

    for _ in range(trials):
        if a.value < 50_000:  # never so few that they sleep
            a.release(100_000)
            b.release(100_000)
        begun[0] = 0
        pid = _fork(take)
        _until(lambda: begun[0], 5)
        for _ in range(random.randrange(3000)):
            pass
        _kill(pid)
        torn += a.value != b.value
        try:
            portway.wait_all([a, b], 5)
        except portway.errors.OperationTimeout:
            wedged += 1
    left = len(os.listdir("/proc/self/fd")) - before
    a.close()
    b.close()
    files = sum(len(names) for _, _, names in os.walk(os.environ["PORTWAY_ROOT"]))
    for metric, value in (("wedged", wedged), ("torn", torn), ("trials", trials), ("files", files), ("fds", left)):
        figures.add("sync.killed", "portway", metric, value)


# -- opening -----------------------------------------------------------------------------------------------------------


@contextmanager
def _shared_memory() -> Iterator[Any]:
    from multiprocessing.shared_memory import SharedMemory

    made = SharedMemory(create=True, size=65536)
    try:
        yield lambda: SharedMemory(made.name).close()
    finally:
        made.close()
        made.unlink()


def _open(options: Options, figures: Figures) -> None:
    count = 20 if options.quick else 500
    with ExitStack() as stack:
        mapping = stack.enter_context(portway.FileMapping.create("map", size=65536))
        made: dict[str, Callable[[], Any]] = {
            "portway": lambda: lambda: _from_elsewhere(mapping.name, count),
            "shared_memory": lambda: _timed(stack.enter_context(_shared_memory()), count),
        }
        ready = dict(_trying(options, "map.open", made))
        for _ in range(rounds_of(options, 5)):
            for name, measure in ready.items():
                figures.add("map.open", name, "us", measure())
    if options.wants("portway"):
        for _ in range(5 if options.quick else 50):
            figures.add("map.open", "portway", "after_crash_us", _after_crash())


def _timed(opening: Callable[[], Any], count: int) -> Callable[[], float]:
    return lambda: timeit.timeit(opening, number=count) / count * 1e6


def _from_elsewhere(name: Any, count: int) -> float:
    """In a process that has no handle on it yet, so that each open is a first one."""
    worker = Worker("opener", lambda: lambda: _timed(lambda: portway.FileMapping.open(name).close(), count)())
    try:
        return float(worker.ask())
    finally:
        worker.close()


def _after_crash() -> float:
    reads, writes = os.pipe()

    def hold() -> None:
        kept = portway.FileMapping.create("crashed", size=65536)
        os.write(writes, b"1")
        signal.pause()
        kept.close()

    pid = _fork(hold)
    os.read(reads, 1)
    os.close(reads)
    os.close(writes)
    _kill(pid)
    began = time.perf_counter_ns()
    portway.FileMapping.create("crashed", size=65536).close()
    return (time.perf_counter_ns() - began) / 1000
