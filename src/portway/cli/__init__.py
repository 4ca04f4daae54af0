"""The commands. To add a verb: one line in `portway.__main__.VERBS`, one module here that exposes ``command``."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import click

__all__ = ["group"]


class _Group(click.Group):
    """Knows its verbs by a table; imports the one that is asked for."""

    verbs: dict[str, str]

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [verb for verb in self.verbs if find_spec(f"portway.cli.{verb}") is not None]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        found: click.Command = import_module(f"portway.cli.{cmd_name}").command
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(verb, self.verbs[verb]) for verb in self.list_commands(ctx)])


def _version(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if value and not ctx.resilient_parsing:
        from .. import __version__

        click.echo(f"portway {__version__}")
        ctx.exit()


def group(verbs: dict[str, str]) -> click.Group:
    found = _Group(
        "portway",
        help="Sockets that change hands, and restarts that lose nothing. Data on stdout, remarks on stderr.",
        params=[click.Option(["--version"], is_flag=True, expose_value=False, is_eager=True, callback=_version,
                             help="Show the version and exit.")],
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    )  # fmt: skip
    found.verbs = verbs
    return found
