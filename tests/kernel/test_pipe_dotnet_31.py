"""Pipes of portway and of .NET Core 3.1 (``pip install dotnetcore2``, C# compiled by Mono's mcs), by the name alone."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dotnet_pipes import Net, NetStart, World, pattern, serving, world
from handoff_peers import patiently

pytest.importorskip("portway._native.pipe")
from portway import NamedPipeClient, NamedPipeServer, errors, list_pipes, wait_pipe
from portway.kernel.pipe_serving import PipeNameTaken

__all__ = ["world"]

PACKAGE = importlib.util.find_spec("dotnetcore2")
MCS = shutil.which("mcs")
pytestmark = pytest.mark.skipif(
    PACKAGE is None or MCS is None, reason="needs pip install dotnetcore2, and mcs (Debian: mono-mcs)"
)
MB64 = 64 << 20
SOURCE = r"""
using System; using System.IO; using System.IO.Pipes; using System.Threading;
class P {
  static void Say(string e, params string[] more) {  // more: name, value, name, value
    string s = "{\"event\": \"" + e + "\"";
    for (int i = 0; i < more.Length; i += 2) s += ", \"" + more[i] + "\": \"" + more[i + 1].Replace("\"", "'") + "\"";
    Console.WriteLine(s + "}"); Console.Out.Flush();
  }
  static byte Pattern(long i) { return (byte)(31 * i + (i >> 8)); }
  static void Check(byte[] b, int k, long at) {
    for (int i = 0; i < k; i++) if (b[i] != Pattern(at + i)) throw new InvalidDataException("byte " + (at + i));
  }
  static PipeDirection Way(string d) {
    return d == "in" ? PipeDirection.In : d == "out" ? PipeDirection.Out : PipeDirection.InOut;
  }
  static long Source(Stream p, long total) {
    var b = new byte[Math.Min(total, 1 << 20)]; long at = 0;
    while (at < total) {
      int k = (int)Math.Min(b.Length, total - at); for (int i = 0; i < k; i++) b[i] = Pattern(at + i);
      p.Write(b, 0, k); at += k;
    }
    return at;
  }
  static long Sink(Stream p) {
    var b = new byte[65536]; long at = 0; int k;
    while ((k = p.Read(b, 0, b.Length)) > 0) { Check(b, k, at); at += k; }
    return at;
  }
  static void Serve(PipeStream p, string mode, long total) {
    long n = 0; var b = new byte[65536]; int k;
    if (mode == "source") n = Source(p, total);
    else if (mode == "sink") n = Sink(p);
    else while ((k = p.Read(b, 0, b.Length)) > 0) { p.Write(b, 0, k); n += k; }
    Say("closed", "bytes", n.ToString());
  }
  static void Talk(PipeStream p, string mode, long total) {
    long n = 0;
    if (mode == "source") n = Sink(p);
    else if (mode == "sink") n = Source(p, total);
    else {
      var t = new Thread(() => Source(p, total)); t.Start(); var b = new byte[65536];
      while (n < total) {
        int k = p.Read(b, 0, (int)Math.Min(b.Length, total - n));
        if (k == 0) throw new EndOfStreamException();
        Check(b, k, n); n += k;
      }
      t.Join();
    }
    Say("ok", "bytes", n.ToString());
  }
  static void Server(string name, string mode, PipeDirection way, long total, PipeOptions option) {
    using (var p = new NamedPipeServerStream(name, way, -1, PipeTransmissionMode.Byte, option)) {
      Say("listening", "name", name, "path", Path.Combine(Path.GetTempPath(), "CoreFxPipe_" + name));
      new Thread(() => {
        while (Console.ReadLine() == "ping") Say("pong");
        p.Dispose(); Environment.Exit(0);
      }).Start();
      while (true) {
        try { p.WaitForConnection(); } catch (UnauthorizedAccessException) { Say("refused"); continue; }
        Say("connected");
        try { Serve(p, mode, total); } catch (IOException e) { Say("connection-error", "message", e.Message); }
        p.Disconnect();
      }
    }
  }
  // server NAME MODE WAY TOTAL user|any; client NAME MODE WAY TOTAL user|any TIMEOUT hold|-
  static int Main(string[] a) {
    try {
      var option = a[5] == "user" ? PipeOptions.CurrentUserOnly : PipeOptions.None; long total = long.Parse(a[4]);
      if (a[0] == "server") Server(a[1], a[2], Way(a[3]), total, option);
      using (var c = new NamedPipeClientStream(".", a[1], Way(a[3]), option)) {
        c.Connect(int.Parse(a[6])); Say("connected");
        Talk(c, a[2], total);
        if (a[7] == "hold") { Say("holding"); Console.ReadLine(); }
      }
      return 0;
    } catch (Exception e) {
      Say("error", "type", e.GetType().FullName, "message", e.Message);
      Environment.Exit(1); return 1;
    }
  }
}
"""
LIBRARIES = [
    "System.Private.CoreLib", "System.Runtime", "System.Console", "System.Threading", "System.Threading.Thread",
    "System.IO.FileSystem", "System.IO.Pipes", "System.Runtime.Extensions",
]  # fmt: skip


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command line of the peer."""
    assert PACKAGE is not None and PACKAGE.origin is not None and MCS is not None
    home, build = Path(PACKAGE.origin).parent / "bin", tmp_path_factory.mktemp("net31")
    framework = next((home / "shared/Microsoft.NETCore.App").iterdir())
    (build / "p.cs").write_text(SOURCE)
    references = [f"-r:{framework}/{one}.dll" for one in LIBRARIES]
    subprocess.run([MCS, "-nostdlib", "-noconfig", "-out:p.dll", *references, "p.cs"], cwd=build, check=True)
    (build / "p.runtimeconfig.json").write_text(
        f'{{"runtimeOptions": {{"framework": {{"name": "Microsoft.NETCore.App", "version": "{framework.name}"}}}}}}'
    )
    dotnet = home / "dotnet"
    if not os.access(dotnet, os.X_OK):
        dotnet.chmod(0o755)
    return [str(dotnet), str(build / "p.dll")]


@pytest.fixture
def net(program: list[str], world: World) -> Iterator[NetStart]:
    """All are ended after the test, before its folder is looked at."""
    running: list[Net] = []

    def start(*words: str, uid: int | None = None, **env: str) -> Net:
        running.append(Net(*program, *words, uid=uid, **env))
        if words[0] == "server":
            running[-1].event("listening")
        return running[-1]

    yield start
    for one in running:
        one.close()


def server(net: NetStart, name: str, mode: str = "echo", way: str = "inout", total: int = 0, who: str = "any") -> Net:
    return net("server", name, mode, way, str(total), who)


def client(
    net: NetStart, name: str, mode: str = "echo", way: str = "inout", total: int = 10_000, who: str = "any",
    timeout: int = 30_000, after: str = "-",
) -> Net:  # fmt: skip
    return net("client", name, mode, way, str(total), who, str(timeout), after)


def ok(one: Net) -> int:
    return int(one.event("ok")["bytes"])


@pytest.mark.parametrize("name", ["HelloWorld", "two words", "Größe-中文", "a:b"])
def test_by_name_both_ways(net: NetStart, name: str) -> None:
    with serving(NamedPipeServer(name)):
        assert ok(client(net, name, who="user")) == 10_000
    server(net, name, who="user")
    with NamedPipeClient(f"\\\\.\\pipe\\{name}", server_uid=os.geteuid()) as pipe:
        pipe.send(b"x")
        assert pipe.receive() == b"x"


def test_rooted_both_ways(net: NetStart, world: World) -> None:
    name = f"{world.path}/r"
    with serving(NamedPipeServer(name)):
        assert ok(client(net, name)) == 10_000
    server(net, name)
    with NamedPipeClient(name) as pipe:
        pipe.send(b"x")
        assert pipe.receive() == b"x"


def test_several_clients(net: NetStart) -> None:
    with serving(NamedPipeServer("many")) as ours:
        peers = [client(net, "many", after="hold") for _ in range(4)]
        assert [ok(one) for one in peers] == [10_000] * 4
        assert len(ours.serving.used) == 4
        for one in peers:
            one.kill()


def test_64_megabytes(net: NetStart) -> None:
    def sink(pipe: Any) -> None:
        at = 0
        for data in pipe:
            assert data == pattern(len(data), at)
            at += len(data)
        assert at == MB64

    with serving(NamedPipeServer("large")):
        assert ok(client(net, "large", total=MB64)) == MB64
    with serving(NamedPipeServer("large"), sink):
        assert ok(client(net, "large", "sink", total=MB64)) == MB64
    with serving(NamedPipeServer("large"), lambda pipe: pipe.send(pattern(MB64))):
        assert ok(client(net, "large", "source")) == MB64
    server(net, "source", "source", total=MB64)
    with NamedPipeClient("source") as pipe:
        sink(pipe)
    peer = server(net, "sink", "sink")
    with NamedPipeClient("sink") as pipe:
        assert pipe.send(pattern(MB64)) == MB64
    assert int(peer.event("closed")["bytes"]) == MB64


def test_ends_in_the_middle(net: NetStart, world: World) -> None:
    peer = server(net, "middle")
    with NamedPipeClient("middle") as pipe:
        pipe.send(b"abc")
        patiently(lambda: pipe.peek(3)[1] == 3)
        peer.kill()
        assert pipe.receive() == b"abc"
        with pytest.raises(errors.BrokenPipe):
            pipe.receive()
        with pytest.raises(errors.NoData):
            pipe.send(b"x")
    with NamedPipeServer("middle") as ours:  # over the file that it left
        peer = client(net, "middle", "sink", total=10, after="hold")
        with ours.accept(30) as pipe:
            peer.event("holding")
            peer.kill()
            assert b"".join(pipe) == pattern(10)
            with pytest.raises(errors.NoData):
                pipe.send(b"x")
        peer = client(net, "middle", "source")
        with ours.accept(30) as pipe:
            pipe.send(pattern(1000))
        assert ok(peer) == 1000


@pytest.mark.parametrize("ours, mode, theirs", [("inbound", "sink", "out"), ("outbound", "source", "in")])
def test_directions(net: NetStart, ours: str, mode: str, theirs: str) -> None:
    def handler(pipe: Any) -> None:
        if ours == "inbound":
            assert b"".join(pipe) == pattern(10_000)
        else:
            pipe.send(pattern(10_000))

    with serving(NamedPipeServer("d", direction=ours), handler):
        assert ok(client(net, "d", mode, theirs)) == 10_000
        assert ok(client(net, "d", mode)) == 10_000  # duplex on its side
    with serving(NamedPipeServer("d", direction="inbound"), lambda pipe: b"".join(pipe)):
        assert ok(client(net, "d", "source", "in")) == 0  # a mismatch: it reads the end
    with serving(NamedPipeServer("d", direction="outbound"), lambda pipe: pipe.flush()):
        assert "Broken pipe" in client(net, "d", "sink", total=1 << 20).error()


def test_directions_of_its_servers(net: NetStart) -> None:
    peer = server(net, "in", "sink", "in")
    with NamedPipeClient("in") as pipe:
        with pytest.raises(errors.BrokenPipe):
            pipe.receive()
        pipe.send(pattern(10))
    assert int(peer.event("closed")["bytes"]) == 10
    server(net, "out", "source", "out", 1000)
    with NamedPipeClient("out", direction="inbound") as pipe:
        assert b"".join(pipe) == pattern(1000)
        with pytest.raises(errors.AccessDenied):
            pipe.send(b"x")


def test_connect_waits_for_an_instance(net: NetStart) -> None:
    with NamedPipeServer("one", max_instances=1) as ours:
        first = NamedPipeClient("one")  # not accepted yet
        patiently(lambda: ours.dotnet_state == "closed")
        assert "TimeoutException" in client(net, "one", timeout=300).error()
        waiting = client(net, "one", "source")
        first.close()
        ours.accept(5).close()
        with ours.accept(30) as pipe:
            pipe.send(pattern(10))
        assert ok(waiting) == 10


def test_a_message_pipe_answers_at_once(net: NetStart) -> None:
    with serving(NamedPipeServer("messages", mode="message")):
        said = client(net, "messages").error()
        assert "Protocol wrong type for socket" in said and "Timeout" not in said


def test_a_name_taken_over(net: NetStart, world: World) -> None:
    with pytest.warns(PipeNameTaken) as told, serving(NamedPipeServer("name")) as ours:
        thief = server(net, "name", "source", total=3)
        patiently(lambda: ours.dotnet_state == "taken" and told.list)
        with NamedPipeClient("name") as pipe:
            pipe.send(b"x")
            assert pipe.receive() == b"x"
        assert {one.dotnet_state for one in list_pipes() if one.kind == "portway"} == {"taken"}
        assert ok(client(net, "name", "source")) == 3
        thief.end()
        patiently(lambda: ours.dotnet_state == "ours", 3)
        assert ok(client(net, "name")) == 10_000
    assert len(told) == 1


def test_looking_is_never_a_client(net: NetStart) -> None:
    peer = server(net, "Watched")
    for _ in range(3):
        wait_pipe("watched", 1)
        assert [one.name for one in list_pipes()] == ["Watched"]
        with pytest.raises(errors.AccessDenied):
            NamedPipeServer("Watched")
        with pytest.raises(errors.PipeNotFound):
            NamedPipeClient("Watched2")
    peer.ping()
    assert peer.count("connected") == 0
