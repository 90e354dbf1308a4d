"""Releases: what a finished run gives a registry, and the conditions under which it may be put to use.

`read_run` believes no summary: the adapter must be the one that the run's ledger closes with, and ε no less than what
the ledger's events come to. Every check says what it expected and what came, and is kept with the promotion it was
made for. Read `registry.py` first.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from .. import wire
from ..errors import RunError
from ..privacy import accountant, events
from .ledger import Head, departs, head_of, keepers, verify
from .shelf import ADAPTER, LEDGER, digests

QUALITY = {"bits_per_byte": -1, "perplexity": -1, "accuracy": +1}
"""What versions are compared by, the first that both have: −1 where less is better, in which a share is allowed, +1
where more is better, in which a difference is."""


class Stage(StrEnum):
    """What a version is used for."""

    candidate = "candidate"
    production = "production"
    retired = "retired"


@dataclass(frozen=True)
class Version:
    """One released adapter and its lineage. `digest`: of its weights; `files`: SHA-256 of every file; `epsilon`: None
    where there is no guarantee; `event`: what its rounds cost, from the ledger; `parent`: the version that was in
    production when this one was registered; `head`: where the run's ledger stood; `begun`: the hash of its record of
    the first round, which no other run has; `place`: its folder in the store.
    """

    model: str
    version: int
    stage: Stage
    digest: str
    files: Mapping[str, str]
    place: str
    run: str
    begun: str
    rounds: int
    treaty: str
    base: str
    base_digest: str
    parent: int | None
    unit: str
    epsilon: float | None
    delta: float | None
    event: Mapping[str, Any]
    statement: str
    evaluation: Mapping[str, Any]
    head: str
    registered: str

    @property
    def name(self) -> str:
        """MODEL@VERSION."""
        return f"{self.model}@{self.version}"


@dataclass(frozen=True)
class Check:
    """One condition of a promotion and how it came out. `passed`: None where there was nothing to check it by."""

    name: str
    passed: bool | None
    expected: str
    came: str


@dataclass(frozen=True)
class Move:
    """A version's change of stage, or a refused one. `replaced`: the version that was in production until then."""

    number: int
    model: str
    version: int
    kind: str
    accepted: bool
    before: str
    after: str
    replaced: int | None
    by: str
    why: str
    at: str
    checks: tuple[Check, ...] = ()


@dataclass(frozen=True)
class Rules:
    """What a promotion asks. `worse`: the most that any silo or domain may lose against production, as a share of bits
    per byte or perplexity, or a difference in accuracy; `epsilon`: the most that all versions of the model together may
    have cost, at `delta`; None: no limit; `key`: of the ledger's keeper, in hexadecimal, if it must be signed.
    """

    worse: float = 0.02
    epsilon: float | None = None
    delta: float = 1e-5
    key: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.worse < 1 or not (self.epsilon is None or self.epsilon > 0) or not 0 < self.delta < 1:
            do = "For example --worse 0.02 --epsilon 8 --delta 1e-5."
            raise RunError("0 <= worse < 1, epsilon > 0, 0 < delta < 1", str(self), do)


# What a run's folder says


def read_run(run: Path, model: str) -> Version:
    """A candidate without a number yet."""
    try:
        summary = json.loads((run / "summary.json").read_bytes())
    except (OSError, ValueError) as error:
        do = "Finish it with `foedus resume`, and register it then."
        raise RunError(f"a run that has ended in {run}", "a folder without its summary.json", do) from error
    records = verify(run / LEDGER)
    opened, closed = (_last(records, kind) for kind in ("opened", "closed"))
    files = digests(run / ADAPTER)
    weights = {name: sha for name, sha in files.items() if name.endswith(".safetensors")}
    stated = summary["adapter"]["sha256"]
    if closed.get("adapter") != stated or stated not in weights.values():
        came = f"{closed.get('adapter', 'none')[:12]} there, {stated[:12]} in summary.json"
        raise RunError("the adapter that the run's ledger closes with", came, "Register the run as it ended.")
    if opened.get("treaty") != summary["treaty"]["digest"]:
        do = "Register the run as it ended."
        raise RunError("one treaty in summary and ledger", "two", do, where=str(run))
    privacy, event = summary["privacy"], _charged(records)
    epsilon = _epsilon(event, privacy["delta"])
    if privacy["epsilon"] is not None and (epsilon is None or epsilon > privacy["epsilon"] * (1 + 1e-6)):
        came = f"ε = {privacy['epsilon']:.4g}, and {epsilon or math.inf:.4g} in the ledger"
        do = "Find out who changed the summary: the ledger is chained, it is not."
        raise RunError("a summary that states what its ledger bears out", came, do, where=str(run))
    head = head_of(records)
    begun = next((record["hash"] for record in records if record["kind"] == "round"), "")
    return Version(
        model=fit(model or summary["name"]), version=0, stage=Stage.candidate,
        digest=wire.digest(wire.canonical(weights)), files=files,
        place=wire.digest(wire.canonical([files, str(head)]))[:16],
        run=run.resolve().name, begun=begun, rounds=summary["rounds"], treaty=summary["treaty"]["digest"],
        base=summary["model"]["name"], base_digest=summary["model"]["digest"], parent=None,
        unit=privacy["unit"], epsilon=privacy["epsilon"], delta=privacy["delta"], event=event,
        statement=privacy["statement"], evaluation=summary["evaluation"].get("federated", {}),
        head=str(head), registered=now(),
    )  # fmt: skip


def _charged(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The cost of the rounds that were begun, each once."""
    rounds = {r["body"]["round"]: r["body"]["event"] for r in records if r["kind"] in ("charge", "round")}
    counted: list[tuple[Mapping[str, Any], int]] = []
    for event in rounds.values():
        if counted and counted[-1][0] == event:
            counted[-1] = event, counted[-1][1] + 1
        else:
            counted.append((event, 1))
    return events.together(*(events.repeat(event, times) for event, times in counted))


def _epsilon(event: Mapping[str, Any], delta: float | None) -> float | None:
    epsilon = math.inf if delta is None else accountant.upper(event, delta)
    return epsilon if math.isfinite(epsilon) else None


def _last(records: Sequence[Mapping[str, Any]], kind: str) -> Mapping[str, Any]:
    return next((record["body"] for record in reversed(records) if record["kind"] == kind), {})


def fit(model: str) -> str:
    """A model's name, which is a link's too."""
    if not model or model.startswith(".") or not re.fullmatch(r"[\w .+-]{1,100}", model):
        do = "Use letters, digits, spaces, and . _ + -; give another with --model."
        raise RunError("a name of a model without / and @, of at most 100 characters", repr(model), do)
    return model


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# Checks


def check_content(version: Version, folder: Path) -> Check:
    """Whether a folder holds the files that were registered, byte for byte, and no others."""
    found = digests(folder)
    wrong = sorted(name for name in {*found, *version.files} if found.get(name) != version.files.get(name))
    weights = {name: sha for name, sha in found.items() if name.endswith(".safetensors")}
    whole = not wrong and wire.digest(wire.canonical(weights)) == version.digest
    came = f"other bytes in {', '.join(wrong)}" if wrong else "the same" if whole else "weights of another digest"
    return Check("content", whole, f"the bytes of {version.digest[:12]}…", came)


def check_ledger(version: Version, path: Path, key: str) -> Check:
    """Whether a run's ledger verifies, and is the one that was registered; signed by `key`, if one is asked for."""
    expected = "a ledger that verifies, and stands where it stood when this was registered"
    try:
        records = verify(path, key=key)
    except (OSError, RunError) as error:
        return Check("ledger", False, expected, str(error))
    why = departs(records, Head.parse(version.head)) or ("" if str(head_of(records)) == version.head else "it went on")
    signed = f"{len(records)} records, {'signed' if keepers(records) else 'not signed'}"
    return Check("ledger", not why, expected, why or signed)


def check_spending(known: Sequence[Version], rules: Rules) -> Check:
    """Every version that was ever registered counts, retired ones too: what they released cannot be taken back."""
    if rules.epsilon is None:
        return Check("epsilon", None, "no limit was given", "nothing to compare with")
    spent = spent_by_unit(known, rules.delta)
    came = ", ".join(f"ε = {epsilon:.3g} for each {unit}" for unit, epsilon in spent.items())
    expected = f"all versions together at most ε = {rules.epsilon:g} at δ = {rules.delta:g}"
    return Check("epsilon", all(epsilon <= rules.epsilon for epsilon in spent.values()), expected, came)


def spent_by_unit(known: Sequence[Version], delta: float) -> dict[str, float]:
    """Of versions that came of one run, at different rounds, the one that went furthest counts."""
    runs: dict[tuple[str, str], Version] = {}
    for version in sorted(known, key=lambda version: version.rounds):
        runs[version.unit, version.begun] = version
    units = sorted({unit for unit, _ in runs})
    costs = {unit: events.together(*(v.event for v in runs.values() if v.unit == unit)) for unit in units}
    return {unit: accountant.upper(cost, delta) for unit, cost in costs.items()}


def check_quality(version: Version, production: Version | None, worse: float) -> Iterator[Check]:
    """One check for silos and one for domains."""
    for kind, by in (("silos", "by_silo"), ("domains", "by_domain")):
        name = f"quality by {kind}"
        if production is None:
            yield Check(name, None, "nothing is in production", "nothing to compare with")
            continue
        measure = next((m for m in QUALITY if m in version.evaluation and m in production.evaluation), None)
        if measure is None:
            yield Check(name, False, f"a measure that {production.name} has too", "none of " + ", ".join(QUALITY))
        else:
            yield _compared(name, measure, version.evaluation[measure][by], production, by, worse)


def _compared(name: str, measure: str, now: Mapping, production: Version, by: str, worse: float) -> Check:
    before = production.evaluation[measure][by]
    losses = {one: _loss(measure, before[one], now.get(one)) for one in before}
    bad = sorted((one for one in losses if not losses[one] <= worse), key=lambda one: -losses[one])
    spoken = measure.replace("_", " ")
    expected = f"{spoken} of none of {len(before)} worse than {production.name} by more than {worse:g}"
    if bad:
        return Check(name, False, expected, ", ".join(f"{one}: {_said(losses[one])}" for one in bad[:5]))
    most = max(losses, key=lambda one: losses[one], default="")
    return Check(name, True, expected, f"{most}: {_said(losses[most])}" if most else "nobody was measured")


def _loss(measure: str, before: float | None, now: float | None) -> float:
    """How much worse: a share of what it was, or, where more is better, a difference. Infinite where unmeasured."""
    if before is None or now is None:
        return math.inf
    return before - now if QUALITY[measure] > 0 else (now - before) / before


def _said(loss: float) -> str:
    if math.isinf(loss):
        return "not measured"
    return f"worse by {loss:.3g}" if loss > 0 else f"better by {-loss:.3g}" if loss < 0 else "the same"
