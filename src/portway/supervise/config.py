"""What a service runs with: portway.toml, PORTWAY_* over it, the command line over both.

`Options` is the checked result. Every refusal is a `ConfigurationError` that names where the value stands, the value
and the rule.
"""

from __future__ import annotations

import dataclasses
import grp
import math
import os
import pwd
import re
import shlex
import signal
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigurationError, InvalidAddress
from .binds import parse_bind, parse_binds

__all__ = ["KEYS", "Options", "check_name", "read_options"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_SIZES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
READY = ("accepting", "notify", "http", "fd", "delay")
OUTPUTS = ("tail", "inherit")


@dataclass(frozen=True, slots=True)
class Options:
    """Checked options of one service. Seconds, bytes, numbers of signals; None is "no limit" or "not set"."""

    name: str
    command: tuple[str, ...] = ()
    bind: tuple[str, ...] = ()
    workers: int = 1
    ready: str = "accepting"
    ready_hold: float = 1.0
    ready_timeout: float = 30.0
    drain: float | None = 30.0
    settle: float = 0.25
    stop_signal: int = int(signal.SIGTERM)
    max_age: float | None = None
    max_rss: int | None = None
    watchdog: float | None = None
    chdir: str | None = None
    env: dict[str, str] = field(default_factory=dict)
    user: str | None = None
    group: str | None = None
    output: str = "tail"
    backlog: int = 4096

    def dump(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def load(cls, data: Mapping[str, Any]) -> Options:
        """The inverse of `dump`; keys this version does not know are left out, so that an upgrade can go back."""
        known = {one.name for one in dataclasses.fields(cls)}
        values: dict[str, Any] = {key: value for key, value in data.items() if key in known}
        for key in ("command", "bind"):
            values[key] = tuple(values.get(key, ()))
        return cls(**values)


def check_name(name: str) -> str:
    if not _NAME.match(name):
        raise ConfigurationError(
            f"name {name!r}: must be 1-64 letters, digits, dots, dashes, underscores, the first a letter or digit"
        )
    return name


def _integer(low: int, high: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        try:
            number = int(value)
            fits = low <= number <= high and not isinstance(value, bool | float)
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return number

    return parse


def seconds(value: Any) -> float:
    """A number, or a number with s, m, h or d."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhd]?)", str(value).strip())
    if isinstance(value, bool) or match is None or not math.isfinite(float(match[1])) or float(match[1]) > 1e9:
        raise ValueError("must be seconds like 30 or 0.25, or 5m, 2h, 1d")
    return float(match[1]) * _UNITS[match[2]]


def _limit(value: Any) -> float | None:
    return None if value == "forever" else seconds(value)


def _period(value: Any) -> float | None:
    return seconds(value) or None


def _size(value: Any) -> int | None:
    match = re.fullmatch(r"([0-9]{1,15})([KMGT]?)B?", str(value).strip().upper())
    if match is None or isinstance(value, bool):
        raise ValueError("must be bytes like 512M or 2G")
    return int(match[1]) * _SIZES[match[2]] or None


def _signal(value: Any) -> int:
    name = str(value).upper().removeprefix("SIG")
    if name.isdigit() and int(name) in set(signal.Signals):
        return int(name)
    try:
        return int(signal.Signals[f"SIG{name}"])
    except KeyError:
        raise ValueError("must be a signal's name like TERM, INT or QUIT") from None


def _ready(value: Any) -> str:
    kind, sign, rest = str(value).partition(":")
    if kind not in READY or (sign and kind not in ("http", "delay")):
        raise ValueError("must be accepting, notify, http:/PATH, fd or delay:SECONDS")
    if kind == "http" and not re.fullmatch(r"/[\x21-\x7e]*", rest):
        raise ValueError("http: wants a path that starts with /, like http:/health")
    return f"delay:{seconds(rest or 1):g}" if kind == "delay" else str(value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError("must be text")
    return value


def _user(value: Any) -> str:
    name = str(value)
    try:
        pwd.getpwuid(int(name)) if name.isdigit() else pwd.getpwnam(name)
    except KeyError:
        if not name.isdigit():
            raise ValueError("no such user on this machine") from None
    return name


def _group(value: Any) -> str:
    name = str(value)
    try:
        if not name.isdigit():
            grp.getgrnam(name)
    except KeyError:
        raise ValueError("no such group on this machine") from None
    return name


def _choice(*names: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if value not in names:
            raise ValueError(f"must be {' or '.join(names)}")
        return str(value)

    return parse


def _words(value: Any) -> tuple[str, ...]:
    words = shlex.split(value) if isinstance(value, str) else value
    if not isinstance(words, list | tuple) or not all(isinstance(one, str) and "\0" not in one for one in words):
        raise ValueError("must be text or a list of texts")
    return tuple(words)


def _binds(value: Any) -> tuple[str, ...]:
    words = _words(value)
    parse_binds(words)
    # What the supervisor holds, and compares after a take-over, must not depend on the folder it was started in.
    return tuple(_absolute(one) for one in words)


def _absolute(text: str) -> str:
    bind = parse_bind(text)
    if bind.kind != "unix":
        return text
    _, comma, options = text.partition(",")
    return f"unix:{bind.path}{comma}{options}"


def _env(value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping):
        pairs = [one.partition("=") for one in _words(value)]
        if any(not sign or not key for key, sign, _ in pairs):
            raise ValueError("must be KEY=VALUE")
        value = {key: text for key, _, text in pairs}
    if any(not re.fullmatch(r"[^=\0]+", str(key)) or "\0" in str(text) for key, text in value.items()):
        raise ValueError("a key is neither empty nor holds =")
    return {str(key): str(text) for key, text in value.items()}


KEYS: dict[str, Callable[[Any], Any]] = {
    "command": _words, "bind": _binds, "workers": _integer(1, 1024), "ready": _ready, "ready_hold": seconds,
    "ready_timeout": seconds, "drain": _limit, "settle": seconds, "stop_signal": _signal, "max_age": _period,
    "max_rss": _size, "watchdog": _period, "chdir": _text, "env": _env, "user": _user, "group": _group,
    "output": _choice(*OUTPUTS), "backlog": _integer(1, 2**31 - 1),
}  # fmt: skip


def _read_file(path: str, name: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            data = tomllib.load(file)
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}", hint="name the file with --config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: {error}") from error
    runs = data.get("run", {})
    table = runs.get(name) if isinstance(runs, dict) else None
    if not isinstance(table, dict):
        known = ", ".join(sorted(runs)) if isinstance(runs, dict) and runs else "none"
        raise ConfigurationError(f"{path}: no table [run.{name}]", hint=f"it has {known}")
    return {key.replace("-", "_"): value for key, value in table.items()}


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    return {key: environ[f"PORTWAY_{key.upper()}"] for key in KEYS if environ.get(f"PORTWAY_{key.upper()}")}


def _check(layer: Mapping[str, Any], where: str, spell: Callable[[str], str]) -> dict[str, Any]:
    checked = {}
    for key, value in layer.items():
        if key not in KEYS:
            raise ConfigurationError(f"{where}{spell(key)}: no such option", hint=f"options are {', '.join(KEYS)}")
        try:
            checked[key] = KEYS[key](value)
        except InvalidAddress as error:
            raise ConfigurationError(f"{where}{spell(key)}: {error}") from error
        except ValueError as error:
            raise ConfigurationError(f"{where}{spell(key)}={value!r}: {error}") from error
    return checked


def read_options(
    name: str, given: Mapping[str, Any], *, file: str | None = None, environ: Mapping[str, str] | None = None
) -> Options:
    """The options of service `name`. `given` is the command line; `file` the portway.toml to read, None for none."""
    environ = os.environ if environ is None else environ
    merged: dict[str, Any] = {}
    if file is not None:
        merged |= _check(_read_file(file, name), f"{file} [run.{name}] ", str)
    merged |= _check(_from_environment(environ), "", lambda key: f"PORTWAY_{key.upper()}")
    merged |= _check(given, "", lambda key: f"--{key.replace('_', '-')}")
    options = Options(check_name(name), **merged)
    if not options.command:
        raise ConfigurationError(f"{name}: no command", hint="give it after --, or as command = [...] in portway.toml")
    _together(options)
    return options


def _together(options: Options) -> None:
    """Rules between options."""
    kinds = {parse_bind(one).kind for one in options.bind}
    if options.ready.startswith("http") and not kinds & {"tcp", "unix"}:
        raise ConfigurationError(
            f"ready={options.ready}: needs a TCP or unix: bind of our own",
            hint="a socket that generations share cannot be probed in one of them; use --ready notify",
        )
    if (options.user or options.group) and os.geteuid() != 0:
        raise ConfigurationError("--user and --group need root", hint="start the supervisor as that user instead")
    for name in options.command:
        for found in re.findall(r"\{(fd[^{}]*)\}", name):
            check_placeholder(found, options.bind)


def check_placeholder(word: str, binds: tuple[str, ...]) -> int:
    """The place of the bind that ``{fd}``, ``{fd1}`` or ``{fdNAME}`` means (text without the braces)."""
    names = [one.name for one in parse_binds(binds)]
    what = word[2:]
    if what == "" and names:
        return 0
    if what.isdigit() and int(what) < len(names):
        return int(what)
    if what in names:
        return names.index(what)
    known = ", ".join(names) or "none: give --bind"
    raise ConfigurationError(f"{{{word}}} in the command: no such bind", hint=f"binds are {known}")
