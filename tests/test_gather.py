"""Gathering at size: many silos, each masking with some; samples of them; sessions that go on."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest

from foedus import wire
from foedus.errors import CohortError
from foedus.gather import Masked
from foedus.secure.keys import Identity
from foedus.secure.messages import Agreement
from foedus.silo.membership import Membership
from foedus.stages.words import SUM
from foedus.types import Receipt, Report, Task

SIZE = 7


class Silos:
    """Silos that answer with their own number in every word. `down`: who does not answer, by kind of ask."""

    def __init__(self, count: int, minimum: int = 3, dropout: float = 0.1) -> None:
        self.names = tuple(f"s{i:03d}" for i in range(count))
        identities = {name: Identity.fresh() for name in self.names}
        chair = Identity.fresh()
        roster = {name: one.public for name, one in identities.items()}
        shares = Fraction(1, 10), Fraction(str(dropout))
        self.agreement = Agreement("t", "m", roster, chair.public, 32, *shares, minimum)
        self.membership = Membership(self.agreement, identities)
        self.gather = Masked(self.agreement, chair, {"train": SIZE})
        self.down: dict[str, Sequence[str]] = {}
        self.kinds: list[str] = []
        self.memory = {}

    def ask(self, asks):
        self.kinds += sorted({a.kind for a in asks})
        for a in asks:
            if a.silo in self.down.get(a.kind, ()):
                continue
            if a.kind != "train":
                yield Report(a.silo, 0, b"", Receipt(a.silo, 0), self.membership.answer(a.kind, a.silo, a.mail))
                continue
            task = wire.unpack_task(a.payload)
            words = np.full(SIZE, int(a.silo[1:]), np.uint32)
            self.membership.deliver(a.silo, a.mail, wire.digest(a.payload))
            self.membership.gives(a.silo, f"train {task.round}", wire.digest(words.tobytes()))
            self.membership.add(a.silo, words)
            payload = wire.pack({SUM: words}, {})
            yield Report(a.silo, task.round, payload, Receipt(a.silo, task.round), self.membership.mail(a.silo))

    def sum(self, round: int, cohort: Sequence[str] | None = None):
        self.kinds.clear()
        return self.gather.gather(self, "train", Task(round, "m", {}, tuple(cohort or self.names), 0))


def total(names: Sequence[str]) -> int:
    return sum(int(name[1:]) for name in names)


def test_a_sparse_graph_sums_over_whoever_survives():
    silos = Silos(60, minimum=8)
    found, _ = silos.sum(0)
    assert (found.tensors[SUM] == total(silos.names)).all() and found.count == 60
    silos.down = {"train": silos.names[:3], "unmask": silos.names[3:6]}
    found, receipts = silos.sum(1)
    assert (found.tensors[SUM] == total(silos.names[3:])).all() and found.count == 57
    assert [r.silo for r in receipts if r.failure] == list(silos.names[:3])
    silos.down = {}
    found, _ = silos.sum(2)  # all are back, in a new session
    assert (found.tensors[SUM] == total(silos.names)).all()
    silos.sum(3)
    assert silos.kinds == ["train", "unmask"]


def test_a_sample_of_many_silos_makes_a_session_of_its_own():
    silos = Silos(60, minimum=8)
    for round, chosen in enumerate((silos.names[::2], silos.names[1::2], silos.names[1::2])):
        found, _ = silos.sum(round, chosen)
        assert (found.tensors[SUM] == total(chosen)).all() and found.count == 30
    assert silos.kinds == ["train", "unmask"]


def test_who_stays_away_is_asked_once_a_round_and_the_others_go_on():
    silos = Silos(12)
    silos.sum(0)
    gone = silos.names[:2]
    silos.down = dict.fromkeys(("join", "train", "deposit", "unmask"), gone)
    for round in (1, 2, 3):
        found, _ = silos.sum(round)
        assert (found.tensors[SUM] == total(silos.names[2:])).all()
    assert silos.kinds == ["join", "train", "unmask"]


def test_who_joins_and_does_not_open_is_left_out():
    silos = Silos(6, dropout=0.2)
    silos.down = {"open": silos.names[:1]}
    found, receipts = silos.sum(0)
    assert (found.tensors[SUM] == total(silos.names[1:])).all()
    assert "did not answer" in receipts[0].failure


def test_too_few_end_the_round_and_a_later_one_succeeds():
    silos = Silos(6, minimum=4)
    silos.down = {"train": silos.names[:3]}
    with pytest.raises(CohortError, match="4 silos or more in a sum"):
        silos.sum(0)
    assert "unmask" not in silos.kinds
    silos.down = {}
    found, _ = silos.sum(0)
    assert (found.tensors[SUM] == total(silos.names)).all()


def test_bytes_of_all_exchanges_are_counted():
    silos = Silos(6)
    silos.sum(0)
    _, receipts = silos.sum(1)
    assert all(4 * SIZE < r.bytes_up < 5000 and r.bytes_down > 500 for r in receipts)


def test_garbage_from_a_silo_is_its_own_failure():
    silos = Silos(8, dropout=0.2)
    honest = silos.ask

    def ask(asks):
        for report in honest(asks):
            bad = report.silo == silos.names[0] and asks[0].kind == "train"
            yield Report(report.silo, report.round, b"garbage", report.receipt, report.mail) if bad else report

    silos.ask = ask
    found, receipts = silos.sum(0)
    assert (found.tensors[SUM] == total(silos.names[1:])).all()
    assert receipts[0].failure and not any(r.failure for r in receipts[1:])
