"""What a treaty will cost, before it runs: bytes counted on real payloads, time from one measured step."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from . import wire
from .build import Workplace
from .secure.backends import SecretKey
from .silo import Silo, Units
from .silo.train import train
from .stages.base import Chain
from .stages.encrypt import Encrypt
from .types import Key, Task, Update


@dataclass(frozen=True)
class Estimate:
    """`bytes_*`: of one silo in one round with all parts of an update, exact, without the keys and shares of secure
    sums (with masks some 4 KB at 8 silos, 8 KB with 32 neighbours; under encryption a public key of 70 or 130 KB).
    `steps`: local steps of one silo in one round (the most of any).

    `seconds`: of the whole run on this machine with its baselines and evaluations, from `step_seconds`, one measured
    step; expect it to be wrong by a third either way. Where no silo lives here, all of one batch of full rows each.
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
    sent = _update(f.algorithm.parts({name: x.shape for name, x in params.items()}), place)
    up = len(_payload(f.stages, sent, task))
    per_round = len(f.sampler.cohort(f.silos, 0, f.seed)) or 1
    steps = max(place.plan.steps_of(silo) for silo in _silos(place).values())
    step = _time_of_a_step(place, task)
    training = step * steps * per_round * f.rounds
    asked = _survey_seconds(place, step) * per_round
    runs = 1 + ("pooled" in baselines) + ("local" in baselines)
    looks = f.rounds // every * (1 + ("pooled" in baselines)) + 1 + runs + ("base" in baselines)
    return Estimate(
        parameters=sum(x.size for x in params.values()),
        bytes_down=down,
        bytes_up=up,
        bytes_total=(down + up) * per_round * f.rounds,
        steps=steps,
        step_seconds=step,
        seconds=training * runs + asked + looks * _evaluation_seconds(place, step),
    )


def _payload(stages: Chain, update: Update, task: Task) -> bytes:
    """What leaves a silo, but for what it says: masks change no size, and no key changes that of ciphertexts."""
    plain, hiding = stages.split()
    update = plain.encode(update, task)
    for stage in hiding.stages:
        if isinstance(stage, Encrypt):
            update = replace(stage, key=SecretKey.fresh(stage.what.sums.ring).public).encode(update, task)
    return wire.pack(update.tensors, {"round": 0})


def _update(parts: Mapping[Key, tuple[int, ...]], place: Workplace) -> Update:
    """Zeros in the shapes of all that is sent, of the width in which it is: what is not as wide as a parameter is
    measured in doubles.
    """
    single = set(place.bench.start()) if place.treaty.algorithm.name != "fedlap" else {name for _, name in parts}
    metric = {("metric", name): np.zeros(1) for name in ("loss", "targets") if place.treaty.disclosure.loss}
    kinds = {key: np.float32 if key[1] in single else np.float64 for key in parts}
    return Update({key: np.zeros(shape, kinds[key]) for key, shape in parts.items()} | metric)


def _silos(place: Workplace) -> Mapping[str, Silo]:
    """Those that live here; else each as if it had one batch of rows in every split, and each of them full."""
    if place.silos:
        return place.silos
    objective, base = place.bench.objective, place.base
    words = base.tokenizer.decode([1 + i % (len(base.tokenizer) - 1) for i in range(objective.max_length)])
    label = (base.labels or objective.topics or ("",))[0]
    row = {"text": words, "target": words, "label": label, "domain": ""}
    rows = objective.encode(pa.Table.from_pylist([row] * place.plan.batch), base.tokenizer)
    splits = dict.fromkeys(("train", "validation", "test"), rows)
    units = Units(np.arange(len(rows)), np.arange(len(rows), dtype=np.uint64)) if place.plan.privacy else None
    return {name: Silo(name, splits, units=units) for name in place.federation.silos}


def _time_of_a_step(place: Workplace, task: Task) -> float:
    """Seconds of one local step of one silo: the second of two, since the first warms caches."""
    silo = next(iter(_silos(place).values()))
    plan = replace(place.plan, steps=1, epochs=None)
    for _ in range(2):
        began = time.perf_counter()
        train(place.bench, task, [silo], plan, [{}])
    return time.perf_counter() - began


def _survey_seconds(place: Workplace, step: float) -> float:
    """Of all surveys of one silo: forward passes over the units that are asked, or over all rows."""
    a, rounds = place.treaty.alignment, place.federation.rounds
    if place.treaty.algorithm.name != "alignment":
        return 0.0
    rows = max(silo.examples for silo in _silos(place).values())
    survey = place.plan.survey
    asked = rows * survey.rate if survey is not None else min(rows, a.rows or rows)
    return step / 3 * asked / place.plan.batch * -(-rounds // a.every)


def _evaluation_seconds(place: Workplace, step: float) -> float:
    """A forward pass is about a third of a training step on the same rows (with LoRA, about half)."""
    limit = place.treaty.evaluation.max_windows or 10**9
    split = "validation" if place.final_split == "validation" else "test"
    rows = sum(min(limit, len(silo.splits[split])) for silo in _silos(place).values())
    return step / 2 * rows / place.plan.batch
