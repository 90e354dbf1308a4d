"""Everything that can go wrong between silos and coordinator: a sum is exact, or given up with nothing learned."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import combinations, product

import numpy as np
import pytest

from foedus.secure import simulate
from foedus.secure.simulate import FAULTS, GONE, STEPS, Schedule, World, agree, begin, grouped, names, regional, take

KINDS = [*(f"late {step}" for step in STEPS), "duplicated", "replayed", "reordered"]
MORE = ["replayed session", "altered", ""]


def inputs(silos, size=3, seed=0):
    rng = np.random.default_rng([len(silos), seed])
    return {name: rng.integers(0, 2**32, size, dtype=np.uint32) for name in silos}


@lru_cache
def prepared(n: int) -> tuple[World, World]:
    """A session after one sum, with the deposits for the next; and one that remembers another session's messages."""
    worlds = [begin(*agree(names(n)), seed) for seed in (1, 2)]
    one, two = (take(world, "first", inputs(world.members), ahead="second")[0] for world in worlds)
    return one, replace(one, past=two.past)


def faults(kind: str, silo: str) -> dict[tuple[str, str], str]:
    if kind.startswith("late"):
        return {(kind.removeprefix("late "), silo): "late"}
    fault = kind.split(" ")[0]
    return {(step, silo): fault for step in STEPS} if fault in FAULTS else {}


@pytest.mark.parametrize("step", GONE)
@pytest.mark.parametrize("n, kind", [*product([3, 4, 5, 6], KINDS), *product([3, 4, 5], MORE)])
def test_whoever_vanishes_whatever_happens_to_messages_a_sum_is_exact_or_given_up_cleanly(n, step, kind):
    silos, (world, remembering) = names(n), prepared(n)
    world, exact = remembering if kind == "replayed session" else world, 0
    for count in range(n + 1):
        for gone in combinations(silos, count):
            here = [name for name in silos if name not in gone]
            schedule = Schedule(dict.fromkeys(gone, step), faults(kind, here[0]) if here else {}, kind == "reordered")
            _, outcome = take(world, "second", inputs(silos), schedule)
            assert simulate.sound(outcome, inputs(silos)), (gone, outcome.error)
            assert kind == "altered" or not outcome.view.round.liars
            exact += outcome.total is not None
    assert exact > 0 or (n == 3 and kind in ("altered", "late deposit", "late deliver", "late mask"))


@pytest.mark.parametrize("n", [4, 6])
def test_a_sum_without_faults_is_over_all_who_masked(n):
    world, _ = prepared(n)
    for step in GONE:
        _, outcome = take(world, "second", inputs(names(n)), Schedule({"silo0": step}))
        expected = names(n) if step == "reveal" else names(n)[1:]
        assert outcome.survivors == tuple(expected) and not outcome.refused


def test_the_same_seed_gives_the_same_bytes():
    one, two = (take(begin(*agree(names(4), 5), 5), "a", inputs(names(4)))[1] for _ in range(2))
    assert [reveal for _, reveal in one.view.answers] == [reveal for _, reveal in two.view.answers]


def test_random_sums_of_a_hundred_silos_are_exact_or_given_up_cleanly():
    outcomes = list(simulate.runs(3, 100, 7))
    assert all(well for _, well in outcomes)
    assert any(outcome.total is not None for outcome, _ in outcomes)


@pytest.mark.parametrize("seed", range(4))
def test_random_sums_of_twenty_silos_are_exact_or_given_up_cleanly(seed):
    outcomes = list(simulate.runs(5, 20, 100 * seed))
    assert all(well for _, well in outcomes)
    assert any(outcome.total is not None for outcome, _ in outcomes)


def test_a_silo_that_missed_one_sum_is_in_the_next():
    world = begin(*agree(names(5)))
    x = inputs(world.members)
    for i, gone in enumerate(GONE):
        world, outcome = take(world, f"sum {i}", x, Schedule({"silo2": gone}), ahead=f"sum {i + 1}")
        assert simulate.sound(outcome, x) and outcome.total is not None
    _, outcome = take(world, f"sum {len(GONE)}", x)
    assert outcome.survivors == tuple(names(5)) and simulate.sound(outcome, x)


def test_groups_of_many_silos_are_summed_exactly_whoever_vanishes():
    def vector(name: str) -> np.ndarray:
        return np.full(5, int(name.removeprefix("silo")), np.uint32)

    gone = {"silo07": "mask", "silo11": "deposit", "silo30": "reveal"}
    grand = grouped(60, 20, vector, lambda name: gone.get(name, ""), dropout="0.1")
    assert (grand.groups, grand.silos, grand.lost) == (3, 58, ())
    assert (grand.total == sum(range(60)) - 7 - 11).all()


def test_a_group_that_loses_too_many_is_left_out_and_named():
    grand = grouped(
        12, 4, lambda name: np.ones(2, np.uint32), lambda name: "mask" if name in ("silo01", "silo04") else ""
    )
    assert grand.lost == (1,) and grand.silos == 8 and (grand.total == 8).all()


def test_the_memory_of_a_grouped_sum_does_not_grow_with_the_silos():
    import tracemalloc

    peaks = []
    for silos in (8, 32):
        tracemalloc.start()
        grouped(silos, 4, lambda name: np.ones(200_000, np.uint32))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] and peaks[1] < 8 * 800_000


def test_two_levels_sum_exactly_with_dropouts_in_both():
    regions = {f"region{r}": inputs([f"edge{r}{i}" for i in range(5)], seed=r) for r in range(4)}
    lower = {"region0": Schedule({"edge01": "mask"}), "region1": Schedule({"edge10": "reveal"}, {}, True)}
    top, below = regional(regions, lower, Schedule({"region2": "mask"}))
    assert top.survivors == ("region0", "region1", "region3")
    expected = sum(
        x for region, edges in regions.items() for edge, x in edges.items() if region != "region2" and edge != "edge01"
    )
    assert (top.total == expected).all()


def test_a_region_whose_sum_fails_is_missing_above():
    regions = {f"region{r}": inputs([f"edge{r}{i}" for i in range(4)], seed=r) for r in range(4)}
    top, below = regional(regions, {"region1": Schedule(dict.fromkeys(("edge10", "edge11"), "mask"))})
    assert below["region1"].total is None
    assert top.survivors == ("region0", "region2", "region3")
    assert (top.total == sum(below[region].total for region in top.survivors)).all()


def test_the_server_above_sees_no_regions_sum():
    regions = {f"region{r}": inputs([f"edge{r}{i}" for i in range(3)], seed=r) for r in range(3)}
    top, below = regional(regions)
    for name, (_, words) in top.view.masked.items():
        assert (words != below[name].total).any()
    assert simulate.attack.opened(simulate.seen(top.view)).keys() == {frozenset(regions)}
