"""What workers print: appended to a file each, passed on with a prefix, trimmed from the front.

Never a pipe: a worker that prints would fail once the supervisor is dead. The files are
``output/GENERATION.WORKER.out`` in the service's folder; `Tail` follows them by inotify(7) and frees what it passed on
with ``fallocate(FALLOC_FL_PUNCH_HOLE)``, all but the last MiB, which `last_lines` and ``portway logs`` read.
"""

from __future__ import annotations

import ctypes
import os
import select
import struct

from ..errors import SuperviseError
from .loop import Loop

__all__ = ["Tail", "chunks", "files", "last_lines"]

_IN_MODIFY, _IN_CLOEXEC, _IN_NONBLOCK = 0x2, 0o2000000, 0o4000
_PUNCH_KEEP_SIZE = 0x3  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
_EVENT = struct.Struct("=iIII")
KEPT = 1 << 20  # bytes of passed-on output that stay readable, a file
_TRIM = 4 << 20  # bytes passed on before the next hole is punched
_BEHIND = 64 << 20  # bytes not passed on (nobody reads our output) before some are skipped
_LINE = 64 << 10  # a longer line is passed on in pieces
_READ = 256 << 10
_PIPE_BUF = 4096  # poll() says a pipe is writable when this much fits
KEPT_GENERATIONS = 3


def files(folder: str) -> list[tuple[int, int, str]]:
    """(generation, worker, path) of every output file, oldest generation first."""
    found = []
    root = os.path.join(folder, "output")
    for name in os.listdir(root) if os.path.isdir(root) else ():
        parts = name.split(".")
        if len(parts) == 3 and parts[2] == "out" and parts[0].isdigit() and parts[1].isdigit():
            found.append((int(parts[0]), int(parts[1]), os.path.join(root, name)))
    return sorted(found)


def chunks(path: str, start: int = -1, size: int = KEPT) -> tuple[bytes, int]:
    """At most `size` bytes from `start` (-1: the last `size`) and the offset after them; the hole before is skipped."""
    try:
        with open(path, "rb", buffering=0) as file:
            end = os.fstat(file.fileno()).st_size
            at = max(0, end - size) if start < 0 else start
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                return b"", end  # nothing after it but a hole
            os.lseek(file.fileno(), at, os.SEEK_SET)
            data = file.read(size)
            return data.lstrip(b"\0") if start < 0 else data, at + len(data)
    except FileNotFoundError:
        return b"", max(start, 0)


def last_lines(folder: str, generation: int, count: int = 20) -> list[str]:
    """The last lines a generation printed, of each worker in turn; with its number if there are several."""
    mine = [(worker, path) for number, worker, path in files(folder) if number == generation]
    found: list[str] = []
    for worker, path in mine:
        data, _ = chunks(path, size=32 << 10)
        lines = [line.decode(errors="replace")[:2000] for line in data.splitlines()[-count:]]
        found += [f"[{worker}] {line}" for line in lines] if len(mine) > 1 else lines
    return found[-count * 2 :]


class _File:
    __slots__ = ("at", "fd", "label", "path", "trimmed")

    def __init__(self, path: str, label: str, at: int) -> None:
        self.path = path
        self.label = label.encode()
        self.at = at
        self.trimmed = 0
        self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)


class Tail:
    """Follows the files of one service and writes ``[generation.worker] line`` to our stdout. Never waits for it."""

    def __init__(self, loop: Loop, folder: str) -> None:
        self._loop = loop
        self.folder = os.path.join(folder, "output")
        os.makedirs(self.folder, 0o700, exist_ok=True)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._files: dict[str, _File] = {}
        self._dirty: dict[str, None] = {}
        self._out = b""  # at most what one read gives, with its labels
        self._waiting = False
        self._dead = False
        self._inotify = self._libc.inotify_init1(_IN_CLOEXEC | _IN_NONBLOCK)
        if self._inotify < 0 or self._libc.inotify_add_watch(self._inotify, os.fsencode(self.folder), _IN_MODIFY) < 0:
            why = os.strerror(ctypes.get_errno())
            raise SuperviseError(
                f"cannot follow the output: inotify: {why}", hint="raise fs.inotify.max_user_instances"
            )
        loop.watch(self._inotify, self._on_event)

    def open(self, generation: int, worker: int, owner: tuple[int, int] | None = None) -> int:
        """A descriptor to give to that worker as stdout and stderr; the caller closes its copy."""
        path = os.path.join(self.folder, f"{generation}.{worker}.out")
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        if owner is not None:
            os.fchown(fd, *owner)  # it may open /dev/stdout again under its own uid
        self.follow(generation, worker)
        return fd

    def follow(self, generation: int, worker: int, at: int = -1) -> None:
        """From offset `at`, or from the end. What was there before stays in the file."""
        name = f"{generation}.{worker}.out"
        path = os.path.join(self.folder, name)
        if name not in self._files and os.path.exists(path):
            self._files[name] = _File(path, f"[{generation}.{worker}] ", os.path.getsize(path) if at < 0 else at)

    def positions(self) -> dict[str, int]:
        return {name: file.at for name, file in self._files.items()}

    def forget(self, generation: int, keep: bool = True) -> None:
        """The generation has ended: pass on the rest, stop following; remove the files of those long gone."""
        for name in [name for name in self._files if name.split(".")[0] == str(generation)]:
            self._pass_on(self._files[name], final=True)  # what does not go through now stays in the file
            os.close(self._files.pop(name).fd)
            self._dirty.pop(name, None)
        live = {int(name.split(".")[0]) for name in self._files}
        ended = sorted({number for number, _, _ in files(os.path.dirname(self.folder))} - live)
        for number, _, path in files(os.path.dirname(self.folder)):
            if number in ended[: -KEPT_GENERATIONS if keep else None]:
                os.unlink(path)

    def drop(self, generation: int) -> None:
        """It never ran: its files go too."""
        for name in [name for name in self._files if name.split(".")[0] == str(generation)]:
            file = self._files.pop(name)
            os.close(file.fd)
            os.unlink(file.path)

    def _on_event(self) -> None:
        try:
            data = os.read(self._inotify, 65536)
        except BlockingIOError:
            return
        at = 0
        while at + _EVENT.size <= len(data):
            *_, size = _EVENT.unpack_from(data, at)
            name = data[at + _EVENT.size : at + _EVENT.size + size].rstrip(b"\0").decode(errors="replace")
            self._dirty[name] = None
            at += _EVENT.size + size
        self._soon(0.02)

    def _soon(self, seconds: float) -> None:
        if not self._waiting:
            self._waiting = True
            self._loop.after(seconds, self._pump)

    def _pump(self) -> None:
        self._waiting = False
        dirty, self._dirty = self._dirty, {}
        for name in dirty:
            if name in self._files and not self._pass_on(self._files[name]):
                self._dirty[name] = None
        if self._dirty or self._out:
            self._soon(0.02 if self._out else 0.0)

    def flush(self) -> None:
        """As much as our stdout takes now."""
        for file in self._files.values():
            self._pass_on(file, final=True)

    def _pass_on(self, file: _File, *, final: bool = False) -> bool:
        """False when there is more to come back for."""
        if not self._write():
            return False
        size = os.fstat(file.fd).st_size
        if size < file.at:
            file.at = 0  # somebody truncated it
        if size - file.at > _BEHIND:
            file.at = size - KEPT
        data = os.pread(file.fd, _READ, file.at)
        end = data.rfind(b"\n") + 1
        if final or (not end and len(data) >= _LINE):
            end = len(data)
        if end:
            lines = data[:end].removesuffix(b"\n").split(b"\n")
            self._out += b"".join(file.label + line + b"\n" for line in lines)
            file.at += end
        whole = self._write()
        self._trim(file)
        return whole and (final or len(data) < _READ)

    def _write(self) -> bool:
        """What was read and not yet written; False while our stdout takes no more."""
        poll = select.poll()
        at = 0
        try:
            poll.register(1, select.POLLOUT)
            while at < len(self._out) and not self._dead and poll.poll(0):
                at += os.write(1, self._out[at : at + _PIPE_BUF])
        except OSError:
            self._dead = True  # nobody reads us any more; the files go on
        self._out = b"" if self._dead else self._out[at:]
        return not self._out

    def _trim(self, file: _File) -> None:
        until = max(0, file.at - KEPT) & ~4095
        if until - file.trimmed < _TRIM:
            return
        punch = self._libc.fallocate
        punch.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        if punch(file.fd, _PUNCH_KEEP_SIZE, 0, until) == 0:
            file.trimmed = until
        elif file.at == os.fstat(file.fd).st_size:
            os.truncate(file.fd, 0)  # a file system without holes; the worker appends, so it goes on at the new end
            file.at = file.trimmed = 0

    def close(self) -> None:
        for file in self._files.values():
            os.close(file.fd)
        self._files.clear()
        self._loop.forget(self._inotify)
        os.close(self._inotify)
