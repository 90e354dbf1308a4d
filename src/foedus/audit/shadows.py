"""Shadow adapters for LiRA: the same training on random halves of the documents, so that it is known who was in each.

Each document is in exactly half of the shadows, and documents are drawn apart from one another. Training is handed in
as a function, so that a shadow is trained as its target was: privately, where the target was. It costs as much as
training the target that many times on half of the data: seconds for a tiny model, hours for one of 135 M parameters on
two cores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..lm.bench import Bench, preferred_cohort
from ..lm.objectives import Encoded
from ..seeds import derive, generator
from ..silo.shard import Silo
from ..silo.train import LocalPlan, train
from ..types import Params, Task
from .membership import documents_of, select

Fit = Callable[[Sequence[Silo]], Sequence[Params]]
"""Trains each silo by itself from the public start; gives their parameters in order."""


@dataclass(frozen=True, eq=False)
class Shadows:
    """The shadows' parameters, and whether document i (of `documents_of` the data) was in shadow s: `inside` (s, n)."""

    params: tuple[Params, ...]
    inside: np.ndarray

    def __post_init__(self) -> None:
        if self.inside.ndim != 2 or len(self.inside) != len(self.params):
            raise ValueError(f"Expected inside of shape ({len(self.params)}, n); got {self.inside.shape}.")


def cast(data: Encoded, count: int, fit: Fit, *, seed: int) -> Shadows:
    """`count` ≥ 4 shadows, an even number, on `data`: `concat([members, others])` as for `membership.infer`."""
    documents = documents_of(data)
    inside = halves(count, len(documents), generator(seed, "shadows"))
    silos = [Silo(f"shadow {s}", {"train": select(data, documents[row])}) for s, row in enumerate(inside)]
    return Shadows(tuple(fit(silos)), inside)


def halves(count: int, documents: int, draw: np.random.Generator) -> np.ndarray:
    """(count, documents) bool: each document in exactly half of the shadows, at random."""
    if count < 4 or count % 2 or documents < 2:
        raise ValueError(f"Expected an even count={count} ≥ 4 and documents={documents} ≥ 2.")
    return draw.permuted(np.arange(count)[:, None] % 2 == np.zeros((1, documents)), axis=0)


def plainly(bench: Bench, start: Params, plan: LocalPlan, *, seed: int) -> Fit:
    """Local steps from `start` by `plan`, whose `steps` are those of all rounds together; side by side where the bench
    stacks."""
    if plan.steps is None:
        raise ValueError("Expected a plan with steps, so that all shadows take equally many; this one has epochs.")

    def fit(silos: Sequence[Silo]) -> list[Params]:
        length = max(int(np.diff(silo.splits["train"].inputs.bounds).max()) for silo in silos)
        width = preferred_cohort(bench, plan.batch, length, len(silos))
        groups = [silos[i : i + width] for i in range(0, len(silos), width)]
        return [params for group in groups for params in _together(bench, start, plan, group, seed)]

    return fit


def _together(bench: Bench, start: Params, plan: LocalPlan, silos: Sequence[Silo], seed: int) -> list[Params]:
    task = Task(0, "", start, tuple(silo.name for silo in silos), derive(seed, "shadow training"))
    return [trained.params for trained in train(bench, task, silos, plan, [{} for _ in silos])]
