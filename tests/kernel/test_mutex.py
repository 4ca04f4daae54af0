"""Mutex: owned by a thread, recursive, and never lost with its owner."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from sync_world import files, in_thread, until

from portway import Event, Mutex, alert, errors
from portway._accel import sync as native
from portway.kernel.namespace import Namespace

ROBUST = "slices" not in native.fallbacks()


def hold(tell, name="m", times=1):
    mutex = Mutex(name)
    for _ in range(times):
        mutex.acquire()
    tell("held")
    signal.pause()


def test_recursion_needs_as_many_releases(root):
    mutex = Mutex("m")
    for _ in range(3):
        assert mutex.acquire(0)
    other = Mutex("m")
    with other:
        assert mutex.owned and other.owned
    for _ in range(3):
        with pytest.raises(errors.OperationTimeout):
            in_thread(lambda: mutex.acquire(0))()
        mutex.release()
    assert mutex.state == "free"
    with pytest.raises(errors.NotOwner):
        mutex.release()


def test_release_by_another_thread_or_process_is_refused_and_changes_nothing(root, start):
    mutex = Mutex("m")
    mutex.acquire()
    for_others = Mutex("m")
    with pytest.raises(errors.NotOwner):
        in_thread(for_others.release)()

    def work(tell):
        try:
            Mutex("m").release()
        except errors.NotOwner:
            tell("refused")

    assert start(work).hear() == "refused"
    assert mutex.state == "held" and mutex.owned
    mutex.release()


def test_excludes_processes(root, start):
    shared = Event("go", manual_reset=True)
    path = root + "/counter"
    with open(path, "w") as file:
        file.write("0")

    def work(tell):
        mutex = Mutex("m")
        shared.wait()
        for _ in range(300):
            with mutex:
                with open(path) as file:
                    value = int(file.read())
                with open(path, "w") as file:
                    file.write(str(value + 1))

    children = [start(work) for _ in range(4)]
    shared.set()
    assert [one.wait() for one in children] == [0] * 4
    with open(path) as file:
        assert file.read() == "1200"


def test_threads_of_processes_mixed(root, start):
    """Each count is lost if two are ever inside at once."""
    counter = [0]
    mutex = Mutex("m")

    def add():
        for _ in range(2000):
            mutex.acquire()
            value = counter[0]
            if value % 7 == 0:
                time.sleep(0)
            counter[0] = value + 1
            mutex.release()

    def work(tell):
        tell(0)
        while True:
            with mutex:
                pass

    disturbing = start(work)
    disturbing.hear()
    for join in [in_thread(add) for _ in range(4)]:
        join()
    assert counter == [8000]


def test_abandoned_by_kill_is_told_to_exactly_one(root, start):
    mutex = Mutex("m")
    child = start(hold, "m", 5)
    child.hear()
    assert mutex.state == "held"
    waiters = [in_thread(lambda: take(Mutex("m"))) for _ in range(4)]
    until(lambda: mutex.waiters == 4, "four wait")
    child.kill()
    assert sorted(join() for join in waiters) == [False, False, False, True]
    with mutex:
        assert not mutex.abandoned


def take(mutex):
    mutex.acquire(10)
    told = mutex.abandoned
    assert native.Mutex.state.__get__(mutex) == "held"
    mutex.release()
    return told


def test_abandoned_when_nobody_waited(root, start):
    mutex = Mutex("m")
    child = start(hold)
    child.hear()
    child.kill()
    if ROBUST:
        assert mutex.state == "abandoned"
    mutex.acquire(0)
    assert mutex.abandoned
    mutex.acquire(0)
    assert mutex.abandoned, "a recursion changes nothing"
    mutex.release()
    mutex.release()
    with mutex:
        assert not mutex.abandoned


def test_abandoned_by_the_end_of_a_thread(root):
    mutex = Mutex("m")
    in_thread(mutex.acquire)()
    mutex.acquire(5)
    assert mutex.abandoned
    mutex.release()


def test_abandoned_by_exit_without_release(root):
    mutex = Mutex("m")
    code = "import portway; portway.Mutex('m').acquire()"  # collected at once: the process's last handle
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20)
    mutex.acquire(5)
    assert mutex.abandoned
    mutex.release()


def test_last_close_by_the_owner_abandons(root, start):
    def work(tell):
        go.wait()
        mutex = Mutex("m")
        mutex.acquire()
        mutex.close()
        tell("closed")
        signal.pause()

    go = Event("go")
    child = start(work)  # before the mutex: a fork child would have a second handle on it
    mutex = Mutex("m")
    go.set()
    child.hear()
    mutex.acquire(5)
    assert mutex.abandoned


def test_closed_in_another_thread_the_owner_keeps_it_until_its_end(root, start):
    def work(tell):
        mutex = Mutex("m")
        go = threading.Event()
        thread = threading.Thread(target=lambda: (mutex.acquire(), tell("held"), go.wait()))
        thread.start()
        mutex.close() if Event("closing").wait() else None
        gc.collect()
        tell("closed")
        Event("end").wait()
        go.set()
        thread.join()
        tell("ended")
        signal.pause()

    closing, end = Event("closing"), Event("end")
    child = start(work)
    assert child.hear() == "held"
    mutex = Mutex.open("m")  # only now: a fork child would have a second handle on it
    closing.set()
    assert child.hear() == "closed"
    for timeout in (0, 0.4, 0.8):
        with pytest.raises(errors.OperationTimeout):
            mutex.acquire(timeout)
    end.set()
    assert child.hear() == "ended"
    mutex.acquire(5)
    assert mutex.abandoned


def test_fork_child_owns_nothing(root, start):
    mutex = Mutex("m")
    mutex.acquire()

    def work(tell):
        try:
            mutex.release()
        except errors.NotOwner:
            tell("not mine")
        try:
            mutex.acquire(0)
        except errors.OperationTimeout:
            tell("held")
        mutex.acquire(10)
        tell(mutex.abandoned)

    child = start(work)
    assert (child.hear(), child.hear()) == ("not mine", "held")
    mutex.release()
    assert child.hear() is False
    assert child.wait() == 0
    mutex.acquire(5)
    assert mutex.abandoned, "the child ended with it"


def test_initially_owned_only_when_created(root, start):
    mine = Mutex("m", initially_owned=True)
    assert mine.owned and not mine.already_exists

    def work(tell):
        other = Mutex("m", initially_owned=True)
        tell((other.already_exists, other.owned))

    assert start(work).hear() == (True, False)
    mine.release()
    with pytest.raises(errors.NotOwner):
        mine.release()


def test_timeouts(root, start):
    child = start(hold)
    child.hear()
    mutex = Mutex("m")
    for timeout in (0, 0.01, 0.1):
        with pytest.raises(errors.OperationTimeout, match="'m'"):
            mutex.acquire(timeout)
    for bad in (-1, float("nan")):
        with pytest.raises(ValueError, match="timeout"):
            mutex.acquire(bad)
    assert mutex.waiters == 0
    child.kill()
    mutex.acquire(5)
    mutex.release()
    mutex.close()
    with pytest.raises(errors.ObjectClosed):
        mutex.acquire()
    with pytest.raises(errors.ObjectClosed):
        mutex.release()


def test_alert_ends_alertable_waits_only(root, start):
    child = start(hold)
    child.hear()
    mutex = Mutex("m")
    join = in_thread(lambda: mutex.acquire(alertable=True))
    until(lambda: mutex.waiters == 1, "it waits")
    alert(join.thread)
    with pytest.raises(errors.WaitInterrupted):
        join()
    with pytest.raises(errors.ObjectNotFound):
        alert(join.thread)
    with pytest.raises(errors.ObjectNotFound):
        alert(1)
    alert(threading.main_thread().ident)
    with pytest.raises(errors.OperationTimeout):
        mutex.acquire(0.05)
    with pytest.raises(errors.WaitInterrupted):
        mutex.acquire(5, alertable=True)
    with pytest.raises(errors.OperationTimeout):
        mutex.acquire(0.05, alertable=True)


def test_ctrl_c_ends_the_wait_and_costs_nothing(root, start):
    holder = start(hold)
    holder.hear()

    def work(tell):
        mutex = Mutex("m")
        try:
            mutex.acquire()
        except KeyboardInterrupt:
            tell(time.monotonic())

    mutex = Mutex("m")
    for _ in range(20):
        child = start(work)
        until(lambda: mutex.waiters == 1, "it waits")
        sent = time.monotonic()
        os.kill(child.pid, signal.SIGINT)
        assert child.hear() - sent < 1
        assert child.wait() == 0
        assert mutex.waiters == 0
    holder.kill()
    mutex.acquire(5)


def test_signal_handler_may_use_other_objects(root, start):
    def work(tell):
        inner, event = Mutex("inner"), Event("e")
        signal.signal(signal.SIGUSR1, lambda *_: (inner.acquire(), inner.release(), event.set()))
        Mutex("m").acquire(10)
        tell("got it")

    outer, event = Mutex("m"), Event("e")
    outer.acquire()
    child = start(work)
    until(lambda: outer.waiters == 1, "it waits")
    os.kill(child.pid, signal.SIGUSR1)
    event.wait(10)
    outer.release()
    assert child.hear() == "got it"


def test_mixed_with_glibc_robust_mutexes(root, start):
    """Other users of the thread's robust list live with ours, in any order of locking and releasing."""
    import ctypes

    def work(tell):
        libc = ctypes.CDLL(None)
        attribute = ctypes.create_string_buffer(8)
        libc.pthread_mutexattr_init(attribute)
        libc.pthread_mutexattr_setrobust(attribute, 1)
        theirs = [ctypes.create_string_buffer(48) for _ in range(3)]
        for one in theirs:
            libc.pthread_mutex_init(one, attribute)
        ours = [Mutex(f"m{at}") for at in range(3)]
        for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)) * 50:
            for at in range(3):
                ours[at].acquire()
                assert libc.pthread_mutex_lock(theirs[at]) == 0
            for at in order:
                assert libc.pthread_mutex_unlock(theirs[at]) == 0
                ours[order[at]].release()
        for at in range(3):
            ours[at].acquire()
            libc.pthread_mutex_lock(theirs[at])
        ours[1].release()
        libc.pthread_mutex_unlock(theirs[2])
        tell("done")
        signal.pause()

    ours = [Mutex(f"m{at}") for at in range(3)]
    child = start(work)
    assert child.hear() == "done"
    child.kill()
    told = []
    for one in ours:
        one.acquire(5)
        told.append(one.abandoned)
    assert told == [True, False, True]


@pytest.mark.slow
def test_killed_holders_at_random(root, start):
    """Two strangers fight for it and are killed at random points; the test always gets it, told or not, never twice."""

    def work(tell):
        mutex = Mutex("m")
        while True:
            mutex.acquire()
            mutex.release()

    mutex = Mutex("m")
    for turn in range(150):
        children = [start(work), start(work)]
        for _ in range(turn % 7):
            with mutex:
                pass
        os.kill(children[0].pid, signal.SIGKILL)
        for child in children:
            mutex.acquire(5)
            mutex.release()
            child.close()
        mutex.acquire(5)
        mutex.release()
    mutex.close()
    Namespace().list()
    assert not files(root)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_two_pid_namespaces_do_not_mistake_each_other(root):
    """The same thread ids on both sides: nobody takes the other's mutex for its own, nor marks it when it dies."""
    script = """if True:
        import os, sys, portway, signal
        mutex = portway.Mutex("m")
        assert os.getpid() == 1
        ready, go = portway.Event("ready"), portway.Event("go")
        if sys.argv[1] == "hold":
            mutex.acquire()
            ready.set()
            go.wait()
            assert mutex.owned
            mutex.release()
        else:
            try:
                mutex.release()
            except portway.errors.NotOwner:
                pass
            try:
                mutex.acquire(0.1)
            except portway.errors.OperationTimeout:
                ready.set()
            mutex.acquire()
    """
    mutex, ready, go = Mutex("m"), Event("ready"), Event("go")
    command = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c", script]
    holder = subprocess.Popen([*command, "hold"])
    waiter = None
    try:
        ready.wait(20)
        waiter = subprocess.Popen([*command, "wait"])
        ready.wait(20)
        until(lambda: mutex.waiters == 1, "the other waits")
        waiter.kill()  # while it waits for a word that holds "its" thread id in the other namespace
        waiter.wait()
        until(lambda: mutex.waiters == 0, "it is gone")
        with pytest.raises(errors.OperationTimeout):
            mutex.acquire(0.2)
        go.set()
        assert holder.wait(20) == 0
        mutex.acquire(5)
        assert not mutex.abandoned
    finally:
        for process in (holder, waiter):
            if process is not None:
                process.kill()
                process.wait()
