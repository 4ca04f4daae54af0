"""Finding a pipe by its name, and claiming one of its instances. One look at a time; `Search` never waits.

The order: one's own pipe, root's, other users', then .NET's path (the exact case, else the only name that differs in
case). The first that lives decides.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from ..deadline import Deadline
from ..errors import AccessDenied, AmbiguousName, BadPipe, ObjectCorrupt, PipeBusy, PipeNotFound
from ..wire.pipe import DISCONNECTED_AT, Header, Line, line_at
from .device import Device, Place
from .netinfo import look_at, unix_queue
from .pipe_name import DOTNET_PREFIX, PipeName, dotnet_folder, fold, parse_pipe_name
from .pipe_record import Record, find
from .pipe_waiting import Crowd
from .process import overflow_uid, peer_of, user_name, within_limits

if TYPE_CHECKING:
    import asyncio

__all__ = ["Claim", "Search"]

_SLICE = 0.1
_FIRST_PAUSE, _NEWS_PAUSE, _LAST_PAUSE = 0.001, 0.004, 0.025


class Claim(NamedTuple):
    """A connection that is this process's now. The caller closes the socket, and the record if there is one."""

    sock: socket.socket
    header: Header | None
    """None: a .NET server's, a plain stream."""
    record: Record | None
    watch_at: int
    generation: int


class Search:
    """Looks for one name. ``claim()`` or ``listens()`` once, and ``pause(deadline)`` between two looks."""

    def __init__(self, name: str, access: int | None, server_uid: int | None, root: str | None) -> None:
        self.name: PipeName = parse_pipe_name(name)
        self.access, self.server_uid = access, server_uid
        if server_uid is not None and server_uid == overflow_uid():
            raise AccessDenied(f"server_uid={server_uid} is nobody: whoever has no number here", hint="name another")
        self.device = Device("pipe", root)
        self.crowd: Crowd | None = None
        """Set while the pipe is there and has no free instance."""
        self.turn: asyncio.Lock | None = None  # of tasks
        self._wrong: Exception | None = None
        self.patient = False
        """Waiting for the name: another user's closed or broken pipe is no reason to give up."""
        self._seen, self._looked = 0, 0.0
        self._wait = _FIRST_PAUSE
        self.default_wait_ms = 50

    def __enter__(self) -> Search:
        return self

    def __exit__(self, *exc: object) -> None:
        self._forget()

    def _forget(self) -> None:
        turn, self.turn = self.turn, None
        if turn is not None:
            turn.release()
        crowd, self.crowd = self.crowd, None
        if crowd is not None:
            crowd.line.leave(self)
            crowd.leave()

    # -- one look ------------------------------------------------------------------------------------------------------

    def claim(self) -> Claim:
        """`PipeNotFound`, `PipeBusy`, `AccessDenied`, `AmbiguousName`, `ObjectCorrupt` as things are now."""
        record = self._living()
        if record is None:
            try:
                return self._claim_dotnet()
            except BadPipe:  # of portway, then: its server began after the look at the records
                record = self._living()
                if record is None:
                    raise
        gone = self.crowd.gone if self.crowd is not None and self.crowd.is_at(record) else {}
        try:
            self._check_access(record.header)
            for slot, line in record.listening():
                if gone.get(slot) != line.generation:
                    sock = self._connect(record, slot, line)
                    gone[slot] = line.generation
                    if sock is not None:
                        return self._claimed(sock, record, slot, line)
        except BaseException:
            self._close(record)
            raise
        raise self._busy(record, gone)

    def _claimed(self, sock: socket.socket, record: Record, slot: int, line: Line) -> Claim:
        try:
            own = record.again() if self._is_shared(record) else record
        except BaseException:
            sock.close()
            raise
        return Claim(sock, record.header, own, line_at(slot) + DISCONNECTED_AT, line.generation)

    def _is_shared(self, record: Record) -> bool:
        return self.crowd is not None and self.crowd.record is record

    def _close(self, record: Record) -> None:
        if not self._is_shared(record):
            record.close()

    def listens(self) -> None:
        """WaitNamedPipe's question: returns when an instance could be claimed. Else as `claim`."""
        record = self._living()
        if record is None:
            path = self._dotnet_path()
            self._check_uid(path, look_at(path).uid)
            return
        try:
            self.default_wait_ms = record.header.default_wait_ms
            held = record.held()
            if any(slot in held and not unix_queue(line.inode) for slot, line in record.listening()):
                self._close(record)
                return
        except BaseException:
            self._close(record)
            raise
        raise self._busy(record, {})

    def _living(self) -> Record | None:
        """The first record of the name with a server; what is wrong with others is told when nothing is found."""
        if self.crowd is not None:
            known = self.crowd.record
            self._seen = known.wake_value()  # before looking, so that no news is missed
            if known.place.uid == os.geteuid() and os.fstat(known.fd).st_nlink and known.alive():
                return known  # one's own comes first, and here it is still
        self._wrong = None
        for place in self.device.places(self.server_uid):
            try:
                record = find(place, self.name)
            except AccessDenied as error:
                if not self._waits(place):
                    self._wrong = self._wrong or self._denied(place.uid, error)
                continue
            except (ObjectCorrupt, OSError) as error:
                if not self._waits(place):
                    self._wrong = self._wrong or error
                continue
            if record is None:
                continue
            self._seen = record.wake_value()
            if record.alive():
                return record
            record.close()
        self._forget()
        return None

    def _waits(self, place: Place) -> bool:
        return self.patient and self.server_uid is None and place.uid != os.geteuid()

    def _denied(self, uid: int, error: AccessDenied) -> AccessDenied:
        if uid == os.geteuid():
            return error
        me, owner = user_name(os.geteuid()), user_name(uid)
        return AccessDenied(f"the pipe {self.name} of uid {owner} is not open to uid {me}", hint="see Security")

    def _check_access(self, header: Header) -> None:
        allowed = {1: 2, 2: 1, 3: 3}[header.direction]
        if self.access is not None and self.access & ~allowed:
            raise AccessDenied(
                f"the pipe {self.name} is {header.direction.name.lower()} for its server: this end may only "
                f"{'write' if allowed == 2 else 'read'}",
                hint=f"open it with direction={'outbound' if allowed == 2 else 'inbound'!r}",
            )

    def _connect(self, record: Record, slot: int, line: Line) -> socket.socket | None:
        kind = socket.SOCK_SEQPACKET if record.header.message else socket.SOCK_STREAM
        sock = _connected(kind, record.reach(f"{slot}.{line.generation}"), self.name)
        if sock is not None and peer_of(sock).uid != record.place.uid:
            uid = peer_of(sock).uid
            sock.close()
            raise AccessDenied(
                f"the pipe {self.name} in {record.folder} is served by uid {user_name(uid)}, not by the folder's owner"
            )
        return sock

    def _busy(self, record: Record, gone: dict[int, int]) -> PipeBusy:
        """Joins the line at this pipe, or stays in it."""
        self._looked, used = time.monotonic(), record.noted()
        if self.crowd is not None and self.crowd.is_at(record):
            self._close(record)
        else:
            self._forget()
            self.crowd = Crowd.of(record)
            self.crowd.gone.update(gone)
        return PipeBusy(
            f"no instance of the pipe {self.name} listens: {used} of {record.header.max_instances} exist, all in use",
            hint="give timeout= to wait for one",
        )

    # -- .NET's --------------------------------------------------------------------------------------------------------

    def _claim_dotnet(self) -> Claim:
        path = self._dotnet_path()
        self._check_uid(path, look_at(path).uid)  # before anybody has a client that is not his
        busy = PipeBusy(f"{path} has as many clients as may wait there")
        sock = _connected(socket.SOCK_STREAM, path, self.name, busy)
        if sock is None:
            raise PipeNotFound(f"the pipe {self.name} has gone this moment: {path}")
        try:
            self._check_uid(path, peer_of(sock).uid)
        except AccessDenied:
            sock.close()
            raise
        return Claim(sock, None, None, 0, 0)

    def _check_uid(self, path: str, uid: int) -> None:
        if self.server_uid is not None and uid not in (-1, self.server_uid):
            raise AccessDenied(f"{path} is served by uid {user_name(uid)}, not {user_name(self.server_uid)}")

    def _dotnet_path(self) -> str:
        exact = self.name.dotnet_path
        if exact and (seen := look_at(exact)).state in ("live", "denied"):
            if self.server_uid is not None and seen.uid not in (self.server_uid, -1):
                owner, wanted = user_name(seen.uid), user_name(self.server_uid)
                raise AccessDenied(f"{exact} belongs to uid {owner}, not {wanted}")
            return exact
        others = [] if self.name.rooted else _same_but_for_case(self.name)
        if len(others) > 1:
            raise AmbiguousName(
                f"several pipes of .NET differ from {self.name} only in case: {', '.join(sorted(others))}",
                hint="give the exact name",
            )
        if others:
            return os.path.join(dotnet_folder(), others[0])
        if self._wrong is not None:
            raise self._wrong
        raise PipeNotFound(
            f"no pipe named {self.name}: looked in {self.device.places_looked_at()}"
            f"{f' and at {exact}' if exact else ''}",
            hint="start its server first, or give appear=True to wait for it",
        )

    # -- between two looks ---------------------------------------------------------------------------------------------

    def pause(self, deadline: Deadline) -> None:
        """Until something may have changed: it is this thread's turn, an instance listens anew, or, for a name that is
        not there, a moment."""
        left, crowd = deadline.remaining(), self.crowd
        if crowd is None:
            time.sleep(self.next_pause(left))
        elif crowd.line.first is self:
            crowd.record.word.wait(self._seen, _SLICE if left is None else min(left, _SLICE))
        else:
            crowd.line.stand(self, left)

    async def pause_task(self, deadline: Deadline) -> None:
        """`pause`, for asyncio."""
        import asyncio

        crowd = self.crowd
        if crowd is None or self.turn is not None:
            while True:
                await asyncio.sleep(self.next_pause(deadline.remaining()))
                if crowd is None or deadline.expired:
                    return
                if self._news(crowd.record):
                    self._wait = min(self._wait, _NEWS_PAUSE)  # there will be more
                    return
        with suppress(TimeoutError):
            turn = crowd.turn_of_tasks()
            async with asyncio.timeout(deadline.remaining()):
                await turn.acquire()
                self.turn = turn

    def _news(self, record: Record) -> bool:
        return record.wake_value() != self._seen or time.monotonic() - self._looked > _SLICE

    def next_pause(self, left: float | None) -> float:
        """Seconds; growing."""
        wait, self._wait = self._wait, min(self._wait * 1.5, _LAST_PAUSE)
        wait *= 0.75 + (time.monotonic_ns() & 0xFF) / 512  # so that a crowd does not come at once
        return wait if left is None else min(wait, left)


def _connected(kind: int, path: str, name: PipeName, busy: PipeBusy | None = None) -> socket.socket | None:
    """None: it does not listen, or has its client (`busy`, if given). Never waits."""
    with within_limits(f"the pipe {name}"):
        sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    wrong = sock.connect_ex(path)
    if wrong == 0:
        sock.setblocking(True)
        return sock
    sock.close()
    if wrong == errno.EAGAIN and busy is not None:
        raise busy
    if wrong in (errno.EAGAIN, errno.ECONNREFUSED, errno.ENOENT):
        return None
    if wrong in (errno.EACCES, errno.EPERM):
        raise AccessDenied(f"the pipe {name} is not open to uid {user_name(os.geteuid())}: {path}")
    if wrong == errno.EPROTOTYPE:
        raise BadPipe(f"{path} is no byte pipe")
    raise OSError(wrong, os.strerror(wrong), path)


def _same_but_for_case(name: PipeName) -> list[str]:
    folder, wanted = dotnet_folder(), fold(DOTNET_PREFIX + name.text)
    found = []
    with suppress(OSError):
        for one in os.listdir(folder):
            same = one.startswith(DOTNET_PREFIX) and fold(one) == wanted
            if same and look_at(os.path.join(folder, one)).state in ("live", "denied"):
                found.append(one)
    return found
