"""Pushing as a message: it arrives whatever becomes of the source, in batches, with back-pressure, and whole."""

from __future__ import annotations

import os
import socket
import threading
from typing import Any

import pytest
from handoff_peers import patiently

import portway
from portway.errors import (
    HandoffError,
    HandoffRefused,
    InformationUsed,
    InvalidInformation,
    ObjectClosed,
    OperationTimeout,
    ProcessNotFound,
    TooManyDescriptors,
)
from portway.kernel import inbox as inbox_module
from portway.kernel.session import MAX_MESSAGE, WINDOW

PAIRS = """
pairs = [socket.socketpair() for _ in range(count)]
for at, (a, b) in enumerate(pairs): a.sendall(at.to_bytes(4, "big"))
"""


def test_it_arrives_when_the_source_is_killed_right_after(peer: Any, tcp: Any) -> None:
    client, server = tcp()
    source, target = peer(), peer()
    source.give(sock=server)
    target.run("box = portway.HandoffInbox()")
    source.run("session = portway.HandoffSession(pid)\nsession.send(sock, unread=b'un', state=b'st')", pid=target.pid)
    source.kill()
    assert target.run("s = box.receive(5)\ns.sendall(s.unread + s.state)\ns.information.source_pid") == source.pid
    assert client.recv(10) == b"unst"


def test_a_record_arrives_when_the_source_is_killed_right_after(peer: Any, tcp: Any) -> None:
    client, server = tcp()
    source, target = peer(), peer()
    source.give(sock=server)
    target.run("box = portway.HandoffInbox()")
    info = source.run("portway.duplicate_socket(sock, pid)", pid=target.pid)
    source.kill()
    target.run("s = portway.socket_from(info)\ns.sendall(b'alive')", info=info)
    assert client.recv(10) == b"alive"
    with pytest.raises(InformationUsed):
        target.run("portway.socket_from(info)")


@pytest.mark.parametrize("end", ["session.close()", "os.kill(os.getpid(), 9)"], ids=["closed", "killed"])
def test_a_source_that_ends_with_our_last_word_unread_loses_nothing(end: str, peer: Any) -> None:
    """The kernel reports ECONNRESET before what still lies in the line."""
    source, target = peer(), peer()
    target.run("box = portway.HandoffInbox()")
    source.run(PAIRS + "session = portway.HandoffSession(pid)", count=100, pid=target.pid)
    source.run("session.send_many([b for a, b in pairs[:70]])")
    assert target.run("got = box.receive_many(5)\nlen(got)") == 70  # acknowledges 64: that lies unread at the source
    source.run("session.send_many([b for a, b in pairs[70:]])")
    source.start(end)
    if "kill" in end:
        patiently(lambda: not os.path.exists(f"/proc/{source.pid}"))
    else:
        source.result()
    assert target.run("got += box.receive_many(5)\nlen(got)") == 100
    assert target.run("[int.from_bytes(s.recv(4), 'big') for s in got]") == list(range(100))


@pytest.mark.parametrize("count", [1, 252, 253, 254, 506, 600])
def test_batches_keep_their_order(count: int, peer: Any) -> None:
    source, target = peer(), peer()
    target.run("box = portway.HandoffInbox()\ngot = []")
    source.run(PAIRS + "session = portway.HandoffSession(pid)", count=count, pid=target.pid)
    source.start("session.send_many([b for a, b in pairs])")
    target.run("while len(got) < count: got += box.receive_many(10)", count=count)
    source.result()
    assert target.run("[int.from_bytes(s.recv(4), 'big') for s in got]") == list(range(count))


def test_records_in_batches(peer: Any) -> None:
    source, target = peer(), peer()
    target.run("box = portway.HandoffInbox()")
    source.run(PAIRS + "session = portway.HandoffSession(pid)", count=300, pid=target.pid)
    infos = source.run("session.duplicate_many([b for a, b in pairs])")
    got = target.run("[int.from_bytes(portway.socket_from(i).recv(4), 'big') for i in infos]", infos=infos[::-1])
    assert got == list(range(300))[::-1]


def test_long_records_are_cut_by_bytes_too() -> None:
    """250 records with long Unix paths would not fit one message."""
    with portway.HandoffInbox() as box, portway.HandoffSession(os.getpid()) as session:
        sock = socket.socket(socket.AF_UNIX)
        sock.bind("\0" + "x" * 107)
        session.send_many([sock] * 400)
        got = box.receive_many(5)
        while len(got) < 400:
            got += box.receive_many(5)
        for one in (sock, *got):
            assert one.getsockname() == b"\0" + b"x" * 107
            one.close()


# -- back-pressure ---------------------------------------------------------------------------------------------------


def test_a_target_that_does_not_receive_is_a_timeout_and_loses_nothing(peer: Any) -> None:
    source, target = peer(), peer()
    target.run("box = portway.HandoffInbox()\nbox._lock.acquire()")  # as a target does whose threads all hang
    source.run(PAIRS, count=WINDOW + 100, pid=target.pid)
    source.run("session = portway.HandoffSession(pid, timeout=0.2)\nsent = 0")
    with pytest.raises(OperationTimeout, match=f"pid {target.pid}"):
        source.run("for a, b in pairs:\n    session.send(b)\n    sent += 1")
    sent = source.run("sent")
    assert 0 < sent <= WINDOW
    target.run("box._lock.release()\ngot = []")
    source.run("session.timeout = 20")
    source.start("session.send_many([b for a, b in pairs[sent:]])")
    target.run("while len(got) < count: got += box.receive_many(10)", count=WINDOW + 100)
    source.result()
    assert target.run("[int.from_bytes(s.recv(4), 'big') for s in got]") == list(range(WINDOW + 100))


def test_an_unprivileged_source_waits_for_descriptors_in_flight(peer: Any) -> None:
    """ETOOMANYREFS: what is in flight counts against the sender's RLIMIT_NOFILE."""
    source, target = peer(65534), peer(65534)
    target.run("box = portway.HandoffInbox()\nbox._lock.acquire()")
    source.run("resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))\na, b = socket.socketpair()")
    source.run("session = portway.HandoffSession(pid, timeout=0.3)\nsent = 0", pid=target.pid)
    with pytest.raises(OperationTimeout):
        source.run("for _ in range(300):\n    session.send(b)\n    sent += 1")
    sent = source.run("sent")
    assert 0 < sent < 100  # the window was not the limit
    with pytest.raises(OperationTimeout, match="sending descriptors"):
        source.run("portway.duplicate_socket(b, pid, way='pid', timeout=0.1)")
    target.run("box._lock.release()\ngot = 0")
    source.start("session.timeout = 20\nfor _ in range(300 - sent): session.send(b)")
    target.run("while got < 300:\n    for s in box.receive_many(10):\n        s.close()\n        got += 1")
    source.result()


def test_a_target_without_room_loses_nothing(peer: Any) -> None:
    source, target = peer(), peer()
    target.run("box = portway.HandoffInbox()\nlimit = resource.getrlimit(resource.RLIMIT_NOFILE)")
    source.run(PAIRS + "session = portway.HandoffSession(pid)", count=50, pid=target.pid)
    source.run("session.send(pairs[0][1])")
    target.run("got = [box.receive(5)]\nresource.setrlimit(resource.RLIMIT_NOFILE, (20, limit[1]))")
    source.run("session.send_many([b for a, b in pairs[1:]])")
    before = target.descriptors()
    for _ in range(3):
        with pytest.raises(TooManyDescriptors, match="nothing is lost"):
            target.run("box.receive(5)")
    assert target.descriptors() == before
    target.run("resource.setrlimit(resource.RLIMIT_NOFILE, limit)\ngot += box.receive_many(5)")
    assert target.run("[int.from_bytes(s.recv(4), 'big') for s in got]") == list(range(50))


def test_a_target_without_room_for_a_session_does_not_spin(peer: Any) -> None:
    source, target = peer(), peer()
    target.run("box = portway.HandoffInbox()\nlimit = resource.getrlimit(resource.RLIMIT_NOFILE)")
    target.run("box._lock.acquire()\nresource.setrlimit(resource.RLIMIT_NOFILE, (len(descriptors()), limit[1]))")
    source.run("a, b = socket.socketpair()\nsession = portway.HandoffSession(pid)\nsession.send(b)", pid=target.pid)
    target.run("box._lock.release()")
    with pytest.raises(TooManyDescriptors, match="session"):
        target.run("box.receive(5)")
    target.run("resource.setrlimit(resource.RLIMIT_NOFILE, limit)\ns = box.receive(5)\ns.sendall(b'x')")
    assert source.run("a.recv(5)") == b"x"


# -- luggage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("unread", "state"), [(1, 0), (0, 1), (MAX_MESSAGE, 0), (100_000, 100_000), (1 << 20, 0),
                                               (0, 1 << 20), (1 << 19, 1 << 19)])  # fmt: skip
def test_luggage_through_send(unread: int, state: int, peer: Any, tcp: Any) -> None:
    client, server = tcp()
    source, target = peer(), peer()
    source.give(sock=server)
    target.run("box = portway.HandoffInbox()")
    names = {"u": os.urandom(unread), "t": os.urandom(state), "pid": target.pid}
    source.start("with portway.HandoffSession(pid) as session: session.send(sock, unread=u, state=t)", **names)
    got = target.run("s = box.receive(20)\ns.sendall(b'ok')\ns.unread, s.state")
    source.result()
    assert got == (names["u"], names["t"]) and client.recv(5) == b"ok"


@pytest.mark.parametrize("way", ["message", "pid"])
def test_luggage_in_records(way: str, tcp: Any) -> None:
    _, server = tcp()
    unread, state = os.urandom(1 << 19), os.urandom(1 << 19)
    with portway.HandoffInbox():
        info = portway.duplicate_socket(server, os.getpid(), way=way, unread=unread, state=state)  # type: ignore[arg-type]
        with portway.socket_from(bytes(info)) as sock:
            assert (sock.unread, sock.state) == (unread, state)
        portway.wait_claimed(info, 10)


def test_one_byte_more_than_the_quota_is_refused(tcp: Any) -> None:
    _, server = tcp()
    with portway.HandoffInbox() as box, portway.HandoffSession(os.getpid()) as session:
        for give in (
            lambda: session.send(server, unread=bytes(1 << 20), state=b"1"),
            lambda: portway.duplicate_socket(server, os.getpid(), state=bytes((1 << 20) + 1)),
        ):
            with pytest.raises(HandoffError, match="1048577 bytes unread and state: at most 1048576"):
                give()
        with pytest.raises(OperationTimeout):
            box.receive(0)
        session.send(server)
        box.receive(5).close()


def test_a_split_record_that_is_never_finished_leaves_nothing(peer: Any, tcp: Any) -> None:
    client, server = tcp()
    source, target = peer(), peer()
    source.give(sock=server)
    target.run("box = portway.HandoffInbox()")
    source.run("session = portway.HandoffSession(pid)", pid=target.pid)
    target.run("patiently(lambda: box._lines)\nbefore = len(descriptors())\nbox._lock.acquire()")
    source.start("session.send(sock, unread=bytes(1 << 20))")  # more than the line holds: it waits in the middle
    target.run("patiently(lambda: bool(select.select([one.sock for one in box._lines.values()], [], [], 0)[0]))")
    source.kill()
    target.run("box._lock.release()")
    with pytest.raises(OperationTimeout):
        target.run("box.receive(0.2)")
    target.run("patiently(lambda: len(descriptors()) == before - 1)")
    assert client.recv(5) == b""  # nobody holds the connection any more


# -- the inbox -------------------------------------------------------------------------------------------------------


def test_one_inbox_for_each_process() -> None:
    with portway.HandoffInbox():
        with pytest.raises(HandoffError, match="already"):
            portway.HandoffInbox()
    with portway.HandoffInbox() as box:
        assert not box.closed
    assert box.closed
    box.close()
    for call in (box.receive, box.receive_many, box.fileno):
        with pytest.raises(ObjectClosed):
            call()


def test_an_inbox_can_be_opened_again_at_once() -> None:
    """Nothing of the library may hold the old one's name for a moment longer."""
    for _ in range(500):
        with portway.HandoffInbox(), portway.HandoffSession(os.getpid()):
            pass


@pytest.mark.parametrize("waiters", [1, 3])
def test_closing_wakes_who_waits(waiters: int) -> None:
    box = portway.HandoffInbox()
    seen: list[str] = []

    def wait() -> None:
        try:
            box.receive()
        except ObjectClosed:
            seen.append("closed")

    threads = [threading.Thread(target=wait) for _ in range(waiters)]
    for thread in threads:
        thread.start()
    patiently(lambda: box._waiters == waiters)
    box.close()
    for thread in threads:
        thread.join(10)
    assert seen == ["closed"] * waiters


def test_iterating_ends_with_the_inbox(tcp: Any) -> None:
    _, server = tcp()
    with portway.HandoffInbox() as box, portway.HandoffSession(os.getpid()) as session:
        session.send_many([server] * 3)
        for count, sock in enumerate(box, 1):
            sock.close()
            if count == 3:
                box.close()
        assert count == 3


def test_unclaimed_sockets_are_closed_when_the_inbox_closes(tcp: Any) -> None:
    client, server = tcp()
    with portway.HandoffInbox() as box, portway.HandoffSession(os.getpid()) as session:
        session.send(server)
        info = session.duplicate(server)
        server.close()
        box._pump()
    assert client.recv(5) == b""
    with pytest.raises(InvalidInformation, match="closed"):
        portway.socket_from(info)


@pytest.mark.parametrize("read", [True, False], ids=["read", "never-looked-at"])
@pytest.mark.parametrize("how", ["send", "duplicate"])
def test_expiry_releases_what_nobody_asks_for(how: str, read: bool, tcp: Any) -> None:
    client, server = tcp()
    with portway.HandoffInbox() as box, portway.HandoffSession(os.getpid(), expires=0.2) as session:
        info = getattr(session, how)(server)
        if read:
            box._pump()
        server.close()
        assert client.recv(5) == b""  # the reaper closed it
        if how == "send":
            with pytest.raises(OperationTimeout):
                box.receive(0)
        else:
            with pytest.raises(portway.errors.InformationExpired):  # type: ignore[attr-defined]
                portway.socket_from(info)


def test_fileno_is_readable_while_something_is_there(tcp: Any) -> None:
    import select

    _, server = tcp()
    with portway.HandoffInbox() as box, portway.HandoffSession(os.getpid()) as session:
        session.send_many([server] * 2)
        assert select.select([box.fileno()], [], [], 10)[0]
        box.receive(0).close()
        assert select.select([box.fileno()], [], [], 0)[0]
        box.receive(0).close()
        assert not select.select([box.fileno()], [], [], 0)[0]


def test_a_full_inbox_still_keeps_time_and_gives_out_records(tcp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "MAX_WAITING", 4)
    _, server = tcp()
    with portway.HandoffInbox() as box, portway.HandoffSession(os.getpid()) as session:
        infos = [session.duplicate(server) for _ in range(6)]
        session.send(server)
        with pytest.raises(OperationTimeout):
            box.receive(0.05)
        with pytest.raises(OperationTimeout):
            portway.socket_from(infos[5], timeout=0.05)
        for info in infos:
            portway.socket_from(info).close()
        box.receive(5).close()


def test_a_busy_source_does_not_starve_the_others(tcp: Any) -> None:
    _, server = tcp()
    me = os.getpid()
    with portway.HandoffInbox() as box, portway.HandoffSession(me) as busy, portway.HandoffSession(me) as other:
        busy.send(server)
        box.receive(5).close()
        for _ in range(200):
            busy.send(server, state=b"busy")
        other.send(server, state=b"other")
        states = []
        for _ in range(201):
            with box.receive(5) as sock:
                states.append(sock.state)
        assert states.index(b"other") < 200


def test_more_sessions_than_the_inbox_holds_wait_their_turn(tcp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "MAX_SESSIONS", 3)
    _, server = tcp()
    with portway.HandoffInbox() as box:
        sessions = [portway.HandoffSession(os.getpid()) for _ in range(5)]
        for session in sessions:
            session.send(server)
        assert len(box._lines) <= 3
        for _ in range(3):
            box.receive(5).close()
        with pytest.raises(OperationTimeout):
            box.receive(0.05)
        for session in sessions:
            session.close()
        for _ in range(2):
            box.receive(5).close()


def test_many_sources_and_many_receiving_threads(peer: Any) -> None:
    sources, got, lock = [peer() for _ in range(4)], [], threading.Lock()

    def work(box: portway.HandoffInbox) -> None:
        while True:
            try:
                with box.receive(20) as sock:
                    state = sock.state
            except ObjectClosed:
                return
            with lock:
                got.append(state)

    with portway.HandoffInbox() as box:
        threads = [threading.Thread(target=work, args=(box,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for at, source in enumerate(sources):
            source.start("""
with portway.HandoffSession(pid) as session, socket.socket() as sock:
    for n in range(150): session.send(sock, state=b"%d %d" % (at, n))
""", pid=os.getpid(), at=at)  # fmt: skip
        for source in sources:
            source.result()
        patiently(lambda: len(got) == 600)
        box.close()
        for thread in threads:
            thread.join(10)
    assert sorted(got) == sorted(b"%d %d" % (at, n) for at in range(4) for n in range(150))


# -- the session -----------------------------------------------------------------------------------------------------


def test_a_session_notices_what_becomes_of_its_target(peer: Any, tcp: Any) -> None:
    _, server = tcp()
    target = peer()
    with pytest.raises(HandoffRefused, match="no open HandoffInbox"):
        portway.HandoffSession(target.pid)
    target.run("box = portway.HandoffInbox()")
    with portway.HandoffSession(target.pid) as session, portway.HandoffSession(target.pid) as killed:
        session.send(server)
        target.run("box.receive(5).close()\nbox.close()")
        with pytest.raises(HandoffRefused, match="closed its inbox"):
            session.send(server)
        target.kill()
        with pytest.raises(ProcessNotFound, match="has ended"):
            killed.send(server)
    with pytest.raises(ObjectClosed):
        session.send(server)
    with pytest.raises(ProcessNotFound):
        portway.HandoffSession(target.pid)


def test_a_failing_batch_gives_what_came_before_it(tcp: Any) -> None:
    """The third record names a provider that does not exist here."""
    from portway.kernel.framing import FramedSocket, FramingHandoff
    from portway.kernel.record import draft

    class Odd(FramingHandoff):
        name = "odd"

    _, server = tcp()
    with portway.HandoffInbox() as box, portway.HandoffSession(os.getpid()) as session:
        session.send_many([server] * 2)
        session._push([draft(FramedSocket(server), session.pid, b"", b"", None, Odd())], 32)
        session.send_many([server] * 2)
        seen = []
        while len(seen) < 5:
            try:
                for sock in box.receive_many(5):
                    sock.close()
                    seen.append("socket")
            except portway.errors.ProviderNotFound:  # type: ignore[attr-defined]
                seen.append("odd")
        assert seen == ["socket", "socket", "odd", "socket", "socket"]
