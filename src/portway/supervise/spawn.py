"""Starts one process of a service: fork, set the scene, exec, and say what went wrong before the command ran."""

from __future__ import annotations

import errno
import fcntl
import grp
import json
import os
import pwd
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from ..errors import CommandNotFound, ConfigurationError, SuperviseError

__all__ = ["Identity", "Launch", "clean_environment", "close_on_exec", "identity", "launch"]

_FIRST = 3  # sd_listen_fds(3): SD_LISTEN_FDS_START
_SCRUBBED = (
    "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "LISTEN_PIDFDID", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID",
    "MAINPID", "PORTWAY_NAME", "PORTWAY_GENERATION", "PORTWAY_WORKER", "PORTWAY_INBOX", "PORTWAY_CONTROL",
    "PORTWAY_CONTROL_PEER", "PORTWAY_READY_FD",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a worker runs as; empty for who the supervisor is."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str | None
    name: str | None


@dataclass(slots=True)
class Launch:
    """One process to be. ``listen`` become descriptors 3, 4, ...; ``extra`` follow, their numbers stand under their key
    in the environment. The caller keeps and closes its own copies of all of them."""

    command: Sequence[str]
    listen: Sequence[int] = ()
    names: Sequence[str] = ()
    extra: Mapping[str, int] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=dict)
    chdir: str | None = None
    identity: Identity | None = None
    stdout: int | None = None


def identity(user: str | None, group: str | None) -> Identity | None:
    """Looked up before the fork: the child must not read files of the user database with half its rights gone."""
    if user is None and group is None:
        return None
    try:
        entry = None if user is None else pwd.getpwuid(int(user)) if user.isdigit() else pwd.getpwnam(user)
    except KeyError:
        entry = None
    if user is not None and entry is None and not user.isdigit():
        raise ConfigurationError(f"user={user!r}: no such user on this machine")
    uid = os.getuid() if user is None else entry.pw_uid if entry else int(user)
    gid = entry.pw_gid if entry else uid if user else os.getgid()
    if group is not None:
        try:
            gid = int(group) if group.isdigit() else grp.getgrnam(group).gr_gid
        except KeyError:
            raise ConfigurationError(f"group={group!r}: no such group on this machine") from None
    groups = tuple(os.getgrouplist(entry.pw_name, gid)) if entry else (gid,)
    return Identity(uid, gid, groups, entry.pw_dir if entry else None, entry.pw_name if entry else None)


def launch(what: Launch) -> int:
    """The pid of the process, which leads its own process group and has begun to run the command.

    `CommandNotFound` (``errno`` ENOENT when it is not there, EACCES when it cannot be executed) or `SuperviseError` for
    a step before it; nothing is left running then.
    """
    report, wire = os.pipe()
    # Until the child has dropped our handlers, a signal meant for it would wake this process through the wakeup
    # descriptor that both share.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            _child(what, wire)
    except OSError as error:
        os.close(report)
        why = f"cannot start a process: {error.strerror}"
        raise SuperviseError(why, hint="raise RLIMIT_NPROC or free memory") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(wire)
    with open(report, "rb") as pipe:
        said = pipe.read()
    if said:
        os.waitpid(pid, 0)
        _raise(what, json.loads(said))
    return pid


def _raise(what: Launch, said: dict[str, object]) -> NoReturn:
    step, code, text = str(said["step"]), int(str(said["errno"])), str(said["text"])
    if step != "exec":
        raise SuperviseError(f"cannot start {what.command[0]!r}: {step}: {text}")
    missing = code in (errno.ENOENT, errno.ENOTDIR)
    why = "no such command (or its #! interpreter is missing)" if missing else f"cannot be executed: {text}"
    where = f" in {what.chdir}" if what.chdir else ""
    failure = CommandNotFound(f"{what.command[0]!r}{where}: {why}", hint="check the path, PATH and the file's mode")
    failure.errno = errno.ENOENT if missing else errno.EACCES
    raise failure


def _child(what: Launch, wire: int) -> NoReturn:
    step = "setup"
    try:
        os.setpgid(0, 0)
        wire = fcntl.fcntl(wire, fcntl.F_DUPFD_CLOEXEC, 200)
        environ = _place(what)
        _signals()
        if what.chdir is not None:
            step = f"chdir {what.chdir}"
            os.chdir(what.chdir)
        if what.identity is not None:
            step = f"user {what.identity.name or what.identity.uid}"
            _become(what.identity, environ)
        step = "exec"
        command = [_fill(word, environ) for word in what.command]
        os.execvpe(command[0], command, environ)
    except BaseException as error:
        code = getattr(error, "errno", None) or errno.EINVAL
        text = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        os.write(wire, json.dumps({"step": step, "errno": code, "text": text}).encode())
    finally:
        os._exit(127)


def _place(what: Launch) -> dict[str, str]:
    """Descriptors to their numbers; the environment that tells them."""
    environ = dict(what.environ)
    fds = [*what.listen, *what.extra.values()]
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 200) for fd in fds]  # out of the way of the numbers to fill
    for place, fd in enumerate(high):
        os.dup2(fd, _FIRST + place, inheritable=True)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0, inheritable=True)
    if what.stdout is not None:
        os.dup2(what.stdout, 1, inheritable=True)
        os.dup2(what.stdout, 2, inheritable=True)
    if what.listen:
        environ |= {"LISTEN_FDS": str(len(what.listen)), "LISTEN_PID": str(os.getpid())}
        environ["LISTEN_FDNAMES"] = ":".join(what.names)
    for place, key in enumerate(what.extra):
        environ[key] = str(_FIRST + len(what.listen) + place)
    if "WATCHDOG_USEC" in environ:
        environ["WATCHDOG_PID"] = str(os.getpid())
    return environ


def clean_environment() -> dict[str, str]:
    """What workers inherit: ours, without what was meant for this process alone."""
    return {key: value for key, value in os.environ.items() if key not in _SCRUBBED}


def _fill(word: str, environ: Mapping[str, str]) -> str:
    """``{ready_fd}`` is known only now; the other places were filled in by the generation."""
    return word.replace("{ready_fd}", environ.get("PORTWAY_READY_FD", "{ready_fd}"))


def _signals() -> None:
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGCHLD,
                   signal.SIGUSR1, signal.SIGUSR2):  # fmt: skip
        signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _become(who: Identity, environ: dict[str, str]) -> None:
    os.setgroups(who.groups)
    os.setgid(who.gid)
    os.setuid(who.uid)
    environ |= {key: value for key, value in (("HOME", who.home), ("USER", who.name), ("LOGNAME", who.name)) if value}


def close_on_exec() -> None:
    """What this process inherited above stderr stays here: no worker gets it by accident."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            try:
                os.set_inheritable(int(name), False)
            except OSError:
                pass  # the descriptor of the listing itself
