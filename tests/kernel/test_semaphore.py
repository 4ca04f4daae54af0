"""Semaphore: a count that is never lost and never exceeded."""

from __future__ import annotations

import pytest
from sync_world import in_thread, until

from portway import Event, Semaphore, errors


def test_counts_and_previous(root):
    one = Semaphore(2, 3, "s")
    one.wait(0)
    one.acquire(0)
    with pytest.raises(errors.OperationTimeout):
        one.wait(0)
    assert one.release() == 0
    assert one.release(2) == 1
    assert (one.value, one.maximum) == (3, 3)
    with one:
        assert one.value == 2
    assert one.value == 3


def test_above_the_maximum_nothing_changes(root):
    one = Semaphore(1, 3, "s")
    for count in (3, 4, 2**63, 10**30):
        with pytest.raises(errors.TooManyPosts, match="maximum of 3"):
            one.release(count)
        assert one.value == 1
    for count in (0, -1, 1.5):
        with pytest.raises(ValueError, match="count"):
            one.release(count)


@pytest.mark.parametrize(("initial", "maximum"), [(-1, 1), (2, 1), (0, 0), (0, -1), (0, 2**31), (2**40, None)])
def test_bad_counts(root, initial, maximum):
    with pytest.raises(ValueError, match="give"):
        Semaphore(initial, maximum)
    with pytest.raises(TypeError):
        Semaphore("name")


def test_previous_reads_zero_with_waiters_blocked(root):
    one = Semaphore(0, 9, "s")
    joins = [in_thread(lambda: one.wait(10)) for _ in range(3)]
    until(lambda: one.waiters == 3, "three wait")
    assert one.release(3) == 0
    assert [join() for join in joins] == [True] * 3
    assert one.value == 0


def test_every_unit_is_taken_once(root, start):
    def work(tell):
        units, taken = Semaphore.open("s"), 0
        stop = Event.open("stop")
        while True:
            try:
                units.wait(0.02)
                taken += 1
            except errors.OperationTimeout:
                if stop.is_set():
                    break
        tell(taken)

    one, stop = Semaphore(0, None, "s"), Event("stop", manual_reset=True)
    children = [start(work) for _ in range(3)]
    for count in range(1, 60):
        one.release(count)
    until(lambda: one.value == 0, "all taken")
    stop.set()
    assert sum(child.hear() for child in children) == sum(range(1, 60))


def test_as_a_pool_between_threads(root):
    one, inside, most = Semaphore(3, 3), [0], [0]

    def work():
        for _ in range(200):
            with one:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                inside[0] -= 1

    for join in [in_thread(work) for _ in range(6)]:
        join()
    assert one.value == 3 and most[0] <= 3
