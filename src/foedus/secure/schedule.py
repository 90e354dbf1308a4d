"""The key schedule: who masks with whom, and how every key follows from what two silos share.

    adverts, openings ──▶ transcript T ──▶ the graph;  channel_ij = HKDF(X25519(e_i, e_j), T) ──▶ box keys, pads
    pairs (a_i, A_j), a call, a task ──▶ pair seeds;   secret b_i, a call, a task ──▶ self seed

Both sides compute all of it alike. Every derivation names its use, the sum, the direction, and whatever the parties
must have seen alike: where they have not, the keys differ, and nothing opens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from ..errors import CohortError
from .graph import neighbours
from .keys import Pair, hkdf, spell
from .messages import Advert, Agreement, Box, Call, Deposit, Opening, Parcel, digest, name_of
from .parameters import choose


@dataclass(frozen=True)
class Bond:
    """An established session: its members, sorted, and the transcript T that all of them share."""

    agreement: Agreement
    session: bytes
    transcript: bytes
    members: tuple[str, ...]

    @cached_property
    def circle(self) -> tuple[Mapping[str, tuple[str, ...]], int] | None:
        """The members' neighbours and the threshold; None where everybody is everybody's neighbour.

        Drawn once, over all members, from randomness that nobody knew when they were gathered. A coordinator that could
        draw again, for each label or cohort, would do so until corrupt silos surround its victim.
        """
        n, agreed = len(self.members), self.agreement
        if agreed.group_size is not None:
            return None
        graph = choose(
            n, agreed.colluders / n, float(agreed.dropout), neighbours=agreed.neighbours, threshold=agreed.threshold
        )
        if graph.neighbours >= n - 1:
            return None
        return neighbours(self.members, hkdf(self.transcript, b"", "graph"), graph.neighbours), graph.threshold

    @cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Who is summed with whom: the members in an order that nobody chose, cut into groups of nearly one size."""
        size = self.agreement.group_size or len(self.members)
        order = tuple(neighbours(self.members, hkdf(self.transcript, b"", "groups"), 2))
        count, n = max(1, len(order) // size), len(order)
        return tuple(tuple(sorted(order[n * i // count : n * (i + 1) // count])) for i in range(count))


@dataclass(frozen=True)
class Scope:
    """One sum of a session: what each of its keys is bound to."""

    bond: Bond
    label: str
    cohort: tuple[str, ...]

    @cached_property
    def call(self) -> Call:
        return Call(self.bond.session, self.label, self.cohort)

    @cached_property
    def words(self) -> tuple[str, bytes]:
        """What each derivation for this sum begins with: the label, and the digest of label, cohort and session."""
        return self.label, name_of(self.call)

    @cached_property
    def threshold(self) -> int:
        """How many shares open a secret. A GuaranteeError for a cohort too small for the agreed collusion."""
        if self.bond.circle:
            return self.bond.circle[1]
        n, agreed = len(self.cohort), self.bond.agreement
        return choose(
            n, agreed.colluders / n, float(agreed.dropout), neighbours=n - 1, threshold=agreed.threshold
        ).threshold

    def neighbours(self, name: str) -> tuple[str, ...]:
        """Those of the cohort with whom a silo masks and shares, sorted; members not called are as if they vanished."""
        if self.bond.circle is None:
            return tuple(other for other in self.cohort if other != name)
        return tuple(other for other in self.bond.circle[0][name] if other in self._called)

    def points(self, dealer: str) -> dict[str, int]:
        """Where each neighbour stands on the polynomials of `dealer`."""
        return {name: point for point, name in enumerate(self.neighbours(dealer), 1)}

    @cached_property
    def _called(self) -> frozenset[str]:
        return frozenset(self.cohort)


def scope(bond: Bond, call: Call) -> Scope:
    """The sum that a call is for. A CohortError for a call to no session's members, or to too few."""
    least = bond.agreement.minimum
    if call.session != bond.session or not set(call.cohort) <= set(bond.members) or len(call.cohort) < least:
        came = f"{len(call.cohort)} silos, {len(set(call.cohort) - set(bond.members))} of them no members"
        raise CohortError(f"a call to {least} or more members of this session", came, "Begin a new session for others.")
    if not any(set(call.cohort) <= set(group) for group in bond.groups):
        do = "Call each group of the session by itself."
        raise CohortError("a call to silos of one group", "one to silos of several", do)
    return Scope(bond, call.label, call.cohort)


def transcript(agreement: bytes, adverts: Sequence[Advert], openings: Sequence[Opening]) -> bytes:
    """T: SHA-256 over the agreement's digest, and all adverts and openings by name, as they were signed."""
    ordered: list[Advert | Opening] = [*sorted(adverts, key=_name), *sorted(openings, key=_name)]
    return digest(spell("transcript", agreement, *map(_said, ordered)))


def channel(pair: Pair, public: bytes, bond: Bond) -> bytes:
    """The key that two silos share for the session."""
    return hkdf(pair.agree(public), bond.transcript, "channel")


def box_key(shared: bytes, sum_: Scope, sender: str, receiver: str) -> bytes:
    """The key of the one box that `sender` makes for `receiver` in this sum."""
    return hkdf(shared, sum_.bond.transcript, "box", *sum_.words, sender, receiver)


def box_context(sum_: Scope, sender: str, receiver: str, deposit: Deposit | Parcel, box: Box | Parcel) -> bytes:
    """What a box is bound to: all that its receiver will use beside its content."""
    said = deposit.public, deposit.commitment, box.of_self, box.of_pair
    return spell("box", sum_.bond.transcript, *sum_.words, sender, receiver, *said)


def pad(shared: bytes, sum_: Scope, statement: bytes, sender: str, receiver: str) -> bytes:
    """The one-time pad for what `sender` locks for `receiver`: only who saw the same statement can compute it."""
    return hkdf(shared, sum_.bond.transcript, "pad", *sum_.words, statement, sender, receiver)


def pair_seed(pair: Pair, public: bytes, sum_: Scope, task: str, one: str, other: str) -> bytes:
    """The seed of the mask between two silos. It depends on the task: masks for different models never cancel."""
    word = sum_.bond.agreement.word
    return hkdf(pair.agree(public), sum_.bond.transcript, "mask", *sum_.words, task, word, *sorted((one, other)))


def self_seed(secret: bytes, sum_: Scope, task: str, name: str) -> bytes:
    """The seed of the mask that hides a silo's vector even from who knows all its pair masks."""
    return hkdf(secret, sum_.bond.transcript, "self", *sum_.words, task, sum_.bond.agreement.word, name)


def sign_of(one: str, other: str) -> int:
    """Whether `one` adds the mask it shares with `other`, or subtracts it."""
    return 1 if one < other else -1


def xor(one: bytes, other: bytes) -> bytes:
    """Two strings of 32 bytes, bit by bit: locks with a pad, and unlocks."""
    return (int.from_bytes(one) ^ int.from_bytes(other)).to_bytes(32)


@lru_cache(maxsize=4096)
def _said(message: Advert | Opening) -> bytes:
    return name_of(message)


def _name(message: Advert | Opening) -> str:
    return message.name
