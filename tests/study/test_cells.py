"""From a study to its cells: what is run, and what shares a run."""

from __future__ import annotations

import pytest

from foedus.errors import FoedusError
from foedus.study.cells import plan
from foedus.study.spec import load

from .studies import STUDY, write_study


@pytest.fixture
def planned(tmp_path):
    file = write_study(tmp_path)
    return plan(load(file), file)


def test_a_cell_is_the_base_treaty_with_the_methods_and_the_points_keys_and_a_seed(planned):
    use = next(u for u in planned.uses if (u.part, u.row, u.column, u.seed) == (("curve", "pace"), "new", 2, 3))
    treaty = planned.by_key()[use.cell].treaty
    assert (treaty.algorithm.name, treaty.algorithm.mu, treaty.local.lr, treaty.seed) == ("fedprox", 0.5, 0.04, 3)
    assert planned.by_key()[use.cell].name == "new, pace 0.04, seed 3"


def test_equal_treaties_share_one_cell_between_table_curves_and_ablations(planned):
    assert len({cell.digest for cell in planned.cells}) == len(planned.cells)
    uses = {(u.part[0], u.row, u.column): u.cell for u in planned.uses if u.seed == 1}
    assert uses["table", "new", 0] == uses["curve", "new", 0] == uses["ablation", "new", 0]
    assert uses["table", "plain", 0] == uses["table", "pooled", 0]
    table, curve, ablation = 3 * 3, 3 * 2 * 2, 2
    assert len(planned.cells) == table + curve + ablation


def test_the_table_comes_first_and_seed_by_seed(planned):
    assert [cell.name for cell in planned.cells[:6]] == [
        "new, seed 1", "prox, seed 1", "plain, seed 1", "new, seed 2", "prox, seed 2", "plain, seed 2",
    ]  # fmt: skip


def test_a_curve_of_shift_makes_no_cell(planned):
    assert not [use for use in planned.uses if use.part == ("curve", "shift")]


def test_far_text_is_read_by_those_that_a_curve_of_shift_shows_alone(planned):
    far = {cell.key for cell in planned.cells if cell.told({"far": "notes.jsonl"})["far"]}
    assert far == {use.cell for use in planned.uses if use.part == ("table",) and use.row in ("new", "prox")}


def test_a_combination_that_is_no_treaty_is_told_before_anything_runs(tmp_path):
    text = STUDY.replace('"local.lr" = 0.02', '"local.lrr" = 0.02').replace('"local.lr" = 0.04', '"local.lr" = -1')
    file = write_study(tmp_path, text)
    with pytest.raises(FoedusError) as caught:
        plan(load(file), file)
    told = [f"{p.where}; {p.do}" for p in caught.value.problems]
    assert len(told) == 4  # two points of two methods, once for all seeds
    assert any("new, pace 0.02: [local] lrr" in line and 'Did you mean "lr"?' in line for line in told)
    assert any("plain, pace 0.04: [local] lr" in line for line in told)


def test_a_key_that_no_longer_applies_goes_with_the_change(planned):
    plain = next(cell for cell in planned.cells if cell.name == "plain, seed 1")
    assert "mu" not in plain.treaty.tables()["algorithm"]


def test_while_validation_decides_no_treaty_names_the_test_data(tmp_path):
    file = write_study(tmp_path)
    base = (tmp_path / "treaty.toml").read_text()
    (tmp_path / "treaty.toml").write_text(base.replace("[silos]", 'test_source = "notes.jsonl"\n[silos]'))
    assert all(cell.treaty.data.test_source is None for cell in plan(load(file), file).cells)
    file.write_text(STUDY.replace("seeds = [1, 2, 3]", 'seeds = [1, 2, 3]\nsplit = "test"'))
    assert all(cell.treaty.data.test_source == "notes.jsonl" for cell in plan(load(file), file).cells)
