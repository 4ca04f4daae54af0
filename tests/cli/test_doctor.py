from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


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
