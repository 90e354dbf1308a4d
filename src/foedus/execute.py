"""A treaty carried out: baselines, rounds, checkpoints, ledger, adapter, summary and report, into one run's folder.

`execute` is a generator of events, so a progress bar is a `for` loop. It may be killed at any moment; called again on
the same folder it goes on from the last checkpoint, and ends in the same adapter, bit for bit.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from . import gather, loop, methods, report, wire
from .assets import CATALOG
from .attention import effective, shares
from .build import Workplace, adapter, federation
from .data import holdings
from .engines import Engine
from .errors import RunError
from .evaluation import TOGETHER, figures
from .gather import EncryptedSums, Masked
from .governance import TRAY, Accounted, Journal, KeptMechanism, Ledger, Openings, RunFolder, SiloCustody, Tray
from .governance.machine import hardware, versions
from .governance.vault import Vault
from .lm.adapters import save_adapter
from .loop import Federation
from .privacy.plan import facts
from .secure.keys import Identity
from .server import Full, Sgd
from .silo import LocalPlan, Silo, pool
from .silo.handler import Custody
from .stages.words import SCALED
from .treaty import Treaty, parse, privacy
from .types import Receipt, Release, State, Task, Tree

FEDERATED, POOLED, LOCAL, BASE = "federated", "pooled", "local_only", "base"
SILOS = "silos"
"""The folder of the silos' own folders, in a run whose silos are processes (`launch.py`)."""
KEEP_TRAYS = "FOEDUS_KEEP_TRAYS"
"""Set in the environment of a demonstration that adds up, afterwards, what each silo gave before any mask."""


@dataclass(frozen=True)
class Event:
    """Something that happened. `kind`: "silo" (that called `phase`, `round` of `rounds`, is ready), "waiting" (for what
    `phase` says), "begin" (a phase), "round", "evaluation", or "done"; `row`: its metrics.
    """

    kind: str
    phase: str = ""
    round: int = 0
    rounds: int = 0
    row: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Session:
    """What every phase of a run needs. `rules`, `engine`: of the federation itself."""

    treaty: Treaty
    folder: RunFolder
    ledger: Ledger
    place: Workplace
    rules: Federation
    engine: Engine


@dataclass(frozen=True)
class Phase:
    """One trajectory of training: the federation itself, everybody's data pooled, or one silo alone."""

    name: str
    federation: Federation
    engine: Engine
    evaluate_every: int | None = None


def begin(treaty: Treaty, path: Path, vault: Vault | None = None) -> RunFolder:
    """A new run's folder for a treaty. `vault`: seals its checkpoints."""
    return RunFolder.create(path, treaty.resolved(), treaty.folder, vault)


def treaty_of(folder: RunFolder) -> Treaty:
    """The treaty that a run's folder was made for."""
    file = folder.path / "treaty.toml"
    return dataclasses.replace(parse(file.read_text(), where=str(file)), folder=folder.origin)


def execute(
    folder: RunFolder,
    place: Workplace,
    *,
    round: int | None = None,
    engine: Engine | None = None,
    keeper: Identity | None = None,
) -> Iterator[Event]:
    """Carries out the treaty of `place` in `folder`, from the last checkpoint (or that of `round`). `engine`: what
    reaches the silos; left out, they are all in this process. `keeper`: who signs the run's ledger, if anybody.
    """
    treaty = place.treaty
    with folder.lock():
        session = open_session(folder, place, engine, keeper)
        folder.keep_metrics(folder.metrics())  # without a line that a crash tore
        _open_ledger(session)
        yield from _base(session)
        federated = Phase(FEDERATED, session.rules, session.engine, treaty.evaluation.every)
        yield from _train(session, federated, round)
        sha256 = _save_adapter(session)
        for phase in _baselines(session):
            yield from _train(session, phase, None)
        summary = summarise(session, sha256)
        folder.write_json("summary.json", summary)
        card = report.model_card(summary, treaty.resolved())
        folder.write("adapter/README.md", card.encode())
        body = {"adapter": sha256, "rounds": treaty.algorithm.rounds}
        session.ledger.once("closed", body, same=("adapter",))
        _empty_trays(session)
        report.write_report(folder.path)
        yield Event("done", row=summary)


# Phases


def open_session(
    folder: RunFolder, place: Workplace, engine: Engine | None = None, keeper: Identity | None = None
) -> Session:
    """The run of a treaty in `folder`. `engine`: what carries the federation's asks; left out, this process."""
    ledger = Ledger(folder.path / "ledger.jsonl", keeper, f"run of {place.treaty.digest()[:12]}")
    rules = place.federation
    if place.privacy is not None and not place.privacy.at_silos:
        kept = KeptMechanism(rules.mechanism, ledger, folder.path / "release.safetensors", folder.vault)
        rules = replace(rules, mechanism=kept)
    if isinstance(rules.gather, (Masked, EncryptedSums)):
        rules = replace(rules, gather=replace(rules.gather, openings=Openings(ledger)))
    if engine is None:
        _all_here(folder, place)
        engine = place.engine(custody=custody(folder, place))
    if place.privacy is not None and place.privacy.at_silos:
        engine = Accounted(engine, ledger, place.privacy.events)
    return Session(place.treaty, folder, ledger, place, rules, engine)


def _all_here(folder: RunFolder, place: Workplace) -> None:
    """What silos gave and spent in processes of their own, they do not know in this one."""
    if not place.whole:
        away = [name for name in place.federation.silos if name not in place.silos]
        do = "Run it with `--engine flower`, where silos bring their own; or pass data={name: examples} in Python."
        raise RunError("the data of all silos in this process", f"none of {', '.join(away)}", do)
    if (folder.path / SILOS).exists():
        raise RunError(
            "a run whose silos live in this process",
            "one that began with a process for each",
            "Resume it with `foedus resume`, which starts them.",
            where=str(folder.path),
        )


def custody(folder: RunFolder, place: Workplace, budgets: Path | None = None) -> Custody | None:
    """What the silos of this process keep of what they gave, sealed where the folder has a vault; None where a round
    may be given twice. `budgets`: where theirs lie, if not where those of a simulation do; noise that the server adds
    is then in them too, since a silo elsewhere has no other record of it.
    """
    plan, tray = place.privacy, folder.path / TRAY
    every = KEEP_TRAYS in os.environ
    if place.sums is not None:
        place.sums.membership.journal = Journal(folder.path / "journals")
    if plan is not None and (plan.at_silos or budgets is not None):
        kept = SiloCustody(
            budgets=budgets or budgets_of(folder), tray=tray, treaty=place.treaty.digest(), unit=plan.terms.unit,
            events=plan.events, whole=plan.event(), every=every, vault=folder.vault,
        )  # fmt: skip
        kept.reserve(list(place.silos))
        return kept
    return Tray(tray, every, folder.vault) if place.sums is not None else None


def _empty_trays(s: Session) -> None:
    """Updates from before the masks are kept no longer than a round might have to be given again."""
    if s.place.sums is not None and KEEP_TRAYS not in os.environ:
        for tray in (s.folder.path / TRAY, *s.folder.path.glob(f"{SILOS}/*/{TRAY}")):
            shutil.rmtree(tray, ignore_errors=True)


def budgets_of(folder: RunFolder) -> Path:
    """Where silos keep their budgets: a folder of their own that outlives runs, or, in a simulation, the run's."""
    return Path(os.environ.get("FOEDUS_BUDGETS") or folder.path / "budgets")


def _baselines(s: Session) -> Iterator[Phase]:
    """Ordinary training with the same steps on the same tokens, by one optimizer that keeps its state; protects
    nobody.
    """
    wished = s.treaty.evaluation.baselines
    if "pooled" in wished:
        together = pool(POOLED, list(s.place.silos.values()))
        yield _ordinary(s, POOLED, together, s.treaty.evaluation.every)
    if "local" in wished:
        for silo in s.place.silos.values():
            yield _ordinary(s, f"local:{silo.name}", silo, None)


def _ordinary(s: Session, name: str, silo: Silo, every: int | None) -> Phase:
    plan = replace(s.place.plan, keep=True, privacy=None)
    rules = replace(_open(s, plan), sampler=Full(), silos=(silo.name,), minimum=1)
    if plan.optimizer != "sgd":  # else it is the server's that makes more of a gradient than a step along it
        rules = replace(rules, server_optimizer=Sgd(1.0))
    return Phase(name, rules, s.place.engine({silo.name: silo}, plan, rules=rules), every)


def _open(s: Session, plan: LocalPlan) -> Federation:
    """Rules that hide and protect nothing."""
    return federation(s.treaty, s.place.federation.silos, s.place.base.digest, plan)


def _base(s: Session) -> Iterator[Event]:
    if "base" in s.treaty.evaluation.baselines:
        state = loop.start(s.place.federation, s.place.bench.start())
        yield from _evaluate(s, BASE, state, "validation")
        if s.place.final_split == "test":
            yield from _evaluate(s, BASE, state, "test")


def _train(s: Session, phase: Phase, round: int | None) -> Iterator[Event]:
    """All rounds of a phase that are still to do, and the evaluations that are due."""
    key = quote(phase.name, safe="")
    restored = s.folder.restore(key, round)
    last = restored[0] if restored else loop.start(phase.federation, s.place.bench.start())
    phase.engine.memory.update(restored[1] if restored else {})
    s.folder.keep_metrics(
        [row for row in s.folder.metrics() if row["phase"] != phase.name or row["round"] <= last.round]
    )
    yield Event("begin", phase.name, last.round, phase.federation.rounds)
    yield from _due(s, phase, last)
    began, kept = time.perf_counter(), 0.0
    for state, release in loop.run(phase.federation, phase.engine, last):
        row = _round_row(s, phase, state, release, time.perf_counter() - began, kept)
        s.folder.metric(row)
        if phase.name == FEDERATED:
            _record(s, state, release)
        kept = -time.perf_counter()
        s.folder.checkpoint(key, state, phase.engine.memory)
        kept += time.perf_counter()
        yield Event("round", phase.name, state.round, phase.federation.rounds, row)
        yield from _due(s, phase, state)
        began, last = time.perf_counter(), state
    yield from _final(s, phase, last)


def _due(s: Session, phase: Phase, state: State) -> Iterator[Event]:
    every = phase.evaluate_every
    if every and state.round and (state.round % every == 0 or state.round == phase.federation.rounds):
        yield from _evaluate(s, phase.name, state, "validation")


def _final(s: Session, phase: Phase, state: State) -> Iterator[Event]:
    split = s.place.final_split
    if split and phase.name.startswith("local:"):
        yield from _evaluate(s, phase.name, state, split, only=phase.federation.silos)
    elif split:
        yield from _evaluate(s, phase.name, state, split)


# Evaluation


def _evaluate(s: Session, phase: str, state: State, split: str, only: Sequence[str] | None = None) -> Iterator[Event]:
    """Asks the silos for their sums on a split, unless that has been done; silos without one are not asked."""
    done = any(row["kind"] == "evaluation" and (row["phase"], row["round"], row["split"]) == (phase, state.round, split)
               for row in s.folder.metrics())  # fmt: skip
    silos = tuple(name for name in s.place.holders(split) if name in (only or s.place.federation.silos))
    if done or not silos:
        return
    if _summed(s, phase):
        silos = s.place.federation.silos  # zeros from whoever holds none: who that is, and how many, no sum tells
    began = time.perf_counter()
    task = Task(state.round, s.place.base.digest, state.params, silos, s.treaty.seed)
    by_silo, receipts = _measured(s, phase, task, split)
    row = {
        "kind": "evaluation", "phase": phase, "round": state.round, "split": split,
        **figures(by_silo, labelled=s.place.labelled),
        "sums": {silo: _nest(tree) for silo, tree in by_silo.items()},
        "failures": {r.silo: r.failure for r in receipts if r.failure},
        "seconds": {"evaluate": time.perf_counter() - began},
    }  # fmt: skip
    s.folder.metric(row)
    yield Event("evaluation", phase, state.round, s.place.federation.rounds, row)


def _summed(s: Session, phase: str) -> bool:
    """Whether evaluation sums are seen of all silos together only."""
    return phase in (BASE, FEDERATED) and s.rules.gather is not None


def _measured(s: Session, phase: str, task: Task, split: str) -> tuple[dict[str, Tree], Sequence[Receipt]]:
    """The sums of each silo, or, where sums are secure, those of all silos together."""
    if _summed(s, phase):
        assert s.rules.gather is not None
        total, receipts = s.rules.gather.gather(s.engine, "evaluate", task, split=split)
        sums = s.place.measures.decode(total, task).tensors
        held = {domain for (measure, domain), x in sums.items() if measure == "targets" and x[0] > 0}
        return {TOGETHER: {key: x for key, x in sums.items() if key[1] in held}}, receipts
    engine = s.engine if phase in (BASE, FEDERATED) else s.place.engine(rules=_open(s, s.place.plan))
    answers = list(gather.ask(engine, "evaluate", task, split=split))
    sums = {r.silo: wire.unpack(r.payload)[0] for r in answers if not r.receipt.failure}
    return {silo: tree for silo, tree in sums.items() if tree}, [r.receipt for r in answers]


def _nest(tree) -> dict[str, dict[str, float]]:
    out: dict[str, dict[str, float]] = {}
    for (measure, domain), x in tree.items():
        out.setdefault(domain, {})[measure] = float(x[0])
    return out


def _flatten(nested: Mapping[str, Mapping[str, float]]):
    return {(measure, domain): [x] for domain, sums in nested.items() for measure, x in sums.items()}


# Records


def _open_ledger(s: Session) -> None:
    body = {"treaty": s.treaty.digest(), "model": s.place.base.digest, "silos": list(s.place.federation.silos)}
    if s.place.privacy is not None:
        body["privacy"] = facts(s.place.privacy)
    s.ledger.once("opened", body, same=("treaty",))


def _record(s: Session, state: State, release: Release) -> None:
    """The ledger's record of a round: who, which bytes, what was released, under which event."""
    body = {
        "round": state.round,
        "task": next((r.task for r in release.receipts if r.task), ""),
        "reports": {r.silo: {"payload": r.payload, "bytes": r.bytes_up} for r in release.receipts if not r.failure},
        "failures": {r.silo: r.failure for r in release.receipts if r.failure},
        "release": wire.digest(wire.pack(release.tensors, {})),
        "params": wire.digest(wire.pack({("params", name): x for name, x in state.params.items()}, {})),
        "event": dict(release.event),
    }
    if _hidden(s):  # who took part, and how many, is what sampling keeps secret
        body |= {"reports": {}, "failures": {}}
    masked = ("reports",) if s.place.sums is not None else ()  # the same words under the masks of a new session
    s.ledger.once("round", body, same=("round",), free=masked)


def _hidden(s: Session) -> bool:
    return s.place.privacy is not None and s.treaty.privacy.hide_cohort


def _round_row(s: Session, phase: Phase, state: State, release: Release, seconds: float, kept: float) -> dict[str, Any]:
    """A round's line of metrics. `seconds`: of the whole round; `kept`: of the checkpoint before it."""
    if _hidden(s):
        release = replace(release, receipts=())
    came = [r for r in release.receipts if not r.failure]
    losses, targets = release.tensors.get(("metric", "loss")), release.tensors.get(("metric", "targets"))
    train = min(seconds, sum(r.seconds for r in came))  # silos may train at the same time
    return {
        "kind": "round", "phase": phase.name, "round": state.round,
        "loss": float(losses[0] / targets[0]) if losses is not None and targets[0] else None,
        **_scaled(release),
        **_reports(state, came),
        "silos": {r.silo: {**r.disclosed, "bytes_up": r.bytes_up, "bytes_down": r.bytes_down, "seconds": r.seconds}
                  for r in came},
        "failures": {r.silo: r.failure for r in release.receipts if r.failure},
        "seconds": {"train": train, "federation": max(0.0, seconds - train), "checkpoint": kept},
    }  # fmt: skip


def _reports(state: State, came: Sequence[Receipt]) -> dict[str, dict[str, float]]:
    """What the algorithm reports of a round; where silos say what they weigh, each one's share of the mean, α, and how
    many silos with equal shares would be as even.
    """
    found = {"reported": {name: float(x[0]) for (part, name), x in state.extra.items() if part == "report"}}
    weights = {r.silo: r.disclosed["attention"] for r in came if "attention" in r.disclosed}
    if not weights:
        return found
    alpha = shares(np.array(list(weights.values())))
    found["reported"]["effective silos"] = effective(alpha)
    return {**found, "shares": dict(zip(weights, alpha.tolist(), strict=True))}


def _scaled(release: Release) -> dict[str, int]:
    """How many updates were larger than the treaty's range, where sums are secure."""
    return {"scaled": round(float(release.tensors[SCALED][0]))} if SCALED in release.tensors else {}


def _save_adapter(s: Session) -> str:
    state, _ = s.folder.restore(FEDERATED) or (loop.start(s.place.federation, s.place.bench.start()), {})
    return save_adapter(s.place.base, adapter(s.treaty), state.params, s.folder.path / "adapter", "")


def summarise(s: Session, sha256: str) -> dict[str, Any]:
    """summary.json: every figure a reader or a program may want of a finished run."""
    rows = s.folder.metrics()
    rounds = [row for row in rows if row["kind"] == "round" and row["phase"] == FEDERATED]
    treaty, place = s.treaty, s.place
    return {
        "name": treaty.name,
        "treaty": {"digest": treaty.digest(), "name": treaty.name},
        "rounds": treaty.algorithm.rounds,
        "silos": len(place.federation.silos),
        "seed": treaty.seed,
        "versions": versions(),
        "hardware": {**hardware(), "precision": place.bench.precision, "cohort_batch": place.together},
        "holdings": _holdings(place) if treaty.disclosure.holdings and place.whole else {},
        "bytes": {way: {silo: [row["silos"].get(silo, {}).get(f"bytes_{way}", 0) for row in rounds]
                        for silo in place.federation.silos} for way in ("up", "down")},
        "seconds": _seconds(rows, place.seconds),
        "privacy": privacy(treaty, facts(place.privacy) if place.privacy else None),
        "evaluation": _evaluation(s, rows),
        "algorithm": {"name": treaty.algorithm.name, "server_optimizer": treaty.server.optimizer,
                      "local_steps": treaty.local.steps, "local_epochs": treaty.local.epochs,
                      **methods.caveat(treaty), **_reported(rounds)},
        "adapter": {"sha256": sha256, "kind": treaty.adapter.kind,
                    "rank": treaty.adapter.rank if treaty.adapter.kind == "lora" else None,
                    "parameters": sum(x.size for x in place.bench.start().values())},
        "model": _model(place),
        "failures": [{"round": row["round"], "silo": silo, "why": why}
                     for row in rounds for silo, why in row["failures"].items()],
    }  # fmt: skip


def _reported(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the algorithm reports of each round ("reported") and, where silos say what they weigh, each one's share of
    the mean ("shares"): name → a number a round, None for a round without.
    """
    found = {}
    for kind in ("reported", "shares"):
        rows = [row.get(kind) or {} for row in rounds]
        names = sorted({name for row in rows for name in row})
        found |= {kind: {name: [row.get(name) for row in rows] for name in names}} if names else {}
    return found


def _model(place: Workplace) -> dict[str, Any]:
    facts = {"name": place.base.name, "digest": place.base.digest, "parameters": place.base.size}
    known = CATALOG.get(place.base.name)
    return {**facts, "hub": known.hub, "licence": known.licence.split()[0].lower()} if known else facts


def _holdings(place: Workplace) -> dict[str, Any]:
    """Who holds what: examples by split, tokens, domains and labels."""
    tokens = {name: sum(part.tokens for part in silo.splits.values()) for name, silo in place.silos.items()}
    return {name: {**held, "tokens": tokens[name]} for name, held in holdings(place.splits).items()}


def _evaluation(s: Session, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The last evaluation of every phase on the final split; `local_only` is each silo on its own data, added up."""
    split = s.place.final_split
    done = [row for row in rows if row["kind"] == "evaluation" and row["split"] == split]
    last = {row["phase"]: row for row in done}
    out = {phase: _figures_of(last[phase]) for phase in (BASE, POOLED, FEDERATED) if phase in last}
    alone = {
        name: sums for phase, row in last.items() if phase.startswith("local:") for name, sums in row["sums"].items()
    }
    if alone:
        by_silo = {silo: _flatten(nested) for silo, nested in alone.items()}
        out[LOCAL] = figures(by_silo, labelled=s.place.labelled)
    return out


def _figures_of(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("perplexity", "bits_per_byte", "token_accuracy", "accuracy") if name in row}


def _seconds(rows: Sequence[Mapping[str, Any]], load: float) -> dict[str, float]:
    out = dict.fromkeys(("load", "train", "federation", "checkpoint", "evaluate", "pooled", "local_only"), 0.0)
    out["load"] = load
    for row in rows:
        phase = LOCAL if row["phase"].startswith("local:") else row["phase"]
        for name, seconds in row["seconds"].items():
            out[phase if name != "evaluate" and phase != FEDERATED else name] += seconds
    return {**out, "total": sum(out.values())}
