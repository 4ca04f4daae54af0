"""Ending another thread's wait. Win32: QueueUserAPC and alertable waits."""

from __future__ import annotations

import threading
import weakref
from typing import Any

from .._accel import sync as _native
from ..errors import ObjectNotFound

__all__ = ["alert", "word_of_this_thread"]

_words: weakref.WeakKeyDictionary[threading.Thread, Any] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _word(thread: threading.Thread) -> Any:
    with _lock:
        return _words.setdefault(thread, _native.AlertWord())


def word_of_this_thread() -> Any:
    return _word(threading.current_thread())


def alert(thread: threading.Thread | int) -> None:
    """Ends the alertable wait of a thread of this process with `WaitInterrupted`, or else its next one.

    `thread` is a ``threading.Thread`` or its ``ident``. Alerts do not add up. Only waits with ``alertable=True`` look;
    what is signalled at the same moment is taken first. `ObjectNotFound` for a thread that has ended or is unknown.
    """
    if not isinstance(thread, threading.Thread):
        known = [one for one in threading.enumerate() if one.ident == thread]
        if not known:
            raise ObjectNotFound(f"no thread with ident {thread!r} runs in this process")
        thread = known[0]
    if not thread.is_alive():
        raise ObjectNotFound(f"{thread.name} is not running: it cannot be alerted")
    _word(thread).set()
