"""What the commands share: exit codes, errors, times."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable
from typing import Any

import click

from ..errors import (
    CommandNotFound,
    ConfigurationError,
    GenerationFailed,
    InvalidAddress,
    InvalidParameter,
    NameInUse,
    NotRunning,
    ObjectNotFound,
    OperationTimeout,
    PortwayError,
)

__all__ = ["JSON", "NAME", "exit_code", "print_json", "remark", "report", "timeout"]

EXIT = {  # 0 done, 1 any other error, 126/127 see below
    ConfigurationError: 2, InvalidAddress: 2, InvalidParameter: 2, NotRunning: 3, ObjectNotFound: 3,
    GenerationFailed: 4, OperationTimeout: 5, NameInUse: 6,
}  # fmt: skip


def exit_code(error: PortwayError) -> int:
    if isinstance(error, CommandNotFound):
        return 126 if error.errno == errno.EACCES else 127
    return next((code for kind, code in EXIT.items() if isinstance(error, kind)), 1)


def report(error: PortwayError, as_json: bool) -> int:
    """One line on stderr, the failed generation's last lines under it."""
    print(f"portway: {error}", file=sys.stderr)
    for note in getattr(error, "__notes__", ()):
        for line in note.splitlines():
            print(f"  | {line}", file=sys.stderr)
    if as_json:
        from ..supervise.control import error_record

        print_json({"error": error_record(error) | {"exit": exit_code(error)}})
    return exit_code(error)


def print_json(value: Any) -> None:
    print(json.dumps(value), flush=True)


def remark(text: str) -> None:
    print(f"portway: {text}", file=sys.stderr, flush=True)


def age(seconds: float) -> str:
    """Two units at most: 3d 4h, 5m 6s."""
    whole = int(seconds)
    parts = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "m"), (whole % 60, "s")]
    shown = [f"{count}{unit}" for count, unit in parts if count]
    return " ".join(shown[:2]) or "0s"


class Seconds(click.ParamType[float | None]):
    name = "SECONDS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | None:
        from ..supervise.config import seconds

        try:
            return seconds(value)
        except ValueError as error:
            self.fail(f"{value!r} {error}", param, ctx)


NAME = click.argument("name")
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")


def timeout(default: float | None = None) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """``--timeout``: how long the command waits; what it asked for goes on after that. Exit code 5."""
    shown = "no limit" if default is None else f"{default:g}"
    return click.option("--timeout", type=Seconds(), default=default, help=f"Seconds to wait [{shown}].")
