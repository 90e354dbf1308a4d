"""Mechanisms: the one door from a private `Total` to a public `Release`. Plans make them; nothing else should.

Noise is multiplier × bound on every coordinate, whatever the tensor: the bound is that of the whole total, so one
Gaussian covers parameters, clip bits and every other part at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..errors import GuaranteeError
from ..types import Key, Release, Total, Tree
from .correlated import Banded
from .noise import Source, discrete_gaussian, gaussian

Event = Mapping[str, Any]
ROUND: Key = ("round", "released")


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


@dataclass(frozen=True)
class AtSilos:
    """Publishes the total as it is, because every silo has protected its own part. `events`: what each round costs."""

    unit: str
    events: tuple[Event, ...]

    def init(self) -> Tree:
        return _counted(0)

    def release(self, total: Total, state: Tree) -> tuple[Release, Tree]:
        done = rounds_done(state)
        return Release(total.tensors, self.events[done], self.unit), _counted(done + 1)


@dataclass(frozen=True)
class Gaussian:
    """Adds N(0, (multiplier · bound)²) to every coordinate, in float64; `multipliers` and `events` of each round.

    Guarantees: an infinite or missing bound is refused; the noise does not depend on how many silos came; a state says
    how many rounds were released, and no round is released twice from one state.
    """

    unit: str
    multipliers: tuple[float, ...]
    events: tuple[Event, ...]
    source: Source

    def init(self) -> Tree:
        return _counted(0)

    def release(self, total: Total, state: Tree) -> tuple[Release, Tree]:
        done = rounds_done(state)
        std = self.multipliers[done] * _finite(total)
        random = self.source.generator("server", done)
        tensors = {key: x + gaussian(random, x.shape, std) for key, x in total.tensors.items()}
        return Release(tensors, self.events[done], self.unit), _counted(done + 1)


@dataclass(frozen=True)
class Bare:
    """Adds N(0, std²) to whatever comes, bounded or not: guarantees nothing, and its events say so."""

    std: float
    events: tuple[Event, ...]
    source: Source

    def init(self) -> Tree:
        return _counted(0)

    def release(self, total: Total, state: Tree) -> tuple[Release, Tree]:
        done = rounds_done(state)
        random = self.source.generator("server", done)
        tensors = {key: x + gaussian(random, x.shape, self.std) for key, x in total.tensors.items()}
        return Release(tensors, self.events[done], unit=""), _counted(done + 1)


@dataclass(frozen=True)
class DiscreteGaussian:
    """The same with integers: the total lies on a grid of `step`, and so does what is added.

    Canonne, Kamath and Steinke 2020 (arXiv 2004.00010), theorem 4: noise of parameter σ on integers with L2
    sensitivity Δ is Δ² / (2σ²)-zCDP, in any dimension. Floating point has no part in what is released, up to the exact
    multiplication by the step.
    """

    unit: str
    multipliers: tuple[float, ...]
    events: tuple[Event, ...]
    source: Source
    step: float

    def init(self) -> Tree:
        return _counted(0)

    def release(self, total: Total, state: Tree) -> tuple[Release, Tree]:
        done = rounds_done(state)
        std = self.multipliers[done] * _finite(total) / self.step
        random = self.source.generator("server", done)
        tensors = {
            key: (self._integers(x) + discrete_gaussian(random, x.shape, std)) * self.step
            for key, x in total.tensors.items()
        }
        return Release(tensors, self.events[done], self.unit), _counted(done + 1)

    def _integers(self, x: np.ndarray) -> np.ndarray:
        whole = np.rint(x / self.step)
        if not np.allclose(whole * self.step, x, rtol=1e-9, atol=self.step * 1e-6):
            raise GuaranteeError(
                f"a total on the grid of {self.step}", "coordinates between its points", "Put a Grid among the stages."
            )
        return whole.astype(np.int64)


@dataclass(frozen=True)
class Correlated:
    """Noise that is correlated over rounds, so that it cancels in sums of rounds: C⁻¹ Z for a banded C.

    `multiplier`: of the whole run's sensitivity; `sensitivity`: of C under the participation that was declared.
    The state holds the last rounds' noise: whoever has it can take that noise off, so checkpoints of such a run are as
    private as the total.
    """

    unit: str
    multiplier: float
    sensitivity: float
    factors: Banded
    events: tuple[Event, ...]
    source: Source

    def init(self) -> Tree:
        return _counted(0)

    def release(self, total: Total, state: Tree) -> tuple[Release, Tree]:
        done = rounds_done(state)
        std = self.multiplier * self.sensitivity * _finite(total)
        random = self.source.generator("server", done)
        tensors, after = {}, _counted(done + 1)
        for number, (key, x) in enumerate(total.tensors.items()):
            before = [v for (_, name), v in sorted(state.items()) if name == str(number)]
            noise, past = self.factors.next(before, gaussian(random, x.shape, std))
            tensors[key] = x + noise
            after |= {(f"past{age:03d}", str(number)): v for age, v in enumerate(past)}
        return Release(tensors, self.events[done], self.unit), after


def rounds_done(state: Tree) -> int:
    """How many rounds a mechanism's state has released."""
    return int(state[ROUND][0]) if ROUND in state else 0


def _counted(rounds: int) -> dict[Key, np.ndarray]:
    return {ROUND: np.array([rounds], np.int64)}


def _finite(total: Total) -> float:
    if not 0 < total.bound < math.inf:
        raise GuaranteeError(
            "a total with a finite bound, which noise can cover",
            f"a bound of {total.bound}",
            "Put a clip among the stages, and weigh silos uniformly.",
        )
    return total.bound
