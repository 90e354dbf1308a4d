"""Clip, grid and noise as stages: the bound they state holds for every update, however large, small or broken."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foedus.privacy.noise import SimulatedSource
from foedus.stages import chain
from foedus.stages.clip import NORM, WITHIN, Clip
from foedus.stages.grid import Grid
from foedus.stages.noise import AddNoise, Tail
from foedus.tree import norm
from foedus.types import Task, Total, Update

PARAMS = {"w": np.zeros((3, 4), np.float32), "b": np.zeros(5, np.float32)}


def task(**knobs: float) -> Task:
    return Task(0, "model", PARAMS, ("a",), 1, knobs)


def update(scale: float, seed: int = 0) -> Update:
    random = np.random.default_rng(seed)
    with np.errstate(over="ignore"):
        return Update(
            {("delta", k): (scale * random.normal(size=x.shape)).astype(np.float32) for k, x in PARAMS.items()}
        )


STAGES = {
    "clip": Clip(0.7), "quantile": Clip(0.7, 0.5, bit=0.5), "clip on a grid": chain(Clip(0.7), Grid(0.01)),
}  # fmt: skip


@pytest.mark.parametrize("name", STAGES)
@settings(max_examples=60, deadline=None)
@given(scale=st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e6, 1e30, 1e38, math.inf, math.nan]), seed=st.integers(0, 99))
def test_nothing_that_leaves_is_longer_than_the_bound(name, scale, seed):
    stage, t = STAGES[name], task(**{NORM: 0.7})
    before = update(scale, seed)
    left = stage.encode(before, t).tensors
    size = norm(left) * (0.01 if name == "clip on a grid" else 1.0)
    assert size <= stage.bound(math.inf, t) * (1 + 1e-6)
    again = stage.encode(before, t).tensors
    assert all(np.array_equal(left[k], again[k]) for k in left)  # pure


def test_a_zero_update_stays_zero_and_a_broken_one_becomes_zero():
    assert norm(Clip(1.0).encode(update(0.0), task()).tensors) == 0
    for broken in (math.nan, math.inf):
        assert norm(Clip(1.0).encode(update(broken), task()).tensors) == 0


def test_a_short_update_is_left_as_it_is():
    before = update(1e-3)
    after = Clip(1.0).encode(before, task()).tensors
    assert all(after[k] is before.tensors[k] or np.array_equal(after[k], before.tensors[k]) for k in after)


def test_extra_parts_count_in_the_norm():
    before = update(1.0)
    with_part = Update({**before.tensors, ("control", "w"): np.full((3, 4), 100.0)})
    assert norm(Clip(1.0).encode(with_part, task()).tensors) <= 1 + 1e-6


def test_a_norm_that_follows_a_quantile_gets_there():
    stage, random = Clip(0.01, 0.5, bit=0.5), np.random.default_rng(0)
    knobs = dict(stage.start())
    scales = np.exp(random.normal(size=200))
    true = np.median([norm(update(s, i).tensors) for i, s in enumerate(scales)])
    for _ in range(120):
        bits = [stage.encode(update(s, i), task(**knobs)).tensors[WITHIN] for i, s in enumerate(scales)]
        knobs = dict(stage.learn({WITHIN: np.mean(bits, axis=0)}, knobs))
    assert knobs[NORM] == pytest.approx(true, rel=0.15)


def test_a_grid_gives_back_what_it_rounded_to_half_a_step():
    grid, before = Grid(0.01), update(1.0)
    left = grid.encode(before, task())
    assert all(x.dtype == np.int64 for x in left.tensors.values())
    back = grid.decode(Total(left.tensors, 1.0, 1), task())
    assert all(np.abs(back.tensors[k] - before.tensors[k]).max() <= 0.005 + 1e-9 for k in back.tensors)


def test_a_grid_refuses_to_overflow():
    with pytest.raises(ValueError, match="steps"):
        Grid(1e-30).encode(update(1.0), task())


COINS = Grid(0.01, scalars=0.5, stochastic=True)


def test_coins_round_up_as_often_as_the_fraction_says():
    x = np.linspace(-0.03, 0.03, 12).astype(np.float32)
    silos = [Update({("delta", "w"): x}, silo=f"s{i}") for i in range(4000)]
    rounded = np.mean([COINS.encode(u, task()).tensors["delta", "w"] for u in silos], axis=0)
    assert np.abs(rounded * 0.01 - x).max() < 5 * 0.005 / math.sqrt(4000)


def test_the_coins_of_rounding_are_public_and_each_silos_own():
    a = replace(update(0.1), silo="a")
    left, again, other = (COINS.encode(u, task()).tensors for u in (a, a, replace(a, silo="b")))
    assert all(np.array_equal(left[k], again[k]) for k in left)
    assert any(not np.array_equal(left[k], other[k]) for k in left)


def test_what_lies_on_the_grid_already_is_left_there_and_comes_back_exactly():
    points = {("delta", "w"): np.arange(-5, 5) * 0.25, ("weight", "sum"): np.array([1.5])}
    for grid in (Grid(0.25, scalars=0.5), Grid(0.25, scalars=0.5, stochastic=True)):
        left = grid.encode(Update(points, silo="a"), task()).tensors
        assert left["weight", "sum"] == [3]
        back = grid.decode(Total(left, 1.0, 1), task()).tensors
        assert all(np.array_equal(back[k], x) for k, x in points.items())


@pytest.mark.parametrize("grid", [Grid(0.01), COINS, Grid(0.01, rounded=2)], ids=["nearest", "coins", "both rounded"])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_rounding_lengthens_by_no_more_than_the_bound_says(grid, seed):
    random = np.random.default_rng(seed)
    one = {("delta", k): random.uniform(-0.02, 0.02, x.shape) for k, x in PARAMS.items()}
    near = {k: x + random.uniform(-1e-3, 1e-3, x.shape) for k, x in one.items()}
    left, beside = (grid.encode(Update(t, silo="a"), task()).tensors for t in (one, near))
    if grid.rounded == 1:
        assert norm(left) * grid.step <= grid.bound(norm(one), task())
    else:
        apart = {k: left[k] - beside[k] for k in left}
        assert norm(apart) * grid.step <= grid.bound(norm({k: one[k] - near[k] for k in one}), task())


def test_coins_can_round_by_twice_as_much_as_the_nearest_point_is_away():
    assert Grid(0.01, stochastic=True).bound(0.0, task()) == 2 * Grid(0.01).bound(0.0, task())


def test_a_cut_brings_no_two_updates_further_apart_and_ends_every_number():
    grid = Grid(0.01, most=7)
    far = {("delta", "w"): np.array([0.0, 0.069, 0.071, 0.2, -math.inf, 1e30])}
    assert list(grid.encode(Update(far), task()).tensors["delta", "w"]) == [0, 7, 7, 7, -7, 7]
    with pytest.raises(ValueError, match="coordinates"):
        grid.encode(Update({("delta", "w"): np.array([math.nan])}), task())


def test_noise_needs_a_clip_before_it():
    with pytest.raises(ValueError, match="a clip before the noise"):
        AddNoise(chain(), (1.0,), SimulatedSource(0)).encode(replace(update(1.0), silo="a"), task())


@pytest.mark.parametrize("make", [
    lambda: Clip(0.0), lambda: Clip(math.inf), lambda: Clip(1.0, 1.5, bit=0.5), lambda: Clip(1.0, 0.5),
    lambda: Grid(0.0), lambda: Grid(1.0, scalars=-1.0), lambda: Grid(1.0, most=0), lambda: Grid(1.0, rounded=3),
    lambda: AddNoise(chain(), (1.0,), SimulatedSource(0), tail=Tail(1.0, 9)),
    lambda: AddNoise(chain(), (0.0,), SimulatedSource(0)),
    lambda: AddNoise(chain(), (1.0,), SimulatedSource(0), 0),
])  # fmt: skip
def test_senseless_numbers_are_refused(make):
    with pytest.raises(ValueError, match="Expected"):
        make()
