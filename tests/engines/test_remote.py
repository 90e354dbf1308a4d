"""Over any line, each ask gets exactly one report, in time, and what is sent again is the same."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foedus import wire
from foedus.engines.base import Ask
from foedus.engines.frames import pack_report, unpack_ask
from foedus.engines.line import Faults, Loopback
from foedus.engines.remote import Plain, Remote
from foedus.types import Receipt, Report, Task

SILOS = ("a", "b", "c")


class Place:
    """A silo that counts what it is asked and answers duplicates from memory, as the guard does, even after a crash."""

    def __init__(self) -> None:
        self.asked: Counter[bytes] = Counter()
        self.work = 0
        self._memory: dict[bytes, bytes] = {}

    def __call__(self, blob: bytes) -> bytes:
        self.asked[blob] += 1
        if blob not in self._memory:
            self.work += 1
            ask = unpack_ask(blob)
            receipt = Receipt(ask.silo, 3, payload=wire.digest(ask.payload))
            self._memory[blob] = pack_report(Report(ask.silo, 3, ask.payload[::-1], receipt))
        return self._memory[blob]


def asks(count: int = 1) -> list[Ask]:
    task = wire.pack_task(Task(3, "base", {}, SILOS, 0))
    return [Ask("train", silo, task, split=str(i)) for i in range(count) for silo in SILOS]


def remote(places: dict[str, Place], faults: Faults | None = None, **options) -> Remote:
    line = Loopback({silo: (lambda place=place: place) for silo, place in places.items()}, faults)
    return Remote(line, Plain(), **{"deadline_s": 5.0, "backoff_s": 0.001, **options})


def places() -> dict[str, Place]:
    return {silo: Place() for silo in SILOS}


def test_each_ask_gets_the_report_of_its_silo():
    engine = remote(places())
    reports = list(engine.ask(asks()))
    assert sorted(report.silo for report in reports) == list(SILOS)
    assert all(report.payload == asks()[0].payload[::-1] and not report.receipt.failure for report in reports)
    assert engine.resent == 0
    assert engine.memory == {}


faults = st.builds(
    Faults,
    drop=st.floats(0, 0.6),
    refuse=st.floats(0, 0.6),
    duplicate=st.floats(0, 1),
    delay_s=st.sampled_from([0.0, 0.01]),
    crash=st.dictionaries(st.sampled_from(SILOS), st.frozensets(st.integers(0, 4))),
    seed=st.integers(0, 2**32),
)


@settings(max_examples=40, deadline=None)
@given(faults=faults, count=st.integers(1, 3))
def test_whatever_the_line_does_each_ask_gets_one_report_within_its_time(faults, count):
    those = places()
    engine = remote(those, faults, deadline_s=0.15, retries=3)
    began = time.monotonic()
    reports = list(engine.ask(asks(count)))
    assert Counter(report.silo for report in reports) == dict.fromkeys(SILOS, count)
    assert time.monotonic() - began < 2.0
    for report in reports:
        assert report.receipt.failure or report.payload
        assert report.round == 3
    for place in those.values():
        assert len(place.asked) == place.work <= count  # what is sent again is the same bytes, and no work is redone


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_line_that_loses_and_tells_costs_time_but_no_report(seed):
    faults = Faults(refuse=0.5, duplicate=0.5, delay_s=0.002, crash={"a": frozenset({0})}, seed=seed)
    reports = list(remote(places(), faults, deadline_s=20.0, retries=40, backoff_s=0.0).ask(asks(1)[1:]))
    assert [report.receipt.failure for report in reports] == ["", ""]


def test_what_is_lost_without_a_word_is_sent_again_at_half_time():
    those = places()
    engine = remote(those, Faults(crash={silo: frozenset({0}) for silo in SILOS}), deadline_s=0.4)
    assert [report.receipt.failure for report in engine.ask(asks())] == ["", "", ""]
    assert engine.resent == 3


def test_a_silent_silo_fails_at_the_deadline_and_holds_up_nobody():
    those = places()
    engine = remote(those, Faults(drop=1.0), deadline_s=0.1)
    began = time.monotonic()
    reports = list(engine.ask(asks()))
    assert 0.1 <= time.monotonic() - began < 1.0
    assert all("none within 0.1 s" in report.receipt.failure for report in reports)


def test_after_its_retries_an_ask_fails_with_the_reason():
    (report,) = remote(places(), Faults(refuse=1.0), retries=2).ask(asks()[:1])
    assert "none after 3 tries: the line broke" in report.receipt.failure


def test_the_answer_of_another_silo_or_of_nobody_is_asked_for_again():
    forged = pack_report(Report("b", 3, b"", Receipt("b", 3)))
    answers = iter([b"noise", forged])

    def place(blob: bytes) -> bytes:
        return next(answers, None) or Place()(blob)

    engine = Remote(Loopback({"a": lambda: place}), Plain(), deadline_s=5.0, backoff_s=0.0)
    (report,) = engine.ask(asks()[:1])
    assert not report.receipt.failure
    assert engine.resent == 2


def test_an_answer_that_comes_late_is_no_answer_to_the_next_ask():
    those = places()
    line = Loopback({silo: (lambda place=place: place) for silo, place in those.items()}, Faults(delay_s=0.2, seed=3))
    engine = Remote(line, Plain(), deadline_s=0.01)
    assert all(report.receipt.failure for report in engine.ask(asks()))
    time.sleep(0.45)
    engine = Remote(line, Plain(), deadline_s=5.0)
    reports = list(engine.ask([replace(ask, split="next") for ask in asks()]))
    assert len(reports) == 3
    assert not any(report.receipt.failure for report in reports)


def test_an_ask_that_cannot_be_sealed_fails_alone():
    class Choosy(Plain):
        def seal(self, ask: Ask) -> bytes:
            return super().seal(replace(ask, split=None) if ask.silo == "b" else ask)

    engine = Remote(Loopback({silo: Place for silo in SILOS}), Choosy(), deadline_s=5.0)
    assert {report.silo: bool(report.receipt.failure) for report in engine.ask(asks())} == {"a": 0, "b": 1, "c": 0}


def test_numbers_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="deadline_s=0"):
        remote(places(), deadline_s=0)
    with pytest.raises(ValueError, match="retries=-1"):
        remote(places(), retries=-1)
