"""Duplicating a socket into another process: WSADuplicateSocket and .NET's DuplicateAndClose, on Linux.

Two ways. *As a message*: the target has opened a `HandoffInbox`; the descriptor waits there, whatever becomes of the
source. *By process id*: the target did nothing; it takes the descriptor from the source with pidfd_getfd(2), which
needs the right to inspect the source (same uid, dumpable, Yama and seccomp permitting) and a source that still lives.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable
from typing import Any, Literal

from ..deadline import Deadline
from ..errors import (
    HandoffRefused,
    InvalidInformation,
    UnsupportedSocket,
)  # fmt: skip
from ..provider import Handoff, Parcel, handoff_provider
from ..wire.handoff import Flag, SocketInformation
from .inbox import open_inbox
from .offer import Offer, expired, pending_offer, take_offer
from .process import uids
from .record import KEEP, Draft, Keep, check_seconds, draft
from .restore import check_record, restore
from .session import HandoffSession, check_target

__all__ = ["KernelHandoff", "duplicate_and_close", "duplicate_socket", "socket_from", "wait_claimed"]

Way = Literal["auto", "message", "pid"]


def duplicate_socket(
    sock: Any, pid: int, *, way: Way = "auto", expires: float = 30.0, timeout: float | None = 5.0,
    unread: bytes = b"", state: bytes = b"", target_timeout: float | Keep | None = KEEP,
    provider: str | Handoff | None = None, start_time: int | None = None, allow_uids: Iterable[int | str] = (),
    ptrace: bool = False,
) -> SocketInformation:  # fmt: skip
    """Makes `sock` available to process `pid` too, and returns the record that `socket_from` needs there.

    Both processes have the socket then; see "Sharing one socket" in the docs for what that means. Carry the record
    (``bytes(info)``, ``info.to_text()``, pickle) by any IPC to the target. The caller keeps `sock` and closes it.

    way: ``"message"`` (the target has a HandoffInbox; arrives even if this process ends right after), ``"pid"`` (the
      target fetches it while this process lives), ``"auto"``: message if there is an inbox, else pid. For the own
      process ``"auto"`` is by pid: every thread and every interpreter of it can claim that.
    expires: seconds until an unclaimed record is void and its descriptor released.
    timeout: seconds this call may wait for the target's queue, for descriptors in flight, for `ptrace`
      (`OperationTimeout`).
    unread, state: bytes read and not consumed, and the state of your layers above; 1 MiB together.
    target_timeout: what ``gettimeout()`` will say in the target; default: what it says here.
    provider: name of, or a, `portway.provider.Handoff`; default: the kernel's, for any `socket.socket`.
    start_time: `pid`'s start time if you know it: refuses a pid that is another process by now.
    allow_uids: users, numbers or names, besides ours that the target may belong to. Root is no exception.
    ptrace: by process id, permit the target under Yama (PR_SET_PTRACER) until the claim; one such offer at a time.

    Errors: `ProcessNotFound`, `AccessDenied`, `UnsupportedSocket`, `HandoffRefused` (forced message, no inbox),
    `HandoffError` (quotas), `TooManyDescriptors`. Nothing is half-done after an error.
    Source: WSADuplicateSocketW; pidfd_getfd(2), unix(7).
    """
    if way not in ("auto", "message", "pid"):
        raise ValueError(f"way={way!r}: give 'auto', 'message' or 'pid'")
    check_seconds("expires", expires)
    allowed = uids(allow_uids)
    deadline = Deadline(timeout)
    started = check_target(pid, allowed, start_time)
    ready = draft(sock, pid, unread, state, target_timeout, provider)
    if way == "message" or (way == "auto" and pid != os.getpid()):
        options = {"allow_uids": allowed, "expires": expires, "timeout": timeout, "start_time": started}
        try:
            with HandoffSession(pid, **options) as session:  # type: ignore[arg-type]
                return SocketInformation(session.push(ready))
        except HandoffRefused:
            if way == "message":
                raise
    return _offer(ready, pid, started, expires, ptrace, deadline)


def _offer(
    ready: Draft, pid: int, started: int, expires: float, ptrace: bool, deadline: Deadline
) -> SocketInformation:
    offer = Offer()
    try:
        if ptrace:
            offer.permit(pid, deadline)
        expires_ns = time.monotonic_ns() + int(expires * 1e9)
        info = SocketInformation(ready.encode(pid, started, expires_ns, Flag.BY_PID, offer.number))
        offer.publish(info, ready.fds, expires, deadline)
    except BaseException:
        offer.withdraw()
        raise
    return info


def duplicate_and_close(sock: Any, pid: int, **options: Any) -> SocketInformation:
    """`duplicate_socket`, and then closes `sock` here; the connection lives on for the target.

    .NET's Socket.DuplicateAndClose. Same options and errors; after an error `sock` is still open and the caller's.
    By process id this process must live until the target has claimed: see `wait_claimed`.
    """
    info = duplicate_socket(sock, pid, **options)
    provider = options.get("provider")
    if provider is None:
        sock.close()
    else:
        (handoff_provider(provider) if isinstance(provider, str) else provider).close(sock)
    return info


def socket_from(
    info: SocketInformation | bytes | str, *, timeout: float | None = 5.0, allow_uids: Iterable[int | str] = ()
) -> Any:
    """The socket of a record, in the process it was made for: a `SharedSocket` with ``unread`` and ``state``, or the
    object of the record's provider. Works once. The caller closes it.

    info: the record, its bytes, or its text. timeout: seconds to wait while the inbox is full of other sockets.
    allow_uids: users besides ours that the source may belong to (by process id; for messages the inbox says so).

    Errors: `InvalidInformation` (truncated, tampered with, foreign), `WrongProcess`, `InformationExpired`,
    `InformationUsed`, `SourceGone`, `AccessDenied`, `NotSupported`, `ProviderNotFound`, `TooManyDescriptors`.
    A refusal leaves the socket claimable, except that a failing provider has consumed it. Source: WSASocketW with
    FROM_PROTOCOL_INFO.
    """
    if isinstance(info, str):
        info = SocketInformation.from_text(info)
    elif not isinstance(info, SocketInformation):
        info = SocketInformation(info)
    check_record(info)
    if info.provider != "kernel":
        handoff_provider(info.provider)  # before the claim, so that a missing one costs nothing
    if info.head.flags & Flag.BY_PID:
        fds = take_offer(info, uids(allow_uids))
    else:
        inbox = open_inbox()
        if inbox is None:
            raise InvalidInformation(
                f"this record was sent to a HandoffInbox of pid {os.getpid()} that is closed",
                hint="keep the inbox open until the record is claimed",
            )
        if info.head.flags & Flag.QUEUED:
            raise InvalidInformation("this record was sent for HandoffInbox.receive()")
        fds = inbox.claim(info, Deadline(timeout))
    return restore(bytes(info), fds)


def wait_claimed(info: SocketInformation, timeout: float | None = None) -> None:
    """In the source: returns once the target has claimed `info`, so that this process may end.

    A message needs nobody any more: returns at once. `OperationTimeout` after `timeout` seconds; `InformationExpired`
    if the time of the record ended first. Records of other processes are ValueError.
    """
    offer = pending_offer(info)
    if offer is None:
        return
    deadline = Deadline(timeout)
    if not offer.done.wait(deadline.remaining()):
        raise deadline.error(f"waiting for pid {info.target_pid} to claim a socket")
    if not offer.taken:
        raise expired(info)


class KernelHandoff:
    """The base provider: any IPv4, IPv6 or Unix `socket.socket`; restores a `SharedSocket` (Winsock: an IFS handle)."""

    name = "kernel"
    restores: Literal["descriptor", "object"] = "descriptor"

    def missing(self) -> str | None:
        return None if hasattr(socket, "SCM_RIGHTS") else "this platform has no SCM_RIGHTS"

    def duplicate(self, obj: Any, pid: int) -> Parcel:
        if not isinstance(obj, socket.socket):
            raise UnsupportedSocket(
                f"{obj!r} is no socket.socket", hint="name the provider that knows it, or pass the socket below it"
            )
        return Parcel(obj)

    def restore(self, parcel: Parcel) -> Any:
        return parcel.socket

    def close(self, obj: Any) -> None:
        obj.close()


