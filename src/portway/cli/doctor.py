"""`portway doctor`: what of portway works on this machine, and what the kernel, a filter or a setting refuses."""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import click

__all__ = ["Finding", "command", "findings"]


class Finding(NamedTuple):
    what: str
    ok: bool
    """False: something of portway does not work because of it."""
    says: str


def _implementation() -> Finding:
    from .. import _accel

    says = "native" if _accel.name == "c" else "pure Python: slower hand-over; build the native modules"
    return Finding("implementation", True, says)


def _pidfd_getfd() -> Finding:
    from ..kernel.process import Pidfd, take_descriptor

    with Pidfd(os.getpid()) as me, socket.socket() as probe:
        os.close(take_descriptor(me, probe.fileno()))
    return Finding("take by pid", True, "pidfd_getfd works")


def _yama() -> Finding:
    try:
        scope = int(Path("/proc/sys/kernel/yama/ptrace_scope").read_text())
    except FileNotFoundError:
        return Finding("yama", True, "not in this kernel")
    says = {
        0: "ptrace_scope 0: same-user processes may take sockets",
        1: "ptrace_scope 1: taking by pid needs duplicate_socket(ptrace=True), or a HandoffInbox in the target",
        2: "ptrace_scope 2: taking by pid needs CAP_SYS_PTRACE; use a HandoffInbox in the target",
    }.get(scope, f"ptrace_scope {scope}: taking by pid is off; use a HandoffInbox in the target")
    return Finding("yama", scope < 2 or os.geteuid() == 0, says)


def _inbox() -> Finding:
    from ..kernel.inbox import HandoffInbox
    from ..kernel.session import HandoffSession

    with socket.socket() as probe, HandoffInbox() as inbox, HandoffSession(os.getpid()) as session:
        session.send(probe)
        inbox.receive(1).close()
    return Finding("push as a message", True, "works")


def _reuseport() -> Finding:
    import ctypes

    with closing(socket.socket()) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        program = ctypes.create_string_buffer(bytes([0x06, 0, 0, 0, 0, 0, 0, 0]))  # BPF_RET | BPF_K, 0
        head = bytes(ctypes.c_uint64(1)) + bytes(ctypes.c_uint64(ctypes.addressof(program)))
        sock.setsockopt(socket.SOL_SOCKET, 51, head)  # SO_ATTACH_REUSEPORT_CBPF
    return Finding("reload of TCP listeners", True, "SO_REUSEPORT and its BPF steering work")


def _objects() -> Finding:
    """Makes a small mapping where named objects live."""
    from ..kernel.namespace import default_root
    from ..kernel.section import FileMapping

    root = default_root()
    with FileMapping.create(None, 4096) as mapping, mapping.view() as view:
        view[0] = 1
    room = os.statvfs(root)
    size, free = room.f_blocks * room.f_frsize >> 20, room.f_bavail * room.f_frsize >> 20
    says = f"in {root}: {size} MB, {free} MB free"
    if os.environ.get("PORTWAY_ROOT") == root:
        says += "; PORTWAY_ROOT is set: only programs that have it too meet these objects"
    if size <= 64:
        says += "; Docker's default, enlarge it with --shm-size"
    if root == "/dev/shm" and os.getuid() >= 1000 and _removes_ipc():
        says += "; logind empties it when you log out (RemoveIPC), an administrator's /run/portway is safe from that"
    return Finding("named objects", True, says)


def _removes_ipc() -> bool:
    """Whether logind runs here and its configuration leaves RemoveIPC on, the default."""
    if not os.path.isdir("/run/systemd/seats"):
        return False
    try:
        lines = Path("/etc/systemd/logind.conf").read_text().splitlines()
    except OSError:
        return True
    return not any(line.replace(" ", "").lower() in ("removeipc=no", "removeipc=false") for line in lines)


def _waits() -> Finding:
    from .._accel import sync

    missing = sync.fallbacks()
    if not missing:
        return Finding("waits and locks", True, "robust futexes and futex_waitv: the kernel wakes, nothing polls")
    ways = {
        "slices": "PORTWAY_SYNC=slices is set: waits look again every 20 ms",
        "futex_waitv": "no futex_waitv (before Linux 5.16, or filtered away): waits for several objects look again",
        "robust list": "no robust list as glibc has it (musl): a dead owner is found by looking again",
        "kernel before 6.2": "kernel before 6.2: single waits look again too",
    }
    return Finding("waits and locks", True, "; ".join(ways.get(one, one) for one in missing))


def _dotnet() -> Finding:
    from .._accel import dotnet

    says = "named mutexes shared with .NET Core 2.0 to .NET 10" if dotnet.SUPPORTED else "needs glibc on 64 bits"
    return Finding(".NET mutexes", True, says)


def _pipes(what: str, check: str) -> Callable[[], Finding]:
    def look() -> Finding:
        from importlib import import_module

        return Finding(what, *getattr(import_module("portway.cli.doctor_pipes"), check)())

    return look


def _limits() -> Finding:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    says = f"{soft} descriptors (hard limit {hard})"
    if soft < 4096:
        says += "; 10,000 moving connections need more: ulimit -n"
    return Finding("descriptor limit", True, says)


def _extra(module: str, what: str, extra: str) -> Callable[[], Finding]:
    def check() -> Finding:
        from importlib.metadata import PackageNotFoundError, version

        try:
            return Finding(what, True, f"{module} {version(module)}")
        except PackageNotFoundError:
            return Finding(what, True, f'not installed: pip install "portway[{extra}]"')

    return check


_CHECKS: dict[str, Callable[[], Finding]] = {
    "implementation": _implementation,
    "take by pid": _pidfd_getfd,
    "yama": _yama,
    "push as a message": _inbox,
    "reload of TCP listeners": _reuseport,
    "named objects": _objects,
    "waits and locks": _waits,
    ".NET mutexes": _dotnet,
    "named pipes": _pipes("named pipes", "named_pipes"),
    "pipes of others": _pipes("pipes of others", "same_places"),
    "files of .NET's pipes": _pipes("files of .NET's pipes", "dotnet_files"),
    "descriptor limit": _limits,
    "portway asgi": _extra("uvicorn", "portway asgi", "asgi"),
}


def findings() -> list[Finding]:
    """Every check, tried for real; a check that fails is a finding with the reason."""
    found = []
    for what, check in _CHECKS.items():
        try:
            found.append(check())
        except Exception as error:  # whatever it is, it is what does not work here
            found.append(Finding(what, False, str(error) or type(error).__name__))
    return found


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def command(as_json: bool) -> None:
    """What works on this machine. Exit code 1 when something of portway does not."""
    found = findings()
    if not as_json:
        click.echo(f"portway on Linux {platform.release()}, Python {platform.python_version()}, uid {os.geteuid()}")
    for one in found:
        if as_json:
            click.echo(json.dumps(one._asdict()))
        else:
            click.echo(f"{'ok ' if one.ok else 'NO '} {one.what:24} {one.says}")
    sys.exit(0 if all(one.ok for one in found) else 1)
