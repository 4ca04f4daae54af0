"""Where a service's options come from."""

from __future__ import annotations

import os
from typing import Any

from .config import Options, read_options

__all__ = ["Plan"]


class Plan:
    """Where the options come from, so that a reload can read them again."""

    def __init__(
        self, name: str, given: dict[str, Any], file: str | None, environ: dict[str, str] | None = None
    ) -> None:
        self.name = name
        self.given = given
        self.file = file
        self.environ = {
            k: v for k, v in (os.environ if environ is None else environ).items() if k.startswith("PORTWAY_")
        }

    def read(self) -> Options:
        return read_options(self.name, self.given, file=self.file, environ=self.environ)

    def dump(self) -> dict[str, Any]:
        return {"name": self.name, "given": self.given, "file": self.file, "environ": self.environ}
