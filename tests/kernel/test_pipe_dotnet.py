"""Pipes of portway and of .NET 10 by nothing but the name, in both directions."""

from __future__ import annotations

import asyncio
import os
import stat
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from dotnet_pipes import Net, NetStart, World, echo, pattern, serving, world
from handoff_peers import patiently
from sync_world import Process, in_thread

pytest.importorskip("portway._native.pipe")
from portway import NamedPipeClient, NamedPipeServer, Security, aio, errors, list_pipes, wait_pipe
from portway.kernel.pipe_serving import PipeNameTaken

__all__ = ["world"]

STRANGER = 1234
MB64 = 64 << 20


@pytest.fixture
def net(netpeer: Path, world: World) -> Iterator[NetStart]:
    """``net("server", "--name", "x")`` starts one; all are killed after the test, before its folder is looked at."""
    running: list[Net] = []

    def start(*words: str, uid: int | None = None, **env: str) -> Net:
        if uid is not None and os.geteuid():
            pytest.skip("only root can start a process of another user")
        running.append(Net(str(netpeer), "pipe", *words, uid=uid, **env))
        if words[0] == "server":
            running[-1].event("listening")
        return running[-1]

    yield start
    for one in running:
        one.close()


def clients(net: NetStart, name: str, *words: str, uid: int | None = None) -> Net:
    return net("client", "--name", name, "--timeout", "20000", *words, uid=uid)


def ok(client: Net) -> int:
    return int(client.event("ok")["bytes"])


# -- by name -----------------------------------------------------------------------------------------------------------

NAMES = ["HelloWorld", "two words", "Größe-中文-\N{PILE OF POO}", "a:b", "back\\slash", "x" * 60, ".dot", "-rf *"]


@pytest.mark.parametrize("name", NAMES)
def test_a_client_of_dotnet_finds_the_server(net: NetStart, name: str) -> None:
    with serving(NamedPipeServer(f"\\\\.\\pipe\\{name}")) as server:
        assert server.dotnet_state == "ours"
        assert ok(clients(net, name)) == 10_000


@pytest.mark.parametrize("name", NAMES)
def test_a_server_of_dotnet_is_found(net: NetStart, name: str) -> None:
    server = net("server", "--name", name)
    with NamedPipeClient(f"\\\\.\\pipe\\{name}") as pipe:
        pipe.send(b"one two")
        assert pipe.receive(7) == b"one two"
        assert pipe.mode == "byte"
        assert pipe.peer.pid == server.pid


def test_rooted_names(net: NetStart, world: World) -> None:
    name = f"{world.path}/Rooted.pipe"
    with serving(NamedPipeServer(name)) as server:
        assert server.dotnet_path == name and stat.S_ISSOCK(os.lstat(name).st_mode)
        assert ok(clients(net, name)) == 10_000
        with pytest.raises(errors.PipeNotFound):
            NamedPipeClient(name.replace("Rooted", "rooted"))
    assert not os.path.lexists(name)
    net("server", "--name", name)
    with NamedPipeClient(name) as pipe:
        assert pipe.transact(b"abc") == b"abc" if pipe.mode == "message" else pipe.send(b"abc") == 3
    with pytest.raises(errors.AccessDenied, match=r"missing: No such file"):
        NamedPipeServer(f"{world.path}/missing/x")


def test_case_towards_dotnet(net: NetStart) -> None:
    net("server", "--name", "CaseMatters", "--mode", "source", "--total", "1")
    with NamedPipeClient("casematters") as pipe:  # the only one that differs in case
        assert pipe.receive() == b"\0"
    net("server", "--name", "casematters", "--mode", "source", "--total", "2")
    with NamedPipeClient("casematters") as pipe:  # the exact one first
        assert pipe.receive(2) == b"\0\x1f"
    with pytest.raises(errors.AmbiguousName, match="CoreFxPipe_CaseMatters, CoreFxPipe_casematters"):
        NamedPipeClient("CASEMATTERS")
    with pytest.raises(errors.AmbiguousName):
        wait_pipe("CASEMATTERS", 0)


def test_among_portway_names_case_does_not_count(net: NetStart) -> None:
    with serving(NamedPipeServer("MixedCase")), serving(NamedPipeServer("mixedcase")):
        with NamedPipeClient("MIXEDCASE") as pipe:
            pipe.send(b"x")
            assert pipe.receive() == b"x"
        assert ok(clients(net, "MixedCase")) == 10_000
        assert net("client", "--name", "mixedcase", "--timeout", "300").error().startswith("System.TimeoutException")


def test_appear_waits_for_dotnet_as_connect_does(net: NetStart) -> None:
    waiting = in_thread(lambda: NamedPipeClient("later", appear=True, timeout=20))
    net("server", "--name", "later")
    with waiting() as pipe:
        pipe.send(b"x")
        assert pipe.receive() == b"x"
    client = clients(net, "later still")
    with serving(NamedPipeServer("later still")):
        assert ok(client) == 10_000


def test_another_tmpdir(net: NetStart, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = f"{world.path}/private tmp"
    os.mkdir(elsewhere)
    server = net("server", "--name", "hidden", TMPDIR=elsewhere)
    with pytest.raises(errors.PipeNotFound) as told:
        NamedPipeClient("hidden")
    assert world.dotnet("hidden") in str(told.value) and f"{world.path}/portway-pipe-" in str(told.value)
    monkeypatch.setenv("TMPDIR", elsewhere)
    with NamedPipeClient("hidden") as pipe:
        pipe.send(b"x")
        assert pipe.receive() == b"x"
    server.end()
    with serving(NamedPipeServer("hidden")):
        client = net("client", "--name", "hidden", "--timeout", "20000")
        assert ok(client) == 10_000
        assert net("client", "--name", "hidden", "--timeout", "200", TMPDIR=world.path).error()
    assert os.listdir(elsewhere) == []
    os.rmdir(elsewhere)


@pytest.mark.parametrize("extra", [0, 1])
def test_the_longest_path(net: NetStart, world: World, extra: int) -> None:
    name = "n" * (107 - len(world.dotnet("")) + extra)
    with serving(NamedPipeServer(name)) as server:
        assert server.dotnet_state == ("none" if extra else "ours")
        assert server.dotnet_path == (None if extra else world.dotnet(name))
        with NamedPipeClient(name) as pipe:
            pipe.send(b"x")
            assert pipe.receive() == b"x"
        if extra:
            assert "ArgumentOutOfRange" in net("client", "--name", name, "--timeout", "200").error()
        else:
            assert ok(clients(net, name)) == 10_000
        assert list_pipes()[0].dotnet_state == server.dotnet_state
    if extra:
        with pytest.raises(errors.PipeNotFound):
            NamedPipeClient(name)


def test_a_long_tmpdir_has_room_for_a_short_name(net: NetStart, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = f"{world.path}/{'f' * 60}"
    os.mkdir(folder)
    monkeypatch.setenv("TMPDIR", folder)
    with serving(NamedPipeServer("short", max_instances=1)) as server:
        assert server.dotnet_state == "ours"
        for _ in range(3):
            assert ok(clients(net, "short")) == 10_000
        patiently(lambda: server.dotnet_state == "ours")
    assert os.listdir(folder) == []
    os.rmdir(folder)


# -- conversations -----------------------------------------------------------------------------------------------------


def test_several_clients_of_dotnet_at_once(net: NetStart) -> None:
    with serving(NamedPipeServer("many", backlog=1)) as server:
        peers = [clients(net, "many", "--reps", "50", "--hold") for _ in range(6)]
        assert [ok(one) for one in peers] == [50_000] * 6
        assert len(server.serving.used) == 6
        for one in peers:
            one.end()


def test_several_clients_of_portway_at_once(net: NetStart) -> None:
    net("server", "--name", "many", "--listeners", "4", "--quiet")
    turn = threading.Barrier(4)

    def talk(number: int) -> None:
        with NamedPipeClient("many", timeout=10) as pipe:
            turn.wait(20)  # all four are connected
            for _ in range(100):
                pipe.send(bytes([number]) * 1000)
                left = 1000
                while left:
                    data = pipe.receive(left, timeout=10)
                    assert data == bytes([number]) * len(data)
                    left -= len(data)

    for join in [in_thread(lambda number=number: talk(number)) for number in range(4)]:
        join()


def check(receive: Callable[[], bytes], total: int) -> None:
    at = 0
    while at < total:
        data = receive()
        assert data == pattern(len(data), at)
        at += len(data)


def test_64_megabytes_each_way_from_a_dotnet_client(net: NetStart) -> None:
    def sink(pipe: Any) -> None:
        check(lambda: pipe.receive(1 << 20), MB64)

    with serving(NamedPipeServer("large")):
        assert ok(clients(net, "large", "--size", str(MB64), "--reps", "1")) == MB64  # there and back
    with serving(NamedPipeServer("large"), sink):
        assert ok(clients(net, "large", "--mode", "sink", "--size", str(MB64), "--reps", "1")) == MB64
    with serving(NamedPipeServer("large"), lambda pipe: pipe.send(pattern(MB64))):
        assert ok(clients(net, "large", "--mode", "source", "--size", "1000000")) == MB64


def test_64_megabytes_each_way_to_a_dotnet_server(net: NetStart) -> None:
    net("server", "--name", "source", "--mode", "source", "--total", str(MB64), "--size", "1000000")
    with NamedPipeClient("source") as pipe:
        check(lambda: pipe.receive(), MB64)
        with pytest.raises(errors.BrokenPipe):
            pipe.receive()
    sink = net("server", "--name", "sink", "--mode", "sink", "--verify")
    with NamedPipeClient("sink") as pipe:
        assert pipe.send(pattern(MB64)) == MB64
        pipe.flush()  # read by .NET
    assert sink.event("closed")["in"] == MB64
    net("server", "--name", "echo", "--async")
    with NamedPipeClient("echo") as pipe:
        sent = in_thread(lambda: pipe.send(pattern(MB64)))
        check(lambda: pipe.receive(1 << 20), MB64)
        assert sent() == MB64


def test_a_dotnet_server_that_disposes(net: NetStart) -> None:
    net("server", "--name", "short", "--mode", "source", "--total", "100000")
    with NamedPipeClient("short") as pipe:
        got = b"".join(pipe)
        assert got == pattern(100_000)
        with pytest.raises(errors.NoData):
            pipe.send(b"x")
        with pytest.raises(errors.BrokenPipe):
            pipe.receive()


@pytest.mark.parametrize("how", ["end", "kill"])
def test_a_dotnet_server_that_ends_in_the_middle(net: NetStart, how: str, world: World) -> None:
    server = net("server", "--name", "middle")
    with NamedPipeClient("middle") as pipe:
        pipe.send(b"abc")
        patiently(lambda: pipe.peek(3)[1] == 3)
        getattr(server, how)()
        assert pipe.receive() == b"abc"
        with pytest.raises(errors.BrokenPipe):
            pipe.receive()
        with pytest.raises(errors.NoData):
            pipe.send(b"x")
    with pytest.raises(errors.PipeNotFound):
        NamedPipeClient("middle")
    if how == "kill":
        os.unlink(world.dotnet("middle"))


def test_a_dotnet_client_that_disposes(net: NetStart) -> None:
    with NamedPipeServer("c") as server:
        client = clients(net, "c", "--mode", "sink", "--size", "1000", "--reps", "3")
        with server.accept(20) as pipe:
            assert ok(client) == 3000
            client.end()
            assert b"".join(pipe) == pattern(3000)
            with pytest.raises(errors.NoData):
                pipe.send(b"x")
            with pytest.raises(errors.BrokenPipe):
                pipe.receive()


def test_a_dotnet_client_that_is_killed(net: NetStart) -> None:
    with NamedPipeServer("c") as server:
        client = clients(net, "c", "--mode", "sink", "--size", "10", "--reps", "1", "--hold")
        with server.accept(20) as pipe:
            client.event("holding")
            assert pipe.peer.pid == client.pid
            client.kill()
            assert b"".join(pipe) == pattern(10)


def test_a_portway_server_that_closes(net: NetStart) -> None:
    with NamedPipeServer("c") as server:
        client = clients(net, "c", "--mode", "source")
        with server.accept(20) as pipe:
            pipe.send(pattern(50_000))
        assert ok(client) == 50_000  # what was written, then the end
        writer = clients(net, "c", "--size", "100000", "--reps", "50")
        server.accept(20).close()
        assert "IOException: Broken pipe" in writer.error() or "EndOfStream" in str(writer.seen[-1])


def test_disconnect(net: NetStart) -> None:
    with NamedPipeServer("c") as server:
        client = clients(net, "c", "--mode", "source")
        pipe = server.accept(20)
        pipe.send(pattern(100))
        pipe.flush()
        pipe.disconnect()
        assert ok(client) == 100


@pytest.mark.parametrize("server, client", [("inbound", "out"), ("outbound", "in"), ("duplex", "inout")])
def test_directions_to_a_dotnet_client(net: NetStart, server: str, client: str) -> None:
    def handler(pipe: Any) -> None:
        if server == "outbound":
            with pytest.raises(errors.AccessDenied):
                pipe.receive()
            pipe.send(pattern(1000))
        else:
            assert pipe.receive(1000) == pattern(1000)

    with serving(NamedPipeServer("d", direction=server), handler):
        mode = "source" if server == "outbound" else "sink"
        assert ok(clients(net, "d", "--mode", mode, "--dir", client, "--reps", "1")) == 1000


def test_directions_that_do_not_fit(net: NetStart) -> None:
    with serving(NamedPipeServer("d", direction="inbound"), lambda pipe: b"".join(pipe)):
        assert ok(clients(net, "d", "--mode", "source")) == 0  # a duplex one reads the end, as from a server In of .NET
        assert ok(clients(net, "d", "--mode", "source", "--dir", "in")) == 0
    with serving(NamedPipeServer("d", direction="outbound"), lambda pipe: pipe.flush()):
        assert "IOException: Broken pipe" in clients(net, "d", "--mode", "sink").error()


def test_directions_of_dotnet_servers(net: NetStart) -> None:
    sink = net("server", "--name", "in", "--dir", "in", "--mode", "sink", "--verify")
    with NamedPipeClient("in", direction="outbound") as pipe:
        pipe.send(pattern(1000))
        with pytest.raises(errors.AccessDenied):
            pipe.receive()
    assert sink.event("closed")["in"] == 1000
    with NamedPipeClient("in") as pipe:
        with pytest.raises(errors.BrokenPipe):
            pipe.receive()
        pipe.send(b"\0")
    assert sink.event("closed")["in"] == 1
    net("server", "--name", "out", "--dir", "out", "--mode", "source", "--total", "1000", "--listeners", "2")
    with NamedPipeClient("out", direction="inbound") as pipe:
        assert b"".join(pipe) == pattern(1000)
        with pytest.raises(errors.AccessDenied):
            pipe.send(b"x")
    with NamedPipeClient("out") as pipe, pytest.raises(errors.NoData):
        while pipe.receive():  # until its half of the connection has surely been shut
            pipe.send(b"x")


def test_the_asyncio_twins(net: NetStart) -> None:
    async def main() -> None:
        async with aio.NamedPipeServer("twin", max_instances=1) as server:

            async def handler(pipe: Any) -> None:
                async for chunk in pipe:
                    await pipe.send(chunk)

            task = asyncio.create_task(server.serve(handler))
            peers = [clients(net, "twin", "--size", "1000000") for _ in range(3)]
            assert [await asyncio.to_thread(ok, one) for one in peers] == [10_000_000] * 3
            task.cancel()
        net("server", "--name", "twin")
        async with aio.NamedPipeClient("TWIN", timeout=5) as pipe:
            await pipe.send(b"x")
            assert await pipe.receive() == b"x"

    asyncio.run(main())


# -- users -------------------------------------------------------------------------------------------------------------


def test_current_user_only_of_the_same_user(net: NetStart) -> None:
    with serving(NamedPipeServer("mine")):
        assert ok(clients(net, "mine", "--current-user")) == 10_000
    net("server", "--name", "mine", "--current-user")
    with NamedPipeClient("mine", server_uid=os.geteuid()) as pipe:
        pipe.send(b"x")
        assert pipe.receive() == b"x"


def test_current_user_only_of_another(net: NetStart, start: Callable[..., Process], world: World) -> None:
    with serving(NamedPipeServer("theirs", security=Security.everyone())):
        assert ok(clients(net, "theirs", uid=STRANGER)) == 10_000
        assert "UnauthorizedAccess" in clients(net, "theirs", "--current-user", uid=STRANGER).error()
    with NamedPipeServer("mine") as server:
        assert "Permission denied" in clients(net, "mine", uid=STRANGER).error() + str(server)

    server = net("server", "--name", "net", "--current-user", "--umask", "0", uid=STRANGER)
    with pytest.raises(errors.AccessDenied, match="served by uid 1234"):
        NamedPipeClient("net", server_uid=os.geteuid())
    assert not [one for one in server.ping() if one["event"] in ("connected", "refused")]  # it was not even asked

    def stranger(tell: Callable[[Any], None]) -> None:
        os.setresgid(4321, 4321, 4321)
        os.setresuid(4321, 4321, 4321)
        with NamedPipeClient("net") as pipe:
            try:
                tell(b"".join(pipe))  # .NET closes at once
            except errors.PortwayError as error:
                tell(type(error).__name__)

    assert start(stranger).hear() == b""
    server.event("refused")
    server.end()


def test_a_dotnet_server_of_another_user_that_is_closed_to_us(
    net: NetStart, start: Callable[..., Process], world: World
) -> None:
    net("server", "--name", "closed")  # mode 755: others may not write, and so not connect

    def stranger(tell: Callable[[Any], None]) -> None:
        os.setresgid(STRANGER, STRANGER, STRANGER)
        os.setresuid(STRANGER, STRANGER, STRANGER)
        for attempt in (lambda: NamedPipeClient("closed"), lambda: NamedPipeServer("closed")):
            try:
                tell(attempt())
            except errors.AccessDenied as error:
                tell(str(error))

    process = start(stranger)
    assert "not open to uid" in process.hear()
    assert "may be served by another program of uid 0" in process.hear()


def test_everyone_waits_for_an_instance_too(net: NetStart) -> None:
    with NamedPipeServer("w", max_instances=1, security=Security.everyone()) as server:
        with NamedPipeClient("w"), server.accept(5):
            patiently(lambda: server.dotnet_state == "closed")
            assert "TimeoutException" in net("client", "--name", "w", "--timeout", "300", uid=STRANGER).error()
            client = clients(net, "w", uid=STRANGER)
        with server.accept(20) as pipe:
            echo(pipe)
        assert ok(client) == 10_000


# -- no instance free --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accepted", [True, False])
def test_connect_waits_for_an_instance(net: NetStart, accepted: bool, world: World) -> None:
    with NamedPipeServer("one", max_instances=1) as server:
        first = NamedPipeClient("one")
        pipe = server.accept(5) if accepted else None
        patiently(lambda: server.dotnet_state == "closed")
        assert "TimeoutException" in net("client", "--name", "one", "--timeout", "300").error()
        with pytest.raises(errors.PipeBusy):
            NamedPipeClient("one")
        client = clients(net, "one")
        first.close()
        (pipe or server.accept(5)).close()
        with server.accept(20) as pipe:
            echo(pipe)
        assert ok(client) == 10_000
        patiently(lambda: server.dotnet_state == "ours")


def test_connect_waits_while_dotnet_has_the_only_instance(net: NetStart) -> None:
    with serving(NamedPipeServer("one", max_instances=1)):
        holder = clients(net, "one", "--hold")
        holder.event("holding")
        assert "TimeoutException" in net("client", "--name", "one", "--timeout", "300").error()
        with pytest.raises(errors.PipeBusy):
            NamedPipeClient("one")
        waiting = clients(net, "one")

        def ask() -> bytes:
            with NamedPipeClient("one", timeout=20) as pipe:
                pipe.send(b"x")
                return pipe.receive()

        mine = in_thread(ask)
        holder.end()
        assert ok(waiting) == 10_000
        assert mine() == b"x"


def test_clients_of_dotnet_race_for_one_instance(net: NetStart) -> None:
    with serving(NamedPipeServer("race", max_instances=1)):
        racers = [clients(net, "race", "--reps", "3") for _ in range(8)]
        assert [ok(one) for one in racers] == [3000] * 8


def test_who_waits_at_the_door_of_a_closed_server_is_told(net: NetStart) -> None:
    with NamedPipeServer("c", max_instances=1) as server:
        client = clients(net, "c", "--hold")
        pipe = server.accept(20)
    with pipe:
        assert client.event("connected")
        assert "TimeoutException" in net("client", "--name", "c", "--timeout", "300").error()
        pipe.send(pipe.receive(1000))
    assert "EndOfStream" in client.error() or "reset" in str(client.seen)


# -- several servers ---------------------------------------------------------------------------------------------------


def server_process(tell: Callable[[Any], None], name: str, **options: Any) -> None:
    with NamedPipeServer(name, **options) as server:
        tell(os.getpid())
        threading.Thread(target=server.serve, args=(echo,), daemon=True).start()
        threading.Event().wait()


def test_dotnet_reaches_whichever_server_listens(net: NetStart, start: Callable[..., Process], world: World) -> None:
    with NamedPipeServer("shared", max_instances=2, instances=1) as server:
        other = start(server_process, "shared")
        other.hear()
        holder = NamedPipeClient("shared")
        with server.accept(5):  # ours is taken: the other one has the path now
            assert ok(clients(net, "shared", "--reps", "3")) == 3000
            patiently(lambda: server.dotnet_state == "another")
            other.kill()
            assert net("client", "--name", "shared", "--timeout", "300").error()
        holder.close()
        client = clients(net, "shared")
        with server.accept(20) as pipe:
            echo(pipe)
        assert ok(client) == 10_000
        assert patiently(lambda: server.dotnet_state == "ours")


def test_the_path_passes_on_when_its_server_is_killed(
    net: NetStart, start: Callable[..., Process], world: World
) -> None:
    servers = [start(server_process, "killed") for _ in range(3)]
    pids = [one.hear() for one in servers]
    for last, one in enumerate(servers, 1):
        assert ok(clients(net, "killed")) == 10_000
        if last == 3:
            break
        info = list_pipes()[0]
        assert info.dotnet_state == "ours" and {i.server_pid for i in info.detail} == set(pids[last - 1 :])
        one.kill()  # the oldest: it had the path
    servers[-1].kill()
    assert [one for one in world.files() if "CoreFxPipe" in one] == ["CoreFxPipe_killed"]
    assert list_pipes() == []
    assert world.files() == []


def test_a_fork_child_keeps_nothing_open(net: NetStart, start: Callable[..., Process], world: World) -> None:
    with serving(NamedPipeServer("forked")) as server:
        child = start(lambda tell: (tell(server.closed), threading.Event().wait()))
        assert child.hear() is True
        assert ok(clients(net, "forked")) == 10_000
    assert world.files() == []
    assert net("client", "--name", "forked", "--timeout", "300").error()
    net("server", "--name", "forked", "--first-instance").end()


# -- who has the name --------------------------------------------------------------------------------------------------


def test_a_dotnet_server_takes_the_name_over(net: NetStart, world: World) -> None:
    with serving(NamedPipeServer("name")) as server:
        mine = os.lstat(world.dotnet("name")).st_ino
        thief = net("server", "--name", "name", "--mode", "source", "--total", "3")
        theirs = os.lstat(world.dotnet("name")).st_ino
        assert theirs != mine
        with pytest.warns(PipeNameTaken) as told:
            patiently(lambda: server.dotnet_state == "taken")
            patiently(lambda: told.list)
            with NamedPipeClient("name") as pipe:  # portway's are served on
                pipe.send(b"x")
                assert pipe.receive() == b"x"
        assert len(told) == 1 and f"pid {thief.pid}" in str(told[0].message)
        by_kind = {one.kind: one for one in list_pipes()}
        assert by_kind["portway"].dotnet_state == "taken"
        assert by_kind["dotnet"].name == "name" and by_kind["dotnet"].dotnet_path == world.dotnet("name")
        assert os.lstat(world.dotnet("name")).st_ino == theirs
        assert ok(clients(net, "name", "--mode", "source")) == 3
        thief.end()
        patiently(lambda: server.dotnet_state == "ours", 2)
        assert ok(clients(net, "name")) == 10_000
        thief = net("server", "--name", "name")
        patiently(lambda: server.dotnet_state == "taken")  # and no second warning: that would fail the test
        thief.kill()  # its file stays, a dead one
        patiently(lambda: server.dotnet_state == "ours", 2)
        assert ok(clients(net, "name")) == 10_000


def test_a_name_taken_over_outlives_us(net: NetStart, world: World) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with serving(NamedPipeServer("name")):
            thief = net("server", "--name", "name")
        list_pipes()
        assert ok(clients(net, "name")) == 10_000
        with pytest.raises(errors.AccessDenied, match=f"another program: .*pid {thief.pid}"):
            NamedPipeServer("name")
        with NamedPipeClient("name") as pipe:  # now it is the pipe of that name
            pipe.send(b"x")
            assert pipe.receive() == b"x"
        thief.end()
    NamedPipeServer("name").close()


def test_first_pipe_instance_of_dotnet_is_refused(net: NetStart, netpeer: Path) -> None:
    with serving(NamedPipeServer("name")) as server:
        thief = Net(str(netpeer), "pipe", "server", "--name", "name", "--first-instance")
        try:
            assert "UnauthorizedAccessException" in thief.error()
        finally:
            thief.close()
        assert ok(clients(net, "name")) == 10_000 and server.dotnet_state == "ours"
        with pytest.raises(errors.AccessDenied):
            NamedPipeServer("name", first_instance=True)


def test_a_name_that_dotnet_serves_is_not_ours(net: NetStart) -> None:
    peer = net("server", "--name", "theirs")
    for first in (True, False):
        with pytest.raises(errors.AccessDenied, match=f"another program: .*CoreFxPipe_theirs .pid {peer.pid}, netpeer"):
            NamedPipeServer("theirs", first_instance=first)
    peer.kill()
    with serving(NamedPipeServer("theirs")):  # a dead one's file is nobody's
        assert ok(clients(net, "theirs")) == 10_000


def test_a_message_pipe_answers_a_dotnet_client_at_once(net: NetStart) -> None:
    with serving(NamedPipeServer("messages", mode="message", max_instances=1)) as server:
        for _ in range(2):
            start = time.monotonic()
            assert "Protocol wrong type for socket" in clients(net, "messages").error()
            assert time.monotonic() - start < 15  # its own timeout is 20
            assert server.dotnet_state == "ours"
        with NamedPipeClient("messages") as pipe:
            patiently(lambda: server.serving.used)
            assert "Protocol wrong type for socket" in clients(net, "messages").error()
            assert pipe.transact(b"x") == b"x"


def test_looking_is_never_a_client(net: NetStart, world: World, start: Callable[..., Process]) -> None:
    """A server that is looked at in every way has no client but the one that says so."""
    peer = net("server", "--name", "Watched", "--listeners", "2")
    rooted = net("server", "--name", f"{world.path}/r")
    for _ in range(3):
        wait_pipe("Watched", 1)
        wait_pipe("WATCHED", 1)
        wait_pipe(f"{world.path}/r", 1)
        assert [one.name for one in list_pipes()] == ["Watched"]
        for name in ("missing", "watched2", f"{world.path}/x"):
            with pytest.raises(errors.PipeNotFound):
                NamedPipeClient(name)
            with pytest.raises(errors.PipeNotFound):
                wait_pipe(name, 0)
        for name in ("Watched", f"{world.path}/r"):
            with pytest.raises(errors.AccessDenied):
                NamedPipeServer(name)
    assert peer.ping() and rooted.ping()
    assert peer.count("connected") == rooted.count("connected") == 0
    with NamedPipeClient("Watched"):
        peer.event("connected")


# -- storms ------------------------------------------------------------------------------------------------------------


def test_servers_are_killed_while_dotnet_connects(net: NetStart, start: Callable[..., Process], world: World) -> None:
    servers = [start(server_process, "storm") for _ in range(2)]
    for one in servers:
        one.hear()
    with ExitStack() as stack:
        for turn in range(6):
            client = clients(net, "storm", "--reps", "5")
            servers[turn % 2].kill()
            servers[turn % 2] = start(server_process, "storm")
            servers[turn % 2].hear()
            said = client.event("ok", "connected")
            try:
                said = said if said["event"] == "ok" else client.event("ok")
            except AssertionError:  # its server was the one that was killed
                assert client.seen[-1]["event"] == "error"
            stack.callback(client.close)
        assert ok(clients(net, "storm")) == 10_000
    for one in servers:
        one.kill()
    assert list_pipes() == []
    assert world.files() == []
