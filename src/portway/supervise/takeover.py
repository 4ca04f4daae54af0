"""A killed supervisor's sockets and workers come to the next one."""

from __future__ import annotations

from .supervisor import Supervisor

__all__ = ["take_over"]


def take_over(supervisor: Supervisor) -> bool:
    return False
