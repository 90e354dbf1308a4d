"""Evaluation at a silo: sums that add, by domain, so that no average of averages is ever taken."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..lm.bench import Bench
from ..lm.objectives import Encoded
from ..seeds import derive, generator
from ..types import Params, Tree

MEASURES = ("nll", "targets", "correct", "bytes")


def evaluate(
    bench: Bench, params: Params, data: Encoded, *, seed: int, limit: int | None = None, tokens: int = 2048
) -> Tree:
    """Sums over the held-out rows, keyed by (measure, domain), as float64 arrays of shape (1,).

    Measures: "nll" in nats, "targets", "correct" (targets that were the arg max), "bytes" (UTF-8, of the text that was
    predicted). `limit`: at most that many rows, always the same ones. `tokens`: about how many go in one batch.
    """
    sums: dict[tuple[str, str], float] = {}
    for rows in _batches(data, seed, limit, tokens):
        scores = bench.scores(params, bench.objective.collate(data, rows, derive(seed, "evaluate", int(rows[0]))))
        scores = {**scores, "bytes": data.bytes[rows]}
        for measure in MEASURES:
            for row, value in zip(rows, scores[measure], strict=True):
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
