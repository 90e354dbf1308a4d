"""What a coordinator makes of all that it saw, if it colludes with some silos and does its best: for tests and audits.

The attack is complete for masks that are as good as random: it takes every secret that enough shares open, takes off
every mask that it can compute, and adds what is left where the remaining masks cancel.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import WireError
from . import masks, schedule, shamir
from .keys import Pair, unseal
from .messages import CHECK, KEY, Delivery, Deposit, Masked, Reveal, Survivors, digest, name_of
from .schedule import Scope
from .silo import Member, _Bound, _Dealt, _Ready, _Sent

Edge = tuple[object, ...]


@dataclass(frozen=True)
class Seen:
    """One label, as the coordinator saw it. `scopes`: what each silo was called for. `answers`: what was revealed for
    which statement. `corrupt`: for each colluding silo its values of every step.
    """

    scopes: Mapping[str, Scope]
    deposits: Mapping[str, Deposit]
    delivered: Mapping[str, Delivery]
    masked: Mapping[str, tuple[Masked, masks.Words]]
    answers: Sequence[tuple[Survivors, Reveal]]
    corrupt: Mapping[str, Sequence[Member]] = field(default_factory=dict)


def opened(seen: Seen) -> dict[frozenset[str], masks.Words]:
    """The sums that open: the honest silos in each, and the words. Of whom nothing opens, no sum is."""
    return _Attack(seen).sums()


class _Attack:
    def __init__(self, seen: Seen) -> None:
        self.seen = seen
        self.selves: dict[str, bytes] = {}
        self.pairs: dict[str, Pair] = {}
        self.channels: dict[str, Mapping[str, bytes]] = {}
        self.shares: dict[tuple[str, str], dict[int, bytes]] = defaultdict(dict)
        for name, states in seen.corrupt.items():
            for state in states:
                self._spoils(name, state)
        for statement, reveal in seen.answers:
            for dealer, value in self._values(statement, reveal).items():
                self._share(dealer, reveal.name, value)
        self._recover()

    def _spoils(self, name: str, member: Member) -> None:
        """All that a colluding silo knows."""
        if isinstance(member._session, _Bound):
            self.channels[name] = member._session.channels
        for label, phase in member._sums.items():
            if label != self.seen.deposits[name].label:
                continue
            if isinstance(phase, _Dealt):
                self.selves[name], self.pairs[name] = phase.secret, phase.pair
            if isinstance(phase, _Ready | _Sent):
                for dealer, shares in phase.shares.items():
                    for share in shares:
                        self._share(dealer, name, share)

    def _share(self, dealer: str, holder: str, share: bytes) -> None:
        """Notes a share of either secret, if it is genuine."""
        box = self.seen.deposits[dealer].boxes[holder]
        for kind, known in (("self", box.of_self), ("pair", box.of_pair)):
            if digest(share) == known:
                self.shares[dealer, kind][self.seen.scopes[dealer].points(dealer)[holder]] = share

    def _values(self, statement: Survivors, reveal: Reveal) -> dict[str, bytes]:
        """The values that a silo sealed, if enough pads to its key are known."""
        holder, said = reveal.name, name_of(statement)
        scope, locks = self.seen.scopes[holder], {}
        for name, key in reveal.keys.items():
            for pad in self._pads(scope, said, holder, name):
                if digest(pad)[:CHECK] == key.check:
                    locks[scope.points(holder)[name]] = schedule.xor(key.lock, pad)
        if len(locks) < scope.threshold:
            return {}
        try:
            blob = unseal(shamir.recover(locks), reveal.sealed, said)
        except WireError:
            return {}
        near = [name for name in scope.neighbours(holder) if name in statement.participants]
        return {name: blob[KEY * i : KEY * (i + 1)] for i, name in enumerate(near)}

    def _pads(self, scope: Scope, said: bytes, holder: str, name: str) -> Iterable[bytes]:
        if name in self.channels:
            yield schedule.pad(self.channels[name][holder], scope, said, holder, name)
        for _, reveal in self.seen.answers:
            if reveal.name == name and holder in reveal.keys:
                yield reveal.keys[holder].key

    def _recover(self) -> None:
        for (dealer, kind), held in self.shares.items():
            if len(held) >= self.seen.scopes[dealer].threshold:
                secret, deposit = shamir.recover(held), self.seen.deposits[dealer]
                if kind == "self" and digest(secret) == deposit.commitment:
                    self.selves[dealer] = secret
                if kind == "pair" and Pair(secret).public == deposit.public:
                    self.pairs[dealer] = Pair(secret)

    def sums(self) -> dict[frozenset[str], masks.Words]:
        """Silos that share a mask which nobody computed belong together; their sum opens if all such cancel in it."""
        left: dict[str, masks.Words] = {}
        ends: dict[Edge, list[str]] = defaultdict(list)
        for name in self.seen.masked.keys() - self.seen.corrupt.keys():
            words, edges = self._stripped(name)
            if name in self.selves:
                left[name] = words
            for edge in edges:
                ends[edge].append(name)
        out = {}
        for group in _components(left, ends.values()):
            if group <= left.keys() and all(len(who) == 2 for who in ends.values() if set(who) & group):
                out[group] = sum((left[name] for name in sorted(group)), 0 * left[min(group)])
        return out

    def _stripped(self, name: str) -> tuple[masks.Words, list[Edge]]:
        """A masked vector without the masks that can be computed, and the others."""
        (masked, words), scope = self.seen.masked[name], self.seen.scopes[name]
        words, task = words.copy(), masked.task
        edges: list[Edge] = []
        if name in self.selves:
            masks.add(words, [schedule.self_seed(self.selves[name], scope, task, name)], [-1])
        for other, parcel in self.seen.delivered[name].parcels.items():
            mine = self.seen.deposits[name].public
            if name in self.pairs:
                seed = schedule.pair_seed(self.pairs[name], parcel.public, scope, task, name, other)
            elif other in self.pairs and self.pairs[other].public == parcel.public:
                seed = schedule.pair_seed(self.pairs[other], mine, scope, task, name, other)
            else:
                edges.append(
                    (scope.bond.transcript, scope.words, task, *sorted([(name, mine), (other, parcel.public)]))
                )
                continue
            masks.add(words, [seed], [-schedule.sign_of(name, other)])
        return words, edges


def _components(names: Iterable[str], ties: Iterable[Iterable[str]]) -> set[frozenset[str]]:
    group = {name: frozenset([name]) for name in names}
    for tie in ties:
        joined = frozenset(tie).union(*(group.get(name, frozenset([name])) for name in tie))
        group |= dict.fromkeys(joined, joined)
    return set(group.values())
