"""Homes for the dashboard's tests, with the files that the real classes write. Figures are invented."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from foedus.governance import Budget, Cap, Ledger
from foedus.privacy import events
from foedus.privacy.noise import SystemSource
from foedus.privacy.plan import Terms, facts, make_plan

TREATY = """
[treaty]
name = "notes"
purpose = "A model for discharge letters."
[model]
base = "tiny:llama"
[data]
source = "memory"
[silos]
names = ["north", "south", "west"]
[algorithm]
rounds = 6
[local]
steps = 1
[cohort]
minimum = 2
[privacy]
unit = "example"
epsilon = 8.0
delta = 1e-5
rate = 0.05
[evaluation]
baselines = ["base"]
"""
SILOS = ("north", "south", "west")
TERMS = Terms("example", 1e-5, 6, noise_multiplier=0.8, rate=0.05, divisor=8.0)


def plan_facts() -> dict[str, Any]:
    return json.loads(json.dumps(facts(make_plan(TERMS, SystemSource()))))


def federation(home: Path, done: int = 4, *, ended: bool = False, **run: Any) -> Path:
    """A coordinator's home with one run of six rounds, of which `done` are there."""
    home.mkdir(parents=True)
    (home / "federation.toml").write_text('name = "clinics"\naddress = "127.0.0.1:9443"\n')
    silos = {name: {"connected": name != "west", "since": None} for name in SILOS}
    write_json(home / "status.json", {"role": "coordinator", "superlink": {"alive": True}, "silos": silos, "run": None})
    for name in SILOS:
        write_json(home / "members" / f"{name}.json", {"name": name, "revoked": False})
    write_run(home / "runs" / "notes", done, ended=ended, **run)
    return home


def write_run(
    folder: Path,
    done: int,
    *,
    ended: bool = False,
    failures: Mapping[int, Mapping[str, str]] | None = None,
    redone: Sequence[int] = (),
    loss: Sequence[float] = (),
    perplexity: Sequence[float] = (),
    slow: str = "",
) -> None:
    folder.mkdir(parents=True)
    (folder / "treaty.toml").write_text(TREATY)
    known, failures = plan_facts(), failures or {}
    ledger = Ledger(folder / "ledger.jsonl")
    ledger.append("opened", {"treaty": "ab" * 32, "silos": list(SILOS), "privacy": known})
    rows = [evaluation("base", 0, 100.0)]
    for number in range(1, done + 1):
        lost = failures.get(number, {})
        event = events.poisson(0.05, events.gaussian(0.8))
        ledger.append("round", {"round": number, "event": event, "failures": dict(lost), "release": "cd" * 32})
        if number in redone:
            ledger.append("round", {"round": number, "event": event, "redone": True})
        rows.append(round_row(number, lost, loss[number - 1] if loss else None, slow))
        if perplexity:
            rows.append(evaluation("federated", number, perplexity[number - 1]))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if ended:
        write_json(folder / "summary.json", {"name": "notes", "rounds": 6})


def round_row(number: int, lost: Mapping[str, str], loss: float | None, slow: str) -> dict[str, Any]:
    came = {s: {"bytes_up": 1000, "bytes_down": 2000, "seconds": 60.0 if s == slow else 2.0}
            for s in SILOS if s not in lost}  # fmt: skip
    seconds = {"train": 6.0, "federation": 1.0, "checkpoint": 0.0}
    return {"kind": "round", "phase": "federated", "round": number, "loss": loss, "silos": came,
            "failures": dict(lost), "seconds": seconds}  # fmt: skip


def evaluation(phase: str, number: int, micro: float) -> dict[str, Any]:
    found = {"micro": micro, "macro": micro, "by_silo": {"north": 777.125, "south": micro},
             "by_domain": {"wards": micro * 0.9, "surgery": micro * 1.1}}  # fmt: skip
    return {"kind": "evaluation", "phase": phase, "round": number, "split": "validation", "perplexity": found,
            "failures": {}, "seconds": {}}  # fmt: skip


CHARTER = """
[charter]
expires = {expires}
[models]
"tiny:llama" = "any"
[adapters]
kinds = ["lora"]
max_rank = 16
[training]
tasks = ["causal-lm"]
algorithms = ["fedavg"]
max_rounds = 100
max_steps = 200
[data]
columns = ["text"]
[privacy]
unit = "example"
epsilon = 8.0
epsilon_for_life = 16.0
delta = 1e-5
placements = ["silo", "shared"]
[secure]
sums = ["masked"]
others = 2
[limits]
max_bytes = 1_000_000
"""


def silo(home: Path, *, state: Mapping[str, Any] | None = None, expires: date = date(2099, 1, 1)) -> Path:
    """A silo's home: one treaty of six rounds, four of them given and charged, and two kinds of refusals."""
    home.mkdir(parents=True)
    (home / "silo.toml").write_text('name = "north"\n')
    (home / "charter.toml").write_text(CHARTER.format(expires=expires))
    write_json(home / "state.json", {"paused": False, "left": False, "withdrawn": [], **(state or {})})
    write_json(home / "status.json", {"role": "silo", "coordinator": "hub:9443", "connected": True, "keys": "vault"})
    digest, tables = signed_tables()
    lines = {name: {"key": "00" * 32, "signature": "11" * 64} for name in SILOS}
    value = {"format": 1, "digest": digest, "treaty": tables, "coordinator": {"key": "22" * 32}, "silos": lines}
    write_json(home / "treaties" / digest[:12] / "notes.treaty.json", value)
    ledger, budget = Ledger(home / "ledger.jsonl"), Budget(home / "budgets", "north")
    budget.allow(Cap(10.0, 1e-5))
    event = events.poisson(0.05, events.gaussian(0.8))
    budget.reserve(digest, "example", events.repeat(event, 6))
    for number in range(1, 5):
        budget.charge(digest, "example", number, event)
        ledger.append("answered", {"treaty": digest, "ask": "train", "round": number, "payload": f"{number:064x}",
                                   "bytes_up": 1000, "failure": ""})  # fmt: skip
    clause = "[adapters] max_rank allows at most 16 rank; asked: 64"
    ledger.append("refused", {"reason": "charter", "ask": "train", "clauses": [clause], "count": 1})
    for count in (1, 2, 4):
        ledger.append("refused", {"reason": "replayed", "ask": "train", "count": count})
    return home


def signed_tables() -> tuple[str, dict[str, Any]]:
    from foedus.treaty import parse

    treaty = parse(TREATY)
    return treaty.digest(), {name: table for name, table in treaty.tables().items() if name != "performance"}


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
