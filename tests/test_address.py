from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portway.address import Address, parse, parse_pipe
from portway.errors import InvalidAddress

# As Microsoft documents CreateNamedPipeW, CreateMailslotW, CreateMutexW and the addresses of WCF and remoting.
GOOD = {
    r"\\.\pipe\HelloWorld": Address("pipe", ".", None, "HelloWorld"),
    r"\\server\pipe\a b/c": Address("pipe", "server", None, "a b/c"),
    r"\\*\mailslot\news": Address("mailslot", "*", None, "news"),
    r"\\.\mailslot\dir\news": Address("mailslot", ".", None, r"dir\news"),
    r"Local\Hello": Address("Local", "", None, "Hello"),
    r"Global\a/b": Address("Global", "", None, "a/b"),
    "net.tcp://host/svc": Address("net.tcp", "host", None, "svc"),
    "http://host:8080/a/b": Address("http", "host", 8080, "a/b"),
    "net.pipe://localhost/x": Address("net.pipe", "localhost", None, "x"),
    "127.0.0.1:80": Address("socket", "127.0.0.1", 80, ""),
    "[::1]:80": Address("socket", "::1", 80, ""),
}
BAD = [
    "", "host", "host:99999", "host:-1", "host:٣", "::1:80", "[::1", "[zz]:1", "ftp://x/", r"\\.\disk\x", r"\\.\pipe\\",
    r"\\*\pipe\x", r"\\.\pipe\a\b", r"local\x", r"Session\x", "Local\\", r"Local\a\b", "\\\\.\\pipe\\" + "x" * 257,
    "Local\\" + "x" * 254, "a\0b:1", "tcp://host:x/",
]  # fmt: skip


@pytest.mark.parametrize("text", GOOD)
def test_known_forms(text: str) -> None:
    assert parse(text) == GOOD[text]
    assert str(parse(text)) == text


@pytest.mark.parametrize("text", BAD)
def test_refusals_name_the_text(text: str) -> None:
    with pytest.raises(InvalidAddress) as caught:
        parse(text)
    assert repr(text) in str(caught.value)


@given(st.text() | st.from_regex(r"(\\\\(\.|h)\\(pipe|mailslot)\\.+)|((Local|Global)\\.+)|([a-z.]+://[a-z]*(:\d+)?/.*)"))
def test_what_parses_is_written_back(text: str) -> None:
    with suppress(InvalidAddress):
        assert parse(str(parse(text))) == parse(text)


def test_names_that_windows_folds() -> None:
    assert parse_pipe("HelloWorld").key == parse(r"\\.\PIPE\helloworld").key
    assert parse(r"Local\A").key != parse(r"Local\a").key
    assert parse("net.tcp://h/x").effective_port == 808
