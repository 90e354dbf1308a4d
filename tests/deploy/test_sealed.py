"""Every algorithm and every kind of sum passes the gates of both sides as it is, and gives the same adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from foedus import loop
from foedus.build import build
from foedus.deploy.guard import Guard, work_of
from foedus.deploy.seal import Seal
from foedus.engines import Ask
from foedus.governance import Ledger
from foedus.governance.circle import Circle
from foedus.secure.keys import Identity
from foedus.treaty import Treaty, signed
from foedus.treaty.signed import Signed
from foedus.types import Report, Tree
from foedus.worker import engine_of

from .parties import NOISY, Home
from .test_parties import ENCRYPTED, EXAMPLE, MASKED, METHODS, OPEN, SHARED, SILO, SILOS, files, same, treaty


class Sealed:
    """An engine whose asks and reports pass through the gates of both sides."""

    def __init__(self, gate: Seal, guards: dict[str, Guard]) -> None:
        self.gate, self.guards, self.memory = gate, guards, dict[str, Tree]()

    def ask(self, asks: Sequence[Ask]) -> Iterator[Report]:
        for ask in asks:
            asked = self.gate.seal(ask)
            yield self.gate.open(ask.silo, asked, self.guards[ask.silo](asked))


def sealed(by: Treaty, folder: Path):
    """The coordinator's place, and silos behind their guards."""
    chair, own = Identity.fresh(), {name: Identity.fresh() for name in SILOS}
    made = signed.propose(by, chair, {name: one.public for name, one in own.items()})
    for one in own.values():
        made = made.signed_by(one)
    data = files(folder)
    guards = {}
    for name, identity in own.items():
        home = Home(folder / name)
        home.path.mkdir()
        home.charter.write_text(NOISY)
        signed.save(made, signed.place(home.treaties, made.digest))
        engine = engine_of(
            by, name, folder / name, 1, examples=data[name], circle=Circle(made.roster, {name: identity}, chair.public)
        )

        def work(_: Signed, engine=engine):
            return work_of(engine)

        guards[name] = Guard(name, identity, home, chair.public, Ledger(home.ledger), work)
    place = build(by, {}, circle=Circle(made.roster, {}, chair))
    gate = Seal(chair, made, folder / "numbers.json", Ledger(folder / "coordinator.jsonl"), place)
    return place, Sealed(gate, guards)


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("fedavg", OPEN),
        ("fedlap", OPEN),
        ("alignment", {**EXAMPLE, **MASKED}),
        ("scaffold", ENCRYPTED),
        ("fedavg", {**MASKED, **SILO, **SHARED}),
    ],
)
def test_rounds_and_evaluations_pass_both_gates_unchanged(tmp_path, monkeypatch, method, more):
    monkeypatch.setattr("os.fsync", lambda _: None)
    by = treaty(tmp_path, {"algorithm.name": method, **METHODS[method]}, more)
    place, engine = sealed(by, tmp_path)
    done = list(loop.run(place.federation, engine, loop.start(place.federation, place.bench.start())))
    assert not [receipt.failure for _, release in done for receipt in release.receipts if receipt.failure]
    together = build(by, files(tmp_path))
    *_, (alone, _) = loop.run(
        together.federation, together.engine(), loop.start(together.federation, together.bench.start())
    )
    assert same(done[-1][0], alone)
