"""How an error of ours ends a command: one line on stderr, and an exit code for scripts."""

from __future__ import annotations

import errno
import json
import sys

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
    PipeBusy,
    PipeNotFound,
    PortwayError,
)

__all__ = ["EXIT", "exit_code", "report"]

EXIT = {  # 0 done, 1 any other error, 126/127 see below
    ConfigurationError: 2, InvalidAddress: 2, InvalidParameter: 2, NotRunning: 3, ObjectNotFound: 3,
    PipeNotFound: 3, GenerationFailed: 4, OperationTimeout: 5, NameInUse: 6, PipeBusy: 7,
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
        from .control import error_record

        print(json.dumps({"error": error_record(error) | {"exit": exit_code(error)}}), flush=True)
    return exit_code(error)
