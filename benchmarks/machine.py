"""What the figures were measured on, as text for docs/performance.md."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["describe", "versions"]

PACKAGES = ("portway", "uvicorn", "gunicorn", "hypercorn", "h11", "httptools", "uvloop")


def versions() -> dict[str, str]:
    """Python and every package that takes part; "not installed" where it is missing."""
    found = {"python": f"{platform.python_implementation()} {platform.python_version()}"}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def describe() -> str:
    """A Markdown list: kernel, processor, cores, memory, C compiler, versions, load."""
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    lines = {
        "kernel": f"{platform.system()} {platform.release()}",
        "processor": _first("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}",
        "memory": _first("/proc/meminfo", "MemTotal") or "unknown",
        "C compiler": _compiler(),
        "load average before": load,
        **versions(),
    }
    return "\n".join(f"- {key}: {value}" for key, value in lines.items())


def _first(path: str, key: str) -> str | None:
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None


def _compiler() -> str:
    found = shutil.which(os.environ.get("CC", "cc"))
    if found is None:
        return "none"
    return subprocess.run([found, "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
