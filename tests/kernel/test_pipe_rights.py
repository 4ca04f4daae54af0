"""Who may open a pipe and who may not; what a hostile user can do to others: cost them one clear error."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import stat
import time
from pathlib import Path
from typing import Any

import pytest
from handoff_peers import Peer, patiently
from pipe_world import remains, world_of
from sync_world import in_thread

from portway import NamedPipeClient, NamedPipeServer, Security, call_pipe, errors, list_pipes, wait_pipe
from portway.kernel.device import Device
from portway.kernel.pipe_name import parse_pipe_name
from portway.kernel.process import overflow_uid
from portway.wire import pipe as wire

ALICE, BOB, CAROL = 61234, 61235, 61236
pytestmark = [
    pytest.mark.usefixtures("pipe_root"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can start processes of other users"),
]


@pytest.fixture
def made() -> Any:
    with contextlib.ExitStack() as stack:
        yield lambda one: stack.enter_context(one)


@pytest.fixture
def user(peer: Any, pipe_root: str) -> Any:
    """``user(uid, gid=..., groups=...)``: a process of that user, in the test's world."""

    def start(uid: int) -> Peer:
        process = peer(uid)
        process.run("os.environ.update(env)", env=world_of(pipe_root))
        return process

    return start


SERVE = "s = portway.NamedPipeServer('p', mode=mode, {options})"


def serves(process: Peer, options: str = "", mode: str = "message") -> None:
    process.run(SERVE.format(options=options), mode=mode)


def reaches(client: Peer, server: Peer, **options: Any) -> bool:
    """Whether the client gets through to that server, and back."""
    client.start("c = portway.NamedPipeClient('p', **o); c.send(b'x'); c.receive(9, timeout=10)", o=options)
    server.run("p = s.accept(10); p.send(p.receive(9, timeout=10) + b'!'); p.close()")
    return bool(client.result() == b"x!")


# -- grants ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["byte", "message"])
def test_the_default_is_the_owner_only(mode: str, user: Any) -> None:
    alice, bob = user(ALICE), user(BOB)
    serves(alice, mode=mode)
    for call in ("NamedPipeClient('p')", "NamedPipeClient('p', server_uid=61234)", "call_pipe('p', b'')"):
        with pytest.raises(errors.AccessDenied) as caught:
            bob.run(f"portway.{call}")
        assert caught.value.code == 5
    assert reaches(user(ALICE), alice)
    with NamedPipeClient("p") as root:  # root may always
        root.send(b"r")
        assert alice.run("p = s.accept(10); p.receive(9)") == b"r"


@pytest.mark.parametrize("mode", ["byte", "message"])
def test_grants(mode: str, user: Any) -> None:
    alice, bob, carol = user(ALICE), user(BOB), user(CAROL)
    for options, may in (
        ("security=portway.Security.everyone()", {BOB, CAROL}),
        ("security=portway.Security.uids(61235)", {BOB}),
        ("security=portway.Security.group(61236)", {CAROL}),
        ("security=portway.Security.uids(61235) | portway.Security.group(61236)", {BOB, CAROL}),
    ):
        serves(alice, options, mode)
        for _ in range(3):  # of the sockets that are made later, too
            for process, uid in ((bob, BOB), (carol, CAROL)):
                if uid in may:
                    assert reaches(process, alice)
                else:
                    with pytest.raises(errors.AccessDenied):
                        process.run("portway.NamedPipeClient('p')")
                    with pytest.raises(errors.AccessDenied):
                        process.run("portway.call_pipe('p', b'', timeout=0)")
        alice.run("s.close()")


def test_grants_whatever_the_umask(user: Any) -> None:
    alice, bob = user(ALICE), user(BOB)
    for umask, options, may in ((0o777, "security=portway.Security.everyone()", True), (0, "", False)):
        alice.run("import os; os.umask(umask)", umask=umask)
        serves(alice, options)
        if may:
            assert reaches(bob, alice)
        else:
            with pytest.raises(errors.AccessDenied):
                bob.run("portway.NamedPipeClient('p')")
        alice.run("s.close()")


def test_no_socket_is_ever_wider_than_meant(user: Any, pipe_root: str) -> None:
    """Looked at all the time while instances come and go: 0600 or the grant, never more."""
    alice = user(ALICE)
    alice.run("os.umask(0)")
    alice.start("""
for _ in range(40):
    with portway.NamedPipeServer('p', mode='message') as s, portway.NamedPipeClient('p'):
        s.accept(5).close()
""")
    seen = set()
    while not alice._line.poll(0):
        for folder, _, names in os.walk(pipe_root):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    seen.add(stat.S_IMODE(os.lstat(f"{folder}/{name}").st_mode))
    alice.result()
    assert seen == {0o600}


def test_grants_are_to_connect_never_to_control(user: Any, pipe_root: str) -> None:
    alice, bob = user(ALICE), user(BOB)
    serves(alice, "security=portway.Security.everyone(), max_instances=5")
    for call in (
        "portway.NamedPipeServer('p', mode='message')", "portway.NamedPipeServer('P', first_instance=True)",
        "portway.NamedPipeServer('p', security=portway.Security.everyone())",
    ):  # fmt: skip
        with pytest.raises(errors.AccessDenied, match=f"uid {ALICE} serves the pipe") as caught:
            bob.run(call)
        assert caught.value.code == 5
    with pytest.raises(errors.AccessDenied):
        NamedPipeServer("p")  # nor root, by accident
    folder = f"{pipe_root}/portway-pipe-{ALICE}/{parse_pipe_name('p').key}"
    assert bob.run("""
wrong = []
for call in (
    lambda: os.open(f"{folder}/record", os.O_RDWR), lambda: os.unlink(f"{folder}/record"), lambda: os.listdir(folder),
    lambda: os.rename(folder, folder + "x"), lambda: os.mkdir(f"{folder}/y"),
    lambda: os.truncate(f"{folder}/record", 0),
    lambda: os.open(f"{folder}/0.1", os.O_CREAT | os.O_RDWR),
):
    try:
        call()
        wrong.append(call)
    except PermissionError:
        pass
len(wrong)
""", folder=folder) == 0  # fmt: skip
    assert reaches(bob, alice)
    alice.run("s.close()")
    bob.run("s = portway.NamedPipeServer('p', mode='message')")  # free: anybody's


def test_owner_only_pipes_of_two_users_live_side_by_side(user: Any, pipe_root: str) -> None:
    """Unless they share .NET's folder, where the second sees that the name is served."""
    alice, bob = user(ALICE), user(BOB)
    serves(alice)
    with pytest.raises(errors.AccessDenied, match="served by another program"):
        serves(bob)
    bob.run("os.mkdir(path); os.environ['TMPDIR'] = path", path=f"{pipe_root}/b")
    serves(bob)
    assert reaches(user(ALICE), alice)
    bobs_client = user(BOB)
    bobs_client.run("os.environ['TMPDIR'] = path", path=f"{pipe_root}/b")
    assert reaches(bobs_client, bob)


# -- whose pipe --------------------------------------------------------------------------------------------------------


def test_ones_own_first_then_others(user: Any) -> None:
    alice, bob, carol = user(ALICE), user(BOB), user(CAROL)
    for process in (alice, bob):  # folders of their own, so that neither sees the other's
        process.run("os.mkdir(path); os.environ['TMPDIR'] = path", path=f"/tmp/pw-{process.pid}")
    serves(bob)
    serves(alice, "security=portway.Security.everyone()")
    assert reaches(user(BOB), bob)
    assert reaches(carol, alice)
    bob.run("s.close()")
    assert reaches(user(BOB), alice)
    for process in (alice, bob):
        process.run("s.close(); os.rmdir(os.environ['TMPDIR'])")


def test_the_order_of_places(user: Any, pipe_root: str) -> None:
    for uid in (BOB, ALICE):
        user(uid).run("portway.NamedPipeServer('q').close()")
    NamedPipeServer("q").close()
    assert [one.uid for one in Device("pipe").places()] == [0, ALICE, BOB]
    bob = user(BOB)
    assert bob.run("from portway.kernel.device import Device; [one.uid for one in Device('pipe').places()]") == [
        BOB, 0, ALICE,
    ]  # fmt: skip


def test_server_uid_pins(user: Any, made: Any) -> None:
    alice, carol = user(ALICE), user(CAROL)
    serves(alice, "security=portway.Security.everyone()")
    assert reaches(carol, alice, server_uid=ALICE)
    for uid in (BOB, 0, CAROL):
        for call in ("NamedPipeClient('p', server_uid=uid)", "wait_pipe('p', server_uid=uid)",
                     "call_pipe('p', b'', server_uid=uid)"):  # fmt: skip
            with pytest.raises(errors.AccessDenied, match=f"belongs to uid {ALICE}, not {uid}"):  # .NET's path is there
                carol.run(f"portway.{call}", uid=uid)
            with pytest.raises(errors.PipeNotFound):
                carol.run(f"portway.{call}".replace("'p'", "'q'"), uid=uid)
    carol.run("portway.wait_pipe('p', server_uid=uid)", uid=ALICE)


def test_server_uid_of_a_stream_at_dotnets_path(user: Any, pipe_root: str) -> None:
    """A server that is not of portway is found by its path; whose it is, the kernel says."""
    alice, carol = user(ALICE), user(CAROL)
    alice.run("""
s = socket.socket(socket.AF_UNIX); s.bind(path); s.listen(5); os.chmod(path, 0o666)
""", path=f"{pipe_root}/tmp/CoreFxPipe_p")  # fmt: skip
    carol.run("portway.NamedPipeClient('p', server_uid=uid).close()", uid=ALICE)
    with pytest.raises(errors.AccessDenied, match=f"belongs to uid {ALICE}, not {BOB}"):
        carol.run("portway.NamedPipeClient('p', server_uid=uid)", uid=BOB)


def test_peer_identity_from_both_ends(user: Any, made: Any) -> None:
    alice, bob = user(ALICE), user(BOB)
    serves(alice, "security=portway.Security.everyone()")
    bob.start("c = portway.NamedPipeClient('p'); c.send(b'x'); (c.peer.pid, c.peer.uid, c.peer.gid)")
    assert alice.run("p = s.accept(10); (p.peer.pid, p.peer.uid, p.peer.gid, p.peer.start_time > 0)") == (
        bob.pid, BOB, BOB, True,
    )  # fmt: skip
    assert bob.result() == (alice.pid, ALICE, ALICE)
    (info,) = list_pipes()
    (line,) = [one for one in info.detail if one.state == "connected"]
    assert (line.client_uid, line.client_pid, line.server_pid, info.owner) == (BOB, bob.pid, alice.pid, ALICE)


def test_listing_shows_ones_own_and_what_one_may_see(user: Any, made: Any) -> None:
    alice, bob = user(ALICE), user(BOB)
    serves(alice)
    made(NamedPipeServer("shared", security=Security.everyone()))
    assert [one.name for one in list_pipes()] == ["p", "shared"]
    assert bob.run("[(one.name, one.kind, one.owner) for one in portway.list_pipes()]") == [
        ("p", "portway", ALICE), ("shared", "portway", 0),  # of others' by the files at .NET's path alone
    ]  # fmt: skip


# -- a hostile owner ---------------------------------------------------------------------------------------------------

ANSWERS = (
    errors.PipeNotFound, errors.PipeBusy, errors.AccessDenied, errors.ObjectCorrupt, errors.OperationTimeout,
    errors.BrokenPipe, errors.BadPipe, errors.InvalidParameter,
)  # fmt: skip
KEY = parse_pipe_name("p").key


def everything(seconds: float = 5.0) -> list[Any]:
    """What a client may ask about the name; each answer is a result or one of our errors, soon and in little memory."""
    answers: list[Any] = []
    for call in (
        lambda: NamedPipeClient("p").close(), lambda: NamedPipeClient("p", server_uid=ALICE).close(),
        lambda: wait_pipe("p", 0.05), lambda: call_pipe("p", b"x", timeout=0.05),
        lambda: NamedPipeClient("p", timeout=0.05, appear=True).close(), list_pipes,
        lambda: NamedPipeServer("p").close(),
    ):  # fmt: skip
        before = time.monotonic()
        try:
            answers.append(call())
        except ANSWERS as error:
            answers.append(error)
        assert time.monotonic() - before < seconds
    return answers


@pytest.fixture
def hostile(user: Any, pipe_root: str) -> Any:
    """``hostile(code, ...)`` runs in alice's process, who has put a folder of the name there."""
    alice = user(ALICE)
    place = f"{pipe_root}/portway-pipe-{ALICE}"
    alice.run("""
os.umask(0)
os.mkdir(place, 0o711); os.mkdir(f"{place}/{key}", 0o711); record = f"{place}/{key}/record"
from portway.wire import pipe as wire
from portway.kernel import ofdlock
header = wire.Header("p", True, wire.Direction.DUPLEX, 255, 0, 0, 50, wire.Flag.SHARED, 1, "")
def lines(*many):
    return wire.pack_header(header) + b"".join(map(wire.pack_line, many))
def put(data, alive=True):
    global fd
    fd = os.open(record, os.O_RDWR | os.O_CREAT, 0o644)
    os.write(fd, data)
    if alive:
        assert all(ofdlock.try_lock(fd, at) for at in (16, 17, 300))
""", place=place, key=KEY)  # fmt: skip
    alice.folder = f"{place}/{KEY}"
    return alice


def test_random_bytes_in_a_record(hostile: Any) -> None:
    noise = random.Random(1)
    hostile.run("put(lines(wire.FREE))")
    for _ in range(60):
        data = bytearray(
            hostile.run("lines(*[wire.FREE._replace(generation=n, state=1, ticket=n) for n in range(255)])")
        )
        for _ in range(noise.choice([1, 3, 100])):
            at = noise.choice([noise.randrange(0x100), noise.randrange(len(data))])
            data[at] = noise.randrange(256)
        hostile.run("os.pwrite(fd, data, 0)", data=bytes(data))
        everything()
    for size in (0, 7, 4095, 4096, 5000, 40_000, 1 << 20):
        hostile.run("os.ftruncate(fd, 0); os.pwrite(fd, data, 0)", data=noise.randbytes(size))
        assert not any(answer is None for answer in everything()[:5])


@pytest.mark.parametrize("change", [
    "magic", "version", "kind", "direction 0", "direction 4", "most 0", "most 256", "name size", "name bytes",
    "front size",
])  # fmt: skip
def test_headers_that_cannot_be(change: str, hostile: Any) -> None:
    data = bytearray(hostile.run("lines(wire.FREE)"))
    at, value = {
        "magic": (0, b"X"), "version": (8, b"\2"), "kind": (12, b"\2"), "direction 0": (16, b"\0"),
        "direction 4": (16, b"\4"), "most 0": (20, b"\0\0"), "most 256": (20, b"\0\1"),
        "name size": (0x30, b"\xff\xff\xff\xff"), "name bytes": (0x100, b"\xff"), "front size": (0x34, b"\xff"),
    }[change]  # fmt: skip
    data[at : at + len(value)] = value
    hostile.run("put(data)", data=bytes(data))
    with pytest.raises(errors.ObjectCorrupt, match=hostile.folder):
        NamedPipeClient("p")
    everything()
    with NamedPipeServer("p"), NamedPipeClient("p"):  # of our own: nobody is in the way
        pass


def test_a_record_that_is_cut_and_grows_while_it_is_read(hostile: Any) -> None:
    hostile.run("put(lines(*[wire.FREE._replace(generation=n, state=1, ticket=n) for n in range(255)]))")
    hostile.run("""
stop = threading.Event()
def work():
    data = os.pread(fd, 1 << 20, 0)
    while not stop.is_set():
        os.ftruncate(fd, 0); os.ftruncate(fd, 1 << 40); os.ftruncate(fd, 5000); os.pwrite(fd, data, 0)
thread = threading.Thread(target=work); thread.start()
""")
    waiting = in_thread(lambda: [attempt(0.3) for _ in range(4)])
    for _ in range(40):
        everything()
    waiting()
    hostile.run("stop.set(); thread.join()")


def attempt(timeout: float) -> None:
    with contextlib.suppress(*ANSWERS):
        NamedPipeClient("p", timeout=timeout).close()


def test_a_word_that_goes_away_under_a_waiter(hostile: Any) -> None:
    """The waiter has the page mapped for the kernel to compare; cutting the file costs it an error, no signal."""
    hostile.run("put(lines(wire.FREE._replace(generation=1, state=2)))")
    waiting = [in_thread(lambda: attempt(1.0)), in_thread(lambda: wait_busy())]
    patiently(lambda: all(join.thread.is_alive() for join in waiting))
    for size in (0, 10, 0):
        hostile.run("os.ftruncate(fd, size)", size=size)
    for join in waiting:
        join()


def wait_busy() -> None:
    with contextlib.suppress(*ANSWERS):
        wait_pipe("p", 1.0)


def test_lines_that_lead_to_somebody_elses_sockets(hostile: Any, user: Any, pipe_root: str, made: Any) -> None:
    """A path cannot be named by two numbers; a link can lie there. Whoever answers is asked who he is."""
    bob = user(BOB)
    target = f"{pipe_root}/bob.socket"
    bob.run(
        """
s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.bind(path); os.chmod(path, 0o666); s.listen(5)
""",
        path=target,
    )
    hostile.run(
        "put(lines(wire.FREE._replace(generation=7, state=1)))\nos.symlink(target, f'{place}/{key}/0.7')", target=target
    )
    with pytest.raises(errors.AccessDenied, match=f"served by uid {BOB}, not by the folder's owner"):
        NamedPipeClient("p")
    everything()
    hostile.run("os.unlink(f'{place}/{key}/0.7'); os.symlink('/etc/passwd', f'{place}/{key}/0.7')")
    for answer in everything()[:2]:
        assert isinstance(answer, ANSWERS)
    assert Path("/etc/passwd").exists() and Path(target).exists()


@pytest.mark.parametrize("what", ["fifo", "directory", "symlink", "device", "socket", "another user's file"])
def test_what_is_no_record(what: str, hostile: Any, pipe_root: str) -> None:
    other = Path(pipe_root, "other")
    if what == "another user's file":
        os.link(make_file(other), f"{hostile.folder}/record")
    elif what == "device":
        os.mknod(f"{hostile.folder}/record", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    else:
        make_file(other)
        hostile.run({
            "fifo": "os.mkfifo(record, 0o666)", "directory": "os.mkdir(record, 0o777)",
            "symlink": "os.symlink(other, record)",
            "socket": "k = socket.socket(socket.AF_UNIX); k.bind(record); os.chmod(record, 0o666)",
        }[what], other=str(other))  # fmt: skip
    answers = everything()
    assert all(isinstance(answer, ANSWERS) for answer in answers[:5]), answers
    assert other.exists() or what == "device"
    with NamedPipeServer("p"), NamedPipeClient("p"):
        pass


def make_file(path: Path) -> str:
    path.write_bytes(wire.pack_header(wire.Header("p", True, wire.Direction.DUPLEX, 9, 0, 0, 5, wire.Flag(0), 1, "")))
    path.chmod(0o644)
    return str(path)


@pytest.mark.parametrize("what", ["fifo", "file", "symlink", "mode", "another's"])
def test_what_is_no_folder_of_a_name(what: str, hostile: Any, pipe_root: str) -> None:
    hostile.run("put(lines(wire.FREE._replace(generation=7, state=1)))\nos.rename(f'{place}/{key}', f'{place}/moved')")
    hostile.run({
        "fifo": "os.mkfifo(f'{place}/{key}', 0o666)", "file": "open(f'{place}/{key}', 'w').close()",
        "symlink": "os.symlink('moved', f'{place}/{key}')", "mode": "os.mkdir(f'{place}/{key}', 0o777)",
        "another's": "os.chmod(place, 0o777)",
    }[what])  # fmt: skip
    answers = everything()
    assert all(isinstance(answer, ANSWERS) for answer in answers[:5]), answers


@pytest.mark.parametrize("what", ["symlink", "file", "mode", "owner", "fifo"])
def test_what_is_no_place_of_ours(what: str, user: Any, pipe_root: str) -> None:
    """Somebody was here before us: said by name, nothing is made there."""
    bob = user(BOB)
    place = f"{pipe_root}/portway-pipe-{BOB}"
    user(ALICE).run({
        "symlink": "os.mkdir(place + 'x', 0o777); os.symlink(place + 'x', place)", "file": "open(place, 'w').close()",
        "mode": "", "owner": "os.mkdir(place, 0o711)", "fifo": "os.mkfifo(place, 0o666)",
    }[what], place=place)  # fmt: skip
    if what == "mode":
        bob.run("os.mkdir(place); os.chmod(place, 0o777)", place=place)
    for call in ("NamedPipeServer('p')", "NamedPipeClient('p', timeout=5, appear=True)", "wait_pipe('p')"):
        with pytest.raises(errors.AccessDenied, match=place):
            bob.run(f"portway.{call}")


def test_hostile_files_at_dotnets_path(user: Any, pipe_root: str) -> None:
    """Never removed, never followed to somebody else's file; portway's clients are served whatever lies there."""
    alice, bob = user(ALICE), user(BOB)
    path = f"{pipe_root}/tmp/CoreFxPipe_p"
    victim = Path(pipe_root, "victim")
    victim.write_text("precious")
    for code in (
        "open(path, 'w').close()", "os.mkfifo(path, 0o666)", "os.symlink(victim, path)", "os.mkdir(path)",
        "k = socket.socket(socket.AF_UNIX); k.bind(path); k.close(); os.chmod(path, 0o777)",
        "os.symlink('/nowhere/at/all', path)",
    ):  # fmt: skip
        alice.run(code, path=path, victim=str(victim))
        before = os.lstat(path)
        bob.run("""
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with portway.NamedPipeServer('p') as s, portway.NamedPipeClient('p') as c, s.accept(5) as pipe:
        c.send(b"x"); assert pipe.receive(1) == b"x"
        state = s.dotnet_state
""")
        assert bob.run("state") in ("blocked", "taken")
        assert bob.run("[one.category.__name__ for one in caught]") == ["PipeNameTaken"]
        after = os.lstat(path)
        assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)
        alice.run("(os.rmdir if os.path.isdir(path) and not os.path.islink(path) else os.unlink)(path)", path=path)
    assert victim.read_text() == "precious"
    alice.run("k = socket.socket(socket.AF_UNIX); k.bind(path); k.listen()", path=path)
    for code in ("", "k.close()"):  # served; and a dead one that nobody else may ask
        alice.run(code)
        with pytest.raises(errors.AccessDenied, match="served by another program"):
            bob.run("portway.NamedPipeServer('p')")


# -- hostile clients ---------------------------------------------------------------------------------------------------


def raw(mode: str, address: str) -> socket.socket:
    kind = socket.SOCK_SEQPACKET if mode == "message" else socket.SOCK_STREAM
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.connect(address)
    return sock


def listening(root: str) -> list[str]:
    """The sockets of the instances that listen, oldest first."""
    found = [str(one) for one in Path(root).glob(f"portway-pipe-0/{KEY}/*.*")]
    return sorted(found, key=lambda one: os.lstat(one).st_ctime_ns)


@pytest.mark.parametrize("mode", ["byte", "message"])
def test_a_client_that_says_nothing_costs_one_instance(mode: Any, made: Any, pipe_root: str) -> None:
    server = made(NamedPipeServer("p", mode=mode))
    serve = in_thread(lambda: server.serve(lambda pipe: pipe.send(pipe.receive(9))))
    with raw(mode, listening(pipe_root)[0]):
        for _ in range(20):
            with NamedPipeClient("p", timeout=5) as client:
                client.send(b"x")
                assert client.receive(9, timeout=5) == b"x"
    server.close()
    serve()


@pytest.mark.parametrize(
    "packets",
    [
        [b""], [b"x"], [b"1234567"], [b"\xff" * 8], [b"\5" + b"\0" * 7 + b"more than said"], [b"\0" * 7 + b"\2"],
        [b"\0" * 7 + b"\1" + b"payload"], [b"\xff" * 7 + b"\0" + b"x" * 10],
        [(1 << 20).to_bytes(8, "little") + b"x" * 65536, b"\1" + b"\0" * 7 + b"y"],
        [(1 << 55).to_bytes(8, "little") + b"x" * 65536], [b"\3" + b"\0" * 7 + b"abc" * 30000],
    ],
)  # fmt: skip
def test_packets_that_cannot_be(packets: list[bytes], made: Any, pipe_root: str) -> None:
    """Half a frame, a lying count, an unknown kind: an error of that conversation, no memory, no hang."""
    server = made(NamedPipeServer("p", mode="message"))
    with raw("message", listening(pipe_root)[0]) as client:
        for packet in packets:
            client.send(packet)
    with server.accept(5) as pipe, pytest.raises((errors.PipeError, errors.ObjectCorrupt)):
        while True:
            pipe.receive(timeout=5)
    with NamedPipeClient("p") as client, server.accept(5) as pipe:
        client.send(b"good")
        assert pipe.receive() == b"good"


def test_half_a_message_and_then_silence(made: Any, pipe_root: str) -> None:
    server = made(NamedPipeServer("p", mode="message"))
    with raw("message", listening(pipe_root)[0]) as client, server.accept(5) as pipe:
        client.send((200_000).to_bytes(8, "little") + b"x" * 65536)
        for _ in range(2):
            with pytest.raises(errors.OperationTimeout):
                pipe.receive(timeout=0.03)
        assert pipe.peek(3)[0] in (b"xxx", b"")
        client.close()
        with pytest.raises(errors.BrokenPipe):
            pipe.receive(timeout=5)


@pytest.mark.parametrize("mode", ["byte", "message"])
def test_floods_of_connections(mode: Any, made: Any, peer: Any, pipe_root: str) -> None:
    """A crowd that connects and leaves as fast as it can; everybody else is still served."""
    server = made(NamedPipeServer("p", mode=mode, max_instances=8))
    serve = in_thread(lambda: server.serve(lambda pipe: pipe.send(pipe.receive(9, timeout=10))))
    flood = peer()
    flood.run("os.environ.update(env)", env=world_of(pipe_root))
    flood.run("""
stop = threading.Event()
def work():
    while not stop.is_set():
        try:
            portway.NamedPipeClient("p").close()
        except errors.PipeError:
            pass
threads = [threading.Thread(target=work) for _ in range(3)]
for one in threads: one.start()
""")
    for _ in range(30):
        with NamedPipeClient("p", timeout=20) as client:
            client.send(b"x")
            assert client.receive(9, timeout=20) == b"x"
    flood.run("stop.set(); [one.join() for one in threads]")
    server.close()
    serve()


def test_a_client_that_never_reads_stops_only_itself(made: Any) -> None:
    server = made(NamedPipeServer("p", mode="message"))
    made(NamedPipeClient("p"))
    with server.accept(5) as pipe:
        with pytest.raises(errors.OperationTimeout):
            pipe.send(b"x" * (8 << 20), timeout=0.05)
        with NamedPipeClient("p") as client, server.accept(5) as other:
            other.send(b"for another")
            assert client.receive() == b"for another"


def test_a_hostile_record_of_our_own_is_told(pipe_root: str) -> None:
    """Of this very user: nobody else could have put it there, and nothing is guessed."""
    with NamedPipeServer("p"):
        pass
    folder = Path(pipe_root, "portway-pipe-0", KEY)
    for make in (
        lambda: (folder / "record").write_bytes(b"nonsense" * 1000), lambda: os.mkfifo(folder / "record"),
        lambda: (folder / "record").symlink_to("/etc/passwd"), lambda: (folder / "record").mkdir(),
    ):  # fmt: skip
        folder.mkdir(mode=0o700)
        make()
        for call in (NamedPipeServer, NamedPipeClient):
            with pytest.raises((errors.PortwayError, OSError), match=KEY):
                call("p")
        list_pipes()
        (folder / "record").rmdir() if (folder / "record").is_dir() else (folder / "record").unlink()
        folder.rmdir()
    assert remains(pipe_root) == []


def test_the_overflow_uid_is_nobody(user: Any) -> None:
    """Who comes from another user namespace without a number here is never taken for the user of that number."""
    nobody, carol = user(overflow_uid()), user(CAROL)
    serves(nobody, "security=portway.Security.everyone()")
    for call in ("NamedPipeClient('p', server_uid=uid)", "wait_pipe('p', server_uid=uid)"):
        with pytest.raises(errors.AccessDenied, match="is nobody"):
            carol.run(f"portway.{call}", uid=overflow_uid())


def test_another_users_closed_pipe_does_not_end_waiting_for_a_name(user: Any, made: Any) -> None:
    alice, bob = user(ALICE), user(BOB)
    name = "n" * 200  # without .NET's path
    alice.run("s = portway.NamedPipeServer(name)", name=name)
    with pytest.raises(errors.AccessDenied):
        bob.run("portway.NamedPipeClient(name, timeout=20)", name=name)
    bob.start("c = portway.NamedPipeClient(name, timeout=20, appear=True); c.peer.uid", name=name)
    other = user(BOB)
    other.run("s = portway.NamedPipeServer(name)", name=name)
    assert bob.result() == BOB
