r"""`NamedPipeClient`, `call_pipe`, `wait_pipe`: CreateFileW, CallNamedPipeW and WaitNamedPipeW for pipes."""

from __future__ import annotations

import os
from typing import Final, Literal, Self

from ..deadline import Deadline
from ..errors import InvalidParameter, OperationTimeout, PipeBusy, PipeNotFound
from ..wire.pipe import Direction, Header, line_slot
from .pipe_end import DEFAULT_MAX_MESSAGE, PipeEnd, access_of, mode_is_message
from .pipe_open import Claim, Search

__all__ = ["DEFAULT_WAIT", "NamedPipeClient", "call_pipe", "claim_pipe", "search_for", "wait_pipe"]

DEFAULT_WAIT: Final = -1.0
"""NMPWAIT_USE_DEFAULT_WAIT: as long as the server said."""


def search_for(
    name: str, direction: str | Direction | None, server_uid: int | None, root: str | os.PathLike[str] | None
) -> Search:
    """The arguments of `NamedPipeClient` that decide what is looked for."""
    access = None if direction is None else access_of(direction)
    return Search(name, access, server_uid, None if root is None else os.fspath(root))


def claim_pipe(search: Search, deadline: Deadline, appear: bool) -> Claim:
    """Looks until an instance is claimed. `PipeBusy` and `PipeNotFound` at once when there is no time to wait."""
    search.patient = appear
    while True:
        try:
            return search.claim()
        except (PipeBusy, PipeNotFound) as error:
            give_up(error, deadline, appear)
        search.pause(deadline)


def give_up(error: PipeBusy | PipeNotFound, deadline: Deadline, appear: bool) -> None:
    """Raises `error`, or `OperationTimeout` after some waiting; returns when another look is worth it."""
    if isinstance(error, PipeNotFound) and not appear:
        raise error
    if deadline.expired:
        if deadline.timeout == 0:
            raise error
        raise OperationTimeout(f"timed out after {deadline.timeout:g} s: {error.message}") from error


class NamedPipeClient(PipeEnd):
    r"""The client's end of the pipe of this name, open from here on. See `PipeEnd` for what it can do.

    name: as for `NamedPipeServer`; a pipe of .NET's is found by the same name (exact case first, then the only one that
      differs in case, else `AmbiguousName`).
    direction: ``"inbound"`` reads, ``"outbound"`` writes, ``"duplex"``; None: all that the server permits. More than
      that is `AccessDenied`.
    timeout: seconds to wait for a free instance: 0, the default, is `PipeBusy` at once; a name that does not exist is
      `PipeNotFound` at once. appear: wait for the name, too, as .NET's Connect does. After `timeout` seconds:
      `OperationTimeout`.
    read_mode: ``"message"`` or ``"byte"``; None: as the pipe's type. `InvalidParameter` for messages of a byte pipe.
    server_uid: only a pipe of this user; else one's own comes first, then root's, then others' (names are
      machine-wide). A server that is not the folder's owner is `AccessDenied`.
    max_message: what ``receive()`` without a size gathers at most. call_timeout: the end's ``timeout``, the default of
      its calls.
    """

    header: Header | None
    """What the pipe's first server decided; None: a server of .NET's."""

    def __init__(
        self, name: str, *, direction: str | Direction | None = None, timeout: float | None = 0, appear: bool = False,
        read_mode: Literal["byte", "message"] | None = None, server_uid: int | None = None,
        max_message: int = DEFAULT_MAX_MESSAGE, call_timeout: float | None = None,
        root: str | os.PathLike[str] | None = None,
    ) -> None:  # fmt: skip
        wanted = None if read_mode is None else mode_is_message(read_mode, "read_mode")
        deadline = Deadline(timeout)
        with search_for(name, direction, server_uid, root) as search:
            self._adopt(claim_pipe(search, deadline, appear), search, wanted, max_message, call_timeout)

    @classmethod
    def adopting(
        cls, claim: Claim, search: Search, wanted: bool | None, max_message: int, timeout: float | None
    ) -> Self:
        """For those who wait another way: the end of what they claimed. `wanted`: whether it reads messages."""
        made = cls.__new__(cls)
        made._adopt(claim, search, wanted, max_message, timeout)
        return made

    def _adopt(
        self, claim: Claim, search: Search, wanted: bool | None, max_message: int, timeout: float | None
    ) -> None:
        name, access = search.name.text, search.access
        header, record = claim.header, claim.record
        self.header = header
        message = header is not None and header.message
        allowed = {1: 2, 2: 1, 3: 3}[header.direction] if header is not None else 3
        try:
            if wanted and not message:
                raise InvalidParameter(f"the pipe {name} is a byte pipe, without messages", hint="leave out read_mode")
            PipeEnd.__init__(
                self, claim.sock.detach(), message=message, access=access or allowed,
                read_message=message if wanted is None else wanted, max_message=max_message, timeout=timeout, name=name,
            )  # fmt: skip
            if record is not None:
                self.place = line_slot(claim.watch_at), claim.generation, record.folder
                self.watch(record.fd, claim.watch_at, claim.generation)
        finally:
            claim.sock.close()
            if record is not None:
                record.close()


def call_pipe(
    name: str, data: bytes, *, timeout: float | None = DEFAULT_WAIT, size: int | None = None,
    server_uid: int | None = None, max_message: int = DEFAULT_MAX_MESSAGE,
    root: str | os.PathLike[str] | None = None,
) -> bytes:  # fmt: skip
    """One message there, one back: opens the pipe, waiting for an instance, transacts, closes. CallNamedPipeW.

    timeout: seconds for all of it, None without limit; default: as long as the server said for an instance, without
    limit for the answer. size: at most so much of the answer, the rest is lost (`MoreData` has the part).
    Errors: `PipeNotFound` at once, `OperationTimeout`, `InvalidParameter` for a byte pipe, those of `PipeEnd`.
    """
    if timeout == DEFAULT_WAIT:
        waiting, deadline = default_wait(name, server_uid, root), Deadline(None)
    else:
        waiting = deadline = Deadline(timeout)
    left = waiting.remaining()
    with NamedPipeClient(
        name, direction="duplex", read_mode="message", timeout=left, server_uid=server_uid, max_message=max_message,
        root=root,
    ) as pipe:  # fmt: skip
        return pipe.transact(data, size, timeout=deadline.remaining())


def default_wait(name: str, server_uid: int | None, root: str | os.PathLike[str] | None) -> Deadline:
    with search_for(name, None, server_uid, root) as search:
        try:
            search.listens()
        except PipeBusy:
            pass
        return Deadline(search.default_wait_ms / 1000)


def wait_pipe(
    name: str, timeout: float | None = DEFAULT_WAIT, *, server_uid: int | None = None,
    root: str | os.PathLike[str] | None = None,
) -> None:  # fmt: skip
    """Returns when an instance of the pipe can be opened; nothing is reserved. WaitNamedPipeW.

    timeout: seconds; default: as the server said; 0: look once. `PipeNotFound` at once for a name that does not exist,
    `OperationTimeout` when all stay busy.
    """
    deadline = Deadline(timeout) if timeout != DEFAULT_WAIT else None
    with search_for(name, None, server_uid, root) as search:
        while True:
            try:
                search.listens()
                return
            except PipeBusy as error:
                deadline = deadline or Deadline(search.default_wait_ms / 1000)
                if deadline.expired:
                    raise deadline.error(f"waiting for a free instance of the pipe {search.name}") from error
            search.pause(deadline)
