"""``portway run``."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from ..errors import ConfigurationError
from .common import JSON, print_json, remark

__all__ = ["command", "service_options"]

_OPTIONS: list[tuple[list[str], dict[str, Any]]] = [
    (["--bind", "-b"], {"multiple": True, "metavar": "ADDRESS", "help":
        "HOST:PORT, [V6]:PORT, :PORT, unix:PATH[,mode=0660][,owner=U:G], udp:HOST:PORT, fd:NAME. May repeat."}),
    (["--workers", "-w"], {"metavar": "N", "help": "Processes of the command [1]."}),
    (["--ready"], {"metavar": "SIGN", "help": "accepting, notify, http:/PATH, fd or delay:SECONDS [accepting]."}),
    (["--ready-hold"], {"metavar": "SECONDS", "help": "How long all workers must live after that sign [1]."}),
    (["--ready-timeout"], {"metavar": "SECONDS", "help": "When a generation without the sign has failed [30]."}),
    (["--drain"], {"metavar": "SECONDS", "help": "What an old generation gets to finish, or forever [30]."}),
    (["--settle"], {"metavar": "SECONDS", "help": "How long it still accepts what is queued [0.25]."}),
    (["--stop-signal"], {"metavar": "SIGNAL", "help": "Asks a worker to finish [TERM]."}),
    (["--max-age"], {"metavar": "TIME", "help": "Replace a generation this old, like 12h."}),
    (["--max-rss"], {"metavar": "SIZE", "help": "Replace a generation of which a worker holds more, like 512M."}),
    (["--watchdog"], {"metavar": "SECONDS", "help": "Kill a worker that sends no WATCHDOG=1 for so long."}),
    (["--chdir"], {"metavar": "PATH", "help": "Where the command runs; resolved anew for each generation."}),
    (["--env"], {"multiple": True, "metavar": "KEY=VALUE", "help": "For the workers. May repeat."}),
    (["--user"], {"metavar": "USER", "help": "Workers run as this user (the supervisor is root)."}),
    (["--group"], {"metavar": "GROUP", "help": "Workers run as this group."}),
    (["--output"], {"metavar": "WAY", "help": "tail: through files, with a prefix; inherit: our own stdout [tail]."}),
    (["--backlog"], {"metavar": "N", "help": "Connections the kernel queues for us [4096]."}),
]  # fmt: skip


def service_options(function: Any) -> Any:
    """The options of a service, as ``portway run`` and ``portway asgi`` take them; all are given on as text."""
    for names, settings in reversed(_OPTIONS):
        function = click.option(*names, **settings)(function)
    return function


def given_options(values: dict[str, Any]) -> dict[str, Any]:
    """What was on the command line, and nothing else."""
    given = {key: value for key, value in values.items() if value not in (None, ())}
    for key in ("bind", "env"):
        if key in given:
            given[key] = list(given[key])
    return given


@click.command(context_settings={"ignore_unknown_options": False})
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[NAME] [-- COMMAND...]")
@click.option("--name", "-n", "name", metavar="NAME", help="What reload, status and stop call the service.")
@click.option("--config", metavar="FILE", help="Where [run.NAME] stands [portway.toml].")
@click.option("--check", is_flag=True, help="Say what would run, and whether it could; start nothing.")
@service_options
@JSON
def command(
    words: tuple[str, ...], name: str | None, config: str | None, check: bool, as_json: bool, **values: Any
) -> int:
    """Supervise a service: own its sockets while its code comes and goes.

    With a command after --, that is the service. Without one, [run.NAME] of portway.toml says what it is; PORTWAY_*
    variables go over the file, options over both. {fd} in the command becomes the socket's descriptor; LISTEN_FDS is
    set as systemd does. SIGHUP reloads, SIGTERM stops.

    \b
        portway run --name web --bind :8000 -- uvicorn --fd {fd} app:app
        portway run web
    """
    given = given_options(values)
    file = None
    if name is None:
        if not words or _all_after_dashes(words):
            raise click.UsageError("give --name NAME, or the NAME of a table [run.NAME] in portway.toml")
        name = words[0]
        words = words[1:]
    if words:
        given["command"] = list(words)
    if not words or config is not None:
        file = os.path.abspath(config or "portway.toml")
        if config is None and not os.path.exists(file):
            raise ConfigurationError(
                f"{name}: no command, and no portway.toml here", hint="give the command after --, or --config FILE"
            )
    if check:
        return _check(name, given, file, as_json)
    from ..supervise.run import run

    code = run(name, given, file)
    if as_json:
        print_json({"name": name, "exit": code})
    return code


def _all_after_dashes(words: tuple[str, ...]) -> bool:
    return "--" in sys.argv and tuple(sys.argv[sys.argv.index("--") + 1 :]) == words


def _check(name: str, given: dict[str, Any], file: str | None, as_json: bool) -> int:
    import shutil

    from ..errors import CommandNotFound
    from ..supervise.binds import parse_binds
    from ..supervise.config import read_options
    from ..supervise.spawn import identity

    options = read_options(name, given, file=file)
    if options.chdir is not None and not os.path.isdir(options.chdir):
        raise ConfigurationError(f"chdir={options.chdir!r}: no such folder")
    identity(options.user, options.group)
    program = options.command[0]
    path = options.env.get("PATH", os.environ.get("PATH"))
    inside = os.path.join(options.chdir or ".", program) if "/" in program else program
    if shutil.which(inside, path=path) is None:
        raise CommandNotFound(f"{program!r}: no such command", hint="check the path, PATH and the file's mode")
    if as_json:
        print_json(options.dump())
    else:
        for key, value in options.dump().items():
            print(f"{key} = {value!r}")
        remark(f"{name}: {len(parse_binds(options.bind))} sockets, ok")
    return 0
