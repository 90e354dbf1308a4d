"""The contract of an algorithm: what silos do with a task, and what the server keeps beside the parameters.

An algorithm never owns the round: it cannot see the mechanism, the engine or the ledger.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..tree import as_part, minus
from ..types import Params, Task, Tree, Update

if TYPE_CHECKING:
    from ..lm.bench import Bench
    from ..silo.shard import Silo
    from ..silo.train import Trained


class Algorithm(Protocol):
    """`train` runs at the silos, several side by side; `extra` and `finish` keep shared state at the server."""

    def train(
        self, bench: Bench, task: Task, silos: Sequence[Silo], memories: Sequence[Tree]
    ) -> list[tuple[Update, Tree]]: ...
    def extra(self, params: Params) -> Tree: ...
    def finish(self, extra: Tree, mean: Tree) -> Tree: ...


class Stateless:
    """An algorithm whose server keeps nothing but the parameters."""

    def extra(self, params: Params) -> Tree:
        return {}

    def finish(self, extra: Tree, mean: Tree) -> Tree:
        return extra


def delta(task: Task, silo: Silo, trained: Trained) -> Update:
    """Local minus global, with the sums of the training loss; the weight is the number of training examples."""
    metric = {"loss": np.array([trained.loss]), "targets": np.array([float(trained.targets)])}
    return Update(
        as_part("delta", minus(trained.params, task.params)) | as_part("metric", metric), weight=silo.examples
    )
