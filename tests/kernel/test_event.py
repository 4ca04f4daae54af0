"""Event: auto and manual reset, set, reset, pulse."""

from __future__ import annotations

import os
import signal
import time

import pytest
from sync_world import in_thread, until

from portway import Event, alert, errors


def test_auto_reset_is_consumed_by_one_wait_and_sets_do_not_add_up(root):
    with Event("e") as event:
        event.set()
        event.set()
        assert event.is_set()
        assert event.wait(0)
        with pytest.raises(errors.OperationTimeout):
            event.wait(0)
        event.set()
        event.reset()
        with pytest.raises(errors.OperationTimeout):
            event.wait(0.01)


def test_manual_reset_stays_until_reset(root):
    with Event("e", manual_reset=True, initially_set=True) as event:
        assert event.manual_reset
        event.wait(0)
        event.wait(0)
        event.reset()
        assert not event.is_set()
        with pytest.raises(errors.OperationTimeout):
            event.wait(0)


def test_manual_wakes_all_auto_wakes_one(root, start):
    def work(tell, name):
        Event.open(name).wait()
        tell(os.getpid())

    with Event("manual", manual_reset=True) as manual, Event("auto") as auto:
        for event, name in ((manual, "manual"), (auto, "auto")):
            children = [start(work, name) for _ in range(4)]
            until(lambda event=event: event.waiters == 4, "four wait")
            event.set()
            if name == "auto":
                until(lambda: auto.waiters == 3, "one is through")
                assert not auto.is_set()
                for left in (2, 1, 0):
                    auto.set()
                    until(lambda left=left: auto.waiters == left, "the next one is through")
            assert [child.hear() for child in children] == [child.pid for child in children]
            assert [child.wait() for child in children] == [0] * 4


@pytest.mark.parametrize("manual", [True, False])
def test_pulse_releases_those_who_wait(root, manual):
    with Event("e", manual_reset=manual) as event:
        event.pulse()
        with pytest.raises(errors.OperationTimeout):
            event.wait(0)
        joins = [in_thread(lambda: event.wait(10)) for _ in range(3)]
        until(lambda: event.waiters == 3, "three wait")
        event.pulse()
        if not manual:
            until(lambda: event.waiters == 2, "one is through")
            event.pulse()
            event.pulse()
        assert [join() for join in joins] == [True] * 3
        assert not event.is_set()
        with pytest.raises(errors.OperationTimeout):
            event.wait(0)


def test_pulse_unsets(root):
    with Event("e", manual_reset=True, initially_set=True) as event:
        event.pulse()
        assert not event.is_set()


def test_two_pulses_at_once_release_two(root):
    with Event("e") as event:
        joins = [in_thread(lambda: event.wait(10)) for _ in range(3)]
        until(lambda: event.waiters == 3, "three wait")
        event.pulse()
        event.pulse()
        until(lambda: event.waiters == 1, "two are through")
        event.set()
        assert [join() for join in joins] == [True] * 3
        assert not event.is_set()


def test_ping_pong_between_processes(root, start):
    def work(tell):
        with Event.open("ping") as ping, Event.open("pong") as pong:
            for _ in range(3000):
                ping.wait()
                pong.set()

    with Event("ping") as ping, Event("pong") as pong:
        child = start(work)
        for _ in range(3000):
            ping.set()
            pong.wait(10)
        assert child.wait() == 0


def test_a_waiter_in_a_hurry_loses_no_set(root, start):
    """Short timeouts and sets at once: every set is taken exactly once or still there."""

    def work(tell):
        event, taken = Event.open("e"), 0
        stop = Event.open("stop")
        while not stop.is_set():
            try:
                event.wait(0.0002)
                taken += 1
                Event.open("took").set()
            except errors.OperationTimeout:
                pass
        tell(taken)

    with Event("e") as event, Event("took") as took, Event("stop", manual_reset=True) as stop:
        children = [start(work), start(work)]
        for _ in range(500):
            event.set()
            took.wait(10)
        stop.set()
        assert sum(child.hear() for child in children) == 500


def test_ctrl_c_and_alert(root, start):
    def work(tell):
        event = Event.open("e")
        try:
            event.wait()
        except KeyboardInterrupt:
            tell("interrupted")

    with Event("e") as event:
        child = start(work)
        until(lambda: event.waiters == 1, "it waits")
        os.kill(child.pid, signal.SIGINT)
        assert child.hear() == "interrupted"
        join = in_thread(lambda: event.wait(alertable=True))
        until(lambda: event.waiters == 1, "it waits")
        alert(join.thread)
        with pytest.raises(errors.WaitInterrupted):
            join()


def test_closing_what_another_thread_waits_for(root, start):
    event, other = Event("e"), Event("e")
    join = in_thread(lambda: event.wait(10))
    until(lambda: other.waiters == 1, "it waits")
    event.close()

    def work(tell):
        with Event.open("e") as mine:
            tell(mine.waiters)
            mine.set()

    assert start(work).hear() == 1
    assert join() is True
    with pytest.raises(errors.ObjectClosed):
        event.wait()


@pytest.mark.parametrize("kind", ["set", "wait"])
def test_many_threads_one_event(root, kind):
    """Every set is followed by its wait; no wake-up is lost among many threads."""
    with Event("a") as a, Event("b") as b:
        stop = time.monotonic() + 1.5

        def answer():
            while time.monotonic() < stop:
                try:
                    a.wait(0.05)
                    b.set()
                except errors.OperationTimeout:
                    pass

        joins = [in_thread(answer) for _ in range(4)]
        turns = 0
        while time.monotonic() < stop - 0.3:
            a.set()
            b.wait(5)
            turns += 1
        for join in joins:
            join()
        assert turns > 10
