"""Names, roots, lifetimes: who meets whom, what is left, and what is refused."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sync_world import Process, files, until

import portway
from portway import Event, Mutex, Semaphore, WaitableTimer, errors
from portway.kernel import namespace, ofdlock
from portway.kernel.namespace import Kind, Namespace, parse_name

KINDS = [Mutex, Semaphore, Event, WaitableTimer]


def make(kind, name=None, **options):
    return Semaphore(1, 1, name, **options) if kind is Semaphore else kind(name, **options)


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_local_and_plain_are_one_case_and_slash_count(root):
    a, b = Mutex("x/Y"), Mutex(r"Local\x/Y")
    c = Mutex("x/y")
    assert (a.already_exists, b.already_exists, c.already_exists) == (False, True, False)
    assert len(files(root)) == 2
    assert a.name == b.name == "x/Y"


def test_global_is_another_folder(root):
    with Event(r"Global\e") as everyones, Event("e") as mine:
        assert not mine.already_exists
        assert everyones.name == r"Global\e"
        everyones.set()
        assert not mine.is_set()


@pytest.mark.parametrize(
    ("name", "error", "code"),
    [
        ("x" * 260, errors.NameTooLong, 206), ("a\\b", errors.PathNotFound, 3), ("local\\x", errors.PathNotFound, 3),
        ("Local\\", errors.InvalidAddress, 123), ("Global\\", errors.InvalidAddress, 123),
        ("\\", errors.BadPathName, 161), ("Local\\a\\b", errors.PathNotFound, 3), ("a\0b", errors.InvalidAddress, 123),
        ("\ud800", errors.InvalidAddress, 123),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_bad_names(root, kind, name, error, code):
    for call in (lambda: make(kind, name), lambda: kind.open(name)):
        with pytest.raises(error) as caught:
            call()
        assert caught.value.code == code
    assert not files(root)


def test_longest_name_and_empty(root):
    assert Mutex("é" * 259).name == "é" * 259
    assert Mutex("").name is None
    with pytest.raises(errors.InvalidAddress):
        Mutex.open("")
    with pytest.raises(TypeError):
        Mutex.open(None)
    with pytest.raises(TypeError):
        Mutex(7)


@given(st.text(max_size=300))
def test_any_name_parses_or_is_refused(text):
    try:
        name = parse_name(text)
    except errors.InvalidAddress:
        return
    assert parse_name(str(name)) == name
    assert len(name.file) == 32


def test_kinds_share_names(root):
    with Event("n"):
        for kind in (Mutex, Semaphore, WaitableTimer):
            with pytest.raises(errors.InvalidHandle):
                make(kind, "n")
            with pytest.raises(errors.InvalidHandle):
                kind.open("n")
    job, _ = Namespace().create(Kind.JOB, "n")
    with pytest.raises(errors.InvalidHandle):
        Event("n")
    namespace.release(job)


def test_exclusive_and_open(root):
    with pytest.raises(errors.ObjectNotFound):
        Event.open("n")
    with Event("n", exclusive=True):
        before = descriptors()
        with pytest.raises(errors.AlreadyExists):
            Event("n", exclusive=True)
        assert descriptors() == before
        assert Event.open("n").already_exists


def test_creation_parameters_of_an_existing_object_are_ignored_but_checked(root):
    one = Semaphore(2, 5, "s")
    two = Semaphore(0, 9, "s")
    assert (two.value, two.maximum) == (2, 5)
    with pytest.raises(ValueError, match="maximum"):
        Semaphore(0, 0, "s")
    assert one.value == 2


@pytest.mark.parametrize("kind", KINDS)
def test_goes_with_the_last_handle(root, kind):
    before = descriptors()
    a, b = make(kind, "n"), make(kind, "n")
    a.close()
    a.close()
    assert a.closed and len(files(root)) == 1
    b.close()
    assert not files(root) and descriptors() == before
    with pytest.raises(errors.ObjectClosed):
        b.waiters  # noqa: B018
    del a, b
    make(kind, "n")
    gc.collect()
    assert not files(root) and descriptors() == before


def test_goes_at_a_normal_exit_without_close(root):
    code = "import portway; m = portway.Mutex('m'); m.acquire(); e = portway.Event()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20)
    assert not files(root)


def test_all_holders_killed_the_name_is_free_and_the_file_goes(root, start):
    def work(tell):
        held = Event("n", initially_set=True)
        tell(held.name)
        signal.pause()

    one, two = start(work), start(work)
    assert one.hear() == two.hear() == "n"
    one.kill()
    assert Event.open("n").is_set()
    gc.collect()
    two.kill()
    assert len(files(root)) == 1
    with pytest.raises(errors.ObjectNotFound):
        Event.open("n")
    assert not files(root)
    three = start(work)
    three.hear()
    three.kill()
    assert Namespace().list() == [] and not files(root)
    four = start(work)
    four.hear()
    four.kill()
    with Event("n") as fresh:
        assert not fresh.already_exists and not fresh.is_set()


def test_listing_names_holders_and_waiters(root, start):
    def work(tell):
        Event.open("n").wait()

    with Event("n") as event:
        waiter = start(work)
        until(lambda: event.waiters == 1, "the child waits")
        [entry] = Namespace().list()
        assert (entry.kind, entry.name, entry.owner) == (Kind.EVENT, "n", os.geteuid())
        assert {one.pid for one in entry.holders} == {os.getpid(), waiter.pid}
        assert [one.waiting for one in entry.holders if one.pid == waiter.pid] == [1]
        waiter.kill()
        assert event.waiters == 0


def test_fork_child_has_its_own_handles(root, start):
    event = Event("n")

    def work(tell):
        tell(event.waiters)
        event.wait()
        tell("woken")

    child = start(work)
    assert child.hear() == 0
    event.close()
    assert len(files(root)) == 1, "the parent's last close must not remove the child's name"
    with Event.open("n") as again:
        again.set()
    assert child.hear() == "woken"
    assert child.wait() == 0


def test_fork_in_c_is_seen_too(root):
    import ctypes

    event = Event("n")
    pid = ctypes.CDLL(None).fork()
    if pid == 0:
        os._exit(7 if len(event.file.holders()) == 2 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert len(event.file.holders()) == 1


def test_exec_drops_handles_and_abandons(root, start):
    def work(tell):
        mutex = Mutex("m")
        mutex.acquire()
        tell("held")
        os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(30)"])

    mutex = Mutex("m")
    child = start(work)
    assert child.hear() == "held"
    mutex.acquire(5)
    assert mutex.abandoned
    until(lambda: len(mutex.file.holders()) == 1, "exec closed the handle")


def _use(conn, mutex, semaphore, event, timer):
    with mutex:
        conn.send((semaphore.release(), event.is_set(), timer.is_set(), mutex.name))
    conn.close()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
@pytest.mark.parametrize("name", [None, "shared"])
def test_objects_as_arguments_of_a_process(root, method, name):
    context = multiprocessing.get_context(method)
    here, there = context.Pipe()
    objects = [make(kind, name and f"{name}{at}") for at, kind in enumerate(KINDS)]
    objects[1].wait()
    objects[2].set()
    process = context.Process(target=_use, args=(there, *objects))
    process.start()
    if method != "fork":
        for one in objects:  # what is on its way keeps them alive
            one.close()
    try:
        assert here.poll(20)
        assert here.recv() == (0, True, False, name and f"{name}0")
    finally:
        process.join(20)
        process.kill()
        process.join()
        process.close()
        here.close()
        there.close()
    for one in objects:
        one.close()
    Namespace().list()
    assert not files(root)


def test_pickled_for_elsewhere_reopens_while_it_lives(root):
    event = Event()
    data = pickle.dumps(event)
    event.set()
    assert pickle.loads(data).is_set()
    gc.collect()
    event.close()
    with pytest.raises(errors.ObjectNotFound):
        pickle.loads(data)
    with pytest.raises(ValueError, match="closed"):
        pickle.dumps(event)


def test_environment_does_not_matter(monkeypatch):
    monkeypatch.delenv("PORTWAY_ROOT", raising=False)
    name = f"pwtest-{os.getpid()}"
    with Event(name):
        code = f"import portway; portway.Event.open({name!r}).set()"
        env = {"PATH": os.environ["PATH"]}
        subprocess.run([sys.executable, "-c", code], check=True, env=env, timeout=20)
        env |= {"XDG_RUNTIME_DIR": "/nonexistent", "HOME": "/nonexistent", "TMPDIR": "/nonexistent"}
        subprocess.run([sys.executable, "-c", code], check=True, env=env, timeout=20)
        with Event.open(name) as event:
            assert event.is_set()


def test_a_root_of_ones_own_is_met_by_those_who_name_it_too(tmp_path, monkeypatch):
    mine = f"/dev/shm/pwtest-{os.getpid()}-own"
    monkeypatch.setenv("PORTWAY_ROOT", mine)
    try:
        with Event("n"):
            assert Event.open("n", root=mine).already_exists
            monkeypatch.delenv("PORTWAY_ROOT")
            with pytest.raises(errors.ObjectNotFound):
                Event.open("n")
            with pytest.raises(errors.InvalidAddress, match="255 bytes"):
                Event("n", root="/dev/shm/" + "x" * 250)
    finally:
        shutil.rmtree(mine)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a set-uid program")
def test_a_set_uid_program_does_not_look_at_the_environment(root):
    """Who starts it would choose where its objects are; nor does it after it has become its user altogether."""
    folder = f"/var/tmp/pwtest-{os.getpid()}"
    os.mkdir(folder, 0o755)
    os.chmod(folder, 0o755)
    program = shutil.copy(os.path.realpath(sys.executable), folder)
    os.chmod(program, 0o4755)
    code = "import os; from portway.kernel.namespace import default_root as where; print(os.getuid(), os.geteuid())"
    code += "\nprint(where()); os.setresuid(0, 0, 0); print(where())"
    src = os.path.dirname(os.path.dirname(portway.__file__))
    env = {"PORTWAY_ROOT": root, "PYTHONHOME": f"{sys.base_prefix}:{sys.base_exec_prefix}", "PYTHONPATH": src}
    try:
        done = subprocess.run(
            [program, "-c", code], env=env, user=61234, group=61234, extra_groups=[], cwd="/", capture_output=True,
            text=True, timeout=20,
        )  # fmt: skip
        if not done.stdout.startswith("61234 0\n"):
            pytest.skip(f"set-uid programs do not work here: {done.stderr}")
        assert root not in done.stdout and len(done.stdout.split()) == 4
    finally:
        shutil.rmtree(folder)


def _folder(root) -> str:
    os.makedirs(root, exist_ok=True)
    return os.path.join(root, f"portway-{os.geteuid()}")


@pytest.mark.parametrize("spoil", ["mode", "owner", "symlink", "file"])
def test_a_prepared_folder_is_refused_with_the_way_out(root, spoil):
    folder = _folder(root)
    if spoil == "symlink":
        os.mkdir(root + "/elsewhere", 0o700)
        os.symlink(root + "/elsewhere", folder)
    elif spoil == "file":
        Path(folder).touch()
    else:
        os.mkdir(folder, 0o700)
        if spoil == "mode":
            os.chmod(folder, 0o755)
        elif os.geteuid() == 0:
            os.chown(folder, 1234, 1234)
        else:
            pytest.skip("needs root")
    with pytest.raises(errors.AccessDenied, match=r"rm -r|remove"):
        Mutex("m")


@pytest.mark.parametrize("what", ["symlink", "fifo", "socket", "folder", "text", "version", "name", "owner"])
def test_a_prepared_file_is_refused(root, what):
    with Event("other") as other:
        path = os.path.join(os.path.dirname(other.file.path), parse_name("n").file)
        data = Path(other.file.path).read_bytes()
    if what == "symlink":
        os.symlink("/etc/passwd", path)
    elif what == "fifo":
        os.mkfifo(path, 0o600)
    elif what == "folder":
        os.mkdir(path)
    elif what == "socket":
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(path)
    else:
        spoiled = {"text": b"hello" * 9999, "version": data[:8] + b"\x63" + data[9:]}.get(what, data)
        Path(path).write_bytes(spoiled)
        if what == "owner":
            if os.geteuid():
                pytest.skip("needs root")
            os.chown(path, 1234, 1234)
    before = descriptors()
    fd = os.open(path, os.O_RDWR) if what in ("text", "version", "name") else -1
    if fd >= 0:  # somebody holds a slot: not a leftover
        ofdlock.try_lock(fd, 16)
    with pytest.raises((errors.AccessDenied, errors.ObjectCorrupt)):
        Event("n")
    if fd >= 0:
        os.close(fd)
    assert descriptors() == before


def test_a_full_file_system_is_our_error_and_leaves_nothing(root, start):
    def work(tell):
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        os.makedirs(root)
        assert libc.unshare(0x20000) == 0  # CLONE_NEWNS
        assert libc.mount(None, b"/", None, 1 << 18 | 1 << 14, None) == 0
        assert libc.mount(b"tmpfs", root.encode(), b"tmpfs", 0, b"size=64k") == 0
        made = []
        try:
            while True:
                made.append(Event())
        except errors.NotEnoughMemory as error:
            tell((len(made), str(error), len(os.listdir(root + "/portway-0")), descriptors() - len(made)))

    if os.geteuid():
        pytest.skip("needs root")
    base = descriptors()
    child = start(work)
    made, says, left, others = child.hear()
    assert 0 < made == left
    assert root in says and "65,536" in says and "enlarge" in says
    assert others <= base + 4


def _as(uid, work, *args):
    def run(tell):
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        try:
            tell(work(*args))
        except errors.PortwayError as error:
            tell(error)

    return Process(run)


def test_other_uids(root):
    """Local is another folder, Global of a user is refused to others, an administrator's serves all."""
    if os.geteuid():
        pytest.skip("needs root")
    os.makedirs(root, 0o1777)
    os.chmod(root, 0o1777)

    def ask(work, *args):
        child = _as(4321, work, *args)
        try:
            return child.hear()
        finally:
            child.close()

    with Event("mine"), Event(r"Global\everyones"):
        assert isinstance(ask(Event.open, "mine"), errors.ObjectNotFound)
        assert isinstance(ask(Event.open, r"Global\everyones"), errors.AccessDenied)
        assert ask(lambda: Event(r"Global\other").already_exists) is False
    folder = os.path.join(root, "portway-global")
    os.chown(folder, 777, 777)
    refused = ask(lambda: Event(r"Global\x").name)
    assert isinstance(refused, errors.AccessDenied) and "chown root" in str(refused)
    with Event(r"Global\shared", security=portway.Security.uids(4321)) if os.chown(folder, 0, 0) is None else None as e:
        assert ask(lambda: Event.open(r"Global\shared").set()) is None
        assert e.is_set()


def test_too_many_descriptors_leaves_nothing(root):
    import resource

    with Event("a"):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        try:
            with pytest.raises(errors.TooManyDescriptors):
                Event("b")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not files(root)


def test_join_and_leave_under_kill(root, start):
    """Openers and closers are killed at random: no name is taken for ever, nothing is left."""

    def work(tell):
        while True:
            with Event("n") as one:
                one.set()

    for _ in range(30):
        children = [start(work) for _ in range(3)]
        until(lambda: files(root), "someone has it")
        for child in children:
            child.kill()
        with Event("n") as again:
            assert not again.already_exists
        assert not files(root)
