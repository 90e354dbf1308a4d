"""What a treaty will cost, before it runs: bytes counted on real payloads, time from one measured step."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from . import wire
from .build import Workplace
from .secure.backends import SecretKey
from .silo.train import train
from .stages.base import Chain
from .stages.encrypt import Encrypt
from .types import Task, Update


@dataclass(frozen=True)
class Estimate:
    """`bytes_*`: of one silo in one round, exact, without the keys and shares of secure sums (with masks some 4 KB at 8
    silos, 8 KB with 32 neighbours; under encryption a public key of 70 or 130 KB). `steps`: local steps of one silo in
    one round (the most of any).

    `seconds`: of the whole run on this machine with its baselines and evaluations, from `step_seconds`, one measured
    step; expect it to be wrong by a third either way.
    """

    parameters: int
    bytes_down: int
    bytes_up: int
    bytes_total: int
    steps: int
    step_seconds: float
    seconds: float


def estimate(place: Workplace) -> Estimate:
    """Packs a task and an update, and times a local step."""
    every, baselines = place.treaty.evaluation.every, place.treaty.evaluation.baselines
    params = place.bench.start()
    f = place.federation
    task = Task(0, f.model, params, f.silos, f.seed, f.stages.start(), f.algorithm.extra(params))
    down = len(wire.pack_task(task))
    up = len(_payload(f.stages, _update(params, place.treaty.disclosure.loss), task))
    per_round = len(f.sampler.cohort(f.silos, 0, f.seed)) or 1
    steps = max(place.plan.steps_of(silo) for silo in place.silos.values())
    step = _time_of_a_step(place, task)
    training = step * steps * per_round * f.rounds
    runs = 1 + ("pooled" in baselines) + ("local" in baselines)
    looks = f.rounds // every * (1 + ("pooled" in baselines)) + 1 + runs + ("base" in baselines)
    return Estimate(
        parameters=sum(x.size for x in params.values()),
        bytes_down=down,
        bytes_up=up,
        bytes_total=(down + up) * per_round * f.rounds,
        steps=steps,
        step_seconds=step,
        seconds=training * runs + looks * _evaluation_seconds(place, step),
    )


def _payload(stages: Chain, update: Update, task: Task) -> bytes:
    """What leaves a silo, but for what it says: masks change no size, and no key changes that of ciphertexts."""
    plain, hiding = stages.split()
    update = plain.encode(update, task)
    for stage in hiding.stages:
        if isinstance(stage, Encrypt):
            update = replace(stage, key=SecretKey.fresh(stage.what.sums.ring).public).encode(update, task)
    return wire.pack(update.tensors, {"round": 0})


def _update(params, loss: bool) -> Update:
    metric = {("metric", name): np.zeros(1) for name in ("loss", "targets") if loss}
    return Update({("delta", name): np.zeros_like(x) for name, x in params.items()} | metric)


def _time_of_a_step(place: Workplace, task: Task) -> float:
    """Seconds of one local step of one silo: the second of two, since the first warms caches."""
    silo = next(iter(place.silos.values()))
    plan = replace(place.plan, steps=1, epochs=None)
    for _ in range(2):
        began = time.perf_counter()
        train(place.bench, task, [silo], plan, [{}])
    return time.perf_counter() - began


def _evaluation_seconds(place: Workplace, step: float) -> float:
    """A forward pass is about a third of a training step on the same rows (with LoRA, about half)."""
    limit = place.treaty.evaluation.max_windows or 10**9
    split = "validation" if place.final_split == "validation" else "test"
    rows = sum(min(limit, len(silo.splits[split])) for silo in place.silos.values())
    return step / 2 * rows / place.plan.batch
