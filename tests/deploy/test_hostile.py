"""A hostile peer: a thousand messages to a silo, and a thousand answers to a coordinator. None changes anything, none
crashes anything, and each is refused for its own reason and counted under it.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest

from foedus import wire
from foedus.deploy.forms import MOST_HEADER
from foedus.deploy.seal import reason_of
from foedus.engines.base import Ask
from foedus.engines.frames import pack_ask, pack_report, unpack_report
from foedus.governance import Ledger
from foedus.governance.envelope import (
    ANSWER,
    CLOSED,
    OVERHEAD,
    Reason,
    Refused,
    name_of,
    number_of,
    seal,
    unseal,
)  # fmt: skip
from foedus.secure.keys import Identity
from foedus.treaty import parse
from foedus.types import Report

from .parties import CHARTER, START, TREATY, Parties, ask, records, report_of

MESSAGES = 1000
MOST = 1_000_000
Attack = tuple[bytes, Reason]
HEAD = OVERHEAD - 64


@pytest.fixture
def parties(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: None)  # what is durable, other tests say
    return Parties(tmp_path)


def counted(bodies: list[dict]) -> Counter[str]:
    """How many refusals a ledger shows, by reason: of each kind the last count."""
    last = {json.dumps({k: x for k, x in body.items() if k != "count"}): body for body in bodies}
    totals: Counter[str] = Counter()
    for body in last.values():
        totals[body["reason"]] += body["count"]
    return totals


def flipped(blob: bytes, bit: int) -> bytes:
    changed = bytearray(blob)
    changed[bit // 8] ^= 1 << (bit % 8)
    return bytes(changed)


def why_a_flip(byte: int) -> Reason:
    """What a changed byte at this place is."""
    fields = ((4, Reason.MALFORMED), (13, Reason.FORGED), (21, Reason.TRUNCATED), (53, Reason.STRANGER),
              (OVERHEAD, Reason.FORGED))  # fmt: skip
    return next((reason for end, reason in fields if byte < end), Reason.ALTERED)


def spoilt(blob: bytes, draw: np.random.Generator) -> Attack:
    """What anybody on the way can make of a genuine message."""
    kind = draw.integers(6)
    if kind == 0:
        cut = int(draw.integers(len(blob)))
        return blob[:cut], Reason.TRUNCATED
    if kind == 1:
        bit = int(draw.integers(8 * len(blob)))
        return flipped(blob, bit), why_a_flip(bit // 8)
    if kind == 2:
        return blob + draw.bytes(int(draw.integers(1, 100))), Reason.TRUNCATED
    if kind == 3:
        return blob + bytes(MOST), Reason.OVERSIZED
    if kind == 4:
        return draw.bytes(int(draw.integers(5, 2000))), Reason.MALFORMED
    size = struct.pack("<Q", int(draw.integers(1 << 60)))
    return blob[:13] + size + blob[21:], Reason.TRUNCATED


class Client:
    """Everything that somebody can send to a silo: what a stranger can, and what only a coordinator that lies can."""

    def __init__(self, parties: Parties, seed: int) -> None:
        self.parties, self.draw = parties, np.random.default_rng(seed)
        self.me, self.treaty = parties.silos["north"].public, bytes.fromhex(parties.signed.digest)
        self.number = 1000

    def sealed(self, body: bytes, by: Identity | None = None, to: bytes = b"", treaty: bytes = b"", **more) -> bytes:
        self.number += 1
        number = more.pop("number", self.number)
        return seal(by or self.parties.chair, to or self.me, treaty or self.treaty, number, body, **more)

    def genuine(self, kind: str = "train", round: int = 3, split: str = "", **changes) -> bytes:
        return pack_ask(ask(round, kind=kind, split=split, **changes))

    def strangers(self) -> Iterator[Attack]:
        """Messages of whoever holds no key of the treaty's coordinator; none of them hears more than `CLOSED`."""
        stranger, other = Identity.fresh(), self.parties.silos["south"]
        while True:
            yield spoilt(self.sealed(self.genuine()), self.draw)
            yield self.sealed(self.genuine(), by=stranger), Reason.STRANGER
            yield self.sealed(self.genuine(), by=other), Reason.STRANGER
            claimed = self.sealed(self.genuine(), by=stranger)
            yield claimed[:21] + self.parties.chair.public + claimed[53:], Reason.FORGED
            yield self.sealed(self.genuine(), to=other.public), Reason.MISDIRECTED
            yield self.sealed(self.genuine(), answers=self.draw.bytes(32)), Reason.MALFORMED
            yield self.sealed(self.genuine(), number=0), Reason.MALFORMED

    def liars(self) -> Iterator[Attack]:
        """Messages that the coordinator itself signed, and that its treaty does not have."""
        while True:
            for reason, body in self.bodies():
                yield self.sealed(body), reason
            yield self.sealed(self.genuine(), number=int(self.draw.integers(1, 4))), Reason.REPLAYED
            yield self.sealed(self.genuine(), treaty=self.draw.bytes(32)), Reason.WRONG_TREATY

    def bodies(self) -> Iterator[tuple[Reason, bytes]]:
        draw, genuine = self.draw, self.genuine
        x = START["a"].copy()
        x.flat[draw.integers(x.size)] = draw.choice([np.nan, np.inf, -np.inf])
        yield Reason.NON_FINITE, genuine(params={**START, "a": x})
        yield Reason.NON_FINITE, genuine(extra={("c", "b"): np.full(4, np.nan, np.float32)})
        shape = tuple(int(n) for n in draw.integers(1, 9, 3))
        yield Reason.WRONG_SHAPE, genuine(params={**START, "a": np.zeros(shape, np.float32)})
        yield Reason.WRONG_SHAPE, genuine(params={**START, "a": START["a"].astype(np.float64)})
        yield Reason.WRONG_SHAPE, genuine(params={**START, "a": START["a"].astype(np.int32)})
        yield Reason.WRONG_SHAPE, genuine(params={"a": START["a"]})
        yield Reason.WRONG_SHAPE, genuine(params={**START, "c": START["b"]})
        yield Reason.WRONG_SHAPE, genuine(params={})
        yield Reason.WRONG_SHAPE, genuine(extra={("c", "b"): np.zeros(5, np.float32)})
        yield Reason.WRONG_SHAPE, genuine(extra={("c", "d"): np.zeros((1, 1000), np.float32)})
        yield Reason.WRONG_SHAPE, genuine(extra={("c", str(i)): np.zeros(1) for i in range(100)})
        yield Reason.WRONG_SHAPE, genuine("evaluate", 4, "validation", extra={("c", "d"): np.zeros(1)})
        yield Reason.WRONG_SHAPE, genuine(settings={"max_norm": 1e9})
        yield Reason.WRONG_MODEL, genuine(model=draw.bytes(32).hex())
        yield Reason.NOT_AGREED, genuine(seed=int(draw.integers(2, 1 << 40)))
        yield Reason.NOT_AGREED, genuine(round=int(draw.integers(5, 1 << 40)))
        yield Reason.NOT_AGREED, genuine(cohort=("south", "west"))
        yield Reason.NOT_AGREED, genuine(cohort=("south", "north", "west"))
        yield Reason.NOT_AGREED, genuine(cohort=("north", "south", "west", "east"))
        yield Reason.MALFORMED, genuine(cohort=("north", "north"))
        yield Reason.NOT_AGREED, genuine("evaluate", 3, "validation")
        yield Reason.NOT_AGREED, genuine("evaluate", 4, "test")
        yield Reason.NOT_AGREED, genuine("evaluate", 5, "train")
        yield Reason.NOT_AGREED, pack_ask(Ask(draw.bytes(6).hex(), "north", b""))
        yield Reason.NOT_AGREED, pack_ask(Ask("unmask", "north", b"", mail=draw.bytes(50)))
        yield Reason.MISDIRECTED, pack_ask(ask(3, silo="south"))
        yield Reason.MALFORMED, pack_ask(Ask("train", "north", b""))
        yield Reason.MALFORMED, pack_ask(Ask("train", "north", ask(3).payload, "test"))
        yield Reason.MALFORMED, pack_ask(Ask("train", "north", small(draw.bytes(100))))
        yield Reason.MALFORMED, pack_ask(Ask("hello", "north", b"", mail=draw.bytes(300)))
        yield Reason.MALFORMED, pack_ask(Ask("hello", "north", b"", mail=b"[" * 100_000))
        yield Reason.MALFORMED, draw.bytes(int(draw.integers(0, 300)))
        yield Reason.MALFORMED, framed(b"[" * 60_000)
        yield Reason.MALFORMED, framed(b'{"frame":"ask",' + b'"kind":"train",' * 3000 + b'"silo":"north","split":""}')
        yield Reason.MALFORMED, framed(b"9" * 60_000)
        yield Reason.MALFORMED, struct.pack("<4sIQQ", b"FDS\x01", 1 << 31, 1 << 62, 1 << 62)
        yield Reason.MALFORMED, pack_ask(Ask("train", "north", bomb(b"[" * 500_000)))
        yield Reason.MALFORMED, pack_ask(Ask("train", "north", bomb(b'{"__metadata__":' * 5_000)))
        yield Reason.OVERSIZED, pack_ask(Ask("train", "north", struct.pack("<Q", MOST_HEADER + 1) + bytes(100)))
        yield Reason.OUT_OF_ORDER, genuine(round=int(draw.integers(0, 2)))
        yield Reason.OUT_OF_ORDER, genuine(round=2, params={**START, "b": START["b"] + 1})


def small(junk: bytes) -> bytes:
    """Bytes whose header would be short."""
    return struct.pack("<Q", 50) + junk


def bomb(header: bytes) -> bytes:
    """A payload with a header that is costly to parse."""
    return struct.pack("<Q", len(header)) + header


def framed(header: bytes) -> bytes:
    return struct.pack("<4sIQQ", b"FDS\x01", len(header), 0, 0) + header


def met(parties: Parties) -> None:
    """A silo that has done three rounds, honestly."""
    guard, gate = parties.guard(), parties.seal()
    for round in range(3):
        asked = gate.seal(ask(round))
        assert not gate.open("north", asked, guard(asked)).receipt.failure


def test_a_thousand_hostile_messages_change_nothing_and_each_is_counted_under_its_reason(parties):
    met(parties)
    client, guard, home = Client(parties, 1), parties.guard(), parties.home("north")
    before, worked, expected = home.content(), len(parties.engines["north"].asked), Counter[str]()
    attacks = (attack for pair in zip(client.strangers(), client.liars(), strict=False) for attack in pair)
    seen: set[str] = set()
    for i, (blob, reason) in zip(range(MESSAGES), attacks, strict=False):
        answer = guard(blob)
        expected[reason.value] += 1
        heard = Reason.CLOSED if answer == CLOSED else told(parties, blob, answer)
        assert heard in (reason, Reason.CLOSED), f"message {i}: {heard}, not {reason}"
        assert (heard == Reason.CLOSED) == (i % 2 == 0), f"message {i}"
        seen.add(reason.value)
        if i % 25 == 0:
            assert home.content() == before, f"message {i}"
    guard.close()
    assert home.content() == before and len(parties.engines["north"].asked) == worked
    assert counted(records(home, "refused")) == expected
    assert len(records(home, "refused")) < 150
    gate = parties.seal()
    for _ in range(20):  # numbers that the hostile coordinator did not reach
        asked = gate.seal(ask(3))
    assert not gate.open("north", asked, guard(asked)).receipt.failure


def told(parties: Parties, blob: bytes, answer: bytes) -> Reason | None:
    """The reason in a signed refusal, which answers this very message."""
    envelope = unseal(
        answer, kind=ANSWER, senders={parties.silos["north"].public}, receiver=parties.chair.public, most=MOST
    )  # fmt: skip
    assert envelope.answers == name_of(blob) and envelope.number == number_of(blob)
    report = unpack_report(bytes(envelope.body))
    assert report.payload == report.mail == b""
    return reason_of(report.receipt.failure)


class Server:
    """Everything that somebody can send to a coordinator as the answer of a silo."""

    def __init__(self, parties: Parties, asked: bytes, about: Ask, seed: int) -> None:
        self.parties, self.asked, self.about, self.draw = parties, asked, about, np.random.default_rng(seed)
        self.delta = {("delta", name): x for name, x in START.items()}

    def sealed(self, body: bytes, by: str = "north", **more) -> bytes:
        number, answers = more.get("number", number_of(self.asked)), more.get("answers", name_of(self.asked))
        treaty, to = more.get("treaty", bytes.fromhex(self.parties.signed.digest)), more.get("to")
        signer = more.get("identity", self.parties.silos[by])
        return seal(signer, to or self.parties.chair.public, treaty, number, body, answers=answers)

    def honest(self, **facts) -> bytes:
        return pack_report(report_of("north", self.about, self.delta, **facts))

    def strangers(self) -> Iterator[Attack]:
        """What the silo did not sign, or not as the answer to this."""
        honest, draw = self.honest(), self.draw
        while True:
            yield spoilt(self.sealed(honest), draw)
            yield self.sealed(honest, by="south"), Reason.STRANGER
            yield self.sealed(honest, identity=Identity.fresh()), Reason.STRANGER
            yield self.asked, Reason.STRANGER
            yield self.sealed(honest, answers=draw.bytes(32)), Reason.UNSOLICITED
            yield self.sealed(honest, number=number_of(self.asked) + 1), Reason.UNSOLICITED
            yield self.sealed(honest, treaty=draw.bytes(32)), Reason.WRONG_TREATY
            yield self.sealed(honest, to=self.parties.silos["south"].public), Reason.MISDIRECTED
            yield CLOSED, Reason.CLOSED

    def liars(self) -> Iterator[Attack]:
        """What the silo signed, and should not have."""
        while True:
            for reason, body in self.bodies():
                yield self.sealed(body), reason

    def bodies(self) -> Iterator[tuple[Reason, bytes]]:
        draw, honest = self.draw, self.honest
        x = START["a"].copy()
        x.flat[draw.integers(x.size)] = draw.choice([np.nan, np.inf, -np.inf])
        yield Reason.NON_FINITE, self.sends({**self.delta, ("delta", "a"): x})
        yield Reason.NON_FINITE, honest(disclosed={"loss": float("nan")})
        yield Reason.NON_FINITE, honest(seconds=float("inf"))
        yield Reason.WRONG_SHAPE, self.sends({("delta", "a"): START["a"]})
        yield Reason.WRONG_SHAPE, self.sends({**self.delta, ("delta", "c"): START["a"]})
        yield Reason.WRONG_SHAPE, self.sends({**self.delta, ("delta", "a"): np.zeros((3, 2), np.float32)})
        yield Reason.WRONG_SHAPE, self.sends({**self.delta, ("delta", "a"): np.zeros((2, 3), np.int64)})
        yield Reason.WRONG_SHAPE, self.sends({})
        yield Reason.NOT_AGREED, honest(disclosed={draw.bytes(3).hex(): 1.0})
        yield Reason.FALSE_RECEIPT, honest(task=draw.bytes(32).hex())
        yield Reason.FALSE_RECEIPT, honest(payload=draw.bytes(32).hex())
        yield Reason.FALSE_RECEIPT, honest(bytes_up=int(draw.integers(1 << 40)))
        yield Reason.FALSE_RECEIPT, honest(bytes_down=0)
        yield Reason.FALSE_RECEIPT, pack_report(report_of("south", replace(self.about, silo="south"), self.delta))
        yield (
            Reason.FALSE_RECEIPT,
            pack_report(report_of("north", ask(1), self.delta, task=wire.digest(self.about.payload))),
        )
        yield Reason.MALFORMED, draw.bytes(int(draw.integers(0, 300)))
        yield Reason.MALFORMED, framed(b"[" * 60_000)
        yield Reason.MALFORMED, self.carries(small(draw.bytes(100)))
        yield Reason.MALFORMED, self.carries(bomb(b"[" * 500_000))
        yield Reason.OVERSIZED, self.carries(struct.pack("<Q", MOST_HEADER + 1) + bytes(100))

    def sends(self, tree) -> bytes:
        return pack_report(report_of("north", self.about, tree))

    def carries(self, payload: bytes) -> bytes:
        report = report_of("north", self.about, {})
        receipt = replace(report.receipt, payload=sha256(payload).hexdigest(), bytes_up=len(payload))
        return pack_report(Report("north", 0, payload, receipt))


def test_a_thousand_hostile_answers_become_failed_reports_or_are_dropped_and_each_is_counted(parties):
    gate = parties.seal()
    gate.most = MOST
    asked = gate.seal(about := ask(0))
    server, expected, number = (
        Server(parties, asked, about, 2),
        Counter[str](),
        (parties.folder / "numbers.json").read_bytes(),
    )
    attacks = (attack for pair in zip(server.strangers(), server.liars(), strict=False) for attack in pair)
    for i, (blob, reason) in zip(range(MESSAGES), attacks, strict=False):
        expected[reason.value] += 1
        assert heard_from(lambda blob=blob: gate.open("north", asked, blob), dropped=i % 2 == 0) == reason, (
            f"answer {i}"
        )
    gate.flush()
    refused = [r["body"] for r in Ledger(parties.ledger.path).records if r["kind"] == "refused"]
    assert counted(refused) == expected and len(refused) < 150
    assert (parties.folder / "numbers.json").read_bytes() == number
    honest = gate.open("north", asked, server.sealed(server.honest(disclosed={"loss": 2.5})))
    assert not honest.receipt.failure and honest.receipt.disclosed == {"loss": 2.5}


def heard_from(open: Callable[[], Report], *, dropped: bool) -> Reason | None:
    """Why an answer was not taken: raised where somebody on the way may have spoilt it, else a failed report."""
    try:
        report = open()
    except Refused as refused:
        assert dropped
        return refused.reason
    assert not dropped and report.payload == report.mail == b"" and report.silo == "north"
    return reason_of(report.receipt.failure)


def test_messages_of_yesterday_cannot_be_played_again_to_a_silo_that_was_restarted(parties):
    guard, gate = parties.guard(), parties.seal()
    heard = [gate.seal(ask(round)) for round in range(4)]
    for blob in heard:
        guard(blob)
    worked = len(parties.engines["north"].asked)
    again = parties.guard()
    assert [told(parties, blob, again(blob)) for blob in heard[:3]] == [Reason.REPLAYED] * 3
    assert len(parties.engines["north"].asked) == worked


def test_a_silo_without_treaty_or_with_a_broken_charter_tells_strangers_nothing(parties):
    guard, gate = parties.guard(), parties.seal()
    home = parties.home("north")
    home.charter.write_text(CHARTER.replace("max_bytes", "max_byte"))
    assert guard(gate.seal(ask(0))) == CLOSED
    home.charter.unlink()
    assert guard(gate.seal(ask(0))) == CLOSED
    home.charter.write_text(CHARTER)
    other = parties.sign(parse(TREATY.replace("seed = 1", "seed = 2")))
    blob = parties.seal(other).seal(ask(0))
    assert told(parties, blob, guard(blob)) == Reason.WRONG_TREATY
    assert not parties.engines["north"].asked
