"""Handles that are closed, threads that end and signals that come while something waits: no crash, no wedge, no lie."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest
from handoff_peers import descriptors
from sync_world import files, in_thread, until
from test_hostile_sync import L_AT, page, scribble, stopped

from portway import Event, Mutex, errors, wait_all, wait_any
from portway._accel import sync as native

__all__ = ["stopped"]
MULTI_AT = 0xFC4


def hold(tell, name):
    mutex = Mutex.open(name)
    mutex.acquire()
    tell("held")
    signal.pause()


def run(script: str, root: str, **env: str) -> str:
    """A script in an interpreter of its own, which a crash would end; what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PORTWAY_ROOT": root} | env, capture_output=True, text=True,
        timeout=30,
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout


CLOSED_UNDER_A_WAITER = """if True:
    import portway, threading, sys
    from portway.errors import ObjectClosed
    mutex, results = portway.Mutex.open("m"), []
    def wait():
        try:
            mutex.acquire(20)
            results.append("acquired")
        except ObjectClosed:
            results.append("closed")
        with portway.Mutex("another") as other:  # the thread's list of owned mutexes is whole
            results.append(other.owned)
    thread = threading.Thread(target=wait)
    thread.start()
    while mutex.waiters != 1: pass
    mutex.close()
    print("closed", flush=True)
    thread.join()
    print(*results)
"""


@pytest.mark.parametrize("end", ["release", "kill"])
@pytest.mark.parametrize("how", ["", "slices"])
def test_the_last_handle_is_closed_while_a_thread_waits_for_the_mutex(root, start, how, end):
    """It would own what nobody can release: the wait ends with ObjectClosed and the mutex goes to the next one."""
    mutex = Mutex("m")
    if end == "kill":
        holder = start(hold, "m")
        holder.hear()
    else:
        mutex.acquire()
    process = subprocess.Popen(
        [sys.executable, "-c", CLOSED_UNDER_A_WAITER], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PORTWAY_ROOT": root, "PORTWAY_SYNC": how},
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "closed\n"
        mutex.release() if end == "release" else holder.kill()
        assert process.stdout.read() == "closed True\n"
        assert process.wait(20) == 0
    finally:
        process.stdout.close()
        process.kill()
        process.wait()
    mutex.acquire(5)
    assert mutex.abandoned == (end == "kill"), "what the waiter was told is told to the next one"
    mutex.release()


def test_a_wait_goes_on_after_the_last_close_but_the_name_does_not(root, start):
    def work(tell):
        event = Event("e")
        join = in_thread(lambda: event.wait(20))
        until(lambda: event.waiters == 1, "it waits")
        again = Event.open("e")
        event.close()
        again.close()
        tell(files(root))
        with pytest.raises(errors.ObjectNotFound):
            Event.open("e")
        with Event("e") as fresh:
            tell(fresh.already_exists)
        tell("next")
        os._exit(0 if join.thread.is_alive() else 1)

    child = start(work)
    assert child.hear() == []
    assert child.hear() is False
    assert child.hear() == "next"
    assert child.wait() == 0


def test_another_process_still_reaches_who_waits_on_after_its_last_close(root, start):
    def work(tell):
        event = Event.open("e")
        join = in_thread(lambda: wait_any([event], 20))
        until(lambda: event.waiters == 1, "it waits")
        event.close()
        tell("closed")
        tell(join().index)
        until(lambda: len(files(root)) == 1, "it left")

    event = Event("e")
    child = start(work)
    assert child.hear() == "closed"
    assert event.waiters == 1
    event.set()
    assert child.hear() == 0
    assert child.wait() == 0
    event.close()
    assert not files(root)


@pytest.mark.parametrize("how", ["", "slices"])
def test_closed_by_another_thread_than_its_owners(root, how):
    """The owner ends later; nothing of the closed mutex is touched then, and the list of what it owns is whole."""
    script = """if True:
        import gc, portway, threading
        for turn in range(20):
            mutex, other = portway.Mutex("m"), portway.Mutex("other")
            held, go = threading.Event(), threading.Event()
            def own():
                mutex.acquire()
                held.set()
                go.wait()
                with other: pass
                other.acquire()
            thread = threading.Thread(target=own)
            thread.start()
            held.wait()
            mutex.close()
            go.set()
            thread.join()
            other.acquire(5)
            assert other.abandoned
            other.close()
        print("alive")
    """
    assert run(script, root, PORTWAY_SYNC=how) == "alive\n"


def test_an_owner_that_ends_after_the_last_close_leaves_nothing(root):
    """Its memory and descriptor are needed until then, and go by themselves."""
    mutex, held, go = Mutex("m"), threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: (mutex.acquire(), held.set(), go.wait()))
    thread.start()
    held.wait()
    before = set(descriptors())
    mutex.close()
    assert not files(root) and set(descriptors()) == before
    go.set()
    thread.join()
    until(lambda: len(descriptors()) == len(before) - 1, "its descriptor is closed")


def test_a_forked_child_does_not_keep_what_a_thread_of_its_parent_waited_for(root, start):
    def work(tell):
        event = Event("e")
        join = in_thread(lambda: event.wait(20))
        until(lambda: event.waiters == 1, "it waits")
        reads, writes = os.pipe()
        if os.fork() == 0:
            os.close(writes)
            event.close()
            tell("closed")
            os.read(reads, 1)  # until its parent ends
            os._exit(0)
        event.set()
        join()
        event.close()
        tell("left")
        signal.pause()

    child = start(work)
    assert {child.hear(), child.hear()} == {"closed", "left"}
    assert not files(root), "the child, which lives, is no holder"


def test_a_signal_handler_may_use_what_the_interrupted_wait_is_looking_at(root, start, stopped):
    """One object of a wait_all is locked by a process that is stopped: the others are not held meanwhile."""

    def work(tell):
        a, b = Event("a"), Event("e")
        signal.signal(signal.SIGUSR1, lambda *_: (a.set(), tell(a.is_set())))
        tell("ready")
        with pytest.raises(errors.OperationTimeout):
            wait_all([a, b], 3)
        tell("over")

    a, b = Event("a"), Event("e")
    with page(b) as data:
        scribble(data, stopped, L_AT)
        child = start(work)
        child.hear()
        until(lambda: data[L_AT + 3] & 0x80, "it waits for the lock")
        os.kill(child.pid, signal.SIGUSR1)
        assert child.hear(2) is True
        with in_time():
            a.reset()
            a.set()
        scribble(data, bytes(4), L_AT)
        assert child.hear() == "over"


class in_time:
    """What is done inside takes no lock that somebody holds: it would wait 10 s for that, then raise."""

    def __enter__(self):
        self.before = signal.signal(signal.SIGALRM, self.late)
        signal.setitimer(signal.ITIMER_REAL, 2)

    def late(self, *_):
        raise AssertionError("not in 2 s")

    def __exit__(self, *_):
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.before)


def test_a_place_among_the_holders_that_is_given_anew_hides_nobody(root, start):
    """The kernel names the locks of a file in the order they came, not by place."""

    def work(tell):
        event = Event("e")
        tell(os.getpid())
        event.wait(30)
        tell("through")

    first = start(work)
    first.hear()
    others = [start(work) for _ in range(3)]
    for one in others:
        one.hear()
    event = Event("e")
    until(lambda: event.waiters == 4, "all wait")
    first.kill()
    others.append(start(work))  # takes the place of the first
    others[-1].hear()
    until(lambda: event.waiters == 4, "all are counted")
    assert {one.pid for one in event.file.holders()} == {os.getpid(), *(one.pid for one in others)}
    for left in (3, 2, 1, 0):
        event.pulse()
        until(lambda left=left: event.waiters == left, "each pulse lets one through")
    assert [one.hear() for one in others] == ["through"] * 4


def test_an_owner_in_such_a_place_is_no_dead_one(root, start):
    def work(tell, owns):
        mutex = Mutex("m")
        if owns:
            mutex.acquire()
        tell("ready")
        signal.pause()

    children = [start(work, False) for _ in range(3)]
    for one in children:
        one.hear()
    mutex = Mutex.open("m")
    children[0].kill()
    assert start(work, True).hear() == "ready"
    for timeout in (0, 0.3, 0.6):
        with pytest.raises(errors.OperationTimeout):
            mutex.acquire(timeout)


@pytest.mark.parametrize("manual", [True, False])
def test_a_reset_takes_nothing_from_those_whom_the_set_released(root, start, manual):
    """On Windows a set releases who waits at once; a reset right after it comes too late for them."""

    def work(tell):
        Event.open("e").wait(20)
        tell("through")

    event = Event("e", manual_reset=manual)
    for _ in range(50):
        children = [start(work) for _ in range(2 if manual else 1)]
        until(lambda: event.waiters == len(children), "they wait")  # noqa: B023
        event.set()
        event.reset()
        assert not event.is_set()
        assert [child.hear() for child in children] == ["through"] * len(children)
        for child in children:
            child.close()
    with pytest.raises(errors.OperationTimeout):
        event.wait(0)


def test_a_release_rings_no_bell_that_nobody_hears(root):
    """A wait for several objects leaves no cost behind for every later release of the mutex."""
    mutex, never = Mutex("m"), Event("never")
    mutex.acquire()
    for wait in (wait_any, wait_all):
        with pytest.raises(errors.OperationTimeout):
            in_thread(lambda wait=wait: wait([mutex, never], 0.01))()
    mutex.release()
    with page(mutex) as data:
        assert data[MULTI_AT : MULTI_AT + 4] == bytes(4)


def test_faulthandler_enabled_after_the_import_costs_no_protection(root):
    script = """if True:
        import faulthandler, os, portway
        with portway.Event("before"): pass
        faulthandler.enable()
        event = portway.Event("e")
        os.truncate(event.file.path, 0)
        try:
            event.set()
        except portway.errors.ObjectCorrupt:
            print("told")
    """
    assert run(script, root) == "told\n"


def test_space_is_allocated_through_signals(tmp_path):
    ticks = []
    before = signal.signal(signal.SIGALRM, lambda *_: ticks.append(1))
    path = f"/dev/shm/pwtest-{os.getpid()}-space"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
        native.allocate(fd, 0, 200 << 20)
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert os.fstat(fd).st_blocks * 512 >= 200 << 20
        assert ticks
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        os.close(fd)
        os.unlink(path)


def test_all_kinds_closed_under_many_waits_of_many_threads(root):
    script = """if True:
        import portway, random, threading
        noise = random.Random(4)
        for turn in range(60):
            made = [portway.Mutex("m"), portway.Semaphore(0, 9, "s"), portway.Event("e"), portway.WaitableTimer("t")]
            taken = threading.Event()
            owner = threading.Thread(target=lambda: (made[0].acquire(), taken.set()))
            owner.start()
            taken.wait()
            def wait(at):
                try:
                    if at == 4: portway.wait_any(made, 0.01)
                    elif at == 5: portway.wait_all(made, 0.01)
                    elif at == 0: made[0].acquire(0.01)
                    else: made[at].wait(0.01)
                except portway.errors.PortwayError: pass
            threads = [threading.Thread(target=wait, args=(at % 6,)) for at in range(12)]
            for one in threads: one.start()
            for one in noise.sample(made, 4): one.close()
            for one in (*threads, owner): one.join()
        print("alive")
    """
    assert run(script, root) == "alive\n"
    assert not files(root)


