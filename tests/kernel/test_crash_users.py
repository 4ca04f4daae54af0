r"""A wait_all over ``Global\`` objects of several users, killed in the middle: who repairs, and what if they may not.

The waiting process is ALICE's. A lasting decision lies in one of the objects, that which comes first in the order of
locking: of those that everyone may open, if there is one.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from test_crash_sync import Server, crashing_build

from portway import errors

ALICE, BOB, CAROL = 61234, 61235, 61236
POINTS = [
    *((point, passed) for point in ("all.noting", "all.noted", "all.cleared") for passed in range(3)),
    ("all.listed", 0), ("all.mutex", 0), ("all.decided", 0), ("all.applied", 0), ("all.applied", 1), ("any.taken", 0),
]  # fmt: skip
DECIDED = {"all.decided", "all.applied", "all.cleared", "any.taken"}
__all__ = ["crashing_build"]
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can start processes of other users")

FIRST, SECOND, MUTEX = r"Global\first", r"Global\second", r"Global\mutex"
TOUCH = """
def touch(one):  # looks, with an operation that changes nothing
    try:
        one.release(10**6)
    except errors.TooManyPosts:
        pass
"""


@pytest.fixture
def alice(root, crashing_build):
    for folder in (root, f"{root}/portway-global"):
        os.mkdir(folder)
        os.chmod(folder, 0o1777)
    one = Server(ALICE)
    yield one
    one.close()


@pytest.fixture
def user(peer, root):
    def make(uid):
        one = peer(uid)
        one.run(TOUCH, root=root)
        return one

    return make


def make(user, name, kind, security, file):
    user.run(f"{name} = portway.{kind}, security=portway.Security.{security}, root=root)", name=file)


def open_(user, name, kind, file):
    user.run(f"{name} = portway.{kind}.open(name, root=root)", name=file)


@pytest.mark.parametrize("repairer", [ALICE, BOB, 0])
@pytest.mark.parametrize("looks_first", ["first", "second"])
def test_whoever_may_open_all_repairs(alice, user, repairer, looks_first):
    """Each belongs to another user, all are granted to everyone."""
    owner, carol, bob = user(0), user(CAROL), user(BOB)
    make(bob, "first", "Semaphore(1, 9, name", "everyone()", FIRST)
    make(carol, "second", "Semaphore(1, 9, name", "everyone()", SECOND)
    make(owner, "mutex", "Mutex(name", "everyone()", MUTEX)
    one = user(repairer)
    open_(one, "first", "Semaphore", FIRST)
    open_(one, "second", "Semaphore", SECOND)
    open_(one, "mutex", "Mutex", MUTEX)
    for point, passed in POINTS:
        assert alice.run("all_of_several_users", point, passed), (point, passed)
        one.run(f"touch({looks_first}); mutex.acquire(5)")
        taken = point in DECIDED
        seen = one.run("first.value, second.value, mutex.abandoned")
        assert seen == ((0, 0, True) if taken else (1, 1, False)), (point, passed)
        one.run("mutex.release()\nif not first.value: first.release(); second.release()")


def test_what_the_repairer_may_not_open_keeps_its_decision(alice, user):
    """BOB repairs the object that decides, and it decides other things; then CAROL looks at what BOB may not open."""
    bob, carol = user(BOB), user(CAROL)
    make(bob, "first", "Semaphore(1, 9, name", "everyone()", FIRST)
    make(bob, "other", "Semaphore(99, 99, name", "everyone()", r"Global\other")
    make(carol, "second", "Semaphore(1, 9, name", f"uids({ALICE})", SECOND)
    make(carol, "mutex", "Mutex(name", f"uids({ALICE})", MUTEX)
    with pytest.raises(errors.AccessDenied):
        open_(bob, "second", "Semaphore", SECOND)
    for point, passed in POINTS:
        assert alice.run("all_of_several_users", point, passed), (point, passed)
        bob.run("touch(first)")
        taken = point in DECIDED
        assert bob.run("first.value") == (0 if taken else 1), (point, passed)
        bob.run("if taken: first.release()", taken=taken)
        for _ in range(3):
            bob.run("portway.wait_all([first, other], 5); first.release()")
        carol.run("mutex.acquire(5)")
        assert carol.run("second.value, mutex.abandoned") == ((0, True) if taken else (1, False)), (point, passed)
        carol.run("mutex.release()\nif taken: second.release()", taken=taken)


@pytest.mark.parametrize("repair", ["use", "ls"])
def test_a_user_who_may_not_open_what_decides_is_told_and_goes_on_after_its_repair(alice, user, repair):
    """Nothing is guessed: AccessDenied within the timeout, until any user who may open both has looked."""
    carol, bob, another = user(CAROL), user(BOB), user(ALICE)
    make(carol, "first", "Semaphore(1, 9, name", f"uids({ALICE})", FIRST)
    make(bob, "second", "Semaphore(1, 9, name", f"uids({ALICE}, {CAROL})", SECOND)
    make(bob, "mutex", "Mutex(name", f"uids({ALICE}, {CAROL})", MUTEX)
    for point, passed in [("all.noted", 1), ("all.decided", 0)]:
        assert alice.run("all_of_several_users", point, passed)
        for call in ("second.wait(0)", "second.wait(0.05)", "second.release()", "second.value", "second.wait()"):
            with pytest.raises(errors.AccessDenied, match="portway sync ls"):
                bob.run(call)
        bob.start("second.wait(20)")  # it waits a little for somebody to repair
        if repair == "use":
            open_(another, "first", "Semaphore", FIRST)
            another.run("touch(first); first.close()")
        else:
            subprocess.run([sys.executable, "-m", "portway", "sync", "ls"], check=True, capture_output=True, timeout=20)
        taken = point in DECIDED
        if taken:
            carol.run("first.value")
            open_(carol, "again", "Semaphore", SECOND)
            carol.run("again.release(); again.close(); first.release()")
        assert bob.result() is True
        bob.run("second.release(); mutex.acquire(5)")
        assert bob.run("second.value, mutex.abandoned") == (1, taken), point
        bob.run("mutex.release()")
        assert carol.run("first.value") == 1


def test_of_local_and_global_objects_a_global_one_decides(alice, user):
    """BOB goes on with the Global one at once; ALICE finds her own as it was decided."""
    keeper = user(ALICE)
    make(keeper, "mine", "Semaphore(1, 9, name", "owner()", "mine")  # older: its place in the order would be first
    bob = user(BOB)
    make(bob, "first", "Semaphore(1, 9, name", "everyone()", FIRST)
    make(bob, "other", "Semaphore(99, 99, name", "everyone()", r"Global\other")
    for point in ("all.noted", "all.decided"):
        assert alice.run("all_local_and_global", point, 1 if point == "all.noted" else 0)
        taken = point in DECIDED
        assert bob.run("touch(first)\nfirst.value") == (not taken)
        bob.run("if taken: first.release()\nportway.wait_all([first, other], 5); first.release()", taken=taken)
        assert keeper.run("mine.value") == (not taken), point
        keeper.run("if taken: mine.release()", taken=taken)
