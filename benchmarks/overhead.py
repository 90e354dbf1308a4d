"""What the engine costs a client, without any training: `python -m benchmarks.overhead`.

One round asks 50 clients for updates of 10³ and 10⁶ float32 numbers in ten arrays; nobody trains. Ours takes the
whole path of a real run: the task is packed, unpacked and checked at the silo, the difference taken, weighed, packed
and digested there, unpacked and summed at the server, released, and applied. pfl-research copies, subtracts and adds
tensors in one process, and Flower sends messages to Ray's actors; both as their documentation shows. Ours and
pfl-research take turns in one process.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from foedus import loop
from foedus.algorithms.base import Averaging, delta
from foedus.engines import InProcess
from foedus.loop import Federation
from foedus.privacy.mechanisms import Unprotected
from foedus.server import Full, Sgd, WeightedMean
from foedus.silo import Handler, LocalPlan
from foedus.silo.train import Trained
from foedus.stages import Weigh, chain

from .apart import apart, installed
from .table import Row, faster, finish, median

SIZES = (10**3, 10**6)
CLIENTS, ARRAYS = 50, 10
BLOCKS, TARGET = 6, 1.0
ROUNDS = {10**3: 10, 10**6: 2}
FLOWER_ROUNDS = 5


@dataclass(frozen=True)
class Client:
    """A silo with nothing to train on."""

    name: str
    examples: int = 1

    def local_steps(self, batch: int, steps: int | None, epochs: int | None) -> int:
        return steps or 1


@dataclass(frozen=True)
class NoSteps(Averaging):
    """FedAvg whose local training takes no step: everybody's parameters stay what they were."""

    def train(self, bench, task, silos, memories):
        return [(delta(task, silo, Trained(task.params, 0.0, 1, {})), {}) for silo in silos]


class Ours:
    """The loop and the in-process engine, going on where they stopped. `together`: silos side by side."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], clients: int = CLIENTS, together: int = 1) -> None:
        silos = {f"client-{i:03d}": Client(f"client-{i:03d}") for i in range(clients)}
        stages = chain(Weigh())
        handler = Handler(None, NoSteps(), stages, "none", frozenset({"loss", "holdings"}))
        self.engine = InProcess(handler, silos, LocalPlan(lr=1.0, batch=1, steps=1), together)
        self.federation = Federation(
            NoSteps(), stages, WeightedMean(), Unprotected(), Sgd(1.0), Full(), tuple(silos), "none", rounds=10**9
        )
        params = {f"layers.{i}.lora": np.zeros(shape, np.float32) for i, shape in enumerate(shapes)}
        self.state = loop.start(self.federation, params)

    def run(self, rounds: int) -> list[float]:
        """Seconds of each of the next `rounds` rounds."""
        seconds = []
        for _ in range(rounds):
            began = time.perf_counter()
            self.state, _ = loop.one_round(self.federation, self.engine, self.state)
            seconds.append(time.perf_counter() - began)
        return seconds


def shapes_of(size: int) -> list[tuple[int, ...]]:
    """`size` numbers in ten arrays."""
    return [(size // ARRAYS,)] * ARRAYS


def side_by_side(size: int, clients: int, rounds: int, blocks: int, with_pfl: bool) -> dict[str, list[float]]:
    """Milliseconds a client, for each round of ours and of pfl-research's, in turns; the first block is not counted.

    One thread: it copies arrays of these sizes faster than two do, and pfl-research took 1.0 ms with one and 1.7 ms
    with two. Ours does not use PyTorch here.
    """
    import torch

    torch.set_num_threads(1)
    engines: dict[str, Any] = {"ours": Ours(shapes_of(size), clients)}
    if with_pfl:
        from .peer_pfl import Simulation

        engines["pfl"] = Simulation(shapes_of(size), clients)
    out: dict[str, list[float]] = {name: [] for name in engines}
    for block in range(blocks + 1):
        for name, engine in engines.items():
            seconds = engine.run(rounds)
            out[name] += [1e3 * s / clients for s in seconds] if block else []
    return out


def flower(size: int, clients: int, rounds: int) -> list[float]:
    """Milliseconds a client, for each of Flower's rounds but the first."""
    from .peer_flower import simulate

    arrays = {f"layers.{i}.lora": np.zeros(shape, np.float32) for i, shape in enumerate(shapes_of(size))}
    seconds = simulate("echo", arrays, clients, rounds + 1, {})["rounds"]
    return [1e3 * s / clients for s in seconds]


def rows(sizes: Sequence[int] = SIZES, clients: int = CLIENTS, blocks: int = BLOCKS) -> list[Row]:
    """For every size: ours beside pfl-research and beside Flower, in milliseconds a client; medians and minima."""
    out = []
    for size in sizes:
        with_pfl = installed("pfl")
        mine = apart(side_by_side, size, clients, ROUNDS.get(size, 2), blocks, with_pfl)
        theirs = {"pfl-research 0.6": mine.get("pfl", [])}
        theirs["Flower's simulation"] = apart(flower, size, clients, FLOWER_ROUNDS) if installed("flwr", "ray") else []
        for peer, times in theirs.items():
            for which, pick in (("median", median), ("least", min)):
                name = f"overhead: a client's update of {size:,} numbers, against {peer}, {which}"
                target = TARGET if which == "median" else None
                out.append(faster(name, pick(mine["ours"]), pick(times) if times else None, "ms", target))
    return out


if __name__ == "__main__":
    finish("overhead", rows())
