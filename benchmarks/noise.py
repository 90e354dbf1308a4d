"""What noise costs: `python -m benchmarks.noise`.

A million integers of the discrete Gaussian, ours beside OpenDP's exact sampler (which is asked for ten thousand, and
its time multiplied); ten million float64 Gaussians from the cipher beside NumPy's default generator; a million
Skellams beside the same; and what a silo does with a million numbers before they are masked, when it adds its share of
distributed noise: clip, grid, noise and the check of its tail. All take turns in one process, in processor time, of one
thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from foedus.privacy import noise
from foedus.privacy.plan import Terms, make_plan
from foedus.stages import chain
from foedus.types import Task, Update

from .table import Row, faster, finish, median, share

COUNT, EXACT, FLOATS = 10**6, 10**4, 10**7
STDS = (1.0, 100.0, 1e6)
REPEATS, LIMIT = 5, 0.15
SHARE_LIMIT = 0.2
SHARED = Terms(
    "silo", 1e-5, 10, noise_multiplier=1.0, silos=100, expected=100, placement="shared", discrete=True, minimum=80,
    colluding=10, word=32, parties=100,
)  # fmt: skip


def seconds(draw: Callable[[], object]) -> float:
    """Processor seconds of one call."""
    began = time.process_time()
    draw()
    return time.process_time() - began


def in_turn(repeats: int, *draws: Callable[[], object]) -> list[float]:
    """The median of each, called in turn; the first turn is not counted."""
    times = [[seconds(draw) for draw in draws] for _ in range(repeats + 1)][1:]
    return [median(column) for column in zip(*times, strict=True)]


def rows(count: int = COUNT, exact: int = EXACT, floats: int = FLOATS, repeats: int = REPEATS) -> list[Row]:
    """Discrete Gaussians of three sizes against OpenDP and against the limit; Gaussians and Skellams against NumPy."""
    ours, plain = noise.SystemSource().generator("benchmark"), np.random.default_rng()
    out = []
    for std in STDS:
        mine, theirs = in_turn(
            repeats,
            lambda std=std: noise.discrete_gaussian(ours, count, std),
            lambda std=std: noise.exact_discrete_gaussian(exact, std),
        )
        name = f"noise: {count:,} discrete Gaussians, σ = {std:g}"
        out += [
            faster(f"{name}, against OpenDP", mine, theirs * count / exact, "s"),
            share(f"{name}, against the limit", mine, LIMIT * count / COUNT, "s", 1.0),
        ]
    mine, theirs = in_turn(
        repeats, lambda: noise.gaussian(ours, floats, 2.0), lambda: noise.gaussian(plain, floats, 2.0)
    )
    out.append(share(f"noise: {floats:,} Gaussians, AES against NumPy's PCG64", mine, theirs, "s"))
    mine, theirs = in_turn(repeats, lambda: noise.skellam(ours, count, 1e6), lambda: noise.skellam(plain, count, 1e6))
    out.append(share(f"noise: {count:,} Skellams, AES against NumPy's PCG64", mine, theirs, "s"))
    return [*out, shared(count, repeats)]


def shared(count: int, repeats: int) -> Row:
    """One silo's update of `count` numbers on its way to the masks, in words of 32 bits for 100 silos."""
    plan = make_plan(SHARED, noise.SystemSource())
    plan.check_silos(count, accepted=True)
    update = Update({("delta", "w"): np.random.default_rng(0).standard_normal(count, np.float32)}, silo="s")
    task = Task(0, "", {"w": np.zeros(count, np.float32)}, (), 0)
    (mine,) = in_turn(repeats, lambda: chain(*plan.stages()).encode(update, task))
    name = f"noise: a silo's share for {count:,} numbers, against the limit"
    return share(name, mine, SHARE_LIMIT * count / COUNT, "s", 1.0)


if __name__ == "__main__":
    finish("noise", rows())
