"""A coordinator and silos in one process, with homes on disk: what the tests of deployment stand on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np

from foedus import wire
from foedus.deploy.forms import Like, ReportForm, TaskForm
from foedus.deploy.guard import Guard, Work
from foedus.deploy.seal import Seal
from foedus.engines.base import Ask
from foedus.governance import Ledger, consent
from foedus.secure.keys import Identity
from foedus.treaty import Treaty, charter, parse, signed
from foedus.treaty.signed import Signed
from foedus.types import Receipt, Report, Task, Tree

SILOS = ("north", "south", "west")
NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)

TREATY = """
[treaty]
name = "tiny"
seed = 1
[model]
base = "tiny:llama"
max_length = 24
[adapter]
rank = 4
[data]
source = "memory"
[silos]
names = ["north", "south", "west"]
[algorithm]
rounds = 5
[local]
steps = 2
[disclosure]
loss = true
holdings = false
[evaluation]
every = 2
"""

CHARTER = """
[models]
"tiny:llama" = "any"
[adapters]
kinds = ["lora"]
max_rank = 8
[training]
tasks = ["causal-lm"]
algorithms = ["fedavg", "fedprox", "scaffold", "alignment", "reversal", "udalm", "knn-adapter", "fedlap", "alone"]
max_rounds = 10
max_steps = 5
[data]
columns = ["text", "domain"]
sources = ["public.csv"]
[privacy]
unit = "none"
epsilon = 8.0
epsilon_for_life = 10.0
delta = 1e-5
[secure]
sums = ["open", "masked", "encrypted"]
others = 0
[disclosure]
loss = true
holdings = true
attention = true
[evaluation]
splits = ["validation", "test"]
baselines = ["base"]
[limits]
max_bytes = 1_000_000
"""
SIMULATED = """epsilon = 1e6
epsilon_for_life = 1e6
placements = ["silo", "server", "shared"]
simulated_noise = true
"""
NOISY = CHARTER.replace("epsilon = 8.0\nepsilon_for_life = 10.0\n", SIMULATED)
"""The charter of whoever takes part in noise that protects nobody, since its seed is known."""

MODEL = "ab" * 32
START = {"a": np.zeros((2, 3), np.float32), "b": np.ones(4, np.float32)}
TASK_FORM = TaskForm(MODEL, {name: Like.exactly(x) for name, x in START.items()}, {}, {}, frozenset())
REPORT_FORM = ReportForm(
    {("delta", name): Like.kin(x) for name, x in START.items()}, None, ("",), frozenset({"loss"})
)  # fmt: skip


@dataclass(frozen=True)
class Home:
    """The places of a silo."""

    path: Path

    charter = property(lambda self: self.path / "charter.toml")
    state = property(lambda self: self.path / "state.json")
    treaties = property(lambda self: self.path / "treaties")
    budgets = property(lambda self: self.path / "budgets")
    ledger = property(lambda self: self.path / "ledger.jsonl")

    def work(self, digest: str) -> Path:
        return self.path / "work" / digest[:12]

    def content(self) -> dict[str, bytes]:
        """Every file but the ledger: what a refused message must leave alone."""
        files = (path for path in self.path.rglob("*") if path.is_file() and path != self.ledger)
        return {str(path.relative_to(self.path)): path.read_bytes() for path in files}


@dataclass
class Adder:
    """An engine of one silo that adds the round's number to the parameters, and counts what it was asked."""

    silo: str
    memory: dict[str, Tree] = field(default_factory=dict)
    asked: list[Ask] = field(default_factory=list)
    change: Mapping[tuple[str, str], np.ndarray] = field(default_factory=dict)

    def ask(self, asks: Sequence[Ask]) -> Iterator[Report]:
        for ask in asks:
            self.asked.append(ask)
            yield self._answer(ask)

    def _answer(self, ask: Ask) -> Report:
        if not ask.payload:
            return Report(self.silo, 0, b"", Receipt(self.silo, 0), b"done")
        task = wire.unpack_task(ask.payload)
        tree: dict = {("delta", name): np.full_like(x, task.round) for name, x in task.params.items()}
        if ask.kind == "evaluate":
            tree = {("nll", ""): np.array([1.5]), ("targets", ""): np.array([2.0])}
        return report_of(self.silo, ask, {**tree, **self.change})


def report_of(silo: str, ask: Ask, tree: Tree, **facts: object) -> Report:
    """A report as a silo makes it, with an honest receipt but for `facts`."""
    payload, round = wire.pack(tree, {}), wire.unpack_task(ask.payload).round
    honest = {"silo": silo, "round": round, "task": wire.digest(ask.payload), "payload": wire.digest(payload),
              "bytes_down": len(ask.payload), "bytes_up": len(payload), "seconds": 0.1}  # fmt: skip
    receipt = Receipt(**{**honest, **facts})  # type: ignore[arg-type]
    return Report(silo, round, payload, receipt)


def task(round: int = 0, **changes: object) -> Task:
    values = {"round": round, "model": MODEL, "params": START, "cohort": SILOS, "seed": 1, **changes}
    return Task(**values)  # type: ignore[arg-type]


def ask(round: int = 0, silo: str = "north", kind: str = "train", split: str = "", **changes: object) -> Ask:
    return Ask(kind, silo, wire.pack_task(task(round, **changes)), split)


@dataclass
class Parties:
    """Everybody's identities, a treaty that all signed, and homes under one folder."""

    folder: Path
    treaty: Treaty = field(default_factory=lambda: parse(TREATY))
    chair: Identity = field(default_factory=Identity.fresh)
    silos: dict[str, Identity] = field(default_factory=lambda: {name: Identity.fresh() for name in SILOS})
    clock: datetime = NOON
    form: TaskForm = TASK_FORM

    def __post_init__(self) -> None:
        self.engines = {name: Adder(name) for name in self.silos}
        self.signed = self.sign(self.treaty)
        self.ledger = Ledger(self.folder / "coordinator.jsonl")
        for name in self.silos:
            self.home(name).path.mkdir(parents=True)
            self.home(name).charter.write_text(CHARTER)
            self.keep(self.signed, name)

    def sign(self, treaty: Treaty, by: Sequence[str] = SILOS) -> Signed:
        made = signed.propose(treaty, self.chair, {name: one.public for name, one in self.silos.items()})
        for name in by:
            made = made.signed_by(self.silos[name])
        return made

    def keep(self, made: Signed, name: str) -> None:
        signed.save(made, signed.place(self.home(name).treaties, made.digest))

    def home(self, name: str) -> Home:
        return Home(self.folder / name)

    def guard(self, name: str = "north") -> Guard:
        """The process of a silo, as it starts."""
        home = self.home(name)
        return Guard(
            name, self.silos[name], home, self.chair.public, Ledger(home.ledger),
            lambda _: Work(self.engines[name], self.form), now=lambda: self.clock,
        )  # fmt: skip

    def seal(self, made: Signed | None = None) -> Seal:
        """The coordinator's process, as it starts."""
        gate = Seal(self.chair, made or self.signed, self.folder / "numbers.json", self.ledger)
        gate.form = REPORT_FORM
        return gate

    def says(self, name: str, **changes: object) -> None:
        """What the operator of a silo decides."""
        consent.write(self.home(name).state, consent.Consent(**changes))  # type: ignore[arg-type]


def records(home: Home, kind: str) -> list[dict]:
    """The bodies of a ledger's records."""
    return [r["body"] for r in Ledger(home.ledger).records if r["kind"] == kind]


__all__ = ["Adder", "Home", "Parties", "ask", "charter", "date", "records", "report_of", "task"]
