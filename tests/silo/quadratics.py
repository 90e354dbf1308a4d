"""Least squares in place of a language model: the real loop, engine, handler and local steps, with optima in closed
form and float64 throughout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from foedus import loop
from foedus.engines import InProcess
from foedus.lm.clipping import ClippedSums
from foedus.loop import Federation
from foedus.privacy import Unprotected
from foedus.server import Full, Sgd, WeightedMean
from foedus.silo import Handler, Silo, Units
from foedus.stages import Weigh, chain
from foedus.types import State

WIDTH = 3


@dataclass(frozen=True)
class Points:
    """Rows (x, y), each with the loss ½ (x·w − y)²."""

    x: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.y)

    @property
    def curvature(self) -> np.ndarray:
        return self.x.T @ self.x / len(self)

    def gradient(self, w: np.ndarray) -> np.ndarray:
        return self.x.T @ (self.x @ w - self.y) / len(self)


class Quadratics:
    """As much of a `Bench`, and of its objective, as local steps use."""

    @property
    def objective(self) -> Quadratics:
        return self

    def start(self) -> dict[str, np.ndarray]:
        return {"w": np.zeros(WIDTH)}

    def leaves(self, params) -> dict[str, torch.Tensor]:
        return {"w": torch.from_numpy(np.stack([p["w"] for p in params])).requires_grad_()}

    def collate(self, points: Points, rows, seed: int) -> dict[str, torch.Tensor]:
        return {"x": torch.from_numpy(points.x[rows]), "labels": torch.from_numpy(points.y[rows])}

    def totals(self, leaves, batches, goals) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        left = _left(leaves, batches)
        sums, counts = torch.stack([x @ x / 2 for x in left]), torch.tensor([len(x) for x in left])
        return sums / counts, sums.detach(), counts

    def clipped(self, leaves, batches, units, clippings, goals) -> ClippedSums:
        """Every row is a unit."""
        left = _left(leaves, batches)
        gradients = [batch["x"] * x[:, None] for x, batch in zip(left, batches, strict=True)]
        norms = [g.norm(dim=1, keepdim=True) for g in gradients]
        factors = [(c.norms[0] / norm).clamp(max=1) for norm, c in zip(norms, clippings, strict=True)]
        sums = torch.stack([(g * f).sum(0) for g, f in zip(gradients, factors, strict=True)])
        _, losses, targets = self.totals(leaves, batches, goals)
        return ClippedSums({"w": sums}, norms, losses, targets)


def _left(leaves, batches) -> list[torch.Tensor]:
    """(rows,) of each silo: x·w − y."""
    return [batch["x"] @ w - batch["labels"] for w, batch in zip(leaves["w"], batches, strict=True)]


def silos(count: int = 4, sizes: Sequence[int] = (12,), seed: int = 0) -> dict[str, Silo]:
    """Silos that agree neither on the curvature nor on the optimum."""
    random = np.random.default_rng(seed)
    out = {}
    for i in range(count):
        rows = sizes[i % len(sizes)]
        x = random.normal(size=(rows, WIDTH)) * random.uniform(0.5, 1.5, WIDTH)
        points = Points(x, x @ random.normal(size=WIDTH) + random.normal(size=rows))
        units = Units(np.arange(rows), np.arange(rows, dtype=np.uint64))
        out[f"s{i}"] = Silo(f"s{i}", {"train": points}, units=units)
    return out


def optimum(silos: Mapping[str, Silo], weights: Sequence[float] | None = None) -> np.ndarray:
    """Of the weighted sum of the silos' mean losses."""
    points = [silo.splits["train"] for silo in silos.values()]
    curvature = np.average([one.curvature for one in points], axis=0, weights=weights)
    return np.linalg.solve(curvature, -np.average([one.gradient(np.zeros(WIDTH)) for one in points], 0, weights))


def rounds(
    algorithm, silos: Mapping[str, Silo], count: int, weighting: str = "uniform", **more
) -> Iterator[tuple[State, InProcess]]:
    """Each state of the real loop, and the engine with the silos' memories."""
    stages = chain(Weigh(weighting))
    fields = {
        "algorithm": algorithm, "stages": stages, "aggregator": WeightedMean(), "mechanism": Unprotected(),
        "server_optimizer": Sgd(1.0), "sampler": Full(), "silos": tuple(silos), "model": "", "rounds": count,
    }  # fmt: skip
    federation = Federation(**(fields | more))
    bench = Quadratics()
    engine = InProcess(Handler(bench, algorithm, stages, ""), silos, algorithm.local, together=len(silos))
    for state, _ in loop.run(federation, engine, loop.start(federation, bench.start())):
        yield state, engine
