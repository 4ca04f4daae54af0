"""Views: buffers, bounds, their end in every order, and memory that vanishes under them."""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from talk import Talker

pytest.importorskip("portway._native.view")
from portway import FileMapping, View, errors

SIZE = 3 * 65536 + 100


@pytest.fixture
def root() -> Iterator[str]:
    root = tempfile.mkdtemp(prefix="portway-test-", dir="/dev/shm")
    yield root
    shutil.rmtree(root)


@pytest.fixture
def mapping(root: str) -> Iterator[FileMapping]:
    with FileMapping.create("view", SIZE, root=root) as mapping:
        yield mapping


@pytest.fixture
def view(mapping: FileMapping) -> Iterator[View]:
    with mapping.view() as view:
        yield view


def test_reads_and_writes(view: View) -> None:
    assert len(view) == SIZE
    assert view.read() == bytes(SIZE)
    assert view.write(b"hello", 7) == 5
    assert view.read(6, 7) == b"\0hello\0" == view[6:13]
    view[0] = 255
    view[-1] = 1
    assert (view[0], view[-1], view[SIZE - 1]) == (255, 1, 1)
    view[0:3] = bytearray(b"abc")
    assert view[:3] == b"abc"
    assert view.write(b"", SIZE) == 0
    assert view.read(SIZE) == b"" == view[5:5] == view[9:2]
    large = random.Random(1).randbytes(150_000)  # over what is copied with the GIL
    view.write(memoryview(large))
    assert view.read(0, len(large)) == large


@pytest.mark.parametrize(
    "offset, length", [(-1, 1), (0, -1), (0, SIZE + 1), (SIZE, 1), (SIZE + 1, 0), (2**62, 2**62), (1, SIZE)]
)
def test_outside_is_refused(view: View, offset: int, length: int) -> None:
    with pytest.raises(errors.InvalidParameter):
        view.read(offset, length)
    with pytest.raises(errors.InvalidParameter):
        view.flush(offset, length)
    if 0 <= length <= SIZE + 1:
        with pytest.raises(errors.InvalidParameter):
            view.write(bytes(length), offset)
    assert view.read() == bytes(SIZE)


def test_indices(view: View) -> None:
    for index in (SIZE, -SIZE - 1):
        with pytest.raises(IndexError):
            view[index]
        with pytest.raises(IndexError):
            view[index] = 1
    with pytest.raises(errors.InvalidParameter, match="contiguous"):
        view[0:10:2]
    with pytest.raises(errors.InvalidParameter, match="3 bytes for a slice of 2"):
        view[0:2] = b"abc"
    with pytest.raises(ValueError):
        view[0] = 256
    with pytest.raises(TypeError):
        view.write("text")  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidParameter):
        view.write(bytes(10), SIZE - 9)
    assert view[SIZE - 9 :] == bytes(9)


def test_is_a_writable_buffer(view: View) -> None:
    with memoryview(view) as buffer:
        assert (buffer.nbytes, buffer.readonly, buffer.format) == (SIZE, False, "B")
        buffer[10:13] = b"xyz"
        assert view[10:13] == b"xyz"
        assert view.exports == 1
        with buffer[1:2].cast("B"):
            assert view.exports == 1  # slices are of the same export
    assert view.exports == 0


def test_numpy_without_copy(view: View) -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.frombuffer(view, dtype="<i4", count=100, offset=400)
    array[:] = range(100)
    assert view.read(400, 8) == b"\0\0\0\0\1\0\0\0"
    with pytest.raises(BufferError):
        view.unmap()
    view[400] = 9
    assert array[0] == 9
    del array
    gc.collect()
    view.unmap()


def test_unmap_with_exports_changes_nothing(view: View) -> None:
    buffers = [memoryview(view) for _ in range(3)]
    with pytest.raises(BufferError, match=r"^3 exported buffers .* nothing was unmapped") as told:
        view.unmap()
    assert isinstance(told.value, errors.ViewInUse)
    assert told.value.code == 1224
    view[0] = 5
    assert buffers[0][0] == 5
    assert not view.closed
    for buffer in buffers:
        buffer.release()
    view.unmap()
    view.unmap()
    for call in (view.read, lambda: view.write(b"x"), lambda: view[0], lambda: memoryview(view), view.flush,
                 view.__enter__):  # fmt: skip
        with pytest.raises(errors.ObjectClosed):
            call()


def mapped(text: str) -> bool:
    return text in Path("/proc/self/maps").read_text()


def test_leaving_with_never_raises(mapping: FileMapping, root: str) -> None:
    with mapping.view() as view:
        view[0:3] = b"abc"
        buffer = memoryview(view)
        part = buffer[1:]
    assert view.closed
    with pytest.raises(errors.ObjectClosed):
        view.read()
    assert bytes(part[:2]) == b"bc"
    buffer.release()
    assert mapped(root)
    del view
    part.release()
    assert not mapped(root)  # with the last export


def test_leaving_with_keeps_the_error_of_the_block(mapping: FileMapping) -> None:
    with pytest.raises(ZeroDivisionError), mapping.view() as view:
        keep = memoryview(view)
        1 / 0  # noqa: B018
    assert keep[0] == 0


def test_outlives_its_handle_but_not_the_name(root: str) -> None:
    mapping = FileMapping.create("view", SIZE, root=root)
    view = mapping.view(65536)
    view[0:2] = b"ok"
    mapping.close()
    with pytest.raises(errors.ObjectNotFound):
        FileMapping.open("view", root=root)
    with FileMapping.create("view", SIZE, root=root) as other, other.view(65536) as fresh:
        assert not other.already_exists
        assert fresh[0:2] == b"\0\0"
        assert view[0:2] == b"ok"
    view.unmap()


@pytest.mark.parametrize("access", ["read", "copy"])
def test_reading_and_copying(mapping: FileMapping, view: View, access: str) -> None:
    with mapping.view(access=access) as other:  # type: ignore[arg-type]
        assert other.access == access
        view[0] = 1
        assert other[0] == 1
        if access == "read":
            with pytest.raises(errors.AccessDenied):
                other[0] = 2
            with pytest.raises(errors.AccessDenied):
                other.write(b"x")
            with memoryview(other) as buffer:
                assert buffer.readonly
                with pytest.raises(TypeError):
                    buffer[0] = 1
            assert view[0] == 1
        else:
            other[0] = 2
            other.write(b"private", 100)
            assert view[0] == 1
            assert view[100:107] == bytes(7)
            view[0] = 3
            assert other[0] == 2


def test_fork_shares_and_copies(mapping: FileMapping, view: View) -> None:
    with mapping.view(access="copy") as private:
        private[1] = 1
        pid = os.fork()
        if pid == 0:
            view[0] = 7
            private[1] = 2
            view.unmap()
            del view
            gc.collect()
            os._exit(0 if private[1] == 2 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert (view[0], private[1]) == (7, 1)


def test_flush_reaches_the_file(root: str, tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(bytes(100_000))
    with FileMapping.from_file(file, root=root) as mapping, mapping.view() as view:
        view.write(b"flushed", 70_001)
        view.flush(70_001, 7)
        view.flush()
        view.flush(5, 0)
        assert file.read_bytes()[70_001:70_008] == b"flushed"


def test_views_of_one_mapping_are_coherent(mapping: FileMapping) -> None:
    with mapping.view() as one, mapping.view(65536, 10) as two, mapping.view(access="read") as three:
        two.write(b"0123456789")
        assert one[65536:65546] == three[65536:65546] == b"0123456789"
        assert (two.offset, len(two)) == (65536, 10)


def test_a_cut_file_raises_where_it_would_kill(root: str, tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(bytes(300_000))
    with FileMapping.from_file(file, root=root) as mapping, mapping.view() as view:
        os.truncate(file, 4096)
        assert view.read(0, 4096) == bytes(4096)
        for call in (
            lambda: view.read(4096, 10), lambda: view.write(b"x", 5000), lambda: view[200_000], view.read,
            lambda: view.write(bytes(100_000), 100_000),
        ):  # fmt: skip
            with pytest.raises(errors.ObjectCorrupt, match="cut"):
                call()
        view[0] = 1
        assert file.read_bytes()[0] == 1
        assert view.exports == 0


def test_a_cut_object_is_an_error_for_the_next_opener_too(mapping: FileMapping, view: View, root: str) -> None:
    path = next(Path(root, f"portway-{os.geteuid()}").iterdir())
    os.truncate(path, 65536 + 4096)
    with pytest.raises(errors.ObjectCorrupt):
        view.read()
    with pytest.raises(errors.ObjectCorrupt, match="cut"), Talker() as peer:
        try:
            peer.do(f"portway.FileMapping.open('view', root={root!r})")
        except Exception as error:
            raise getattr(errors, error.kind)(error.message) from None  # type: ignore[attr-defined]


def test_other_faults_still_reach_faulthandler(tmp_path: Path) -> None:
    """Ours is one handler in a chain: a fault of somebody else ends the process, with his handler's report."""
    code = (
        "import faulthandler, mmap, os, sys, portway\n"
        "if sys.argv[2] == 'before': faulthandler.enable()\n"
        "f = open(sys.argv[1], 'w+b'); f.truncate(8192); m = mmap.mmap(f.fileno(), 8192)\n"
        "v = portway.FileMapping.from_file(f).view()\n"
        "if sys.argv[2] == 'after': faulthandler.enable(); v2 = portway.FileMapping.from_file(f).view()\n"
        "f.truncate(0)\n"
        "try: v.read()\n"
        "except portway.PortwayError as e: print(type(e).__name__, flush=True)\n"
        "m[5000]\n"
    )
    for order in ("before", "after", "never"):
        said = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / order), order], capture_output=True, text=True,
            env={**os.environ, "PORTWAY_ROOT": str(tempfile.mkdtemp(dir=tmp_path.as_posix()))},
        )  # fmt: skip
        assert said.stdout == "ObjectCorrupt\n", said.stderr
        assert said.returncode == -7
        assert ("Bus error" in said.stderr) == (order != "never")


def test_a_signal_that_somebody_sends_is_not_swallowed() -> None:
    code = "import os, signal, portway; portway.FileMapping.create(None, 1).view(); os.kill(os.getpid(), signal.SIGBUS)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == -7


def test_unmap_during_a_copy_in_another_thread(root: str) -> None:
    with FileMapping.create(None, 4 << 20, root=root) as mapping:
        view = mapping.view()
        seen: list[str] = []

        def read() -> None:
            while not view.closed:
                with contextlib.suppress(errors.ObjectClosed):
                    view.read()

        threads = [threading.Thread(target=read) for _ in range(2)]
        for thread in threads:
            thread.start()
        for _ in range(300):
            try:
                view.unmap()
                break
            except errors.ViewInUse:
                seen.append("in use")
        with contextlib.suppress(errors.ObjectClosed), view:
            pass  # the copies under way go on; the last one gives the memory back
        for thread in threads:
            thread.join()
        assert seen
        assert view.exports == 0
        assert not mapped(root)


def test_every_order_of_ends(root: str) -> None:
    """close, del, release, leaving with, gc and fork in random order, in processes of their own; none may crash."""
    code = """
import gc, os, random, sys, portway
portway.FileMapping
fds = len(os.listdir('/proc/self/fd'))
for seed in range(int(sys.argv[1]), int(sys.argv[1]) + 60):
    dice, things = random.Random(seed), {}
    mapping = portway.FileMapping.create('m%d' % (seed % 3), 70000, root=sys.argv[2])
    things['m'] = mapping
    for n in range(dice.randrange(1, 4)):
        view = things['v%d' % n] = mapping.view(access=dice.choice(['read-write', 'copy', 'read']))
        for k in range(dice.randrange(3)):
            things['b%d%d' % (n, k)] = memoryview(view)[k:]
    del view, mapping
    names, forks = list(things), 0
    dice.shuffle(names)
    for name in names:
        one, what = things[name], dice.randrange(5)
        try:
            if what == 0: del things[name]
            elif what == 1: (one.release if isinstance(one, memoryview) else one.close)()
            elif what == 2 and not isinstance(one, memoryview): one.__exit__(None, None, None)
            elif what == 3: gc.collect()
            elif what == 4 and forks < 1:
                forks += 1
                pid = os.fork()
                if pid == 0:
                    things.clear(); del one; gc.collect(); os._exit(0)
                assert os.waitpid(pid, 0)[1] == 0, seed
        except (BufferError, ValueError): pass
        one = None
    if seed % 2: things.clear()
things.clear()
gc.collect()
assert sys.argv[2] not in open('/proc/self/maps').read()
assert len(os.listdir('/proc/self/fd')) == fds
print('alive')
"""
    for start in (0, 1000):
        said = subprocess.run([sys.executable, "-c", code, str(start), root], capture_output=True, text=True)
        assert (said.stdout, said.returncode) == ("alive\n", 0), said.stderr


def test_is_what_mmap_is_for_re_and_io(view: View) -> None:
    import io
    import re

    view.write(b"needle", 100)
    match = re.search(b"need(le)", view)
    assert match is not None
    assert match.start() == 100
    view_file = io.BytesIO(b"from a file")
    with memoryview(view) as buffer:
        assert view_file.readinto(buffer[:11]) == 11
    assert view[:11] == b"from a file"
    assert isinstance(mmap.PAGESIZE, int)
