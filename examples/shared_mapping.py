"""Two processes count in the same memory; one is killed in the middle of it, and the other is told and goes on.

    python examples/shared_mapping.py
"""

from __future__ import annotations

import multiprocessing
import os
import signal

import portway

ROUNDS = 10_000


def count(mapping: portway.FileMapping, mutex: portway.Mutex, ready: portway.Event | None) -> None:
    with mapping, mapping.view() as view:
        numbers = memoryview(view).cast("q")  # the same memory, as 64-bit numbers
        for _ in range(ROUNDS):
            with mutex:
                numbers[0] += 1  # two writes that belong together
                if ready is not None and numbers[0] > ROUNDS // 2:
                    ready.set()
                    signal.pause()  # killed here, between them
                numbers[1] += 1
        numbers.release()


def main() -> None:
    context = multiprocessing.get_context("spawn")
    with portway.FileMapping.create(None, 4096) as mapping, mapping.view() as view, portway.Event() as ready:
        mutex = portway.Mutex()  # unnamed: the handles travel as arguments
        process = context.Process(target=count, args=(mapping, mutex, ready))
        process.start()
        ready.wait(30)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        with mutex as owner:
            first, second = (int.from_bytes(view[at : at + 8], "little") for at in (0, 8))
            print(f"told that the owner died: {owner.abandoned}; the numbers are {first} and {second}")
            view[8:16] = view[0:8]  # whole again
        count(mapping, mutex, None)
        first, second = (int.from_bytes(view[at : at + 8], "little") for at in (0, 8))
        print(f"at the end: {first} and {second}, {'the same' if first == second else 'TORN'}")
        mutex.close()


if __name__ == "__main__":
    main()
