"""Shadows: who was in which is known, and LiRA with them finds members that the plain loss hardly finds."""

from __future__ import annotations

import numpy as np
import pytest

from foedus.audit import membership, shadows
from foedus.audit.membership import documents_of, infer
from foedus.audit.shadows import Shadows, cast, halves, plainly
from foedus.lm.objectives import concat
from foedus.silo import LocalPlan

from ..conftest import sentences
from .test_membership import encode, make_bench, overfit

PLAN = LocalPlan(lr=0.02, batch=16, steps=30)


@pytest.fixture(scope="module")
def setting():
    """A bench, members, others, an adapter trained on the members, and eight shadows."""
    bench = make_bench()
    texts = sentences("medicine", 40) + sentences("law", 40)
    order = np.random.default_rng(2).permutation(80)
    members, others = (encode(bench, [texts[i] for i in part]) for part in np.split(order, 2))
    made = cast(concat([members, others]), 8, plainly(bench, bench.start(), PLAN, seed=1), seed=1)
    return bench, members, others, overfit(bench, members, steps=60), made


def test_every_document_is_in_exactly_half_of_the_shadows_and_by_itself():
    inside = halves(8, 500, np.random.default_rng(0))
    assert (inside.sum(0) == 4).all() and inside.shape == (8, 500)
    assert abs(np.corrcoef(inside)[0, 1] + 1 / 7) < 0.15  # drawn without replacement within a document, apart between
    assert abs(np.corrcoef(inside.T[:2])[0, 1]) < 1


def test_a_shadow_knows_its_own_documents_better(setting):
    bench, members, others, _, made = setting
    data = concat([members, others])
    said = np.stack([-membership.read(bench, params, data, seed=0).loss for params in made.params])
    assert len(made.params) == 8 and made.inside.shape == (8, len(documents_of(data)))
    gap = np.where(made.inside, said, np.nan), np.where(made.inside, np.nan, said)
    assert (np.nanmean(gap[0], 0) > np.nanmean(gap[1], 0)).mean() > 0.75  # a coin: 0.5 ± 0.06


def test_lira_finds_members_that_the_loss_hardly_finds(setting):
    bench, members, others, released, made = setting
    said = {a.name: a for a in infer(bench, released, bench.start(), members, others, seed=1, shadows=made)}
    assert said["lira"].curve.auc > said["loss"].curve.auc and said["lira"].curve.auc_low > 0.7
    assert said["lira"].note == "8 shadow adapters"


def test_lira_asks_only_the_shadows_that_never_saw_a_text(setting):
    bench, members, others, released, made = setting
    data = concat([members, others])
    target = membership.read(bench, released, data, seed=1)
    said = np.stack([-membership.read(bench, params, data, seed=1).loss for params in made.params])
    x = -target.loss[3]
    outside = [row[3] for row, inside in zip(said, made.inside, strict=True) if not inside[3]]
    spread = np.sqrt(np.mean([said[~made.inside[:, i], i].var(ddof=1) for i in range(80)]))
    score = membership.lira(bench, target, data, made, seed=1)[3]
    assert len(outside) == 4 and score == pytest.approx((x - np.mean(outside)) / spread)


def test_lira_finds_nobody_without_training(setting):
    bench, members, others, _, made = setting
    said = {a.name: a for a in infer(bench, bench.start(), bench.start(), members, others, seed=1, shadows=made)}
    assert said["lira"].curve.auc_low < 0.5 < said["lira"].curve.auc_high


def test_shadows_side_by_side_are_those_one_by_one(setting, monkeypatch):
    bench, members, others, _, made = setting
    monkeypatch.setattr(shadows, "preferred_cohort", lambda *_: 1)
    alone = cast(concat([members, others]), 8, plainly(bench, bench.start(), PLAN, seed=1), seed=1)
    np.testing.assert_array_equal(alone.inside, made.inside)
    for one, other in zip(alone.params[:2], made.params[:2], strict=True):
        for name, x in one.items():
            np.testing.assert_allclose(x, other[name], rtol=0.05, atol=0.02)  # 30 steps of 0.02; rounding differs


@pytest.mark.parametrize("count, documents", [(3, 10), (2, 10), (7, 10), (8, 1)])
def test_an_odd_or_a_small_number_of_shadows_is_refused(count, documents):
    with pytest.raises(ValueError, match="Expected"):
        halves(count, documents, np.random.default_rng(0))


def test_a_plan_in_epochs_and_shadows_without_a_record_are_refused(setting):
    bench = setting[0]
    with pytest.raises(ValueError, match="epochs"):
        plainly(bench, bench.start(), LocalPlan(lr=0.1, batch=4, epochs=1), seed=0)
    with pytest.raises(ValueError, match="inside"):
        Shadows((bench.start(),), np.ones((2, 3), bool))
