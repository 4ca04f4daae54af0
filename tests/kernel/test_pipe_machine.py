"""Instances, clients and messages in any order, against a plain model of the rules of Windows (spec: 1.2 to 1.5)."""

from __future__ import annotations

import itertools
from collections import deque
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from pipe_world import remains

import portway
from portway import errors
from portway import win32pipe as w

RW = w.GENERIC_READ | w.GENERIC_WRITE
MESSAGE = w.PIPE_TYPE_MESSAGE | w.PIPE_READMODE_MESSAGE
_names = itertools.count()


class Link:
    """The model of one conversation: what either side has not read, and who has gone how."""

    def __init__(self) -> None:
        self.to_server: deque[bytes] = deque()
        self.to_client: deque[bytes] = deque()
        self.server = self.client = True
        self.disconnected = False


class Instance:
    def __init__(self, handle: w.PipeHandle) -> None:
        self.handle = handle
        self.state = "listening"
        self.link: Link | None = None


class Client:
    def __init__(self, handle: w.PipeHandle, link: Link) -> None:
        self.handle, self.link = handle, link


class Machine(RuleBasedStateMachine):
    instances, clients = Bundle("instances"), Bundle("clients")

    def __init__(self) -> None:
        super().__init__()
        self.name = f"\\\\.\\pipe\\machine {next(_names)}"
        self.living: list[Instance] = []
        self.queue: list[Instance] = []  # those that listen, the oldest first
        self.most = 0
        self.opened: list[Client] = []

    def outcome(self, call: Any, *args: Any, **options: Any) -> Any:
        try:
            return call(*args, **options)
        except errors.PortwayError as error:
            return error.code

    # -- opening -------------------------------------------------------------------------------------------------------

    @rule(target=instances, most=st.integers(1, 4))
    def create(self, most: int) -> Any:
        made = self.outcome(w.CreateNamedPipe, self.name, 3, MESSAGE, most)
        if self.living and len(self.living) >= self.most:
            assert made == 231
            return multiple()
        assert isinstance(made, w.PipeHandle), made
        if not self.living:
            self.most = most
        assert w.GetNamedPipeInfo(made)[3] == self.most
        instance = Instance(made)
        self.living.append(instance)
        self.queue.append(instance)
        return instance

    @rule(target=clients)
    def open(self) -> Any:
        made = self.outcome(w.CreateFile, self.name, RW)
        if not self.queue:
            assert made == (231 if self.living else 2)
            return multiple()
        assert isinstance(made, w.PipeHandle), made
        w.SetNamedPipeHandleState(made, w.PIPE_READMODE_MESSAGE)
        instance = self.queue.pop(0)
        instance.state, instance.link = "connected", Link()
        client = Client(made, instance.link)
        self.opened.append(client)
        return client

    @rule()
    def wait(self) -> None:
        seen = self.outcome(w.WaitNamedPipe, self.name, w.NMPWAIT_NOWAIT)
        assert seen == (None if self.queue else 1460 if self.living else 2)

    # -- states of the server's end ------------------------------------------------------------------------------------

    @rule(instance=instances)
    def connect(self, instance: Instance) -> None:
        if instance not in self.living:
            return
        seen = self.outcome(w.ConnectNamedPipe, instance.handle, timeout=0)
        if instance.state == "disconnected":
            instance.state = "listening"
            self.queue.append(instance)
        if instance.state == "listening":
            assert seen == 1460
        else:
            assert instance.link
            assert seen == (535 if instance.link.client else 232)

    @rule(instance=instances)
    def disconnect(self, instance: Instance) -> None:
        if instance not in self.living:
            return
        seen = self.outcome(w.DisconnectNamedPipe, instance.handle)
        assert seen == (233 if instance.state == "disconnected" else None)
        if instance.state == "listening":
            self.queue.remove(instance)
        elif instance.link:
            instance.link.disconnected = True
            instance.link = None
        instance.state = "disconnected"

    @rule(instance=consumes(instances))
    def close_instance(self, instance: Instance) -> None:
        if instance not in self.living:
            return
        instance.handle.Close()
        self.living.remove(instance)
        if instance in self.queue:
            self.queue.remove(instance)
        if instance.link:
            instance.link.server = False

    @rule(client=consumes(clients))
    def close_client(self, client: Client) -> None:
        client.handle.Close()
        client.link.client = False
        self.opened.remove(client)

    # -- data ----------------------------------------------------------------------------------------------------------

    def transfer(self, handle: Any, link: Link, server: bool, data: bytes | None, size: int) -> None:
        """Writes `data`, or reads up to `size`, at one end of a conversation."""
        there = link.client if server else link.server
        unread = link.to_server if server else link.to_client
        if data is not None:
            other = link.to_client if server else link.to_server
            if len(other) > 60:
                return
            seen = self.outcome(w.WriteFile, handle, data)
            assert seen == ((0, len(data)) if there else 232)
            if there:
                other.append(data)
            return
        peeked = self.outcome(w.PeekNamedPipe, handle, size)
        seen = self.outcome(w.ReadFile, handle, size, timeout=0)
        if not unread:
            assert (peeked, seen) == ((b"", 0, 0), 1460) if there else (109, 109)
            return
        head = unread.popleft()
        part, rest = head[:size], head[size:]
        assert peeked == (part, len(head) + sum(map(len, unread)), len(rest))
        if rest:
            unread.appendleft(rest)
        assert seen == (234 if rest else 0, part)

    @rule(instance=instances, data=st.one_of(st.none(), st.binary(max_size=40)), size=st.integers(0, 50))
    def at_server(self, instance: Instance, data: bytes | None, size: int) -> None:
        if instance not in self.living:
            return
        if instance.state == "connected":
            assert instance.link
            self.transfer(instance.handle, instance.link, True, data, size)
            return
        wrong = 536 if instance.state == "listening" else 233
        assert self.outcome(w.WriteFile, instance.handle, b"x") == wrong
        assert self.outcome(w.ReadFile, instance.handle, 1) == wrong
        assert self.outcome(w.PeekNamedPipe, instance.handle, 1) == 230

    @rule(client=clients, data=st.one_of(st.none(), st.binary(max_size=40)), size=st.integers(0, 50))
    def at_client(self, client: Client, data: bytes | None, size: int) -> None:
        if not client.link.disconnected:
            self.transfer(client.handle, client.link, False, data, size)
            return
        for call in (
            lambda: w.WriteFile(client.handle, b"x"), lambda: w.ReadFile(client.handle, 1),
            lambda: w.PeekNamedPipe(client.handle, 1), lambda: w.FlushFileBuffers(client.handle),
        ):  # fmt: skip
            assert self.outcome(call) == 233

    # -- what others see -----------------------------------------------------------------------------------------------

    @invariant()
    def the_list_tells(self) -> None:
        found = [one for one in portway.list_pipes() if one.name == self.name.removeprefix("\\\\.\\pipe\\")]
        assert len(found) == bool(self.living)
        for one in found:
            assert (one.instances, one.in_use, one.max_instances) == (
                len(self.living), len(self.living) - len(self.queue), self.most,
            )  # fmt: skip

    def teardown(self) -> None:
        for one in [*self.living, *self.opened]:
            one.handle.Close()


def test_any_order(pipe_root: str) -> None:
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
    assert remains(pipe_root) == []
