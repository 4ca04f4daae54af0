"""Compiles sync.c and empty.pyx into benchmarks/bin when they are newer than what lies there."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..harness import Failed

__all__ = ["empty", "program"]

HERE = Path(__file__).parent
BIN = HERE.parent / "bin"


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise Failed(f"no {command[0]!r} here") from None
    except subprocess.CalledProcessError as error:
        raise Failed(f"{command[0]} failed:\n{error.stderr}") from None


def _fresh(target: Path, source: Path) -> bool:
    BIN.mkdir(exist_ok=True)
    return target.exists() and target.stat().st_mtime > source.stat().st_mtime


def program() -> Path:
    target, source = BIN / "sync", HERE / "sync.c"
    if not _fresh(target, source):
        made = target.with_name(f"sync.{os.getpid()}")
        _run(os.environ.get("CC", "cc"), "-O2", "-Wall", "-Wextra", "-pthread", "-o", str(made), str(source))
        made.rename(target)
    return target


def empty() -> Any:
    """An object of the class in empty.pyx."""
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    target, source = BIN / f"empty{suffix}", HERE / "empty.pyx"
    if not _fresh(target, source):
        copy = BIN / "empty.pyx"
        copy.write_text(source.read_text())
        _run(sys.executable, "-m", "Cython.Build.Cythonize", "-3", "-i", "-q", str(copy))
    spec = importlib.util.spec_from_file_location("empty", target)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Empty()
