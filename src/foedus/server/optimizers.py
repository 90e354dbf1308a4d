"""Server optimizers: the mean delta is a pseudo-gradient step, taken by SGD, momentum, Adagrad, Adam or Yogi.

Reddi et al. 2021, "Adaptive Federated Optimization" (arXiv 2003.00295), algorithm 2, with its letters: Δ is the mean of
local − global, so the server adds. No bias correction, as in the paper; v₀ = τ².
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from ..tree import as_part, part
from ..types import Params, Tree


class ServerOptimizer(Protocol):
    """`init` makes the state for the parameters; `step` moves them along the mean delta."""

    def init(self, params: Params) -> Tree: ...
    def step(self, params: Params, delta: Params, state: Tree) -> tuple[Params, Tree]: ...


@dataclass(frozen=True)
class Sgd:
    """x ← x + η m with m ← β m + Δ. η = 1, β = 0 is FedAvg; β > 0 is FedAvgM (Hsu et al. 2019)."""

    lr: float = 1.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        _check_lr(self.lr)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"Expected 0 <= momentum={self.momentum} < 1.")

    def init(self, params: Params) -> Tree:
        return as_part("m", _zeros(params)) if self.momentum else {}

    def step(self, params: Params, delta: Params, state: Tree) -> tuple[Params, Tree]:
        if not self.momentum:
            return {k: _as(params[k], params[k] + self.lr * delta[k]) for k in params}, state
        m = {k: _as(x, self.momentum * x + delta[k]) for k, x in part(state, "m").items()}
        return {k: _as(params[k], params[k] + self.lr * m[k]) for k in params}, as_part("m", m)


@dataclass(frozen=True)
class Adaptive:
    """m ← β₁ m + (1 − β₁) Δ;  v by `rule`;  x ← x + η m / (√v + τ).

    `rule`: "adagrad" v + Δ²; "adam" β₂ v + (1 − β₂) Δ²; "yogi" v − (1 − β₂) Δ² sign(v − Δ²). τ > 0 bounds a step.
    """

    rule: Literal["adagrad", "adam", "yogi"]
    lr: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        _check_lr(self.lr)
        if self.rule not in ("adagrad", "adam", "yogi"):
            raise ValueError(f"Expected rule={self.rule!r} to be adagrad, adam or yogi.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"Expected 0 <= {name}={getattr(self, name)} < 1.")
        if not self.tau > 0:
            raise ValueError(f"Expected tau={self.tau} > 0.")

    def init(self, params: Params) -> Tree:
        v = {k: np.full_like(x, self.tau**2) for k, x in params.items()}
        return as_part("m", _zeros(params)) | as_part("v", v)

    def step(self, params: Params, delta: Params, state: Tree) -> tuple[Params, Tree]:
        m = {k: _as(x, self.beta1 * x + (1 - self.beta1) * delta[k]) for k, x in part(state, "m").items()}
        v = {k: _as(x, self._second_moment(x, delta[k] ** 2)) for k, x in part(state, "v").items()}
        moved = {k: _as(x, x + self.lr * m[k] / (np.sqrt(v[k]) + self.tau)) for k, x in params.items()}
        return moved, as_part("m", m) | as_part("v", v)

    def _second_moment(self, v: np.ndarray, squared: np.ndarray) -> np.ndarray:
        new: np.ndarray = self.beta2 * v + (1 - self.beta2) * squared
        if self.rule == "adagrad":
            new = v + squared
        elif self.rule == "yogi":
            new = v - (1 - self.beta2) * squared * np.sign(v - squared)
        return new


OPTIMIZERS: Mapping[str, str] = {
    "sgd": "x + η Δ; η = 1 is FedAvg (McMahan et al. 2017)",
    "momentum": "FedAvgM (Hsu et al. 2019)",
    "adagrad": "FedAdagrad (Reddi et al. 2021)",
    "adam": "FedAdam (Reddi et al. 2021)",
    "yogi": "FedYogi (Reddi et al. 2021)",
}


def _check_lr(lr: float) -> None:
    if not lr > 0:
        raise ValueError(f"Expected lr={lr} > 0.")


def _zeros(params: Params) -> dict[str, np.ndarray]:
    return {k: np.zeros_like(x) for k, x in params.items()}


def _as(like: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.asarray(x, like.dtype)
