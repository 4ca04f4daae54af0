"""Fixtures of the kernel objects' tests; see `sync_world`."""

from sync_world import root, start

__all__ = ["root", "start"]
