"""Any bytes as the page of a mapping, and of a .NET mutex: opening them gives an error of ours, or works.

    python fuzz/fuzz_section.py [--smoke] [atheris options]

With atheris installed it is a coverage-guided fuzz target; ``--smoke``, or no atheris, runs some thousand random
inputs from a seed that is printed. It ends with an error when anything but an error of portway comes out, when a file
other than the one mapped is opened, or when a descriptor stays open.
"""

from __future__ import annotations

import os
import random
import struct
import sys
import tempfile
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import portway
from portway import _accel
from portway.errors import PortwayError
from portway.kernel import objectfile, section, section_file
from portway.kernel.namespace import Entry
from portway.kernel.objectfile import Kind, ObjectFile, pack_header

SMOKE = 20_000
BYTES = 5000
DOTNET = struct.pack("<BB6xIIIII20xIIQ?", 0, 1, 0, 0, 0, 0, 0x91, 2**32 - 1, 0, 2**64 - 1, False)

behind = tempfile.NamedTemporaryFile(prefix="portway-fuzz-")  # noqa: SIM115
behind.truncate(BYTES)
page = os.memfd_create("page")
_IDENTITY = os.fstat(behind.fileno())


def seeds() -> list[bytes]:
    """Good pages (to 0x5000 + a path), to mutate: page-file backed, sparse, of a file; and a .NET page."""
    path, info = behind.name.encode(), _IDENTITY
    plain = section._EXTRA.pack(1, 0, 0, 0)
    file = section._EXTRA.pack(0, len(path), info.st_dev, info.st_ino)
    return [
        (pack_header(Kind.MAPPING, "name", size=BYTES) + plain),
        (pack_header(Kind.MAPPING, "", size=BYTES, flags=1) + plain),
        (pack_header(Kind.MAPPING, "name", size=BYTES, flags=2) + file).ljust(0x600, b"\0") + path,
        DOTNET,
    ]


def lay_out(data: bytes) -> None:
    """The fuzzed bytes where the decoders look: 0x000-0x5ff, and what follows at 0x5000."""
    os.ftruncate(page, 0)
    os.pwrite(page, data[:0x600], 0)
    os.pwrite(page, data[0x600:], objectfile.FREE_PAGES)
    os.ftruncate(page, objectfile.BODY + BYTES)


def open_mapping() -> bool:
    """Whether it could be opened and read."""
    path = f"/proc/self/fd/{page}"
    with suppress(PortwayError):
        header = objectfile.read_header(page, path)
        found = ObjectFile(page, path, header)
        found.holders = list  # type: ignore[method-assign]
        section.file_behind(Entry(header.kind, header.name, 0, [], header, path))
        access, backing = section._read_extra(found)
        if backing is None:
            section._check_whole(found)
            view = portway.View(page, objectfile.BODY, header.size, access)
        else:
            fd = section_file.open_backing(found, backing, "read")
            try:
                info = os.fstat(fd)
                assert (info.st_dev, info.st_ino) == (backing.device, backing.inode)
                view = portway.View(fd, 0, min(header.size, 1 << 20), "read")
            finally:
                os.close(fd)
        with view:
            view.read(0, min(len(view), 4096))
            view.read(max(0, len(view) - 10))
            return True
    return False


def open_dotnet(data: bytes) -> bool:
    """Whether it has .NET's layout."""
    os.ftruncate(page, 0)
    os.pwrite(page, data[:4096], 0)
    os.ftruncate(page, 4096 if len(data) % 7 else len(data) % 4096)
    mutex = _accel.dotnet.Page(page, fresh=False)
    fits = bool(mutex.fits())
    if fits and mutex.acquire(0, False) in (_accel.dotnet.TAKEN, _accel.dotnet.ABANDONED):
        mutex.release()
    mutex.close()
    return fits


def one(data: bytes) -> None:
    before = len(os.listdir("/proc/self/fd")) if data[:1] == b"\0" else None
    lay_out(data)
    open_mapping()
    open_dotnet(data)
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before


def mutated(dice: random.Random, good: list[bytes]) -> bytes:
    data = bytearray(dice.choice(good))
    for _ in range(dice.randrange(1, 5)):
        way, at = dice.randrange(4), dice.randrange(len(data) + 1)
        if way == 0:
            data[at : at + 8] = dice.choice([b"\xff", b"\0", b"\x7f", dice.randbytes(1)]) * 8
        elif way == 1 and at < len(data):
            data[at] ^= 1 << dice.randrange(8)
        elif way == 2:
            del data[at:]
        else:
            data[at:at] = dice.randbytes(dice.randrange(12))
    return bytes(data)


def smoke() -> None:
    seed = int(os.environ.get("PORTWAY_FUZZ_SEED", random.randrange(2**32)))
    print(f"{SMOKE} inputs, PORTWAY_FUZZ_SEED={seed}", flush=True)
    dice, good = random.Random(seed), seeds()
    for data in good[:3]:  # or nothing below is tried at all
        lay_out(data)
        assert open_mapping()
    assert open_dotnet(DOTNET + bytes(4096 - len(DOTNET)))
    for _ in range(SMOKE):
        one(mutated(dice, good))
    print("done")


def main() -> None:
    atheris: Any = SimpleNamespace(Setup=None)
    if "--smoke" not in sys.argv:
        with suppress(ImportError):
            import atheris
    if atheris.Setup is None:
        return smoke()
    atheris.Setup(sys.argv, one)
    return atheris.Fuzz()


if __name__ == "__main__":
    main()
