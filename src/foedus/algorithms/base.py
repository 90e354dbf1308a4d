"""The contract of an algorithm: what silos do with a task, and what the server keeps beside the parameters.

An algorithm never owns the round: it cannot see the mechanism, the engine or the ledger.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..tree import as_part, minus, part
from ..types import Key, Params, Task, Tree, Update

if TYPE_CHECKING:
    from ..lm.bench import Batch, Bench
    from ..silo.shard import Silo
    from ..silo.train import Trained

Shapes = Mapping[str, tuple[int, ...]]


class Algorithm(Protocol):
    """`train` and `scores` run at the silos, `train` for several side by side; the others at the server.

    `parts`: every tensor of an update but its metrics, with its shape, given those of the parameters: what a sum that
    hides single updates lays out. `extra` and `finish`: the shared state, which travels with every task. `direction`:
    what the server optimizer is given of a round's mean. `refine`: parameters and shared state after its step.
    `scores`: as `Bench.scores`, of a silo's own predictions, given its memory.
    """

    def train(
        self, bench: Bench, task: Task, silos: Sequence[Silo], memories: Sequence[Tree]
    ) -> list[tuple[Update, Tree]]: ...
    def parts(self, shapes: Shapes) -> Mapping[Key, tuple[int, ...]]: ...
    def extra(self, params: Params) -> Tree: ...
    def finish(self, extra: Tree, mean: Tree) -> Tree: ...
    def direction(self, mean: Tree) -> Params: ...
    def refine(self, params: Params, extra: Tree) -> tuple[Params, Tree]: ...
    def scores(self, bench: Bench, params: Params, silo: Silo, batch: Batch, memory: Tree) -> dict[str, np.ndarray]: ...


class Averaging:
    """Sends a difference, keeps nothing, steps along the mean, and predicts with the model. Others start from here."""

    def parts(self, shapes: Shapes) -> Mapping[Key, tuple[int, ...]]:
        return {("delta", name): shape for name, shape in shapes.items()}

    def extra(self, params: Params) -> Tree:
        return {}

    def finish(self, extra: Tree, mean: Tree) -> Tree:
        return extra

    def direction(self, mean: Tree) -> Params:
        return part(mean, "delta")

    def refine(self, params: Params, extra: Tree) -> tuple[Params, Tree]:
        return params, extra

    def scores(self, bench: Bench, params: Params, silo: Silo, batch: Batch, memory: Tree) -> dict[str, np.ndarray]:
        return bench.scores(params, batch)


def delta(task: Task, silo: Silo, trained: Trained) -> Update:
    """Local minus global, with the sums of the training loss; the weight is the number of training examples."""
    metric = {"loss": np.array([trained.loss]), "targets": np.array([float(trained.targets)])}
    return Update(
        as_part("delta", minus(trained.params, task.params)) | as_part("metric", metric), weight=silo.examples
    )
