"""The contract of a stage, the stage that does nothing, and chains of stages.

A stage is a frozen dataclass of public numbers with pure methods. `encode` runs inside the silo on one update; `decode`
runs at the server on the sum; `bound` says the most one silo can then move that sum, in L2, given the most it could
before; `start` gives the public settings it begins with; `learn` makes the next round's settings from what was
released, never from an update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

from ..errors import GuaranteeError
from ..types import Task, Total, Tree, Update

Settings = Mapping[str, float]


class Stage(Protocol):
    """One reversible step between a silo's update and the server's sum."""

    hides: ClassVar[bool]
    """Whether single updates cannot be read afterwards."""
    additive: ClassVar[bool]
    """Whether the sum of what it encodes decodes to the sum of the updates, in a layout of public, fixed length."""

    def encode(self, update: Update, task: Task) -> Update: ...
    def decode(self, total: Total, task: Task) -> Total: ...
    def bound(self, bound: float, task: Task) -> float: ...
    def start(self) -> Settings: ...
    def learn(self, mean: Tree, settings: Settings) -> Settings: ...


class Plain:
    """Does nothing. A stage that wants to do little starts from here."""

    hides: ClassVar[bool] = False
    additive: ClassVar[bool] = True

    def encode(self, update: Update, task: Task) -> Update:
        return update

    def decode(self, total: Total, task: Task) -> Total:
        return total

    def bound(self, bound: float, task: Task) -> float:
        return bound

    def start(self) -> Settings:
        return {}

    def learn(self, mean: Tree, settings: Settings) -> Settings:
        return settings


@dataclass(frozen=True)
class Chain:
    """Stages in a row, itself a stage: `encode`, `bound` and `learn` go first to last, `decode` last to first.

    Raises `GuaranteeError` for a stage that hides single updates after one whose output cannot be summed, or before any
    other.
    """

    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        at = self._hiding
        partial = [stage for stage in self.stages[:at] if not stage.additive]
        if at < len(self.stages) and partial:
            raise GuaranteeError(
                "only stages whose sum can be decoded before one that hides single updates",
                " and ".join(map(repr, partial)),
                "Drop it; round to one public grid (Grid), and send every number in its public place.",
            )
        if at < len(self.stages) - 1:
            raise GuaranteeError(
                "nothing after a stage that hides single updates",
                f"{self.stages[at + 1]!r} after {self.stages[at]!r}",
                "Put it before: what is hidden looks random, and there is no use in packing or hiding it again.",
            )

    @property
    def hides(self) -> bool:
        return any(stage.hides for stage in self.stages)

    @property
    def additive(self) -> bool:
        return all(stage.additive for stage in self.stages)

    def split(self) -> tuple[Chain, Chain]:
        """The stages before the first that hides, and the others."""
        return Chain(self.stages[: self._hiding]), Chain(self.stages[self._hiding :])

    def encode(self, update: Update, task: Task) -> Update:
        for stage in self.stages:
            update = stage.encode(update, task)
        return update

    def decode(self, total: Total, task: Task) -> Total:
        for stage in reversed(self.stages):
            total = stage.decode(total, task)
        return total

    def bound(self, bound: float, task: Task) -> float:
        for stage in self.stages:
            bound = stage.bound(bound, task)
        return bound

    def start(self) -> Settings:
        return {name: value for stage in self.stages for name, value in stage.start().items()}

    def learn(self, mean: Tree, settings: Settings) -> Settings:
        for stage in self.stages:
            settings = stage.learn(mean, settings)
        return settings

    @property
    def _hiding(self) -> int:
        """The place of the first stage that hides; behind the last where none does."""
        return next((i for i, stage in enumerate(self.stages) if stage.hides), len(self.stages))


def chain(*stages: Stage) -> Chain:
    """`chain(a, b)` is `Chain((a, b))`."""
    return Chain(stages)
