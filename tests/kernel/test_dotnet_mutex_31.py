"""`portway.DotnetMutex` with .NET Core 3.1 (``pip install dotnetcore2``), compiled by Mono's mcs, and .NET 10."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("portway._native.dotnet")
from portway import DotnetMutex, errors

PACKAGE = importlib.util.find_spec("dotnetcore2")
MCS = shutil.which("mcs")
pytestmark = pytest.mark.skipif(
    PACKAGE is None or MCS is None, reason="needs pip install dotnetcore2, and mcs (Debian: mono-mcs)"
)
NETPEER = os.environ.get("PORTWAY_NETPEER") or str(Path(__file__).parents[3] / "shared/peers/netpeer")
SOURCE = """
using System; using System.Diagnostics; using System.IO; using System.Threading;
class P { static int Main(string[] a) {
  var m = new Mutex(false, a[1]);
  if (a[0] == "try") {
    try { if (!m.WaitOne(int.Parse(a[2]))) return 3; } catch (AbandonedMutexException) { m.ReleaseMutex(); return 4; }
    m.ReleaseMutex(); return 0;
  }
  if (a[0] == "hold") {
    m.WaitOne(); Console.WriteLine("held"); Console.Out.Flush(); Console.ReadLine(); m.ReleaseMutex(); return 0;
  }
  if (a[0] == "abandon") { m.WaitOne(); Process.GetCurrentProcess().Kill(); Thread.Sleep(5000); return 1; }
  for (int i = int.Parse(a[3]); i > 0; i--) {
    m.WaitOne();
    File.WriteAllText(a[2], (int.Parse(File.ReadAllText(a[2])) + 1).ToString());
    m.ReleaseMutex();
  }
  return 0;
} }
"""
LIBRARIES = [
    "System.Private.CoreLib", "System.Runtime", "System.Console", "System.Threading", "System.Diagnostics.Process",
    "System.IO.FileSystem", "System.Runtime.Extensions", "System.ComponentModel.Primitives",
]  # fmt: skip


@pytest.fixture(scope="module")
def net31(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
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


@pytest.fixture(autouse=True)
def invariant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOTNET_SYSTEM_GLOBALIZATION_INVARIANT", "1")


@pytest.fixture
def mutex() -> Iterator[DotnetMutex]:
    with contextlib.closing(DotnetMutex(f"Global\\portway-test-31-{os.getpid()}")) as mutex:
        yield mutex


def code(*command: str) -> int:
    return subprocess.run(command, timeout=60, stdin=subprocess.DEVNULL).returncode


def test_excludes_both_ways(net31: list[str], mutex: DotnetMutex) -> None:
    with mutex:
        assert code(*net31, "try", mutex.name, "50") == 3
    assert code(*net31, "try", mutex.name, "50") == 0
    with subprocess.Popen([*net31, "hold", mutex.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as peer:
        assert peer.stdout is not None and peer.stdin is not None
        assert peer.stdout.readline() == b"held\n"
        with pytest.raises(errors.OperationTimeout):
            mutex.acquire(0.05)
        peer.stdin.write(b"\n")
        peer.stdin.flush()
        assert mutex.acquire(20) and not mutex.abandoned
        mutex.release()


def test_abandons_both_ways(net31: list[str], mutex: DotnetMutex) -> None:
    assert code(*net31, "abandon", mutex.name) == -signal.SIGKILL
    assert mutex.acquire(5) and mutex.abandoned
    waiting = subprocess.Popen([*net31, "try", mutex.name, "20000"])
    mutex.release()
    assert waiting.wait(30) == 0
    pid = os.fork()
    if pid == 0:
        mutex.acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert code(*net31, "try", mutex.name, "5000") == 4
    assert code(*net31, "try", mutex.name, "0") == 0


@pytest.mark.slow
def test_counting_with_net31_net10_and_us(net31: list[str], mutex: DotnetMutex, tmp_path: Path) -> None:
    file, rounds = tmp_path / "count", 2000
    file.write_text("0")
    others = [subprocess.Popen([*net31, "count", mutex.name, str(file), str(rounds)])]
    if os.access(NETPEER, os.X_OK):
        command = [NETPEER, "mem", "mutex-count", mutex.name, str(file), str(rounds)]
        others.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
    for _ in range(rounds):
        with mutex:
            file.write_text(str(int(file.read_text()) + 1))
    assert [one.wait(60) for one in others] == [0] * len(others)
    assert file.read_text() == str(rounds * (len(others) + 1))
