"""A silo's gate: it works for the treaty that all signed, within its charter, in order, and once."""

from __future__ import annotations

import threading
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest

from foedus.deploy import guard as guards
from foedus.deploy.guard import Guard
from foedus.deploy.seal import Seal, reason_of
from foedus.engines.base import Ask
from foedus.engines.frames import pack_ask
from foedus.errors import GuaranteeError, SiloError
from foedus.governance import Budget, Cap, Ledger
from foedus.governance.envelope import CLOSED, Reason, Refused, seal
from foedus.secure.keys import Identity
from foedus.treaty import charter, parse, signed
from foedus.types import Report

from .parties import CHARTER, MODEL, NOON, SILOS, START, TREATY, Parties, ask, records, report_of

PRIVATE = TREATY + '[privacy]\nunit = "example"\nnoise_multiplier = 2.0\nrate = 0.1\n'


@pytest.fixture
def parties(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: None)
    return Parties(tmp_path)


def exchange(guard: Guard, gate: Seal, what: Ask) -> Report:
    """One ask, and what came of it."""
    asked = gate.seal(what)
    return gate.open(what.silo, asked, guard(asked))


def why(report: Report) -> Reason | None:
    return reason_of(report.receipt.failure)


def worked(parties: Parties) -> int:
    return len(parties.engines["north"].asked)


def changed(parties: Parties, old: str, new: str, name: str = "north") -> None:
    path = parties.home(name).charter
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_rounds_and_evaluations_pass_and_both_sides_write_them_down(parties):
    guard, gate = parties.guard(), parties.seal()
    for round in range(4):
        report = exchange(guard, gate, ask(round))
        assert not report.receipt.failure and report.payload
        if round % 2:
            assert not exchange(guard, gate, ask(round + 1, kind="evaluate", split="validation")).receipt.failure
    home = parties.home("north")
    asked, answered = records(home, "asked"), records(home, "answered")
    assert [body["stream"] for body in asked] == ["train", "train", "evaluate validation"] * 2
    assert [body["round"] for body in answered] == [1, 2, 2, 3, 4, 4]
    assert all(body["task"] and body["payload"] and body["params"] for body in answered)
    assert not records(home, "refused")


def test_the_same_bytes_again_get_the_same_answer_and_no_second_work(parties):
    guard, gate = parties.guard(), parties.seal()
    asked = gate.seal(ask(0))
    assert guard(asked) == guard(asked) and worked(parties) == 1
    assert len(records(parties.home("north"), "asked")) == 1


def test_what_was_cut_off_is_done_again_after_a_restart_and_counted_once(parties, monkeypatch):
    guard, gate = parties.guard(), parties.seal()
    asked = gate.seal(ask(0))

    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(parties.engines["north"], "ask", dies)
    with pytest.raises(KeyboardInterrupt):
        guard(asked)
    monkeypatch.undo()
    report = gate.open("north", asked, parties.guard()(asked))
    assert not report.receipt.failure
    assert len(records(parties.home("north"), "asked")) == len(records(parties.home("north"), "answered")) == 1
    assert why(exchange(parties.guard(), gate, ask(0, params={**START, "b": START["b"] + 1}))) == Reason.OUT_OF_ORDER


def test_a_round_may_be_redone_with_the_same_task_by_a_coordinator_that_was_restarted(parties):
    guard = parties.guard()
    first = exchange(guard, parties.seal(), ask(2))
    again = exchange(guard, parties.seal(), ask(2))
    assert first == again


def test_an_ask_that_was_taken_is_in_the_ledger_before_it_is_worked_on(parties):
    seen = []

    class Looks:
        memory: dict = {}

        def ask(self, asks):
            seen.append(len(records(parties.home("north"), "asked")))
            yield report_of("north", asks[0], {("delta", name): x for name, x in START.items()})

    parties.engines["north"] = Looks()
    exchange(parties.guard(), parties.seal(), ask(0))
    assert seen == [1]


@pytest.mark.parametrize(
    ("decision", "reason"),
    [({"paused": True}, Reason.PAUSED), ({"left": True}, Reason.LEFT), ({"withdrawn": None}, Reason.WITHDRAWN)],
)
def test_what_the_operator_decides_holds_from_the_next_message_on(parties, decision, reason):
    guard, gate = parties.guard(), parties.seal()
    asked = gate.seal(ask(0))
    guard(asked)
    parties.says("north", **{key: (parties.signed.digest,) if x is None else x for key, x in decision.items()})
    assert why(gate.open("north", asked, guard(asked))) == reason
    assert why(exchange(guard, gate, ask(1))) == reason and worked(parties) == 1
    parties.says("north")
    assert not exchange(guard, gate, ask(1)).receipt.failure


@pytest.mark.parametrize("content", [b"", b"{}", b'{"paused": false, "left": false}'])
def test_decisions_that_cannot_be_read_let_nothing_out(parties, content):
    guard, gate, home = parties.guard(), parties.seal(), parties.home("north")
    home.state.write_bytes(content)
    assert why(exchange(guard, gate, ask(0))) == Reason.PAUSED and not worked(parties)
    home.state.unlink()
    engine = parties.engines["north"]
    honest = engine.ask

    def breaks(asks):
        home.state.write_bytes(content)
        return honest(asks)

    engine.ask = breaks
    report = exchange(guard, gate, ask(0))
    assert why(report) == Reason.PAUSED and not report.payload and not records(home, "answered")


@pytest.mark.parametrize("decision", ["pauses", "withdraws", "a stricter charter"])
def test_what_the_operator_decides_while_the_silo_works_keeps_its_answer_inside(parties, decision):
    engine = parties.engines["north"]
    honest = engine.ask

    def decides(asks):
        reports = list(honest(asks))
        if decision == "a stricter charter":
            changed(parties, "max_rounds = 10", "max_rounds = 1")
        else:
            gone = (parties.signed.digest,) if decision == "withdraws" else ()
            parties.says("north", paused=decision == "pauses", withdrawn=gone)
        return reports

    engine.ask = decides
    report = exchange(parties.guard(), parties.seal(), ask(0))
    assert why(report) in (Reason.PAUSED, Reason.WITHDRAWN, Reason.CHARTER) and not report.payload
    assert worked(parties) == 1 and not records(parties.home("north"), "answered")


def test_nothing_is_done_outside_the_hours_or_after_the_last_day_but_to_say_hello(parties):
    changed(parties, "[limits]", '[hours]\nzone = "UTC"\nbegin = "13:00"\nend = "14:00"\n[limits]')
    guard, gate = parties.guard(), parties.seal()
    assert why(exchange(guard, gate, ask(0))) == Reason.CHARTER
    assert not exchange(guard, gate, Ask("hello", "north", b"")).receipt.failure
    parties.clock = NOON + timedelta(hours=1)
    assert not exchange(guard, gate, ask(0)).receipt.failure
    changed(parties, "[models]", "[charter]\nexpires = 2026-11-20\n[models]")
    assert why(exchange(guard, gate, ask(1))) == Reason.CHARTER
    assert "[hours]" in str(records(parties.home("north"), "refused")[0]["clauses"])


def test_a_charter_that_is_made_stricter_ends_a_treaty_that_was_signed(parties):
    guard, gate = parties.guard(), parties.seal()
    assert not exchange(guard, gate, ask(0)).receipt.failure
    changed(parties, "max_rounds = 10", "max_rounds = 1")
    refused = exchange(guard, gate, ask(1))
    assert why(refused) == Reason.CHARTER and "[training] max_rounds" in refused.receipt.failure
    (body,) = records(parties.home("north"), "refused")
    assert body["clauses"] == ["[training] max_rounds allows at most 1 rounds; asked: 5"] and body["ask"] == "train"


def test_the_base_model_must_be_the_one_that_the_charter_names_by_its_digest(parties):
    changed(parties, '"any"', f'"{"cd" * 32}"')
    refused = exchange(parties.guard(), parties.seal(), ask(0))
    assert why(refused) == Reason.CHARTER and MODEL in refused.receipt.failure and not worked(parties)
    changed(parties, "cd" * 32, MODEL)
    assert not exchange(parties.guard(), parties.seal(), ask(0)).receipt.failure


def test_a_treaty_that_not_all_signed_trains_nobody_and_hello_brings_the_signatures(parties):
    other = parse(TREATY.replace("seed = 1", "seed = 2"))
    parties.keep(parties.sign(other, by=["north"]), "north")
    guard, gate = parties.guard(), parties.seal(parties.sign(other))
    refused = exchange(guard, gate, ask(0, seed=2))
    assert why(refused) == Reason.UNSIGNED and "south" in refused.receipt.failure
    hello = exchange(guard, gate, Ask("hello", "north", b"", mail=parties.sign(other, by=["south", "west"]).packed()))
    assert gate.merged(hello).binding
    assert not exchange(guard, gate, ask(0, seed=2)).receipt.failure


def test_a_silo_answers_under_no_treaty_that_it_did_not_sign_itself(parties):
    other = parse(TREATY.replace("seed = 1", "seed = 2"))
    parties.keep(parties.sign(other, by=["south", "west"]), "north")
    assert why(exchange(parties.guard(), parties.seal(parties.sign(other)), ask(0, seed=2))) == Reason.UNSIGNED
    assert not worked(parties)


def test_a_coordinator_asks_for_no_work_under_a_treaty_that_not_all_signed(parties):
    gate = parties.seal(parties.sign(parties.treaty, by=["north", "south"]))
    with pytest.raises(GuaranteeError, match="west"):
        gate.seal(ask(0))
    gate.seal(Ask("hello", "north", b""))
    with pytest.raises(SiloError, match="treaty's silos"):
        gate.seal(ask(0, silo="east"))


def test_a_coordinator_whose_invitation_was_not_taken_hears_nothing_even_under_its_own_treaty(parties):
    guard, gate = parties.guard(), parties.seal()
    stranger = Identity.fresh()
    guard.joined = stranger.public
    assert guard(gate.seal(ask(0))) == CLOSED
    changed(parties, "[models]", f'[coordinators]\ntrusted = ["{parties.chair.public.hex()}"]\n[models]')
    assert not exchange(guard, gate, ask(0)).receipt.failure


def test_a_trusted_coordinator_cannot_ask_under_the_treaty_of_another(parties):
    other = Identity.fresh()
    keys = [parties.chair.public.hex(), other.public.hex()]
    changed(parties, "[models]", f'[coordinators]\ntrusted = ["{keys[0]}", "{keys[1]}"]\n[models]')
    gate = parties.seal()
    gate.identity = other
    guard = parties.guard()
    guard(gate.seal(ask(0)))
    (body,) = records(parties.home("north"), "refused")
    assert body["reason"] == "stranger" and not worked(parties)


def test_whoever_is_a_silo_of_a_treaty_is_not_its_coordinator_nor_the_coordinator_a_silo(parties):
    guard, chair, south = parties.guard(), parties.chair, parties.silos["south"]
    keys = f'trusted = ["{chair.public.hex()}", "{south.public.hex()}"]'
    changed(parties, "[models]", f"[coordinators]\n{keys}\n[models]")  # so that south may ask, of another treaty
    gate = parties.seal()
    gate.identity = south
    asked = gate.seal(ask(0))
    guard(asked)
    (body,) = records(parties.home("north"), "refused")
    assert body["reason"] == "stranger" and not worked(parties)
    gate.identity = chair
    answer = parties.guard("south")(gate.seal(ask(1, silo="south")))
    for answer_to, said in ((asked, answer), (asked, asked)):  # another silo's answer, and an ask sent back
        with pytest.raises(Refused, match=r"refused \((stranger|unsolicited)\)"):
            gate.open("north", answer_to, said)


def test_a_silo_works_under_no_treaty_that_knows_it_by_another_key(parties):
    keys = {name: (Identity.fresh() if name == "north" else one) for name, one in parties.silos.items()}
    made = signed.propose(
        parse(TREATY.replace("seed = 1", "seed = 2")), parties.chair, {n: k.public for n, k in keys.items()}
    )
    for one in keys.values():
        made = made.signed_by(one)
    parties.keep(made, "north")
    body = pack_ask(ask(0, seed=2))
    blob = seal(parties.chair, parties.silos["north"].public, bytes.fromhex(made.digest), 1, body)
    parties.guard()(blob)
    (refused,) = records(parties.home("north"), "refused")
    assert refused["reason"] == "wrong treaty" and not worked(parties)


def test_an_answer_that_is_too_large_for_the_charter_stays_inside(parties):
    parties.engines["north"].change = {("delta", "c"): np.zeros(300_000)}
    assert why(exchange(parties.guard(), parties.seal(), ask(0))) == Reason.OVERSIZED


def test_whatever_breaks_inside_is_a_failed_report_without_its_message(parties, caplog):
    said = "patient"

    def breaks(*_):
        raise ValueError(said)

    parties.engines["north"].ask = breaks
    report = exchange(parties.guard(), parties.seal(), ask(0))
    assert report.receipt.failure == "ValueError" and why(report) is None
    assert "patient" not in caplog.text and "patient" not in parties.home("north").ledger.read_text()


def test_a_silo_that_cannot_load_says_so_and_the_ask_may_come_again(parties, monkeypatch):
    guard, gate = parties.guard(), parties.seal()
    engine, guard.engine = guard.engine, lambda _: (_ for _ in ()).throw(SiloError("a", "/secret/place", "c"))
    asked = gate.seal(ask(0))
    report = gate.open("north", asked, guard(asked))
    assert why(report) == Reason.UNABLE and "secret" not in report.receipt.failure
    guard.engine = engine
    assert not gate.open("north", asked, guard(asked)).receipt.failure


def test_counters_that_cannot_be_read_stop_the_silo(parties):
    gate = parties.seal()
    exchange(parties.guard(), gate, ask(0))
    (parties.home("north").work(parties.signed.digest) / guards.COUNTERS).write_text("{")
    assert why(exchange(parties.guard(), gate, ask(1))) == Reason.UNABLE and worked(parties) == 1


def test_counters_put_back_to_yesterday_let_nothing_old_in(parties):
    guard, gate = parties.guard(), parties.seal()
    path = parties.home("north").work(parties.signed.digest) / guards.COUNTERS
    first = gate.seal(ask(0))
    guard(first)
    yesterday = path.read_bytes()
    guard(gate.seal(ask(1)))
    path.write_bytes(yesterday)
    assert why(gate.open("north", first, parties.guard()(first))) == Reason.REPLAYED and worked(parties) == 2


def test_a_disk_that_takes_nothing_lets_nothing_out(parties, monkeypatch):
    guard, gate = parties.guard(), parties.seal()
    monkeypatch.setattr(Ledger, "append", lambda *_: (_ for _ in ()).throw(GuaranteeError("a", "b", "c")))
    assert why(exchange(guard, gate, ask(0))) == Reason.UNABLE and not worked(parties)


def test_messages_from_many_threads_are_worked_on_one_by_one(parties):
    guard, gate, at_once, most = parties.guard(), parties.seal(), [0], [0]
    engine = parties.engines["north"]
    honest = engine.ask

    def slow(asks):
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        reports = list(honest(asks))
        threading.Event().wait(0.01)
        at_once[0] -= 1
        return reports

    engine.ask = slow
    asked = gate.seal(ask(0))
    answers: list[bytes] = []
    threads = [threading.Thread(target=lambda: answers.append(guard(asked))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(answers)) == 1 and most[0] == 1 and worked(parties) == 1


def test_a_flood_of_refusals_is_counted_and_fills_no_disk(parties):
    guard, gate = parties.guard(), parties.seal()
    old = gate.seal(ask(0))
    guard(old)
    guard(gate.seal(ask(1)))
    for _ in range(300):
        guard(old)
    guard.flush()
    counts = [body["count"] for body in records(parties.home("north"), "refused")]
    assert counts == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300]


@pytest.mark.parametrize("silos", [("north", "south"), SILOS])
def test_a_cohort_is_no_smaller_than_the_treatys_minimum(parties, silos):
    made = parties.sign(parse(TREATY + "[cohort]\nminimum = 3\n"))
    parties.keep(made, "north")
    report = exchange(parties.guard(), parties.seal(made), ask(0, cohort=silos))
    assert (why(report) == Reason.NOT_AGREED) == (len(silos) < 3)


def test_what_a_treaty_costs_is_worked_out_by_the_silo_itself_and_capped_for_life(parties):
    made = parties.sign(parse(PRIVATE))
    parties.keep(made, "north")
    changed(parties, "delta = 1e-5", 'delta = 1e-5\nplacements = ["silo"]')
    guard, gate = parties.guard(), parties.seal(made)
    assert not exchange(guard, gate, ask(0)).receipt.failure
    assert Budget(parties.home("north").budgets, "north").cap == Cap(10.0, 1e-5)
    changed(parties, "epsilon = 8.0", "epsilon = 0.125")
    refused = exchange(guard, gate, ask(1))
    assert why(refused) == Reason.CHARTER and "[privacy] epsilon allows ε of at most 0.125" in refused.receipt.failure


def test_an_old_answer_is_not_taken_for_a_new_ask(parties):
    guard, gate = parties.guard(), parties.seal()
    first = gate.seal(ask(0))
    answer = guard(first)
    second = gate.seal(ask(1))
    with pytest.raises(Refused, match=r"refused \(unsolicited\)"):
        gate.open("north", second, answer)
    with pytest.raises(Refused, match=r"refused \(unsolicited\)"):
        parties.seal().open("north", first, answer)
    with pytest.raises(Refused, match=r"refused \(stranger\)"):
        asked = gate.seal(ask(1, silo="south"))
        gate.open("south", asked, answer)
    assert charter.load(parties.home("north").charter).digest == charter.parse(CHARTER).digest


def test_what_a_failing_silo_says_is_cut_short_and_nothing_else_of_it_is_kept(parties):
    engine = parties.engines["north"]
    honest = engine._answer
    engine._answer = lambda what: replace(
        report := honest(what), receipt=replace(report.receipt, failure="x" * 5000), mail=b"mail"
    )
    report = exchange(parties.guard(), parties.seal(), ask(0))
    assert report.receipt.failure == "x" * 1000 and report.payload == report.mail == b""
