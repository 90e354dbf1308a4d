"""Gradient canaries and self-checks through a plan's own code, for every round of it: inside silos, or on whole ones.

`rounds_of` takes a plan apart into steps that a canary can be put into; `tried` runs them all. What a silo's private
steps do with its own data is the matter of `checks.py`; here it is what becomes of a sum, whoever made it: noise of the
stated size on every tensor, Gaussian, fresh in every round, as large as the bound asks for, and none at all where there
is no bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, repeat

import numpy as np
from scipy.stats import chi2

from ..errors import GuaranteeError
from ..privacy.mechanisms import AtSilos, Bare, Correlated, DiscreteGaussian
from ..privacy.noise import SystemSource
from ..privacy.plan import PrivacyPlan
from ..stages.base import chain
from ..stages.noise import AddNoise
from ..types import Task, Total, Update
from .bounds import Scores
from .canaries import Check, Step, Tensor, Trial, gradient_canaries, mechanism, run, sampling

Shapes = Mapping[str, tuple[int, ...]]
MOST = 200_000
"""About how many numbers the canaries of a silo's steps are given; `checks.py` looks at every tensor."""
NAMES = tuple(f"silo {i}" for i in range(60))
COHORTS = 400


@dataclass(frozen=True)
class Round:
    """One round: where its tensors lie and what noise they should get, a step, and how many such steps it takes."""

    tensors: tuple[Tensor, ...]
    step: Step
    times: int = 1


def rounds_of(plan: PrivacyPlan, shapes: Shapes, count: int) -> list[Round]:
    """A plan's rounds, with room for `count` canaries; [] where a plan guarantees nothing, or where its noise is
    correlated over the steps of a silo.

    Steps inside silos take their noise from the system even where the run's was simulated, as one audit asks for more
    of it than a run's seed names.
    """
    names = list(shapes)
    steps = plan.steps_at_silos(names)
    if steps is None or steps.lr is not None:
        return _of_whole_silos(plan, shapes)
    if steps.factors is not None or steps.bare_std is not None:
        return []
    real = replace(steps, source=SystemSource())
    some = _some(shapes, real.parts.of, count)
    pairs = [mechanism(real, some, round) for round in range(plan.terms.rounds)]
    return [Round(tuple(tensors), step, real.steps) for tensors, step in pairs]


def tried(rounds: Sequence[Round], count: int, generator: np.random.Generator, rate: float, scale: float) -> Trial:
    """Runs every round once with the same canaries; at most `count` of them, ≥ 10, if there is so much room.

    `rate`: of a unit's being in a step. `scale`: what a release is multiplied by to be a sum again.
    """
    sizes: dict[int, int] = {}
    for tensor in rounds[0].tensors:
        sizes[tensor.part] = sizes.get(tensor.part, 0) + tensor.size
    canaries = gradient_canaries(rounds[0].tensors, min(count, max(sizes.values())), generator)
    trials = []
    for tensors, alike in groupby(rounds, key=lambda round: round.tensors):
        std = np.repeat([t.std for t in tensors], [t.size for t in tensors])
        here = replace(canaries, std=std[canaries.places])
        trials.append(_run(list(alike), tensors, here, generator, rate, scale))
    return _together(trials)


def check_server(plan: PrivacyPlan, shapes: Shapes) -> list[Check]:
    """What a server that adds the noise, or draws the cohort, must do besides: nothing where it does neither."""
    cohort = [*_cohorts(plan)]
    made = plan.mechanism()
    if isinstance(made, AtSilos | Bare):
        return cohort
    return [_scales(plan, shapes), _refuses(plan, shapes), *cohort]


def proves(plan: PrivacyPlan) -> bool:
    """Whether canaries in `rounds_of` are units of the plan: not in one of several shares of noise, nor where noise is
    correlated."""
    t = plan.terms
    return t.bands == 1 and t.placement != "shared"


# ---- one run of many rounds ----


def _run(rounds, tensors, canaries, generator, rate: float, scale: float) -> Trial:
    steps = iter([round.step for round in rounds for _ in range(round.times)])
    nothing = np.zeros(sum(t.size for t in tensors))
    times = sum(round.times for round in rounds)

    def step(total: np.ndarray, random: np.random.Generator) -> np.ndarray:
        return next(steps)(total, random)

    return run(step, repeat(nothing, times), tensors, canaries, generator, rate=rate, scale=scale)


def _together(trials: Sequence[Trial]) -> Trial:
    """Scores add up; of each check the worst p-value, times how many there were."""
    members = np.sum([trial.scores.members for trial in trials], axis=0)
    others = np.sum([trial.scores.others for trial in trials], axis=0)
    present = np.concatenate([trial.present for trial in trials])
    checks = _worst(check for trial in trials for check in trial.checks)
    return Trial(Scores(members, others), checks, present, trials[0].multiplier)


def _worst(checks: Iterable[Check]) -> tuple[Check, ...]:
    found: dict[str, list[Check]] = {}
    for check in checks:
        found.setdefault(check.name, []).append(check)
    worst = [min(alike, key=lambda check: check.p) for alike in found.values()]
    return tuple(replace(check, p=min(1.0, check.p * len(found[check.name]))) for check in worst)


def _some(shapes: Shapes, part: Mapping[str, int], count: int) -> dict[str, tuple[int, ...]]:
    """Tensors of every part, in their order: two at least and as many as it takes for `count` canaries, and then on
    until all together hold `MOST` numbers."""
    parts = {part.get(name, 0) for name in shapes}
    held = dict.fromkeys(parts, 0)
    chosen: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        of = part.get(name, 0)
        if len(chosen) < 2 or held[of] < max(count, MOST // len(parts)):
            chosen[name] = shape
            held[of] += math.prod(shape)
    return chosen


# ---- whole silos ----


def _of_whole_silos(plan: PrivacyPlan, shapes: Shapes) -> list[Round]:
    made = plan.mechanism()
    if isinstance(made, Bare):
        return []
    stages = plan.stages()
    last = stages[-1] if stages else None
    if isinstance(last, AddNoise):
        return [_own(plan, last, shapes, round) for round in range(plan.terms.rounds)]
    return _of_server(plan, shapes)


def _own(plan: PrivacyPlan, stage: AddNoise, shapes: Shapes, round: int) -> Round:
    """One silo's own noise, or its share; in the units of a clipped gradient where the unit is inside silos."""
    t, task, unit = plan.terms, _task(shapes, round, plan), stage.step or 1.0
    scale = t.lr / t.divisor if t.local else 1.0

    def step(total: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        tensors = {("delta", name): x * scale / unit for name, x in _apart(total, shapes).items()}
        return _flat(stage.encode(Update(tensors, silo="audit"), task).tensors.values()) * unit / scale / t.divisor

    grid = stage.step / scale if stage.step else None
    return Round(_tensors(plan, shapes, stage.std(task) / scale, grid), step)


def _of_server(plan: PrivacyPlan, shapes: Shapes) -> list[Round]:
    """The server's mechanism, round after round from its first state. Correlated noise is made independent again, as
    anybody can who knows the public factors: C (C⁻¹ Z) = Z."""
    made = plan.mechanism()
    bound = _bound(plan, shapes)
    grid = made.step if isinstance(made, DiscreteGaussian) else None
    state = made.init()
    past: list[np.ndarray] = []

    def step(total: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        nonlocal state
        tensors = {("delta", name): x for name, x in _apart(total, shapes).items()}
        release, state = made.release(Total(tensors, bound, 1), state)
        noise = _flat(release.tensors.values()) - total
        if not isinstance(made, Correlated):
            return total + noise
        past.insert(0, noise)
        del past[len(made.factors.coefficients) :]
        return total + sum(c * x for c, x in zip(made.factors.coefficients, past, strict=False))

    growth = made.sensitivity if isinstance(made, Correlated) else 1.0
    return [Round(_tensors(plan, shapes, z * bound * growth, grid), step) for z in plan.multipliers]


def _tensors(plan: PrivacyPlan, shapes: Shapes, std: float, grid: float | None) -> tuple[Tensor, ...]:
    norm = plan.terms.max_norm or 1.0
    norm = math.floor(norm / grid) * grid if grid else norm
    return tuple(Tensor(name, math.prod(shape), norm, std) for name, shape in shapes.items())


def _scales(plan: PrivacyPlan, shapes: Shapes) -> Check:
    """Noise for a bound a thousand times as large."""
    made = plan.mechanism()
    bound = 1000 * _bound(plan, shapes)
    zeros = {("delta", name): np.zeros(shape) for name, shape in shapes.items()}
    release, _ = made.release(Total(zeros, bound, 1), made.init())
    growth = made.sensitivity if isinstance(made, Correlated) else 1.0
    noise = _flat(release.tensors.values()) / (plan.multipliers[0] * bound * growth)
    total = float(np.square(noise).sum())
    p = 2 * min(chi2.cdf(total, noise.size), chi2.sf(total, noise.size))
    return Check("the noise grows with the bound", min(1.0, float(p)), "chi-square, a bound a thousand times as large")


def _refuses(plan: PrivacyPlan, shapes: Shapes) -> Check:
    made = plan.mechanism()
    zeros = {("delta", name): np.zeros(shape) for name, shape in shapes.items()}
    try:
        made.release(Total(zeros, math.inf, 1), made.init())
    except GuaranteeError:
        return Check("a total without a bound is refused", 1.0, "refused")
    return Check("a total without a bound is refused", 0.0, "released")


def _cohorts(plan: PrivacyPlan) -> Iterable[Check]:
    """Silos that are drawn in secret: by coins of their own, at the stated rate."""
    sampler = plan.sampler()
    if sampler is None:
        return []
    drawn = [set(sampler.cohort(NAMES, round, 0)) for round in range(COHORTS)]
    return sampling(np.array([[name in cohort for name in NAMES] for cohort in drawn]), plan.terms.rate)


def _bound(plan: PrivacyPlan, shapes: Shapes) -> float:
    return chain(*plan.stages()).bound(math.inf, _task(shapes, 0, plan))


def _task(shapes: Shapes, round: int, plan: PrivacyPlan) -> Task:
    zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    return Task(round, "", zeros, (), 0, chain(*plan.stages()).start())


def _apart(flat: np.ndarray, shapes: Shapes) -> dict[str, np.ndarray]:
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])[:-1]
    return {name: x.reshape(shape) for (name, shape), x in zip(shapes.items(), np.split(flat, ends), strict=True)}


def _flat(arrays: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in arrays])
