"""New connections reach the ready listener and no other, whatever joins and leaves its group: the real kernel against
our account of its places."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import connect

from portway.errors import AddressInUse
from portway.supervise import reuseport
from portway.supervise.binds import parse_bind
from portway.supervise.listeners import Listener
from portway.supervise.reuseport import TcpGroup, places_after
from portway.supervise.sockets import UnixGroup, open_group


def opened(text: str = "127.0.0.1:0") -> TcpGroup:
    group = open_group(parse_bind(text), 64, {})
    assert isinstance(group, TcpGroup)
    return group


def target(group: TcpGroup) -> tuple[str, int]:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(group.sockaddr[0], group.sockaddr[0])
    return host, group.sockaddr[1]


def lands_at(group: TcpGroup, address: tuple[str, int] | None = None) -> Listener:
    """Which member one new connection is queued at; takes it off."""
    with connect(address or target(group)):
        (hit,) = [member for member in group.members if member.waiting()]
        hit.sock.accept()[0].close()
        return hit


# Each number is a choice among what is possible then: take, promote one of the taken, release one that is not ready.
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(0, 30), max_size=25))
def test_only_the_ready_one_gets_connections(steps: list[int]) -> None:
    group, numbers = opened(), itertools.count(1)
    try:
        live = [group.take(next(numbers))]
        group.promote(live[0])
        for step in steps:
            kind, which = step % 3, step // 3
            if kind == 0 and len(live) < 6:
                live.append(group.take(next(numbers)))
            elif kind == 1:
                group.promote(live[which % len(live)])
            elif kind == 2 and len(live) > 1:
                victim = [one for one in live if one is not group.ready][which % (len(live) - 1)]
                live.remove(victim)
                group.release(victim)
            for _ in range(3):
                assert lands_at(group) is group.ready
    finally:
        group.close()


@pytest.mark.parametrize("text", ["127.0.0.1:0", "[::1]:0", ":0"])
def test_no_moment_between_when_members_leave(text: str) -> None:
    """Connections made all the time, while generations come and go, are all queued at the ready listener.

    As many as there are spares: closing a listener under load loses a connection now and then, in the kernel."""
    group, done, enough, failed = opened(text), threading.Event(), threading.Event(), []
    ready = group.take(1)
    group.promote(ready)
    accepted = [0]

    def accept() -> None:
        while not done.is_set():
            ready.sock.settimeout(0.2)
            try:
                ready.sock.accept()[0].close()
                accepted[0] += 1
            except TimeoutError:
                pass

    def hammer() -> None:
        while not enough.is_set():
            try:
                with connect(target(group), 5) as sock:
                    if sock.recv(1) != b"":
                        failed.append("data")
            except OSError as error:
                failed.append(repr(error))

    threads = [threading.Thread(target=accept), threading.Thread(target=hammer)]
    for thread in threads:
        thread.start()
    numbers = itertools.count(2)
    while accepted[0] < 1500 and not failed:
        others = [group.take(next(numbers)) for _ in range(TcpGroup.SPARES)]
        for other in others[1:] + others[:1]:
            group.release(other)
    enough.set()
    threads[1].join()
    done.set()
    threads[0].join()
    group.close()
    assert not failed, failed[:3]


def test_released_listener_is_used_again_if_it_is_ours_alone() -> None:
    group = opened()
    first, second = group.take(1), group.take(2)
    group.promote(first)
    group.promote(second)
    with connect(target(group)) as late:
        second.sock.accept()[0].close()
        group.promote(first)
        with connect(target(group)) as late:
            group.promote(second)
            group.release(first)
            late.settimeout(5)
            with contextlib.suppress(ConnectionResetError):
                assert late.recv(1) == b"", "what was queued is refused, not kept for the next generation"
    assert group.take(3) is first and not first.waiting() and first.sock.getblocking()
    group.close()


def test_ready_that_stands_last_does_not_move(held: None) -> None:
    group = opened()
    first, second, third = (group.take(number) for number in (1, 2, 3))
    group.promote(third)
    group.release(first)
    assert group.members.index(third) == 2 and group.members[0].generation == 0
    spare = group.members[0]
    assert lands_at(group) is third
    assert group.take(4) is spare
    group.release(second)
    assert lands_at(group) is third
    group.close()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if another process had a copy of every listener: none becomes a spare, all are closed."""
    monkeypatch.setattr(reuseport, "is_held", lambda inode: True)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(st.integers(0, 30), max_size=25))
def test_only_the_ready_one_gets_connections_when_listeners_close(held: None, steps: list[int]) -> None:
    test_only_the_ready_one_gets_connections.hypothesis.inner_test(steps)  # type: ignore[attr-defined]


def test_listener_that_somebody_shut_down_leaves_the_account() -> None:
    group = opened()
    first, second, third = (group.take(number) for number in (1, 2, 3))
    group.promote(third)
    first.sock.shutdown(socket.SHUT_RDWR)
    group.promote(third)
    assert first not in group.members
    for _ in range(4):
        assert lands_at(group) is third
    assert second in group.members
    group.close()


def test_probe_reaches_the_new_one_alone() -> None:
    for text in ("127.0.0.1:0", "[::1]:0"):
        group = opened(text)
        old, new = group.take(1), group.take(2)
        group.promote(old)
        with socket.socket(group.family, socket.SOCK_STREAM) as prober:
            prober.bind((group.sockaddr[0], 0))
            group.probe(new, prober.getsockname()[1])
            assert lands_at(group) is old
            prober.connect(target(group))
            assert new.waiting() and not old.waiting()
            new.sock.accept()[0].close()
        group.probe(new, None)
        assert lands_at(group) is old
        group.close()


def test_both_families_of_an_empty_host() -> None:
    group = opened(":0")
    new = group.take(1), group.take(2)
    group.promote(new[1])
    for host in ("127.0.0.1", "::1"):
        assert lands_at(group, (host, group.sockaddr[1])) is new[1]
    with socket.socket() as prober:  # an IPv4 packet at an IPv6 socket
        prober.bind(("127.0.0.1", 0))
        group.probe(new[0], prober.getsockname()[1])
        prober.connect(("127.0.0.1", group.sockaddr[1]))
        assert new[0].waiting()
    group.close()


def test_reuseport_of_the_same_user_is_still_a_busy_port() -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        for text in (f"127.0.0.1:{port}", f"0.0.0.0:{port}", f":{port}"):
            with pytest.raises(AddressInUse, match="is in use"):
                opened(text)


def test_accepted_sockets_have_no_nagle() -> None:
    group = opened()
    listener = group.take(1)
    group.promote(listener)
    with connect(target(group)):
        accepted = listener.sock.accept()[0]
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        accepted.close()
    group.close()


@given(st.integers(2, 5), st.data())
def test_places_after_knows_what_it_knows(count: int, data: st.DataObject) -> None:
    """Against a plain simulation of every order in which members can have left."""
    ready = data.draw(st.integers(0, count - 1))
    closed = data.draw(st.lists(st.sampled_from([i for i in range(count) if i != ready]), unique=True))
    possible = set()
    for order in itertools.permutations(closed):
        left = list(range(count))
        for one in order:
            place = left.index(one)
            left[place] = left[-1]
            left.pop()
        possible.add(left.index(ready))
    found = places_after(list(range(count)), closed, ready)
    assert (found is None) == (len(possible) > 1)
    if found is not None:
        assert found.index(ready) in possible and sorted(found) == sorted(set(range(count)) - set(closed))


def test_unix_group_binds_beside_and_renames(world_path: str) -> None:
    group = open_group(parse_bind(f"unix:{world_path}/s"), 16, {})
    assert isinstance(group, UnixGroup)
    first = group.take(1)
    with pytest.raises(FileNotFoundError):
        connect(f"{world_path}/s")
    group.promote(first)
    second = group.take(2)
    with connect(f"{world_path}/s"):
        assert first.waiting() and not second.waiting()
    group.promote(second)
    with connect(f"{world_path}/s"):
        assert second.waiting()
    group.release(first)
    third = group.take(3)
    group.release(third)
    group.close()
    assert os.listdir(world_path) == []
