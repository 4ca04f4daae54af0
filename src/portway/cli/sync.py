"""`portway sync`: list, make, wait for and signal mutexes, semaphores, events and waitable timers."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigurationError, InvalidHandle, ObjectNotFound, PortwayError
from .common import timeout
from .objects import LINES, Holding, entries, facts, grants, hold, say, security, show

if TYPE_CHECKING:
    from ..kernel.namespace import Entry

__all__ = ["command"]


@click.group("sync", help="Mutexes, semaphores, events and timers by name: list, make, wait, signal.")
def command() -> None:
    pass


# -- ls ---------------------------------------------------------------------------------------------------------------


def _classes() -> dict[str, Any]:
    import portway

    return {
        "mutex": portway.Mutex, "semaphore": portway.Semaphore, "event": portway.Event, "timer": portway.WaitableTimer
    }  # fmt: skip


def _state(one: Any) -> dict[str, Any]:
    """What an open object says of itself, as it was a moment ago."""
    import portway

    if isinstance(one, portway.Mutex):
        return {"state": one.state, "abandoned": one.state == "abandoned"}
    if isinstance(one, portway.Semaphore):
        return {"state": f"{one.value} of {one.maximum}", "count": one.value, "maximum": one.maximum}
    reset = "manual" if one.manual_reset else "auto"
    if isinstance(one, portway.Event):
        return {"state": f"{'set' if one.is_set() else 'not set'}, {reset}-reset", "set": one.is_set(), "reset": reset}
    due = one.due
    state = "not set" if due is None else "signalled" if one.is_set() else f"due in {due:.1f} s"
    return {"state": f"{state}, {reset}-reset", "set": one.is_set(), "reset": reset, "due": due, "period": one.period}


def _row(entry: Entry) -> dict[str, Any]:
    from ..kernel.sync_base import open_entry

    row: dict[str, Any] = {**facts(entry), "waiters": None, "state": "?"}
    with suppress(PortwayError), ExitStack() as stack:
        one: Any = open_entry(_classes()[str(entry.kind)], entry)
        stack.callback(one.close)
        row |= {"waiters": one.waiters, **_state(one)}
    return row


@command.command("ls")
@LINES
def ls(as_json: bool) -> None:
    """Kind, name, owner, holders, waiters and state of this user's objects, and of the Global ones it may see."""
    rows = [_row(entry) for entry in entries(mappings=False) if str(entry.kind) in _classes()]
    show(rows, ("kind", "name", "owner", "holders", "waiters", "state"), as_json, "objects")


# -- create -----------------------------------------------------------------------------------------------------------


@command.command("create", cls=Holding)
@click.argument("kind", type=click.Choice(["mutex", "semaphore", "event", "timer"]))
@click.argument("name")
@click.option("--initial", type=click.IntRange(min=0), help="Semaphore: count at first [1].")
@click.option("--maximum", type=click.IntRange(min=1), help="Semaphore: highest count [2147483647].")
@click.option("--manual", is_flag=True, help="Event, timer: manual reset.")
@click.option("--set", "is_set", is_flag=True, help="Event: set at first.")
@click.option("--exclusive", is_flag=True, help="An error if the name exists; else that one is opened.")
@grants
@click.option("--for", "seconds", type=float, help="Hold it this long; else until Ctrl-C.")
@LINES
def create(
    kind: str, name: str, initial: int | None, maximum: int | None, manual: bool, is_set: bool, exclusive: bool,
    everyone: bool, uids: tuple[str, ...], groups: tuple[str, ...], seconds: float | None, as_json: bool,
    cmd: tuple[str, ...],
) -> int:  # fmt: skip
    """Makes an object, or opens it, and holds it: while CMD runs, or until Ctrl-C. Without a holder it is gone."""
    given: dict[str, Any] = {"initial": initial, "maximum": maximum, "manual_reset": manual, "initially_set": is_set}
    takes = {"mutex": (), "semaphore": ("initial", "maximum"), "event": ("manual_reset", "initially_set"),
             "timer": ("manual_reset",)}[kind]  # fmt: skip
    wrong = [option for option, value in given.items() if value not in (None, False) and option not in takes]
    if wrong:
        raise ConfigurationError(f"sync create {kind}: {', '.join(wrong)} is not for this kind")
    options = {key: given[key] for key in takes if given[key] is not None}
    try:
        one = _classes()[kind](
            name=name, exclusive=exclusive, security=security(everyone, uids, groups), **options
        )
    except ValueError as error:
        if isinstance(error, PortwayError):
            raise
        raise ConfigurationError(f"sync create {kind}: {error}") from None
    with ExitStack() as stack:
        stack.callback(one.close)
        say({"kind": kind, "name": one.name, "existed": one.already_exists, **_state(one)}, as_json)
        return hold(cmd, seconds)


# -- wait -------------------------------------------------------------------------------------------------------------


def _open(name: str) -> Any:
    """The object of this name, whatever its kind."""
    for kind in _classes().values():
        try:
            return kind.open(name)
        except InvalidHandle:
            continue
        except ObjectNotFound:
            raise ObjectNotFound(f"no object named {name}", hint="see `portway sync ls`") from None
    raise InvalidHandle(f"{name} is a mapping", hint="see `portway map`")


@command.command("wait", cls=Holding)
@click.argument("names", nargs=-1, required=True)
@click.option("--all", "every", is_flag=True, help="Until all are signalled at one instant; else one of them.")
@click.option("--dotnet", is_flag=True, help="NAME is a named Mutex of .NET on this machine, made if it is missing.")
@timeout()
@LINES
def wait(
    names: tuple[str, ...], every: bool, dotnet: bool, timeout: float | None, as_json: bool, cmd: tuple[str, ...]
) -> int:
    """Waits for one of NAMES, or all; with `-- CMD ...`, runs it then, mutexes held until it ends.

    Takes what a wait takes: one of a semaphore, an auto-reset event's set. A mutex is released at the end. Exit code:
    that of CMD, else 0; 5 after --timeout.
    """
    with ExitStack() as stack:
        taken, owned = _wait_dotnet(names, timeout, stack) if dotnet else _wait(names, every, timeout, stack)
        for mutex in owned:
            stack.callback(mutex.release)
        for about in taken:
            say(about, as_json)
        return hold(cmd, None) if cmd else 0


def _wait(names: tuple[str, ...], every: bool, timeout: float | None, stack: ExitStack) -> tuple[list[Any], list[Any]]:
    import portway

    opened = []
    for name in names:
        opened.append(_open(name))
        stack.callback(opened[-1].close)
    try:
        waited = (portway.wait_all if every else portway.wait_any)(opened, timeout)
    except ValueError as error:  # more than 64, or the same one twice
        raise ConfigurationError(f"sync wait: {error}") from None
    taken = list(enumerate(opened)) if every else [(waited.index, waited.object)]
    owned = [one for _, one in taken if isinstance(one, portway.Mutex)]
    told = [
        {"index": index, "kind": str(one.kind), "name": one.name, "abandoned": one in waited.abandoned}
        for index, one in taken
    ]
    return told, owned


def _wait_dotnet(names: tuple[str, ...], timeout: float | None, stack: ExitStack) -> tuple[list[Any], list[Any]]:
    from ..kernel.dotnet_mutex import DotnetMutex

    if len(names) != 1:
        raise ConfigurationError("sync wait --dotnet: one name; .NET's named mutex cannot be waited for with others")
    mutex = DotnetMutex(names[0])
    stack.callback(mutex.close)
    mutex.acquire(timeout)
    return [{"index": 0, "kind": "dotnet-mutex", "name": mutex.name, "abandoned": mutex.abandoned}], [mutex]


# -- signal -----------------------------------------------------------------------------------------------------------


@command.command("release")
@click.argument("name")
@click.option("--count", type=click.IntRange(min=1), default=1, show_default=True)
@LINES
def release(name: str, count: int, as_json: bool) -> None:
    """Adds to the semaphore NAME; says the count before. A mutex only its owner can release."""
    import portway

    with ExitStack() as stack:
        one = _open(name)
        stack.callback(one.close)
        if isinstance(one, portway.Mutex):
            one.release()  # tells that it is not ours
        say({"name": one.name, "previous": _as(one, portway.Semaphore).release(count)}, as_json)


def _as(one: Any, *kinds: Any) -> Any:
    if not isinstance(one, kinds):
        wanted = " or ".join(kind.kind.article for kind in kinds)
        raise InvalidHandle(f"{one.name} is {one.kind.article}, not {wanted}")
    return one


@command.command("set")
@click.argument("name")
@click.option("--due", type=click.FloatRange(min=0), help="Timer: seconds from now [0].")
@click.option("--period", type=click.FloatRange(min=0), help="Timer: seconds between ticks, 0 for once [0].")
@LINES
def set_(name: str, due: float | None, period: float | None, as_json: bool) -> None:
    """Sets the event NAME, or the timer NAME."""
    import portway

    with ExitStack() as stack:
        one = _as(_open(name), portway.Event, portway.WaitableTimer)
        stack.callback(one.close)
        if isinstance(one, portway.WaitableTimer):
            one.set(due or 0, period or 0)
        elif due is not None or period is not None:
            raise ConfigurationError(f"sync set: {name} is an event; --due and --period are for timers")
        else:
            one.set()
        say({"name": one.name, **_state(one)}, as_json)


@command.command("reset")
@click.argument("name")
@LINES
def reset(name: str, as_json: bool) -> None:
    """Resets the event NAME; of a timer, cancels it."""
    import portway

    with ExitStack() as stack:
        one = _as(_open(name), portway.Event, portway.WaitableTimer)
        stack.callback(one.close)
        one.cancel() if isinstance(one, portway.WaitableTimer) else one.reset()
        say({"name": one.name, **_state(one)}, as_json)


@command.command("pulse")
@click.argument("name")
@LINES
def pulse(name: str, as_json: bool) -> None:
    """Lets through who waits now for the event NAME (auto-reset: at most one) and leaves it not set."""
    import portway

    with ExitStack() as stack:
        one = _as(_open(name), portway.Event)
        stack.callback(one.close)
        one.pulse()
        say({"name": one.name, **_state(one)}, as_json)
