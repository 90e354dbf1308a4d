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

from ..types import Task, Total, Tree, Update

Settings = Mapping[str, float]


class Stage(Protocol):
    """One reversible step between a silo's update and the server's sum."""

    hides: ClassVar[bool]
    """Whether single updates cannot be read afterwards."""

    def encode(self, update: Update, task: Task) -> Update: ...
    def decode(self, total: Total, task: Task) -> Total: ...
    def bound(self, bound: float, task: Task) -> float: ...
    def start(self) -> Settings: ...
    def learn(self, mean: Tree, settings: Settings) -> Settings: ...


class Plain:
    """Does nothing. A stage that wants to do little starts from here."""

    hides: ClassVar[bool] = False

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
    """Stages in a row, itself a stage: `encode`, `bound` and `learn` go first to last, `decode` last to first."""

    stages: tuple[Stage, ...] = ()

    @property
    def hides(self) -> bool:
        return any(stage.hides for stage in self.stages)

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


def chain(*stages: Stage) -> Chain:
    """`chain(a, b)` is `Chain((a, b))`."""
    return Chain(stages)
