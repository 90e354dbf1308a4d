"""What may be done to a gradient before it is sent, and the gradient that is then sent.

A `Defence` is a value; `sent` applies it to the gradients of single rows in a fixed order: clip each, add them up, add
noise, keep the largest entries, round. Only clipping together with noise gives a guarantee; the others are here
because they are often taken for one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ..lm.bench import Bench
from ..lm.objectives import Encoded
from ..types import Params


@dataclass(frozen=True)
class Defence:
    """`clip`: L2 norm to which each row's whole gradient is clipped, > 0; ∞ clips nothing. `noise`: noise multiplier,
    ≥ 0; the sum of the clipped gradients gets Gaussian noise of standard deviation noise · clip. `keep`: share of the
    entries that are sent, the largest of all, in (0, 1]. `bits`: each tensor is rounded to this many bits, 2…31, its
    largest entry to the largest number; None rounds nothing.
    """

    clip: float = math.inf
    noise: float = 0.0
    keep: float = 1.0
    bits: int | None = None

    def __post_init__(self) -> None:
        if not self.clip > 0:
            raise ValueError(f"Expected clip={self.clip} > 0.")
        if not (self.noise == 0 or (self.noise > 0 and math.isfinite(self.noise * self.clip))):
            raise ValueError(f"Expected noise={self.noise} ≥ 0, and with noise a finite clip; got clip={self.clip}.")
        if not 0 < self.keep <= 1:
            raise ValueError(f"Expected keep={self.keep} in (0, 1].")
        if self.bits is not None and not 2 <= self.bits <= 31:
            raise ValueError(f"Expected bits={self.bits} in 2…31.")

    @property
    def name(self) -> str:
        """As the audit's page says it.

        >>> Defence().name, Defence(clip=1.0, noise=0.5).name
        ('none', 'clip 1, noise 0.5')
        """
        words = [
            f"clip {self.clip:g}" if math.isfinite(self.clip) else "",
            f"noise {self.noise:g}" if self.noise else "",
            f"top {100 * self.keep:g} %" if self.keep < 1 else "",
            f"{self.bits} bits" if self.bits else "",
        ]
        return ", ".join(word for word in words if word) or "none"


def gradients(bench: Bench, params: Params, encoded: Encoded, rows: Iterable[int]) -> Iterator[dict[str, np.ndarray]]:
    """The gradient of each row's mean loss at `params`, one row after the other, by parameter; float64."""
    for row in rows:
        yield _gradient(bench, params, encoded, row)


def sent(each: Iterable[Params], defence: Defence, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """The mean of the rows' gradients, at least one, as it leaves the silo under `defence`.

    `generator` draws the noise of the experiment. It may be seeded: what is attacked here is sent to nobody.
    """
    total: dict[str, np.ndarray] = {}
    rows = 0
    for gradient in each:
        total, rows = added(total, clipped(gradient, defence.clip)), rows + 1
    return finished(total, rows, defence, generator)


def clipped(gradient: Params, norm: float) -> Params:
    """A row's gradient with an L2 norm of at most `norm`, > 0, over all parameters together."""
    size = math.sqrt(sum(float(np.square(x, dtype=np.float64).sum()) for x in gradient.values()))
    return gradient if size <= norm else {name: x * (norm / size) for name, x in gradient.items()}


def added(total: Params, gradient: Params) -> dict[str, np.ndarray]:
    """The sum; an empty total is zero."""
    return {name: total[name] + x if total else x for name, x in gradient.items()}


def finished(total: Params, rows: int, defence: Defence, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """What is sent for `total`, the sum of `rows` gradients that are clipped already: `sent` after its first half."""
    if defence.noise:
        std = defence.noise * defence.clip
        total = {name: x + generator.normal(0.0, std, x.shape) for name, x in total.items()}
    mean = {name: x / rows for name, x in total.items()}
    return _rounded(_largest(mean, defence.keep), defence.bits)


def _gradient(bench: Bench, params: Params, encoded: Encoded, row: int) -> dict[str, np.ndarray]:
    leaves = bench.leaves([params])
    sums, counts = bench.losses(leaves, [bench.objective.collate(encoded, [row], 0)])
    (sums / counts.clamp(min=1)).sum().backward()
    found = {name: leaf.grad for name, leaf in leaves.items()}
    return {
        name: np.zeros(leaves[name].shape[1:]) if grad is None else grad[0].double().cpu().numpy()
        for name, grad in found.items()
    }


def _largest(gradient: Params, keep: float) -> Params:
    if keep == 1:
        return gradient
    sizes = np.concatenate([np.abs(x).ravel() for x in gradient.values()])
    kept = max(1, round(keep * len(sizes)))
    least = np.partition(sizes, len(sizes) - kept)[len(sizes) - kept]
    return {name: np.where(np.abs(x) >= least, x, 0.0) for name, x in gradient.items()}


def _rounded(gradient: Params, bits: int | None) -> dict[str, np.ndarray]:
    if bits is None:
        return dict(gradient)
    levels = 2 ** (bits - 1) - 1
    steps = {name: np.abs(x).max(initial=0.0) / levels or 1.0 for name, x in gradient.items()}
    return {name: np.round(x / steps[name]) * steps[name] for name, x in gradient.items()}
