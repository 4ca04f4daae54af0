"""The only module that knows whether native code runs.

``PORTWAY_IMPL=c`` or ``python`` forces; a forced choice that fails is an error. `name` says what runs.
"""

from __future__ import annotations

import os
from importlib import import_module
from types import ModuleType

__all__ = ["handoff", "name"]

handoff: ModuleType
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
