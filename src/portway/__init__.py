"""portway: Windows and .NET inter-process communication for Python, on Linux.

The public nouns, loaded when first used; `portway.aio` has the same, awaited. Errors are in `portway.errors`, and the
contract for hand-off providers in `portway.provider`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .errors import PortwayError
    from .kernel.alert import alert
    from .kernel.dotnet_mutex import DotnetMutex
    from .kernel.event import Event
    from .kernel.framing import FramedSocket
    from .kernel.handoff import duplicate_and_close, duplicate_socket, socket_from, wait_claimed
    from .kernel.inbox import HandoffInbox
    from .kernel.mutex import Mutex
    from .kernel.pipe_client import NamedPipeClient, call_pipe, wait_pipe
    from .kernel.pipe_list import list_pipes
    from .kernel.pipe_server import NamedPipeConnection, NamedPipeServer
    from .kernel.pipe_serving import PipeNameTaken
    from .kernel.section import FileMapping, View
    from .kernel.security import Security
    from .kernel.semaphore import Semaphore
    from .kernel.session import HandoffSession
    from .kernel.shared import SharedSocket
    from .kernel.timer import WaitableTimer
    from .kernel.wait import Waited, signal_and_wait, wait_all, wait_any
    from .supervise.hook import generation
    from .wire.handoff import SocketInformation, SocketInformationOptions

__all__ = [
    "DotnetMutex", "Event", "FileMapping", "FramedSocket", "HandoffInbox", "HandoffSession", "Mutex", "NamedPipeClient",
    "NamedPipeConnection", "NamedPipeServer", "PipeNameTaken", "PortwayError", "Security", "Semaphore", "SharedSocket",
    "SocketInformation", "SocketInformationOptions", "View", "WaitableTimer", "Waited", "__version__", "alert",
    "call_pipe", "duplicate_and_close", "duplicate_socket", "generation", "list_pipes", "signal_and_wait",
    "socket_from", "wait_all", "wait_any", "wait_claimed", "wait_pipe",
]  # fmt: skip

__version__ = "0.1.0"

_HOME = {
    "DotnetMutex": "kernel.dotnet_mutex",
    "Event": "kernel.event",
    "FileMapping": "kernel.section",
    "FramedSocket": "kernel.framing",
    "HandoffInbox": "kernel.inbox",
    "HandoffSession": "kernel.session",
    "Mutex": "kernel.mutex",
    "NamedPipeClient": "kernel.pipe_client",
    "NamedPipeConnection": "kernel.pipe_server",
    "NamedPipeServer": "kernel.pipe_server",
    "PipeNameTaken": "kernel.pipe_serving",
    "PortwayError": "errors",
    "Security": "kernel.security",
    "Semaphore": "kernel.semaphore",
    "SharedSocket": "kernel.shared",
    "SocketInformation": "wire.handoff",
    "SocketInformationOptions": "wire.handoff",
    "View": "kernel.section",
    "WaitableTimer": "kernel.timer",
    "Waited": "kernel.wait",
    "alert": "kernel.alert",
    "call_pipe": "kernel.pipe_client",
    "duplicate_and_close": "kernel.handoff",
    "duplicate_socket": "kernel.handoff",
    "generation": "supervise.hook",
    "list_pipes": "kernel.pipe_list",
    "signal_and_wait": "kernel.wait",
    "socket_from": "kernel.handoff",
    "wait_all": "kernel.wait",
    "wait_any": "kernel.wait",
    "wait_claimed": "kernel.handoff",
    "wait_pipe": "kernel.pipe_client",
}


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'portway' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"portway.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
