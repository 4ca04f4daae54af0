"""The folder and record of one pipe: who serves it, which instances there are. See `wire.pipe` for the layout.

``record`` lies in the pipe's folder beside one socket for each listening instance. What is alive is told by the kernel:

* byte 0 of the record, locked, is the gate: joining and leaving exclude each other;
* byte ``16 + slot`` is held by whoever has that instance: the limit of instances holds by itself. It is taken for
  writing and kept for reading, so that two may hold it while an instance moves to another process;
* a byte from 300 on is held by every server object, as long as it or one of its pipes is open: the name exists while
  any is held.

The locks are open-file-description locks; they go with the process, however it ends. What a dead one left is removed by
whoever takes its slot, and by `sweep`. Only the owner writes; others read with pread(2) and never map, except for the
words that the kernel itself compares.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple, Self

from .._accel import wake as _native
from ..errors import AccessDenied, ObjectClosed, ObjectCorrupt, PipeBusy
from ..wire import pipe as wire
from ..wire.pipe import Header, Line, LineState
from .device import Device, Place
from .netinfo import unix_queue
from .objectfile import full
from .ofdlock import all_locked, gate, locked_from, try_lock, unlock
from .pipe_name import MAX_SOCKET_PATH, PipeName
from .record import myself

if TYPE_CHECKING:
    from .._native.wake import Word

__all__ = ["Record", "find", "reach"]

SLOTS, MEMBERS, MAX_MEMBERS = 16, 300, 1024
_SOCKET = re.compile(r"([0-9]{1,3})\.[0-9]+")
_live: weakref.WeakSet[Record] = weakref.WeakSet()


def reach(folder: str, folder_fd: int, name: str) -> str:
    """A path of at most 107 bytes to a file in the folder."""
    path = f"{folder}/{name}"
    return path if len(os.fsencode(path)) <= MAX_SOCKET_PATH else f"/proc/self/fd/{folder_fd}/{name}"


class Record:
    """One opened record. A reader's is cheap and closed at once; a server's (`joined`) holds its locks.

    ``close()`` gives everything back. In a fork child it is closed and holds nothing.
    """

    def __init__(self, fd: int, folder_fd: int, place: Place, folder: str, header: Header) -> None:
        self.fd, self.folder_fd, self.place, self.folder, self.header = fd, folder_fd, place, folder, header
        self.lock = threading.RLock()
        self.member = -1
        self.slots: set[int] = set()
        self._word: Word | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        return self.fd < 0

    @property
    def path(self) -> str:
        return f"{self.folder}/record"

    @property
    def word(self) -> Word:
        """The wake word, for those who wait for an instance."""
        with self.lock:
            if self._word is None:
                self._word = _native.Word(self.fd, wire.WAKE_AT)
            return self._word

    def wake_value(self) -> int:
        return int.from_bytes(os.pread(self.fd, 4, wire.WAKE_AT), "little")

    def reach(self, name: str) -> str:
        return reach(self.folder, self.folder_fd, name)

    # -- looking -------------------------------------------------------------------------------------------------------

    def lines(self) -> list[tuple[int, Line]]:
        """(slot, line) of all instances, the dead ones' too."""
        size = self.header.max_instances * wire.LINE_SIZE
        return list(wire.unpack_lines(os.pread(self.fd, size, wire.HEADER_SIZE)))

    def listening(self) -> list[tuple[int, Line]]:
        """Those of `lines` that listen, the oldest first."""
        size = self.header.max_instances * wire.LINE_SIZE
        return wire.unpack_listening(os.pread(self.fd, size, wire.HEADER_SIZE))

    def noted(self) -> int:
        """How many lines are not free; nearly the number of `held`, for less."""
        states = os.pread(self.fd, self.header.max_instances * wire.LINE_SIZE, wire.HEADER_SIZE)[4 :: wire.LINE_SIZE]
        return len(states) - states.count(0)

    def alive(self) -> bool:
        """Whether any server has the pipe, besides this object."""
        return locked_from(self.fd, SLOTS, MEMBERS + MAX_MEMBERS - SLOTS) is not None

    def held(self) -> set[int]:
        """The slots that somebody has, ours included."""
        return self.slots | {at - SLOTS for at in all_locked(self.fd, SLOTS, self.header.max_instances)}

    # -- the server's side ---------------------------------------------------------------------------------------------

    @contextmanager
    def gate(self, patience: float = 5.0) -> Iterator[None]:
        with self.lock:
            self._require()
            with gate(self.fd, self.path, patience=patience):
                yield

    def _require(self) -> None:
        if self.fd < 0:
            raise ObjectClosed(f"the pipe {self.header.name!r} is closed, or was opened by the parent of this process")

    def join(self) -> None:
        """Notes this object as a server; under the gate, or before the record has a name."""
        for at in range(MEMBERS, MEMBERS + MAX_MEMBERS):
            if try_lock(self.fd, at):
                self.member = at
                _live.add(self)
                return
        raise PipeBusy(f"{MAX_MEMBERS} server objects have the pipe {self.header.name!r}, more cannot")

    def adopt(self, slot: int) -> None:
        """This descriptor came with the lock of `slot`: the instance moved here."""
        self.slots.add(slot)
        _live.add(self)

    def take_slot(self) -> int | None:
        """A free instance, locked, cleaned of what a dead server left; None when all are taken."""
        with self.lock:
            self._require()
            for slot in range(self.header.max_instances):
                if slot not in self.slots and try_lock(self.fd, SLOTS + slot):
                    try_lock(self.fd, SLOTS + slot, fcntl.F_RDLCK)
                    self.slots.add(slot)
                    line = self.line(slot)
                    if line.state:
                        self._clean(slot, line)
                    return slot
        return None

    def give_slot(self, slot: int) -> None:
        with self.lock:
            if self.fd >= 0 and slot in self.slots:
                self.slots.discard(slot)
                unlock(self.fd, SLOTS + slot)

    def ask(self) -> None:
        """Of the others: one of the instances that only wait for clients. They look every half second."""
        os.pwrite(self.fd, (_now_ms() or 1).to_bytes(4, "little"), wire.ASKED_AT)

    def asked(self) -> bool:
        """Whether a server asked in the last two seconds."""
        at = int.from_bytes(os.pread(self.fd, 4, wire.ASKED_AT), "little")
        return at != 0 and (_now_ms() - at) & 0xFFFFFFFF < 2000

    def surplus(self) -> bool:
        """Whether a server has more than one instance that waits for its client."""
        held = self.held()
        waiting = Counter(
            line.server for slot, line in self.lines()
            if slot in held and line.state is LineState.LISTENING and not unix_queue(line.inode)
        )  # fmt: skip
        return any(count > 1 for count in waiting.values())

    def share_slot(self, slot: int) -> int:
        """Another descriptor that holds the slot by itself, for another process or for longer; the caller closes it."""
        with self.lock:
            self._require()
            fd = os.open(f"/proc/self/fd/{self.fd}", os.O_RDWR | os.O_CLOEXEC)
            if not try_lock(fd, SLOTS + slot, fcntl.F_RDLCK):
                os.close(fd)
                raise ObjectClosed(f"instance {slot} of the pipe {self.header.name!r} is not ours")
            return fd

    def line(self, slot: int) -> Line:
        data = os.pread(self.fd, wire.LINE_SIZE, wire.line_at(slot)).ljust(wire.LINE_SIZE, b"\0")
        found = next(iter(wire.unpack_lines(data)), None)
        return found[1] if found else wire.FREE._replace(generation=int.from_bytes(data[:4], "little"))

    def write(self, slot: int, line: Line) -> None:
        """All but the list of disconnected generations."""
        with self.lock:
            if self.fd >= 0:
                data = wire.pack_line(line)[: wire.DISCONNECTED_AT]
                try:
                    os.pwrite(self.fd, data, wire.line_at(slot))
                except OSError as error:
                    raise full(error, self.path) from error

    def note_disconnected(self, slot: int, generation: int) -> None:
        with self.lock:
            if self.fd >= 0:
                at = wire.line_at(slot) + wire.DISCONNECTED_AT
                before = os.pread(self.fd, 28, at)
                os.pwrite(self.fd, generation.to_bytes(4, "little") + before, at)

    def wake(self) -> None:
        """An instance listens: one who waits for it looks again."""
        with self.lock:
            if self.fd >= 0:
                self.word.change(time.monotonic_ns() >> 4 & 0xFFFFFFFF, 1)

    def _clean(self, slot: int, line: Line) -> None:
        with suppress(FileNotFoundError):
            os.unlink(f"{slot}.{line.generation}", dir_fd=self.folder_fd)
        self.write(slot, wire.FREE._replace(generation=line.generation))

    def sweep(self) -> None:
        """Under the gate: frees the lines of dead servers, and removes sockets that no line names.

        A living server takes a slot without the gate: so each is looked at while we have it ourselves.
        """
        files: dict[int, list[str]] = {slot: [] for slot, _ in self.lines()}
        for name in os.listdir(self.folder_fd):
            if found := _SOCKET.fullmatch(name):
                files.setdefault(int(found[1]), []).append(name)
        for slot, names in files.items():
            with self.lock:
                if slot in self.slots or slot >= wire.MAX_INSTANCES or not try_lock(self.fd, SLOTS + slot):
                    continue
                try:
                    for name in names:
                        with suppress(OSError):
                            os.unlink(name, dir_fd=self.folder_fd)
                    if (line := self.line(slot)).state:
                        self._clean(slot, line)
                finally:
                    unlock(self.fd, SLOTS + slot)

    def remove(self) -> None:
        """Under the gate, when nobody is left: the files, the record and the folder, as far as they are ours."""
        for name in os.listdir(self.folder_fd):
            if _SOCKET.fullmatch(name):
                with suppress(OSError):
                    os.unlink(name, dir_fd=self.folder_fd)
        with suppress(FileNotFoundError):
            if os.fstat(self.fd).st_ino == os.stat("record", dir_fd=self.folder_fd).st_ino:
                os.unlink("record", dir_fd=self.folder_fd)
        with suppress(OSError):
            os.rmdir(self.folder)

    def again(self) -> Record:
        """A reader's record with descriptors of its own."""
        with self.lock:
            self._require()
            fd = fcntl.fcntl(self.fd, fcntl.F_DUPFD_CLOEXEC, 0)
            try:
                folder_fd = fcntl.fcntl(self.folder_fd, fcntl.F_DUPFD_CLOEXEC, 0)
            except OSError:
                os.close(fd)
                raise
        return Record(fd, folder_fd, self.place, self.folder, self.header)

    def close(self) -> None:
        """Only the descriptors: see `pipe_serving.Serving` for leaving in order."""
        with self.lock:
            fd, self.fd = self.fd, -1
            if fd < 0:
                return
            if self._word is not None:
                self._word.close()
            self.slots.clear()
            _live.discard(self)
            os.close(self.folder_fd)
            os.close(fd)

    def forget(self) -> None:
        """In a fork child: the locks are the parent's, and go with it."""
        self.lock = threading.RLock()
        self.close()


def _now_ms() -> int:
    return time.monotonic_ns() // 1_000_000 & 0xFFFFFFFF


def _after_fork() -> None:
    for record in list(_live):
        record.forget()


os.register_at_fork(after_in_child=_after_fork)


# -- finding and making ------------------------------------------------------------------------------------------------


def find(place: Place, name: PipeName, write: bool = False) -> Record | None:
    """The record of `name` in a user's place, whether or not a server lives; None when there is none.

    `AccessDenied`: it is there, but not for us. `ObjectCorrupt`: something else lies there, or it lies.
    """
    return open_record(place, name.key, write)


def open_record(place: Place, key: str, write: bool = False) -> Record | None:
    folder = f"{place.path}/{key}"
    try:
        folder_fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise full(error, folder) from error
    fd = -1
    try:
        flags = (os.O_RDWR if write else os.O_RDONLY) | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open("record", flags, dir_fd=folder_fd)
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_uid != place.uid:
            raise ObjectCorrupt(f"{folder}/record is not a record of uid {place.uid}", hint=f"rm -r {folder}")
        header = wire.unpack_header(os.pread(fd, wire.HEADER_SIZE, 0), f"{folder}/record")
        if write:  # a listing descriptor is needed; O_PATH cannot be read
            readable = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            os.close(folder_fd)
            folder_fd = readable
        return Record(fd, folder_fd, place, folder, header)
    except BaseException as error:
        for one in (fd, folder_fd):
            if one >= 0:
                os.close(one)
        if isinstance(error, FileNotFoundError):
            return None
        if isinstance(error, OSError) and error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise ObjectCorrupt(f"{folder}/record is no record", hint=f"its owner: rm -r {folder}") from None
        if isinstance(error, OSError) and not isinstance(error, (AccessDenied,)):
            raise full(error, folder) from error
        raise


def make(device: Device, name: PipeName, header: Header, shared: bool) -> Record | None:
    """A new record with a name, joined by us and with slot 0 ours; None when another server was first."""
    place = device.own()
    folder = f"{place.path}/{name.key}"
    try:
        with suppress(FileExistsError):
            os.mkdir(folder, 0o700)  # in a folder that is ours alone; see below for who else may enter
            os.chmod(folder, 0o700)  # the umask may have taken our own rights
        folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise full(error, folder) from error
    made = None
    fd = -1
    try:
        fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        os.fchmod(fd, 0o644 if shared else 0o600)
        os.posix_fallocate(fd, 0, wire.RECORD_SIZE)
        os.pwrite(fd, wire.pack_header(header), 0)
        made = Record(fd, folder_fd, place, folder, header)
        made.join()
        made.take_slot()
        os.link(f"/proc/self/fd/{fd}", "record", src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
        os.fchmod(folder_fd, 0o711 if shared else 0o700)
        return made
    except BaseException as error:
        if made is not None:
            made.close()
        else:
            for one in (fd, folder_fd):
                if one >= 0:
                    os.close(one)
        if isinstance(error, (FileExistsError, FileNotFoundError)):
            return None
        with suppress(OSError):
            os.rmdir(folder)
        if isinstance(error, OSError):
            raise full(error, folder) from error
        raise


class Who(NamedTuple):
    """This server object, as its lines name it."""

    pid: int
    start: int
    number: int


def who() -> Who:
    pid, start = myself()
    return Who(pid, start, int.from_bytes(os.urandom(8), "little") or 1)
