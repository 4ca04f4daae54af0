"""``portway VERB``: one module of `portway.cli` a verb, imported when chosen."""

from __future__ import annotations

import sys

from .errors import PortwayError

__all__ = ["VERBS", "main"]

VERBS = {
    "run": "Supervise a service: own its sockets while its code comes and goes.",
    "reload": "Start the next generation of a service and let it take over.",
    "status": "What runs: generations, processes, sockets, connections.",
    "logs": "What a service printed.",
    "stop": "Drain a service and end it.",
    "upgrade": "Replace a supervisor by another portway, in place.",
    "asgi": "Serve an ASGI application whose connections move when it is reloaded.",
    "handoff": "Move sockets between processes by hand.",
    "map": "Shared memory by name: make, read, write, list.",
    "sync": "Mutexes, semaphores, events, timers: list, make, wait, signal.",
    "pipe": "Named pipes, .NET's too: list, serve, send, call, measure.",
    "tour": "Show what portway does, with real processes.",
    "doctor": "What works on this machine.",
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command line; the exit code. Errors of ours are one line on stderr, and a record on stdout with --json."""
    import click

    from .cli import group

    arguments = sys.argv[1:] if argv is None else argv
    try:
        code = group(VERBS).main(arguments, prog_name="portway", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except PortwayError as error:
        from .cli.common import report

        return report(error, "--json" in arguments[: arguments.index("--") if "--" in arguments else None])
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:
        sys.stdout = None  # nothing left to flush to
        return 1


if __name__ == "__main__":
    sys.exit(main())
