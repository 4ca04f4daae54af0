"""`portway map`: what it prints, its exit codes, and that bytes go through unchanged."""

from __future__ import annotations

import base64
import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("portway._native.view")
from verbs import Portway, end

from portway import FileMapping


@pytest.fixture
def portway(root: str) -> Portway:
    return Portway(root)


@pytest.fixture
def mapping(root: str) -> Iterator[FileMapping]:
    with FileMapping.create("box", 200_000, root=root) as mapping:
        yield mapping


def test_create_holds_while_a_command_runs(portway: Portway, root: str) -> None:
    inner = " ".join(portway.command("map", "ls", "--json"))
    done = portway.run("map", "create", "box", "64K", "--json", "--", "sh", "-c", f"{inner}; exit 7")
    made, listed = map(json.loads, done.stdout.splitlines())
    assert made == {"name": "box", "size": 65536, "existed": False}
    assert (listed["name"], listed["size"], len(listed["holders"])) == ("box", 65536, 1)
    assert done.returncode == 7
    assert portway.lines("map", "ls") == []


@pytest.mark.parametrize("kill", [False, True])
def test_create_holds_until_it_is_ended(portway: Portway, kill: bool) -> None:
    process = portway.start("map", "create", "Global\\box", "1M", "--everyone", "--json")
    try:
        assert portway.lines("map", "ls")[0]["holders"] == [process.pid]
    finally:
        code = end(process, kill=kill)
    assert code == (-signal.SIGKILL if kill else 0)
    assert portway.lines("map", "ls") == []


def test_bytes_go_through_unchanged(portway: Portway, mapping: FileMapping) -> None:
    data = random.Random(3).randbytes(100_000)
    assert portway.json("map", "write", "box", "--offset", "70001", stdin=data) == {
        "name": "box", "offset": 70001, "written": 100_000,
    }  # fmt: skip
    assert portway.run("map", "read", "box", "--offset", "70001", "--length", "100000").stdout == data
    assert portway.run("map", "read", "box").stdout == bytes(70001) + data + bytes(200_000 - 170_001)
    said = portway.json("map", "read", "box", "--offset", "0x11171", "--length", "5")
    assert base64.b64decode(said["data"]) == data[:5]
    assert portway.run("map", "write", "box", "héllo").returncode == 0
    assert portway.run("map", "read", "box", "--length", "6").stdout == "héllo".encode()


def test_hex_is_for_people(portway: Portway, mapping: FileMapping) -> None:
    with mapping.view() as view:
        view.write(b"hello\n", 16)
    out = portway.run("map", "read", "box", "--hex", "--length", "20", "--offset", "16").stdout.decode()
    assert out.splitlines()[0] == "00000010  68 65 6c 6c 6f 0a 00 00 00 00 00 00 00 00 00 00  hello..........."


def test_files(portway: Portway, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 1000)
    write = " ".join(portway.command("map", "write", "box", "--offset", "1500", "--flush", "abc"))
    listing = " ".join(portway.command("map", "ls", "--json"))
    done = portway.run("map", "create", "box", "2000", "--file", str(file), "--", "sh", "-c", f"{write} && {listing}")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["path"] == str(file)
    assert file.read_bytes() == b"x" * 1000 + bytes(500) + b"abc" + bytes(497)


@pytest.mark.parametrize(
    "words, code, says",
    [
        (("read", "nobody"), 3, "no mapping named nobody"),
        (("write", "nobody", "x"), 3, "no mapping named nobody"),
        (("create", "box"), 2, "give SIZE"),
        (("create", "box", "5Q"), 2, "give bytes"),
        (("create", "box", "-5"), 2, "-5"),
        (("create", "a\\b", "5"), 2, "backslash"),
        (("create", "box", "1", "--exclusive"), 1, "exists already"),
        (("create", "x", "1", "--uid", "no-such-user"), 2, "no user named"),
        (("create", "x", "0", "--file", "/nowhere/at/all"), 3, "no file"),
        (("create", "x", "1", "--", "/nowhere/command"), 127, "/nowhere/command"),
        (("create", "x", "1", "--", "/etc/passwd"), 126, "/etc/passwd"),
        (("read", "box", "--offset", "200001"), 2, "the mapping has 200000"),
        (("read", "box", "--length", "200001"), 2, "the mapping has 200000"),
        (("write", "box", "abc", "--offset", "199998"), 2, "the mapping has 200000"),
    ],
)
def test_bad_input(portway: Portway, mapping: FileMapping, words: tuple[str, ...], code: int, says: str) -> None:
    done = portway.run("map", *words)
    assert done.returncode == code, done.stderr
    assert says in done.stderr.decode()
    assert done.stdout == b"" or "--" in words
    assert b"Traceback" not in done.stderr
    with mapping.view() as view:
        assert view.read() == bytes(200_000)


def test_more_than_fits_writes_nothing(portway: Portway, mapping: FileMapping) -> None:
    assert portway.run("map", "write", "box", stdin=b"y" * 300_000).returncode == 2
    with mapping.view() as view:
        assert view.read() == bytes(200_000)


def test_names_with_control_characters_do_not_reach_the_terminal(portway: Portway, root: str) -> None:
    with FileMapping.create("a\x1b[31mb[bold]", 1, root=root):
        out = portway.run("map", "ls").stdout
    assert b"\x1b" not in out
    assert b"a?[31mb[bold]" in out


def test_without_mappings(portway: Portway) -> None:
    done = portway.run("map", "ls")
    assert (done.returncode, done.stderr) == (0, b"no mappings\n")
    assert os.path.isdir("/dev/shm")
