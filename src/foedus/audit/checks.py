"""Does the private step do what its plan says? Checks that look inside, for a run's own plan and model.

They hold the real code (`silo/private.py` over `lm/`) against what the accountant assumes: each unit adds a vector of
its own of norm at most C, nothing else depends on it; every coordinate of every tensor gets fresh Gaussian noise of
the stated size once a step; units enter by coins of their own; the divisor is public. Record and replay in the manner
of Re:cord-play (arXiv 2602.17454): the same coins and the same noise on data that differ in one unit.

A check that fails has found a bug; checks that pass prove nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import stats

from ..lm.clipping import ClippedSums, Clipping
from ..privacy.noise import SimulatedSource
from ..privacy.steps import PrivateSteps
from ..privacy.survey import COUNT, Survey
from ..silo.private import PrivateGradients
from ..silo.shard import Silo, Units
from ..silo.survey import Statistic, survey
from ..silo.train import LocalPlan
from ..types import Task

if TYPE_CHECKING:
    from ..lm.bench import Bench

ALPHA = 1e-3
ROUNDING = {"fp32": 2e-3, "bf16": 3e-2}
"""How far sums may be off, relative to the norm C, for rounding alone: batches of other shapes round otherwise."""
BITES = 1e-3
"""The clip norm in the checks of what units add, as a share of the plan's."""
STEPS, FEWEST, MOST = 40, 6, 1e7
"""Steps whose noise is looked at: so many, or as few as hold so many numbers where there are millions in one."""
DRAWS = 600
SURVEYS, WIDTH = 64, 256
"""Surveys of nobody whose noise is looked at, and how many numbers each of their parts has."""


@dataclass(frozen=True)
class Check:
    """What was checked, whether it holds, the p-value of what was seen if it did (corrected for how many looks there
    were; 0 or 1 where nothing is random), and a sentence.
    """

    name: str
    passed: bool
    p_value: float
    said: str


def check_steps(bench: Bench, task: Task, silo: Silo, plan: LocalPlan) -> list[Check]:
    """All checks of one silo's private steps, at the parameters of `task`; some of its units must have targets."""
    assert plan.privacy is not None
    return [
        *(_noise(bench, task, silo, plan) if plan.privacy.lr is None else []),  # else it is that of the stages
        *_sampling(plan.privacy, silo, task.round),
        *_units(bench, task, silo, plan),
    ]


def check_surveys(silo: Silo, plan: LocalPlan) -> list[Check]:
    """All checks of a silo's surveys but those of what its units add: see `check_statistics`."""
    if plan.survey is None:
        return []
    found = [*_survey_noise(silo, plan, plan.survey), *_survey_sampling(plan.survey)]
    return [replace(check, name=f"surveys: {check.name}") for check in found]


def check_statistics(
    bench: Bench, task: Task, silo: Silo, plan: LocalPlan, statistics: Mapping[str, Statistic], most: int = 5
) -> list[Check]:
    """Whether up to `most` units each add at most 1 to every part of a survey, and the same whoever else is in it.

    The statistics are multiplied until the clip bites, and the noise is next to nothing.
    """
    assert silo.units is not None and plan.survey is not None
    chosen = range(min(most, len(silo.units)))
    long = {part: _longer(statistic) for part, statistic in statistics.items()}
    still = replace(
        plan.survey, rate=1.0, rows=1 << 20, source=SimulatedSource(0), multipliers=(1e-9,) * len(plan.survey.rounds)
    )
    task = replace(task, round=still.rounds[0])

    def sums(units: Sequence[int]) -> Mapping[str, np.ndarray]:
        some = replace(silo, units=only(silo.units, units))
        return survey(bench, task, some, replace(plan, survey=still), long).sums

    alone, together = [sums([unit]) for unit in chosen], sums(chosen)
    tolerance = ROUNDING[bench.precision]
    longest = max(float(np.linalg.norm(x)) for one in alone for x in one.values())
    apart = max(float(np.linalg.norm(x - sum(one[part] for one in alone))) for part, x in together.items())
    found = [
        _exactly("no unit adds more than the bound", longest <= 1 + tolerance, f"{longest:.4f} of it"),
        _exactly("what a unit adds does not depend on the others", apart <= tolerance * len(alone),
                 f"{apart:.4f} bounds apart"),
    ]  # fmt: skip
    return [replace(check, name=f"surveys: {check.name}") for check in found]


# ---- noise ----


class _Still:
    """A bench whose gradients are zero, so that a step's release is its noise."""

    def __init__(self, bench: Bench) -> None:
        self.objective = bench.objective

    def clipped(
        self, leaves: Mapping[str, torch.Tensor], batches: Sequence[Any], units: Sequence[torch.Tensor],
        clippings: Sequence[Clipping], goals: Any = None,
    ) -> ClippedSums:  # fmt: skip
        zeros = {name: torch.zeros_like(x) for name, x in leaves.items()}
        norms = [torch.zeros(int(of.max()) + 1, len(c.norms)) for of, c in zip(units, clippings, strict=True)]
        return ClippedSums(zeros, norms, torch.zeros(len(units)), torch.zeros(len(units), dtype=torch.int64))


def _noise(bench: Bench, task: Task, silo: Silo, plan: LocalPlan) -> list[Check]:
    """Size of the noise by tensor, its shape, and whether steps and silos share any."""
    steps = plan.privacy
    assert steps is not None
    small = replace(plan, rows=1, privacy=replace(steps, following=None, factors=None, sensitivity=1.0))
    twins = [replace(silo, name=f"{silo.name} {twin}") for twin in "ab"]
    leaves = bench.leaves([task.params] * 2)
    gradients = PrivateGradients(_Still(bench), task, twins, small, [{}, {}])  # type: ignore[arg-type]
    seen: dict[str, list[np.ndarray]] = {name: [] for name in leaves}
    numbers = sum(x.size for x in task.params.values())
    for step in range(int(min(STEPS, max(FEWEST, MOST / numbers)))):
        gradients.fill(leaves, step)
        for name, leaf in leaves.items():
            std = steps.parts.std(name, steps.multipliers[task.round]) / steps.divisor
            seen[name].append(leaf.grad.reshape(2, -1).double().cpu().numpy() / std)
    stacked = {name: np.stack(x) for name, x in seen.items()}  # (steps, twins, numbers)
    return [_size(stacked), _shape(stacked), _freshness(stacked), *_count(steps, task.round)]


def _count(steps: PrivateSteps, round: int) -> list[Check]:
    """The noise on the bits that move the clip norm."""
    if steps.following is None:
        return []
    std = steps.multipliers[round] * steps.following.growth
    counts = [steps.count(np.zeros(0), round, 1.0, steps.source.generator("audit", "count", i)) for i in range(2000)]
    return [_check("the clip norm's bits have noise of the stated size", _chi_square(np.array(counts) / std), "")]


def _size(seen: Mapping[str, np.ndarray]) -> Check:
    """χ² of each tensor's noise, two-sided, step by step pooled."""
    ps = {name: _chi_square(x) for name, x in seen.items()}
    worst = min(ps, key=lambda name: ps[name])
    ratio = float(np.sqrt(np.mean(np.square(seen[worst]))))
    return _check(
        "every tensor has noise of the stated size", ps[worst] * len(ps), f"{worst}: {ratio:.4f} times as much"
    )


def _shape(seen: Mapping[str, np.ndarray]) -> Check:
    whole = np.concatenate([x.ravel() for x in seen.values()])
    p = stats.kstest(whole[: 1 << 20], "norm").pvalue
    return _check("the noise is Gaussian", float(p), "Kolmogorov and Smirnov's test")


def _freshness(seen: Mapping[str, np.ndarray]) -> Check:
    """Correlation of every step's noise with every other's, over steps and over two silos with the same data."""
    rows = np.concatenate([x.reshape(len(x) * 2, -1) for x in seen.values()], axis=1)
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    pairs = (rows @ rows.T)[np.triu_indices(len(rows), 1)] * np.sqrt(rows.shape[1])
    p = 2 * stats.norm.sf(np.abs(pairs).max()) * len(pairs)
    return _check("no two steps and no two silos share noise", float(p), f"largest correlation of {len(pairs)}")


def _chi_square(x: np.ndarray) -> float:
    total = float(np.square(x).sum())
    return float(2 * min(stats.chi2.cdf(total, x.size), stats.chi2.sf(total, x.size)))


# ---- sampling ----


def _sampling(steps: PrivateSteps, silo: Silo, round: int) -> list[Check]:
    """Whether units enter by independent coins of the stated rate: marginals, batch sizes, and overlap of neighbouring
    steps.
    """
    assert silo.units is not None
    if steps.factors is not None:
        return []
    keys = np.arange(max(len(silo.units), 200), dtype=np.uint64)
    inside = np.zeros((DRAWS, len(keys)), bool)
    for step in range(DRAWS):
        chosen = steps.sample(keys, round * steps.steps + step, steps.source.generator("steps", "audit", round, step))
        inside[step, chosen] = True
    return _coins(inside, steps.rate)


def _coins(inside: np.ndarray, q: float) -> list[Check]:
    """(draws, units): who was in."""
    if q == 1:
        everybody = bool(inside.all())
        return [Check("every unit is in every step", everybody, float(everybody), f"{DRAWS} steps")]
    sizes, units = inside.sum(1), inside.shape[1]
    marginal = stats.binomtest(int(inside.sum()), inside.size, q).pvalue
    spread = _two_sided(stats.chi2, float(np.square(sizes - units * q).sum() / (units * q * (1 - q))), DRAWS)
    both = int((inside[1:] & inside[:-1]).sum())
    overlap = stats.binomtest(both, (DRAWS - 1) * units, q * q).pvalue
    return [
        _check("units enter with the stated probability", float(marginal), f"{inside.mean():.4f}, stated {q:.4f}"),
        _check("batch sizes vary as with independent coins", spread, f"variance {sizes.var():.2f}"),
        _check("who was in a step says nothing about the next", float(overlap), f"{both} in two steps running"),
    ]


def _two_sided(law: Any, value: float, degrees: int) -> float:
    return float(2 * min(law.cdf(value, degrees), law.sf(value, degrees)))


# ---- surveys ----


class _Blank:
    """A bench whose statistics are zero: it sees how many rows there are."""

    @property
    def objective(self) -> _Blank:
        return self

    def ready(self, data: Any, rows: np.ndarray) -> None:
        pass

    def collate(self, data: Any, rows: np.ndarray, seed: int) -> int:
        return len(rows)

    def see(self, params: Any, batch: int) -> int:
        return batch


def _survey_noise(silo: Silo, plan: LocalPlan, taken: Survey) -> list[Check]:
    """Size of the noise by part, its shape, and whether rounds and silos share any: of surveys of nobody."""
    pairs = -(-SURVEYS // (2 * len(taken.rounds)))
    nobody = replace(silo, units=only(silo.units, []))
    twins = [replace(nobody, name=f"{silo.name} {twin}") for twin in range(2 * pairs)]
    zeros = {part: lambda rows: torch.zeros(rows, WIDTH) for part in taken.shares if part != COUNT}
    seen: dict[str, list[np.ndarray]] = {part: [] for part in taken.shares}
    for round in taken.rounds:
        for twin in twins:
            task = Task(round, "", {}, (), 0)
            found = survey(_Blank(), task, twin, plan, zeros)  # type: ignore[arg-type]
            for part, x in found.sums.items():
                seen[part].append(x / taken.std(part, round))
    stacked = {part: np.stack(x).reshape(-1, 2, x[0].size) for part, x in seen.items()}
    return [_size(stacked), _shape(stacked), _freshness(stacked), *_apart(stacked)]


def _apart(seen: Mapping[str, np.ndarray]) -> list[Check]:
    """Correlation of every part's noise with every other's, by their first numbers where one of them has fewer."""
    pairs = []
    for a, b in combinations(seen.values(), 2):
        least = min(a.shape[-1], b.shape[-1])
        a, b = a[..., :least].ravel(), b[..., :least].ravel()
        pairs.append(float(a @ b) / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-12) * np.sqrt(a.size))
    p = 2 * stats.norm.sf(np.abs(pairs).max(initial=0.0)) * len(pairs) if pairs else 1.0
    return [_check("no two parts share noise", float(p), f"{len(pairs)} pairs of parts")]


def _survey_sampling(taken: Survey) -> list[Check]:
    inside = np.zeros((DRAWS, 200), bool)
    for draw in range(DRAWS):
        inside[draw, taken.sample(200, taken.source.generator("survey", f"audit {draw}", taken.rounds[0]))] = True
    return _coins(inside, taken.rate)


def _longer(statistic: Statistic) -> Statistic:
    """So long that the clip bites."""
    return lambda seen: statistic(seen) / BITES


# ---- units ----


def _units(bench: Bench, task: Task, silo: Silo, plan: LocalPlan) -> list[Check]:
    """Whether a step's sum is the sum of what its units add alone, and none adds more than the bound."""
    alone, together, bound = contributions(bench, task, silo, plan)
    tolerance = ROUNDING[bench.precision] * bound
    longest = max(float(np.linalg.norm(x)) for x in alone)
    apart = float(np.linalg.norm(together - np.sum(alone, axis=0)))
    return [
        _exactly("no unit adds more than the bound", longest <= bound + tolerance, f"{longest / bound:.4f} of it"),
        _exactly(
            "what a unit adds does not depend on the others",
            apart <= tolerance * len(alone),
            f"{apart / bound:.4f} bounds apart",
        ),
    ]


def contributions(
    bench: Bench, task: Task, silo: Silo, plan: LocalPlan, most: int = 5
) -> tuple[list[np.ndarray], np.ndarray, float]:
    """What up to `most` units add to a step's release, each alone and all together (times the divisor), and the bound
    C.

    Every unit is in with all its rows, and the noise is next to nothing. The clip norm is made so small that it always
    bites: clipping that is broken then shows at full size.
    """
    assert silo.units is not None and plan.privacy is not None
    chosen = np.arange(min(most, len(silo.units)))
    parts = plan.privacy.parts
    steps = replace(
        plan.privacy, rate=1.0, rows=1 << 20, source=SimulatedSource(0), following=None, factors=None, sensitivity=1.0,
        period=1, multipliers=tuple(1e-9 for _ in plan.privacy.multipliers),
        parts=replace(parts, norms=tuple(norm * BITES for norm in parts.norms)),
    )  # fmt: skip
    bound = float(np.linalg.norm(steps.parts.norms))

    def released(units: Sequence[int]) -> np.ndarray:
        some = replace(silo, units=only(silo.units, units))
        leaves = bench.leaves([task.params])
        with bench.without_dropout():  # which falls by place in a batch, by secret coins
            PrivateGradients(bench, task, [some], replace(plan, privacy=steps), [{}]).fill(leaves, 0)
        return np.concatenate([x.grad.reshape(-1).double().cpu().numpy() for x in leaves.values()]) * steps.divisor

    return [released([int(unit)]) for unit in chosen], released([int(unit) for unit in chosen]), bound


def only(units: Units | None, chosen: Sequence[int]) -> Units:
    """Some units of a silo, all other rows belonging to nobody."""
    assert units is not None
    place = {unit: i for i, unit in enumerate(chosen)}
    of = np.array([place.get(int(unit), -1) for unit in units.of], np.int64)
    return Units(of, units.keys[list(chosen)])


def _check(name: str, p: float, said: str) -> Check:
    p = min(1.0, max(0.0, p))
    return Check(name, p >= ALPHA, p, said)


def _exactly(name: str, holds: bool, said: str) -> Check:
    return Check(name, holds, float(holds), said)
