"""The load generator: load.c says what it does. `build` compiles it, `Load` runs it beside a reload."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..harness import Failed

__all__ = ["Load", "build"]

HERE = Path(__file__).parent
PROGRAM = HERE.parent / "bin" / "load"


def build() -> Path:
    """The program, compiled (``$CC``, else cc) if a source is newer than it."""
    sources = sorted(HERE.glob("*.c"))
    newest = max(path.stat().st_mtime for path in HERE.glob("*.[ch]"))
    if PROGRAM.exists() and PROGRAM.stat().st_mtime > newest:
        return PROGRAM
    PROGRAM.parent.mkdir(exist_ok=True)
    fresh = PROGRAM.with_name(f"load.{os.getpid()}")
    command = [os.environ.get("CC", "cc"), "-O2", "-Wall", "-Wextra", "-o", str(fresh), *map(str, sources)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise Failed(f"no C compiler {command[0]!r}; install one, or name it in CC") from None
    except subprocess.CalledProcessError as error:
        raise Failed(f"{command[0]} failed on the load generator:\n{error.stderr}") from None
    fresh.rename(PROGRAM)
    return PROGRAM


class Load:
    """A running generator against 127.0.0.1:`port`. ``with Load(...) as load: ...; figures = load.end()``."""

    def __init__(self, port: int, **options: object) -> None:
        arguments = [text for key, value in options.items() for text in (f"--{key.replace('_', '-')}", str(value))]
        self._process = subprocess.Popen(
            [str(build()), "--port", str(port), "--until-eof", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def end(self, timeout: float) -> dict[str, Any]:
        """Lets it stop once its ``--seconds`` are over and the last answer came or timed out; its report."""
        try:
            out, _ = self._process.communicate(timeout=timeout)  # closes its standard input: that is the sign
        except subprocess.TimeoutExpired:
            raise Failed(f"the load generator did not end within {timeout:g} s") from None
        if self._process.returncode:
            raise Failed(f"the load generator ended with {self._process.returncode}")
        report: dict[str, Any] = json.loads(out)
        return report

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()
