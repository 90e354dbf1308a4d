"""Evaluation at a silo: sums that add, by domain, so that no average of averages is ever taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from ..lm.bench import Batch
from ..lm.objectives import Encoded, Objective
from ..seeds import derive, generator
from ..types import Tree

Scores = Callable[[Batch], Mapping[str, np.ndarray]]
MEASURES = ("nll", "targets", "correct", "bytes")
HELD_OUT = ("validation", "test")
"""The splits that a silo answers for. Sums over its training text would be exact, and beside every guarantee."""


def evaluate(
    scores: Scores, data: Encoded, objective: Objective, *, seed: int, limit: int | None = None, tokens: int = 2048
) -> Tree:
    """Sums over the held-out rows, keyed by (measure, domain), as float64 arrays of shape (1,).

    Measures: "nll" in nats, "targets", "correct" (targets that were the arg max), "bytes" (UTF-8, of the text that was
    predicted). `scores`: of a batch's rows, as `Bench.scores` has them. `limit`: at most that many rows, always the
    same ones. `tokens`: about how many go in one batch.
    """
    sums: dict[tuple[str, str], float] = {}
    batches = list(_batches(data, seed, limit, tokens))
    objective.ready(data, [row for rows in batches for row in rows])
    for rows in batches:
        batch = objective.collate(data, rows, derive(seed, "evaluate", int(rows[0])))
        found = {**scores(batch), "bytes": data.bytes[rows]}
        for measure in MEASURES:
            for row, value in zip(rows, found[measure], strict=True):
                key = (measure, data.domains[row])
                sums[key] = sums.get(key, 0.0) + float(value)
    return {key: np.array([value]) for key, value in sums.items()}


def _batches(data: Encoded, seed: int, limit: int | None, tokens: int) -> Iterator[np.ndarray]:
    """Rows of like length together, longest first, about `tokens` tokens a batch."""
    lengths = np.diff(data.inputs.bounds)
    rows = np.arange(len(data))
    if limit is not None and limit < len(rows):
        rows = np.sort(generator(seed, "evaluation rows").permutation(len(rows))[:limit])
    rows = rows[np.argsort(-lengths[rows], kind="stable")]
    while len(rows):
        size = max(1, tokens // max(1, int(lengths[rows[0]])))
        yield rows[:size]
        rows = rows[size:]
