"""Whoever may write an object's page can spoil it, and nothing else: no crash, no hang, no wild write."""

from __future__ import annotations

import asyncio
import mmap
import os
import random
import resource
import signal
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sync_world import Process, in_thread, until

from portway import Event, Mutex, Semaphore, WaitableTimer, aio, errors, wait_all, wait_any
from portway.kernel.namespace import Namespace

ALLOWED = (errors.ObjectCorrupt, errors.OperationTimeout, errors.NotOwner, errors.TooManyPosts)
L_AT, S_AT = 0xFF8, 0xFE8


def page(one) -> mmap.mmap:
    with open(one.file.path, "r+b") as file:
        return mmap.mmap(file.fileno(), 0x5000)


def everything(mutex, semaphore, event, timer) -> None:
    """Each operation once, with short time limits; only our errors may come out."""
    calls = [
        lambda: mutex.acquire(0.01), mutex.release, lambda: semaphore.wait(0.01), semaphore.release, event.set,
        lambda: event.wait(0.01), event.pulse, event.reset, lambda: timer.set(0.001), lambda: timer.wait(0.01),
        timer.cancel, lambda: wait_any([event, semaphore, mutex, timer], 0.01), mutex.release,
        lambda: wait_all([event, semaphore, timer, mutex], 0.01), mutex.release,
        lambda: (mutex.state, semaphore.value, semaphore.waiters, event.is_set(), timer.due, timer.period),
        lambda: Namespace().list(),
    ]  # fmt: skip
    for call in calls:
        try:
            call()
        except ALLOWED:
            pass


def objects():
    return Mutex("m"), Semaphore(1, 5, "s"), Event("e"), WaitableTimer("t")


def scribble(data: mmap.mmap, what: bytes, at: int) -> None:
    data[at : at + len(what)] = what


def test_random_bytes_anywhere_but_the_stuck_lock(root):
    """L is left alone here: a foreign thread id there costs the 10 s of patience, see below."""

    @settings(max_examples=150, deadline=None)
    @given(st.integers(0x800, 0xFF0), st.binary(min_size=1, max_size=64), st.integers(0, 3))
    def spoil(at, what, which):
        made = objects()
        data = page(made[which])
        try:
            scribble(data, what[: L_AT - at], at)
            everything(*made)
        finally:
            data.close()
            for one in made:
                one.close()

    spoil()


@pytest.mark.parametrize("which", range(4))
def test_a_whole_page_of_noise(root, which):
    made = objects()
    with page(made[which]) as data:
        for seed in range(20):
            noise = random.Random(seed).randbytes(0x1000 - 0x800 - 8)
            scribble(data, noise, 0x800)
            everything(*made)
    for one in made:
        one.close()


def holder_of(*names):
    """A process that has these open, and whose id may stand in a lock."""

    def work(tell):
        made = [one for one in objects() if one.name in names]
        tell(len(made))
        signal.pause()

    child = Process(work)
    assert child.hear() == len(names)
    return child


@pytest.fixture
def stopped():
    child = holder_of("e", "m")
    yield child.pid.to_bytes(4, "little")
    child.close()


def test_a_stuck_internal_lock_is_an_error_in_time(root, stopped):
    event, mutex = Event("e"), Mutex("m")
    with page(event) as data, page(mutex) as other:
        scribble(data, stopped, L_AT)
        scribble(other, stopped, S_AT)
        with pytest.raises(errors.OperationTimeout):
            event.wait(0.05)
        with pytest.raises(errors.OperationTimeout):
            event.wait(0)
        with pytest.raises(errors.OperationTimeout):
            mutex.acquire(0.05)
        with pytest.raises(errors.OperationTimeout):
            wait_any([mutex, event], 0.05)
        scribble(data, bytes(4), L_AT)
        event.set()
        event.wait(0)


@pytest.mark.slow
def test_a_stuck_internal_lock_without_a_time_limit(root, stopped):
    event = Event("e")
    with page(event) as data:
        scribble(data, stopped, L_AT)
        begun = time.monotonic()
        with pytest.raises(errors.ObjectCorrupt, match="10 s"):
            event.set()
        assert time.monotonic() - begun < 15


def test_a_lock_of_somebody_who_has_not_the_object_open_is_nobodys(root):
    event, mutex = Event("e"), Mutex("m")
    with page(event) as data, page(mutex) as other:
        for nobody in (os.getppid(), 1, 0x1FFFFFFF):
            scribble(data, nobody.to_bytes(4, "little"), L_AT)
            event.set()
            event.wait(0)
            scribble(other, nobody.to_bytes(4, "little"), S_AT)
            mutex.acquire(5)
            assert mutex.abandoned
            mutex.release()


def test_a_forged_owner_or_death_gives_no_ownership_twice(root):
    mutex = Mutex("m")
    with page(mutex) as data:
        scribble(data, (0x40000000).to_bytes(4, "little"), S_AT)
        mutex.acquire(1)
        assert mutex.abandoned
        scribble(data, (12345678).to_bytes(4, "little"), S_AT)
        with pytest.raises(errors.ObjectCorrupt):
            mutex.release()
        with pytest.raises(errors.NotOwner):
            mutex.release()


def test_a_cut_file_is_an_error_not_a_crash(root, start):
    def work(tell):
        made = objects()
        for one in made:
            os.truncate(one.file.path, 0)
        with pytest.raises(errors.ObjectCorrupt):
            made[0].acquire(0.1)
        for call in (made[1].release, made[2].set, lambda: made[3].set(1), lambda: made[2].wait(0.1)):
            with pytest.raises(errors.ObjectCorrupt):
                call()
        for one in made:
            one.close()
        tell("alive")

    child = start(work)
    assert child.hear() == "alive"
    assert child.wait() == 0


@pytest.mark.parametrize("how", ["acquire", "wait_any", "poll", "asyncio"])
def test_a_cut_file_keeps_the_death_of_an_owner_from_nobody_else(root, start, how):
    """The kernel stops at the cut page when it marks what the killed process owned; the rest is found by asking."""

    def work(tell):
        mine, shared = Mutex("mine"), Mutex("shared")
        mine.acquire()
        shared.acquire()
        tell("both")
        signal.pause()

    child = start(work)
    assert child.hear() == "both"
    mine, shared = Mutex.open("mine"), Mutex.open("shared")
    with pytest.raises(errors.OperationTimeout):
        mine.acquire(0)
    os.truncate(shared.file.path, 0)
    child.kill()
    if how == "acquire":
        mine.acquire(5)
    elif how == "wait_any":
        assert wait_any([Event("never"), mine], 5).abandoned == (mine,)
    elif how == "poll":
        until(lambda: acquired(mine), "told")
    else:

        async def wait():
            async with aio.Mutex.open("mine") as one:
                return one.abandoned

        assert asyncio.run(wait())
        return
    assert mine.abandoned
    mine.release()


def acquired(mutex) -> bool:
    try:
        return mutex.acquire(0)
    except errors.OperationTimeout:
        return False


def test_a_process_that_owned_more_than_the_kernel_marks(root, start):
    def work(tell):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        keep = [Mutex(f"m{at}") for at in range(2100)]
        for one in keep:
            one.acquire()
        tell("all")
        signal.pause()

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard < 3000:
        pytest.skip("needs 3,000 descriptors")
    child = start(work)
    assert child.hear(30) == "all"
    some = [Mutex.open(f"m{at}") for at in (0, 1, 49, 60, 2099)]
    child.kill()
    for one in some:
        one.acquire(5)
        assert one.abandoned


def test_cut_under_a_waiter(root, start):
    event = Event("e")

    def work(tell):
        try:
            Event.open("e").wait(20)
        except errors.ObjectCorrupt:
            tell("corrupt")

    child = start(work)
    until(lambda: event.waiters == 1, "it waits")
    os.truncate(event.file.path, 0)
    assert child.hear() == "corrupt"


def test_cut_or_foreign_files_are_refused_at_open(root):
    keep = Event("e")
    os.truncate(keep.file.path, 0x2000)

    def other():
        with pytest.raises(errors.ObjectCorrupt):
            Event.open("e")

    child = Process(lambda tell: (keep.file.__setattr__("key", None), _fresh_open(tell)))
    try:
        assert child.hear() == "ObjectCorrupt"
    finally:
        child.close()


def _fresh_open(tell) -> None:
    from portway.kernel import namespace

    namespace._open.clear()  # as a process that has no handle yet
    try:
        Event.open("e")
    except errors.PortwayError as error:
        tell(type(error).__name__)


def test_redo_records_lead_nowhere(root):
    """A forged record with a dead owner: names, counts and values out of the page are followed to nothing."""
    made = objects()
    dead = 0x40000000
    for seed in range(40):
        noise = random.Random(seed)
        for one in made:
            with page(one) as data:
                scribble(data, noise.randbytes(0x420), 0x800)
                scribble(data, noise.randbytes(0x30), 0xE00)
                if seed % 2:  # "I am the coordinator"
                    scribble(data, bytes.fromhex(os.path.basename(one.file.path)), 0xE10)
                scribble(data, dead.to_bytes(4, "little"), L_AT)
        everything(*made)
    for one in made:
        one.close()


@pytest.mark.slow
def test_a_process_that_scribbles_over_live_objects(root):
    """Random words of all four pages are overwritten all the time while threads of two processes use them."""

    def vandal(tell):
        noise, pages = random.Random(7), [page(one) for one in objects()]
        tell("ready")
        while True:
            data = noise.choice(pages)
            at = noise.choice([0xFC0, 0xFC4, 0xFC8, 0xFD0, S_AT, 0xFEC, 0xE00, 0xE40, 0xE80, 0xE88])
            scribble(data, noise.choice([noise.randbytes(4), bytes(4), b"\xff" * 4]), at)
            time.sleep(0.0001)

    def user(tell):
        limit = time.monotonic() + 4
        made = objects()
        while time.monotonic() < limit:
            everything(*made)
        tell("unharmed")

    made = objects()
    spoiler = Process(vandal)
    users = [Process(user) for _ in range(2)]
    try:
        spoiler.hear()
        assert [one.hear(60) for one in users] == ["unharmed"] * 2
        assert [one.wait() for one in users] == [0, 0]
    finally:
        for one in (spoiler, *users):
            one.close()
    for one in made:
        one.close()


def test_closing_waiting_and_forking_in_any_order_does_not_crash(root, start):
    def work(tell):
        noise = random.Random(3)
        for _ in range(150):
            made = objects()
            joins = [in_thread(lambda one=one: quietly(one)) for one in made]
            for one in noise.sample(made, 4):
                one.close()
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            os.waitpid(pid, 0)
            for join in joins:
                join()
        tell("alive")

    assert start(work).hear(60) == "alive"


def quietly(one) -> None:
    try:
        one.acquire(0.005) if isinstance(one, Mutex) else one.wait(0.005)
    except (*ALLOWED, errors.ObjectClosed):
        pass


def test_a_stopped_process_does_not_stop_the_others(root, start):
    def work(tell):
        event = Event.open("e")
        tell("ready")
        while True:
            event.set()

    event = Event("e")
    for _ in range(20):
        child = start(work)
        child.hear()
        time.sleep(0.001)
        os.kill(child.pid, signal.SIGSTOP)
        try:
            event.wait(0.05)
        except errors.OperationTimeout:  # stopped just while it held the lock
            pass
        child.close()
        event.reset()
