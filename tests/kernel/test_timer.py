"""WaitableTimer: one-shot, periodic, absolute, cancel; no process runs for it."""

from __future__ import annotations

import datetime
import glob
import os
import subprocess
import sys
import time

import pytest
from sync_world import in_thread, until

from portway import WaitableTimer, errors


def test_one_shot_auto(root):
    with WaitableTimer("t") as timer:
        assert timer.due is None and not timer.is_set()
        timer.set(0)
        assert timer.is_set() and timer.due == 0
        timer.wait(0)
        assert timer.due is None
        with pytest.raises(errors.OperationTimeout):
            timer.wait(0)


def test_manual_stays_until_set_again(root):
    with WaitableTimer("t", manual_reset=True) as timer:
        timer.set(0)
        timer.wait(0)
        timer.wait(0)
        timer.set(60)
        with pytest.raises(errors.OperationTimeout):
            timer.wait(0)


def test_fires_without_anybody_running(root, start):
    def work(tell):
        with WaitableTimer.open("t") as timer:
            timer.set(0.05)

    with WaitableTimer("t") as timer:
        assert start(work).wait() == 0
        timer.wait(10)


def test_never_before_its_time(root):
    with WaitableTimer() as timer:
        for due in (0.001, 0.03, 0.06):
            begun = time.monotonic()
            timer.set(due)
            timer.wait(10)
            assert time.monotonic() - begun >= due


def test_periodic_ticks_collapse(root):
    with WaitableTimer() as timer:
        timer.set(0, period=0.02)
        assert timer.period == 0.02
        until(lambda: timer.due == 0, "due")
        timer.wait(0)
        timer.wait(10)
        until_due = timer.due
        assert until_due is not None and until_due <= 0.02
        begun = time.monotonic()
        until(lambda: time.monotonic() - begun > 0.1, "five ticks go by")
        timer.wait(0)
        assert timer.due is not None and timer.due <= 0.02, "five ticks were one"
        timer.cancel()


def test_set_again_wakes_who_waits_for_the_old_time(root, start):
    def work(tell):
        with WaitableTimer.open("t") as timer:
            timer.wait(20)
            tell("fired")

    with WaitableTimer("t") as timer:
        timer.set(3600)
        child = start(work)
        until(lambda: timer.waiters == 1, "it waits")
        timer.set(0.01)
        assert child.hear() == "fired"


def test_cancel_keeps_the_signalled_state(root):
    with WaitableTimer() as timer:
        timer.cancel()
        timer.set(0, period=60)
        timer.cancel()
        assert timer.is_set() and timer.period == 0
        timer.wait(0)
        timer.set(60)
        timer.cancel()
        assert timer.due is None


def test_absolute(root):
    with WaitableTimer() as timer:
        timer.set(datetime.datetime.now() - datetime.timedelta(days=1))
        timer.wait(0)
        timer.set(datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=0.05))
        assert not timer.is_set()
        timer.wait(10)
        timer.set(datetime.datetime(1950, 1, 1))
        timer.wait(0)


FAKETIME = next(iter(glob.glob("/usr/lib/*/faketime/libfaketime.so.1")), "")
CLOCK_IS_SET = """if True:
    import asyncio, datetime, os, portway, portway.aio, threading
    def set_clock(offset):  # of this process alone: whatever asks the C library for the wall clock's time
        with open(os.environ["FAKETIME_TIMESTAMP_FILE"] + ".new", "w") as file:
            file.write(offset)
        os.replace(file.name, os.environ["FAKETIME_TIMESTAMP_FILE"])
    hour = datetime.timedelta(hours=1)
    timer, relative = portway.WaitableTimer("t", manual_reset=True), portway.WaitableTimer()
    never = portway.Event()

    def ended_by_the_clock(wait):
        timer.set(datetime.datetime.now() + hour)
        relative.set(3000)
        thread = threading.Thread(target=wait)
        thread.start()
        while timer.waiters != 1:
            pass
        set_clock("+3601")
        thread.join()
        assert timer.is_set() and timer.due == 0 and 2900 < relative.due <= 3000
        set_clock("+0")
        assert not timer.is_set() and 3500 < timer.due <= 3600, "back again"

    ended_by_the_clock(lambda: timer.wait(20))
    ended_by_the_clock(lambda: portway.wait_any([never, timer], 20))
    ended_by_the_clock(lambda: portway.wait_all([timer], 20))
    ended_by_the_clock(lambda: asyncio.run(portway.aio.WaitableTimer.open("t").wait(20)))

    timer.set(datetime.datetime.now() + datetime.timedelta(seconds=0.3))
    set_clock("-3600")
    try:
        timer.wait(0.6)
        print("did not follow the clock back")
    except portway.errors.OperationTimeout:
        print("followed", round(timer.due / 60))
"""


@pytest.mark.skipif(not FAKETIME, reason="libfaketime is not installed: apt-get install libfaketime")
def test_absolute_follows_a_wall_clock_that_is_set(root, tmp_path):
    """The clock is set for one process only, by libfaketime; monotonic time goes on."""
    path = tmp_path / "offset"
    path.write_text("+0")
    env = {"LD_PRELOAD": FAKETIME, "FAKETIME_TIMESTAMP_FILE": str(path), "FAKETIME_NO_CACHE": "1"}
    env |= os.environ | {"FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1"}
    done = subprocess.run([sys.executable, "-c", CLOCK_IS_SET], env=env, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("followed 60\n", "")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.skipif("PORTWAY_SET_CLOCK" not in os.environ, reason="sets the clock: PORTWAY_SET_CLOCK=1 allows")
def test_absolute_follows_the_wall_clock(root):
    with WaitableTimer() as timer:
        timer.set(datetime.datetime.now() + datetime.timedelta(hours=1))
        join = in_thread(lambda: timer.wait(10))
        until(lambda: timer.waiters == 1, "it waits")
        before = time.clock_gettime(time.CLOCK_REALTIME)
        time.clock_settime(time.CLOCK_REALTIME, before + 3600)
        try:
            assert join()
        finally:
            time.clock_settime(time.CLOCK_REALTIME, time.clock_gettime(time.CLOCK_REALTIME) - 3600)


@pytest.mark.parametrize("due", [-1, float("nan"), float("inf"), 1e12])
def test_bad_times(root, due):
    with WaitableTimer() as timer:
        with pytest.raises(ValueError, match="due"):
            timer.set(due)
        with pytest.raises(ValueError, match="period"):
            timer.set(0, due)
        assert timer.due is None


def test_one_tick_for_one_of_many(root):
    with WaitableTimer() as timer:
        joins = [in_thread(lambda: timer.wait(10)) for _ in range(3)]
        until(lambda: timer.waiters == 3, "three wait")
        for left in (2, 1, 0):
            timer.set(0.005)
            until(lambda left=left: timer.waiters == left, "one is through")
            assert timer.due is None
        assert [join() for join in joins] == [True] * 3
