"""What two ledgers prove together: that their keepers saw the same rounds, or where they part.

A coordinator's ledger has a record "round" for each: the task, each silo's payload, the release, the parameters after
it. A silo's has a record "answered" for each task that it trained on: the task, the parameters in it (those after the
round before) and the payload that it gave. Whoever writes down the other's head as it was told ("seen" in any body)
can later show that the other's ledger was cut off or written anew. Two ledgers of one keeper must be one the beginning
of the other: two signed histories are a proof against their keeper.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from .. import wire
from .ledger import KEEPER, PRUNED, Head, departs, head_of, keepers

Record = Mapping[str, Any]
Place = tuple[str, int]
"""A treaty's digest, and the number of a round, from 1."""


@dataclass(frozen=True)
class Parting:
    """Where two ledgers contradict each other. `what`: in words; `left`, `right`: what stands in them; `round`: 0 where
    it is about no round.
    """

    what: str
    left: str
    right: str
    treaty: str = ""
    round: int = 0

    def __str__(self) -> str:
        at = f"round {self.round}: " if self.round else ""
        return f"{at}{self.what}: {self.left[:16] or 'nothing'} here, {self.right[:16] or 'nothing'} there"


@dataclass(frozen=True)
class Comparison:
    """Two ledgers, by name. `agreed`: the rounds that both show alike; `notes`: what one of them cannot tell."""

    names: tuple[str, str]
    agreed: tuple[Place, ...] = ()
    parted: tuple[Parting, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        """Whether nothing in one contradicts the other."""
        return not self.parted


@dataclass
class Round:
    """What one ledger shows of a round, in sets, for it may be redone. `payloads`: silo → the digests that it gave."""

    tasks: set[str] = field(default_factory=set)
    before: set[str] = field(default_factory=set)  # digests of the parameters in the task
    after: set[str] = field(default_factory=set)
    releases: set[str] = field(default_factory=set)
    payloads: dict[str, set[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class View:
    """What one ledger shows. `silo`: its keeper's name, where it is a silo's; None for a coordinator's."""

    name: str
    rounds: Mapping[Place, Round]
    silo: str | None
    pruned: bool


def params_digest(params: Mapping[str, np.ndarray]) -> str:
    """The digest of a model's parameters as a coordinator's ledger records it after a round."""
    return wire.digest(wire.pack({("params", name): x for name, x in params.items()}, {}))


def compare_all(ledgers: Mapping[str, Sequence[Record]]) -> list[Comparison]:
    """Every pair of verified ledgers, by name."""
    return [compare(ledgers[one], ledgers[other], (one, other)) for one, other in combinations(ledgers, 2)]


def compare(left: Sequence[Record], right: Sequence[Record], names: tuple[str, str] = ("A", "B")) -> Comparison:
    """Two verified ledgers of one keeper or of two. A silo is known by the name in its ledger's "keeper" record."""
    if _books(left) & _books(right):
        return _one_keeper(left, right, names)
    ours, theirs = view(left, names[0]), view(right, names[1])
    shared = [place for place in ours.rounds if place in theirs.rounds]
    contradicted = {place: list(_contradictions(place, ours, theirs)) for place in shared}
    parted = [*_heads(left, right), *_heads(right, left), *(one for found in contradicted.values() for one in found)]
    notes = [*_gaps(ours), *_gaps(theirs)]
    for one, other in ((ours, theirs), (theirs, ours)):
        missing, untold = _missing(one, other)
        parted += missing
        notes += untold
    agreed = tuple(place for place in shared if not contradicted[place])
    return Comparison(names, agreed, tuple(sorted(parted, key=lambda p: (p.treaty, p.round))), tuple(notes))


def _books(records: Sequence[Record]) -> set[tuple[str, str]]:
    """By whose key, and under which name, a ledger was kept: a coordinator keeps its own, and one for each run."""
    return {(r["body"]["key"], r["body"].get("name", "")) for r in records if r["kind"] == KEEPER}


def view(records: Sequence[Record], name: str = "") -> View:
    """The rounds that a verified ledger shows, in the order in which its keeper saw them."""
    rounds: dict[Place, Round] = {}
    treaty = params = ""
    own = next((r["body"].get("name", "") for r in reversed(records) if r["kind"] == KEEPER), "")
    coordinator = any(record["kind"] in ("opened", "round") for record in records)
    for record in records:
        kind, body = record["kind"], record["body"]
        if kind == "opened":
            treaty, params = body.get("treaty", ""), ""
        elif kind == "round":
            seen = rounds.setdefault((treaty, body["round"]), Round())
            _put(seen, body["task"], params, body["params"], body["release"])
            for silo, given in body["reports"].items():
                seen.payloads.setdefault(silo, set()).add(given["payload"])
            params = body["params"]
        elif kind == "answered" and body.get("ask") == "train" and not body.get("failure"):
            seen = rounds.setdefault((body["treaty"], body["round"]), Round())
            _put(seen, body["task"], body.get("params", ""))
            seen.payloads.setdefault(own, set()).add(body["payload"])
    return View(name, rounds, None if coordinator else own, any(record["kind"] == PRUNED for record in records))


def _put(seen: Round, task: str, before: str, after: str = "", release: str = "") -> None:
    pairs = (seen.tasks, task), (seen.before, before), (seen.after, after), (seen.releases, release)
    for known, found in pairs:
        known.update({found} - {""})


def _contradictions(place: Place, one: View, other: View) -> Iterator[Parting]:
    """What two views of a round say that cannot both be."""
    a, b = one.rounds[place], other.rounds[place]
    whats = (
        ("the task", a.tasks, b.tasks), ("the parameters in the task", a.before, b.before),
        ("the release", a.releases, b.releases), ("the parameters after it", a.after, b.after),
    )  # fmt: skip
    for what, here, there in whats:
        if here and there and not here & there:
            yield _parting(what, here, there, place)
    for silo in a.payloads.keys() & b.payloads.keys() - {""}:
        here, there = a.payloads[silo], b.payloads[silo]
        if not (here <= there if one.silo is None else there <= here):
            yield _parting(f"the payload of {silo}", here, there, place)


def _missing(one: View, other: View) -> tuple[list[Parting], list[str]]:
    """What `one` shows of rounds that `other` does not and should, and what nobody can tell."""
    parted, notes = [], []
    last = {treaty: max(number for known, number in other.rounds if known == treaty) for treaty, _ in other.rounds}
    for treaty, number in (place for place in one.rounds if place not in other.rounds):
        seen, closed = one.rounds[treaty, number], number <= last.get(treaty, 0)
        if other.silo in seen.payloads and not other.pruned:
            came = f"{one.name} has a payload of {other.silo} of which {other.name} knows nothing"
            parted.append(Parting(came, min(seen.payloads[other.silo]), "", treaty, number))
        elif other.silo is None and one.silo is not None and closed and not other.pruned:
            parted.append(
                Parting(f"{one.name} answered it, and {other.name} skips it", min(seen.tasks), "", treaty, number)
            )
        elif other.silo is None and one.silo is not None:
            notes.append(f"round {number} of treaty {treaty[:12]}: {one.name} answered, {other.name} does not show it")
    return parted, notes


def _gaps(seen: View) -> Iterator[str]:
    if seen.pruned:
        yield f"{seen.name} was pruned: what it does not show of a round, it may have shown before"
    if seen.silo == "":
        yield f"{seen.name} does not name its keeper: no payload could be compared"


def _heads(own: Sequence[Record], other: Sequence[Record]) -> Iterator[Parting]:
    """Whether `other` is still the ledger whose heads `own` was told."""
    keys = set(keepers(other))
    for record in own:
        told = record["body"].get("seen")
        if told and told["key"] in keys:
            head = Head(told["count"], told["hash"])
            if why := departs(other, head):
                yield Parting(
                    f"{why} (as record {record['index']} of the other witnesses)", str(head), str(head_of(other))
                )


def _one_keeper(left: Sequence[Record], right: Sequence[Record], names: tuple[str, str]) -> Comparison:
    """Copies of one ledger: one must be the beginning of the other."""
    ours, theirs = ({record["index"]: record for record in records} for records in (left, right))
    shared = sorted(ours.keys() & theirs.keys())
    fork = next((i for i in shared if PRUNED not in (ours[i]["kind"], theirs[i]["kind"]) and
                 ours[i]["hash"] != theirs[i]["hash"]), None)  # fmt: skip
    if fork is not None:
        what = f"two histories of one keeper, from record {fork} on, both signed"
        return Comparison(names, (), (Parting(what, ours[fork]["hash"], theirs[fork]["hash"]),))
    one, other = head_of(left), head_of(right)
    if one == other:
        return Comparison(names, tuple(view(left).rounds))
    shorter = names[0] if one.count < other.count else names[1]
    note = f"{shorter} is the older copy: {abs(one.count - other.count)} records fewer"
    return Comparison(names, tuple(view(left if one.count < other.count else right).rounds), (), (note,))


def _parting(what: str, here: set[str], there: set[str], place: Place) -> Parting:
    return Parting(what, min(here - there or here), min(there - here or there), *place)
