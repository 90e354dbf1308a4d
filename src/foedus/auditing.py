"""`foedus audit`: attacks on a finished run, and what they found beside what the run states. Read `audit/` next.

    checks          does the mechanism do what the plan says?         audit/checks.py, audit/mechanisms.py
    membership      who was in the training?                          audit/membership.py, audit/shadows.py
    canaries        units made up to be looked for: bounds on ε       audit/canaries.py, audit/bounds.py
    inversion       text out of what a silo would send                audit/inversion.py
    extraction      text out of the model, by prompting               audit/canaries.py
    reconstruction  what ε allows at best                             privacy/accountant.py

The run itself is left as it is: canaries go into a silo that is trained anew, alone, and thrown away. Nothing here is
charged to a budget, since nothing is meant to leave: an audit reads private data of all silos at once, as only a
simulation can, and its figures are no part of any release. What it writes holds figures, and text of canaries and of
the documented example alone.

How much is tried is set by the model's size, so that a small model on two cores takes minutes and a tiny one seconds;
what was cut short says so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .algorithms.alignment import Alignment
from .audit import inversion, membership, shadows
from .audit.bounds import Scores, highest
from .audit.canaries import (
    Check,
    Trial,
    bound_records,
    check_record,
    exposure,
    exposure_record,
    extract,
    extraction_record,
    insert,
    plant,
    random_texts,
    scores,
)
from .audit.checks import check_statistics, check_steps, check_surveys
from .audit.defences import Defence
from .audit.mechanisms import check_server, proves, rounds_of, tried
from .audit.membership import documents_of, sample, select
from .build import Workplace
from .errors import RunError
from .execute import FEDERATED
from .governance import RunFolder
from .lm.bench import Bench
from .lm.objectives import Encoded, Ragged, concat
from .privacy import accountant
from .privacy.plan import Event, PrivacyPlan, composed, round_events
from .report.audit import verdict, write_audit
from .seeds import derive, generator
from .silo import LocalPlan, Silo, Units
from .silo.train import train
from .types import Params, Task

CANARIES = 1000
"""Gradient canaries."""
TEXTS = 64
"""Canaries that are texts, half of them put in; and twice as many texts beside, to rank them among."""
WORDS, PREFIX, SUFFIX = 16, 6, 6
"""Tokens of such a canary; of its beginning, that a model is prompted with; and of what it should say then."""
DOCUMENTS = 150
"""Documents a side in membership inference, at most."""
STEPS = 200
"""Steps of the training with canaries, at most."""
READING, TRAINING, PROMPTING = 2.5e12, 1.5e12, 4e11
"""Parameters times tokens that may go through the model: when read, when trained on, and when prompted. One core reads
about 5e10 of them a second with SmolLM2-135M."""
TINY = 5e6
"""Parameters of a model on which shadows are trained."""
SHADOWS = 8
ROW = 12
"""Tokens of a row whose gradient is inverted."""
PRIORS = (1e-6, 1e-4, 1e-2, 0.1)
FPRS = (0.001, 0.01)
UNLIKELY = 1e-3
"""The chance of a rate of false alarms above what is taken for the highest."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Subject:
    """A finished run: its workplace, what it released, and what it states (`summary["privacy"]`)."""

    place: Workplace
    released: Params
    stated: Mapping[str, Any]

    @property
    def bench(self) -> Bench:
        return self.place.bench

    @property
    def plan(self) -> PrivacyPlan | None:
        return self.place.privacy

    @property
    def seed(self) -> int:
        return self.place.treaty.seed

    @cached_property
    def start(self) -> Params:
        """The parameters before any training."""
        return self.bench.start()

    @cached_property
    def parameters(self) -> int:
        """Of the base and the adapter together."""
        return sum(p.numel() for p in self.bench.model.parameters())

    @cached_property
    def fullest(self) -> Silo:
        """The silo with most to train on."""
        return max(self.place.silos.values(), key=lambda silo: len(silo.units or ()) or silo.examples)

    @cached_property
    def trial(self) -> Trial | None:
        """One run of the plan's own noise over gradient canaries, all rounds."""
        return self.attempt(0)

    def attempt(self, number: int) -> Trial | None:
        if self.plan is None:
            return None
        shapes = {name: x.shape for name, x in self.start.items()}
        rounds = rounds_of(self.plan, shapes, CANARIES)
        if not rounds:
            return None
        t = self.plan.terms
        scale = t.divisor if t.local else 1.0
        return tried(rounds, CANARIES, self.random("gradient canaries", number), t.rate, scale)

    def random(self, *names: str | int) -> np.random.Generator:
        """For the audit's own draws, which protect nobody."""
        return generator(self.seed, "audit", *names)

    def split(self, *names: str) -> Encoded:
        """The documents of these splits, of all silos."""
        return concat([silo.splits[name] for silo in self.place.silos.values() for name in names])


def audit(folder: RunFolder, place: Workplace, say: Say = lambda words: None) -> dict[str, Any]:
    """Attacks a finished run; writes audit.json and audit.html into its folder, and returns what it found.

    `say` hears what is being done. The verdict is `verdict_of`. Raises `RunError` when the run is not finished.
    """
    began = time.perf_counter()
    subject = Subject(place, *finished(folder))
    found = {}
    for name, (words, section) in SECTIONS.items():
        say(words)
        found[name] = section(subject)
    record = {
        "format": 1,
        "run": _run(subject),
        "seconds": time.perf_counter() - began,
        "simulated_noise": bool(subject.stated.get("simulated_noise")),
        "stated": _stated(subject.stated),
        **{name: value for name, value in found.items() if value},
    }
    folder.write_json("audit.json", record)
    write_audit(folder.path)
    return record


def verdict_of(record: Mapping[str, Any]) -> tuple[str, str]:
    """("violated", "no guarantee", "not tested" or "consistent", and what that means)."""
    return verdict(record)


def page_of(folder: RunFolder) -> Path:
    """Where the audit's page lies."""
    return folder.path / "audit.html"


def finished(folder: RunFolder) -> tuple[Params, Mapping[str, Any]]:
    """What a run released and what it states. Raises `RunError` while it is not through."""
    summary, restored = folder.read_json("summary.json"), folder.restore(FEDERATED)
    done = restored[0].round if restored else 0
    if summary is None or restored is None or done < summary["rounds"]:
        do = f"Finish it first, with `foedus resume {folder.path}`."
        raise RunError("a finished run, to attack what it released", f"one after round {done}", do, where="audit")
    return restored[0].params, summary["privacy"]


def _run(s: Subject) -> dict[str, Any]:
    treaty = s.place.treaty
    trained = f"LoRA rank {treaty.adapter.rank}" if treaty.adapter.kind == "lora" else "full training"
    return {"name": treaty.name, "model": s.place.base.name, "adapter": trained, "silos": len(s.place.silos),
            "rounds": treaty.algorithm.rounds, "seed": treaty.seed}  # fmt: skip


def _stated(stated: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: stated.get(key) for key in ("epsilon", "delta", "unit", "neighbours", "statement")}
    return kept | {"rdp": stated.get("epsilon_rdp")}


# ---- checks ----


def _checks(s: Subject) -> list[dict[str, Any]]:
    """Every check; a second time where one failed, with fresh noise, and what passes then has passed."""
    first = _checked(s, 0)
    if all(check.passed for check in first):
        return [check_record(check) for check in first]
    again = {check.name: check for check in _checked(s, 1)}
    return [check_record(max(check, again.get(check.name, check), key=lambda c: c.p)) for check in first]


def _checked(s: Subject, attempt: int) -> list[Check]:
    if s.plan is None or s.plan.terms.max_norm is None:
        return []
    trial = s.trial if attempt == 0 else s.attempt(attempt)
    shown = [replace(check, name=f"gradient canaries: {check.name}") for check in (trial.checks if trial else ())]
    if s.plan.terms.local:
        return [*_inside(s), *shown]
    return [*check_server(s.plan, {name: x.shape for name, x in s.start.items()}), *shown]


def _inside(s: Subject) -> list[Check]:
    """The private steps and surveys of the fullest silo, at what was released."""
    task = Task(0, s.place.base.digest, s.released, (s.fullest.name,), s.seed)
    plan, algorithm = s.place.plan, s.place.federation.algorithm
    found = [*check_steps(s.bench, task, s.fullest, plan), *check_surveys(s.fullest, plan)]
    if plan.survey is not None and isinstance(algorithm, Alignment):
        found += check_statistics(s.bench, task, s.fullest, plan, algorithm.statistics(s.bench, task))
    return [Check(check.name, check.p_value, check.said) for check in found]


# ---- membership ----


def _membership(s: Subject) -> dict[str, Any] | None:
    members, others = s.split("train"), s.split("validation", "test")
    if min(len(documents_of(x)) for x in (members, others)) < 2:
        return None
    read, others = (_readable(s, x) for x in (members, others))
    cast = _shadows(s, read, others)
    attacks = membership.infer(s.bench, s.released, s.start, read, others, seed=s.seed, shadows=cast)
    windows = np.isin(members.documents, read.documents).sum()
    cut = "; of each its first window" if len(read) < windows else ""
    drawn = f"training documents of all silos against their held-out documents, at random{cut}"
    return membership.section(attacks, drawn) | _allowed(s, len(documents_of(others)))


def _readable(s: Subject, data: Encoded) -> Encoded:
    """At most `DOCUMENTS` documents at random: whole ones where they may all be read, else as many first windows as may
    be, and ten at least."""
    most = READING / 4 / s.parameters  # of two samples, under two models
    chosen = sample(data, DOCUMENTS, seed=s.seed)
    if len(chosen.inputs.values) <= most:
        return chosen
    rows = s.random("documents").permutation(_firsts(chosen))
    enough = np.cumsum(np.diff(chosen.inputs.bounds)[rows]) <= most
    enough[:10] = True
    return _only(chosen, np.sort(rows[enough]))


def _shadows(s: Subject, members: Encoded, others: Encoded) -> shadows.Shadows | None:
    """Adapters trained on halves of both, as a silo of the run is; on tiny models and short runs alone."""
    work = SHADOWS * _steps_of(s.place) * _tokens_a_step(s) * s.parameters
    if s.parameters > TINY or work > TRAINING:
        return None

    def fit(silos: Sequence[Silo]) -> list[Params]:
        plan = _plain(s) if s.plan is None or not s.plan.terms.local else s.place.plan
        return [_alone(s, _with_units(silo, plan, s.seed), plan, plan.rounds) for silo in silos]

    return shadows.cast(concat([members, others]), SHADOWS, fit, seed=derive(s.seed, "audit"))


def _allowed(s: Subject, others: int) -> dict[str, Any]:
    """The most members that the guarantee leaves to any attack, at the highest rate of false alarms that so many
    others cannot rule out: a rate of 0.1 % may be 7 % where none of a hundred was taken for a member.

    A document more or less changes a silo, which under a guarantee on silos is one that goes and one that comes.
    """
    if s.plan is None or s.stated.get("epsilon") is None:
        return {}
    event = s.plan.event() if s.plan.terms.local else accountant.grouped(s.plan.event(), 2)
    possible = {f"{fpr:g}": highest(int(fpr * others), others, UNLIKELY) for fpr in FPRS}
    return {"allowed": {"tpr": {fpr: accountant.tpr_at(event, most) for fpr, most in possible.items()}}}


# ---- canaries ----


def _canaries(s: Subject) -> dict[str, Any] | None:
    bounds: list[dict[str, Any]] = []
    if s.plan is not None and s.trial is not None and proves(s.plan):
        bounds += bound_records(s.trial.scores, "gradient", s.stated.get("epsilon"), s.plan.terms.delta)
    texts = _texts(s)
    bounds += texts.pop("bounds", [])
    if s.plan is not None and s.plan.terms.rate < 1:  # the f-DP method assumes the trade-off of an unsampled Gaussian
        bounds = [b | {"estimate": True} if b["method"] == "f-DP one-run" else b for b in bounds]
    return texts | {"confidence": 0.95, "bounds": bounds} if texts or bounds else None


def _texts(s: Subject) -> dict[str, Any]:
    """Canaries that are texts, in a silo that is trained anew. Left out for a guarantee on whole silos, of which a
    text is no unit, and for tasks that need more than a text."""
    if s.bench.objective.task not in ("causal-lm", "masked-lm") or (s.plan is not None and not s.plan.terms.local):
        return {}
    words = min(WORDS, s.bench.objective.max_length - 4)
    encoded = inversion.encode(s.bench, random_texts(s.bench, 3 * TEXTS, words, s.random("texts")))
    documents = documents_of(encoded)
    planted = plant(select(encoded, documents[:TEXTS]), "random tokens", s.random("coins"))
    beside = select(encoded, documents[TEXTS:])
    plan, rounds, said = _shortened(s)
    silo = replace(s.fullest, splits={"train": insert(s.fullest.splits["train"], planted)}, shards=())
    trained = _alone(s, _with_units(silo, plan, s.seed, s.fullest.units), plan, rounds)
    shown = replace(planted, kind=f"random tokens, {said}")
    found = {
        "count": len(planted.members),
        "inserted": int(planted.members.sum()),
        "exposure": [exposure_record(exposure(s.bench, trained, shown, beside, seed=s.seed))],
        "bounds": _text_bounds(s, scores(s.bench, trained, s.start, planted, seed=s.seed), plan, rounds),
    }
    if s.bench.objective.task == "causal-lm":
        inside = select(planted.data, documents_of(planted.data)[planted.members])
        told = extract(s.bench, trained, inside, shown.kind, prefix=PREFIX, suffix=SUFFIX, show=3)
        found["extraction"] = [extraction_record(told)]
    return found


def _text_bounds(s: Subject, seen: Scores, plan: LocalPlan, rounds: int) -> list[dict[str, Any]]:
    """Beside each: the ε of the training that these canaries took part in, where it was shortened."""
    if s.plan is None:
        return bound_records(seen, "input", None, s.place.treaty.privacy.delta)
    t = s.plan.terms
    event: Event = s.plan.event(rounds)
    if plan.steps != t.steps:
        event = composed(round_events(replace(t, rounds=1, steps=plan.steps or 1), s.plan.multiplier))
    spent = accountant.upper(event, t.delta)
    return [bound | {"trained_epsilon": spent if math.isfinite(spent) else None}
            for bound in bound_records(seen, "input", spent if math.isfinite(spent) else None, t.delta)]  # fmt: skip


def _shortened(s: Subject) -> tuple[LocalPlan, int, str]:
    """The run's plan, cut to what may be spent here: (plan, rounds, in words what was kept)."""
    plan, rounds = s.place.plan, s.place.plan.rounds
    a_round = max(1, _steps_of(s.place) // rounds)
    most = max(1, min(STEPS, int(TRAINING / s.parameters / _tokens_a_step(s))))
    if a_round * rounds <= most:
        return plan, rounds, f"all {a_round * rounds} steps"
    if a_round <= most:
        return plan, most // a_round, f"the first {most // a_round * a_round} of {a_round * rounds} steps"
    private = replace(plan.privacy, steps=most) if plan.privacy else None
    return replace(plan, steps=most, epochs=None, privacy=private), 1, f"the first {most} of {a_round * rounds} steps"


def _steps_of(place: Workplace) -> int:
    """Local steps of all rounds, of the silo that takes most."""
    return place.plan.rounds * max(place.plan.steps_of(silo) for silo in place.silos.values())


def _tokens_a_step(s: Subject) -> float:
    silo = s.fullest
    mean = silo.splits["train"].inputs.bounds[-1] / max(1, silo.examples)
    steps = s.place.plan.privacy
    if steps is None or silo.units is None:
        return float(mean * s.place.plan.batch)
    rows = min(steps.rows, silo.examples / max(1, len(silo.units)))
    return float(mean * steps.rate * len(silo.units) * rows)


def _plain(s: Subject) -> LocalPlan:
    return replace(s.place.plan, privacy=None)


def _alone(s: Subject, silo: Silo, plan: LocalPlan, rounds: int) -> Params:
    """A silo trained by itself, round after round, as the run trains its silos; nothing of it is released."""
    params, memory = s.start, {}
    for round in range(rounds):
        task = Task(round, s.place.base.digest, params, (silo.name,), derive(s.seed, "audit", silo.name))
        (trained,) = train(s.bench, task, [silo], plan, [memory])
        params, memory = trained.params, trained.memory
    return params


def _with_units(silo: Silo, plan: LocalPlan, seed: int, units: Units | None = None) -> Silo:
    """The silo with its units, and every document that belongs to none of them a unit of its own."""
    if plan.privacy is None:
        return replace(silo, units=None)
    known = len(units.of) if units else 0
    held = len(units) if units else 0
    fresh, of = np.unique(silo.splits["train"].documents[known:], return_inverse=True)
    keys = [derive(seed, "audit", "unit", silo.name, int(document)) for document in fresh]
    before = (units.of, units.keys) if units else (np.zeros(0, np.int64), np.zeros(0, np.uint64))
    return replace(silo, units=Units(np.concatenate([before[0], of + held]).astype(np.int64),
                                     np.concatenate([before[1], np.array(keys, np.uint64)])))  # fmt: skip


# ---- inversion ----


def _inversion(s: Subject) -> dict[str, Any] | None:
    """In float32 even where the run was in bf16, whose rounding stops this attack and is no defence to rely on."""
    if s.bench.objective.task != "causal-lm":
        return None
    bench = Bench(s.place.base, s.bench.objective, precision="fp32")
    data = _rows(s)
    kind = s.place.treaty.adapter
    sent = f"LoRA, rank {kind.rank}" if kind.kind == "lora" else "full gradient"
    clip = (s.plan.terms.max_norm if s.plan else None) or 1.0
    noisy = Defence(clip=clip, noise=s.plan.multiplier if s.plan else 1.0)
    tried_out = (Defence(), Defence(clip=clip), noisy, Defence(bits=8), Defence(keep=0.1))
    common = {"sent_is": sent, "defences": tried_out}
    table = inversion.survey(bench, s.released, data, batches=(1, 2, 4), kinds=("span", "span bag"), **common)
    if (summed := min(len(data), len(s.place.silos))) > 1:
        told = inversion.attack(bench, s.released, data, [0], others=range(1, summed))
        table.append(told.row() | {"sent": sent, "defence": f"sum of {summed} silos"})
    shown = inversion.examples(bench, s.start, sent_is=sent, defences=(Defence(), noisy))
    return {"model": s.place.base.name, "sentence": inversion.SENTENCE, "tokens": ROW, "rows": table,
            "examples": shown}  # fmt: skip


def _rows(s: Subject) -> Encoded:
    """The beginnings of four training documents, of each silo in turn."""
    trains = [silo.splits["train"] for silo in s.place.silos.values()]
    turns = [(trains[i % len(trains)], i // len(trains)) for i in range(4)]
    some = concat([_only(data, _firsts(data)[turn][None]) for data, turn in turns if turn < len(_firsts(data))])
    return replace(some, inputs=Ragged.of([some.inputs[i][:ROW] for i in range(len(some))]))


def _firsts(data: Encoded) -> np.ndarray:
    """The first row of every document."""
    return np.unique(data.documents, return_index=True)[1]


def _only(data: Encoded, rows: np.ndarray) -> Encoded:
    arrays = {name: getattr(data, name)[rows] for name in ("first", "targets", "bytes", "documents")}
    inputs, answers = (Ragged.of([x[row] for row in rows]) for x in (data.inputs, data.answers))
    return replace(data, inputs=inputs, answers=answers, domains=tuple(data.domains[row] for row in rows), **arrays)


# ---- extraction, reconstruction ----


def _extraction(s: Subject) -> list[dict[str, Any]]:
    """The released model prompted with the beginnings of documents; held-out ones are the control. No text is kept."""
    if s.bench.objective.task != "causal-lm":
        return []
    tokens = sum(2 * SUFFIX + PREFIX + i for i in range(SUFFIX))
    count = max(4, min(DOCUMENTS, int(PROMPTING / s.parameters / tokens)))
    kinds = {"training documents": s.split("train"), "held-out documents (control)": s.split("validation", "test")}
    drawn = {kind: sample(data, count, seed=s.seed) for kind, data in kinds.items() if len(data)}
    said = [extract(s.bench, s.released, data, kind, prefix=2 * PREFIX, suffix=SUFFIX) for kind, data in drawn.items()]
    return [extraction_record(x) for x in said if x.tried]


def _reconstruction(s: Subject) -> dict[str, Any] | None:
    if s.plan is None or s.stated.get("epsilon") is None:
        return None
    event = s.plan.event()
    return {
        "form": "the highest chance of a right guess at one unit, for anybody who would guess right with the chance"
        " before it without this run; from the whole privacy profile",
        "source": "Hayes et al. 2023 (arXiv 2302.07225)",
        "bounds": [{"prior": prior, "bound": accountant.reconstruction_bound(event, prior)} for prior in PRIORS],
    }


SECTIONS: dict[str, tuple[str, Callable[[Subject], Any]]] = {
    "checks": ("Checking the mechanism", _checks),
    "membership": ("Telling members from others", _membership),
    "canaries": ("Looking for canaries", _canaries),
    "inversion": ("Inverting gradients", _inversion),
    "extraction": ("Prompting for training text", _extraction),
    "reconstruction": ("Bounding reconstruction", _reconstruction),
}
