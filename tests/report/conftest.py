"""A run's folder for the tests of the report. TEST FIXTURE: every figure in it is invented; no model was trained."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from foedus.privacy.noise import SimulatedSource, SystemSource
from foedus.privacy.plan import PrivacyPlan, Terms, facts, make_plan
from foedus.privacy.statement import statement

NOT_REAL = "TEST FIXTURE with invented figures: no model was trained for this page."
GROUPS = (
    "comp.graphics", "rec.autos", "sci.med", "soc.religion.christian", "talk.politics.mideast", "rec.sport.hockey",
    "sci.space", "misc.forsale", "sci.crypt", "alt.atheism", "comp.windows.x", "talk.politics.guns",
)  # fmt: skip
STATEMENT = (
    "This run gives no privacy guarantee. Silos sent their updates unprotected, and whoever sees an update can learn "
    "from it: which words and topics a silo's text holds, whether a given document was in it, and sometimes passages "
    "of it word for word. Use it only where the server, and everybody who can read its messages, may see the text."
)
TREATY = f"""[treaty]
name = "newsgroups-fixture"
purpose = "{NOT_REAL}"
format = 1
seed = 7

[model]
base = "smollm2-135m-instruct"
task = "causal-lm"
max_length = 128

[adapter]
kind = "lora"
rank = 8

[data]
source = "20newsgroups"

[silos]
by = "domain"

[algorithm]
name = "fedavg"
rounds = 8

[local]
steps = 10
batch = 8
optimizer = "adamw"

[disclosure]
loss = true
holdings = true
"""
ROUNDS = 4
EXAMPLE = Terms("example", 1e-5, ROUNDS, noise_multiplier=1.0, steps=10, rate=0.1, divisor=8.0)
UNCOVERED = ["the final evaluation sums on held-out examples", "how long a silo took, and that it failed"]
HIDING = TREATY.replace("loss = true\nholdings = true", "loss = false\nholdings = false")
Change = Callable[[dict[str, Any]], None]
Values = dict[str, Any] | None


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """`make_run(silos=5, rounds=8, …)` writes a folder and returns it; see `write_run`."""

    def make(**how: Any) -> Path:
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        write_run(folder, **how)
        return folder

    return make


def planned(terms: Terms, simulated: bool = False) -> PrivacyPlan:
    return make_plan(terms, SimulatedSource(1) if simulated else SystemSource())


@pytest.fixture
def private(make_run) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """`private(terms, simulated, …)` → (a run's folder, what its summary records as `privacy`)."""

    def make(terms: Terms = EXAMPLE, simulated: bool = False, rounds: int = ROUNDS, **how: Any):
        plan = planned(terms, simulated)
        known = json.loads(json.dumps(facts(plan)))
        words = " ".join(statement(known, known["epsilon"]))
        recorded = {**known, "statement": words, "not_covered": UNCOVERED}
        how = {"silos": 3, "alone": False, "treaty": HIDING, **how}
        events = plan.events[:rounds]
        change = lambda summary: summary.update(privacy=recorded, holdings={})  # noqa: E731
        return make_run(rounds=rounds, change=change, privacy=known, events=events, **how), recorded

    return make


def write_run(
    folder: Path,
    *,
    names: Sequence[str] = (),
    silos: int = 5,
    rounds: int = 8,
    mixed: bool = False,
    alone: bool = True,
    labels: bool = False,
    ended: bool = True,
    failures: Sequence[tuple[int, str, str]] = (),
    treaty: str = TREATY,
    change: Change | None = None,
    privacy: Values = None,
    events: Sequence[Any] = (),
) -> dict[str, Any]:
    """Writes a run's folder with invented figures, and returns its summary.

    `mixed`: silos hold several domains; `alone`: with local and pooled baselines; `labels`: with accuracy.
    `ended=False`: no summary, and a last line cut off. `change`: edits the summary before it is written. `privacy` and
    `events`: what the ledger says of a plan.
    """
    folder.mkdir(parents=True)
    chance = random.Random(1)
    names = tuple(names) or tuple(GROUPS[i] if i < len(GROUPS) else f"silo-{i + 1:03d}" for i in range(silos))
    world = _World(names, rounds, mixed, alone, labels, tuple(failures), chance)
    summary = world.summary()
    if change:
        change(summary)
    metrics = world.metrics(ended)
    (folder / "treaty.toml").write_text(treaty, encoding="utf-8")
    (folder / "metrics.jsonl").write_bytes(b"".join(_canonical(row) + b"\n" for row in metrics))
    (folder / "ledger.jsonl").write_bytes(
        b"".join(_canonical(row) + b"\n" for row in chain(rounds, ended, privacy, events))
    )
    if ended:
        (folder / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False), encoding="utf-8")
    else:
        with (folder / "metrics.jsonl").open("ab") as file:
            file.write(_canonical(metrics[-1])[:40])
    return summary


def chain(rounds: int, closed: bool, privacy: Values = None, events: Sequence[Any] = ()) -> list[dict[str, Any]]:
    """A ledger whose hashes are right: opened, a record a round, and closed. `privacy`: the facts of a plan, with the
    `events` of its rounds."""
    opened = {"treaty": "ab" * 32} | ({"privacy": privacy} if privacy else {})
    costs = [{"event": event} for event in events] or [{}] * rounds
    bodies = [("opened", opened)] + [("round", {"round": i + 1} | costs[i]) for i in range(rounds)]
    records: list[dict[str, Any]] = []
    for index, (kind, body) in enumerate([*bodies, *([("closed", {"rounds": rounds})] if closed else [])]):
        previous = records[-1]["hash"] if records else "0" * 64
        record: dict[str, Any] = {"index": index, "previous": previous, "kind": kind, "body": body}
        records.append(record | {"hash": hashlib.sha256(_canonical(record)).hexdigest()})
    return records


class _World:
    def __init__(self, names, rounds, mixed, alone, labels, failures, chance) -> None:
        self.names, self.rounds, self.alone, self.labels, self.failures = names, rounds, alone, labels, failures
        kinds = list(names if not mixed else GROUPS[:8])
        self.held = {
            name: {kind: int(chance.gammavariate(0.5, 300)) + 1 for kind in kinds if chance.random() < 0.6}
            or {kinds[0]: 40}
            if mixed
            else {name: chance.randrange(420, 980)}
            for name in names
        }
        self.kinds = sorted({kind for held in self.held.values() for kind in held})
        self.start = {kind: chance.uniform(48, 92) for kind in self.kinds}
        self.gain = {kind: chance.uniform(0.24, 0.41) for kind in self.kinds}
        self.offset = {name: chance.uniform(-0.2, 0.2) for name in names}
        self.tilt = {name: chance.uniform(0.96, 1.04) for name in names}

    def evaluation(self, factor: float) -> dict[str, Any]:
        """`factor`: how much of the possible gain was reached; 0 for the base model."""
        by_domain = {kind: self.start[kind] * (1 - self.gain[kind] * factor) for kind in self.kinds}
        by_silo = {}
        for name, held in self.held.items():
            weight = sum(held.values())
            nll = sum(count * math.log(by_domain[kind]) for kind, count in held.items()) / weight
            by_silo[name] = math.exp(nll) * (self.tilt[name] if len(self.kinds) != len(self.names) else 1)
        perplexity = self._means(by_domain, by_silo)
        out = {
            "perplexity": perplexity,
            "bits_per_byte": _over(perplexity, lambda x: math.log2(x) / 4.6),
            "token_accuracy": _over(perplexity, lambda x: 0.62 - 0.075 * math.log(x)),
        }
        return out | ({"accuracy": _over(perplexity, lambda x: 1.32 - 0.17 * math.log(x))} if self.labels else {})

    def _means(self, by_domain, by_silo) -> dict[str, Any]:
        micro = math.exp(sum(map(math.log, by_domain.values())) / len(by_domain))
        return {
            "micro": micro, "macro": sum(by_silo.values()) / len(by_silo), "by_domain": by_domain, "by_silo": by_silo,
        }  # fmt: skip

    def summary(self) -> dict[str, Any]:
        train = {name: int(sum(held.values()) * 0.8) for name, held in self.held.items()}
        up = {name: [9_766_312 + 3 * i for i in range(self.rounds)] for name in self.names}
        down = {name: [9_765_912 for _ in range(self.rounds)] for name in self.names}
        seconds = {"load": 2.4, "train": 131.8, "federation": 0.61, "evaluate": 21.3, "checkpoint": 1.9}
        if self.alone:
            seconds |= {"local_only": 128.7, "pooled": 126.2}
        evaluation = {"base": self.evaluation(0.0)}
        if self.alone:
            evaluation |= {"local_only": self.evaluation(0.62), "pooled": self.evaluation(1.0)}
        return {
            "name": "newsgroups-fixture",
            "treaty": {"digest": "5c" * 32, "name": "newsgroups-fixture"},
            "rounds": self.rounds,
            "silos": len(self.names),
            "seed": 7,
            "versions": {"foedus": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2", },
            "hardware": {"cpu": "a processor of no machine", "cores": 2, "memory_gib": 15.6, "precision": "bf16"},
            "holdings": {
                name: {
                    "train": train[name],
                    "validation": int(sum(held.values()) * 0.1),
                    "test": sum(held.values()) - train[name] - int(sum(held.values()) * 0.1),
                    "tokens": sum(held.values()) * 113,
                    "domains": held,
                }
                | ({"labels": {"yes": train[name] // 3, "no": train[name]}} if self.labels else {})
                for name, held in self.held.items()
            },
            "bytes": {"up": up, "down": down},
            "seconds": seconds | {"total": sum(seconds.values()) + 4.2},
            "privacy": {"unit": "none", "epsilon": None, "delta": None, "statement": STATEMENT},
            "evaluation": evaluation | {"federated": self.evaluation(0.955)},
            "adapter": {"sha256": "e1" * 32, "parameters": 2_442_240, "kind": "lora", "rank": 8},
            "model": {"name": "smollm2-135m-instruct", "digest": "9f" * 32, "parameters": 134_515_008},
            "algorithm": {"name": "fedavg"},
            "failures": [{"round": at, "silo": silo, "why": why} for at, silo, why in self.failures],
        }  # fmt: skip

    def metrics(self, ended: bool) -> list[dict[str, Any]]:
        rows = [
            self._evaluation("base", 0, self.evaluation(0.0)),
            self._evaluation("federated", 0, self.evaluation(0.0)),
        ]
        for at in range(1, self.rounds + 1):
            reached = 1 - math.exp(-at / self.rounds * 3)
            rows += [self._round("federated", at, reached), self._evaluation("federated", at, self.evaluation(reached))]
            if self.alone:
                rows += [self._round(f"local:{name}", at, reached * 1.05, only=name) for name in self.names]
                rows += [self._evaluation("pooled", at, self.evaluation(min(1.0, reached * 1.04)))]
        final = self._evaluation("federated", self.rounds, self.evaluation(0.955), "test")
        return [*rows, final] if ended else rows

    def _evaluation(self, phase: str, at: int, figures: dict[str, Any], split: str = "validation") -> dict[str, Any]:
        return {
            "kind": "evaluation",
            "phase": phase,
            "round": at,
            "split": split,
            "seconds": {"evaluate": 0.9},
            **figures,
        }

    def _round(self, phase: str, at: int, reached: float, only: str = "") -> dict[str, Any]:
        failed = {silo: why for when, silo, why in self.failures if when == at} if not only else {}
        there = [name for name in ([only] if only else self.names) if name not in failed]
        silos = {
            name: {
                "loss": 4.0 + self.offset[name] - 0.45 * reached + 0.03 * math.sin(7 * at + self.offset[name] * 40),
                "bytes_up": 9_766_312, "bytes_down": 9_765_912, "seconds": 3.2,
            }
            for name in there
        }  # fmt: skip
        loss = sum(facts["loss"] for facts in silos.values()) / max(1, len(silos))
        return {
            "kind": "round", "phase": phase, "round": at, "loss": loss, "silos": silos, "failures": failed,
            "seconds": {"train": 16.4, "federation": 0.07},
        }  # fmt: skip


def _over(means: dict[str, Any], measure: Callable[[float], float]) -> dict[str, Any]:
    return {
        key: {name: measure(x) for name, x in value.items()} if isinstance(value, dict) else measure(value)
        for key, value in means.items()
    }


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
