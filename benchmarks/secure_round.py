"""What secure sums add to a whole round, in time and bytes: `python -m benchmarks.secure_round [--tiny]`.

Time: 20 silos train LoRA on SmolLM2-135M in one process, with secure sums of 16-bit words and in the open, round by
round in turn: the same base, text, and steps. Nothing is simulated: tasks, sessions, deposits, masks, digests and
signatures go through the loop and the engine as bytes. Training itself is the same code in both, and on a busy machine
differs by more than what is looked for, so what surrounds it is measured by itself; the row with the target adds it to
the same training time in both. The bare ratio stands beside it. The first round of a session has its set-up, and a row.

Bytes: what each of 100 silos, which nobody trains, sends for a million parameters in all exchanges of a round, when a
session goes on, beside the two bytes of each parameter; and beside Flower's masked vector alone.

Everything in processor time of one thread.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np

from foedus import loop
from foedus.algorithms import FedAvg
from foedus.build import Workplace, build, federation
from foedus.engines import Engine, InProcess
from foedus.gather import Masked
from foedus.governance.circle import fresh_circle
from foedus.loop import Federation
from foedus.privacy.mechanisms import Unprotected
from foedus.secure import simulate
from foedus.secure.messages import Agreement
from foedus.server import Full, Sgd, WeightedMean
from foedus.silo import Handler, LocalPlan
from foedus.silo.membership import Membership
from foedus.stages import Weigh, chain
from foedus.stages.grid import Grid
from foedus.stages.mask import Mask
from foedus.stages.weigh import WEIGHT
from foedus.stages.words import Words, layout_of, room
from foedus.treaty import parse
from foedus.types import State

from .apart import apart, installed
from .overhead import Client, NoSteps
from .table import Row, finish, median, share, show

MODEL, TINY = "smollm2-135m-instruct", "tiny:llama"
STEPS, BATCH, TURNS = 2, 4, 2
SILOS, PARAMETERS = 100, 10**6
TIME, BYTES = 1.02, 1.01

TREATY = """
[treaty]
name = "secure-round"
[model]
base = "{base}"
max_length = 128
[data]
source = "20newsgroups"
max_examples = 400
[silos]
by = "iid"
count = 20
[split]
validation = 0.1
test = 0.0
[cohort]
minimum = 10
[algorithm]
name = "fedavg"
rounds = 2
[local]
steps = {steps}
batch = {batch}
[server]
weighting = "uniform"
[secure]
sums = "masked"
word = 16
[disclosure]
holdings = false
[evaluation]
every = 2
baselines = []
[performance]
cohort_batch = 1
threads = 1
"""


def rows(base: str = MODEL, steps: int = STEPS, turns: int = TURNS, parameters: int = PARAMETERS) -> list[Row]:
    """Time, then bytes."""
    return [*time_rows(base, steps, turns), *bytes_rows(SILOS, parameters)]


# Time


@dataclass(frozen=True)
class Timed(FedAvg):
    """FedAvg that notes the processor seconds of its local training."""

    seconds: list[float] = field(default_factory=list)

    def train(self, bench, task, silos, memories):
        began = time.process_time()
        results = FedAvg.train(self, bench, task, silos, memories)
        self.seconds.append(time.process_time() - began)
        return results


class Rounds:
    """A federation's rounds, going on where they stopped."""

    def __init__(self, place: Workplace, rules: Federation) -> None:
        self.clock: list[float] = []
        self.rules = replace(rules, algorithm=Timed(place.plan, self.clock))
        self.engine: Engine = place.engine(rules=self.rules)
        self.state: State = loop.start(self.rules, place.bench.start())

    def one(self) -> tuple[float, float]:
        """Seconds of the next round: training, and everything else."""
        self.clock.clear()
        began = time.process_time()
        self.state, _ = loop.one_round(self.rules, self.engine, self.state)
        return sum(self.clock), time.process_time() - began - sum(self.clock)


def in_the_open(place: Workplace) -> Federation:
    """The rules of the same treaty without secure sums."""
    treaty = place.treaty.replace(**{"secure.sums": "open"})
    return federation(treaty, tuple(place.silos), place.base.digest, place.plan)


def rounds(base: str, steps: int, turns: int) -> dict[str, list[tuple[float, float]]]:
    """For "secure" and "open" rounds: (training, all else) of each, in seconds; the first one and `turns` more."""
    place = build(parse(TREATY.format(base=base, steps=steps, batch=BATCH)))
    runs = {"secure": Rounds(place, place.federation), "open": Rounds(place, in_the_open(place))}
    out: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name in sorted(runs, reverse=turn % 2 == 0):
            out[name].append(runs[name].one())
    return out


def time_rows(base: str, steps: int, turns: int) -> list[Row]:
    """Secure rounds beside open ones."""
    found = apart(rounds, base, steps, turns)
    training = median([train for each in found.values() for train, _ in each])
    (first, *secure), (_, *plain) = ([rest for _, rest in found[name]] for name in ("secure", "open"))
    extra, usual = median(secure), median(plain)
    whole = {name: median([sum(pair) for pair in each[1:]]) for name, each in found.items()}
    name = f"round: 20 silos × {steps} steps of {BATCH} rows"
    return [
        share(f"{name}, secure, beside open, with the same time of training", training + extra, training + usual, "s",
              TIME),
        share(f"{name}, secure, beside open, as they came", whole["secure"], whole["open"], "s"),
        share(f"{name}, all but training, secure, beside open", extra, usual, "s"),
        share(f"{name}, all but training, the first of a session, beside a later one", first, extra, "s"),
    ]  # fmt: skip


# Bytes


def bytes_rows(silos: int, parameters: int) -> list[Row]:
    """What a silo sends."""
    ours = steady_bytes(silos, parameters)
    name = f"bytes up: {silos} silos, {parameters:,} parameters in 16 bits, all exchanges of a round"
    out = [share(f"{name}, beside the bare words", ours, 2.0 * parameters, "bytes", BYTES)]
    if installed("flwr"):
        from .peer_secagg import bytes_up

        out.append(share(f"{name}, beside Flower's masked vector", ours, bytes_up(parameters), "bytes"))
    return out


def steady_bytes(silos: int, parameters: int) -> int:
    """The most that one of `silos` sends in the second round of a session, when nobody trains."""
    names = simulate.names(silos)
    circle = fresh_circle(names)
    agreement = Agreement(
        "11" * 32, "none", circle.roster, circle.chair, word=16, corrupt=Fraction(1, 10), dropout=Fraction(1, 10),
        minimum=silos // 2,
    )  # fmt: skip
    membership = Membership(agreement, circle.silos)
    layout = layout_of({("delta", "w"): (parameters,)}, [WEIGHT], 16, silos)
    stages = chain(Weigh("uniform"), Grid(1.0 / room(16, silos)), Words(layout), Mask(membership))
    handler = Handler(None, NoSteps(), stages, "none", membership=membership)
    engine = InProcess(handler, {name: Client(name) for name in names}, LocalPlan(lr=1.0, batch=1, steps=1))
    rules = Federation(
        NoSteps(), stages, WeightedMean(), Unprotected(), Sgd(1.0), Full(), tuple(names), "none", rounds=2,
        gather=Masked(agreement, circle.coordinator, {"train": layout.length}),
    )  # fmt: skip
    start = loop.start(rules, {"w": np.zeros(parameters, np.float32)})
    *_, (_, release) = loop.run(rules, engine, start)
    return max(receipt.bytes_up for receipt in release.receipts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.secure_round", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="on a tiny model, shown and not kept")
    if parser.parse_args().tiny:
        show(rows(TINY, steps=1, parameters=10**4))
    else:
        finish("secure_round", rows())
