from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def test_doctor_tries_everything_here() -> None:
    done = subprocess.run([sys.executable, "-m", "portway", "doctor", "--json"], capture_output=True, text=True)
    found = {one["what"]: one for one in map(json.loads, done.stdout.splitlines())}
    assert {"take by pid", "push as a message", "yama", "reload of TCP listeners"} <= set(found)
    assert done.returncode == (0 if all(one["ok"] for one in found.values()) else 1)


def test_doctor_says_that_a_root_of_ones_own_is_in_force(tmp_path: Path) -> None:
    told = []
    for env in ({}, {"PORTWAY_ROOT": str(tmp_path)}):
        plain = {name: value for name, value in os.environ.items() if name != "PORTWAY_ROOT"}
        done = subprocess.run(
            [sys.executable, "-m", "portway", "doctor", "--json"], capture_output=True, text=True, env=plain | env
        )
        found = {one["what"]: one for one in map(json.loads, done.stdout.splitlines())}
        told.append("PORTWAY_ROOT is set" in found["named objects"]["says"])
        assert (str(tmp_path) in found["named objects"]["says"]) == told[-1]
    assert told == [False, True]


def test_doctor_says_what_a_seccomp_filter_forbids() -> None:
    # A real filter in the child: pidfd_getfd (438) fails with EPERM, everything else is allowed.
    child = """
import ctypes, struct, runpy, sys
libc = ctypes.CDLL(None, use_errno=True)
steps = [(0x20, 0, 0, 0), (0x15, 0, 1, 438), (0x06, 0, 0, 0x00050000 | 1), (0x06, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(code)))
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0
sys.argv = ["portway", "doctor", "--json"]
runpy.run_module("portway", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True)
    found = {one["what"]: one for one in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 1, done.stderr
    assert not found["take by pid"]["ok"] and "HandoffInbox" in found["take by pid"]["says"]
    assert found["push as a message"]["ok"]


def pipes_of(env: dict[str, str], *prefix: str) -> tuple[int, dict[str, Any]]:
    """doctor's exit code and findings in this environment."""
    command = [*prefix, sys.executable, "-m", "portway", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, timeout=60)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, {one["what"]: one for one in map(json.loads, done.stdout.splitlines())}


def test_doctor_serves_a_pipe_and_leaves_nothing(root: str) -> None:
    _, found = pipes_of({"PORTWAY_ROOT": root, "TMPDIR": root})
    pipes = found["named pipes"]
    assert pipes["ok"]
    assert f"in {root}/portway-pipe-{os.geteuid()}" in pipes["says"] and f"TMPDIR is {root}" in pipes["says"]
    assert "PORTWAY_ROOT is set" in pipes["says"] and "sock_diag" not in pipes["says"]
    assert [one for one in Path(root).rglob("*") if not one.is_dir()] == []


def test_doctor_finds_what_lies_at_dotnets_paths_and_nobody_notices(root: str) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(f"{root}/CoreFxPipe_Stale")
    Path(root, "CoreFxPipe_File").write_text("mine")
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(f"{root}/CoreFxPipe_Th\x1beirs")
        theirs.listen()
        theirs.setblocking(False)
        says = pipes_of({"PORTWAY_ROOT": root, "TMPDIR": root})[1]["files of .NET's pipes"]["says"]
        with pytest.raises(BlockingIOError):  # it has no client, and never had one
            theirs.accept()
    assert "CoreFxPipe_Th?eirs: served by other programs" in says
    assert "CoreFxPipe_Stale: stale" in says and "CoreFxPipe_File: no sockets" in says
    assert sorted(one.name for one in Path(root).glob("CoreFx*")) == [
        "CoreFxPipe_File", "CoreFxPipe_Stale", "CoreFxPipe_Th\x1beirs",
    ]  # fmt: skip


@pytest.mark.parametrize("length, ok, says", [(60, True, "names of up to"), (100, False, "no name fits")])
def test_doctor_says_when_tmpdir_is_too_long_for_dotnet(root: str, length: int, ok: bool, says: str) -> None:
    folder = Path(root, "x" * (length - len(root)))
    folder.mkdir()
    _, found = pipes_of({"PORTWAY_ROOT": root, "TMPDIR": str(folder)})
    assert found["named pipes"]["ok"] is ok and says in found["named pipes"]["says"]


def test_doctor_says_when_tmpdir_is_missing(root: str) -> None:
    code, found = pipes_of({"PORTWAY_ROOT": root, "TMPDIR": f"{root}/none"})
    assert code == 1 and "set TMPDIR" in found["files of .NET's pipes"]["says"]


def test_doctor_recognises_a_private_tmp(root: str) -> None:
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"]).returncode:
        pytest.skip("only root can mount")
    private = Path(root, "systemd-private-0123456789abcdef0123456789abcdef-web@a-b.service-Ab3dEf", "tmp")
    private.mkdir(parents=True, mode=0o1777)
    mount, ours = f'mount --bind {private} /tmp && exec "$@"', Path(__file__).resolve().parents[2]
    if ours.is_relative_to("/tmp"):  # a checkout there stays visible
        seen = private / ours.relative_to("/tmp")
        seen.mkdir(parents=True)
        mount = f"mount --bind {ours} {seen} && mount --rbind {private} /tmp && exec \"$@\""
    _, found = pipes_of({"PORTWAY_ROOT": root}, "unshare", "-m", "sh", "-c", mount, "sh")
    assert "PrivateTmp of web@a-b.service" in found["pipes of others"]["says"]


def test_doctor_recognises_a_container(root: str) -> None:
    if os.geteuid() or subprocess.run(["unshare", "-pf", "true"]).returncode:
        pytest.skip("only root can make namespaces")
    _, found = pipes_of({"PORTWAY_ROOT": root, "TMPDIR": root}, "unshare", "-pf", "--mount-proc")
    assert "container's pid namespace" in found["pipes of others"]["says"]
    assert found["named pipes"]["ok"]
