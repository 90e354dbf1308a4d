"""A loopback line misbehaves as it was told to, and not otherwise."""

from __future__ import annotations

import time

import pytest

from foedus.engines.line import Faults, Loopback


def echo(blob: bytes) -> bytes:
    return b"re: " + blob


def heard(line: Loopback, count: int = 0) -> list[tuple[str, bytes | str]]:
    """What comes, until there are `count` messages, or at once."""
    until, found = time.monotonic() + 10.0, list(line.poll())
    while len(found) < count and time.monotonic() < until:
        found += line.poll()
    return found


def test_without_faults_each_message_gets_its_answer():
    line = Loopback({"a": lambda: echo, "b": lambda: echo})
    assert line.silos() == {"a", "b"}
    names = [line.send("a", b"1"), line.send("b", b"2")]
    assert heard(line) == [(names[0], b"re: 1"), (names[1], b"re: 2")]
    assert heard(line) == []


def test_an_unknown_silo_is_told_of():
    line = Loopback({"a": lambda: echo})
    name = line.send("b", b"")
    assert heard(line) == [(name, 'no silo "b" is on this line')]


def test_each_fault_does_what_it_says():
    assert heard(_sent(Faults(drop=1.0))) == []
    assert heard(_sent(Faults(refuse=1.0))) == [("0", "the line broke")]
    assert heard(_sent(Faults(duplicate=1.0))) == [("0", b"re: x")] * 4
    slow = _sent(Faults(delay_s=0.01))
    assert heard(slow, 1) == [("0", b"re: x")]


def test_answers_overtake_each_other_when_they_are_delayed():
    line = Loopback({"a": lambda: echo}, Faults(delay_s=0.02, seed=1))
    names = [line.send("a", b"x") for _ in range(20)]
    came = [name for name, _ in heard(line, 20)]
    assert sorted(came) == sorted(names)
    assert came != names


def test_a_crash_loses_the_answer_and_starts_the_silo_anew():
    started = []

    def start():
        started.append(len(started))
        return lambda blob: bytes(started[-1:])

    line = Loopback({"a": start}, Faults(crash={"a": frozenset({1})}))
    for _ in range(3):
        line.send("a", b"x")
    assert heard(line) == [("0", b"\0"), ("2", b"\1")]


def test_faults_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="drop=2"):
        Faults(drop=2)
    with pytest.raises(ValueError, match="delay_s=-1"):
        Faults(delay_s=-1)


def test_a_closed_line_says_nothing_more():
    line = _sent(Faults())
    line.close()
    assert heard(line) == []


def _sent(faults: Faults) -> Loopback:
    line = Loopback({"a": lambda: echo}, faults)
    line.send("a", b"x")
    return line
