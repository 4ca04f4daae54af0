"""Pipes of other users: what a listing says of them, and that a pinned user's pipe is asked of nobody else."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("portway._native.pipe")
import portway
from portway import Security
from portway.errors import AccessDenied

ALICE = 4001


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Root and TMPDIR of this test, open to every user, as /tmp is."""
    path = tempfile.mkdtemp(prefix="pw-", dir="/tmp")
    os.chmod(path, 0o1777)
    monkeypatch.setenv("PORTWAY_ROOT", path)
    monkeypatch.setenv("TMPDIR", path)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def alice(world: str, peer: Any) -> Any:
    made = peer(ALICE)
    made.run("import os, portway; os.environ.update(PORTWAY_ROOT=world, TMPDIR=world)", world=world)
    return made


def seen(alice: Any) -> dict[str, tuple[Any, ...]]:
    """What her listing says: a folder of another user cannot be listed, but .NET's path leads to the pipe."""
    found = alice.run("[tuple(one) for one in portway.list_pipes()]")
    return {one[0]: one for one in found}


def test_pipes_of_others_are_not_taken_for_dotnets(world: str, alice: Any) -> None:
    with (
        portway.NamedPipeServer("Open", mode="message", max_instances=9, security=Security.everyone()),
        portway.NamedPipeServer("Closed"),
        socket.socket(socket.AF_UNIX) as dotnet,
    ):
        dotnet.bind(f"{world}/CoreFxPipe_Foreign")
        dotnet.listen()
        rows = seen(alice)
        assert {name: one[1:6] for name, one in rows.items()} == {
            "Open": ("portway", "message", "duplex", os.geteuid(), 4),
            "Closed": ("portway", "unknown", "unknown", os.geteuid(), 0),
            "Foreign": ("dotnet", "byte", "duplex", os.geteuid(), 0),
        }
        assert rows["Open"][7:9] == (9, True)


def test_a_name_that_another_program_took_is_dotnets(world: str, alice: Any) -> None:
    with portway.NamedPipeServer("Taken"), socket.socket(socket.AF_UNIX) as dotnet:
        os.unlink(f"{world}/CoreFxPipe_Taken")
        dotnet.bind(f"{world}/CoreFxPipe_Taken")
        dotnet.listen()
        assert seen(alice)["Taken"][1] == "dotnet"


def test_a_pinned_user_is_asked_of_nobody_else(world: str, alice: Any) -> None:
    with socket.socket(socket.AF_UNIX) as dotnet:
        dotnet.bind(f"{world}/CoreFxPipe_Theirs")
        os.chmod(f"{world}/CoreFxPipe_Theirs", 0o666)
        dotnet.listen()
        dotnet.setblocking(False)
        for call in ("NamedPipeClient", "wait_pipe"):
            with pytest.raises(AccessDenied, match=f"uid {os.geteuid()}"):
                alice.run(f"portway.{call}('Theirs', server_uid={ALICE})")
        with pytest.raises(BlockingIOError):  # nobody came
            dotnet.accept()


WAIT = """

from portway.kernel.pipe_open import Search
looks, claim = [], Search.claim
def look(self):
    looks.append(1)
    return claim(self)
Search.claim = look
try:
    end = portway.NamedPipeClient("Busy", timeout=seconds)
    end.close()
    outcome = "open"
except portway.errors.OperationTimeout:
    outcome = "busy"
Search.claim = claim
(outcome, len(looks))
"""


def test_who_waits_for_another_users_pipe_sleeps_and_is_woken(world: str, alice: Any) -> None:
    with portway.NamedPipeServer("Busy", max_instances=1, security=Security.everyone()) as server:
        with portway.NamedPipeClient("Busy"):
            outcome, looks = alice.run(WAIT, seconds=0.5)
            assert outcome == "busy" and looks <= 10  # every 100 ms, and once when it is her turn
            alice.start(WAIT, seconds=20)
            server.accept(5).close()  # listens again
            assert alice.result()[0] == "open"
