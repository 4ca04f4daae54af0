"""`portway handoff`: look at a process's sockets, take one, send one."""

from __future__ import annotations

import json
import os
import socket
import sys
from typing import Any

import click

from ..address import parse
from ..errors import AccessDenied, CommandNotFound, ConfigurationError, ProcessNotFound, UnsupportedSocket

__all__ = ["command"]


@click.group("handoff", help="Look at the sockets of a process, take one of them, or send one to a process.")
def command() -> None:
    pass


# -- ls ---------------------------------------------------------------------------------------------------------------


def _sockets(pid: int) -> list[dict[str, Any]]:
    import psutil

    try:
        found = psutil.Process(pid).net_connections(kind="all")
    except psutil.NoSuchProcess:
        raise ProcessNotFound(f"pid {pid}: no such process") from None
    except psutil.AccessDenied:
        raise AccessDenied(f"pid {pid}: its descriptors are not ours to see", hint="be its user, or root") from None
    return [
        {
            "fd": one.fd,
            "family": one.family.name,
            "type": getattr(one.type, "name", str(one.type)),
            "state": "" if one.status == psutil.CONN_NONE else one.status.lower(),
            "local": _show(one.laddr),
            "peer": _show(one.raddr),
        }
        for one in sorted(found, key=lambda one: one.fd)
    ]


def _show(address: Any) -> str:
    if not address:
        return ""
    if isinstance(address, str):
        return address
    host = f"[{address.ip}]" if ":" in address.ip else address.ip
    return f"{host}:{address.port}"


@command.command("ls")
@click.argument("pid", type=int)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def ls(pid: int, as_json: bool) -> None:
    """The sockets of process PID: descriptor, kind, state, addresses."""
    rows = _sockets(pid)
    if as_json:
        for row in rows:
            click.echo(json.dumps(row))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("fd", "family", "type", "state", "local", "peer", box=None)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)
    if not rows:
        click.echo(f"pid {pid} has no sockets", err=True)


# -- grab -------------------------------------------------------------------------------------------------------------


def _take(pid: int, fd: int) -> socket.socket:
    from ..kernel.process import Pidfd, take_descriptor

    with Pidfd(pid) as process:
        try:
            got = take_descriptor(process, fd)
        except OSError as error:
            if error.errno == 9:
                raise UnsupportedSocket(
                    f"pid {pid} has no descriptor {fd}", hint=f"see `portway handoff ls {pid}`"
                ) from None
            raise
    try:
        return socket.socket(fileno=got)
    except OSError:
        os.close(got)
        raise UnsupportedSocket(f"descriptor {fd} of pid {pid} is no socket") from None


def _describe(sock: socket.socket) -> dict[str, Any]:
    from .._accel import handoff as native

    family, kind, protocol, listening, connected, _, _ = native.facts(sock.fileno())
    return {
        "family": getattr(sock.family, "name", str(family)),
        "type": getattr(sock.type, "name", str(kind)),
        "protocol": protocol,
        "state": "listening" if listening else "connected" if connected else "unconnected",
        "local": sock.getsockname(),
        "peer": sock.getpeername() if connected else None,
    }


@command.command("grab", context_settings={"ignore_unknown_options": True})
@click.argument("pid", type=int)
@click.argument("fd", type=int)
@click.option("--peek", type=click.IntRange(0, 65536), default=0, help="Show up to N bytes that wait, leaving them.")
@click.option("--json", "as_json", is_flag=True)
@click.argument("cmd", nargs=-1, type=click.UNPROCESSED)
def grab(pid: int, fd: int, peek: int, as_json: bool, cmd: tuple[str, ...]) -> None:
    """Takes a duplicate of descriptor FD of process PID, which keeps its own.

    Says what it is; with `-- CMD ...` it then becomes that command, which inherits the socket: `{fd}` in its words is
    the descriptor's number. Needs the right to inspect the process (same user, or root).
    """
    with _take(pid, fd) as sock:
        about = _describe(sock)
        if peek and about["state"] != "listening":
            try:
                about["waiting"] = sock.recv(peek, socket.MSG_PEEK | socket.MSG_DONTWAIT).decode("latin-1")
            except OSError:
                about["waiting"] = ""
        _say(about, as_json, err=bool(cmd))
        if cmd:
            sock.set_inheritable(True)
            words = [word.replace("{fd}", str(sock.fileno())) for word in cmd]
            sys.stdout.flush()
            try:
                os.execvp(words[0], words)
            except OSError as error:
                raise CommandNotFound(f"{words[0]!r}: {error.strerror}") from None


def _say(about: dict[str, Any], as_json: bool, *, err: bool = False) -> None:
    if as_json:
        click.echo(json.dumps(about), err=err)
    else:
        for key, value in about.items():
            click.echo(f"{key:10} {value}", err=err)


# -- send -------------------------------------------------------------------------------------------------------------


@command.command("send")
@click.option("--to", "target", type=int, help="Process that gets the socket: into its HandoffInbox, or by a record.")
@click.option("--to-socket", "path", help="Or: the Unix stream socket of a program that receives SCM_RIGHTS.")
@click.option("--from", "source", type=int, help="Process whose socket it is, with --fd.")
@click.option("--fd", type=int, help="Descriptor in the --from process.")
@click.option("--bind", "bind_at", help="Or: a new listening socket, HOST:PORT.")
@click.option("--connect", "connect_to", help="Or: a new connection, HOST:PORT.")
@click.option("--way", type=click.Choice(["auto", "message", "pid"]), default="auto", show_default=True)
@click.option("--expires", type=float, default=30.0, show_default=True, help="Seconds until an unclaimed one is void.")
@click.option("--timeout", type=float, default=30.0, show_default=True, help="Seconds to wait for the target.")
@click.option("--json", "as_json", is_flag=True)
def send(
    target: int | None, path: str | None, source: int | None, fd: int | None, bind_at: str | None,
    connect_to: str | None, way: str, expires: float, timeout: float, as_json: bool,
) -> None:  # fmt: skip
    """Sends a socket of another process, or a new one, to a process.

    A target with a HandoffInbox gets it from `receive()`. For any other the record is printed as text: let the target
    give it to `portway.socket_from`; this command waits until it has.
    """
    if (target is None) == (path is None):
        raise ConfigurationError("send: give exactly one of --to and --to-socket")
    with _chosen(source, fd, bind_at, connect_to, timeout) as sock:
        about = _describe(sock)
        if path is not None:
            _send_raw(sock, path, timeout)
            about["way"] = "scm_rights"
        else:
            assert target is not None
            about.update(_send_to(sock, target, way, expires, timeout, as_json))
    _say(about, as_json)


def _chosen(
    source: int | None, fd: int | None, bind_at: str | None, connect_to: str | None, timeout: float
) -> socket.socket:
    given = [source is not None, bind_at is not None, connect_to is not None]
    if sum(given) != 1 or (source is None) != (fd is None):
        raise ConfigurationError("send: give exactly one of --from PID --fd N, --bind and --connect")
    if source is not None and fd is not None:
        return _take(source, fd)
    at = parse(bind_at or connect_to or "")
    if at.scheme != "socket" or at.port is None:
        raise ConfigurationError(f"send: {at}: give HOST:PORT")
    if bind_at:
        return socket.create_server((at.host, at.port), family=socket.AF_INET6 if ":" in at.host else socket.AF_INET)
    return socket.create_connection((at.host, at.port), timeout)


def _send_raw(sock: socket.socket, path: str, timeout: float) -> None:
    from ..kernel.fdpass import send_descriptors

    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(timeout)
        line.connect(path)
        send_descriptors(line, b"socket", [sock.fileno()], timeout=timeout)


def _send_to(
    sock: socket.socket, target: int, way: str, expires: float, timeout: float, as_json: bool
) -> dict[str, Any]:
    from ..errors import HandoffRefused
    from ..kernel.handoff import duplicate_socket, wait_claimed
    from ..kernel.session import HandoffSession

    if way != "pid":
        try:
            with HandoffSession(target, expires=expires, timeout=timeout) as session:
                session.send(sock)
            return {"way": "message"}
        except HandoffRefused:
            if way == "message":
                raise
    info = duplicate_socket(sock, target, way="pid", expires=expires, timeout=timeout)
    click.echo(json.dumps({"record": info.to_text()}) if as_json else info.to_text())
    sys.stdout.flush()
    click.echo(f"waiting until pid {target} claims it ...", err=True)
    wait_claimed(info, timeout)
    return {"way": "pid"}
