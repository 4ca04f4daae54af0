r"""Named pipes by the calls of Windows, under the names and with the results of pywin32's win32pipe and win32file.

For programs that are ported: handles start in byte read mode and blocking, an instance is connected, disconnected and
connected again, results are error numbers where pywin32 gives them. `portway.NamedPipeServer` is the easy API over the
same pipes. Beyond Windows: ``timeout=`` in seconds on what can wait. Not here: overlapped operations (use threads, or
`portway.aio`); PIPE_WAIT and PIPE_NOWAIT are.

Errors are those of `portway.errors`; ``error.code`` is the Windows number (ERROR_PIPE_LISTENING 536 is `PipeListening`,
and so on). Source: CreateNamedPipeW, ConnectNamedPipe, DisconnectNamedPipe, PeekNamedPipe, TransactNamedPipe,
SetNamedPipeHandleState, GetNamedPipeInfo, WaitNamedPipeW, CallNamedPipeW, CreateFileW, ReadFile, WriteFile,
FlushFileBuffers, CloseHandle.
"""

from __future__ import annotations

import os
import select
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

from .deadline import Deadline
from .errors import (
    AccessDenied,
    BadPipe,
    InvalidHandle,
    InvalidParameter,
    MoreData,
    NoData,
    NotSupported,
    ObjectClosed,
    OperationAborted,
    OperationTimeout,
    PipeEmpty,
    PipeListening,
    PipeNotConnected,
)
from .kernel.pipe_client import DEFAULT_WAIT, NamedPipeClient, call_pipe, wait_pipe
from .kernel.pipe_end import PipeEnd
from .kernel.pipe_server import NamedPipeConnection, server_options
from .kernel.pipe_serving import Serving
from .kernel.security import Security

PIPE_ACCESS_INBOUND, PIPE_ACCESS_OUTBOUND, PIPE_ACCESS_DUPLEX = 1, 2, 3
FILE_FLAG_FIRST_PIPE_INSTANCE = 0x00080000
FILE_FLAG_WRITE_THROUGH = 0x80000000
FILE_FLAG_OVERLAPPED = 0x40000000
WRITE_DAC, WRITE_OWNER, ACCESS_SYSTEM_SECURITY = 0x00040000, 0x00080000, 0x01000000
PIPE_TYPE_BYTE, PIPE_TYPE_MESSAGE = 0, 4
PIPE_READMODE_BYTE, PIPE_READMODE_MESSAGE = 0, 2
PIPE_WAIT, PIPE_NOWAIT = 0, 1
PIPE_ACCEPT_REMOTE_CLIENTS, PIPE_REJECT_REMOTE_CLIENTS = 0, 8
PIPE_UNLIMITED_INSTANCES = 255
PIPE_CLIENT_END, PIPE_SERVER_END = 0, 1
NMPWAIT_USE_DEFAULT_WAIT, NMPWAIT_NOWAIT, NMPWAIT_WAIT_FOREVER = 0, 1, 0xFFFFFFFF
GENERIC_READ, GENERIC_WRITE = 0x80000000, 0x40000000
OPEN_EXISTING = 3
ERROR_MORE_DATA, ERROR_PIPE_CONNECTED = 234, 535


class PipeHandle:
    """What CreateNamedPipe and CreateFile give. ``CloseHandle(handle)`` or leaving ``with`` closes it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.end: PipeEnd | None = None
        self.read_message = False
        self.nowait = False
        self.closed = False

    server: Serving | None = None

    def live(self) -> PipeEnd:
        """The connected end, or the error a call gets in this state."""
        if self.closed:
            raise ObjectClosed(f"this handle of the pipe {self.name} is closed")
        assert self.end is not None
        return self.end

    def timeout(self, given: float | None) -> float | None:
        return 0 if self.nowait else given

    def Close(self) -> None:
        """Closing twice is fine."""
        self.closed = True
        if self.end is not None:
            self.end.close()

    def __del__(self) -> None:
        if not getattr(self, "closed", True):
            self.Close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.Close()

    def __repr__(self) -> str:
        return f"<PipeHandle {self.name!r}{' closed' if self.closed else ''}>"


class _ServerHandle(PipeHandle):
    """One instance: LISTENING, CONNECTED, CLOSING (the client has gone), DISCONNECTED."""

    def __init__(self, name: str, server: Serving) -> None:
        super().__init__(name)
        self.server: Serving = server
        self.disconnected = False
        self.interrupts = self._waiting = 0

    def look(self) -> bool:
        """Takes the client that has opened the instance; False when there is none yet."""
        with self.server.lock:
            if self.closed:
                raise ObjectClosed(f"this handle of the pipe {self.name} is closed")
            if self.end is not None or self.disconnected:
                return self.end is not None
            found = self.server.accept()
            if found is None:
                return False
            self.end = NamedPipeConnection(self.server, *found, max_message=64 << 20, timeout=None)
            if self.end.message:
                self.end.read_message = self.read_message
            if self._waiting:  # another thread's ConnectNamedPipe has its client by this
                self.server.wake()
            return True

    def wait(self, seconds: float | None, interrupts: int) -> None:
        """Until there may be a client. `OperationAborted`, `PipeNotConnected`: cancelled or disconnected since
        `interrupts` was read."""
        with self.server.lock:
            self._check(interrupts)
            self._waiting += 1
        try:
            self.server.wait(seconds)
        finally:
            with self.server.lock:
                self._waiting -= 1
                if not self._waiting:
                    self.server.unwake()
        self._check(interrupts)

    def _check(self, interrupts: int) -> None:
        if interrupts != self.interrupts:
            if self.disconnected:
                raise PipeNotConnected(f"the pipe {self.name} was disconnected meanwhile")
            raise OperationAborted(f"waiting for a client of the pipe {self.name} was cancelled")

    def interrupt(self) -> None:
        """Ends every ConnectNamedPipe that waits now."""
        with self.server.lock:
            self.interrupts += 1
            if self._waiting:
                self.server.wake()

    def live(self) -> PipeEnd:
        if not self.look():
            if self.disconnected:
                raise PipeNotConnected(f"the pipe {self.name} is disconnected", hint="ConnectNamedPipe listens again")
            raise PipeListening(f"nobody has connected to the pipe {self.name} yet", hint="ConnectNamedPipe waits")
        return super().live()

    def gone(self) -> bool:
        """Whether the client has closed its end."""
        poll = select.poll()
        poll.register(self.live().fileno(), 0)  # POLLHUP alone: an outbound end has shut its reading half itself
        return bool(poll.poll(0))

    def disconnect(self) -> None:
        if self.look():
            assert isinstance(self.end, NamedPipeConnection)
            self.end.instance.disconnect()
            self.end.disconnect_here()
            self._last = self.end.instance
            self.end = None
        elif self.disconnected:
            raise PipeNotConnected(f"the pipe {self.name} is disconnected already")
        else:
            self._last = self.server.stop_listening()
        self.disconnected = True
        self.interrupt()

    def listen_again(self) -> None:
        self.server.listen_again(self._last)
        self.disconnected = False

    def Close(self) -> None:
        if not self.closed:
            self.server.close()  # first, or what is released below would listen again
            super().Close()
            if self.disconnected:
                self.server.release(self._last)


# -- the server's calls ----------------------------------------------------------------------------------------------


def CreateNamedPipe(
    name: str, openMode: int, pipeMode: int, nMaxInstances: int, nOutBufferSize: int = 0, nInBufferSize: int = 0,
    nDefaultTimeOut: int = 0, sa: Security | None = None, *, root: str | os.PathLike[str] | None = None,
) -> PipeHandle:  # fmt: skip
    """One instance of a pipe, listening from here on. `sa`: `portway.Security`, None: the owner only (on Windows None
    lets everybody read). nDefaultTimeOut: milliseconds, 0: 50. `InvalidParameter` for bits that cannot be."""
    flags = FILE_FLAG_FIRST_PIPE_INSTANCE | FILE_FLAG_WRITE_THROUGH | FILE_FLAG_OVERLAPPED
    if not 1 <= openMode & 3 <= 3 or openMode & ~(3 | flags | WRITE_DAC | WRITE_OWNER | ACCESS_SYSTEM_SECURITY):
        raise InvalidParameter(f"openMode={openMode:#x}: one of PIPE_ACCESS_*, and flags")
    if pipeMode & ~15 or pipeMode & (PIPE_TYPE_MESSAGE | PIPE_READMODE_MESSAGE) == PIPE_READMODE_MESSAGE:
        raise InvalidParameter(f"pipeMode={pipeMode:#x}: bits that mean nothing, or a byte pipe read by messages")
    _device_only(name)
    options = server_options(
        mode="message" if pipeMode & PIPE_TYPE_MESSAGE else "byte",
        direction={1: "inbound", 2: "outbound", 3: "duplex"}[openMode & 3], max_instances=nMaxInstances, instances=1,
        backlog=1, security=sa, first_instance=bool(openMode & FILE_FLAG_FIRST_PIPE_INSTANCE),
        remote_clients="reject" if pipeMode & PIPE_REJECT_REMOTE_CLIENTS else "accept", out_buffer=nOutBufferSize,
        in_buffer=nInBufferSize, default_wait=nDefaultTimeOut / 1000, root=root,
    )  # fmt: skip
    handle = _ServerHandle(name, Serving(name, options))
    handle.read_message, handle.nowait = bool(pipeMode & PIPE_READMODE_MESSAGE), bool(pipeMode & PIPE_NOWAIT)
    return handle


def ConnectNamedPipe(handle: PipeHandle, *, timeout: float | None = None) -> int:
    """Waits for a client. 0, or ERROR_PIPE_CONNECTED (535) when it was there before the call, which is as good.

    `NoData`: the last client has gone and was not disconnected. `PipeListening`: a PIPE_NOWAIT handle without client.
    """
    server = _server(handle)
    interrupts = server.interrupts
    if server.disconnected:
        server.listen_again()
    elif server.look():
        if server.gone():
            raise NoData(f"the last client of the pipe {server.name} has gone", hint="DisconnectNamedPipe first")
        return ERROR_PIPE_CONNECTED
    deadline = Deadline(server.timeout(timeout))
    while not server.look():
        if server.nowait:
            raise PipeListening(f"nobody has connected to the pipe {server.name} yet")
        deadline.check(f"waiting for a client of the pipe {server.name}")
        server.wait(deadline.remaining(), interrupts)
    return 0


def DisconnectNamedPipe(handle: PipeHandle) -> None:
    """Ends the conversation; what either side has not read is lost. FlushFileBuffers first if it matters."""
    _server(handle).disconnect()


# -- the client's calls ----------------------------------------------------------------------------------------------


def CreateFile(
    fileName: str, desiredAccess: int, shareMode: int = 0, attributes: Any = None,
    CreationDisposition: int = OPEN_EXISTING, flagsAndAttributes: int = 0, hTemplateFile: Any = None, *,
    root: str | os.PathLike[str] | None = None,
) -> PipeHandle:  # fmt: skip
    """Opens a pipe, in byte read mode. `PipeNotFound`, `PipeBusy` (WaitNamedPipe waits), `AccessDenied`."""
    _device_only(fileName)
    access = (1 if desiredAccess & GENERIC_READ else 0) | (2 if desiredAccess & GENERIC_WRITE else 0)
    if not access:
        raise NotSupported(f"desiredAccess={desiredAccess:#x}: give GENERIC_READ, GENERIC_WRITE or both")
    direction = {1: "inbound", 2: "outbound", 3: "duplex"}[access]
    handle = PipeHandle(fileName)
    handle.end = NamedPipeClient(fileName, direction=direction, read_mode="byte", root=root)
    return handle


def WaitNamedPipe(name: str, timeout: int, *, root: str | os.PathLike[str] | None = None) -> None:
    """timeout: milliseconds, or NMPWAIT_USE_DEFAULT_WAIT (0), NMPWAIT_NOWAIT (1), NMPWAIT_WAIT_FOREVER."""
    _device_only(name)
    wait_pipe(name, _milliseconds(timeout), root=root)


def CallNamedPipe(
    name: str, data: bytes, bufSize: int, timeout: int, *, root: str | os.PathLike[str] | None = None
) -> bytes:
    """timeout: as in WaitNamedPipe, for an instance. `MoreData` when the answer is larger; its rest is lost."""
    _device_only(name)
    limit = _milliseconds(timeout)
    if limit is not None and limit != DEFAULT_WAIT:
        wait_pipe(name, limit, root=root)
        limit = DEFAULT_WAIT
    return call_pipe(name, data, timeout=limit, size=bufSize, root=root)


def _milliseconds(timeout: int) -> float | None:
    if timeout == NMPWAIT_USE_DEFAULT_WAIT:
        return DEFAULT_WAIT
    return None if timeout == NMPWAIT_WAIT_FOREVER else timeout / 1000


# -- both ends -------------------------------------------------------------------------------------------------------


def ReadFile(handle: PipeHandle, bufSize: int, *, timeout: float | None = None) -> tuple[int, bytes]:
    """(0, data), or (ERROR_MORE_DATA, part): the next call goes on with the message. `BrokenPipe` at the end;
    `PipeEmpty` on a PIPE_NOWAIT handle."""
    end = handle.live()
    try:
        return 0, end.receive(bufSize, timeout=handle.timeout(timeout))
    except MoreData as more:
        return ERROR_MORE_DATA, more.data
    except OperationTimeout as error:
        if not handle.nowait:
            raise
        raise PipeEmpty(f"nothing to read in the pipe {handle.name}") from error


def WriteFile(handle: PipeHandle, data: bytes, *, timeout: float | None = None) -> tuple[int, int]:
    """(0, bytes written); 0 bytes on a PIPE_NOWAIT handle that has no room. `NoData` when the other end has gone."""
    end = handle.live()
    try:
        return 0, end.send(data, timeout=handle.timeout(timeout))
    except OperationTimeout:
        if not handle.nowait:
            raise
        return 0, 0


def PeekNamedPipe(handle: PipeHandle, size: int) -> tuple[bytes, int, int]:
    """(up to `size` bytes, all that wait, what is left of this message after the copy). Never waits.

    The last of a byte pipe, whose messages have no length, is minus the first, as on Windows."""
    try:
        end = handle.live()
    except (PipeListening, PipeNotConnected) as error:
        raise BadPipe(error.message) from None
    data, total, left = end.peek(size)
    return data, total, left if end.message else -len(data)


def TransactNamedPipe(
    handle: PipeHandle, writeData: bytes, bufSize: int, *, timeout: float | None = None
) -> tuple[int, bytes]:
    """(0, answer) or (ERROR_MORE_DATA, part). `BadPipe`: the handle reads bytes, `PipeBusy`: unread data waits."""
    end = handle.live()
    try:
        return 0, end.transact(writeData, bufSize, timeout=timeout)
    except MoreData as more:
        return ERROR_MORE_DATA, more.data


def FlushFileBuffers(handle: PipeHandle, *, timeout: float | None = None) -> None:
    """Waits until the other end has read everything."""
    handle.live().flush(timeout=timeout)


def SetNamedPipeHandleState(
    handle: PipeHandle, mode: int | None, maxCollectionCount: int | None = None, collectDataTimeout: int | None = None
) -> None:
    """PIPE_READMODE_* | PIPE_WAIT or PIPE_NOWAIT, of this handle only."""
    if maxCollectionCount is not None or collectDataTimeout is not None:
        raise InvalidParameter("collection count and timeout are for remote clients: give None")
    if handle.closed:
        raise ObjectClosed(f"this handle of the pipe {handle.name} is closed")
    if mode is None:
        return
    if mode & ~(PIPE_READMODE_MESSAGE | PIPE_NOWAIT):
        raise InvalidParameter(f"mode={mode:#x}: only PIPE_READMODE_MESSAGE and PIPE_NOWAIT can be set")
    message = bool(mode & PIPE_READMODE_MESSAGE)
    if message and not _is_message(handle):
        raise InvalidParameter(f"the pipe {handle.name} is a byte pipe: it has no messages to read")
    if handle.end is not None and _is_message(handle):
        handle.end.read_message = message
    handle.read_message, handle.nowait = message, bool(mode & PIPE_NOWAIT)


def GetNamedPipeHandleState(handle: PipeHandle) -> tuple[int, int]:
    """(PIPE_READMODE_MESSAGE | PIPE_NOWAIT, how many instances exist now)."""
    if handle.closed:
        raise ObjectClosed(f"this handle of the pipe {handle.name} is closed")
    reads = handle.end.read_message if handle.end is not None and _is_message(handle) else handle.read_message
    count = len(handle.server.record.held()) if handle.server is not None else 1
    return PIPE_READMODE_MESSAGE * reads | PIPE_NOWAIT * handle.nowait, count


def GetNamedPipeInfo(handle: PipeHandle) -> tuple[int, int, int, int]:
    """(flags, out buffer, in buffer, most instances), as the first server said; (0, 0, 0, 255) of a pipe of .NET's."""
    if handle.closed:
        raise ObjectClosed(f"this handle of the pipe {handle.name} is closed")
    kind = PIPE_TYPE_MESSAGE * _is_message(handle)
    if handle.server is not None:
        kind, header = kind | PIPE_SERVER_END, handle.server.record.header
    elif isinstance(handle.end, NamedPipeClient) and handle.end.header is not None:
        header = handle.end.header
    else:
        return kind, 0, 0, PIPE_UNLIMITED_INSTANCES
    return kind, header.out_size, header.in_size, header.max_instances


def GetNamedPipeClientProcessId(handle: PipeHandle) -> int:
    return handle.live().peer.pid if handle.server is not None else _own_pid(handle)


def GetNamedPipeServerProcessId(handle: PipeHandle) -> int:
    return handle.live().peer.pid if handle.server is None else _own_pid(handle)


def _own_pid(handle: PipeHandle) -> int:
    if handle.closed:
        raise ObjectClosed(f"this handle of the pipe {handle.name} is closed")
    return os.getpid()


def ImpersonateNamedPipeClient(handle: PipeHandle) -> AbstractContextManager[Any]:
    """``with ImpersonateNamedPipeClient(handle):``; leaving it is RevertToSelf. See `PipeEnd.impersonate`."""
    return _server(handle).live().impersonate()


def CancelIoEx(handle: PipeHandle) -> None:
    """Ends what other threads wait for on this handle, with `OperationAborted`."""
    if isinstance(handle, _ServerHandle):
        handle.interrupt()
        if not handle.look():
            return
    handle.live().cancel()


def CloseHandle(handle: PipeHandle) -> None:
    handle.Close()


def _server(handle: PipeHandle) -> _ServerHandle:
    if not isinstance(handle, PipeHandle):
        raise InvalidHandle(f"{handle!r} is no handle of a pipe")
    if not isinstance(handle, _ServerHandle):
        raise _InvalidFunction(f"{handle!r} is a client's end", hint="only a server's can be connected or impersonate")
    if handle.closed:
        raise ObjectClosed(f"{handle!r} is closed")
    return handle


def _is_message(handle: PipeHandle) -> bool:
    if handle.server is not None:
        return handle.server.record.header.message
    return handle.end is not None and handle.end.message


def _device_only(name: str) -> None:
    r"""The native calls take only ``\\.\pipe\NAME``."""
    from .errors import InvalidAddress, PathNotFound

    if not name:
        raise PathNotFound("an empty name is no pipe")
    if not name.replace("/", "\\").startswith("\\\\"):
        raise InvalidAddress(f"{name!r}: the native calls take the whole name", hint=r"write \\.\pipe\NAME")


class _InvalidFunction(AccessDenied):
    code = 1  # ERROR_INVALID_FUNCTION


__all__ = [one for one in dir() if one == "PipeHandle" or (one[0].isupper() and not isinstance(globals()[one], type))]
