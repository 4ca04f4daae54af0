"""WaitableTimer: one-shot, periodic, absolute, cancel; no process runs for it."""

from __future__ import annotations

import datetime
import os
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
