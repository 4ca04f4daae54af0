"""wait_any, wait_all, signal_and_wait: Windows' rules, in several processes, against a plain model of them."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import threading
import time

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from sync_world import in_thread, until

from portway import Event, Mutex, Semaphore, WaitableTimer, alert, errors, signal_and_wait, wait_all, wait_any


def test_lowest_index_wins_and_only_it_is_consumed(root):
    a, b, s = Event("a", initially_set=True), Event("b", initially_set=True), Semaphore(1, 1, "s")
    done = wait_any([s, a, b], 0)
    assert (done.index, done.object, done.abandoned) == (0, s, ())
    assert a.is_set() and b.is_set()
    assert wait_any([s, b, a], 0).index == 1
    assert wait_any([b, s, a], 0).index == 2
    with pytest.raises(errors.OperationTimeout, match="3 objects"):
        wait_any([b, s, a], 0.01)


def test_all_takes_all_or_none(root):
    a, s, m, t = Event("a"), Semaphore(1, 2, "s"), Mutex("m"), WaitableTimer("t", manual_reset=True)
    t.set(0)
    with pytest.raises(errors.OperationTimeout):
        wait_all([a, s, m, t], 0.03)
    assert (s.value, m.state) == (1, "free")
    a.set()
    assert wait_all([a, s, m, t], 0).abandoned == ()
    assert (a.is_set(), s.value, m.owned, t.is_set()) == (False, 0, True, True)
    m.release()
    with pytest.raises(errors.NotOwner):
        m.release()


def test_all_holds_nothing_while_it_waits(root, start):
    def work(tell):
        wait_all([Semaphore.open("s"), Mutex.open("m"), Event.open("e")])
        tell("all")
        signal.pause()

    s, m, e = Semaphore(1, 1, "s"), Mutex("m"), Event("e")
    child = start(work)
    until(lambda: e.waiters == 1, "it waits for all")
    s.wait(0)
    s.release()
    m.acquire(0)
    e.set()
    assert e.is_set()
    m.release()
    assert child.hear() == "all"
    assert s.value == 0 and not e.is_set() and m.state == "held"


def test_owned_mutex_counts_as_signalled_and_recurses(root):
    m, e = Mutex("m"), Event("e", initially_set=True)
    m.acquire()
    wait_all([e, m], 0)
    wait_any([m, e], 0)
    with pytest.raises(errors.OperationTimeout):
        wait_all([e, m], 0)
    for _ in range(3):
        m.release()
    assert m.state == "free"


def test_abandoned_is_told_in_results(root, start):
    def work(tell):
        Mutex.open("m").acquire()
        tell(1)
        signal.pause()

    m, e = Mutex("m"), Event("e", initially_set=True, manual_reset=True)
    for wait in (lambda: wait_any([m, e], 5), lambda: wait_all([e, m], 5)):
        child = start(work)
        child.hear()
        child.kill()
        until(lambda: m.state == "abandoned" or "slices" in os.environ.get("PORTWAY_SYNC", ""), "marked")
        done = wait()
        assert done.abandoned == (m,) and m.abandoned
        m.release()
        assert wait_any([m], 0).abandoned == () and not m.abandoned
        m.release()


def test_death_of_an_owner_reaches_those_who_wait_for_many(root, start):
    def work(tell):
        Mutex.open("m").acquire()
        tell(1)
        signal.pause()

    m, never = Mutex("m"), Event("never")
    child = start(work)
    child.hear()
    join = in_thread(lambda: wait_any([never, m], 10))
    until(lambda: never.waiters == 1, "it waits")
    child.kill()
    done = join()
    assert done.index == 1 and done.abandoned == (m,)


def test_bad_lists(root):
    e = Event("e")
    for wait in (wait_any, wait_all):
        with pytest.raises(ValueError, match="1 to 64"):
            wait([])
        with pytest.raises(ValueError, match="1 to 64"):
            wait([Event() for _ in range(65)])
        with pytest.raises(errors.InvalidHandle):
            wait([e, "e"])
        with pytest.raises(ValueError, match="timeout"):
            wait([e], -1)
    e.set()
    with pytest.raises(ValueError, match="same object twice"):
        wait_all([e, Event.open("e")], 0)
    assert e.is_set()
    assert wait_any([e, e], 0).index == 0
    closed = Event("closed")
    closed.close()
    e.set()
    with pytest.raises(errors.ObjectClosed):
        wait_any([e, closed])
    assert e.is_set()


def test_sixty_four_of_all_kinds(root):
    objects = [[Event(), Semaphore(0, 1), Mutex(), WaitableTimer()][at % 4] for at in range(64)]
    mutexes = objects[2::4]
    for one in mutexes:
        one.acquire()
    join = in_thread(lambda: wait_all(objects, 10) and [one.release() for one in mutexes])
    until(lambda: objects[63].waiters == 1, "it waits")
    for one in objects:
        if isinstance(one, Mutex | Semaphore):
            one.release()
        elif isinstance(one, Event):
            one.set()
        else:
            one.set(0)
    join()
    assert wait_any(mutexes, 0).index == 0
    assert not any(one.is_set() for one in objects if isinstance(one, Event | WaitableTimer))


def test_pulse_reaches_multi_waits(root):
    auto, manual, never = Event("auto"), Event("manual", manual_reset=True), Event("never")
    for pulsed in (auto, manual):
        joins = [in_thread(lambda pulsed=pulsed: wait_any([never, pulsed], 10)) for _ in range(2)]
        until(lambda pulsed=pulsed: pulsed.waiters == 2, "two wait")
        pulsed.pulse()
        if pulsed is auto:
            until(lambda: auto.waiters == 1, "one is through")
            auto.pulse()
        assert [join().index for join in joins] == [1, 1]
        assert not pulsed.is_set()


def test_timer_ends_a_wait_for_many(root):
    timer, never = WaitableTimer("t"), Event("never")
    timer.set(0.05)
    assert wait_any([never, timer], 10).index == 1


def test_alert_and_ctrl_c(root, start):
    a, b = Event("a"), Event("b")
    join = in_thread(lambda: wait_any([a, b], alertable=True))
    until(lambda: b.waiters == 1, "it waits")
    alert(join.thread)
    with pytest.raises(errors.WaitInterrupted):
        join()

    def work(tell):
        try:
            wait_all([Event.open("a"), Event.open("b")])
        except KeyboardInterrupt:
            tell("interrupted")

    child = start(work)
    until(lambda: b.waiters == 1, "it waits")
    os.kill(child.pid, signal.SIGINT)
    assert child.hear() == "interrupted"


def test_signal_and_wait(root, start):
    def work(tell):
        for _ in range(500):
            signal_and_wait(Event.open("back"), Event.open("forth"), 10)
        tell("done")

    back, forth = Event("back"), Event("forth")
    child = start(work)
    for _ in range(500):
        back.wait(10)
        forth.set()
    assert child.hear() == "done"
    m, s, e = Mutex("m"), Semaphore(1, 1, "s"), Event("e", initially_set=True)
    with pytest.raises(errors.NotOwner):
        signal_and_wait(m, e)
    with pytest.raises(errors.TooManyPosts):
        signal_and_wait(s, e)
    with pytest.raises(errors.InvalidHandle):
        signal_and_wait(WaitableTimer(), e)
    assert e.is_set(), "no wait when the signal failed"
    m.acquire()
    assert signal_and_wait(m, e, 0).object is e
    assert m.state == "free"


def test_opposite_orders_do_not_deadlock(root, start):
    """Four strangers take overlapping sets in opposite orders, one of them through single waits."""

    def work(tell, names):
        objects = [Mutex.open(name) for name in names]
        for _ in range(150):
            wait_all(objects, 20)
            for one in objects:
                one.release()
        tell("done")

    keep = [Mutex(name) for name in "abc"]
    children = [start(work, names) for names in ("abc", "cba", "bc", "ca")]
    for _ in range(150):
        with keep[1]:
            pass
    assert [child.hear(60) for child in children] == ["done"] * 4


def test_wait_all_keeps_two_semaphores_equal_among_threads(root):
    a, b, stop = Semaphore(0, None, "a"), Semaphore(0, None, "b"), threading.Event()
    taken = [0]
    lock = threading.Lock()

    def work():
        while not stop.is_set():
            try:
                wait_all([b, a], 0.02)
            except errors.OperationTimeout:
                continue
            with lock:
                taken[0] += 1

    joins = [in_thread(work) for _ in range(3)]
    for _ in range(300):
        a.release()
        b.release()
    until(lambda: a.value == b.value == 0, "all taken")
    stop.set()
    for join in joins:
        join()
    assert taken == [300]


# ---- a model of Windows' rules ----

NAMES = ["m0", "m1", "s", "auto", "manual"]


class Model:
    """What Windows does, in one process and without time."""

    def __init__(self):
        self.owner = {"m0": None, "m1": None}
        self.depth = {"m0": 0, "m1": 0}
        self.died = {"m0": False, "m1": False}
        self.count = 1
        self.set = {"auto": False, "manual": False}

    def ready(self, name, who):
        if name in self.owner:
            return self.owner[name] in (None, who)
        return self.count > 0 if name == "s" else self.set[name]

    def take(self, name, who):
        """Whether it was abandoned."""
        if name == "s":
            self.count -= 1
        elif name == "auto":
            self.set[name] = False
        elif name in self.owner:
            self.owner[name] = who
            self.depth[name] += 1
            told, self.died[name] = self.died[name], False
            return told
        return False

    def wait(self, names, every, who):
        ready = [at for at, name in enumerate(names) if self.ready(name, who)]
        if every:
            if len(ready) < len(names):
                return None
            return 0, sorted(name for name in names if self.take(name, who))
        if not ready:
            return None
        return ready[0], [names[ready[0]]] if self.take(names[ready[0]], who) else []

    def signal(self, name, who):
        if name in self.owner:
            if self.owner[name] != who:
                return "NotOwner"
            self.depth[name] -= 1
            if self.depth[name] == 0:
                self.owner[name] = None
            return None
        if name == "s":
            if self.count == 3:
                return "TooManyPosts"
            self.count += 1
            return self.count - 1
        self.set[name] = True
        return None

    def dies(self, who):
        for name in self.owner:
            if self.owner[name] == who:
                self.owner[name], self.depth[name], self.died[name] = None, 0, True


class Worker:
    """A process that does what it is told, in one thread: it can be waiting while the test goes on."""

    def __init__(self):
        orders, to = os.pipe()
        back, answers = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(to)
                self.work(os.fdopen(orders, "rb"), os.fdopen(answers, "wb"))
            finally:
                os._exit(0)
        os.close(orders)
        os.close(answers)
        self.to, self.back = os.fdopen(to, "wb"), os.fdopen(back, "rb")

    def work(self, orders, answers):
        objects = {name: open_object(name) for name in NAMES}
        while True:
            verb, args = pickle.load(orders)
            try:
                answer = getattr(self, verb)(objects, *args)
            except errors.PortwayError as error:
                answer = None if isinstance(error, errors.OperationTimeout) else type(error).__name__
            pickle.dump(answer, answers)
            answers.flush()

    def wait(self, objects, names, every, timeout):
        done = (wait_all if every else wait_any)([objects[name] for name in names], timeout)
        return done.index, sorted(one.name for one in done.abandoned)

    def single(self, objects, name, timeout):
        one = objects[name]
        one.acquire(timeout) if isinstance(one, Mutex) else one.wait(timeout)
        return 0, [name] if isinstance(one, Mutex) and one.abandoned and name in told(one) else []

    def signal(self, objects, name):
        one = objects[name]
        return one.set() if isinstance(one, Event) else one.release()

    def reset(self, objects, name):
        return objects[name].reset()

    def order(self, verb, *args):
        pickle.dump((verb, args), self.to)
        self.to.flush()

    def answer(self):
        return pickle.load(self.back)

    def ask(self, verb, *args):
        self.order(verb, *args)
        return self.answer()

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.to.close()
        self.back.close()


def told(mutex):
    return [mutex.name] if mutex._count_for(0) == 1 else []


def open_object(name):
    if name in ("m0", "m1"):
        return Mutex(name)
    return Semaphore(1, 3, "s") if name == "s" else Event(name, manual_reset=name == "manual")


class Machine(RuleBasedStateMachine):
    """Workers 0 and 1 try without waiting; worker 2 waits, and must come through exactly when the model says so."""

    @initialize()
    def begin(self):
        self.path = f"/dev/shm/pwtest-{os.getpid()}-{os.urandom(4).hex()}"
        self.before = os.environ.get("PORTWAY_ROOT")
        os.environ["PORTWAY_ROOT"] = self.path
        self.objects = [open_object(name) for name in NAMES]
        self.model, self.blocked = Model(), None
        self.workers = [Worker() for _ in range(3)]
        self.ids = [0, 1, 2]

    def teardown(self):
        if hasattr(self, "workers"):
            for one in self.workers:
                one.kill()
            for one in self.objects:
                one.close()
            shutil.rmtree(self.path, ignore_errors=True)
            if self.before is None:
                del os.environ["PORTWAY_ROOT"]
            else:
                os.environ["PORTWAY_ROOT"] = self.before

    def settle(self):
        if self.blocked is not None:
            got = self.model.wait(*self.blocked, self.ids[2])
            if got is not None:
                assert self.workers[2].answer() == got
                self.blocked = None

    names = st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True)

    @rule(who=st.integers(0, 1), names=names, every=st.booleans())
    def attempt(self, who, names, every):
        assert self.workers[who].ask("wait", names, every, 0) == self.model.wait(names, every, self.ids[who])

    @rule(who=st.integers(0, 1), name=st.sampled_from(NAMES))
    def attempt_one(self, who, name):
        assert self.workers[who].ask("single", name, 0) == self.model.wait([name], False, self.ids[who])

    @rule(who=st.integers(0, 1), name=st.sampled_from(NAMES))
    def signal(self, who, name):
        assert self.workers[who].ask("signal", name) == self.model.signal(name, self.ids[who])
        self.settle()

    @rule(who=st.integers(0, 1), name=st.sampled_from(["auto", "manual"]))
    def reset(self, who, name):
        self.workers[who].ask("reset", name)
        self.model.set[name] = False

    @precondition(lambda self: self.blocked is None)
    @rule(names=names, every=st.booleans())
    def block(self, names, every):
        self.workers[2].order("wait", names, every, None)
        self.blocked = (names, every)
        self.settle()
        if self.blocked is not None:
            until(lambda: self.objects[NAMES.index(names[0])].waiters == 1, "it waits")

    @precondition(lambda self: self.blocked is None)
    @rule(name=st.sampled_from(NAMES))
    def signal_by_the_third(self, name):
        assert self.workers[2].ask("signal", name) == self.model.signal(name, self.ids[2])

    @rule(who=st.integers(0, 1))
    def kill(self, who):
        self.workers[who].kill()
        self.workers[who] = Worker()
        self.model.dies(self.ids[who])
        self.ids[who] = max(self.ids) + 1
        self.settle()


Machine.TestCase.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
test_model = pytest.mark.slow(Machine.TestCase)


def test_time_passes_no_faster_for_many(root):
    a, b = Event("a"), Event("b")
    for wait in (wait_any, wait_all):
        begun = time.monotonic()
        with pytest.raises(errors.OperationTimeout):
            wait([a, b], 0.05)
        assert time.monotonic() - begun >= 0.05
