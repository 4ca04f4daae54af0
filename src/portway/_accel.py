"""The only module that knows whether native code runs.

``PORTWAY_IMPL=c`` or ``python`` forces; a forced choice that fails is an error. `name` says what runs.
"""

from __future__ import annotations

import os
from importlib import import_module
from types import ModuleType

__all__ = ["aio", "dotnet", "handoff", "identity", "name", "pipe", "sync", "view", "wake"]

handoff: ModuleType
# Loaded when first used; futex words and guarded memory have no twin in Python, whatever PORTWAY_IMPL says.
aio: ModuleType
dotnet: ModuleType
identity: ModuleType
pipe: ModuleType
sync: ModuleType
view: ModuleType
wake: ModuleType
name: str

_wanted = os.environ.get("PORTWAY_IMPL", "")
if _wanted not in ("", "c", "python"):
    raise ImportError(f"PORTWAY_IMPL={_wanted!r}: give c, python, or nothing")
try:
    if _wanted == "python":
        raise ImportError("PORTWAY_IMPL=python")
    handoff, name = import_module("portway._native.handoff"), "c"
except ImportError:
    if _wanted == "c":
        raise
    handoff, name = import_module("portway._handoff_python"), "python"


def __getattr__(wanted: str) -> ModuleType:
    if wanted not in ("aio", "dotnet", "identity", "pipe", "sync", "view", "wake"):
        raise AttributeError(f"module 'portway._accel' has no attribute {wanted!r}")
    # the build with crash points is for tests: PORTWAY_CRASH_POINTS=1 builds it and chooses it
    crashing = wanted == "sync" and os.environ.get("PORTWAY_CRASH_POINTS")
    module = "sync_crash" if crashing else wanted
    try:
        loaded = import_module(f"portway._native.{module}")
    except ImportError as error:
        from .errors import MissingExtra

        raise MissingExtra(
            f"kernel objects need the native module portway._native.{module}: {error}",
            hint="install portway with a C compiler present, or from a wheel",
        ) from error
    globals()[wanted] = loaded
    return loaded
