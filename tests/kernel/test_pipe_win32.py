r"""The calls of Windows, line by line: CreateNamedPipe and its companions as the conformance tests describe them.

What the kernel does not give (byte quotas, an instance that stays taken while only its old client lingers, taking back
the bytes of a cancelled write) is not here; see docs/features.md.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Any

import pytest
from handoff_peers import patiently
from pipe_world import remains
from sync_world import in_thread

import portway
from portway import errors
from portway import win32pipe as w

RW = w.GENERIC_READ | w.GENERIC_WRITE
DUPLEX, INBOUND, OUTBOUND = w.PIPE_ACCESS_DUPLEX, w.PIPE_ACCESS_INBOUND, w.PIPE_ACCESS_OUTBOUND
BYTE, MESSAGE = w.PIPE_TYPE_BYTE, w.PIPE_TYPE_MESSAGE | w.PIPE_READMODE_MESSAGE
P = r"\\.\pipe\p"
pytestmark = pytest.mark.usefixtures("pipe_root")


@contextlib.contextmanager
def fails(kind: type[errors.PortwayError], code: int, match: str | None = None) -> Any:
    with pytest.raises(kind, match=match) as caught:
        yield caught
    assert (type(caught.value).code, caught.value.code) == (caught.value.code, code)


@pytest.fixture
def made() -> Any:
    """``made(handle)`` closes it after the test; those made last go first."""
    with contextlib.ExitStack() as stack:
        yield lambda handle: stack.enter_context(handle)


@pytest.fixture
def both(made: Any) -> Any:
    """``both(mode, ...)``: a connected pair (server's handle, client's)."""

    def make(mode: int = MESSAGE, access: int = DUPLEX, name: str = P, most: int = 1, **options: Any) -> Any:
        server = made(w.CreateNamedPipe(name, access, mode, most, **options))
        wanted = {INBOUND: w.GENERIC_WRITE, OUTBOUND: w.GENERIC_READ, DUPLEX: RW}[access]
        client = made(w.CreateFile(name, wanted))
        if mode & w.PIPE_READMODE_MESSAGE and access != INBOUND:
            w.SetNamedPipeHandleState(client, w.PIPE_READMODE_MESSAGE)
        assert w.ConnectNamedPipe(server) == w.ERROR_PIPE_CONNECTED
        return server, client

    return make


# -- 1.1 names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("served", "opened"),
    [
        (P, r"\\.\pipe\P"), (P, r"\\.\PIPE\p"), (P, r"\\?\pipe\p"), (P, "//./pipe/p"), ("//./Pipe/P", P),
        (P, r"\\localhost\pipe\p"), (P, r"\\127.0.0.1\pipe\p"), (P, r"\\LocalHost\Pipe\P"),
        (r"\\.\pipe\Ärger", r"\\.\pipe\ärger"), (r"\\.\pipe\ЖУК", r"\\.\pipe\жук"),
        (r"\\.\pipe\a/b", r"\\.\pipe\A/B"), (r"\\.\pipe\LOCAL\x", r"\\.\pipe\local\X"),
        (r"\\.\pipe\<>*?|" + '"' + "/ .", r"\\.\pipe\<>*?|" + '"' + "/ ."), (r"\\.\pipe\ ", r"\\.\pipe\ "),
        (r"\\.\pipe\..", r"\\.\pipe\.."), (r"\\.\pipe\..\..\etc", r"\\.\pipe\..\..\ETC"),
    ],
)  # fmt: skip
def test_names_that_mean_the_same(served: str, opened: str, made: Any, pipe_root: str) -> None:
    server = made(w.CreateNamedPipe(served, DUPLEX, MESSAGE, 1))
    client = made(w.CreateFile(opened, RW))
    w.WriteFile(client, b"here")
    assert w.ReadFile(server, 10) == (0, b"here")
    client.Close()
    server.Close()
    assert remains(pipe_root) == []


@pytest.mark.parametrize(
    ("one", "other"),
    [("straße", "STRASSE"), ("ﬁ", "FI"), ("a b", "a  b"), (r"a\b", "a/b"), ("é", "e\u0301"), ("p", "p ")],
)
def test_names_that_are_two(one: str, other: str, made: Any) -> None:
    """Characters fold one to one; nothing is normalised."""
    made(w.CreateNamedPipe(rf"\\.\pipe\{one}", DUPLEX | w.FILE_FLAG_FIRST_PIPE_INSTANCE, BYTE, 1))
    made(w.CreateNamedPipe(rf"\\.\pipe\{other}", DUPLEX | w.FILE_FLAG_FIRST_PIPE_INSTANCE, BYTE, 1))
    assert len(portway.list_pipes()) == 2


def open_calls(name: str) -> list[Any]:
    return [
        lambda: w.CreateNamedPipe(name, DUPLEX, BYTE, 1), lambda: w.CreateFile(name, RW),
        lambda: w.WaitNamedPipe(name, 1), lambda: w.CallNamedPipe(name, b"x", 10, 1),
        lambda: portway.NamedPipeServer(name), lambda: portway.NamedPipeClient(name, timeout=1, appear=True),
        lambda: portway.wait_pipe(name, 1), lambda: portway.call_pipe(name, b"x", timeout=1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind", "code"),
    [
        ("", errors.PathNotFound, 3), ("\\\\.\\pipe\\", errors.InvalidAddress, 123),
        ("\\\\.\\pipe", errors.InvalidAddress, 123), (r"\\.\mailslot\x", errors.InvalidAddress, 123),
        (r"\\.\x", errors.InvalidAddress, 123), ("\\\\", errors.InvalidAddress, 123),
        ("\\\\\\pipe\\x", errors.InvalidAddress, 123), ("\\\\.\\pipe\\a\0b", errors.InvalidAddress, 123),
        ("\\\\.\\pipe\\\ud800", errors.InvalidAddress, 123), (r"\\.\pipe" + "\\" + 257 * "n", errors.NameTooLong, 206),
        (r"\\server\pipe\x", errors.NotSupported, 50), (r"\\10.0.0.1\pipe\x", errors.NotSupported, 50),
    ],
)  # fmt: skip
def test_names_that_cannot_be(name: str, kind: type[errors.PortwayError], code: int) -> None:
    for call in open_calls(name):
        with fails(kind, code):
            call()


@pytest.mark.parametrize("letter", ["n", "ä", "😀"])
def test_256_characters_whatever_they_are(letter: str, made: Any) -> None:
    name = rf"\\.\pipe\{256 * letter}"
    server = made(w.CreateNamedPipe(name, DUPLEX, BYTE, 1))
    client = made(w.CreateFile(name, RW))
    w.WriteFile(client, b"long")
    assert w.ReadFile(server, 10) == (0, b"long")


def test_native_calls_want_the_prefix_the_easy_api_does_not(made: Any) -> None:
    for call in open_calls("plain")[:3]:
        with fails(errors.InvalidAddress, 123):
            call()
    made(portway.NamedPipeServer("plain"))
    made(w.CreateFile(r"\\.\pipe\plain", RW))


def test_listed_with_the_case_of_creation(made: Any) -> None:
    made(w.CreateNamedPipe(r"\\.\pipe\HelloWorld", DUPLEX, MESSAGE, 2))
    made(w.CreateNamedPipe(r"\\.\pipe\HELLOworld", DUPLEX, MESSAGE, 2))
    (one,) = portway.list_pipes()
    assert (one.name, one.instances, one.max_instances) == ("HelloWorld", 2, 2)


def test_names_are_not_those_of_kernel_objects(made: Any, root: str) -> None:
    made(portway.Mutex("p"))
    made(w.CreateNamedPipe(P, DUPLEX | w.FILE_FLAG_FIRST_PIPE_INSTANCE, BYTE, 1))


# -- 1.2 creating ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0, 4, 8, 0x100, 3 | 0x10, 3 | 0x02000000, 1 << 32])
def test_open_modes_that_cannot_be(mode: int) -> None:
    with fails(errors.InvalidParameter, 87):
        w.CreateNamedPipe(P, mode, BYTE, 1)


@pytest.mark.parametrize(
    "flags", [w.FILE_FLAG_OVERLAPPED, w.FILE_FLAG_WRITE_THROUGH, w.FILE_FLAG_FIRST_PIPE_INSTANCE, w.WRITE_DAC,
              w.WRITE_OWNER, w.ACCESS_SYSTEM_SECURITY],
)  # fmt: skip
@pytest.mark.parametrize("access", [INBOUND, OUTBOUND, DUPLEX])
def test_open_modes_that_are_fine(access: int, flags: int, made: Any) -> None:
    made(w.CreateNamedPipe(P, access | flags, BYTE, 1))


@pytest.mark.parametrize("mode", [w.PIPE_TYPE_BYTE | w.PIPE_READMODE_MESSAGE, 2 | 1, 16, 0x100])
def test_pipe_modes_that_cannot_be(mode: int) -> None:
    with fails(errors.InvalidParameter, 87):
        w.CreateNamedPipe(P, DUPLEX, mode, 1)


@pytest.mark.parametrize("mode", [0, 4, 6, 1, 5, 7, 8, 15])
def test_pipe_modes_that_are_fine(mode: int, made: Any) -> None:
    server = made(w.CreateNamedPipe(P, DUPLEX, mode, 1))
    assert w.GetNamedPipeInfo(server)[0] == w.PIPE_SERVER_END | mode & 4
    assert w.GetNamedPipeHandleState(server)[0] == mode & 3


@pytest.mark.parametrize("most", [0, 256, 257, -1, 1 << 32])
def test_maxima_that_cannot_be(most: int) -> None:
    with fails(errors.InvalidParameter, 87):
        w.CreateNamedPipe(P, DUPLEX, BYTE, most)


@pytest.mark.parametrize("most", [1, 2, 254, 255])
def test_maxima_that_are_fine(most: int, made: Any) -> None:
    server = made(w.CreateNamedPipe(P, DUPLEX, BYTE, most, 10, 20))
    assert w.GetNamedPipeInfo(server) == (w.PIPE_SERVER_END, 10, 20, most)


def test_the_first_instance_decides_direction_and_type_and_maximum(made: Any) -> None:
    made(w.CreateNamedPipe(P, DUPLEX, MESSAGE, 2, 100, 200))
    for access in (INBOUND, OUTBOUND):
        with fails(errors.AccessDenied, 5):
            w.CreateNamedPipe(P, access, MESSAGE, 2)
    with fails(errors.AccessDenied, 5, "exists already"):
        w.CreateNamedPipe(P, DUPLEX | w.FILE_FLAG_FIRST_PIPE_INSTANCE, MESSAGE, 2)
    later = made(w.CreateNamedPipe(P, DUPLEX, BYTE, 17, 1, 1, 1234))  # other type, sizes, wait, maximum: accepted
    assert w.GetNamedPipeInfo(later) == (w.PIPE_SERVER_END | w.PIPE_TYPE_MESSAGE, 100, 200, 2)
    with fails(errors.PipeBusy, 231):
        w.CreateNamedPipe(P, DUPLEX, MESSAGE, 255)


def test_the_maximum_counts_instances_in_any_state(made: Any) -> None:
    one, other = (made(w.CreateNamedPipe(P, DUPLEX, BYTE, 2)) for _ in range(2))
    made(w.CreateFile(P, RW))
    w.DisconnectNamedPipe(other)
    with fails(errors.PipeBusy, 231):
        w.CreateNamedPipe(P, DUPLEX, BYTE, 2)
    other.Close()
    made(w.CreateNamedPipe(P, DUPLEX, BYTE, 2))
    assert w.GetNamedPipeHandleState(one)[1] == 2


def test_the_name_goes_with_the_last_server_handle_whatever_clients_hold(both: Any, made: Any) -> None:
    """On Windows a later instance would count the old client's, too; here the server's end decides."""
    server, client = both()
    server.Close()
    with fails(errors.PipeNotFound, 2):
        w.CreateFile(P, RW)
    with fails(errors.PipeNotFound, 2):
        w.WaitNamedPipe(P, 1000)
    made(w.CreateNamedPipe(P, DUPLEX | w.FILE_FLAG_FIRST_PIPE_INSTANCE, BYTE, 1))
    with fails(errors.BrokenPipe, 109):
        w.ReadFile(client, 1)


def test_a_connected_instance_keeps_the_name(both: Any) -> None:
    _, client = both()
    with fails(errors.PipeBusy, 231):
        w.CreateFile(P, RW)
    client.Close()
    with fails(errors.PipeBusy, 231):
        w.CreateFile(P, RW)


# -- 1.3 the client opens ----------------------------------------------------------------------------------------------


def test_no_such_name_and_no_listening_instance() -> None:
    with fails(errors.PipeNotFound, 2, "looked in"):
        w.CreateFile(P, RW)
    with w.CreateNamedPipe(P, DUPLEX, BYTE, 1), w.CreateFile(P, RW), fails(errors.PipeBusy, 231, "1 of 1 exist"):
        w.CreateFile(P, RW)


def test_a_client_opens_writes_and_closes_before_connect(made: Any) -> None:
    server = made(w.CreateNamedPipe(P, DUPLEX, MESSAGE, 1))
    with w.CreateFile(P, RW) as client:
        w.WriteFile(client, b"early")
        w.WriteFile(client, b"")
    with fails(errors.NoData, 232):
        w.ConnectNamedPipe(server)
    assert w.ReadFile(server, 10) == (0, b"early")
    assert w.ReadFile(server, 10) == (0, b"")
    with fails(errors.BrokenPipe, 109):
        w.ReadFile(server, 10)


@pytest.mark.parametrize("access", [INBOUND, OUTBOUND, DUPLEX])
@pytest.mark.parametrize("wanted", [w.GENERIC_READ, w.GENERIC_WRITE, RW])
def test_access_within_the_servers_direction(access: int, wanted: int, made: Any) -> None:
    made(w.CreateNamedPipe(P, access, BYTE, 1))
    allowed = {INBOUND: w.GENERIC_WRITE, OUTBOUND: w.GENERIC_READ, DUPLEX: RW}[access]
    if wanted & ~allowed:
        with fails(errors.AccessDenied, 5):
            w.CreateFile(P, wanted)
        wanted = allowed  # and no instance was used up
    made(w.CreateFile(P, wanted))


def test_attributes_only_is_not_built() -> None:
    with w.CreateNamedPipe(P, DUPLEX, BYTE, 1), fails(errors.NotSupported, 50):
        w.CreateFile(P, 0)


def test_the_instance_that_began_first_is_served_first(made: Any) -> None:
    servers = [made(w.CreateNamedPipe(P, DUPLEX, MESSAGE, 3)) for _ in range(3)]
    connect = in_thread(lambda: w.ConnectNamedPipe(servers[2], timeout=10))  # a pending connect gives no priority
    clients = []
    for at in range(3):
        clients.append(made(w.CreateFile(P, RW)))
        w.WriteFile(clients[-1], b"%d" % at)
    connect()
    for at, server in enumerate(servers):
        assert w.ReadFile(server, 9) == (0, b"%d" % at)
    # disconnected and listening again: at the end of the queue
    w.DisconnectNamedPipe(servers[0])
    w.DisconnectNamedPipe(servers[1])
    for at in (1, 0):
        with fails(errors.OperationTimeout, 1460):
            w.ConnectNamedPipe(servers[at], timeout=0)
    for server, data in ((servers[1], b"a"), (servers[0], b"b")):
        w.WriteFile(made(w.CreateFile(P, RW)), data)
        assert w.ReadFile(server, 9) == (0, data)


def test_a_client_that_closes_frees_nothing_disconnect_and_connect_do(both: Any, made: Any) -> None:
    server, client = both()
    client.Close()
    with fails(errors.PipeBusy, 231):
        w.CreateFile(P, RW)
    w.DisconnectNamedPipe(server)
    with fails(errors.PipeBusy, 231):
        w.CreateFile(P, RW)
    with fails(errors.OperationTimeout, 1460):
        w.ConnectNamedPipe(server, timeout=0)
    w.WriteFile(made(w.CreateFile(P, RW)), b"again")
    assert w.ReadFile(server, 9) == (0, b"again")


def test_the_client_starts_by_bytes_and_blocking_whatever_the_server_chose(made: Any) -> None:
    server = made(w.CreateNamedPipe(P, DUPLEX, MESSAGE | w.PIPE_NOWAIT, 1))
    client = made(w.CreateFile(P, RW))
    assert w.GetNamedPipeHandleState(client)[0] == w.PIPE_READMODE_BYTE | w.PIPE_WAIT
    assert w.GetNamedPipeHandleState(server)[0] == w.PIPE_READMODE_MESSAGE | w.PIPE_NOWAIT
    w.WriteFile(server, b"ab")
    w.WriteFile(server, b"cd")
    assert w.ReadFile(client, 10) == (0, b"abcd")
    with fails(errors.OperationTimeout, 1460):
        w.ReadFile(client, 1, timeout=0.02)


@pytest.mark.parametrize("disposition", [1, 2, 3, 4, 5])
def test_every_disposition_opens(disposition: int, made: Any) -> None:
    made(w.CreateNamedPipe(P, DUPLEX, BYTE, 1))
    made(w.CreateFile(P, RW, 0, None, disposition, w.FILE_FLAG_OVERLAPPED, None))


def test_the_death_of_a_process_closes_its_handles(made: Any, start: Any) -> None:
    server = made(w.CreateNamedPipe(P, DUPLEX, MESSAGE, 1))

    def work(tell: Any) -> None:
        client = w.CreateFile(P, RW)
        w.WriteFile(client, b"last words")
        tell("open")
        threading.Event().wait()

    child = start(work)
    child.hear()
    assert w.ConnectNamedPipe(server) == w.ERROR_PIPE_CONNECTED
    child.kill()
    assert w.ReadFile(server, 99) == (0, b"last words")
    with fails(errors.BrokenPipe, 109):
        w.ReadFile(server, 99)


# -- 1.4 states --------------------------------------------------------------------------------------------------------

CALLS = {
    "connect": lambda s: w.ConnectNamedPipe(s, timeout=0),
    "connect nowait": lambda s: (w.SetNamedPipeHandleState(s, w.PIPE_NOWAIT), w.ConnectNamedPipe(s))[1],
    "read": lambda s: w.ReadFile(s, 10),
    "write": lambda s: w.WriteFile(s, b"w"),
    "peek": lambda s: w.PeekNamedPipe(s, 10)[:2],
    "disconnect": lambda s: w.DisconnectNamedPipe(s),
    "flush": lambda s: w.FlushFileBuffers(s),
}
OK = None
STATES: list[tuple[str, str, Any]] = [
    ("listening", "connect", (errors.OperationTimeout, 1460)),
    ("listening", "connect nowait", (errors.PipeListening, 536)),
    ("listening", "read", (errors.PipeListening, 536)), ("listening", "write", (errors.PipeListening, 536)),
    ("listening", "peek", (errors.BadPipe, 230)), ("listening", "disconnect", OK),
    ("listening", "flush", (errors.PipeListening, 536)),
    ("connected", "connect", 535), ("connected", "connect nowait", 535), ("connected", "read", (0, b"left")),
    ("connected", "write", (0, 1)), ("connected", "peek", (b"left", 4)), ("connected", "disconnect", OK),
    ("connected", "flush", OK),
    ("closing", "connect", (errors.NoData, 232)), ("closing", "connect nowait", (errors.NoData, 232)),
    ("closing", "read", (0, b"left")), ("closing", "write", (errors.NoData, 232)),
    ("closing", "peek", (b"left", 4)), ("closing", "disconnect", OK),
    ("closed", "connect", (errors.NoData, 232)), ("closed", "read", (errors.BrokenPipe, 109)),
    ("closed", "write", (errors.NoData, 232)), ("closed", "peek", (errors.BrokenPipe, 109)),
    ("closed", "disconnect", OK),
    ("disconnected", "connect", (errors.OperationTimeout, 1460)),
    ("disconnected", "connect nowait", (errors.PipeListening, 536)),
    ("disconnected", "read", (errors.PipeNotConnected, 233)), ("disconnected", "write", (errors.PipeNotConnected, 233)),
    ("disconnected", "peek", (errors.BadPipe, 230)), ("disconnected", "disconnect", (errors.PipeNotConnected, 233)),
    ("disconnected", "flush", (errors.PipeNotConnected, 233)),
]  # fmt: skip


@pytest.mark.parametrize(("state", "call", "expected"), STATES, ids=[f"{one[0]}-{one[1]}" for one in STATES])
@pytest.mark.parametrize("mode", [BYTE, MESSAGE], ids=["byte", "message"])
def test_the_state_table_of_the_server_end(mode: int, state: str, call: str, expected: Any, made: Any) -> None:
    server = made(w.CreateNamedPipe(P, DUPLEX, mode, 1))
    if state != "listening":
        client = made(w.CreateFile(P, RW))
        assert w.ConnectNamedPipe(server) == 535
        w.WriteFile(client, b"left")
        if state == "disconnected":
            w.DisconnectNamedPipe(server)
        elif state != "connected":
            client.Close()
        if state == "closed":
            assert w.ReadFile(server, 10) == (0, b"left")
    if isinstance(expected, tuple) and isinstance(expected[0], type):
        with fails(*expected):
            CALLS[call](server)
    else:
        assert CALLS[call](server) == expected
    if call.startswith("connect") and state in ("disconnected", "listening"):
        made(w.CreateFile(P, RW))  # and listens now


def test_connect_waits_for_its_client(made: Any) -> None:
    server = made(w.CreateNamedPipe(P, DUPLEX, BYTE, 1))
    for _ in range(2):
        connect = in_thread(lambda: w.ConnectNamedPipe(server))
        client = patiently(lambda: opened())
        assert connect() in (0, 535)
        client.Close()
        w.DisconnectNamedPipe(server)


def opened() -> Any:
    try:
        return w.CreateFile(P, RW)
    except errors.PipeBusy:
        return None


def test_connect_and_disconnect_are_not_for_clients_nor_for_what_is_no_pipe(both: Any, tmp_path: Any) -> None:
    _, client = both()
    for call in (w.ConnectNamedPipe, w.DisconnectNamedPipe, w.ImpersonateNamedPipeClient):
        with pytest.raises(errors.PortwayError) as caught:
            call(client)
        assert caught.value.code == 1  # ERROR_INVALID_FUNCTION
        with portway.Event() as event, fails(errors.InvalidHandle, 6):
            call(event)


def test_a_pending_connect_ends_with_cancel_disconnect_or_close(made: Any) -> None:
    for end, kind, code in (
        (w.CancelIoEx, errors.OperationAborted, 995), (w.DisconnectNamedPipe, errors.PipeNotConnected, 233),
        (w.CloseHandle, errors.ObjectClosed, 6),
    ):  # fmt: skip
        server = made(w.CreateNamedPipe(P, DUPLEX, BYTE, 1))
        connect = in_thread(lambda server=server: w.ConnectNamedPipe(server))
        patiently(lambda server=server: server.server._waiters)
        end(server)
        with fails(kind, code):
            connect()
        server.Close()


def test_the_client_after_the_server_closed(both: Any) -> None:
    server, client = both()
    w.WriteFile(client, b"unread by the server")
    w.WriteFile(server, b"one")
    w.WriteFile(server, b"")
    w.WriteFile(server, b"two")
    server.Close()
    with fails(errors.NoData, 232):
        w.WriteFile(client, b"x")
    assert w.PeekNamedPipe(client, 10) == (b"one", 6, 0)
    assert [w.ReadFile(client, 10) for _ in range(3)] == [(0, b"one"), (0, b""), (0, b"two")]
    for _ in range(2):
        with fails(errors.BrokenPipe, 109):
            w.ReadFile(client, 10)
        with fails(errors.BrokenPipe, 109):
            w.PeekNamedPipe(client, 10)
        with fails(errors.NoData, 232):
            w.WriteFile(client, b"x")


@pytest.mark.parametrize("mode", [BYTE, MESSAGE], ids=["byte", "message"])
def test_the_client_after_disconnect(mode: int, both: Any, made: Any) -> None:
    server, client = both(mode)
    w.WriteFile(client, b"lost")
    w.WriteFile(server, b"lost, too")
    w.DisconnectNamedPipe(server)
    for again in (False, True):
        for call in (
            lambda: w.ReadFile(client, 10), lambda: w.WriteFile(client, b"x"), lambda: w.PeekNamedPipe(client, 0),
            lambda: w.FlushFileBuffers(client),
        ):  # fmt: skip
            with pytest.raises(errors.PortwayError) as caught:
                call()
            assert (caught.value.code, again) == (233, again)
        if not again:  # the instance is used again, that handle never comes back to life
            with fails(errors.OperationTimeout, 1460):
                w.ConnectNamedPipe(server, timeout=0)
            other = made(w.CreateFile(P, RW))
            w.WriteFile(other, b"new")
            assert w.ReadFile(server, 10) == (0, b"new")
            w.WriteFile(server, b"answer")
            assert w.ReadFile(other, 10) == (0, b"answer")


@pytest.mark.parametrize("who", ["server closes", "client closes", "server disconnects", "cancel"])
@pytest.mark.parametrize("what", ["read", "write", "flush"])
@pytest.mark.parametrize("mode", [BYTE, MESSAGE], ids=["byte", "message"])
def test_what_is_pending_ends_as_a_new_call_would(mode: int, what: str, who: str, both: Any) -> None:
    server, client = both(mode)
    waits, other = (server, client) if who == "client closes" else (client, server)
    full = b"x" * (8 << 20)
    if what == "flush":
        w.WriteFile(waits, b"unread")
    call = {
        "read": lambda: w.ReadFile(waits, 10), "write": lambda: w.WriteFile(waits, full),
        "flush": lambda: w.FlushFileBuffers(waits),
    }[what]  # fmt: skip
    pending = in_thread(call)
    waiting_in_kernel(pending)
    if who == "cancel":
        w.CancelIoEx(waits)
        expected = 995
    elif who == "server disconnects":
        w.DisconnectNamedPipe(other)
        expected = 233
    else:
        other.Close()
        expected = 232 if what == "write" else 109
    with pytest.raises(errors.PortwayError) as caught:
        pending()
    assert caught.value.code in {expected, 109 if what == "write" else expected}


def waiting_in_kernel(pending: Any) -> None:
    """Returns when the thread sleeps in a system call."""
    task = patiently(lambda: pending.thread.native_id)

    def sleeps() -> bool:
        with open(f"/proc/self/task/{task}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "S"

    def long_asleep() -> bool:
        """Twenty looks in a row, so that a short wait for the interpreter's lock does not count."""
        return all(sleeps() and not threading.Event().wait(0.001) for _ in range(20))

    patiently(long_asleep)


# -- 1.5 data ----------------------------------------------------------------------------------------------------------


def test_a_byte_pipe_is_a_stream(both: Any) -> None:
    server, client = both(BYTE)
    for part in (b"ab", b"", b"c"):
        assert w.WriteFile(client, part) == (0, len(part))
    assert w.ReadFile(server, 2) == (0, b"ab")
    assert w.ReadFile(server, 10) == (0, b"c")
    w.WriteFile(client, b"")  # nothing happens
    with fails(errors.OperationTimeout, 1460):
        w.ReadFile(server, 1, timeout=0)


@pytest.mark.parametrize("size", [0, 1, 100, 65535, 65536, 65537, 131072, 1_000_000, 5_000_001])
def test_each_write_is_one_message_however_large(size: int, both: Any) -> None:
    server, client = both(MESSAGE, nOutBufferSize=10, nInBufferSize=10)
    data = os.urandom(size)
    write = in_thread(lambda: (w.WriteFile(client, data), w.WriteFile(client, b"next")))
    assert w.ReadFile(server, size) == (0, data)  # fits exactly
    assert w.ReadFile(server, 100) == (0, b"next")
    assert write()[0] == (0, size)


def test_a_small_buffer_gets_the_message_in_parts(both: Any) -> None:
    server, client = both()
    w.WriteFile(client, b"0123456789")
    w.WriteFile(client, b"next")
    assert w.ReadFile(server, 4) == (w.ERROR_MORE_DATA, b"0123")
    assert in_thread(lambda: w.ReadFile(server, 4))() == (w.ERROR_MORE_DATA, b"4567")  # any thread goes on
    assert w.PeekNamedPipe(server, 99) == (b"89", 6, 0)
    assert w.ReadFile(server, 4) == (0, b"89")
    assert w.ReadFile(server, 4) == (0, b"next")


def test_a_large_message_in_parts(both: Any) -> None:
    server, client = both()
    data = os.urandom(300_000)
    write = in_thread(lambda: w.WriteFile(client, data))
    got, sizes = b"", [1, 65535, 2, 100_000, 65536, 1]
    for size in sizes:
        code, part = w.ReadFile(server, size)
        assert (code, len(part)) == (w.ERROR_MORE_DATA, size)
        got += part
    code, part = w.ReadFile(server, 300_000)
    assert (code, got + part) == (0, data)
    write()


def test_a_read_of_nothing_with_a_message_waiting(both: Any) -> None:
    server, client = both()
    w.WriteFile(client, b"abc")
    assert w.ReadFile(server, 0) == (w.ERROR_MORE_DATA, b"")
    assert w.ReadFile(server, 3) == (0, b"abc")
    w.WriteFile(client, b"")
    assert w.ReadFile(server, 0) == (0, b"")


def test_byte_read_mode_on_a_message_pipe_ignores_boundaries(both: Any) -> None:
    server, client = both()
    w.SetNamedPipeHandleState(server, w.PIPE_READMODE_BYTE)
    for part in (b"abc", b"", b"defg", b"h"):
        w.WriteFile(client, part)
    assert w.ReadFile(server, 5) == (0, b"abcde")
    w.SetNamedPipeHandleState(server, w.PIPE_READMODE_MESSAGE)  # what remains counts as the message
    assert w.ReadFile(server, 10) == (0, b"fg")
    assert w.ReadFile(server, 10) == (0, b"h")


def test_the_read_mode_may_change_inside_a_message(both: Any) -> None:
    server, client = both()
    w.WriteFile(client, b"abcdef")
    w.WriteFile(client, b"ghi")
    assert w.ReadFile(server, 2) == (w.ERROR_MORE_DATA, b"ab")
    w.SetNamedPipeHandleState(server, w.PIPE_READMODE_BYTE)
    assert w.ReadFile(server, 1) == (0, b"c")
    w.SetNamedPipeHandleState(server, w.PIPE_READMODE_MESSAGE)
    assert w.ReadFile(server, 2) == (w.ERROR_MORE_DATA, b"de")
    w.SetNamedPipeHandleState(server, w.PIPE_READMODE_BYTE)
    assert w.ReadFile(server, 99) == (0, b"fghi")


def test_empty_messages_keep_their_place_and_survive_the_writer(both: Any) -> None:
    server, client = both()
    for part in (b"", b"a", b"", b""):
        assert w.WriteFile(client, part) == (0, len(part))
    client.Close()
    assert [w.ReadFile(server, 5) for _ in range(4)] == [(0, b""), (0, b"a"), (0, b""), (0, b"")]
    with fails(errors.BrokenPipe, 109):
        w.ReadFile(server, 5)


@pytest.mark.parametrize("mode", [BYTE, MESSAGE], ids=["byte", "message"])
@pytest.mark.parametrize("access", [INBOUND, OUTBOUND])
def test_the_wrong_direction(access: int, mode: int, both: Any) -> None:
    server, client = both(mode, access)
    reads, writes = (server, client) if access == INBOUND else (client, server)
    for call in (
        lambda: w.WriteFile(reads, b"x"), lambda: w.WriteFile(reads, b""), lambda: w.FlushFileBuffers(reads),
        lambda: w.ReadFile(writes, 1), lambda: w.PeekNamedPipe(writes, 0),
    ):  # fmt: skip
        with fails(errors.AccessDenied, 5):
            call()
    w.WriteFile(writes, b"right")
    assert w.ReadFile(reads, 9) == (0, b"right")
    writes.Close()
    with fails(errors.BrokenPipe, 109):
        w.ReadFile(reads, 9)


def test_pending_reads_are_served_and_one_write_can_serve_several(both: Any) -> None:
    server, client = both(BYTE)
    reads = [in_thread(lambda: w.ReadFile(server, 2)) for _ in range(3)]
    w.WriteFile(client, b"aabbcc")
    assert sorted(read() for read in reads) == [(0, b"aa"), (0, b"bb"), (0, b"cc")]


def test_the_tail_of_a_message_goes_to_the_next_pending_read(both: Any) -> None:
    server, client = both()
    reads = [in_thread(lambda: w.ReadFile(server, 3)) for _ in range(2)]
    w.WriteFile(client, b"abcde")
    assert sorted(read() for read in reads) == [(0, b"de"), (w.ERROR_MORE_DATA, b"abc")]


@pytest.mark.parametrize("mode", [BYTE, MESSAGE], ids=["byte", "message"])
def test_nowait(mode: int, both: Any) -> None:
    server, client = both(mode)
    message = w.PIPE_READMODE_MESSAGE if mode == MESSAGE else 0
    w.SetNamedPipeHandleState(server, w.PIPE_NOWAIT | message)
    with fails(errors.PipeEmpty, 232):
        w.ReadFile(server, 10)
    w.WriteFile(client, b"now")
    assert w.ReadFile(server, 10) == (0, b"now")
    w.WriteFile(server, b"first")
    client.Close()
    with fails(errors.BrokenPipe, 109):
        w.ReadFile(server, 10)


def test_a_nowait_write_of_a_message_that_has_no_room_writes_nothing(both: Any) -> None:
    server, client = both()
    w.SetNamedPipeHandleState(client, w.PIPE_NOWAIT | w.PIPE_READMODE_MESSAGE)
    data, sent = b"x" * 50_000, 0
    while w.WriteFile(client, data) == (0, len(data)):
        sent += 1
        assert sent < 10_000, "no end of room"
    for _ in range(sent):
        assert w.ReadFile(server, 60_000) == (0, data)
    with fails(errors.OperationTimeout, 1460):
        w.ReadFile(server, 10, timeout=0)


PEEKS = [
    (MESSAGE, [10, 3], 0, (0, 13, 10)), (MESSAGE, [10, 3], 4, (4, 13, 6)), (MESSAGE, [10, 3], 10, (10, 13, 0)),
    (MESSAGE, [10, 3], 99, (10, 13, 0)), (MESSAGE, [0, 5], 99, (0, 5, 0)), (MESSAGE, [], 5, (0, 0, 0)),
    (BYTE, [10, 3], 0, (0, 13, 0)), (BYTE, [10, 3], 4, (4, 13, -4)), (BYTE, [], 4, (0, 0, 0)),
]  # fmt: skip


@pytest.mark.parametrize(("mode", "sizes", "size", "expected"), PEEKS)
def test_the_peek_table(mode: int, sizes: list[int], size: int, expected: tuple[int, int, int], both: Any) -> None:
    server, client = both(mode)
    data = [os.urandom(one) for one in sizes]
    for one in data:
        w.WriteFile(client, one)
    for _ in range(2):  # and it consumes nothing
        copied, total, left = w.PeekNamedPipe(server, size)
        assert (len(copied), total, left) == expected
        assert b"".join(data).startswith(copied)
    if mode == MESSAGE:  # it stops at the boundary in byte read mode, too
        w.SetNamedPipeHandleState(server, w.PIPE_READMODE_BYTE)
        copied, total, left = w.PeekNamedPipe(server, size)
        assert (len(copied), total, left) == expected


def test_peek_of_many_messages_and_of_a_large_one(both: Any) -> None:
    server, client = both()
    for size in (5, 0, 70_000, 0, 3):
        w.WriteFile(client, b"m" * size)
    assert w.PeekNamedPipe(server, 1) == (b"m", 70_008, 4)
    assert w.ReadFile(server, 2) == (w.ERROR_MORE_DATA, b"mm")
    assert w.PeekNamedPipe(server, 99) == (b"mmm", 70_006, 0)


@pytest.mark.parametrize("mode", [BYTE, MESSAGE], ids=["byte", "message"])
def test_flush_waits_until_all_was_read(mode: int, both: Any) -> None:
    server, client = both(mode)
    w.FlushFileBuffers(client)  # empty: at once
    w.WriteFile(client, b"abcd")
    with fails(errors.OperationTimeout, 1460):
        w.FlushFileBuffers(client, timeout=0.02)
    flush = in_thread(lambda: w.FlushFileBuffers(client))
    w.ReadFile(server, 2)
    waiting_in_kernel(flush)
    assert flush.thread.is_alive()
    w.ReadFile(server, 2)
    flush()


# -- 1.6 transact, call, wait ------------------------------------------------------------------------------------------


def test_transact(both: Any) -> None:
    server, client = both()
    answer = in_thread(lambda: (w.ReadFile(server, 99), w.WriteFile(server, b"answer")))
    assert w.TransactNamedPipe(client, b"question", 99) == (0, b"answer")
    assert answer()[0] == (0, b"question")
    answer = in_thread(lambda: (w.ReadFile(server, 99), w.WriteFile(server, b"longer")))
    assert w.TransactNamedPipe(client, b"", 4) == (w.ERROR_MORE_DATA, b"long")
    assert w.ReadFile(client, 9) == (0, b"er")
    assert answer()[0] == (0, b"")


def test_transact_wants_message_read_mode_and_nothing_unread(both: Any) -> None:
    server, client = both()
    w.SetNamedPipeHandleState(client, w.PIPE_READMODE_BYTE)
    with fails(errors.BadPipe, 230):
        w.TransactNamedPipe(client, b"x", 9)
    w.SetNamedPipeHandleState(client, w.PIPE_READMODE_MESSAGE)
    for unread in (b"u", b""):
        w.WriteFile(server, unread)
        with fails(errors.PipeBusy, 231):
            w.TransactNamedPipe(client, b"x", 9)
        assert w.ReadFile(client, 9) == (0, unread)
    assert w.PeekNamedPipe(server, 9) == (b"", 0, 0)  # nothing was written
    _, byte_client = both(BYTE, name=r"\\.\pipe\bytes")
    with fails(errors.BadPipe, 230):
        w.TransactNamedPipe(byte_client, b"x", 9)


def call_server(made: Any, answers: list[bytes], mode: int = MESSAGE) -> Any:
    """Answers each client once, then sees it go."""
    server = made(w.CreateNamedPipe(P, DUPLEX, mode, 1))

    def serve() -> list[bytes]:
        seen = []
        for answer in answers:
            w.ConnectNamedPipe(server)
            seen.append(w.ReadFile(server, 999)[1])
            w.WriteFile(server, answer)
            with fails(errors.BrokenPipe, 109):
                w.ReadFile(server, 9)
            w.DisconnectNamedPipe(server)
        return seen

    return in_thread(serve)


def test_call(made: Any) -> None:
    with fails(errors.PipeNotFound, 2):
        w.CallNamedPipe(P, b"q", 99, w.NMPWAIT_WAIT_FOREVER)
    serve = call_server(made, [b"a", b"", b"too long"])
    assert w.CallNamedPipe(P, b"question", 99, w.NMPWAIT_WAIT_FOREVER) == b"a"
    assert w.CallNamedPipe(P, b"", 99, w.NMPWAIT_WAIT_FOREVER) == b""
    with fails(errors.MoreData, 234) as caught:  # the rest is lost
        w.CallNamedPipe(P, b"question", 3, w.NMPWAIT_WAIT_FOREVER)
    assert caught.value.data == b"too"
    assert serve() == [b"question", b"", b"question"]


def test_call_of_a_byte_pipe_and_of_a_busy_one(both: Any) -> None:
    with w.CreateNamedPipe(P, DUPLEX, BYTE, 1), fails(errors.InvalidParameter, 87):
        w.CallNamedPipe(P, b"q", 99, 1000)
    both()
    for timeout in (w.NMPWAIT_USE_DEFAULT_WAIT, w.NMPWAIT_NOWAIT, 30):
        with pytest.raises(errors.OperationTimeout):
            w.CallNamedPipe(P, b"q", 99, timeout)


def test_wait(both: Any, made: Any) -> None:
    with fails(errors.PipeNotFound, 2):
        w.WaitNamedPipe(P, w.NMPWAIT_WAIT_FOREVER)
    server = made(w.CreateNamedPipe(P, DUPLEX, MESSAGE, 2, nDefaultTimeOut=30))
    for timeout in (w.NMPWAIT_USE_DEFAULT_WAIT, w.NMPWAIT_NOWAIT, w.NMPWAIT_WAIT_FOREVER, 5):
        w.WaitNamedPipe(P, timeout)  # reserves nothing
    made(w.CreateFile(P, RW))
    for timeout in (w.NMPWAIT_USE_DEFAULT_WAIT, w.NMPWAIT_NOWAIT, 30):
        with pytest.raises(errors.OperationTimeout):
            w.WaitNamedPipe(P, timeout)
    w.DisconnectNamedPipe(server)  # alone does not wake it
    with pytest.raises(errors.OperationTimeout):
        w.WaitNamedPipe(P, 30)
    wait = in_thread(lambda: w.WaitNamedPipe(P, w.NMPWAIT_WAIT_FOREVER))
    waiting_in_kernel(wait)
    with fails(errors.OperationTimeout, 1460):
        w.ConnectNamedPipe(server, timeout=0)
    wait()
    made(w.CreateFile(P, RW))
    wait = in_thread(lambda: w.WaitNamedPipe(P, 10_000))
    made(w.CreateNamedPipe(P, DUPLEX, MESSAGE, 2))
    wait()


# -- 1.7 queries -------------------------------------------------------------------------------------------------------


def test_info_of_both_ends(both: Any) -> None:
    server, client = both(MESSAGE, most=7, nOutBufferSize=11, nInBufferSize=22)
    assert w.GetNamedPipeInfo(server) == (w.PIPE_SERVER_END | w.PIPE_TYPE_MESSAGE, 11, 22, 7)
    assert w.GetNamedPipeInfo(client) == (w.PIPE_TYPE_MESSAGE, 11, 22, 7)
    byte_server, byte_client = both(BYTE, name=r"\\.\pipe\bytes")
    assert w.GetNamedPipeInfo(byte_server)[0] == w.PIPE_SERVER_END
    assert w.GetNamedPipeInfo(byte_client)[0] == 0


def test_state_is_of_each_end(both: Any) -> None:
    server, client = both(most=3)
    w.SetNamedPipeHandleState(client, w.PIPE_READMODE_BYTE | w.PIPE_NOWAIT)
    assert w.GetNamedPipeHandleState(client)[0] == w.PIPE_NOWAIT
    assert w.GetNamedPipeHandleState(server) == (w.PIPE_READMODE_MESSAGE, 1)
    w.SetNamedPipeHandleState(client, None)
    assert w.GetNamedPipeHandleState(client)[0] == w.PIPE_NOWAIT


def test_what_cannot_be_set(both: Any) -> None:
    server, client = both(BYTE)
    for handle in (server, client):
        for mode in (w.PIPE_READMODE_MESSAGE, w.PIPE_TYPE_MESSAGE, 8, 0x100):
            with fails(errors.InvalidParameter, 87):
                w.SetNamedPipeHandleState(handle, mode)
        for more in ((1, None), (None, 1), (0, 0)):
            with fails(errors.InvalidParameter, 87):
                w.SetNamedPipeHandleState(handle, None, *more)


def test_the_process_ids_from_both_ends(made: Any, start: Any) -> None:
    server = made(w.CreateNamedPipe(P, DUPLEX, MESSAGE, 1))

    def work(tell: Any) -> None:
        client = w.CreateFile(P, RW)
        tell((w.GetNamedPipeServerProcessId(client), w.GetNamedPipeClientProcessId(client)))
        w.ReadFile(client, 1)

    child = start(work)
    assert child.hear() == (os.getpid(), child.pid)
    assert (w.GetNamedPipeServerProcessId(server), w.GetNamedPipeClientProcessId(server)) == (os.getpid(), child.pid)


def test_closed_handles(both: Any) -> None:
    server, client = both()
    for handle in (server, client):
        handle.Close()
        handle.Close()
        for call in (
            w.FlushFileBuffers, w.GetNamedPipeInfo, w.GetNamedPipeHandleState, w.GetNamedPipeClientProcessId,
            w.GetNamedPipeServerProcessId, w.CancelIoEx, lambda h: w.ReadFile(h, 1), lambda h: w.WriteFile(h, b"x"),
            lambda h: w.PeekNamedPipe(h, 1), lambda h: w.TransactNamedPipe(h, b"", 1),
            lambda h: w.SetNamedPipeHandleState(h, 0),
        ):  # fmt: skip
            with fails(errors.ObjectClosed, 6):
                call(handle)


def test_cancel_of_nothing_is_harmless(both: Any) -> None:
    server, client = both()
    w.CancelIoEx(server)
    w.WriteFile(client, b"still")
    assert w.ReadFile(server, 9) == (0, b"still")
