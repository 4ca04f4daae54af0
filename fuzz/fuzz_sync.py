"""Pages of synchronisation objects from outside: any bytes end in an error of ours or in nothing.

    python fuzz/fuzz_sync.py [-max_total_time=60]     with atheris
    python fuzz/fuzz_sync.py --smoke | --seconds 60   without: random pages
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import time

ROOT = f"/dev/shm/portway-fuzz-{os.getpid()}"
os.environ["PORTWAY_ROOT"] = ROOT

import portway  # noqa: E402
from portway import errors  # noqa: E402
from portway.kernel.namespace import Namespace, parse_name  # noqa: E402

EXPECTED = (errors.ObjectCorrupt, errors.OperationTimeout, errors.NotOwner, errors.TooManyPosts)
LOCK_AT = 0xFF8


def objects():
    return portway.Mutex("m"), portway.Semaphore(1, 5, "s"), portway.Event("e"), portway.WaitableTimer("t")


def use(mutex, semaphore, event, timer) -> None:
    for call in (
        lambda: mutex.acquire(0), mutex.release, lambda: semaphore.wait(0), semaphore.release, event.set, event.pulse,
        lambda: event.wait(0), lambda: timer.set(0), lambda: timer.wait(0), timer.cancel,
        lambda: portway.wait_any([event, semaphore, mutex, timer], 0), mutex.release,
        lambda: portway.wait_all([timer, event, semaphore, mutex], 0), mutex.release,
        lambda: (mutex.state, semaphore.value, event.is_set(), timer.due), Namespace().list,
    ):  # fmt: skip
        try:
            call()
        except EXPECTED:
            pass


def one_input(data: bytes) -> None:
    """First byte: which object; two bytes: where from 0x000 on; the rest is written there, the lock excepted."""
    if len(data) < 4:
        return
    try:
        parse_name(data.decode("utf-8", "replace"))
    except errors.InvalidAddress:
        pass
    made = objects()
    try:
        one = made[data[0] % 4]
        at = int.from_bytes(data[1:3], "little") % LOCK_AT
        with open(one.file.path, "r+b", buffering=0) as file:
            file.seek(at)
            file.write(data[3 : 3 + LOCK_AT - at])
            if data[0] & 0x80:  # an owner that died with the lock
                file.seek(LOCK_AT)
                file.write((0x40000000).to_bytes(4, "little"))
        use(*made)
    finally:
        for one in made:
            one.close()


def main() -> None:
    try:
        if "--smoke" in sys.argv or "--seconds" in sys.argv:
            limit = 8.0 if "--smoke" in sys.argv else float(sys.argv[sys.argv.index("--seconds") + 1])
            noise, count = random.Random(), 0
            until = time.monotonic() + limit
            while time.monotonic() < until:
                one_input(noise.randbytes(noise.choice([8, 40, 400, 3000])))
                count += 1
            print(f"{count} inputs")
            return
        import atheris

        atheris.Setup(sys.argv, one_input)
        atheris.Fuzz()
    finally:
        shutil.rmtree(ROOT, ignore_errors=True)


if __name__ == "__main__":
    main()
