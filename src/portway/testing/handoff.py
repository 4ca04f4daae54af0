"""`check_handoff`: every rule of the Handoff contract (`portway.provider`), tried on a provider with real processes."""

from __future__ import annotations

import gc
import os
import socket
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, Literal

from ..errors import HandoffError, InformationUsed, OperationTimeout, PortwayError, ProviderNotFound, UnsupportedSocket
from ..kernel.handoff import duplicate_and_close, duplicate_socket, socket_from, wait_claimed
from ..kernel.inbox import HandoffInbox, open_inbox
from ..kernel.shared import SharedSocket
from ..provider import Handoff, Parcel, handoff_provider, register_handoff

__all__ = ["check_handoff"]

Way = Literal["message", "pid"]
_WAYS: tuple[Way, Way] = ("message", "pid")
_PATIENCE = 20.0


def _send(obj: Any, data: bytes) -> None:
    obj.sendall(data)


def _receive(obj: Any) -> bytes:
    data: bytes = obj.recv(4096)
    return data


def check_handoff(
    provider: Handoff, make: Callable[[], tuple[Any, Any]], same: Callable[[Any], Any], *,
    send: Callable[[Any, bytes], None] = _send, receive: Callable[[Any], bytes] = _receive,
) -> None:  # fmt: skip
    """AssertionError names the first rule that `provider` breaks; returns when it keeps them all.

    make: gives a new object of the provider's, in the state that is hardest to carry (half-read input, say), and the
      far end of its connection, which stays in this process. Both have ``close()``, and are closed here.
    same: a picklable view of an object; equal in the source before and in the target after, and asking for it changes
      nothing.
    send, receive: how one message passes through an object or a far end; by default ``sendall`` and ``recv``, which
      does for sockets. `receive` gives what `send` at the other end was given, after anything that `make` left
      to be read, which `same` shows.

    Registers the provider if it is not; starts processes with fork, so call it from the main thread; needs that this
    process has no `HandoffInbox` open. The provider's objects must not share descriptors with each other.
    """
    check = _Check(provider, make, same, send, receive)
    for rule in (
        check.shape, check.known_by_name, check.foreign_objects, check.duplicate_changes_nothing,
        check.restored_is_the_same, check.another_process, check.close_lets_the_connection_live,
        check.spoiled_parcels_leave_nothing,
    ):  # fmt: skip
        with _no_descriptor_left(f"{provider.name}: {rule.__name__.replace('_', ' ')}"):
            rule()


class _Check:
    def __init__(
        self, provider: Handoff, make: Callable[[], tuple[Any, Any]], same: Callable[[Any], Any],
        send: Callable[[Any, bytes], None], receive: Callable[[Any], bytes],
    ) -> None:  # fmt: skip
        self.provider, self.make, self.same = provider, make, same
        self.send, self.receive = send, receive

    @contextmanager
    def made(self) -> Iterator[tuple[Any, Any]]:
        obj, far = self.make()
        try:
            yield obj, far
        finally:
            obj.close()
            far.close()

    def talks(self, obj: Any, far: Any, why: str) -> None:
        """Both directions work; what `make` left to be read is in the way of one, so only `obj` is written to."""
        self.send(obj, b"from the object")
        got = self.receive(far)
        assert got == b"from the object", f"{why}: the far end got {got!r}"

    def shape(self) -> None:
        provider = self.provider
        assert isinstance(provider, Handoff), f"{provider!r} lacks a part of portway.provider.Handoff"
        assert isinstance(provider.name, str) and provider.name, "name: a text that is not empty"
        assert provider.restores in ("descriptor", "object"), f"restores={provider.restores!r}"
        why = provider.missing()
        assert why is None, f"it cannot work on this machine: {why}"

    def known_by_name(self) -> None:
        try:
            found = handoff_provider(self.provider.name)
        except ProviderNotFound:
            register_handoff(self.provider)
            found = handoff_provider(self.provider.name)
        assert type(found) is type(self.provider), f"another provider has the name {self.provider.name!r}: {found!r}"

    def foreign_objects(self) -> None:
        for foreign in (None, 7, object(), b"bytes"):
            try:
                self.provider.duplicate(foreign, os.getpid())
            except UnsupportedSocket:
                continue
            raise AssertionError(f"duplicate({foreign!r}) must raise UnsupportedSocket")

    def duplicate_changes_nothing(self) -> None:
        with self.made() as (obj, far):
            before, open_before = self.same(obj), _descriptors()
            parcel = self.provider.duplicate(obj, os.getpid())
            assert isinstance(parcel, Parcel) and isinstance(parcel.socket, socket.socket), f"duplicate gave {parcel!r}"
            assert len(parcel.reserved) <= 1 << 16, f"{len(parcel.reserved)} reserved bytes: at most 65,536"
            assert len(parcel.descriptors) <= 252, f"{len(parcel.descriptors)} descriptors: at most 252"
            for fd in parcel.descriptors:
                os.fstat(fd)  # open, and still the provider's
            assert _descriptors() == open_before, "duplicate() opened or closed descriptors of this process"
            assert self.same(obj) == before, "duplicate() changed the object"
            self.talks(obj, far, "after duplicate()")

    def restored_is_the_same(self) -> None:
        for way in _WAYS:
            with _inbox(), self.made() as (obj, far):
                expected = self.same(obj)
                info = duplicate_socket(obj, os.getpid(), way=way, provider=self.provider)
                assert info.provider == self.provider.name
                restored = socket_from(info)
                try:
                    self._restored(restored, expected)
                    self._used(info)
                    self.talks(restored, far, f"restored, by {way}")
                    self.talks(obj, far, f"the source's own, after a duplicate by {way} was restored")
                finally:
                    restored.close()
                self.talks(obj, far, "the source's own, after the duplicate was closed")
                wait_claimed(info, _PATIENCE)

    def _restored(self, restored: Any, expected: Any) -> None:
        assert (seen := self.same(restored)) == expected, f"restored as {seen!r}, was {expected!r}"
        assert isinstance(restored.fileno(), int) and restored.fileno() >= 0, "fileno() must be one to wait on"
        is_socket = isinstance(restored, SharedSocket)
        assert is_socket or self.provider.restores == "object", f'restores="descriptor", but gave {restored!r}'
        assert not is_socket or self.provider.restores == "descriptor", 'restores="object", but gave a SharedSocket'

    def _used(self, info: Any) -> None:
        try:
            again = socket_from(info)
        except InformationUsed:
            return
        again.close()
        raise AssertionError("a record could be used twice")

    def another_process(self) -> None:
        for way in _WAYS:
            with _target(self, way) as (line, pid), self.made() as (obj, far):
                expected = self.same(obj)
                info = duplicate_socket(obj, pid, way=way, provider=self.provider)
                line.send(bytes(info))
                seen = _answer(line)
                assert seen == expected, f"in another process, by {way}: restored as {seen!r}, was {expected!r}"
                got = self.receive(far)
                assert got == b"from the target", f"the far end got {got!r} from the target"
                wait_claimed(info, _PATIENCE)
                self.talks(obj, far, "the source's own, after the target had used and closed its own")

    def close_lets_the_connection_live(self) -> None:
        with _target(self, "message") as (line, pid), self.made() as (obj, far):
            expected = self.same(obj)
            info = duplicate_and_close(obj, pid, provider=self.provider)
            line.send(bytes(info))
            assert _answer(line) == expected, "after duplicate_and_close the target got another state"
            assert self.receive(far) == b"from the target", "after duplicate_and_close the connection was gone"

    def spoiled_parcels_leave_nothing(self) -> None:
        """Whatever is wrong with what came: an error of portway, or an object; never a descriptor that stays."""
        with self.made() as (obj, _):
            parcel = self.provider.duplicate(obj, os.getpid())
            reserved, extra = parcel.reserved, parcel.descriptors
        spoils = {reserved[:size] for size in range(0, len(reserved), 1 + len(reserved) // 32)}
        spoils |= {bytes(len(reserved)), b"\xff" * len(reserved), reserved + b"more", os.urandom(100)}
        for other in spoils - {reserved}:
            self._spoiled(other, len(extra), f"reserved bytes {other[:40]!r}")
        for count in {0, len(extra) - 1, len(extra) + 1} - {len(extra), -1}:
            self._spoiled(reserved, count, f"{count} descriptors instead of {len(extra)}")

    def _spoiled(self, reserved: bytes, descriptors: int, what: str) -> None:
        with self.made() as (obj, _):
            spoiled = _Spoiled(self.provider, reserved, descriptors)
            try:
                info = duplicate_socket(obj, os.getpid(), provider=spoiled)
            finally:
                spoiled.close_own()
            before = _descriptors()
            try:
                socket_from(info).close()
            except PortwayError:
                pass
            except Exception as error:
                raise AssertionError(f"{what}: restore raised {error!r}, which is no error of portway") from error
            wait_claimed(info, _PATIENCE)
            gc.collect()
            left = _descriptors() - before
            assert not left, f"{what}: restore left {sorted(left)} open"


class _Spoiled:
    """The provider, but what travels is not what it said."""

    restores: Literal["descriptor", "object"] = "object"

    def __init__(self, real: Handoff, reserved: bytes, descriptors: int) -> None:
        self.real, self.name = real, real.name
        self._reserved, self._count = reserved, descriptors
        self._own: list[int] = []

    def missing(self) -> str | None:
        return None

    def duplicate(self, obj: Any, pid: int) -> Parcel:
        parcel = self.real.duplicate(obj, pid)
        parcel.reserved = self._reserved
        while len(parcel.descriptors) < self._count:
            self._own.append(os.open("/dev/null", os.O_RDONLY))
            parcel.descriptors = [*parcel.descriptors, self._own[-1]]
        parcel.descriptors = parcel.descriptors[: self._count]
        return parcel

    def restore(self, parcel: Parcel) -> Any:
        return self.real.restore(parcel)

    def close(self, obj: Any) -> None:
        self.real.close(obj)

    def close_own(self) -> None:
        for fd in self._own:
            os.close(fd)


# -- processes and descriptors ---------------------------------------------------------------------------------------


def _descriptors() -> set[tuple[int, str]]:
    """What this process has open, without what the reaper of offers has of its own."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            what = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
        if "eventfd" not in what:
            found.add((int(name), what))
    return found


@contextmanager
def _no_descriptor_left(doing: str) -> Iterator[None]:
    before = _descriptors()
    yield
    limit = time.monotonic() + _PATIENCE
    while left := _descriptors() - before:
        gc.collect()
        assert time.monotonic() < limit, f"{doing}: left open: {sorted(left)}"
        time.sleep(0.002)


@contextmanager
def _inbox() -> Iterator[None]:
    if open_inbox() is not None:
        raise HandoffError("check_handoff opens a HandoffInbox of its own", hint="close yours first")
    with HandoffInbox():
        yield


@contextmanager
def _target(check: _Check, way: Way) -> Iterator[tuple[Connection, int]]:
    """A process that restores one record, answers with the view of it, uses it and closes it."""
    ours, theirs = Pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads: the child needs none of them
        pid = os.fork()
    if pid == 0:
        _be_target(check, way, theirs)
    theirs.close()
    try:
        assert ours.poll(_PATIENCE) and ours.recv() == "ready"
        yield ours, pid
    finally:
        ours.close()
        os.waitpid(pid, 0)


def _be_target(check: _Check, way: Way, line: Connection) -> None:
    code = 1
    try:
        box = HandoffInbox() if way == "message" else None
        line.send("ready")
        restored = socket_from(line.recv())
        line.send(check.same(restored))
        check.send(restored, b"from the target")
        restored.close()
        if box is not None:
            box.close()
        code = 0
    except EOFError:
        pass  # the check failed before it sent a record
    except BaseException:
        try:
            line.send(AssertionError(f"in the target process:\n{traceback.format_exc()}"))
        except OSError:
            pass
    finally:
        os._exit(code)


def _answer(line: Connection) -> Any:
    if not line.poll(_PATIENCE):
        raise OperationTimeout(f"the target process said nothing for {_PATIENCE:g} s")
    answer = line.recv()
    if isinstance(answer, AssertionError):
        raise answer
    return answer
