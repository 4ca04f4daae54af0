"""Runs scenarios in children that end themselves at a crash point. Its own process loads the build with crash points.

A line in: ``scenario point skip stop``; a line out: ``killed``, ``done`` or the error. With a `stop` that is not ``-``
the child stops there first: ``stopped PID`` is answered, and the rest after somebody's SIGCONT. The argument, if there
is one, is the uid the children have.
"""

from __future__ import annotations

import os
import signal
import sys

from portway import Event, Mutex, Semaphore, WaitableTimer, errors, wait_all, wait_any
from portway._accel import sync as native


def mutex_alone():
    mutex = Mutex.open("m")
    mutex.acquire(0)
    mutex.acquire(0)
    mutex.release()
    mutex.release()


def mutex_contended():
    """Somebody else holds it until this one sleeps."""
    mutex = Mutex.open("m")
    mutex.acquire(20)
    mutex.release()


def mutex_freed_for_others():
    """The test waits for it in two processes."""
    mutex = Mutex.open("m")
    mutex.acquire(0)
    Event.open("held").set()
    keep = Event.open("go")
    keep.wait(20)
    mutex.release()


def event_set():
    Event.open("auto").set()


def set_after_timeout():
    """The word still says that somebody may sleep."""
    try:
        Event.open("auto").wait(0.001)
    except errors.OperationTimeout:
        Event.open("auto").set()


def manual_set():
    Event.open("manual").set()


def pulse():
    Event.open("manual").pulse()


def semaphore_release():
    Semaphore.open("s").release(2)


def take():
    Semaphore.open("s").wait(0)


def wait_for_event():
    Event.open("auto").wait(20)


def any_of_many():
    wait_any([Event.open("auto"), Semaphore.open("s"), Mutex.open("m")], 0)


def many_asleep():
    wait_any([Event.open("auto"), Event.open("never")], 20)


def timer_set():
    WaitableTimer.open("t").set(0)


def all_of_many():
    wait_all([Semaphore.open("s"), Semaphore.open("s2"), Mutex.open("m"), Event.open("auto")], 0)


def all_of_several_users():
    wait_all([Semaphore.open(r"Global\first"), Semaphore.open(r"Global\second"), Mutex.open(r"Global\mutex")], 0)


def all_local_and_global():
    wait_all([Semaphore.open("mine"), Semaphore.open(r"Global\first")], 0)


def all_with_two_mutexes():
    """The test takes the second one while it is stopped."""
    try:
        wait_all([Semaphore.open("s"), Mutex.open("m"), Mutex.open("m2"), Semaphore.open("s2")], 0)
    except errors.OperationTimeout:
        pass


def all_but_one():
    """All looked signalled, but the mutex is another's: nothing is taken."""
    try:
        wait_all([Semaphore.open("s"), Semaphore.open("s2"), Mutex.open("m")], 0)
    except errors.OperationTimeout:
        pass


def recover():
    """Looks at everything, as the next one does after a crash."""
    for one in (Semaphore.open("s"), Semaphore.open("s2"), Event.open("auto"), Mutex.open("m")):
        try:
            wait_any([one, Event.open("always")], 0)
        except errors.OperationTimeout:
            pass


def recover_singly():
    for name in ("s", "s2"):
        try:
            Semaphore.open(name).release(10**6)
        except errors.TooManyPosts:
            pass
    try:
        Mutex.open("m").acquire(0)
    except errors.OperationTimeout:
        pass


SCENARIOS = {name: work for name, work in list(globals().items()) if callable(work) and work.__module__ == __name__}


def main() -> None:
    for line in sys.stdin:
        name, point, skip, stop = line.split()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                if sys.argv[1:]:
                    os.setgroups([])
                    os.setresgid(*[int(sys.argv[1])] * 3)
                    os.setresuid(*[int(sys.argv[1])] * 3)
                native.crash_at(point.encode(), int(skip), b"" if stop == "-" else stop.encode())
                SCENARIOS[name]()
                native.crash_at(b"none")
                code = 0
            finally:
                os._exit(code)
        ended = os.waitpid(pid, os.WUNTRACED)[1]
        if os.WIFSTOPPED(ended):
            print("stopped", pid, flush=True)
            ended = os.waitpid(pid, 0)[1]
        status = os.waitstatus_to_exitcode(ended)
        print({0: "done", -signal.SIGKILL: "killed"}.get(status, f"ended {status}"), flush=True)


if __name__ == "__main__":
    main()
