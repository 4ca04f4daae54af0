"""`Security`: what the kernel grants, seen from processes of other users."""

from __future__ import annotations

import os
import pickle
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from talk import Failed, Talker

pytest.importorskip("portway._native.view")
from portway import FileMapping, Security, errors

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become other users")


@pytest.fixture
def root() -> Iterator[str]:
    root = tempfile.mkdtemp(prefix="portway-test-", dir="/dev/shm")
    os.chmod(root, 0o777)
    yield root
    shutil.rmtree(root)


def test_owner_is_the_default() -> None:
    assert Security() == Security.owner()
    assert (Security.owner().mode, Security.owner().acl(), Security.owner().is_owner_only) == (0o600, None, True)
    assert (Security.everyone().mode, Security.everyone(write=False).mode) == (0o666, 0o644)
    assert not Security.everyone(write=False).is_owner_only


def test_join_takes_the_larger_right() -> None:
    joined = Security.uids(5, 6, write=False) | Security.uids(6) | Security.everyone(write=False) | Security.group(7)
    assert dict(joined.users) == {5: 4, 6: 6}
    assert dict(joined.groups) == {7: 6}
    assert joined.others == 4
    assert joined.mode == 0o664


def test_acl_bytes() -> None:
    assert Security.uids(1000, write=False).acl() == struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", *one)
        for one in [(1, 6, 2**32 - 1), (2, 4, 1000), (4, 0, 2**32 - 1), (16, 4, 2**32 - 1), (32, 0, 2**32 - 1)]
    )


@as_root
@pytest.mark.parametrize("grant", [Security.everyone(), Security.everyone() | Security.uids(4009)], ids=["mode", "acl"])
def test_everyone_includes_the_members_of_the_creators_group(root: str, grant: Security) -> None:
    with (
        FileMapping.create("Global\\shared", 4096, security=grant, root=root),
        as_user(4004, groups=(os.getegid(),)) as peer,
    ):
        assert rights(peer, root) == "rw"


def test_names_and_numbers() -> None:
    assert Security.uids("root", 0, "0") == Security.uids(0)
    assert Security.group("root") == Security.group(0) == Security.group("0")


def test_bad_arguments() -> None:
    for call in (
        lambda: Security.uids("no-such-user-here"), lambda: Security.group("no-such-group-here"), Security.uids,
        lambda: Security.uids(-1), lambda: Security.uids(2**32 - 1), lambda: Security.group(-1),
        lambda: Security(others=2), lambda: Security(users={5: 7}),
        lambda: Security.uids(*range(200)) | Security.uids(*range(200, 400)),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            call()


@given(st.dictionaries(st.integers(0, 2**32 - 2), st.booleans(), max_size=20), st.booleans())
def test_the_kernel_takes_every_acl(grants: dict[int, bool], other: bool) -> None:
    wanted = Security.everyone(write=False) if other else Security.owner()
    for uid, write in grants.items():
        wanted = wanted | Security.uids(uid, write=write) | Security.group(uid, write=not write)
    fd = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR, 0o600)
    try:
        wanted.apply(fd)
        if wanted.acl() is not None:
            assert os.getxattr(fd, "system.posix_acl_access") == wanted.acl()
        assert os.fstat(fd).st_mode & 0o7777 == wanted.mode
    finally:
        os.close(fd)


def as_user(uid: int, gid: int | None = None, groups: tuple[int, ...] = ()) -> Talker:
    peer = Talker()
    peer.do("portway.FileMapping, portway.View, portway.Security")
    peer.do(f"os.setgroups({list(groups)}); os.setgid({gid or uid}); os.setuid({uid})")
    return peer


ASK = "portway.FileMapping.open(r'Global\\shared', {!r}, root={!r}).close()"


def rights(peer: Talker, root: str) -> str:
    """"rw", "r" or "" """
    found = ""
    for access, letter in (("read", "r"), ("read-write", "w")):
        try:
            peer.do(ASK.format(access, root))
            found += letter
        except Failed as error:
            assert error.kind == "AccessDenied", error
    return found


@as_root
@pytest.mark.parametrize(
    "security, alice, bob, member",
    [
        (Security.owner(), "", "", ""),
        (Security.everyone(), "rw", "rw", "rw"),
        (Security.everyone(write=False), "r", "r", "r"),
        (Security.uids(4001), "rw", "", ""),
        (Security.uids(4001, write=False) | Security.uids(4002), "r", "rw", ""),
        (Security.group(4100), "", "", "rw"),
        (Security.group(4100, write=False) | Security.uids(4001), "rw", "", "r"),
    ],
    ids=["owner", "everyone", "everyone-reads", "alice", "alice-reads-bob-writes", "group", "group-reads"],
)
def test_who_may(root: str, security: Security, alice: str, bob: str, member: str) -> None:
    with FileMapping.create("Global\\shared", 4096, security=security, root=root):
        with Talker() as peer:
            assert rights(peer, root) == "rw"  # ourselves
        for uid, groups, may in ((4001, (), alice), (4002, (), bob), (4003, (4100,), member)):
            with as_user(uid, groups=groups) as peer:
                assert rights(peer, root) == may, uid


@as_root
def test_a_reader_holds_and_sees_but_cannot_write(root: str) -> None:
    mapping = FileMapping.create("Global\\shared", 4096, security=Security.everyone(write=False), root=root)
    with mapping, mapping.view() as view, as_user(4001) as peer:
        view[0:2] = b"hi"
        peer.do(f"m = portway.FileMapping.open(r'Global\\shared', 'read', root={root!r}); v = m.view()")
        assert peer.get("v[0:2].decode()") == "hi"
        with pytest.raises(Failed, match="AccessDenied"):
            peer.do("m.view(access='read-write')")
        peer.do("c = m.view(access='copy'); c[0] = 0")
        assert view[0:1] == b"h"


@as_root
def test_local_names_are_each_users_own(root: str) -> None:
    with FileMapping.create("shared", 4096, security=Security.everyone(), root=root), as_user(4001) as peer:
        with pytest.raises(Failed, match="ObjectNotFound"):
            peer.do(f"portway.FileMapping.open('shared', root={root!r})")
        peer.do(f"m = portway.FileMapping.create('shared', 8192, root={root!r})")
        assert peer.get("m.already_exists") == 0


def test_without_acls_the_error_says_so(tmp_path: Path) -> None:
    code = (
        "import os, portway\nfd = os.open('/proc/self/status', os.O_RDONLY)\n"
        "try: portway.Security.uids(5).apply(fd)\nexcept Exception as e: print(type(e).__name__)"
    )
    said = subprocess.run([os.sys.executable, "-c", code], capture_output=True, text=True)  # type: ignore[attr-defined]
    assert said.stdout.strip() in ("NotSupported", "PermissionError"), said


def test_is_a_value() -> None:
    with pytest.raises(AttributeError):
        Security().others = 6  # type: ignore[misc]
    assert errors.PortwayError is not None
    assert repr(Security.uids(5)).startswith("Security(")
    assert pickle.loads(pickle.dumps(Security.everyone().mode)) == 0o666
