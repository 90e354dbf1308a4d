"""Private steps inside a silo: sample units, clip each one's gradient, add noise. What training sees is the release
alone.

The numbers come from `privacy/steps.py`, the clipped sums from `lm/`; this file brings them together, for one silo or
for several side by side. Each silo draws its own coins and its own noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..lm.bench import IGNORED
from ..lm.clipping import Clipping
from ..lm.per_example import NOBODY
from ..lm.terms import Goal
from ..privacy.steps import PrivateSteps
from ..seeds import derive
from ..types import Task, Tree
from .shard import Silo

if TYPE_CHECKING:
    from ..lm.bench import Bench
    from .train import LocalPlan

FACTOR = ("private factor", "")
DONE = ("private steps done", "")
PAST = "private noise "


class PrivateGradients:
    """The gradients of one round's private steps. Lives for one call of `train`; `memory` is what outlives it.

    In a silo's memory: the clip norm's factor where it follows a quantile; where noise is correlated, the last noise
    and how many steps are done.
    """

    def __init__(
        self, bench: Bench, task: Task, silos: Sequence[Silo], plan: LocalPlan, memories: Sequence[Tree],
        goals: Sequence[Goal] | None = None,
    ) -> None:  # fmt: skip
        assert plan.privacy is not None
        self.bench, self.task, self.silos, self.rows = bench, task, silos, plan.rows
        self.goals = [plan.goal] * len(silos) if goals is None else goals
        self.steps: PrivateSteps = plan.privacy
        self.factors = [float(memory[FACTOR][0]) if FACTOR in memory else 1.0 for memory in memories]
        self.past = [_past(memory) for memory in memories]
        self.done = [int(memory[DONE][0]) if DONE in memory else 0 for memory in memories]

    def fill(self, leaves: Mapping[str, torch.Tensor], step: int) -> tuple[np.ndarray, np.ndarray]:
        """Puts the release of one step into the leaves' gradients.

        Returns (K,) sums of losses in nats and (K,) numbers of targets, which are private.
        """
        released, losses, targets = self.released(leaves, step)
        for name, leaf in leaves.items():
            leaf.grad = torch.from_numpy(np.stack([one[name] for one in released])).to(leaf)
        return losses, targets

    def released(
        self, leaves: Mapping[str, torch.Tensor], step: int
    ) -> tuple[list[dict[str, np.ndarray]], np.ndarray, np.ndarray]:
        """What each silo's step releases, and the private sums of `fill`."""
        source, round = self.steps.source, self.task.round
        randoms = [source.generator("steps", silo.name, round, step) for silo in self.silos]
        seeds = [int(random.integers(1 << 63)) for random in randoms]
        drawn = [self._draw(k, step, random) for k, random in enumerate(randoms)]
        torch.manual_seed(seeds[0])  # of dropout: secret, so that nobody can tell whose mask changed
        sums, norms, losses, targets = self._clipped(leaves, drawn, seeds)
        released = [
            self._release(k, {name: x[k] for name, x in sums.items()}, norms[k], randoms[k])
            for k in range(len(self.silos))
        ]
        return released, losses, targets

    def memory(self, k: int) -> Tree:
        """What silo k keeps for its next round."""
        kept = {} if self.steps.following is None else {FACTOR: np.array([self.factors[k]])}
        if self.steps.factors is not None:
            kept[DONE] = np.array([self.done[k] + self.steps.steps], np.int64)
        return kept | {
            (f"{PAST}{age:03d}", name): x for name, past in self.past[k].items() for age, x in enumerate(past)
        }

    def _draw(self, k: int, step: int, random: np.random.Generator) -> list[np.ndarray]:
        """The rows of each unit in a step of silo k. Steps are counted at the silo: one that missed a round goes on
        where it stopped, and so do its noise and the turns of its units.
        """
        silo = self.silos[k]
        assert silo.units is not None
        chosen = self.steps.sample(silo.units.keys, self.done[k] + step, random)
        return [silo.units.rows(int(unit), self.steps.rows, random) for unit in chosen]

    def _clipped(
        self, leaves: Mapping[str, torch.Tensor], drawn: Sequence[Sequence[np.ndarray]], seeds: Sequence[int]
    ) -> tuple[dict[str, np.ndarray], list[np.ndarray], np.ndarray, np.ndarray]:
        """(K, *shape) sums of clipped gradients, every unit's norm, losses and targets, over as many passes as it
        takes.
        """
        silos = len(self.silos)
        sums = {name: np.zeros(tuple(x.shape), self.steps.dtype) for name, x in leaves.items()}
        norms: list[list[np.ndarray]] = [[] for _ in range(silos)]
        losses, targets = np.zeros(silos), np.zeros(silos, np.int64)
        bare = {name: x.detach() for name, x in leaves.items()}
        passes = [in_passes(units, self.rows) for units in drawn]
        for number in range(max(map(len, passes), default=0)):
            now = [p[number] if number < len(p) else [] for p in passes]
            batches = [self._batch(*each) for each in zip(self.silos, now, seeds, strict=True)]
            clipped = self.bench.clipped(
                bare, batches, [_owners(units) for units in now], self._clippings(), self.goals
            )
            for name, x in clipped.gradients.items():
                sums[name] += x.cpu().numpy()
            for k, x in enumerate(clipped.norms):
                norms[k].append(x.cpu().numpy())
            losses += clipped.losses.double().cpu().numpy()
            targets += clipped.targets.cpu().numpy()
        width = len(self.steps.parts.norms)
        return sums, [np.concatenate([np.zeros((0, width)), *one]) for one in norms], losses, targets

    def _batch(self, silo: Silo, units: Sequence[np.ndarray], seed: int) -> dict[str, torch.Tensor]:
        """The rows of some units; where there is none, a row without targets. `seed`: of masks, and private: a row's
        number changes when others come or go, so nobody may know which mask belongs to which.
        """
        rows = np.concatenate(units) if units else np.zeros(1, np.int64)
        batch = collate(self.bench, silo, rows, seed)
        return batch if units else {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}

    def _clippings(self) -> list[Clipping]:
        parts = self.steps.parts
        return [Clipping(tuple(norm * factor for norm in parts.norms), parts.of) for factor in self.factors]

    def _release(self, k: int, sums: Mapping[str, np.ndarray], norms: np.ndarray, random: np.random.Generator):
        """What one silo releases of a step."""
        steps, round, factor = self.steps, self.task.round, self.factors[k]
        noise = steps.noise({name: x.shape for name, x in sums.items()}, round, factor, random)
        if steps.factors is not None:
            noise = self._correlated(k, noise)
        if steps.following is not None:
            bits = steps.count(norms[:, 0], round, factor, random)
            self.factors[k] = steps.following.next(factor, bits, steps.divisor)
        return steps.released(sums, noise)

    def _correlated(self, k: int, fresh: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert self.steps.factors is not None
        out = {}
        for name, x in fresh.items():
            out[name], self.past[k][name] = self.steps.factors.next(self.past[k].get(name, ()), x)
        return out


def collate(bench: Bench, silo: Silo, rows: np.ndarray, seed: int) -> dict[str, torch.Tensor]:
    """A batch of a silo's training rows; "draws", (b,), is a number of each row's own, for what terms draw."""
    draws = torch.tensor([derive(seed, "draws", int(row)) for row in rows], dtype=torch.long)
    return {**bench.objective.collate(silo.splits["train"], rows, seed), "draws": draws}


def in_passes(units: Sequence[np.ndarray], rows: int) -> list[list[np.ndarray]]:
    """Units in groups of at most `rows` rows, a unit never cut; one that is larger goes by itself."""
    passes: list[list[np.ndarray]] = []
    held = rows
    for unit in units:
        if held + len(unit) > rows or not passes:
            passes.append([])
            held = 0
        passes[-1].append(unit)
        held += len(unit)
    return passes


def _owners(units: Sequence[np.ndarray]) -> torch.Tensor:
    """The unit of each row in one pass."""
    if not units:
        return torch.tensor([NOBODY])
    return torch.repeat_interleave(torch.arange(len(units)), torch.tensor([len(rows) for rows in units]))


def _past(memory: Tree) -> dict[str, tuple[np.ndarray, ...]]:
    """The last noise of each parameter, the latest first."""
    out: dict[str, tuple[np.ndarray, ...]] = {}
    for (key, name), x in sorted(memory.items()):
        if key.startswith(PAST):
            out[name] = (*out.get(name, ()), x)
    return out
