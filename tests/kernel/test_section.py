"""`FileMapping`: names, sizes, rights, files and lifetimes, as win32-semantics has them; hostile pages; full disks."""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from talk import Failed, Talker, until

pytest.importorskip("portway._native.view")
from portway import FileMapping, View, errors

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
NETPEER = os.environ.get("PORTWAY_NETPEER") or str(Path(__file__).parents[3] / "shared/peers/netpeer")
ME = f"portway-{os.geteuid()}"


@pytest.fixture
def root() -> Iterator[str]:
    root = tempfile.mkdtemp(prefix="portway-test-", dir="/dev/shm")
    yield root
    shutil.rmtree(root)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 400)  # 102,400 bytes
    return path


def files(root: str) -> list[str]:
    return os.listdir(Path(root, ME)) if Path(root, ME).exists() else []


def open_in(peer: Talker, name: str, root: str, access: str = "read-write") -> None:
    peer.do(f"m = portway.FileMapping.open({name!r}, {access!r}, root={root!r}); v = m.view()")


def gone(name: str, root: str) -> bool:
    try:
        FileMapping.open(name, root=root).close()
    except errors.ObjectNotFound:
        return True
    return False


class TestByName:
    def test_two_processes_share(self, root: str) -> None:
        with FileMapping.create("n", 100, root=root) as mapping, mapping.view() as view, Talker() as peer:
            assert (mapping.size, mapping.name, mapping.path) == (100, "n", None)
            assert (mapping.already_exists, mapping.access) == (False, "read-write")
            view[0:2] = b"hi"
            open_in(peer, "Local\\n", root)
            assert peer.get("[v[0:2].decode(), len(v), m.size, m.name, m.already_exists]") == ["hi", 100, 100, "n", 1]
            peer.do("v[99] = 7")
            assert view[99] == 7
        assert files(root) == []

    def test_create_opens_what_exists(self, root: str) -> None:
        with FileMapping.create("n", 100, root=root), FileMapping.create("n", 70_000, root=root) as again:
            assert (again.already_exists, again.size) == (True, 100)
            with pytest.raises(errors.AccessDenied):
                again.view(0, 101)
            with pytest.raises(errors.AlreadyExists):
                FileMapping.create("n", 100, exclusive=True, root=root)
            with pytest.raises(errors.InvalidParameter):  # wrong in itself: refused before
                FileMapping.create("n", 0, root=root)
        with FileMapping.create("n", 200, exclusive=True, root=root) as fresh:
            assert fresh.size == 200

    def test_zeros_after_everybody_left(self, root: str) -> None:
        for _ in range(2):
            with FileMapping.create("n", 100_000, root=root) as mapping, mapping.view() as view:
                assert view.read() == bytes(100_000)
                view.write(b"\xff" * 100_000)

    def test_unnamed_are_each_their_own(self, root: str) -> None:
        with FileMapping.create(None, 10, root=root) as one, FileMapping.create("", 10, root=root) as two:
            assert one.name is two.name is None
            with one.view() as left, two.view() as right:
                left[0] = 1
                assert right[0] == 0
        assert files(root) == []

    def test_names_are_case_sensitive_and_slashes_ordinary(self, root: str) -> None:
        with FileMapping.create("a/B", 1, root=root), pytest.raises(errors.ObjectNotFound):
            FileMapping.open("a/b", root=root)

    @pytest.mark.parametrize(
        "name, error",
        [("x" * 260, "NameTooLong"), ("a\\b", "PathNotFound"), ("local\\x", "PathNotFound"), ("\\", "BadPathName"),
         ("Local\\", "InvalidAddress"), ("Global\\", "InvalidAddress"), ("a\0b", "InvalidAddress")],
    )  # fmt: skip
    def test_bad_names(self, root: str, name: str, error: str) -> None:
        for call in (lambda: FileMapping.create(name, 1, root=root), lambda: FileMapping.open(name, root=root)):
            with pytest.raises(getattr(errors, error)):
                call()
        assert files(root) == []

    def test_another_kind_has_the_name(self, root: str) -> None:
        from portway.kernel import namespace

        found, _ = namespace.Namespace(root).create(namespace.Kind.EVENT, "n")
        try:
            for call in (lambda: FileMapping.create("n", 1, root=root), lambda: FileMapping.open("n", root=root)):
                with pytest.raises(errors.InvalidHandle):
                    call()
        finally:
            namespace.release(found)

    def test_open_needs_a_name(self, root: str) -> None:
        for nothing in ("", None):
            with pytest.raises(errors.InvalidParameter):
                FileMapping.open(nothing, root=root)  # type: ignore[arg-type]
        with pytest.raises(errors.ObjectNotFound):
            FileMapping.open("nobody-made-it", root=root)

    @pytest.mark.parametrize("size", [0, -1, 2**62 + 1, 2**64])
    def test_bad_sizes(self, root: str, size: int) -> None:
        with pytest.raises(errors.InvalidParameter):
            FileMapping.create("n", size, root=root)

    @pytest.mark.parametrize("size", [1.5, "5", None, True])
    def test_sizes_that_are_no_numbers(self, root: str, size: Any) -> None:
        with pytest.raises(TypeError):
            FileMapping.create("n", size, root=root)

    def test_not_made_by_hand(self) -> None:
        with pytest.raises(TypeError, match=r"FileMapping\.create"):
            FileMapping("n", 5)


class TestViewRules:
    @pytest.mark.parametrize(
        "offset, length, error",
        [(1, 0, "MappedAlignment"), (4096, 0, "MappedAlignment"), (65535, 1, "MappedAlignment"),
         (-65536, 0, "InvalidParameter"), (0, -1, "InvalidParameter"), (196608, 0, "InvalidParameter"),
         (65536 * 100, 1, "InvalidParameter"), (0, 131173, "AccessDenied"), (65536, 65637, "AccessDenied"),
         (131072, 2**62, "AccessDenied")],
    )  # fmt: skip
    def test_where(self, root: str, offset: int, length: int, error: str) -> None:
        with FileMapping.create("n", 131172, root=root) as mapping:
            with pytest.raises(getattr(errors, error)):
                mapping.view(offset, length)
            assert len(mapping.view(131072)) == 100
            assert len(mapping.view(65536, 65636)) == 65636
            assert len(mapping.view(65536, 1)) == 1

    @pytest.mark.parametrize("section", ["read", "read-write", "copy"])
    @pytest.mark.parametrize("handle", ["read", "read-write", "copy"])
    @pytest.mark.parametrize("view", ["read", "read-write", "copy"])
    def test_rights(self, root: str, file: Path, section: Any, handle: Any, view: Any) -> None:
        """The table of win32-semantics, for a file-backed section: what was made, what is opened, what is mapped."""
        fine = (section == "read-write" or handle != "read-write") and (handle == "read-write" or view != "read-write")
        with FileMapping.from_file(file, name="n", access=section, root=root):
            if not fine:
                with pytest.raises(errors.AccessDenied), FileMapping.open("n", handle, root=root) as opened:
                    opened.view(access=view)
                return
            with FileMapping.open("n", handle, root=root) as opened, opened.view(access=view) as mapped:
                assert (opened.access, mapped.access) == (handle, view)
                assert mapped[255] == 255

    @pytest.mark.parametrize("access", ["read", "copy"])
    def test_what_was_made_for_less_is_not_opened_for_more(self, root: str, access: Any) -> None:
        with FileMapping.create("n", 10, access=access, root=root):
            with pytest.raises(errors.AccessDenied, match="made for"):
                FileMapping.create("n", 10, root=root)

    def test_unknown_access(self, root: str) -> None:
        for bad in ("write", "", "READ", None):
            with pytest.raises(errors.InvalidParameter, match="access="):
                FileMapping.create("n", 1, access=bad, root=root)  # type: ignore[arg-type]

    def test_closed(self, root: str) -> None:
        mapping = FileMapping.create("n", 1, root=root)
        mapping.close()
        mapping.close()
        for call in (mapping.view, mapping.__enter__, lambda: mapping.__reduce__()):
            with pytest.raises(errors.ObjectClosed):
                call()
        assert repr(mapping) == "<FileMapping closed>"

    def test_del_closes(self, root: str) -> None:
        mapping = FileMapping.create("n", 1, root=root)
        del mapping
        gc.collect()
        assert files(root) == []


class TestFiles:
    def test_sizes(self, root: str, file: Path) -> None:
        with FileMapping.from_file(file, root=root) as mapping, mapping.view() as view:
            assert (mapping.size, len(view), mapping.path) == (102400, 102400, str(file))
            view.write(b"new", 100)
        assert file.read_bytes()[100:103] == b"new"
        with FileMapping.from_file(file, 1000, root=root) as mapping:
            assert mapping.size == 1000
            assert len(mapping.view()) == 1000
        assert file.stat().st_size == 102400

    @pytest.mark.parametrize("reserve", [False, True])
    def test_more_extends_the_file(self, root: str, file: Path, reserve: bool) -> None:
        with FileMapping.from_file(file, 300_000, reserve=reserve, root=root) as mapping, mapping.view(262144) as view:
            assert file.stat().st_size == mapping.size == 300_000
            assert view.read() == bytes(300_000 - 262144)
            view[0] = 1
        assert file.read_bytes()[262144] == 1

    @pytest.mark.parametrize("access", ["read", "copy"])
    def test_more_without_write_is_refused(self, root: str, file: Path, access: Any) -> None:
        with pytest.raises(errors.NotEnoughMemory, match="102400"):
            FileMapping.from_file(file, 102401, access=access, root=root)
        assert file.stat().st_size == 102400
        assert files(root) == []

    def test_empty(self, root: str, tmp_path: Path) -> None:
        empty = tmp_path / "empty"
        empty.touch()
        with pytest.raises(errors.FileInvalid) as told:
            FileMapping.from_file(empty, root=root)
        assert told.value.code == 1006
        with FileMapping.from_file(empty, 10, root=root) as mapping:
            assert mapping.size == 10

    def test_a_name_that_is_taken_does_not_extend(self, root: str, file: Path, tmp_path: Path) -> None:
        other = tmp_path / "other"
        other.write_bytes(b"x" * 10)
        with FileMapping.from_file(file, name="n", root=root):
            with pytest.raises(errors.AlreadyExists):
                FileMapping.from_file(other, 1000, name="n", exclusive=True, root=root)
            with FileMapping.from_file(other, 1000, name="n", root=root) as found, found.view() as view:
                assert (found.already_exists, found.size, found.path) == (True, 102400, str(file))
                assert view[5] == 5
        assert other.read_bytes() == b"x" * 10

    def test_open_files_and_descriptors(self, root: str, file: Path) -> None:
        with open(file, "r+b") as opened, FileMapping.from_file(opened, root=root) as mapping:
            opened.close()  # the handle has its own
            with mapping.view() as view:
                view[0] = 9
        fd = os.open(file, os.O_RDONLY)
        try:
            with FileMapping.from_file(fd, access="read", root=root) as mapping, mapping.view(access="copy") as view:
                assert view[0] == 9
                view[0] = 1
            with pytest.raises(errors.AccessDenied):
                FileMapping.from_file(fd, root=root)
        finally:
            os.close(fd)
        assert file.read_bytes()[0] == 9

    @pytest.mark.parametrize("access", ["read", "read-write", "copy"])
    def test_write_only_cannot_be_mapped(self, root: str, file: Path, access: Any) -> None:
        with open(file, "ab") as opened, pytest.raises(errors.AccessDenied):
            FileMapping.from_file(opened, access=access, root=root)

    def test_what_is_no_file(self, root: str, tmp_path: Path) -> None:
        r, w = os.pipe()
        os.mkfifo(tmp_path / "fifo")
        try:
            for bad in (r, tmp_path, tmp_path / "fifo", 12345, "/dev/zero", object()):
                with pytest.raises(errors.InvalidHandle):
                    FileMapping.from_file(bad, root=root)  # type: ignore[arg-type]
        finally:
            os.close(r)
            os.close(w)
        with pytest.raises(errors.ObjectNotFound):
            FileMapping.from_file(tmp_path / "missing", root=root)
        assert files(root) == []

    def test_opened_by_name_is_the_same_file(self, root: str, file: Path) -> None:
        with FileMapping.from_file(file, name="n", root=root) as mapping, mapping.view() as view, Talker() as peer:
            open_in(peer, "n", root)
            peer.do("v[0:3] = b'abc'")
            assert view[0:3] == b"abc"
            assert peer.get("m.path") == str(file)

    @pytest.mark.parametrize("how", ["moved", "removed", "replaced", "symlinked"])
    def test_through_a_living_holder(self, root: str, file: Path, how: str) -> None:
        with FileMapping.from_file(file, name="n", root=root), Talker() as peer:
            moved = file.rename(file.with_name("moved"))
            if how == "removed":
                moved.unlink()
            elif how == "replaced":
                file.write_bytes(b"another" * 100_000)
            elif how == "symlinked":
                file.symlink_to(moved)
            open_in(peer, "n", root)
            assert peer.get("v[255]") == 255
            assert peer.get("len(v)") == 102400

    def test_memfd(self, root: str) -> None:
        fd = os.memfd_create("x")
        os.ftruncate(fd, 5000)
        with FileMapping.from_file(fd, name="n", root=root) as mapping, Talker() as peer:
            os.close(fd)
            assert mapping.path is None
            open_in(peer, "n", root)
            peer.do("v[0] = 3")
            assert mapping.view()[0] == 3

    def test_gone_for_good(self, root: str, file: Path) -> None:
        """A holder that has dropped its descriptor (views need none) cannot help; neither can the path."""
        with Talker() as holder:
            holder.do(f"m = portway.FileMapping.from_file({str(file)!r}, name='n', root={root!r}); v = m.view()")
            file.unlink()
            holder.do("os.close(m._fd); m._fd = -1")
            with pytest.raises(errors.ObjectNotFound, match="no living holder"):
                FileMapping.open("n", root=root)
            with pytest.raises(FileNotFoundError):
                FileMapping.open("n", root=root)

    def test_cut_below_the_mapping(self, root: str, file: Path) -> None:
        with FileMapping.from_file(file, name="n", root=root):
            os.truncate(file, 10)
            with Talker() as peer, pytest.raises(Failed, match="ObjectCorrupt"):
                open_in(peer, "n", root)

    @as_root
    def test_the_openers_own_rights_apply(self, root: str, file: Path) -> None:
        from portway import Security

        os.chmod(root, 0o777)
        file.chmod(0o644)
        for folder in (file.parent, *file.parents):
            if folder != Path("/tmp") and folder != Path("/"):
                folder.chmod(0o755)
        everyone = Security.everyone()
        with FileMapping.from_file(file, name="Global\\n", security=everyone, root=root), Talker() as peer:
            peer.do("portway.FileMapping, portway.View; os.setgid(4001); os.setuid(4001)")
            open_in(peer, "Global\\n", root, "read")
            assert peer.get("v[255]") == 255
            with pytest.raises(Failed, match="AccessDenied"):
                open_in(peer, "Global\\n", root, "read-write")

    @as_root
    def test_a_stranger_cannot_name_our_files(self, root: str, file: Path) -> None:
        """A mapping of uid 4001 whose page was made to name a file of ours: not opened with our rights."""
        os.chmod(root, 0o777)
        from portway.kernel import section

        FileMapping.create("Global\\first", 1, root=root).close()  # the folder is root's, as it should be
        with Talker() as peer:
            peer.do("portway.FileMapping, portway.View, portway.Security; os.setgid(4001); os.setuid(4001)")
            peer.do(f"fd = os.memfd_create('x'); os.ftruncate(fd, 5000); m = portway.FileMapping.from_file(fd, "
                    f"name='Global\\\\n', security=portway.Security.everyone(), root={root!r})")  # fmt: skip
            path = next(Path(root, "portway-global").iterdir())
            info = os.stat(file)
            with open(path, "r+b") as page:
                page.seek(0x500)
                page.write(section._EXTRA.pack(1, len(str(file)), info.st_dev, info.st_ino))
                page.seek(0x5000)
                page.write(str(file).encode())
            os.chown(file, 4003, 4003)
            file.chmod(0o644)
            for folder in file.parents:
                if folder not in (Path("/tmp"), Path("/")):
                    folder.chmod(0o755)
            os.setegid(4002)
            os.seteuid(4002)
            try:
                with pytest.raises(errors.AccessDenied, match="names a file of uid"):
                    FileMapping.open("Global\\n", "read", root=root)
            finally:
                os.seteuid(0)
                os.setegid(0)


@pytest.mark.netpeer
@pytest.mark.skipif(not os.access(NETPEER, os.X_OK), reason="netpeer is missing: set PORTWAY_NETPEER")
def test_a_file_mapped_by_dotnet(root: str, tmp_path: Path) -> None:
    file = tmp_path / "shared"
    subprocess.run([NETPEER, "mem", "map-write", str(file), "100000"], check=True, capture_output=True)
    with FileMapping.from_file(file, root=root) as mapping, mapping.view() as view:
        assert view.read() == bytes((31 * i + (i >> 8)) % 256 for i in range(100_000))
        view.write(b"from portway", 70_000)
        said = subprocess.run([NETPEER, "mem", "map-read", str(file)], check=True, capture_output=True)
        assert json.loads(said.stdout)["crc32"] == f"{zlib.crc32(view):08x}"


class TestLifetimes:
    def test_killed_holders_leave_a_free_name(self, root: str) -> None:
        with Talker() as one, Talker() as two:
            one.do(f"m = portway.FileMapping.create('n', 100000, root={root!r}); v = m.view(); v[0] = 1")
            open_in(two, "n", root)
            one.kill()
            with FileMapping.open("n", root=root) as mapping:
                assert mapping.view()[0] == 1  # the other holder keeps it
            two.kill()
        assert len(files(root)) == 1
        with pytest.raises(errors.ObjectNotFound):
            FileMapping.open("n", root=root)
        assert files(root) == []
        with FileMapping.create("n", 10, root=root) as mapping:
            assert not mapping.already_exists

    def test_a_fork_child_holds_too(self, root: str) -> None:
        with Talker() as peer:
            peer.do(
                f"m = portway.FileMapping.create('n', 100, root={root!r}); v = m.view()\n"
                "r, w = os.pipe()\npid = os.fork()\n"
                "if pid == 0:\n os.close(w); os.read(r, 1); v[0] = 5; m.view()[1] = 6; m.close(); os._exit(0)\n"
                "os.close(r); m.close()"
            )
            with FileMapping.open("n", root=root) as mapping, mapping.view() as view:
                peer.do("os.close(w)")
                assert peer.get("os.waitpid(pid, 0)[1]") == 0
                assert view[0:2] == b"\5\6"
        assert files(root) == []

    def test_the_parent_keeps_the_name_of_a_child_that_ends(self, root: str) -> None:
        with FileMapping.create("n", 100, root=root):
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            os.waitpid(pid, 0)
            with Talker() as peer:
                open_in(peer, "n", root)

    def test_exec_drops_the_handle(self, root: str) -> None:
        with Talker() as peer:
            peer.do(f"m = portway.FileMapping.create('n', 100, root={root!r}); v = m.view()")
            peer.start("os.execvp('sleep', ['sleep', '30'])")
            until(lambda: gone("n", root))
            assert Path(f"/proc/{peer.pid}/comm").read_text() == "sleep\n"

    @pytest.mark.parametrize("how", ["fork", "spawn", "forkserver"])
    @pytest.mark.parametrize("kind", ["named", "unnamed", "file", "memfd"])
    def test_as_an_argument_of_a_process(self, root: str, file: Path, how: str, kind: str) -> None:
        with contextlib.ExitStack() as stack:
            if kind in ("named", "unnamed"):
                mapping = FileMapping.create("n" if kind == "named" else None, 100_000, root=root)
            else:
                fd = os.memfd_create("x") if kind == "memfd" else os.open(file, os.O_RDWR)
                stack.callback(os.close, fd)
                mapping = FileMapping.from_file(fd, 100_000, root=root)
            stack.enter_context(mapping)
            view = stack.enter_context(mapping.view())
            process = multiprocessing.get_context(how).Process(target=_write_in, args=(mapping, 65536))
            process.start()
            process.join(30)
            assert process.exitcode == 0
            process.close()
            assert view[65536:65541] == b"child"
        assert files(root) == []

    def test_nothing_stays_open(self, root: str, file: Path) -> None:
        def use() -> None:
            with FileMapping.create("n", 100, reserve=True, root=root) as mapping, mapping.view():
                with contextlib.suppress(errors.PortwayError):
                    mapping.view(1)
            for bad in (lambda: FileMapping.create("n", 2**61, root=root), lambda: FileMapping.open("n", root=root),
                        lambda: FileMapping.from_file(file, 2**62, root=root)):  # fmt: skip
                with pytest.raises(errors.PortwayError):
                    bad()
            FileMapping.from_file(file, name="f", root=root).close()

        use()
        before = os.listdir("/proc/self/fd")
        for _ in range(10):
            use()
        assert os.listdir("/proc/self/fd") == before
        assert root not in Path("/proc/self/maps").read_text()
        assert files(root) == []
        assert file.stat().st_size == 102400


def _write_in(mapping: FileMapping, offset: int) -> None:
    with mapping, mapping.view(offset) as view:
        view.write(b"child")


# -- a full file system ------------------------------------------------------------------------------------------------

FULL = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def mount(source, target, kind, flags, data):
    if libc.mount(source, target, kind, flags, data): raise OSError(ctypes.get_errno(), "mount")
if libc.unshare(0x20000): raise OSError(ctypes.get_errno(), "unshare")
mount(b"none", b"/", None, 1 << 18 | 16384, None)
mount(b"tmpfs", sys.argv[1].encode(), b"tmpfs", 0, b"size=1m,mode=777")
import portway
from portway import FileMapping, errors
root = sys.argv[1]
left = lambda: [os.listdir(os.path.join(root, one)) for one in os.listdir(root)]
free = lambda: os.statvfs(root).f_bfree * 4096
"""


@as_root
@pytest.mark.parametrize(
    "code",
    [
        pytest.param(
            """
try: FileMapping.create("n", 8 << 20, root=root)
except errors.NotEnoughMemory as error: assert root in str(error) and "1,048,576" in str(error), error
else: raise AssertionError("made")
assert left() in ([], [[]]), left()
with FileMapping.create("n", 400_000, root=root): pass
""",
            id="create-leaves-nothing",
        ),
        pytest.param(
            """
with FileMapping.create("n", 8 << 20, reserve=True, root=root) as mapping, mapping.view() as view:
    view.write(b"x" * 300_000)
    before = view[300_000:300_100]
    try: view.write(b"y" * (4 << 20), 300_000)
    except errors.NotEnoughMemory: pass
    else: raise AssertionError("written")
    assert view[300_000:300_100] == before == bytes(100)
    view.write(b"z" * 100_000, 300_000)
    assert view[300_000:300_002] == b"zz"
""",
            id="reserve-raises-and-writes-nothing",
        ),
        pytest.param(
            """
with FileMapping.create("n", 8 << 20, reserve=True, root=root) as mapping:
    filler = os.open(os.path.join(root, "filler"), os.O_CREAT | os.O_WRONLY)
    try:
        while os.write(filler, b"f" * 4096): pass
    except OSError: pass
    with mapping.view() as view, mapping.view(access="read") as reader:
        assert view.read(4 << 20, 100) == reader.read(4 << 20, 10_000)[:100] == bytes(100)
        try: view[5 << 20] = 1
        except errors.NotEnoughMemory: pass
        else: raise AssertionError("written")
""",
            id="reading-a-hole-of-a-full-disk",
        ),
        pytest.param(
            """
path = os.path.join(root, "file")
open(path, "wb").write(b"q" * 1000)
try: FileMapping.from_file(path, 8 << 20, root=root)
except errors.NotEnoughMemory: pass
else: raise AssertionError("extended")
assert open(path, "rb").read() == b"q" * 1000
""",
            id="file-is-not-extended",
        ),
        pytest.param(
            """
with FileMapping.create("n", 8 << 20, reserve=True, root=root) as mapping:
    buffer = memoryview(mapping.view())
    pid = os.fork()
    if pid == 0:
        buffer[: 4 << 20] = bytes(4 << 20)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] & 0x7f == 7  # through a buffer it is SIGBUS: the docs say so
""",
            id="through-a-buffer-it-is-sigbus",
        ),
    ],
)
def test_full_file_system(tmp_path: Path, code: str) -> None:
    place = tmp_path / "mnt"
    place.mkdir()
    said = subprocess.run([sys.executable, "-c", FULL + code, str(place)], capture_output=True, text=True)
    if "unshare" in said.stderr or '"mount"' in said.stderr:
        pytest.skip("no mount namespaces here")
    assert said.returncode == 0, said.stderr


def test_file_size_limit(root: str) -> None:
    code = (
        "import resource, portway, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (300000, 300000))\n"
        "try: portway.FileMapping.create('n', 1 << 20, root=sys.argv[1])\n"
        "except portway.PortwayError as e: print(type(e).__name__)"
    )
    said = subprocess.run([sys.executable, "-c", code, root], capture_output=True, text=True, check=True)
    assert said.stdout == "NotEnoughMemory\n"
    assert files(root) == []


# -- hostile pages ----------------------------------------------------------------------------------------------------


def _corrupted(root: str, at: int, data: bytes) -> None:
    with open(Path(root, ME, files(root)[0]), "r+b") as page:
        page.seek(at)
        page.write(data)


@pytest.mark.parametrize(
    "at, data",
    [
        (0, b"garbage!"), (8, b"\x63\0\0\0"), (0x0C, b"\xff\0\0\0"), (0x10, b"\xff\xff\xff\xff"), (0x28, b"\xff" * 8),
        (0x28, bytes(8)), (0x28, (2**40).to_bytes(8, "little")), (0x500, b"\x09\0\0\0"), (0x504, b"\xff" * 4),
        (0x10, b"\2\0\0\0"),
    ],
)  # fmt: skip
def test_a_damaged_page_is_an_error_for_openers(root: str, at: int, data: bytes) -> None:
    with FileMapping.create("n", 100_000, root=root) as mapping, mapping.view() as view:
        _corrupted(root, at, data)
        with Talker() as peer, pytest.raises(Failed) as told:
            open_in(peer, "n", root)
        assert told.value.kind in ("ObjectCorrupt", "ObjectNotFound", "InvalidHandle", "AccessDenied")
        view[0] = 1  # who has it open goes on
        assert mapping.size == 100_000


@pytest.mark.slow
def test_random_damage_never_crashes_or_hangs(root: str) -> None:
    code = """
import os, random, sys, portway
from portway import errors
dice = random.Random(int(sys.argv[2])); folder = os.path.join(sys.argv[1], 'portway-%d' % os.geteuid())
for round in range(250):
    mapping = portway.FileMapping.create('n', 70000, root=sys.argv[1])
    path = os.path.join(folder, os.listdir(folder)[0])
    pid = os.fork()
    if pid == 0:
        try:
            with open(path, 'r+b') as page:
                for _ in range(dice.randrange(1, 6)):
                    page.seek(dice.choice([dice.randrange(0x100), dice.randrange(0x500, 0x540), dice.randrange(70000)]))
                    page.write(dice.randbytes(dice.randrange(1, 9)))
                if dice.random() < .3: page.truncate(dice.randrange(140000))
            os._exit(0)
        except BaseException: os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    dice.random()
    pid = os.fork()
    if pid == 0:
        import gc
        mapping.close()
        for _ in range(3):
            try:
                with portway.FileMapping.open('n', root=sys.argv[1]) as m, m.view() as v: v.write(v.read())
            except errors.PortwayError: pass
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0, round
    try:
        with mapping.view() as v: v.read()
    except errors.PortwayError: pass
    mapping.close()
    for one in os.listdir(folder): os.unlink(os.path.join(folder, one))
print('alive')
"""
    said = subprocess.run([sys.executable, "-c", code, root, str(random.Random(9).randrange(999))],
                          capture_output=True, text=True, timeout=100)  # fmt: skip
    assert (said.stdout, said.returncode) == ("alive\n", 0), said.stderr


def test_every_error_of_ours_is_what_python_calls_it() -> None:
    pairs: list[tuple[Callable[..., Any], type[BaseException], int]] = [
        (errors.InvalidParameter, ValueError, 87), (errors.MappedAlignment, ValueError, 1132),
        (errors.FileInvalid, ValueError, 1006), (errors.ViewInUse, BufferError, 1224),
        (errors.NotEnoughMemory, MemoryError, 8), (errors.ObjectNotFound, FileNotFoundError, 2),
    ]  # fmt: skip
    for ours, theirs, code in pairs:
        assert isinstance(ours("x"), theirs)
        assert ours("x").code == code


def test_view_is_public() -> None:
    import portway

    assert portway.View is View
