"""Budgets outlive treaties, add up, and refuse; nothing is released twice for one charge."""

from __future__ import annotations

import numpy as np
import pytest

from foedus.errors import GuaranteeError, RunError
from foedus.governance import Budget, Cap, KeptMechanism, Ledger, SiloCustody
from foedus.privacy import accountant, events
from foedus.privacy.noise import SystemSource
from foedus.privacy.plan import Terms, make_plan
from foedus.types import Receipt, Report, Total

ROUND = events.repeat(events.poisson(0.1, events.gaussian(1.0)), 5)
WHOLE = events.repeat(ROUND, 4)


def spent(budget: Budget) -> float:
    return accountant.epsilon(budget.spent(), 1e-5).upper


def test_charges_of_all_treaties_add_up_and_stay_on_disk(tmp_path):
    budget = Budget(tmp_path, "north/hospital")
    assert spent(budget) == 0
    budget.charge("t1", "example", 0, ROUND)
    one = spent(budget)
    budget.charge("t2", "example", 0, ROUND)
    again = Budget(tmp_path, "north/hospital")
    assert spent(again) == spent(budget) > one > 0
    assert again.spent("silo")["of"] == []


def test_a_round_is_charged_once_and_not_at_all_after_its_release(tmp_path):
    budget = Budget(tmp_path, "a")
    for _ in range(3):
        budget.charge("t", "example", 0, ROUND)
    assert len(budget.ledger.records) == 1
    budget.released("t", 0)
    with pytest.raises(GuaranteeError, match="has not released yet"):
        budget.charge("t", "example", 0, ROUND)


def test_a_spent_budget_refuses_before_anything_is_trained(tmp_path):
    whole = accountant.epsilon(WHOLE, 1e-5).upper
    budget = Budget(tmp_path, "a")
    budget.allow(Cap(1.2 * whole, 1e-5))
    budget.reserve("t1", "example", WHOLE)
    budget.reserve("t1", "example", WHOLE)  # the same treaty again, after a crash
    with pytest.raises(GuaranteeError, match="what is spent stays spent"):
        budget.reserve("t2", "example", WHOLE)
    assert [r["kind"] for r in Budget(tmp_path, "a").ledger.records] == ["cap", "treaty"]
    budget.allow(Cap(3 * whole, 1e-5))
    budget.reserve("t2", "example", WHOLE)


def test_a_budget_that_somebody_changed_is_noticed(tmp_path):
    Budget(tmp_path, "a").charge("t", "example", 0, ROUND)
    file = tmp_path / "a.jsonl"
    file.write_text(file.read_text().replace('"rate":0.1', '"rate":0.0'))
    with pytest.raises(RunError, match="changed the ledger"):
        Budget(tmp_path, "a")


@pytest.mark.parametrize("cap", [(0, 1e-5), (1, 0), (1, 1), (-1, 1e-5)])
def test_a_cap_that_means_nothing_is_refused(cap):
    with pytest.raises(GuaranteeError):
        Cap(*cap)


# ---- custody ----


def custody(tmp_path) -> SiloCustody:
    return SiloCustody(tmp_path / "budgets", tmp_path / "tray", "t", "example", (ROUND,) * 4, WHOLE)


def report(round: int = 0) -> Report:
    return Report("a", round, b"noised", Receipt("a", round, task="d", disclosed={"x": 1.0}))


def test_a_report_comes_back_as_it_was_for_the_same_task_only(tmp_path):
    kept = custody(tmp_path)
    assert kept.kept("a", "d") is None
    kept.charge("a", 0)
    kept.keep("d", report(), {("private factor", ""): np.array([0.5])})
    for one in (kept, custody(tmp_path)):
        again, memory = one.kept("a", "d")
        assert again == report() and float(memory["private factor", ""][0]) == 0.5
        assert one.kept("a", "another task") is None


def test_a_round_that_was_kept_cannot_be_drawn_again(tmp_path):
    kept = custody(tmp_path)
    kept.charge("a", 0)
    kept.keep("d", report(), {})
    with pytest.raises(GuaranteeError, match="Noise must not be drawn twice"):
        custody(tmp_path).charge("a", 0)
    kept.charge("a", 1)


@pytest.mark.parametrize("round", [-1, 4])
def test_a_round_that_was_not_agreed_is_refused(tmp_path, round):
    with pytest.raises(GuaranteeError, match="rounds that were agreed"):
        custody(tmp_path).charge("a", round)


def test_a_charge_without_a_release_may_be_tried_again(tmp_path):
    custody(tmp_path).charge("a", 0)
    custody(tmp_path).charge("a", 0)
    assert len(Budget(tmp_path / "budgets", "a").ledger.records) == 1


# ---- the server's noise ----


def kept_mechanism(tmp_path) -> KeptMechanism:
    terms = Terms("silo", 1e-5, 3, noise_multiplier=1.0, silos=10, expected=10)
    made = make_plan(terms, SystemSource()).mechanism()
    return KeptMechanism(made, Ledger(tmp_path / "ledger.jsonl"), tmp_path / "release.safetensors")


def total() -> Total:
    return Total({("delta", "w"): np.zeros(100)}, 1.0, 10)


def test_a_release_is_charged_before_it_is_made_and_comes_back_after_a_crash(tmp_path, monkeypatch):
    made = kept_mechanism(tmp_path)
    right = type(made.mechanism).release

    def release(self, *a):
        assert Ledger(tmp_path / "ledger.jsonl").records[-1]["kind"] == "charge"
        return right(self, *a)

    monkeypatch.setattr(type(made.mechanism), "release", release)
    first, state = made.release(total(), made.init())
    again, same = kept_mechanism(tmp_path).release(total(), made.init())
    assert np.array_equal(first.tensors["delta", "w"], again.tensors["delta", "w"]) and first.event == again.event
    assert state.keys() == same.keys()
    second, _ = made.release(total(), state)
    assert not np.array_equal(first.tensors["delta", "w"], second.tensors["delta", "w"])


def test_a_round_in_the_ledger_is_not_released_anew(tmp_path):
    made = kept_mechanism(tmp_path)
    made.release(total(), made.init())
    made.ledger.append("round", {"round": 1})
    (tmp_path / "release.safetensors").unlink()
    with pytest.raises(GuaranteeError, match="not released yet"):
        made.release(total(), made.init())
