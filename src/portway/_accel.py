"""The only module that knows whether native code runs.

``PORTWAY_IMPL=c`` or ``python`` forces; a forced choice that fails is an error. `name` says what runs.
"""

from __future__ import annotations

import os
from types import ModuleType

__all__ = ["handoff", "name"]

name: str
handoff: ModuleType

_wanted = os.environ.get("PORTWAY_IMPL", "")
if _wanted not in ("", "c", "python"):
    raise ImportError(f"PORTWAY_IMPL={_wanted!r}: give c, python, or nothing")
if _wanted != "python":
    try:
        from ._native import handoff as handoff

        name = "c"
    except ImportError:
        if _wanted == "c":
            raise
        _wanted = "python"
if _wanted == "python":
    from . import _handoff_python as handoff

    name = "python"
