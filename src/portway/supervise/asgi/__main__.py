"""One worker: ``python -m portway.supervise.asgi APP [uvicorn's options]``, with the listening sockets inherited.

uvicorn's own options are taken, except those that `portway run` has in its hands: addresses, workers, reloading.
"""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any

from ...errors import ConfigurationError, MissingExtra, PortwayError

if TYPE_CHECKING:
    import click

__all__ = ["command", "main", "require_uvicorn", "worker_options"]

SUPPORTED = ((0, 35), (0, 55))
OURS = frozenset(
    ["host", "port", "uds", "fd", "workers", "http2", "version", "timeout_worker_healthcheck", "reload", "reload_dirs",
     "reload_includes", "reload_excludes", "reload_delay"]
)  # fmt: skip
"""Options of uvicorn that the supervisor decides, or that nothing here supports."""
BACKLOG = 4096


def require_uvicorn() -> None:
    """`MissingExtra` when uvicorn is not installed, or in a version whose internals were not tried."""
    hint = "pip install 'portway[asgi]'"
    try:
        import uvicorn
    except ImportError:
        raise MissingExtra("portway asgi needs uvicorn, which is not installed", hint=hint) from None
    low, high = SUPPORTED
    found = tuple(int(part) for part in uvicorn.__version__.split(".")[:2] if part.isdigit())
    if not low <= found < high:
        raise MissingExtra(
            f"uvicorn {uvicorn.__version__} is installed: portway asgi works with {low[0]}.{low[1]} up to, not "
            f"including, {high[0]}.{high[1]}",
            hint=hint,
        )


def worker_options() -> list[click.Parameter]:
    """uvicorn's options that a worker takes. uvicorn must be installed."""
    from uvicorn.main import main as uvicorn_main

    return [one for one in uvicorn_main.params if one.name not in OURS]


def protocol_class(name: str) -> type[Any]:
    """The moving protocol for uvicorn's ``--http``; `ConfigurationError` for one that cannot move."""
    if name == "auto":
        try:
            import httptools  # noqa: F401
        except ImportError:
            name = "h11"
        else:
            name = "httptools"
    if name == "httptools":
        from .httptools_moving import MovingHttpToolsProtocol

        return MovingHttpToolsProtocol
    if name == "h11":
        from .h11_moving import MovingH11Protocol

        return MovingH11Protocol
    raise ConfigurationError(
        f"http={name!r}: portway asgi moves connections of uvicorn's h11 and httptools protocols",
        hint="give --http h11, httptools or auto",
    )


def serve(app: str, app_dir: str = "", headers: tuple[str, ...] = (), **options: Any) -> int:
    """Runs one worker until it is told to end; the exit code, 3 when it did not start (as uvicorn's)."""
    import uvicorn

    from ... import generation
    from .server import MovingServer

    http = protocol_class(options.pop("http", None) or "auto")
    sockets = list(generation().sockets.values())
    if not sockets:
        raise ConfigurationError(
            "no listening socket was inherited (LISTEN_FDS)", hint=f"start it with `portway asgi {app}`"
        )
    sys.path.insert(0, app_dir)
    known = inspect.signature(uvicorn.Config).parameters
    chosen = {key: value for key, value in options.items() if key in known and value is not None}
    chosen["backlog"] = max(BACKLOG, chosen.get("backlog", 0))
    pairs = [(name, value) for name, _, value in (one.partition(":") for one in headers)]
    server = MovingServer(uvicorn.Config(app, http=http, headers=pairs, **chosen))
    try:
        server.run(sockets=sockets)
    except KeyboardInterrupt:
        pass
    return 0 if server.started else 3


def command() -> click.Command:
    import click

    return click.Command("asgi-worker", params=worker_options(), callback=serve, help=__doc__)


def main(arguments: list[str] | None = None) -> int:
    try:
        require_uvicorn()
        code = command().main(arguments, prog_name="python -m portway.supervise.asgi", standalone_mode=False)
    except PortwayError as error:
        print(f"portway asgi: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        import click

        if not isinstance(error, click.ClickException):
            raise
        error.show()
        return error.exit_code
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    sys.exit(main())
