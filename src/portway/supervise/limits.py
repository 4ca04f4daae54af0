"""What makes a supervisor replace what still runs: age, size, a watchdog that was not fed."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

from . import proc
from .generation import Generation, Phase

if TYPE_CHECKING:
    from .supervisor import Supervisor

__all__ = ["watch_limits"]

_CHECK = 5.0  # seconds between two looks
_PAUSE = 60.0  # seconds before a replacement that failed is tried again


def watch_limits(supervisor: Supervisor) -> None:
    """Looks now, and again every few seconds."""
    periods = [
        one.watchdog for one in (supervisor.options, *(g.options for g in supervisor.generations)) if one.watchdog
    ]
    supervisor.loop.after(min([_CHECK, *(period / 2 for period in periods)]), lambda: watch_limits(supervisor))
    now = time.monotonic()
    for generation in supervisor.generations:
        if generation.phase is Phase.SERVING and generation.options.watchdog:
            _watchdog(supervisor, generation, generation.options.watchdog, now)
    serving = supervisor.serving
    if serving is None or supervisor.rising is not None or supervisor.stopping or now < supervisor.quiet_until:
        return
    why = _worn(serving, now)
    if why:
        supervisor.say(f"generation {serving.number} {why}: replacing it")
        supervisor.quiet_until = now + _PAUSE
        supervisor.reload(None)


def _watchdog(supervisor: Supervisor, generation: Generation, period: float, now: float) -> None:
    for worker in generation.alive:
        # One that starts again has as long for its first beat as a generation has to become ready.
        limit = period if worker.beats else period + generation.options.ready_timeout
        if now - worker.last_beat > limit:
            supervisor.say(f"worker {worker.index} (pid {worker.pid}) missed its watchdog: killed")
            worker.signal(signal.SIGKILL, group=True)


def _worn(generation: Generation, now: float) -> str | None:
    options = generation.options
    if options.max_age is not None and now - generation.served > options.max_age:
        return f"is older than {options.max_age:g} s"
    if options.max_rss is not None:
        processes = proc.table()
        for worker in generation.alive:
            size = proc.rss(proc.members(worker.pid, processes))
            if size > options.max_rss:
                return f"worker {worker.index} holds {size >> 20} MiB, more than {options.max_rss >> 20} MiB"
    return None
