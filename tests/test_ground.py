"""The ground floor: errors, deadlines, the table of states, handles."""

from __future__ import annotations

import inspect
import math
import os
import pickle
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portway import errors
from portway.deadline import Deadline
from portway.lifecycle import NEXT, Handle, Input, Life, State

CLASSES = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}


def drawn() -> dict[str, tuple[str | None, str | None]]:
    """name -> (parent, further base), from the tree in the docstring."""
    tree: dict[str, tuple[str | None, str | None]] = {"PortwayError": (None, None)}
    stack = [(4, "PortwayError")]
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"([ |]*)\+- (\w+) *(?:\((\w+)\))?", line)
        if found:
            depth, name, base = len(found[1]), found[2], found[3]
            while stack[-1][0] >= depth:
                stack.pop()
            tree[name] = stack[-1][1], base
            stack.append((depth, name))
    return tree


def test_the_drawn_tree_is_the_tree() -> None:
    tree = drawn()
    assert set(tree) == set(CLASSES)
    assert set(errors.__all__) == {*CLASSES, "for_code"}
    for name, (parent, base) in tree.items():
        if parent is not None:
            assert issubclass(CLASSES[name], CLASSES[parent]), name
            assert CLASSES[name].__bases__[0] is CLASSES[parent], name
            assert [one.__name__ for one in CLASSES[name].__bases__[1:]] == ([base] if base else []), name


@pytest.mark.parametrize("kind", CLASSES.values())
@pytest.mark.parametrize("hint", [None, "do this"])
def test_errors_say_the_way_out_and_survive_pickle(kind: type[errors.PortwayError], hint: str | None) -> None:
    error = kind("it broke", hint=hint)
    again = pickle.loads(pickle.dumps(error))
    for one in (error, again):
        assert type(one) is kind
        assert str(one) == ("it broke; do this" if hint else "it broke")
        assert (one.message, one.hint) == ("it broke", hint)
        with pytest.raises(kind):
            raise one


def test_every_code_leads_back_to_a_class_of_that_code() -> None:
    for kind in CLASSES.values():
        assert errors.for_code(kind.code).code == kind.code
        assert kind.code or kind is errors.PortwayError
    assert errors.for_code(5) is errors.AccessDenied
    assert errors.for_code(-1) is errors.PortwayError


@pytest.mark.parametrize("bad", [-1, -0.001, math.nan])
def test_a_deadline_refuses_what_is_no_time(bad: float) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(bad))):
        Deadline(bad)


@given(st.floats(min_value=0, allow_nan=False))
def test_a_deadline_gives_what_waits_take(seconds: float) -> None:
    deadline = Deadline(seconds)
    left, milliseconds = deadline.remaining(), deadline.poll_ms()
    if seconds == math.inf:
        assert left is None and milliseconds is None
    else:
        assert left is not None and 0 <= left <= min(seconds, 2_000_000)
        assert milliseconds is not None and 0 <= milliseconds < 2**31


def test_a_deadline_never_and_now() -> None:
    never, now = Deadline(None), Deadline(0)
    assert never.remaining() is None and never.poll_ms() is None and not never.expired
    never.check("waiting")
    assert now.expired and now.remaining() == 0 and now.poll_ms() == 0
    with pytest.raises(errors.OperationTimeout, match="timed out after 0 s waiting"):
        now.check("waiting")
    assert isinstance(now.error("x"), TimeoutError)
    assert "never" in repr(never) and "left" in repr(now)


def test_a_deadline_is_on_the_clock_all_processes_share() -> None:
    before = time.monotonic()
    assert before + 5 <= Deadline(5).at <= time.monotonic() + 5


@given(st.lists(st.sampled_from(Input)))
def test_life_walks_the_table_and_nothing_else(steps: list[Input]) -> None:
    life = Life("a thing")
    for step in steps:
        before = life.state
        if step in NEXT[before]:
            assert life.step(step) is NEXT[before][step] is life.state
        else:
            with pytest.raises(errors.ObjectClosed, match=r"a thing is .*: cannot"):
                life.step(step)
            assert life.state is before


def test_every_state_can_end_and_closed_stays_closed() -> None:
    assert set(NEXT) == set(State)
    for state in State:
        life = Life("it", state)
        life.step(Input.ABORT)
        if life.state is State.CLOSING:
            life.step(Input.DONE)
        assert life.state is State.CLOSED
        assert not {NEXT[State.CLOSED][step] for step in NEXT[State.CLOSED]} - {State.CLOSED}


def test_life_requires() -> None:
    life = Life("it", State.CLOSING)
    life.require(State.CLOSING)
    with pytest.raises(errors.ObjectClosed, match="it is closing, not opened"):
        life.require()


def test_a_handle_closes_once_and_gives_away() -> None:
    reader, writer = os.pipe()
    with Handle(reader) as handle:
        assert handle.fileno() == reader
    assert handle.closed
    with pytest.raises(OSError):
        os.fstat(reader)
    again = os.dup(writer)  # takes the number: a second close must not hit it
    handle.close()
    os.fstat(again)
    with pytest.raises(errors.ObjectClosed):
        handle.fileno()
    owner = Handle(writer)
    assert owner.detach() == writer and owner.closed
    os.close(writer)
    os.close(again)


def test_a_forgotten_handle_closes() -> None:
    reader, writer = os.pipe()
    os.close(writer)
    Handle(reader)
    with pytest.raises(OSError):
        os.fstat(reader)


def test_public_names_exist_and_dir_lists_them() -> None:
    import portway
    from portway import aio

    for module in (portway, aio):
        for name in module.__all__:
            assert getattr(module, name) is not None
            assert name in dir(module) or module is aio
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        portway.nonsense  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        aio.nonsense  # noqa: B018
    assert inspect.getdoc(portway)
