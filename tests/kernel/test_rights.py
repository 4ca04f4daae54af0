"""Who may and who may not: other users, root, filtered system calls, processes that may not be inspected."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest
from handoff_peers import Peer, patiently

import portway
from portway.errors import AccessDenied, HandoffRefused, InformationExpired, NotSupported, OperationTimeout
from portway.kernel import offer as offers
from portway.kernel.process import start_time, uids, user_name
from portway.kernel.session import inbox_name

ALICE, BOB = 61234, 61235

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can start processes of other users")

# A classic BPF program: the named system call fails with `error`, everything else passes.
SECCOMP = """
import struct
def forbid(number, error):
    def op(code, jt, jf, k): return struct.pack("<HBBI", code, jt, jf, k)
    code = op(0x20, 0, 0, 0) + op(0x15, 0, 1, number) + op(0x06, 0, 0, 0x50000 | error) + op(0x06, 0, 0, 0x7FFF0000)
    program = ctypes.create_string_buffer(code)
    class Filter(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, ctypes.byref(Filter(4, ctypes.addressof(program)))) == 0, ctypes.get_errno()
"""
PIDFD_OPEN, PIDFD_GETFD, EPERM, ENOSYS = 434, 438, 1, 38


def with_socket(source: Peer) -> socket.socket:
    """Gives the source ``sock``; the other end, which the test keeps."""
    ours, theirs = socket.socketpair()
    ours.settimeout(20)
    source.give(sock=theirs)
    return ours


@as_root
@pytest.mark.parametrize("way", ["auto", "pid", "message"])
@pytest.mark.parametrize(("source_uid", "target_uid"), [(ALICE, BOB), (0, ALICE), (ALICE, 0)])
def test_another_user_is_refused_root_included(source_uid: int, target_uid: int, way: str, peer: Any) -> None:
    source, target = peer(source_uid), peer(target_uid)
    target.run("box = portway.HandoffInbox()")
    with with_socket(source):
        before = source.descriptors()
        with pytest.raises(AccessDenied, match=f"belongs to uid {target_uid}.*allow_uids=.{target_uid},"):
            source.run("portway.duplicate_socket(sock, pid, way=way)", pid=target.pid, way=way)
        with pytest.raises(AccessDenied):
            source.run("portway.HandoffSession(pid)")
        patiently(lambda: source.descriptors() == before)


@as_root
@pytest.mark.parametrize(("source_uid", "target_uid"), [(ALICE, BOB), (0, ALICE), (ALICE, 0)])
@pytest.mark.parametrize("use", ["send", "duplicate"])
def test_allowed_on_both_sides_a_message_passes(source_uid: int, target_uid: int, use: str, peer: Any) -> None:
    source, target = peer(source_uid), peer(target_uid)
    target.run("box = portway.HandoffInbox(allow_uids=[uid])", uid=source_uid)
    with with_socket(source) as ours:
        source.start(f"session = portway.HandoffSession(pid, allow_uids=[str(uid)])\ninfo = session.{use}(sock)",
                     pid=target.pid, uid=target_uid)  # fmt: skip
        if use == "send":
            target.run("s = box.receive(10)")
            source.result()
        else:
            patiently(lambda: target.run("len(box._lines)"))  # its reaper lets it in, nobody receives
            source.result()
            target.run("s = portway.socket_from(info)", info=source.run("info"))
        target.run("s.sendall(b'hello')")
        assert ours.recv(9) == b"hello"


@as_root
@pytest.mark.parametrize("how", ["portway.HandoffSession(pid, allow_uids=[uid]).send(sock)",
                                 "portway.duplicate_socket(sock, pid, way='message', allow_uids=[uid])"])  # fmt: skip
def test_allowed_on_one_side_only_the_inbox_refuses(how: str, peer: Any) -> None:
    source, target = peer(ALICE), peer(BOB)
    target.run("box = portway.HandoffInbox()")
    with with_socket(source):
        with pytest.raises(HandoffRefused, match=rf"uid {ALICE} is not allowed; HandoffInbox\(allow_uids=...\)"):
            source.run(how, pid=target.pid, uid=BOB)
        with pytest.raises(OperationTimeout):
            target.run("box.receive(0.05)")


@as_root
def test_root_takes_by_pid_only_from_users_it_allows(peer: Any) -> None:
    source, target = peer(ALICE), peer()
    with with_socket(source) as ours:
        info = source.run("portway.duplicate_socket(sock, pid, way='pid', allow_uids=['root'])", pid=target.pid)
        before = target.descriptors()
        with pytest.raises(AccessDenied, match=rf"belongs to uid {ALICE}.*allow_uids=\({ALICE},\)"):
            target.run("portway.socket_from(info)", info=info)
        assert target.descriptors() == before
        target.run("s = portway.socket_from(info, allow_uids=[uid])\ns.send(b'ok')", uid=ALICE)
        assert ours.recv(5) == b"ok"


@as_root
def test_a_user_cannot_take_from_root_by_pid(peer: Any) -> None:
    source, target = peer(0), peer(ALICE)
    with with_socket(source):
        info = source.run("portway.duplicate_socket(sock, pid, way='pid', allow_uids=[uid])", pid=target.pid, uid=ALICE)
        with pytest.raises(AccessDenied, match=r"pidfd_getfd .* is forbidden.*HandoffInbox"):
            target.run("portway.socket_from(info, allow_uids=[0])", info=info)
        assert source.run("len(offer._offers)") == 1


@as_root
def test_a_process_that_dropped_root_after_it_opened_its_inbox(peer: Any) -> None:
    """The kernel vouches for who it was when it began to listen; both sides go by that."""
    target = peer(0)
    target.run("box = portway.HandoffInbox(allow_uids=[uid])\nos.setresuid(uid, uid, uid)", uid=ALICE)
    source = peer(ALICE)
    with with_socket(source) as ours:
        source.start("portway.HandoffSession(pid).send(sock)", pid=target.pid)
        target.run("s = box.receive(10)\ns.sendall(b'x')")
        source.result()
        assert ours.recv(5) == b"x"


@as_root
def test_a_source_that_dropped_root_is_not_inspected_by_its_own_user(peer: Any) -> None:
    source, target = peer(ALICE), peer(ALICE)
    with with_socket(source) as ours:
        assert source.run("ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)") == 0  # PR_GET_DUMPABLE
        info = source.run("portway.duplicate_socket(sock, pid, way='pid')", pid=target.pid)
        with pytest.raises(AccessDenied, match="not dumpable"):
            target.run("portway.socket_from(info)", info=info)
        target.run("box = portway.HandoffInbox()")
        pushed = source.run("portway.duplicate_socket(sock, pid)")
        assert pushed.way == "message"
        target.run("s = portway.socket_from(info)\ns.sendall(b'pushed')", info=pushed)
        assert ours.recv(9) == b"pushed"


@as_root
def test_the_name_of_an_inbox_cannot_be_squatted(peer: Any) -> None:
    """Whoever binds it is seen by SO_PEERCRED; the target is told, too."""
    source, target, thief = peer(ALICE), peer(ALICE), peer(BOB)
    source.run("ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)")  # PR_SET_DUMPABLE: it has dropped root
    name = inbox_name(target.pid, start_time(target.pid))
    thief.run("t = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\nt.bind(name)\nt.listen()", name=name)
    with with_socket(source):
        for way in ("auto", "message"):
            with pytest.raises(AccessDenied, match=f"held by pid {thief.pid} of uid {BOB}"):
                source.run("portway.duplicate_socket(sock, pid, way=way)", pid=target.pid, way=way)
        info = source.run("portway.duplicate_socket(sock, pid, way='pid')")
        target.run("s = portway.socket_from(info)", info=info)
    with pytest.raises(AccessDenied, match="taken"):
        target.run("portway.HandoffInbox()")
    thief.run("t.close()")
    target.run("portway.HandoffInbox().close()")


def test_allow_uids_by_number_and_name() -> None:
    assert uids([5, "7", "root"]) == {5, 7, 0}
    assert uids(()) == frozenset()
    with pytest.raises(ValueError, match="no user named 'nobody-of-that-name'"):
        uids(["nobody-of-that-name"])
    with pytest.raises(ValueError, match=r"'root',\)"):
        uids("root")
    assert user_name(0) == "0 (root)" and user_name(ALICE) == str(ALICE)
    with pytest.raises(ValueError, match="nobody-of-that-name"):
        portway.HandoffInbox(allow_uids=["nobody-of-that-name"])
    with socket.socket() as sock, pytest.raises(ValueError, match="nobody-of-that-name"):
        portway.duplicate_socket(sock, os.getpid(), allow_uids=["nobody-of-that-name"])


# -- system calls that are filtered away -----------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code", "error", "says"), [
    (PIDFD_GETFD, EPERM, AccessDenied, "forbidden.*HandoffInbox"),
    (PIDFD_GETFD, ENOSYS, NotSupported, "pidfd_getfd: this kernel lacks it.*HandoffInbox"),
    (PIDFD_OPEN, EPERM, NotSupported, "pidfd_open is forbidden"),
    (PIDFD_OPEN, ENOSYS, NotSupported, "pidfd_open: this kernel lacks it"),
])  # fmt: skip
def test_filtered_calls_at_the_target(number: int, code: int, error: type[Exception], says: str, peer: Any) -> None:
    source, target = peer(), peer()
    with with_socket(source) as ours:
        info = source.run("portway.duplicate_socket(sock, pid, way='pid')", pid=target.pid)
        target.run(SECCOMP + "forbid(number, error)", number=number, error=code)
        before = target.descriptors()
        with pytest.raises(error, match=says):
            target.run("portway.socket_from(info)", info=info)
        assert target.descriptors() == before and source.run("len(offer._offers)") == 1
        target.run("box = portway.HandoffInbox()")  # the other way needs neither call at the target
        pushed = source.run("portway.duplicate_socket(sock, pid)")
        target.run("s = portway.socket_from(info)\ns.sendall(b'x')", info=pushed)
        assert ours.recv(5) == b"x"


@pytest.mark.parametrize("code", [EPERM, ENOSYS])
def test_filtered_calls_at_the_source(code: int, peer: Any) -> None:
    source, target = peer(), peer()
    target.run("box = portway.HandoffInbox()")
    with with_socket(source) as ours:
        source.run(SECCOMP + "forbid(434, error)", error=code)
        before = source.descriptors()
        for way in ("auto", "message"):
            with pytest.raises(NotSupported, match="pidfd_open"):
                source.run("portway.duplicate_socket(sock, pid, way=way)", pid=target.pid, way=way)
        assert source.descriptors() == before
        info = source.run("portway.duplicate_socket(sock, pid, way='pid')")  # needs none at the source
        target.run("s = portway.socket_from(info)\ns.sendall(b'x')", info=info)
        assert ours.recv(5) == b"x"


def test_a_source_that_is_not_dumpable(peer: Any) -> None:
    user = ALICE if os.geteuid() == 0 else None  # root may inspect anything
    source, target = peer(user), peer(user)
    with with_socket(source) as ours:
        source.run("ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)")
        info = source.run("portway.duplicate_socket(sock, pid, way='pid')", pid=target.pid)
        source.run("ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)")
        with pytest.raises(AccessDenied, match="not dumpable"):
            target.run("portway.socket_from(info)", info=info)
        source.run("ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)")
        target.run("s = portway.socket_from(info)\ns.sendall(b'x')")
        assert ours.recv(5) == b"x"


def test_yama_permission_is_given_one_at_a_time_and_withdrawn(peer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """This kernel may have no Yama: what it would be told is recorded, the rest is real."""
    told: list[int] = []
    monkeypatch.setattr(offers._native, "set_ptracer", told.append)
    target = peer()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        first = portway.duplicate_socket(theirs, target.pid, way="pid", ptrace=True)
        with pytest.raises(OperationTimeout, match="Yama permission"):
            portway.duplicate_socket(theirs, target.pid, way="pid", ptrace=True, timeout=0.05)
        target.run("s = portway.socket_from(info)", info=first)
        portway.wait_claimed(first, 10)
        second = portway.duplicate_socket(theirs, target.pid, way="pid", ptrace=True, timeout=5, expires=0.1)
        with pytest.raises(InformationExpired):
            portway.wait_claimed(second, 10)
        third = portway.duplicate_socket(theirs, target.pid, way="pid", ptrace=True, timeout=5)
        target.run("s = portway.socket_from(info)", info=third)
        portway.wait_claimed(third, 10)
    patiently(lambda: told == [target.pid, 0] * 3)


@pytest.mark.skipif(not os.path.exists("/proc/sys/kernel/yama"), reason="this kernel has no Yama")
def test_yama_itself(peer: Any) -> None:
    with open("/proc/sys/kernel/yama/ptrace_scope") as file:
        scope = int(file.read())
    if scope != 1:
        pytest.skip(f"ptrace_scope is {scope}: the permission matters where it is 1")
    source, target = peer(), peer()
    with with_socket(source) as ours:
        info = source.run("portway.duplicate_socket(sock, pid, way='pid', ptrace=True)", pid=target.pid)
        target.run("s = portway.socket_from(info)\ns.sendall(b'x')", info=info)
        assert ours.recv(5) == b"x"
