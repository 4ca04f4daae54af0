"""Providers: the published conformance tests on the kernel's, the shipped one, and a stranger's with a memfd."""

from __future__ import annotations

import os
import socket
import struct
from typing import Any, Literal

import pytest

import portway
from portway import FramedSocket, SharedSocket, provider
from portway.errors import HandoffError, InvalidInformation, ProviderNotFound, TooManyDescriptors, UnsupportedSocket
from portway.kernel.framing import FramingHandoff
from portway.kernel.handoff import KernelHandoff
from portway.provider import Parcel, handoff_provider, register_handoff
from portway.testing import check_handoff
from portway.wire.framing import FrameTooLarge, pack_frame


def pair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair()
    theirs.settimeout(20)
    return ours, theirs


class Notebook:
    """A stranger's connection: a socket, a name, a counter, and pages in a memory file."""

    def __init__(self, sock: socket.socket, pages: int, name: str, count: int) -> None:
        self.sock, self.pages, self.name, self.count = sock, pages, name, count

    def fileno(self) -> int:
        return self.sock.fileno()

    def text(self) -> bytes:
        return os.pread(self.pages, 1000, 0)

    def close(self) -> None:
        self.sock.close()
        if self.pages >= 0:
            os.close(self.pages)
            self.pages = -1

    def sendall(self, data: bytes) -> None:
        self.sock.sendall(data)

    def recv(self, size: int) -> bytes:
        return self.sock.recv(size)


class NotebookHandoff:
    name = "notebook"
    restores: Literal["descriptor", "object"] = "object"

    def missing(self) -> str | None:
        return None if hasattr(os, "memfd_create") else "no memfd_create"

    def duplicate(self, obj: Any, pid: int) -> Parcel:
        if not isinstance(obj, Notebook):
            raise UnsupportedSocket(f"{obj!r} is no Notebook")
        parcel = handoff_provider("kernel").duplicate(obj.sock, pid)
        parcel.reserved = struct.pack("<I", obj.count) + obj.name.encode()
        parcel.descriptors.append(obj.pages)
        return parcel

    def restore(self, parcel: Parcel) -> Notebook:
        if len(parcel.reserved) < 4 or len(parcel.descriptors) != 1:
            raise InvalidInformation("not what a NotebookHandoff wrote")
        try:
            name = parcel.reserved[4:].decode()
        except UnicodeDecodeError:
            raise InvalidInformation("a name that is no text") from None
        sock = handoff_provider("kernel").restore(parcel)
        return Notebook(sock, parcel.descriptors.pop(), name, int.from_bytes(parcel.reserved[:4], "little"))

    def close(self, obj: Any) -> None:
        obj.close()


def notebooks() -> tuple[Notebook, Notebook]:
    made = []
    for at, sock in enumerate(pair()):
        pages = os.memfd_create("pages")
        os.write(pages, b"page %d" % at)
        made.append(Notebook(sock, pages, f"nöte {at}", 41 + at))
    return made[0], made[1]


def framed() -> tuple[FramedSocket, FramedSocket]:
    """Two whole messages and half a third have been read."""
    ours, theirs = pair()
    obj = FramedSocket(ours, max_message=5000)
    obj.feed(pack_frame(b"one") + pack_frame(b"") + pack_frame(b"three")[:6])
    return obj, FramedSocket(theirs)


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider, "_providers", dict(provider._providers))


def test_the_kernels_provider_conforms() -> None:
    check_handoff(KernelHandoff(), pair, lambda sock: (sock.family, sock.type, sock.gettimeout()))


def test_the_shipped_layered_provider_conforms() -> None:
    check_handoff(
        FramingHandoff(), framed, lambda obj: (obj.buffered, obj.max_message, list(obj._ready)),
        send=lambda obj, data: obj.send(data), receive=lambda obj: obj.receive() or b"",
    )  # fmt: skip


def test_a_strangers_provider_with_descriptors_of_its_own_conforms() -> None:
    check_handoff(NotebookHandoff(), notebooks, lambda obj: (obj.text(), obj.name, obj.count))


class Broken(NotebookHandoff):
    """One rule broken at a time, to see that the conformance tests see it."""

    def __init__(self, fault: str) -> None:
        self.name, self.fault = f"broken-{fault}", fault
        self.restores = "descriptor" if fault == "restores" else "object"

    def missing(self) -> str | None:
        return "no moon" if self.fault == "missing" else None

    def duplicate(self, obj: Any, pid: int) -> Parcel:
        if self.fault == "foreign" and not isinstance(obj, Notebook):
            raise TypeError("what is that")
        parcel = super().duplicate(obj, pid)
        if self.fault == "changes":
            obj.count += 1
        if self.fault == "opens":
            parcel.descriptors = [os.dup(parcel.descriptors[0])]
        if self.fault == "closes":
            obj.sock.close()
        return parcel

    def restore(self, parcel: Parcel) -> Notebook:
        if self.fault == "leaks":
            os.dup(parcel.socket.fileno())
        if self.fault == "leaks-descriptors" and len(parcel.reserved) < 4:
            parcel.descriptors.clear()
        if self.fault == "keeps-nothing":
            parcel.reserved = bytes(4)
        return super().restore(parcel)

    def close(self, obj: Any) -> None:
        if self.fault == "shuts-down":
            obj.sock.shutdown(socket.SHUT_RDWR)
        super().close(obj)


@pytest.mark.parametrize(("fault", "says"), [
    ("missing", "no moon"), ("foreign", "UnsupportedSocket|what is that"), ("changes", "changed the object"),
    ("opens", "opened or closed descriptors"), ("closes", "opened or closed"), ("leaks", "open"),
    ("leaks-descriptors", "left .* open"), ("keeps-nothing", "restored as"), ("restores", "restores="),
    ("shuts-down", "in the target|gone|another state"),
])  # fmt: skip
def test_conformance_finds_each_fault(fault: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from portway.testing import handoff

    monkeypatch.setattr(handoff, "_PATIENCE", 2.0)
    before = os.listdir("/proc/self/fd")
    with pytest.raises((AssertionError, TypeError), match=says):
        check_handoff(Broken(fault), notebooks, lambda obj: (obj.text(), obj.name, obj.count))
    for name in set(os.listdir("/proc/self/fd")) - set(before):
        if fault in ("leaks", "leaks-descriptors", "opens"):  # what the fault leaks is not the library's
            try:
                os.close(int(name))
            except OSError:
                pass


# -- the registry ----------------------------------------------------------------------------------------------------


def test_names() -> None:
    assert {"kernel", "framing"} <= set(provider.handoff_providers())
    with pytest.raises(ProviderNotFound, match=r"no hand-off provider named 'nonsense'; known here: .*kernel"):
        handoff_provider("nonsense")
    register_handoff(NotebookHandoff())
    register_handoff(NotebookHandoff())  # the same class again changes nothing
    assert "notebook" in provider.handoff_providers()

    class Other(KernelHandoff):
        name = "notebook"

    with pytest.raises(ValueError, match="'notebook' is registered already"):
        register_handoff(Other())


def test_one_that_cannot_work_here_says_why() -> None:
    register_handoff(Broken("missing"))
    with pytest.raises(ProviderNotFound, match="cannot work here: no moon"):
        handoff_provider("broken-missing")


def test_a_target_without_the_provider_has_not_used_the_record_up(peer: Any) -> None:
    source, target = peer(), peer()
    make = """
a, b = socket.socketpair()
class Stranger(framing.FramingHandoff):
    name = "stranger"
"""
    source.run(make)
    info = source.run("portway.duplicate_socket(portway.FramedSocket(b), pid, provider=Stranger())", pid=target.pid)
    with pytest.raises(ProviderNotFound, match="'stranger'"):
        target.run("portway.socket_from(info)", info=info)
    target.run(make + "from portway.provider import register_handoff\nregister_handoff(Stranger())")
    target.run("with portway.socket_from(info) as f: f.send(b'hello')")
    assert source.run("a.recv(100)") == pack_frame(b"hello")


# -- quotas ----------------------------------------------------------------------------------------------------------


class Heavy(NotebookHandoff):
    name = "heavy"

    def __init__(self, reserved: int, descriptors: int) -> None:
        self.reserved, self.count = reserved, descriptors

    def duplicate(self, obj: Any, pid: int) -> Parcel:
        parcel = super().duplicate(obj, pid)
        parcel.reserved = bytes(self.reserved)
        parcel.descriptors = parcel.descriptors * self.count
        return parcel

    def restore(self, parcel: Parcel) -> Notebook:
        return Notebook(parcel.socket, parcel.descriptors.pop(), "heavy", len(parcel.descriptors))


@pytest.mark.parametrize("way", ["pid", "message"])
def test_as_much_as_is_allowed_travels_and_not_more(way: Any) -> None:
    obj, far = notebooks()
    with portway.HandoffInbox():
        heavy = Heavy(65536, 252)
        register_handoff(heavy)
        info = portway.duplicate_socket(obj, os.getpid(), provider=heavy, way=way)
        assert len(info.provider_reserved) == 65536
        restored = portway.socket_from(info)
        assert restored.count == 251 and restored.text() == b"page 0"
        restored.close()
        for bad, says in ((Heavy(65537, 1), "65537 reserved bytes"), (Heavy(1, 253), "253 descriptors")):
            with pytest.raises(HandoffError, match=says):
                portway.duplicate_socket(obj, os.getpid(), provider=bad, way=way)
        portway.wait_claimed(info, 10)
    obj.close()
    far.close()


def test_luggage_of_the_caller_and_of_the_provider_do_not_mix() -> None:
    obj, far = framed()
    with pytest.raises(ValueError, match="brings unread bytes"):
        portway.duplicate_socket(obj, os.getpid(), provider="framing", unread=b"more")
    info = portway.duplicate_socket(obj, os.getpid(), provider="framing", state=b"app")
    with portway.socket_from(info) as again:
        assert again.socket.state == b"app" and [again.receive(), again.receive()] == [b"one", b""]
    portway.wait_claimed(info, 10)
    obj.close()
    far.close()


# -- framing ---------------------------------------------------------------------------------------------------------


def test_framed_sockets() -> None:
    ours, theirs = pair()
    with FramedSocket(ours, max_message=100) as one, FramedSocket(theirs, max_message=100) as other:
        one.send(b"hello")
        one.send(b"")
        assert [other.receive(), other.receive()] == [b"hello", b""]
        with pytest.raises(FrameTooLarge, match="101 bytes: at most 100"):
            one.send(bytes(101))
        other.socket.settimeout(0.01)
        ours.sendall(pack_frame(b"abc")[:5])
        with pytest.raises(TimeoutError):
            other.receive()
        assert other.buffered == pack_frame(b"abc")[:5]
        ours.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionError, match="inside a message, after 5 bytes"):
            other.receive()
        assert one.fileno() == ours.fileno()


def test_a_half_read_frame_goes_on_in_another_process(peer: Any, tcp: Any) -> None:
    far, near = tcp()
    source, target = peer(), peer()
    source.give(sock=near)
    far.sendall(pack_frame(b"first") + pack_frame(b"second message")[:9])
    source.run("f = portway.FramedSocket(sock)")
    assert source.run("f.receive()") == b"first"
    info = source.run("portway.duplicate_and_close(f, pid, provider='framing')", pid=target.pid)
    assert info.unread == pack_frame(b"second message")[:9]
    far.sendall(pack_frame(b"second message")[9:])
    assert target.run("f = portway.socket_from(info)\nf.receive()", info=info) == b"second message"
    assert isinstance(SharedSocket, type) and target.run("type(f).__name__, type(f.socket).__name__") == (
        "FramedSocket", "SharedSocket",
    )  # fmt: skip


def test_too_many_descriptors_in_one_message_is_ours() -> None:
    from portway.kernel.fdpass import send_descriptors

    ours, theirs = pair()
    with ours, theirs, pytest.raises(TooManyDescriptors, match="254 descriptors in one message: the kernel takes 253"):
        send_descriptors(ours, b"x", [ours.fileno()] * 254)
