"""What the federation itself costs, as a share of a run with ten silos: `python -m benchmarks.federation`.

Ten newsgroups train LoRA on SmolLM2-135M, with the demo's 5 local steps of 8 rows a round, through the same `execute`
that `foedus run` uses: tasks and updates as bytes with their digests, sums, ledger, metrics, checkpoints, summary,
adapter and report on the disk. The federation is everything that is not local training or evaluation. Loading model
and text happens once a run, is the same without a federation, and is left out; so the share is that of a run of any
length, but for its end, which is counted in full in the second row although a real run has more rounds to spread it
over.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from foedus.algorithms import FedAvg
from foedus.algorithms.base import delta
from foedus.build import build
from foedus.execute import begin, execute
from foedus.silo.train import train
from foedus.treaty import parse

from .apart import apart
from .table import Row, finish, share

SILOS, ROUNDS, STEPS, TARGET = 10, 1, 5, 0.02

TREATY = """
[treaty]
name = "federation"
[model]
base = "smollm2-135m-instruct"
max_length = 128
[data]
source = "20newsgroups"
domain = "domain"
max_examples = 60
keep = ["alt.atheism", "comp.graphics", "comp.sys.mac.hardware", "misc.forsale", "rec.autos", "rec.sport.hockey",
        "sci.crypt", "sci.med", "sci.space", "talk.politics.mideast"]
[silos]
by = "domain"
[split]
validation = 0.1
test = 0.0
[algorithm]
name = "fedavg"
rounds = {rounds}
[local]
steps = {steps}
batch = 8
[evaluation]
every = {rounds}
baselines = []
max_windows = 4
[performance]
cohort_batch = 1
"""


@dataclass(frozen=True)
class Timed(FedAvg):
    """FedAvg that notes how long its local training takes: the steps alone, without the difference that is sent."""

    seconds: list[float] = field(default_factory=list)

    def train(self, bench, task, silos, memories):
        began = time.perf_counter()
        results = train(bench, task, silos, self.local, memories)
        self.seconds.append(time.perf_counter() - began)
        return [(delta(task, silo, r), r.memory) for silo, r in zip(silos, results, strict=True)]


def measure(rounds: int, steps: int) -> dict[str, Any]:
    """Seconds of a run: "total", "train", "evaluate"; "rounds": (whole, train) of each round but the first."""
    place = build(parse(TREATY.format(rounds=rounds + 1, steps=steps)))
    clock: list[float] = []
    place = replace(place, federation=replace(place.federation, algorithm=Timed(place.plan, clock)))
    with tempfile.TemporaryDirectory() as folder:
        began = tick = time.perf_counter()
        evaluate, each, trained = 0.0, [], 0.0
        for event in execute(begin(place.treaty, Path(folder) / "run"), place):
            now = time.perf_counter()
            if event.kind == "evaluation":
                evaluate += now - tick
            if event.kind == "round":
                each.append((now - tick, sum(clock) - trained))
                trained = sum(clock)
            tick = now
        total = tick - began
    return {"total": total, "train": sum(clock), "evaluate": evaluate, "rounds": each[1:]}


def rows(rounds: int = ROUNDS, steps: int = STEPS) -> list[Row]:
    """The share of the federation in a round, and in a whole run of so few rounds."""
    found = apart(measure, rounds, steps)
    whole, train = (sum(x) for x in zip(*found["rounds"], strict=True))
    work = found["train"] + found["evaluate"]
    what = f"federation: beside training, {SILOS} silos × {steps} steps"
    end = found["total"] - work
    return [
        share(f"{what}, a round", (whole - train) / rounds, whole / rounds, "s", TARGET),
        share(f"{what}, a run of {rounds + 1} rounds with its end", end, found["total"], "s"),
    ]


if __name__ == "__main__":
    finish("federation", rows())
