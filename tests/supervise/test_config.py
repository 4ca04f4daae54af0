"""Options from file, environment and command line; every refusal names the value, the rule and where it stands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import PLAIN, World, get

from portway.errors import ConfigurationError, InvalidAddress, PortwayError
from portway.supervise.binds import parse_bind, parse_binds
from portway.supervise.config import Options, check_placeholder, read_options

COMMAND = {"command": ["true"]}


def options(**given: object) -> Options:
    return read_options("web", COMMAND | given, environ={})


@pytest.mark.parametrize(
    ("text", "kind", "host", "port", "path", "name"),
    [
        ("127.0.0.1:8000", "tcp", "127.0.0.1", 8000, "", "127.0.0.1-8000"),
        ("[::1]:80", "tcp", "::1", 80, "", "[--1]-80"),
        (":8000", "tcp", "", 8000, "", "-8000"),
        ("localhost:0,name=web", "tcp", "localhost", 0, "", "web"),
        ("udp::53", "udp", "", 53, "", "udp--53"),
        ("udp:[fe80::1%lo]:53,name=x", "udp", "fe80::1%lo", 53, "", "x"),
        ("unix:/run/web.sock", "unix", "", 0, "/run/web.sock", "web.sock"),
        ("fd:web", "fd", "", 0, "web", "web"),
    ],
)
def test_binds(text: str, kind: str, host: str, port: int, path: str, name: str) -> None:
    bind = parse_bind(text)
    assert (bind.kind, bind.host, bind.port, bind.path, bind.name) == (kind, host, port, path, name)
    assert parse_bind(f"{bind.address},name=n").address == bind.address


def test_bind_options() -> None:
    bind = parse_bind("unix:/tmp/s,mode=0660,owner=www-data:adm,name=x")
    assert (bind.mode, bind.owner, bind.name) == (0o660, "www-data:adm", "x")


@pytest.mark.parametrize("text", [
    "", "8000", "host", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:65536", "127.0.0.1:-1", "::1:80", "[::g]:80", "a b:80",
    "127.0.0.1:80,mode=0600", "127.0.0.1:80,name=", "127.0.0.1:80,name", "127.0.0.1:80,name=a,name=b", "unix:",
    "unix:/tmp/", "unix:@abstract", "unix:/x,mode=999", "unix:/x,mode=0o600", "unix:/x,colour=red", "fd:", "udp:",
    "udp:x", "unix:/" + "x" * 107, "127.0.0.1:80,name=a:b", "127.0.0.1:٣",
])  # fmt: skip
def test_wrong_binds_name_the_text(text: str) -> None:
    with pytest.raises(InvalidAddress) as caught:
        parse_bind(text)
    assert repr(text) in str(caught.value) and "write HOST:PORT" in str(caught.value)


@given(st.text(max_size=60) | st.text("0123456789:[].,=/unixdpf", max_size=40))
def test_any_text_is_a_bind_or_our_error(text: str) -> None:
    try:
        bind = parse_bind(text)
    except InvalidAddress:
        return
    assert parse_bind(text) == bind


def test_two_binds_of_one_name() -> None:
    with pytest.raises(InvalidAddress, match="another bind is called 'a' too"):
        parse_binds(["127.0.0.1:1,name=a", "127.0.0.1:2,name=a"])


@pytest.mark.parametrize(
    ("key", "value", "want"),
    [
        ("workers", "3", 3),
        ("ready_timeout", "2m", 120.0),
        ("drain", "forever", None),
        ("drain", 5, 5.0),
        ("max_rss", "512M", 512 << 20),
        ("max_rss", "2gb", 2 << 30),
        ("max_age", "1d", 86400.0),
        ("max_age", 0, None),
        ("stop_signal", "quit", 3),
        ("stop_signal", "SIGINT", 2),
        ("stop_signal", "15", 15),
        ("ready", "delay", "delay:1"),
        ("ready", "delay:2.5", "delay:2.5"),
        ("ready", "http:/health?x=1", "http:/health?x=1"),
        ("env", ["A=1", "B=x=y"], {"A": "1", "B": "x=y"}),
        ("env", {"A": 1}, {"A": "1"}),
        ("env", "A=1 'B=2 3'", {"A": "1", "B": "2 3"}),
        ("command", "run 'two words'", ("run", "two words")),
        ("settle", 0.5, 0.5),
    ],
)
def test_values(key: str, value: object, want: object) -> None:
    extra = {"bind": ["127.0.0.1:0"]} if str(value).startswith("http") else {}
    assert getattr(options(**{key: value}, **extra), key) == want


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("workers", "0", "whole number from 1 to 1024"),
        ("workers", True, "whole number"),
        ("workers", 1.5, "whole number"),
        ("ready_hold", "-1", "must be seconds"),
        ("ready_hold", "nan", "must be seconds"),
        ("drain", "never", "must be seconds"),
        ("max_rss", "lots", "must be bytes"),
        ("stop_signal", "BANG", "signal's name"),
        ("stop_signal", 99, "signal's name"),
        ("ready", "maybe", "accepting, notify"),
        ("ready", "http:x", "starts with /"),
        ("ready", "notify:x", "accepting, notify"),
        ("output", "pipe", "tail or inherit"),
        ("env", "A", "KEY=VALUE"),
        ("user", "no-such-user", "no such user"),
        ("group", "no-such-group", "no such group"),
        ("bind", ["x"], "the port must be"),
        ("chdir", "", "must be text"),
        ("backlog", "x", "whole number"),
        ("command", [1], "list of texts"),
    ],
)
def test_wrong_values_name_key_value_and_rule(key: str, value: object, rule: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        options(**{key: value})
    said = str(caught.value)
    assert f"--{key.replace('_', '-')}" in said and rule in said


def test_rules_between_options() -> None:
    with pytest.raises(ConfigurationError, match="needs a TCP or unix: bind"):
        options(ready="http:/", bind=["udp:127.0.0.1:0"])
    with pytest.raises(ConfigurationError, match="no command"):
        read_options("web", {}, environ={})
    with pytest.raises(ConfigurationError, match=r"\{fd2\} in the command: no such bind; binds are a, b"):
        options(bind=["127.0.0.1:0,name=a", "127.0.0.1:0,name=b"], command=["x", "{fd2}"])
    with pytest.raises(ConfigurationError, match="no such bind"):
        options(command=["x", "{fd}"])
    assert check_placeholder("fdb", ("127.0.0.1:0,name=a", "127.0.0.1:0,name=b")) == 1
    for name in ("", "a/b", "..", "-x", "x" * 65, "a b"):
        with pytest.raises(ConfigurationError, match="name"):
            read_options(name, COMMAND, environ={})


def test_layers(tmp_path: Path) -> None:
    file = tmp_path / "portway.toml"
    file.write_text('[run.web]\ncommand = "serve"\nworkers = 2\nready-hold = 3\nsettle = 1\n[run.web.env]\nA = "1"\n')
    found = read_options(
        "web", {"settle": "9"}, file=str(file), environ={"PORTWAY_READY_HOLD": "4", "PORTWAY_SETTLE": "5"}
    )
    assert (found.command, found.workers, found.ready_hold, found.settle, found.env) == (
        ("serve",),
        2,
        4.0,
        9.0,
        {"A": "1"},
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[run.web", "Expected"),
        ("[run.other]\n", "no table [run.web]; it has other"),
        ("x = 1", "no table [run.web]"),
        ("run = 1", "no table [run.web]"),
        ("[run.web]\ncolour = 1", "[run.web] colour: no such option"),
        ("[run.web]\nworkers = 'x'", "[run.web] workers='x': must be a whole number"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "portway.toml"
    file.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        read_options("web", COMMAND, file=str(file), environ={})
    assert str(file) in str(caught.value) and said in str(caught.value)


@given(
    st.dictionaries(
        st.sampled_from(sorted(Options.__dataclass_fields__)), st.text(max_size=12) | st.integers() | st.none()
    )
)
def test_any_values_give_options_or_our_error(given_: dict[str, object]) -> None:
    try:
        found = read_options("web", given_, environ={})
    except PortwayError:
        return
    assert Options.load(json.loads(json.dumps(found.dump()))) == found


def test_file_is_read_again_and_a_broken_one_changes_nothing(world: World) -> None:
    file = world.root / "portway.toml"
    good = f"[run.web]\nbind = '127.0.0.1:0'\nready-hold = 0.1\ncommand = {json.dumps(PLAIN)}\n"
    file.write_text(good)
    web = world.start("web", PORTWAY_SETTLE="0.1")
    web.serves(1)
    assert web.status()["generations"][0]["options"]["settle"] == 0.1
    file.write_text(good + "workers = 2\n")
    assert web.reloaded() == 2
    assert len(web.workers()) == 2
    for broken, said in ((good + "workers = many\n", "portway.toml"), (good + "colour = 1\n", "no such option"),
                         (good.replace("127.0.0.1:0", "[::1]:0"), "cannot change while the service runs")):  # fmt: skip
        file.write_text(broken)
        done = web.reload()
        assert done.returncode == 2 and said in done.stderr, done.stderr
    file.unlink()
    assert web.reload().returncode == 2
    assert get(web.address()).startswith("2 ")
    file.write_text(good)
    assert web.reloaded() == 3


def test_check(world: World) -> None:
    file = world.root / "portway.toml"
    file.write_text("[run.web]\nbind = ':8000'\ncommand = 'true'\n")
    done = world.run("run", "web", "--check", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["bind"] == [":8000"]
    assert world.run("run", "web", "--check", "--workers", "0").returncode == 2
    assert world.run("run", "nope", "--check").returncode == 2
    assert world.run("run", "web", "--check", "--config", "missing.toml").returncode == 2
    file.write_text("[run.web]\ncommand = 'no-such-command-here'\n")
    assert world.run("run", "web", "--check").returncode == 127
    file.unlink()
    done = world.run("run", "web")
    assert done.returncode == 2 and "no portway.toml here" in done.stderr
    for words in ([], ["--", "true"], ["--workers"], ["--colour"]):
        assert world.run("run", *words).returncode == 2


def test_help_imports_no_verb(world: World) -> None:
    code = (
        "import sys; from portway.__main__ import main; assert main(['--help']) == 0;"
        "heavy = {'asyncio', 'rich', 'psutil', 'uvicorn', 'portway.cli.run', 'portway.supervise'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=world.environ, capture_output=True)


def test_example_file(world: World) -> None:
    example = Path(__file__).parents[2] / "examples" / "portway.toml"
    for name in ("web", "plain"):
        path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        done = world.run("run", name, "--check", "--json", "--config", str(example), PATH=path)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["name"] == name
