"""``portway asgi``: `portway run` with the worker that moves HTTP connections."""

from __future__ import annotations

import os
import re
import sys
from typing import Any

import click
from click.core import ParameterSource

from .common import JSON
from .run import command as run_command
from .run import service_options

__all__ = ["command"]

DEFAULTS = {"bind": ("127.0.0.1:8000",), "ready": "notify"}


@click.command()
@click.argument("app")
@click.option("--name", "-n", metavar="NAME", help="What reload, status and stop call the service [APP's module].")
@click.option("--check", is_flag=True, help="Say what would run, and whether it could; start nothing.")
@service_options
@JSON
@click.pass_context
def command(ctx: click.Context, /, app: str, name: str | None, check: bool, as_json: bool, **values: Any) -> int:
    """Serve an ASGI application whose connections move to the new process when it is reloaded.

    APP is MODULE:ATTRIBUTE, as uvicorn takes it. This is `portway run` with a worker built on uvicorn: `portway reload
    NAME` starts the new code, requests that run finish in the old process, and every kept connection moves, so that no
    client sees the reload. The address is --bind [127.0.0.1:8000]; uvicorn's other options go to the worker.

    \b
        portway asgi --bind :8000 --workers 2 app:app
        portway reload app
    """
    from ..supervise.asgi.__main__ import protocol_class, require_uvicorn

    require_uvicorn()
    protocol_class(values.get("http") or "auto")
    words = (sys.executable, "-m", "portway.supervise.asgi", app, *_as_words(ctx))
    service = {key: value for key, value in values.items() if key in SERVICE}
    for key, value in DEFAULTS.items():
        if not service[key] and f"PORTWAY_{key.upper()}" not in os.environ:
            service[key] = value
    assert run_command.callback is not None
    code: int = run_command.callback(
        words=words, name=name or service_name(app), config=None, check=check, as_json=as_json, **service
    )
    return code


def service_name(app: str) -> str:
    """``shop.main:app`` is ``main`` unless it is named."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", app.partition(":")[0].rpartition(".")[2]).strip("-_") or "asgi"


def _as_words(ctx: click.Context) -> list[str]:
    """The command line that gives the worker what was given here; UVICORN_* variables it reads itself."""
    words: list[str] = []
    for one in WORKER:
        name = one.name or ""
        if ctx.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value = ctx.params[name]
        if isinstance(one, click.Option) and one.is_flag:
            words.append(one.opts[0] if value else one.secondary_opts[0])
        else:
            for single in value if one.multiple else [value]:
                words += [one.opts[-1], str(single)]
    return words


def _uvicorn_options() -> list[click.Option]:
    """None when uvicorn is missing: then --help still works, and running says what to install."""
    from ..supervise.asgi.__main__ import worker_options

    try:
        return [one for one in worker_options() if isinstance(one, click.Option)]
    except ImportError:
        return []


_OURS = {one.name for one in command.params}
SERVICE = _OURS - {"app", "name", "check", "as_json"}
WORKER = [one for one in _uvicorn_options() if one.name not in _OURS]
command.params += WORKER

for _option in command.params:
    if _option.name == "ready" and isinstance(_option, click.Option) and _option.help:
        _option.help = _option.help.replace("[accepting]", "[notify]")
