"""`portway pipe`: list named pipes, serve one, send, ask, measure."""

from __future__ import annotations

import base64
import os
import sys
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigurationError
from .common import remark, timeout
from .objects import LINES, Holding, grants, is_terminal, say, security, show

if TYPE_CHECKING:
    from ..deadline import Deadline
    from ..kernel.pipe_client import NamedPipeClient
    from ..kernel.pipe_list import PipeInfo

__all__ = ["command", "contents", "put"]

PIECE = 1 << 16
HEX = click.option("--hex", "as_hex", is_flag=True, help="Print bytes as hex digits.")
APPEAR = click.option("--appear", is_flag=True, help="Wait for the name, too, not only for a free instance.")
SERVER_UID = click.option("--server-uid", type=click.IntRange(min=0), help="Only a pipe of this user.")


@click.group("pipe", help="Named pipes: list, serve, send, call, measure. .NET's are found by the same names.")
def command() -> None:
    pass


def contents(data: bytes) -> dict[str, Any]:
    """`data` for JSON: `text` if it is UTF-8, else `base64`."""
    try:
        return {"size": len(data), "text": data.decode(), "base64": None}
    except UnicodeDecodeError:
        return {"size": len(data), "text": None, "base64": base64.b64encode(data).decode()}


def put(data: bytes, as_hex: bool, end: bytes) -> None:
    """To stdout: as it is, or without control characters where a terminal would obey them; then `end`."""
    if as_hex:
        data, end = data.hex().encode(), b"\n"
    elif is_terminal():
        text = data.decode(errors="backslashreplace")
        data = "".join(one if one.isprintable() or one in "\n\t" else "?" for one in text).encode()
    sys.stdout.buffer.write(data + end)
    sys.stdout.buffer.flush()


# -- ls ---------------------------------------------------------------------------------------------------------------


def _row(one: PipeInfo) -> dict[str, Any]:
    from ..kernel.process import user_name

    return {
        "name": one.name,
        "kind": one.kind,
        "mode": one.mode,
        "direction": one.direction,
        "owner": user_name(one.owner),
        "shared": one.shared,
        "instances": one.instances,
        "in_use": one.in_use,
        "max_instances": one.max_instances,
        "clients": [each.client_pid for each in one.detail if each.client_pid],
        "dotnet_path": one.dotnet_path,
        "dotnet_state": one.dotnet_state,
        "detail": [each._asdict() for each in one.detail],
    }


@command.command("ls")
@click.option("--instances", is_flag=True, help="A line for each instance: its state, server and client.")
@LINES
def ls(instances: bool, as_json: bool) -> None:
    """Name, kind, mode, direction, owner, instances in use, clients, and who has .NET's path.

    .NET: ours, the path leads to this pipe; closed, none of its instances listens; taken, another program's server has
    the path; blocked, a file is in the way; absent; none, the name can have no such path. Nobody is connected to.
    """
    from ..kernel.pipe_list import list_pipes
    from ..kernel.process import user_name

    rows = [_row(one) for one in list_pipes()]
    if instances:
        lines = [
            {"name": row["name"], **each, "client_uid": each["client_uid"] if each["client_pid"] else None}
            for row in rows for each in row["detail"]
        ]  # fmt: skip
        for line in lines:
            client = user_name(line["client_uid"]) if line["client_pid"] else None
            line |= {"server": line["server_pid"], "client": line["client_pid"] or None, "user": client}
        if as_json:
            lines = [{key: line[key] for key in line if key not in ("server", "client", "user")} for line in lines]
        show(lines, ("name", "slot", "state", "server", "client", "user"), as_json, "instances of portway's pipes")
        return
    if not as_json:
        for row in rows:
            row["in use"] = f"{row['in_use']} of {row['max_instances']}" if row["max_instances"] else None
            row[".NET"] = row["dotnet_state"] if row["kind"] == "portway" else None
    show(rows, ("name", "kind", "mode", "direction", "owner", "in use", "clients", ".NET"), as_json, "pipes")


# -- listen -----------------------------------------------------------------------------------------------------------


@command.command("listen", cls=Holding)
@click.argument("name")
@click.option("--mode", type=click.Choice(["message", "byte"]), default="message", show_default=True)
@click.option("--direction", type=click.Choice(["inbound", "outbound", "duplex"]), default="duplex", show_default=True)
@click.option("--max-instances", type=click.IntRange(1, 255), default=255, show_default=True)
@grants
@click.option("--echo", is_flag=True, help="Answer with what came.")
@click.option("--reply", help="Answer with this text.")
@click.option("--count", type=click.IntRange(min=1), help="End after so many messages (of a byte pipe: clients).")
@timeout()
@HEX
@LINES
def listen(
    name: str, mode: Any, direction: str, max_instances: int, everyone: bool, uids: tuple[str, ...],
    groups: tuple[str, ...], echo: bool, reply: str | None, count: int | None, timeout: float | None, as_hex: bool,
    as_json: bool, cmd: tuple[str, ...],
) -> int:  # fmt: skip
    """Serves the pipe NAME and prints what comes, a line a message; a byte pipe's bytes as they are.

    With `-- CMD ...`, CMD runs for each message, which is its stdin; its stdout is the answer. On a byte pipe CMD runs
    for each client, with the pipe as its stdin and stdout. An outbound pipe gives each client the reply and ends the
    conversation. Until Ctrl-C or SIGTERM (exit code 0), --count, or --timeout (exit code 5).
    """
    import portway

    from .pipe_listen import Listener

    if (reply is not None) + echo + bool(cmd) > 1:
        raise ConfigurationError("pipe listen: one of --echo, --reply and -- CMD")
    if direction == "inbound" and (reply is not None or echo):
        raise ConfigurationError("pipe listen: an inbound pipe cannot answer; leave out --echo, --reply")
    if direction == "outbound" and reply is None and not cmd:
        raise ConfigurationError("pipe listen: an outbound pipe needs --reply or -- CMD, it reads nothing")
    allowed = security(everyone, uids, groups)
    answer = None if reply is None else reply.encode("utf-8", "surrogateescape")
    with portway.NamedPipeServer(
        name, mode=mode, direction=direction, max_instances=max_instances, security=allowed
    ) as server:  # fmt: skip
        listener = Listener(server, echo=echo, reply=answer, cmd=cmd, count=count, as_hex=as_hex, as_json=as_json)
        remark(f"serving the pipe {server.name} until Ctrl-C")
        listener.run(timeout)
    return 0


# -- send, call -------------------------------------------------------------------------------------------------------


def _open(name: str, timeout: float | None, appear: bool, server_uid: int | None, **options: Any) -> NamedPipeClient:
    """Busy is an error at once unless --timeout or --appear says to wait."""
    import portway

    wait = timeout if timeout is not None or appear else 0
    return portway.NamedPipeClient(name, timeout=wait, appear=appear, server_uid=server_uid, **options)


def _text(given: str) -> bytes:
    return given.encode("utf-8", "surrogateescape")


@command.command("send")
@click.argument("name")
@click.argument("texts", metavar="[TEXT ...]", nargs=-1)
@click.option("--lines", is_flag=True, help="Stdin: one message a line; else all of it is one message.")
@click.option("--flush", is_flag=True, help="Return when the server has read everything.")
@timeout()
@APPEAR
@SERVER_UID
@LINES
def send(
    name: str, texts: tuple[str, ...], lines: bool, flush: bool, timeout: float | None, appear: bool,
    server_uid: int | None, as_json: bool,
) -> int:  # fmt: skip
    """Sends each TEXT as a message, or stdin. A byte pipe gets the bytes as they are.

    Exit codes: 3 no such pipe, 7 all its instances are in use, 5 --timeout has passed.
    """
    from ..deadline import Deadline

    if lines and texts:
        raise ConfigurationError("pipe send: --lines is for stdin")
    deadline = Deadline(timeout)
    with _open(name, timeout, appear, server_uid, direction="outbound") as pipe:
        about: dict[str, Any] = {"name": pipe.name, "mode": pipe.mode, "messages": 0, "bytes": 0}
        for data in map(_text, texts) if texts else _stdin(pipe.mode == "byte", lines):
            pipe.send(data, timeout=deadline.remaining())
            about["messages"] += 1
            about["bytes"] += len(data)
        if pipe.mode == "byte":
            about["messages"] = None
        if flush:
            pipe.flush(timeout=deadline.remaining())
        say({**about, "server": pipe.peer.pid}, as_json)
    return 0


def _stdin(stream: bool, lines: bool) -> Any:
    source = sys.stdin.buffer
    if lines:
        return (line.removesuffix(b"\n") for line in source) if not stream else source
    if stream:
        return iter(lambda: os.read(source.fileno(), PIECE), b"")
    return iter([source.read()])


@command.command("call")
@click.argument("name")
@click.argument("text", required=False)
@click.option("--byte", is_flag=True, help="Of a byte pipe: the answer is what comes first, or --size bytes.")
@click.option("--size", type=click.IntRange(min=1), help="At most so much of the answer; with --byte just so much.")
@timeout()
@APPEAR
@SERVER_UID
@HEX
@LINES
def call(
    name: str, text: str | None, byte: bool, size: int | None, timeout: float | None, appear: bool,
    server_uid: int | None, as_hex: bool, as_json: bool,
) -> int:  # fmt: skip
    """Sends TEXT, or stdin, as one message and prints the answer as it is.

    A stream has no ends of answers: with --byte, say how long the answer is. Exit codes as of send.
    """
    from ..deadline import Deadline

    deadline = Deadline(timeout)
    asked = sys.stdin.buffer.read() if text is None else _text(text)
    mode = "byte" if byte else "message"
    with _open(name, timeout, appear, server_uid, direction="duplex", read_mode=mode) as pipe:
        answer = (_ask if byte else _transact)(pipe, asked, size, deadline)
        peer = pipe.peer
    if as_json:
        say({"name": pipe.name, **contents(answer), "server": {"pid": peer.pid, "uid": peer.uid}}, True)
    else:
        put(answer, as_hex, b"\n" if is_terminal() else b"")
    return 0


def _transact(pipe: NamedPipeClient, asked: bytes, size: int | None, deadline: Deadline) -> bytes:
    answer: bytes = pipe.transact(asked, size, timeout=deadline.remaining())
    return answer


def _ask(pipe: NamedPipeClient, asked: bytes, size: int | None, deadline: Deadline) -> bytes:
    pipe.send(asked, timeout=deadline.remaining())
    answer: bytes = pipe.receive(size, timeout=deadline.remaining())
    while size is not None and len(answer) < size:
        answer += pipe.receive(size - len(answer), timeout=deadline.remaining())
    return answer


# -- bench ------------------------------------------------------------------------------------------------------------


@command.command("bench")
@click.argument("name", required=False)
@click.option("--rounds", type=click.IntRange(1, 1000), default=15, show_default=True)
@LINES
def bench(name: str | None, rounds: int, as_json: bool) -> None:
    """Round trips of 32 bytes, 4 KB and 64 KB between two processes: median of the rounds, and the fastest.

    With NAME, against a server that answers with what came, as `portway pipe listen NAME --echo` does.
    """
    from .pipe_bench import figures

    show(list(figures(name, rounds)), ("mode", "size", "median_us", "best_us"), as_json, "figures")
