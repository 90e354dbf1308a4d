"""Surveys inside a silo: what the model makes of each unit, summed over units, with noise where the plan says so.

Where units inside silos are protected, what leaves this file as a `Surveyed` is public (`privacy/survey.py` has the
noise). Everywhere else it is exact, and as private as the update that it becomes a part of. It is taken once for each
task: `Handler` keeps the report that it goes into, so that a task that comes again is answered with the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import GuaranteeError, SiloError
from ..privacy.survey import COUNT
from ..seeds import derive, generator
from ..types import Task
from .shard import Silo

if TYPE_CHECKING:
    from ..lm.bench import Bench
    from ..lm.terms import Seen
    from .train import LocalPlan

Statistic = Callable[["Seen"], torch.Tensor]
"""(b, m) numbers of the b rows of one pass; a row's own, whatever the others are."""


@dataclass(frozen=True)
class Surveyed:
    """What a survey found. `sums`: over units, (m,) float64 for each part, (1,) for "count". `stds`: the standard
    deviation of the noise on each number of a part, public; 0 where sums are exact.
    """

    sums: Mapping[str, np.ndarray]
    stds: Mapping[str, float]

    @property
    def units(self) -> float:
        """How many units were in it, as released, and at least 1, so that it can divide."""
        return max(1.0, float(self.sums[COUNT][0]))

    def mean(self, part: str) -> np.ndarray:
        """(m,) sum over count; nearly zero where nobody was in the survey."""
        return self.sums[part] / self.units

    def std(self, part: str) -> float:
        """Of the noise on each number of the mean, the count taken as it is."""
        return self.stds[part] / self.units


def survey(
    bench: Bench,
    task: Task,
    silo: Silo,
    plan: LocalPlan,
    statistics: Mapping[str, Statistic],
    *,
    limit: int | None = None,
) -> Surveyed:
    """One survey of a silo's training rows under `task.params`: the sums of its `statistics`, and how many units.

    A unit's vector in a part is the mean over its rows, clipped to an L2 norm of 1 in float64. One with a NaN or an
    infinity is zero in that part; the unit still counts. With `plan.survey` units are drawn by secret coins and sums
    are noised, all from one fresh generator; parts and round must be those of the plan. Without it sums are exact, and
    each row is a unit; `limit`: so many rows at most, ≥ 1, always the same ones.

    Beside noise each row goes through the model by itself, so that no statistic and no rounding can make a unit's
    vector depend on the others: in bfloat16, in passes, one unit of 36 moved the rest by 0.003 of its bound.

    Raises `GuaranteeError` for parts or a round that nobody paid for, for an exact survey beside private steps, and for
    statistics that are no (b, m); `SiloError` where there is no row to learn the widths of the parts from.
    """
    if COUNT in statistics:
        raise GuaranteeError("statistics beside the count", f"one of the name {COUNT!r}", "Call it something else.")
    if not silo.examples:
        raise SiloError("a silo with a row to train on", "none", "Leave silos without text out of the treaty.")
    if plan.survey is None:
        return _exact(bench, task, silo, plan, statistics, limit)
    plan.survey.check(statistics, task.round)
    assert silo.units is not None
    random = plan.survey.source.generator("survey", silo.name, task.round)
    seed = int(random.integers(1 << 63))
    chosen = plan.survey.sample(len(silo.units), random)
    units = [silo.units.rows(int(unit), plan.survey.rows, random) for unit in chosen]
    sums = _sums(bench, task, silo, units, 1, seed, statistics)
    released = plan.survey.released(sums, task.round, random)
    return Surveyed(released, {part: plan.survey.std(part, task.round) for part in released})


def _exact(
    bench: Bench, task: Task, silo: Silo, plan: LocalPlan, statistics: Mapping[str, Statistic], limit: int | None
) -> Surveyed:
    if plan.privacy is not None:
        raise GuaranteeError(
            "a survey with noise of its own, where units inside silos are protected",
            "a plan that has none for surveys",
            "Add surveys to the plan, so that they are paid for; beside shares of noise there are none.",
        )
    rows = np.arange(silo.examples)
    if limit is not None and limit < len(rows):
        rows = np.sort(generator(task.seed, "survey rows", silo.name).permutation(len(rows))[:limit])
    seed = derive(task.seed, "survey", silo.name, task.round)
    sums = _sums(bench, task, silo, rows[:, None], plan.rows, seed, statistics)
    return Surveyed(sums, dict.fromkeys(sums, 0.0))


@torch.no_grad()
def _sums(
    bench: Bench, task: Task, silo: Silo, units: Sequence[np.ndarray], most: int, seed: int,
    statistics: Mapping[str, Statistic],
) -> dict[str, np.ndarray]:  # fmt: skip
    """The exact sums of clipped vectors, whatever is done with them. `units`: the rows of each. Vectors are wide and
    units many, so that a unit's is held only until its last row was seen.
    """
    sums: dict[str, np.ndarray] = {}
    begun: dict[tuple[str, int], np.ndarray] = {}
    left = [len(rows) for rows in units]
    data, passes = silo.splits["train"], list(_passes(silo, units, most))
    bench.objective.ready(data, np.concatenate([rows for rows, _ in passes]))
    for rows, owners in passes:
        seen = bench.see(task.params, bench.objective.collate(data, rows, seed))
        found = {part: _numbers(part, x(seen), len(rows), sums.get(part)) for part, x in statistics.items()}
        for part, x in found.items():
            sums.setdefault(part, np.zeros(x.shape[1]))
        for row, unit in enumerate(owners):
            left[unit] -= 1
            for part, x in found.items():
                with np.errstate(over="ignore", invalid="ignore"):
                    begun[part, unit] = begun.get((part, unit), 0.0) + x[row]
                if not left[unit]:
                    sums[part] += _clipped(begun.pop((part, unit)) / len(units[unit]))
    return {COUNT: np.array([float(len(units))])} | sums


def _passes(silo: Silo, units: Sequence[np.ndarray], most: int) -> Iterator[tuple[np.ndarray, list[int]]]:
    """(rows, whose they are) of at most `most` rows, unit by unit, those of like length together. Where there is no
    unit: a row that is nobody's, of which only the widths are learned.
    """
    if not len(units):
        yield np.zeros(1, np.int64), []
        return
    lengths = np.diff(silo.splits["train"].inputs.bounds)
    order = sorted(range(len(units)), key=lambda unit: -lengths[units[unit]].max())
    rows, owners = np.concatenate([units[unit] for unit in order]), [unit for unit in order for _ in units[unit]]
    for at in range(0, len(rows), most):
        yield rows[at : at + most], owners[at : at + most]


def _numbers(part: str, found: torch.Tensor, rows: int, before: np.ndarray | None) -> np.ndarray:
    """A statistic as (rows, m) float64. What is said of a wrong one has no number that the data decide."""
    if found.dim() != 2 or len(found) != rows or (before is not None and len(before) != found.shape[1]):
        raise GuaranteeError(
            f"of the statistic {part!r} one vector for each row, always of one length",
            f"{found.dim()} dimension(s), or another number of rows or of columns",
            "Return a tensor of (rows, numbers).",
        )
    return found.detach().double().cpu().numpy()


def _clipped(vector: np.ndarray) -> np.ndarray:
    """(m,): scaled down to an L2 norm of 1 where it is longer; zeros where its norm is not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        norm = np.linalg.norm(vector)
        return vector / max(norm, 1.0) if np.isfinite(norm) else np.zeros_like(vector)
