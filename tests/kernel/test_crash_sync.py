"""kill -9 at every named point between two stores, and at random: nobody is wedged, nothing half-done.

The points are those of the headers (``PW_CRASH``); a child of `crash_server` ends itself there, then this process and
others look at what is left. That the build with crash points exists is seen to by the fixture.
"""

from __future__ import annotations

import mmap
import os
import random
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sync_world import Process, files, until

from portway import Event, Mutex, Semaphore, WaitableTimer, errors, wait_all, wait_any
from portway.kernel.namespace import Namespace

PROJECT = Path(__file__).parents[2]
NATIVE = PROJECT / "src/portway/_native"
SOURCE = "".join(path.read_text() for path in NATIVE.glob("sync*.h"))
POINTS = sorted(set(re.findall(r'PW_CRASH\("([\w.]+)"\)', SOURCE)))
reached: set[str] = set()


@pytest.fixture(scope="module")
def crashing_build():
    sources = [path for ending in ("h", "pyx", "pxi") for path in NATIVE.glob(f"sync*.{ending}")]
    built = list(NATIVE.glob("sync_crash*.so"))
    if not built or built[0].stat().st_mtime < max(path.stat().st_mtime for path in sources):
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        env = os.environ | {"PORTWAY_CRASH_POINTS": "1"}
        done = subprocess.run(command, cwd=PROJECT, env=env, capture_output=True, text=True, timeout=110)
        assert done.returncode == 0, done.stderr


class Server:
    def __init__(self, *uid: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("crash_server.py")), *map(str, uid)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PORTWAY_CRASH_POINTS": "1"},
        )  # fmt: skip

    def order(self, scenario: str, point: str, skip: int = 0, stop: str = "-") -> None:
        self.process.stdin.write(f"{scenario} {point} {skip} {stop}\n")
        self.process.stdin.flush()

    def stopped(self) -> int:
        """The pid of the child, which has stopped where it was to; 0: it was killed before."""
        word, *pid = self.process.stdout.readline().split()
        assert word in ("stopped", "killed")
        return int(pid[0]) if pid else 0

    def answer(self, point: str = "") -> bool:
        """Whether it was killed at the point."""
        line = self.process.stdout.readline().strip()
        assert line in ("killed", "done"), line
        if line == "killed":
            reached.add(point)
        return line == "killed"

    def run(self, scenario: str, point: str, skip: int = 0) -> bool:
        self.order(scenario, point, skip)
        return self.answer(point)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture
def server(root, crashing_build):
    one = Server()
    yield one
    one.close()


def every_kill(server: Server, scenario: str, skips: int = 3):
    """Each point, as often as the scenario passes it: yields after each kill, and after it went through."""
    for point in POINTS:
        for skip in range(skips):
            killed = server.run(scenario, point, skip)
            yield f"{point}:{skip}"
            if not killed:
                break


def test_mutex(server):
    mutex = Mutex("m")
    for at in every_kill(server, "mutex_alone"):
        mutex.acquire(5)
        assert mutex.abandoned in (True, False), at
        mutex.release()
        mutex.acquire(0)
        assert not mutex.abandoned, at
        mutex.release()


def waiting(names: list[str], what: str) -> list[Process]:
    """Processes that wait with single waits and tell when they are through."""

    def work(tell, name):
        one = {"m": Mutex, "s": Semaphore, "t": WaitableTimer}.get(name, Event).open(name)
        one.acquire(30) if isinstance(one, Mutex) else one.wait(30)
        tell(getattr(one, "abandoned", None))
        if isinstance(one, Mutex):
            one.release()

    return [Process(work, name) for name in names]


@pytest.fixture
def closing():
    made: list[Process] = []
    yield made
    for one in made:
        one.close()


def test_mutex_freed_while_two_wait(server, closing):
    mutex, held, go = Mutex("m"), Event("held"), Event("go")
    for point in [one for one in POINTS if one.startswith("mutex.")]:
        server.order("mutex_freed_for_others", point, 1 if point in ("mutex.taken", "mutex.linked") else 0)
        until(lambda: held.is_set() or mutex.state == "abandoned", point)
        held.reset()
        closing += (children := waiting(["m", "m"], point))
        until(lambda: mutex.waiters == 2 or mutex.state != "held", "two wait")
        go.set()
        killed = server.answer(point)
        told = [child.hear() for child in children]
        assert sum(told) <= 1 and (killed or not any(told)), point
        assert [child.wait() for child in children] == [0, 0]
        with mutex:
            assert not mutex.abandoned
        go.reset()


def test_mutex_waiter_dies_at_each_point(server):
    mutex = Mutex("m")
    for point in [one for one in POINTS if one.startswith(("mutex.", "L."))]:
        mutex.acquire(5)
        server.order("mutex_contended", point)
        ended = []
        until(lambda: mutex.waiters or dead(server, ended, point), point)  # noqa: B023
        mutex.release()
        if not ended:
            server.answer(point)
        mutex.acquire(5)
        mutex.release()
        assert mutex.waiters == 0


def dead(server: Server, ended: list[bool], point: str) -> bool:
    if select.select([server.process.stdout], [], [], 0)[0]:
        ended.append(server.answer(point))
    return bool(ended)


@pytest.mark.parametrize(("scenario", "name"), [("event_set", "auto"), ("manual_set", "manual"), ("timer_set", "t")])
def test_set_with_two_waiters(server, closing, scenario, name):
    """The set happened or not, seen from outside; if it happened it was not lost, and nobody is wedged."""
    if name == "t":
        one = WaitableTimer("t")
        signalled = lambda: one.due is not None  # noqa: E731
    else:
        one = Event(name, manual_reset=name == "manual")
        signalled = one.is_set
    for point in POINTS:
        closing += (children := waiting([name, name], point))
        until(lambda: one.waiters == 2, "two wait")
        killed = server.run(scenario, point)
        if name == "manual":
            if signalled() or not killed:
                assert [child.hear() for child in children] == [None, None], point
            one.set()
        else:
            until(lambda: one.waiters == 1 or not signalled(), f"{point}: whoever was woken took it")
            first = 2 - one.waiters
            for _ in range(2 - first):
                one.set() if name == "auto" else one.set(0)
                until(lambda: not signalled() or one.waiters == 0, f"{point}: the next one took it")
        assert [child.wait() for child in children] == [0, 0], point
        until(lambda: one.waiters == 0, "both are through")
        one.reset() if name != "t" else one.cancel()
        if name != "t":
            assert not one.is_set()
        for child in children:
            child.close()


@pytest.mark.parametrize("scenario", ["event_set", "set_after_timeout"])
def test_set_with_one_who_waits_for_many(server, closing, scenario):
    one, never = Event("auto"), Event("never")

    def work(tell):
        tell(wait_any([Event.open("never"), Event.open("auto")], 30).index)

    for point in POINTS:
        closing.append(child := Process(work))
        until(lambda: never.waiters == 1, "it waits")
        server.run(scenario, point)
        until(lambda: not one.is_set(), f"{point}: it took what was set")
        if never.waiters:
            one.set()
        assert child.hear() == 1, point
        child.close()
        one.reset()


def test_set_when_the_word_says_somebody_may_sleep(server):
    one = Event("auto")
    for at in every_kill(server, "set_after_timeout", skips=4):
        one.reset()
        with pytest.raises(errors.OperationTimeout):
            one.wait(0)
        one.set()
        one.wait(0)
        assert not one.is_set(), at


def test_pulse_with_two_waiters(server, closing):
    one = Event("manual", manual_reset=True)
    for point in POINTS:
        closing += (children := waiting(["manual", "manual"], point))
        until(lambda: one.waiters == 2, "two wait")
        server.run("pulse", point)
        until(lambda: one.waiters in (0, 2), f"{point}: both or none")
        assert not one.is_set()
        one.set()
        assert [child.wait() for child in children] == [0, 0], point
        one.reset()
        for child in children:
            child.close()


def test_semaphore_release_with_three_waiters(server, closing):
    one = Semaphore(0, 99, "s")
    for point in POINTS:
        closing += (children := waiting(["s"] * 3, point))
        until(lambda: one.waiters == 3, "three wait")
        server.run("semaphore_release", point)
        until(lambda: one.value == 0 and one.waiters in (1, 3), f"{point}: two or none are through")
        one.release(one.waiters)
        assert [child.wait() for child in children] == [0] * 3, point
        assert one.value == 0
        for child in children:
            child.close()


def test_single_takes(server):
    one = Semaphore(1, 9, "s")
    for at in every_kill(server, "take"):
        value = one.value
        assert value in (0, 1), at
        one.release()
        assert one.value == value + 1
        for _ in range(value):
            one.wait(0)
        assert one.value == 1


@pytest.mark.parametrize("scenario", ["wait_for_event", "many_asleep"])
def test_waiters_that_die_asleep_or_just_woken(server, closing, scenario):
    event, _never = Event("auto"), Event("never")
    for point in POINTS:
        server.order(scenario, point)
        ended: list[bool] = []
        until(lambda: event.waiters == 1 or dead(server, ended, point), point)  # noqa: B023
        closing += (children := waiting(["auto"], point))
        both = lambda: event.waiters == 2 or (event.waiters and (ended or dead(server, ended, point)))  # noqa: B023, E731
        until(both, "both wait")
        for _ in range(2):  # the dead one may have taken one
            event.set()
            until(lambda: not event.is_set() or not event.waiters, f"{point}: one of them took it")
        if not ended:
            ended.append(server.answer(point))
        assert children[0].wait() == 0, point
        event.reset()
        children[0].close()


def check_all(server: Server, at: str, objects) -> None:
    s, s2, m, auto = objects
    m.acquire(5)
    taken = s.value == 0
    expected = (0, 0, False, True) if taken else (1, 1, True, False)
    assert (s.value, s2.value, auto.is_set(), m.abandoned) == expected, at
    m.release()
    if taken:
        s.release()
        s2.release()
        auto.set()


def all_objects():
    return Semaphore(1, 9, "s"), Semaphore(1, 9, "s2"), Mutex("m"), Event("auto", initially_set=True)


def settle(objects):
    """What a look from outside does."""
    never = Event("never")
    for one in objects:
        with pytest.raises(errors.OperationTimeout):
            wait_all([one, never], 0)
    never.close()


def test_wait_all_takes_all_or_none(server):
    objects = all_objects()
    seen = set()
    for at in every_kill(server, "all_of_many", skips=5):
        settle(objects)
        seen.add(objects[0].value)
        check_all(server, at, objects)
    assert seen == {0, 1}


def test_wait_all_looked_at_by_participants_alone(server):
    """Each object of the torn wait is looked at first in turn, with single operations only."""
    for first in range(4):
        objects = all_objects()
        for at in ("all.listed", "all.noting", "all.noted", "all.mutex", "all.decided", "all.applied", "all.cleared"):
            for skip in range(4):
                killed = server.run("all_of_many", at, skip)
                for one in objects[first:] + objects[:first]:
                    if isinstance(one, Mutex):
                        one.acquire(5)
                        told = one.abandoned
                        one.release()
                    elif isinstance(one, Semaphore):
                        with pytest.raises(errors.TooManyPosts):
                            one.release(10**6)
                    else:
                        one.reset() if not one.is_set() else one.set()
                s, s2, _, auto = objects
                state = (s.value, s2.value, auto.is_set(), told)
                assert state in ((0, 0, False, True), (1, 1, True, False)), (at, skip)
                if told:
                    s.release()
                    s2.release()
                    auto.set()
                if not killed:
                    break
        for one in objects:
            one.close()


def test_wait_all_that_lost_a_mutex_race_undoes(server):
    objects = all_objects()
    m = objects[2]
    m.acquire()
    for at in every_kill(server, "all_but_one"):
        assert (objects[0].value, objects[1].value) == (1, 1), at
        assert m.owned
    m.release()


def test_a_mutex_taken_by_another_in_the_middle_of_wait_all(server):
    """Between the look and the taking a mutex of the set goes to somebody else: what was taken is given back."""
    s, m, m2, s2 = Semaphore(1, 9, "s"), Mutex("m"), Mutex("m2"), Semaphore(1, 9, "s2")
    seen = set()
    for point in [*POINTS, "none"]:
        server.order("all_with_two_mutexes", point, stop="all.mutex")  # the first one is its own then
        if pid := server.stopped():
            m2.acquire(0)  # its word is free, and this needs no lock
            os.kill(pid, signal.SIGCONT)
            if server.answer(point):
                seen.add(point)
        m.acquire(5)
        assert (m.abandoned, s.value, s2.value) == (False, 1, 1), point
        m.release()
        if pid:
            assert m2.owned
            m2.release()
        assert m.state == m2.state == "free"
    assert {"all.undoing", "all.undone"} <= seen


def test_the_death_of_a_later_owner_is_told_although_the_undone_wait_all_is_looked_at_after_it(server, start):
    """The dying wait_all had given the mutex back; then another owned it and was killed. It is no mix-up."""
    s, m, m2, s2 = Semaphore(1, 9, "s"), Mutex("m"), Mutex("m2"), Semaphore(1, 9, "s2")
    server.order("all_with_two_mutexes", "all.undone", stop="all.mutex")
    pid = server.stopped()
    m2.acquire(0)
    os.kill(pid, signal.SIGCONT)
    assert server.answer("all.undone")
    m2.release()

    def work(tell):
        m.acquire(0)
        tell("mine")
        signal.pause()

    child = start(work)
    child.hear()
    child.kill()
    m.acquire(5)
    assert m.abandoned
    m.release()
    assert (s.value, s2.value) == (1, 1)


def test_the_last_close_finishes_what_a_killed_wait_all_had_decided(server):
    """The coordinator's only holder never looked at it, and closes it: the others are finished first."""
    for passed in range(4):
        objects = s, s2, m, auto = all_objects()
        assert server.run("all_of_many", "all.decided" if passed == 0 else "all.cleared", max(0, passed - 1))
        s.close()
        m.acquire(5)
        assert (s2.value, auto.is_set(), m.abandoned) == (0, False, True), passed
        m.release()
        for one in objects[1:]:
            one.close()


def test_the_recoverer_dies_too(server):
    objects = all_objects()
    always = Event("always", manual_reset=True, initially_set=True)
    s, s2, m, auto = objects
    for how in ("recover", "recover_singly"):
        for torn, passed in (("all.noted", 1), ("all.mutex", 0), ("all.decided", 0), ("all.applied", 1)):
            for point in [one for one in POINTS if one.startswith(("recover.", "L.", "mutex."))]:
                for skip in range(3):
                    assert server.run("all_of_many", torn, passed)
                    killed = server.run(how, point, skip)
                    m.acquire(5)
                    m.release()
                    settle_quietly(objects)
                    if how == "recover_singly":  # it takes nothing by itself
                        assert (s.value, s2.value, auto.is_set()) in ((0, 0, False), (1, 1, True)), (torn, point, skip)
                    repair(s, s2, auto)
                    if not killed:
                        break
    always.close()


def settle_quietly(objects):
    never = Event("never")
    for one in objects:
        try:
            wait_all([one, never], 0)
        except errors.OperationTimeout:
            pass
    never.close()


def repair(s, s2, auto):
    """`recover` itself takes single objects: only tearing shows as a value that cannot be."""
    for one in (s, s2):
        assert one.value in (0, 1)
        if one.value == 0:
            one.release()
    auto.set()


def test_unlinking_finishes_what_the_last_holder_had_decided(server):
    """The coordinator's last holder dies with a decided wait-all: participants are finished before its file goes."""
    for point, value in (("all.decided", 0), ("all.noted", 1)):
        one = Semaphore(1, 9, "s2")

        def work(tell):
            keep = all_objects()
            tell("ready")
            signal.pause()
            del keep

        child = Process(work)
        try:
            child.hear()
            assert server.run("all_of_many", point, 1 if point == "all.noted" else 0)
        finally:
            child.close()
        Namespace().list()
        with pytest.raises(errors.TooManyPosts):
            one.release(10**6)
        assert one.value == value, point
        one.close()


def test_any_of_many(server):
    auto, s, m = Event("auto"), Semaphore(1, 9, "s"), Mutex("m")
    for at in every_kill(server, "any_of_many"):
        m.acquire(5)
        m.release()
        assert s.value in (0, 1) and not auto.is_set(), at
        if s.value == 0:
            s.release()


def test_every_point_was_reached():
    """Runs last: a point that no scenario passes proves nothing."""
    if not reached:
        pytest.skip("the tests before were not run")
    without_lists = {"mutex.linked"} if os.environ.get("PORTWAY_SYNC") == "slices" else set()
    assert set(POINTS) - reached <= without_lists


# ---- random kills ----


def one_core() -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["auto", "manual", "s", "m", "any"])
def test_set_and_kill_the_first_waiter_in_one_breath(root, name):
    """Two waiters and the setter on one core: the wake-up of the one that dies goes to the other."""
    shared = mmap.mmap(-1, 4096)

    def work(tell, one, at):
        one_core()
        if name == "any":
            wait_any([one, other])
        elif name == "m":
            one.acquire()
        else:
            one.wait()
        shared[at] = 1
        tell("through")

    other = Event("other")
    if name in "sm":
        one = Semaphore(0, 9, "s") if name == "s" else Mutex("m")
    else:
        one = Event(name, manual_reset=name == "manual")
    affinity, lost, trials = os.sched_getaffinity(0), 0, 500
    one_core()
    try:
        for _ in range(trials):
            shared[0] = shared[1] = 0
            if name == "m":
                one.acquire()
            children = []
            try:
                for at in range(2):
                    children.append(Process(work, one, at))
                    until(lambda at=at: one.waiters == at + 1, "it waits")
                one.release() if name in "sm" else one.set()
                os.kill(children[0].pid, signal.SIGKILL)
                children[0].wait()
                if name in ("m", "manual"):
                    assert children[1].hear() == "through"
                else:
                    until(lambda: not (one.value if name == "s" else one.is_set()), "taken")
                    took = shared[0]  # it ran before the kill: a legitimate end
                    if took or not select.select([children[1].reads], [], [], 0.3)[0]:
                        lost += not took
                        one.release() if name == "s" else one.set()
                    assert children[1].hear() == "through"
            finally:
                for child in children:
                    child.close()
            if name == "manual":
                one.reset()
        assert lost <= trials // 20
    finally:
        os.sched_setaffinity(0, affinity)


@pytest.mark.slow
def test_two_objects_only_consumed_together_stay_equal(root):
    """Takers are killed in the middle of wait_all; the benchmark sync.killed does it 10,000 times."""
    a, b = Semaphore(0, None, "a"), Semaphore(0, None, "b")

    def work(tell):
        mine = [Semaphore.open("b"), Semaphore.open("a")]
        tell("begins")
        while True:
            wait_all(mine)

    noise = random.Random(5)
    for _ in range(1000):
        if a.value < 50_000:  # never so few that it sleeps
            a.release(100_000)
            b.release(100_000)
        child = Process(work)
        try:
            child.hear()
            for _ in range(noise.randrange(3000)):
                pass
        finally:
            child.close()
        assert a.value == b.value
        wait_all([a, b], 5)
    a.close()
    b.close()
    Namespace().list()
    assert not files(root)
