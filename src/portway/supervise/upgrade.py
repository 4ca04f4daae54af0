"""The supervisor replaces itself."""

from __future__ import annotations

from .supervisor import Supervisor

__all__ = ["install"]


def install(supervisor: Supervisor) -> None:
    pass
