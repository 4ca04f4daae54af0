"""The synchronisation objects in asyncio: tasks own, cancelling consumes nothing, threads are few."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

import portway
from portway import aio, errors

sys.path.insert(0, str(Path(__file__).parent / "kernel"))
from sync_world import files, in_thread, root, start, until

__all__ = ["root", "start"]


def run(work):
    return asyncio.run(asyncio.wait_for(work, 30))


async def eventually(condition, what):
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError(what)


def test_tasks_of_one_loop_exclude_each_other(root):
    async def main():
        mutex = aio.Mutex("m")
        inside, counter = [0], [0]

        async def work():
            for _ in range(50):
                async with mutex:
                    inside[0] += 1
                    assert inside[0] == 1
                    await asyncio.sleep(0)
                    counter[0] += 1
                    inside[0] -= 1

        await asyncio.gather(*(work() for _ in range(8)))
        assert counter == [400] and mutex.state == "free"

    run(main())
    assert not [one for one in threading.enumerate() if one.name == "portway-bells" and not one.daemon]


def test_recursion_not_owner_and_abandoned_by_task(root):
    async def main():
        mutex, other = aio.Mutex("m"), aio.Mutex("m")
        await mutex.acquire()
        await other.acquire()
        assert mutex.owned

        async def stranger():
            assert not mutex.owned
            with pytest.raises(errors.NotOwner):
                mutex.release()
            with pytest.raises(errors.OperationTimeout):
                await mutex.acquire(0)
            with pytest.raises(errors.OperationTimeout):
                await mutex.acquire(0.02)

        await asyncio.create_task(stranger())
        with pytest.raises(errors.OperationTimeout):
            in_thread(lambda: portway.Mutex("m").acquire(0))()
        mutex.release()
        other.release()
        with pytest.raises(errors.NotOwner):
            mutex.release()

        async def dies():
            await mutex.acquire()

        await asyncio.create_task(dies())
        await mutex.acquire(5)
        assert mutex.abandoned
        mutex.release()
        async with mutex:
            assert not mutex.abandoned

    run(main())


def test_a_task_killed_while_others_wait_tells_exactly_one(root):
    async def main():
        mutex, held = aio.Mutex("m"), asyncio.Event()

        async def owner():
            async with aio.Mutex("other"):
                await mutex.acquire()
                held.set()
                await asyncio.sleep(60)

        async def waiter():
            await mutex.acquire()
            told = mutex.abandoned
            mutex.release()
            return told

        task = asyncio.create_task(owner())
        await held.wait()
        waiters = [asyncio.create_task(waiter()) for _ in range(5)]
        await eventually(lambda: mutex.waiters == 5, "five wait")
        task.cancel()
        assert sum(await asyncio.gather(*waiters)) == 1

    run(main())


def test_death_of_another_process(root, start):
    def work(tell):
        portway.Mutex("m").acquire()
        tell("held")
        signal.pause()

    async def main():
        mutex = aio.Mutex("m")
        child = start(work)
        child.hear()
        task = asyncio.create_task(mutex.acquire())
        await eventually(lambda: mutex.waiters == 1, "it waits")
        child.kill()
        await task
        assert mutex.abandoned

    run(main())


def test_cancelling_consumes_nothing_and_costs_nobody_a_wakeup(root):
    async def main():
        event = aio.Event("e")
        for _ in range(50):
            first, second = (asyncio.create_task(event.wait()) for _ in range(2))
            await eventually(lambda: event.waiters == 2, "two wait")
            event.set()
            first.cancel()
            await second
            with pytest.raises(asyncio.CancelledError):
                await first
            assert not event.is_set()
            third = asyncio.create_task(event.wait())
            await eventually(lambda: event.waiters == 1, "one waits")
            third.cancel()
            await asyncio.gather(third, return_exceptions=True)
            event.set()
            assert event.is_set() and await event.wait(0)
        assert event.waiters == 0

    run(main())


def test_timeouts_lose_no_set(root, start):
    def work(tell):
        event, took = portway.Event.open("e"), portway.Event.open("took")
        for _ in range(200):
            event.set()
            took.wait(10)
        tell("done")

    async def main():
        event, took, taken = aio.Event("e"), aio.Event("took"), [0]
        child = start(work)

        async def impatient():
            while taken[0] < 200:
                try:
                    await event.wait(0.0005)
                except errors.OperationTimeout:
                    continue
                taken[0] += 1
                took.set()

        await asyncio.gather(*(impatient() for _ in range(4)))
        assert taken == [200] and child.hear() == "done"

    run(main())


def test_all_kinds_and_waits_for_many(root, start):
    async def main():
        e, m, s, t = aio.Event("e"), aio.Mutex("m"), aio.Semaphore(1, 2, "s"), aio.WaitableTimer("t")
        assert (await aio.wait_any([e, s], 1)).object is s
        t.set(0.02)
        assert (await aio.wait_any([e, t, s], 10)).index == 1
        task = asyncio.create_task(aio.wait_all([e, m, s], 10))
        await eventually(lambda: e.waiters == 1, "it waits")
        e.set()
        await asyncio.sleep(0)
        assert s.release() == 0
        done = await task
        assert done.object == [e, m, s] and done.abandoned == ()
        assert not e.is_set() and s.value == 0
        await eventually(lambda: m.state == "abandoned" or "PORTWAY_SYNC" in os.environ, "its task has ended with it")
        assert (await aio.wait_any([m], 5)).abandoned == (m,)
        m.release()
        with pytest.raises(errors.OperationTimeout):
            await aio.signal_and_wait(s, e, 0.01)
        assert s.value == 1
        with pytest.raises(ValueError, match="1 to 64"):
            await aio.wait_any([])
        with pytest.raises(errors.InvalidHandle):
            await aio.wait_any([7])

    run(main())


@pytest.mark.parametrize("manual", [True, False])
def test_pulse(root, manual):
    async def main():
        event = aio.Event("e", manual_reset=manual)
        tasks = [asyncio.create_task(event.wait(10)) for _ in range(3)]
        await eventually(lambda: event.waiters == 3, "three wait")
        event.pulse()
        if not manual:
            await eventually(lambda: event.waiters == 2, "one is through")
            event.pulse()
            event.pulse()
        await asyncio.gather(*tasks)
        assert not event.is_set()

    run(main())


@pytest.mark.parametrize("shared", [True, False])
def test_a_thousand_waiters_few_threads(root, shared):
    async def main():
        events = [aio.Event("one")] * 1000 if shared else [aio.Event() for _ in range(1000)]
        before = threading.active_count()
        tasks = [asyncio.create_task(one.wait()) for one in events]
        waiting = events[0] if shared else events[-1]
        await eventually(lambda: waiting.waiters == (1000 if shared else 1), "all wait")
        assert threading.active_count() - before <= 16
        for at, one in enumerate(events):
            one.set()
            if shared:
                await tasks[at]
        await asyncio.gather(*tasks)
        if not shared:
            for one in events:
                one.close()

    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1200:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    run(main())


def test_helpers_end_when_nobody_waits(root):
    async def main():
        event = aio.Event()
        task = asyncio.create_task(event.wait())
        await eventually(lambda: event.waiters == 1, "it waits")
        event.set()
        await task

    run(main())
    until(lambda: not any(one.name == "portway-bells" for one in threading.enumerate()), "the helper ends")


def test_threads_and_loops_mixed(root):
    """Several loops in threads, and threads without: one object, every unit taken once."""
    units, stop = portway.Semaphore(0, None, "s"), threading.Event()
    taken = [0] * 4

    def loop(at):
        async def main():
            mine = aio.Semaphore.open("s")
            while not stop.is_set():
                try:
                    await mine.wait(0.05)
                    taken[at] += 1
                except errors.OperationTimeout:
                    pass
            mine.close()

        asyncio.run(main())

    def plain(at):
        while not stop.is_set():
            try:
                units.wait(0.05)
                taken[at] += 1
            except errors.OperationTimeout:
                pass

    joins = [in_thread(lambda at=at: (loop if at % 2 else plain)(at)) for at in range(4)]
    for _ in range(400):
        units.release()
    until(lambda: sum(taken) == 400, "all taken")
    stop.set()
    for join in joins:
        join()
    units.close()
    assert not files(root)
