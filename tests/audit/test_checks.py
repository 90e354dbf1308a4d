"""The checks of an audit pass the code as it is, and notice each bug that is planted in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from foedus.audit.checks import ALPHA, Check, check_statistics, check_steps, check_surveys
from foedus.build import build
from foedus.lm.bench import Bench
from foedus.lm.clipping import ClippedSums, Clipping
from foedus.privacy.noise import SimulatedSource
from foedus.privacy.plan import Terms, make_plan
from foedus.privacy.steps import Parts, PrivateSteps
from foedus.privacy.survey import Survey
from foedus.silo import private
from foedus.silo import survey as surveys
from foedus.silo.private import PrivateGradients
from foedus.treaty import from_dict
from foedus.types import Task

from ..conftest import rows


@dataclass(frozen=True)
class Subject:
    bench: Bench
    task: Task
    silo: Any
    plan: Any

    def checks(self) -> dict[str, Check]:
        return {check.name: check for check in check_steps(self.bench, self.task, self.silo, self.plan)}


def subject(**privacy: Any) -> Subject:
    treaty = from_dict({
        "treaty": {"name": "audited", "seed": 5}, "model": {"base": "tiny:llama", "max_length": 16},
        "adapter": {"rank": 2, "targets": "attention", "dropout": privacy.pop("dropout", 0.0)},
        "algorithm": {"rounds": 2},
        "local": {"steps": 3, "batch": 6}, "data": {"source": "memory", "author": "author"},
        "privacy": {"unit": "example", "noise_multiplier": 1.0, "rate": 0.2, "randomness": "simulated", **privacy},
    })  # fmt: skip
    examples = [{**row, "author": f"p{i % 7}"} for i, row in enumerate(rows(20))]
    place = build(treaty, {"a": examples})
    task = Task(0, place.base.digest, place.bench.start(), ("a",), 5)
    return Subject(place.bench, task, place.silos["a"], place.plan)


@pytest.fixture(scope="module")
def sound() -> Subject:
    return subject()


def caught(checks: dict[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if not check.passed}


@pytest.mark.parametrize("privacy", [
    {}, {"unit": "author", "rows": 3}, {"quantile": 0.5}, {"clipping": "layers"},
    {"clipping": "factors", "shares": [0.3, 0.7]}, {"rate": 1.0}, {"bands": 3}, {"dropout": 0.2},
])  # fmt: skip
def test_the_code_as_it_is_passes(privacy):
    found = subject(**privacy).checks()
    assert not caught(found), found
    assert len(found) >= 5


# ---- planted bugs ----


def scaled_noise(factor: float) -> Callable[[Any], None]:
    def plant(monkeypatch) -> None:
        right = PrivateSteps.noise
        monkeypatch.setattr(PrivateSteps, "noise", lambda *a: {k: factor * x for k, x in right(*a).items()})

    return plant


def one_tensor_without(monkeypatch) -> None:
    right = PrivateSteps.noise

    def noise(*a):
        drawn = right(*a)
        return {**drawn, (bare := next(iter(drawn))): drawn[bare] * 0}

    monkeypatch.setattr(PrivateSteps, "noise", noise)


def reused_seed(monkeypatch) -> None:
    right = SimulatedSource.generator
    monkeypatch.setattr(SimulatedSource, "generator", lambda self, *purpose: right(self, *purpose[:2]))


def seed_shared_by_silos(monkeypatch) -> None:
    right = SimulatedSource.generator
    monkeypatch.setattr(SimulatedSource, "generator", lambda self, *p: right(self, p[0], *p[2:]))


def shuffled(monkeypatch) -> None:
    def sample(self, keys, at, random):
        per_epoch = round(1 / self.rate)
        order = np.random.default_rng(at // per_epoch).permutation(len(keys))
        return np.sort(np.array_split(order, per_epoch)[at % per_epoch])

    monkeypatch.setattr(PrivateSteps, "sample", sample)


def fixed_size(monkeypatch) -> None:
    monkeypatch.setattr(
        PrivateSteps, "sample",
        lambda self, keys, at, random: random.choice(len(keys), round(self.rate * len(keys)), replace=False),
    )  # fmt: skip


def realised_divisor(monkeypatch) -> None:
    right = PrivateGradients._release

    def release(self, k, sums, norms, random):
        out = right(self, k, sums, norms, random)
        return {name: x * np.float32(self.steps.divisor / max(1, len(norms))) for name, x in out.items()}

    monkeypatch.setattr(PrivateGradients, "_release", release)


def noise_in_every_pass(monkeypatch) -> None:
    right = PrivateGradients._clipped

    def clipped(self, leaves, drawn, step):
        sums, *rest = right(self, leaves, drawn, step)
        random = np.random.default_rng(step)
        for k, units in enumerate(drawn):
            for _ in private.in_passes(units, self.rows)[1:]:
                extra = self.steps.noise({n: x.shape[1:] for n, x in sums.items()}, self.task.round, 1.0, random)
                for name in sums:
                    sums[name][k] += extra[name]
        return sums, *rest

    monkeypatch.setattr(PrivateGradients, "_clipped", clipped)


def no_clip(monkeypatch) -> None:
    monkeypatch.setattr(Clipping, "factors", lambda self, squares: torch.ones_like(squares, dtype=torch.float32))


def clip_of_the_sum(monkeypatch) -> None:
    right = Bench.clipped

    def clipped(self, leaves, batches, units, clippings, goals=None):
        free = [Clipping(tuple(1e9 for _ in c.norms), c.parts) for c in clippings]
        sums = right(self, leaves, batches, units, free, goals)
        norm = torch.cat([x.reshape(-1) for x in sums.gradients.values()]).norm()
        factor = min(1.0, clippings[0].bound / float(norm.clamp(min=1e-30)))
        return ClippedSums(
            {n: x * factor for n, x in sums.gradients.items()}, sums.norms, sums.losses, sums.targets
        )  # fmt: skip

    monkeypatch.setattr(Bench, "clipped", clipped)


def one_unit_for_all(monkeypatch) -> None:
    """What happens to a prompt whose batch dimension is 1: the batch is clipped as if it were one example."""
    right = Bench.clipped
    monkeypatch.setattr(
        Bench, "clipped", lambda self, leaves, batches, units, clips, goals=None: right(
            self, leaves, batches, [torch.where(u >= 0, 0, u) for u in units], clips, goals
        ),
    )  # fmt: skip


def wrong_norm_of_a_part(monkeypatch) -> None:
    right = Parts.std
    monkeypatch.setattr(Parts, "std", lambda self, name, z: right(self, name, z))
    monkeypatch.setattr(Clipping, "factors", lambda self, squares: (2 / squares.sqrt().clamp(min=1e-9)).float())


BUGS = {
    "noise halved": (scaled_noise(0.5), "every tensor has noise of the stated size"),
    "noise five percent too small": (scaled_noise(0.95), "every tensor has noise of the stated size"),
    "noise twice": (scaled_noise(2**0.5), "every tensor has noise of the stated size"),
    "noise missing on one tensor": (one_tensor_without, "every tensor has noise of the stated size"),
    "accumulation adds noise in every pass": (noise_in_every_pass, "every tensor has noise of the stated size"),
    "the divisor is the realised batch": (realised_divisor, "every tensor has noise of the stated size"),
    "one seed for every step": (reused_seed, "no two steps and no two silos share noise"),
    "one seed for every silo": (seed_shared_by_silos, "no two steps and no two silos share noise"),
    "shuffled epochs as Poisson": (shuffled, "batch sizes vary as with independent coins"),
    "fixed batches as Poisson": (fixed_size, "batch sizes vary as with independent coins"),
    "no clip": (no_clip, "no unit adds more than the bound"),
    "clip of the sum": (clip_of_the_sum, "what a unit adds does not depend on the others"),
    "a prompt broadcast over the batch": (one_unit_for_all, "what a unit adds does not depend on the others"),
    "a clip to another norm": (wrong_norm_of_a_part, "no unit adds more than the bound"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(sound, monkeypatch, bug):
    plant, by = BUGS[bug]
    plant(monkeypatch)
    found = sound.checks()
    assert by in caught(found), found
    assert found[by].p_value < ALPHA


def test_a_shuffle_is_seen_from_one_step_to_the_next(sound, monkeypatch):
    shuffled(monkeypatch)
    assert "who was in a step says nothing about the next" in caught(sound.checks())


def test_a_check_needs_no_simulated_noise(sound):
    from foedus.privacy.noise import SystemSource

    real = replace(sound.plan, privacy=replace(sound.plan.privacy, source=SystemSource()))
    found = check_steps(sound.bench, sound.task, sound.silo, real)
    assert all(check.p_value > ALPHA / 100 for check in found)


# ---- surveys ----

STATISTICS = {
    "features": lambda seen: seen.features(),
    "entropy": lambda seen: seen.entropy()[:, None] / 10,
}


def surveyed(sound: Subject, rate: float = 0.3) -> dict[str, Check]:
    terms = Terms("example", 1e-5, 4, noise_multiplier=1.0, surveys=(0, 3), survey_rate=rate,
                  survey_parts=(("count", 0.2), ("features", 0.6), ("entropy", 0.2)))  # fmt: skip
    plan = replace(sound.plan, survey=make_plan(terms, SimulatedSource(5)).survey())
    found = [*check_surveys(sound.silo, plan), *check_statistics(sound.bench, sound.task, sound.silo, plan, STATISTICS)]
    return {check.name.removeprefix("surveys: "): check for check in found}


@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_surveys_as_they_are_pass(sound, rate):
    found = surveyed(sound, rate)
    assert not caught(found), found
    assert len(found) >= 6


def test_a_plan_without_surveys_has_nothing_to_check(sound):
    assert check_surveys(sound.silo, sound.plan) == []


def survey_noise(factor: float) -> Callable[[Any], None]:
    def plant(monkeypatch) -> None:
        right = Survey.released

        def released(self, sums, round, random):
            return {
                part: sums[part] + factor * (x - sums[part]) for part, x in right(self, sums, round, random).items()
            }

        monkeypatch.setattr(Survey, "released", released)

    return plant


def uncounted(monkeypatch) -> None:
    right = Survey.released
    monkeypatch.setattr(Survey, "released", lambda self, sums, *a: right(self, sums, *a) | {"count": sums["count"]})


def same_in_every_part(monkeypatch) -> None:
    right = Survey.released

    def released(self, sums, round, random):
        state = random.bit_generator.state
        out = {}
        for part, x in sums.items():
            random.bit_generator.state = state
            out |= right(self, {part: x}, round, random)
        return out

    monkeypatch.setattr(Survey, "released", released)


def unclipped(monkeypatch) -> None:
    monkeypatch.setattr(surveys, "_clipped", lambda x: x)


def clip_of_the_sum_of_a_survey(monkeypatch) -> None:
    right, clip = surveys._sums, surveys._clipped

    def sums(*a):
        return {part: x if part == "count" else clip(x) for part, x in right(*a).items()}

    monkeypatch.setattr(surveys, "_clipped", lambda x: x)
    monkeypatch.setattr(surveys, "_sums", sums)


def beside_the_row_before(monkeypatch) -> None:
    right, before = surveys._numbers, {}

    def numbers(part, *a):
        x = right(part, *a)
        key = part, x.shape[1]
        last, before[key] = before.get(key, x), x
        return x - last

    monkeypatch.setattr(surveys, "_numbers", numbers)


def fixed_survey(monkeypatch) -> None:
    monkeypatch.setattr(
        Survey, "sample", lambda self, units, random: random.choice(units, round(self.rate * units), replace=False)
    )


SURVEY_BUGS = {
    "noise left out": (survey_noise(0.0), "every tensor has noise of the stated size"),
    "noise halved": (survey_noise(0.5), "every tensor has noise of the stated size"),
    "noise of one multiplier for all parts": (survey_noise(0.9), "every tensor has noise of the stated size"),
    "a count without noise": (uncounted, "every tensor has noise of the stated size"),
    "the same noise in every round": (reused_seed, "no two steps and no two silos share noise"),
    "the same noise in every silo": (seed_shared_by_silos, "no two steps and no two silos share noise"),
    "the same noise in every part": (same_in_every_part, "no two parts share noise"),
    "clip left out": (unclipped, "no unit adds more than the bound"),
    "clip of the sum": (clip_of_the_sum_of_a_survey, "what a unit adds does not depend on the others"),
    "a statistic that remembers other rows": (beside_the_row_before, "what a unit adds does not depend on the others"),
    "a fixed number of units": (fixed_survey, "batch sizes vary as with independent coins"),
}


@pytest.mark.parametrize("bug", SURVEY_BUGS)
def test_a_bug_planted_in_surveys_is_caught(sound, monkeypatch, bug):
    plant, by = SURVEY_BUGS[bug]
    plant(monkeypatch)
    found = surveyed(sound)
    assert by in caught(found), found
    assert found[by].p_value < ALPHA
