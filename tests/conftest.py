"""What all tests share: which implementation runs, real peers, and that nothing stays open."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

import pytest
from handoff_peers import Peer, Zygote, descriptors, patiently


def pytest_report_header() -> str:
    from portway import _accel

    return f"portway: PORTWAY_IMPL={os.environ.get('PORTWAY_IMPL', '')!r}, running on {_accel.name}"


@pytest.fixture(scope="session")
def netpeer() -> Path:
    """The .NET program of the interop tests."""
    named = os.environ.get("PORTWAY_NETPEER")
    found = Path(named) if named else Path(__file__).resolve().parents[2] / "shared/peers/netpeer"
    if named and not found.exists():
        pytest.fail(f"PORTWAY_NETPEER={named}: no such file")
    if not found.exists():
        pytest.skip("no .NET peer: PORTWAY_NETPEER is not set and ../shared/peers/netpeer does not exist")
    return found


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    made = Zygote()
    yield made
    made.close()


@pytest.fixture
def peer(zygote: Zygote) -> Iterator[Callable[..., Peer]]:
    """``peer()`` is a new process, ``peer(uid)`` one of that user; all are killed after the test."""
    peers: list[Peer] = []

    def make(uid: int | None = None) -> Peer:
        if uid is not None and os.geteuid() != 0:
            pytest.skip("only root can start a process of another user")
        peers.append(zygote.peer(uid))
        return peers[-1]

    yield make
    for one in peers:
        one.close()


@pytest.fixture
def no_leaks(zygote: Zygote) -> Iterator[None]:
    """The test leaves no descriptor open in this process; what a reaper still closes is waited for."""
    before = descriptors()
    yield
    gc.collect()

    def left() -> set[tuple[int, str]]:
        # multiprocessing keeps a line to its two servers, from their first use on
        kept = {resource_tracker._resource_tracker._fd, forkserver._forkserver._forkserver_alive_fd}
        return {one for one in set(descriptors().items()) - set(before.items()) if one[0] not in kept}

    try:
        patiently(lambda: not left(), 5)
    except AssertionError:
        pytest.fail(f"left open: {sorted(left())}")


@pytest.fixture
def tcp() -> Iterator[Callable[..., tuple[socket.socket, socket.socket]]]:
    """``tcp()``: a connected pair, (client, server)."""
    made: list[Any] = []

    def connect(family: int = socket.AF_INET) -> tuple[socket.socket, socket.socket]:
        with socket.create_server(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0), family=family) as listener:
            client = socket.create_connection(listener.getsockname()[:2])
            server, _ = listener.accept()
        client.settimeout(20)
        made.extend((client, server))
        return client, server

    yield connect
    for sock in made:
        sock.close()
