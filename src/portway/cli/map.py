"""`portway map`: make, read, write and list file mappings."""

from __future__ import annotations

import base64
import sys
from typing import Any

import click

from ..errors import ConfigurationError, InvalidParameter
from .objects import LINES, Holding, Size, entries, facts, grants, hold, is_terminal, say, security, show

__all__ = ["command"]

PIECE = 1 << 20


@click.group("map", help="Shared memory by name: make, read, write and list file mappings.")
def command() -> None:
    pass


@command.command("create", cls=Holding)
@click.argument("name")
@click.argument("size", type=Size(), default=0)
@click.option("--file", "path", help="Map this file; SIZE 0 is all of it, more extends it.")
@click.option("--access", type=click.Choice(["read", "read-write", "copy"]), default="read-write", show_default=True)
@click.option("--exclusive", is_flag=True, help="An error if the name exists; else that one is opened.")
@click.option("--reserve", is_flag=True, help="Sparse: memory is taken when it is written.")
@grants
@click.option("--for", "seconds", type=float, help="Hold it this long; else until Ctrl-C.")
@LINES
def create(
    name: str, size: int, path: str | None, access: Any, exclusive: bool, reserve: bool, everyone: bool,
    uids: tuple[str, ...], groups: tuple[str, ...], seconds: float | None, as_json: bool, cmd: tuple[str, ...],
) -> int:  # fmt: skip
    r"""Makes the mapping NAME of SIZE bytes and holds it, while CMD runs or until Ctrl-C.

    A mapping lives as long as somebody has it open. SIZE as 4096, 64K, 1M; names as Local\x (this user) or Global\x.
    """
    from ..kernel.section import FileMapping

    allowed = security(everyone, uids, groups)
    options: dict[str, Any] = {"access": access, "exclusive": exclusive, "reserve": reserve, "security": allowed}
    if path is not None:
        made = FileMapping.from_file(path, size, name=name, **options)
    elif size:
        made = FileMapping.create(name, size, **options)
    else:
        raise ConfigurationError("map create: give SIZE, or --file")
    with made as mapping:
        say({"name": mapping.name, "size": mapping.size, "existed": mapping.already_exists}, as_json)
        return hold(cmd, seconds)


def _range(size: int, offset: int, length: int | None) -> tuple[int, int]:
    """(offset, end) within the mapping."""
    end = size if length is None else offset + length
    if not 0 <= offset <= end <= size:
        raise InvalidParameter(f"--offset {offset}, {end - offset} bytes: the mapping has {size}")
    return offset, end


@command.command("read")
@click.argument("name")
@click.option("--offset", type=Size(), default=0, show_default=True)
@click.option("--length", type=Size(), help="Bytes [to the end].")
@click.option("--hex", "as_hex", is_flag=True, help="A dump for people; the default on a terminal.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, the bytes in base64.")
def read(name: str, offset: int, length: int | None, as_hex: bool, as_json: bool) -> None:
    """Writes bytes of the mapping NAME to stdout, as they are."""
    from ..kernel.section import FileMapping

    with FileMapping.open(name, "read") as mapping, mapping.view() as view:
        at, end = _range(mapping.size, offset, length)
        if as_json:
            data = base64.b64encode(view.read(at, end - at)).decode()
            say({"name": mapping.name, "size": mapping.size, "offset": at, "data": data}, True)
            return
        for start in range(at, end, PIECE):
            piece = view.read(start, min(PIECE, end - start))
            if as_hex or is_terminal():
                _dump(piece, start)
            else:
                sys.stdout.buffer.write(piece)
        sys.stdout.flush()


def _dump(data: bytes, offset: int) -> None:
    for at in range(0, len(data), 16):
        row = data[at : at + 16]
        text = "".join(chr(one) if 32 <= one < 127 else "." for one in row)
        click.echo(f"{offset + at:08x}  {row.hex(' '):47}  {text}")


@command.command("write")
@click.argument("name")
@click.argument("data", required=False)
@click.option("--offset", type=Size(), default=0, show_default=True)
@click.option("--flush", is_flag=True, help="Return when a mapped file has it on disk.")
@LINES
def write(name: str, data: str | None, offset: int, flush: bool, as_json: bool) -> None:
    """Writes DATA, or stdin, into the mapping NAME. All of it or, if it does not fit, nothing."""
    from ..kernel.section import FileMapping

    with FileMapping.open(name) as mapping, mapping.view() as view:
        # One byte more than fits: enough to know that it does not.
        given = sys.stdin.buffer.read(mapping.size + 1) if data is None else data.encode("utf-8", "surrogateescape")
        at, _ = _range(mapping.size, offset, len(given))
        written = view.write(given, at)
        if flush:
            view.flush()
        say({"name": mapping.name, "offset": at, "written": written}, as_json)


@command.command("ls")
@LINES
def ls(as_json: bool) -> None:
    """The mappings of this user, and the Global ones it may see."""
    rows = [_row(entry) for entry in entries(mappings=True)]
    show(rows, ("name", "size", "owner", "holders", "path"), as_json, "mappings")


def _row(entry: Any) -> dict[str, Any]:
    from ..kernel.section import file_behind

    return {**facts(entry), "size": entry.header.size, "path": file_behind(entry)}
