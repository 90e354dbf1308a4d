"""Hello, agree, bye: what passes between the parties beside the work, and what each keeps and drops after it."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from foedus.cli_silo import leave
from foedus.deploy.forms import CLOSE, same_work
from foedus.deploy.guard import COUNTERS
from foedus.deploy.run import Present, begin_run, carry_out
from foedus.engines.base import Ask
from foedus.engines.frames import pack_ask
from foedus.errors import RunError
from foedus.governance import TRAY
from foedus.governance.envelope import CLOSED, Reason, Refused, seal
from foedus.secure.keys import Identity
from foedus.types import Receipt, Report
from foedus.wire import canonical

from .federation import Federation
from .parties import Parties, ask, records
from .test_guard import exchange, why
from .test_parties import MASKED, treaty

AGREED = {"model": "ab", "parts": [["delta", "a", [2, 3]]], "privacy": {"noise_multiplier": 1.25, "delta": 1e-5}}


@pytest.fixture
def parties(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: None)
    return Parties(tmp_path)


def filled(parties: Parties) -> Path:
    """The out-tray of a silo, with something in it."""
    tray = parties.home("north").work(parties.signed.digest) / TRAY
    tray.mkdir(parents=True, exist_ok=True)
    (tray / "north.train.safetensors").write_bytes(b"before masks")
    return tray


def trays(parties: Federation) -> list[Path]:
    return [tray for silo in parties.silos.values() for tray in silo.path.glob(f"work/*/{TRAY}")]


def test_a_good_bye_empties_the_out_tray_and_no_task_is_taken_after_it(parties):
    guard, gate, tray = parties.guard(), parties.seal(), filled(parties)
    exchange(guard, gate, ask(0))
    assert not exchange(guard, gate, ask(0)).receipt.failure and tray.exists()  # a round that is redone needs it
    for _ in range(2):
        assert not exchange(guard, gate, Ask("bye", "north", b"")).receipt.failure and not tray.exists()
    for late in (ask(0), ask(1), Ask("agree", "north", b"")):
        assert why(exchange(guard, gate, late)) == Reason.OUT_OF_ORDER
    (parties.home("north").work(parties.signed.digest) / COUNTERS).unlink()  # the ledger knows
    assert why(exchange(parties.guard(), gate, ask(1))) == Reason.OUT_OF_ORDER
    assert [body["kind"] for body in records(parties.home("north"), "asked")] == ["train", "train", "bye", "bye"]


def test_nobody_but_its_coordinator_says_bye(parties):
    guard, tray, north = parties.guard(), filled(parties), parties.silos["north"].public
    for sender in (Identity.fresh(), parties.silos["south"]):
        bye = seal(sender, north, bytes.fromhex(parties.signed.digest), 9, pack_ask(Ask("bye", "north", b"")))
        assert guard(bye) == CLOSED
    assert tray.exists() and not exchange(guard, parties.seal(), ask(0)).receipt.failure


@pytest.mark.parametrize(("decision", "stays"), [("paused", True), ("left", False), ("withdrawn", False)])
def test_a_silo_that_left_a_treaty_keeps_nothing_to_give_again_under_it(parties, decision, stays):
    guard, gate, tray = parties.guard(), parties.seal(), filled(parties)
    parties.says("north", **{decision: (parties.signed.digest,) if decision == "withdrawn" else True})
    assert why(exchange(guard, gate, ask(0))) and tray.exists() == stays


def test_an_operator_that_leaves_a_treaty_empties_its_out_tray_and_no_others(tmp_path):
    one, two = (treaty(tmp_path, {"treaty.name": name}) for name in ("one", "two"))
    parties = Federation(tmp_path)
    north = parties.silos["north"]
    for by in (one, two):
        parties.propose(by)
        (north.work(by.digest()) / TRAY).mkdir(parents=True)
    leave("one", north.path)
    assert trays(parties) == [north.work(two.digest()) / TRAY]
    leave("", north.path)
    assert not trays(parties)


@pytest.mark.parametrize("sums", [{}, MASKED], ids=["open", "masked"])
def test_a_run_that_is_stopped_keeps_the_silos_answers_and_one_that_has_ended_does_not(tmp_path, sums):
    by = treaty(tmp_path, sums, {"evaluation.baselines": []})
    parties = Federation(tmp_path)
    parties.propose(by)
    folder = begin_run(parties.home, by)
    with closing(carry_out(parties.home, folder, lines=parties.lines)) as events:
        next(event for event in events if event.kind == "round")
    assert len(trays(parties)) == 3
    assert list(carry_out(parties.home, folder, lines=parties.lines))[-1].kind == "done" and not trays(parties)
    (parties.silos["north"].work(by.digest()) / TRAY).mkdir()  # of one that did not hear it
    assert list(carry_out(parties.home, folder, lines=parties.lines))[-1].kind == "done" and not trays(parties)


# ---- what came of a treaty ----


def test_what_both_sides_came_to_is_the_same_within_the_rounding_of_their_machines():
    same_work(AGREED, canonical(AGREED))
    near = {**AGREED["privacy"], "noise_multiplier": 1.25 * (1 + CLOSE / 2)}
    same_work(AGREED, canonical({**AGREED, "privacy": near}))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({**AGREED, "model": "cd"}, "expected model = 'ab' by this treaty, as here; got 'cd' there"),
        ({**AGREED, "parts": [["delta", "a", [2, 4]]]}, r"parts\[0\]\[2\]\[1\] = '3' .* '4' there"),
        ({**AGREED, "parts": []}, "parts = "),
        ({**AGREED, "privacy": None}, "got 'None' there"),
        ({**AGREED, "privacy": {**AGREED["privacy"], "noise_multiplier": 1.2501}}, "noise_multiplier = 1.25 .* 1.2501"),
    ],
)
def test_where_a_silo_came_to_something_else_is_said_exactly(other, said):
    with pytest.raises(Refused, match=said) as caught:
        same_work(AGREED, canonical(other))
    assert caught.value.reason == Reason.NOT_AGREED and "same base model" in caught.value.do


@pytest.mark.parametrize("said", [b"", b"[" * 100_000, b"\xff", b"{" + b" " * (1 << 24)])
def test_what_cannot_be_read_was_not_agreed(said):
    with pytest.raises(Refused, match=r"refused \(malformed\)"):
        same_work(AGREED, said)


def test_a_silo_with_another_model_is_told_apart_before_it_trains_and_both_ledgers_have_it(parties):
    guard, gate = parties.guard(), parties.seal()
    load, gate.agreed = guard.engine, AGREED
    for model, reason in (("ab", None), ("cd", Reason.NOT_AGREED)):
        guard.engine = lambda signed, model=model: replace(load(signed), agreed={**AGREED, "model": model})
        assert why(exchange(guard, gate, Ask("agree", "north", b""))) == reason
    assert not parties.engines["north"].asked
    assert [r["body"]["reason"] for r in parties.ledger.records if r["kind"] == "refused"] == ["not agreed"]


class Calls:
    """An engine and a line: `unfit` says no to one kind of ask, everybody else yes to all."""

    def __init__(self, unfit: dict[str, str]) -> None:
        self.memory, self.unfit, self.kinds = {}, unfit, []

    def silos(self):
        return frozenset({"north", "east", "south"})

    def ask(self, asks):
        self.kinds += [(one.kind, one.silo) for one in asks]
        for one in asks:
            yield Report(one.silo, 0, b"", Receipt(one.silo, 0, failure="no" * (self.unfit.get(one.silo) == one.kind)))


@pytest.mark.parametrize("kind", ["hello", "agree"])
def test_who_cannot_be_introduced_is_asked_for_no_work_and_is_tried_again(tmp_path, kind):
    parties = Federation(tmp_path)
    parties.propose(treaty(tmp_path))
    (signed,) = parties.home.signed()
    calls = Calls({"east": kind})
    engine, asks = Present(calls, calls, signed), [Ask("join", silo, b"") for silo in ("north", "east")]
    assert {r.silo: r.receipt.failure for r in engine.ask(asks)} == {"north": "", "east": "no"}
    assert ("join", "east") not in calls.kinds and ("join", "north") in calls.kinds
    calls.unfit.clear()
    assert not [r for r in engine.ask(asks) if r.receipt.failure]
    assert calls.kinds.count(("hello", "north")) == calls.kinds.count(("agree", "north")) == 1


def test_a_run_that_waits_for_a_signature_says_why_the_silo_gave_none(tmp_path):
    by, parties = treaty(tmp_path), Federation(tmp_path, settings={"patience_s": 0.2})
    parties.propose(by, signers=("east", "south"))
    (file,) = parties.silos["north"].treaties.glob("*/*.json")
    file.unlink()
    with pytest.raises(RunError, match=r"no signature of .*; north says: refused \(wrong treaty\)"):
        list(carry_out(parties.home, begin_run(parties.home, by), lines=parties.lines))
