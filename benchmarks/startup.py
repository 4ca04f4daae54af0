"""``startup``: what portway costs before it does anything.

startup.import  ms  ``python -c "import portway"`` less the ``python -c pass`` of the same round (contender python)
startup.help    ms  ``portway --help``, the whole process
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from .harness import Failed, Figures, Options, remark, rounds_of

__all__ = ["CONTENDERS", "PINNABLE", "WORKS", "run"]

CONTENDERS = ("portway", "python")
WORKS = ("startup.import", "startup.help")
PINNABLE = True


def _ms(*command: str) -> float:
    began = time.perf_counter_ns()
    done = subprocess.run(command, capture_output=True, text=True)
    took = (time.perf_counter_ns() - began) / 1e6
    if done.returncode:
        raise Failed(f"{' '.join(command[1:])}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return took


def _help_command() -> tuple[str, ...]:
    script = Path(sys.executable).with_name("portway")
    return (str(script), "--help") if script.exists() else (sys.executable, "-m", "portway", "--help")


def run(options: Options, figures: Figures) -> None:
    python, broken = sys.executable, set()
    for number in range(rounds_of(options, 40) + 1):
        bare = _ms(python, "-c", "pass")
        for work, command in (("startup.import", (python, "-c", "import portway")), ("startup.help", _help_command())):
            if not options.wants_work(work) or work in broken or not options.wants("portway"):
                continue
            try:
                took = _ms(*command)
            except Failed as error:
                remark(f"{work} is left out: {error}")
                broken.add(work)
                continue
            if number:  # the first fills the caches: .pyc files, pages
                figures.add(work, "portway", "ms", took - bare if work == "startup.import" else took)
        if number and options.wants("python") and options.wants_work("startup.import"):
            figures.add("startup.import", "python", "ms", bare)
