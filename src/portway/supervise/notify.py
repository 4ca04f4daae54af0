"""systemd's side: sockets passed in (sd_listen_fds(3)), readiness and watchdog passed out (sd_notify(3))."""

from __future__ import annotations

import os
import socket
import time

from ..errors import ConfigurationError
from .loop import Loop

__all__ = ["Notifier", "inherited_sockets"]


def inherited_sockets() -> dict[str, int]:
    """Descriptors meant for this process by LISTEN_PID, under their names and under their places "0", "1", ...

    Takes the variables away: no child may think they are for it. `ConfigurationError` when they make no sense.
    """
    values = {key: os.environ.pop(key, "") for key in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")}
    if values["LISTEN_PID"] != str(os.getpid()):
        return {}
    if not values["LISTEN_FDS"].isdigit() or int(values["LISTEN_FDS"]) > 65536:
        raise ConfigurationError(f"LISTEN_FDS={values['LISTEN_FDS']!r}: not a count of descriptors")
    fds = range(3, 3 + int(values["LISTEN_FDS"]))
    names = values["LISTEN_FDNAMES"].split(":") if values["LISTEN_FDNAMES"] else []
    found: dict[str, int] = {}
    for place, fd in enumerate(fds):
        try:
            os.set_inheritable(fd, False)
        except OSError as error:
            raise ConfigurationError(f"LISTEN_FDS={len(fds)}: descriptor {fd}: {error.strerror}") from error
        found[str(place)] = fd
        if place < len(names):
            found.setdefault(names[place], fd)
    return found


class Notifier:
    """Says to NOTIFY_SOCKET what is to be said, and keeps the watchdog fed while the loop turns. Never waits."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self.path = os.environ.pop("NOTIFY_SOCKET", "")
        period = os.environ.pop("WATCHDOG_USEC", "")
        meant = os.environ.pop("WATCHDOG_PID", "") in ("", str(os.getpid()))
        self.period = int(period) / 1e6 if period.isdigit() and meant else 0.0
        if self.path and self.period:
            self._feed()

    def load(self, path: str, period: float) -> None:
        """As the supervisor before an upgrade had it."""
        self.path, self.period = path, period
        if path and period:
            self._feed()

    def _feed(self) -> None:
        self.say("WATCHDOG=1")
        self._loop.after(self.period / 2, self._feed)

    def say(self, *lines: str) -> None:
        if not self.path:
            return
        path = "\0" + self.path[1:] if self.path.startswith("@") else self.path
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(1)
            try:
                sock.sendto("\n".join(lines).encode(), path)
            except OSError:
                pass  # nobody listens there; the service goes on

    def ready(self, status: str) -> None:
        self.say("READY=1", f"MAINPID={os.getpid()}", f"STATUS={status}")

    def reloading(self) -> None:
        self.say("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}", "STATUS=Starting the next generation")

    def stopping(self) -> None:
        self.say("STOPPING=1", "STATUS=Stopping")
