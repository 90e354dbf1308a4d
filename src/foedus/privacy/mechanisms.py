"""Mechanisms: the one door from a private `Total` to a public `Release`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from ..types import Release, Total, Tree


class Mechanism(Protocol):
    """`init`: its state before the first round. `release`: a release, and the state for the next."""

    def init(self) -> Tree: ...
    def release(self, total: Total, state: Tree) -> tuple[Release, Tree]: ...


@dataclass(frozen=True)
class Unprotected:
    """Publishes the total as it is, and says so: the event is "none", and protects nobody's presence."""

    def init(self) -> Tree:
        return {}

    def release(self, total: Total, state: Tree) -> tuple[Release, Tree]:
        event: Mapping[str, str] = {"mechanism": "none"}
        return Release(total.tensors, event, unit=""), state
