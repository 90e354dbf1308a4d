"""The coordinator's side of a secure sum: `Session` gathers the silos once, `Round` takes one sum over them.

    Session.begin ─▶ invite ─▶ adverts ─▶ openings ─▶ call
    Round: deposit … ─▶ deliveries ─▶ masked … ─▶ survivors ─▶ reveal … ─▶ finish

It learns the sum over the survivors and nothing else, whether it likes that or not: see `silo.py`. It has no secret but
the key that it signs with, and holds one vector, to which each arriving one is added. Who lies is named in `liars`.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType

import numpy as np

from ..errors import CohortError, WireError
from . import masks, schedule, shamir
from .keys import SIZE, Entropy, Identity, Pair, Secretive, unseal, usable
from .messages import (
    CHECK,
    KEY,
    TAG,
    WORDS,
    Advert,
    Agreement,
    Call,
    Delivery,
    Deposit,
    Invitation,
    Masked,
    Opening,
    Parcel,
    Reveal,
    Survivors,
    digest,
    genuine,
    name_of,
    sign,
)  # fmt: skip
from .schedule import Bond


@dataclass(frozen=True, repr=False)
class Session(Secretive):
    """A session being gathered, or gathered: then it has a `bond`. `liars`: who was left out, and why."""

    identity: Identity
    agreement: Agreement
    nonce: bytes
    gathered: tuple[Advert, ...] = ()
    opened: tuple[Opening, ...] = ()
    liars: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def begin(cls, identity: Identity, agreement: Agreement, entropy: Entropy = secrets.token_bytes) -> Session:
        return cls(identity, agreement, entropy(SIZE))

    def invite(self) -> Invitation:
        return sign(Invitation(self.agreement.digest, self.nonce), self.identity)

    def adverts(self, adverts: Iterable[Advert]) -> Session:
        """The session with its `gathered` adverts, which everybody must see. A CohortError when too few are sound."""
        taken: dict[str, Advert] = {}
        liars: dict[str, str] = {}
        for advert in adverts:
            if why := self._fault(advert, taken):
                liars[advert.name] = why
            else:
                taken[advert.name] = advert
        self._enough(len(taken), liars)
        gathered = tuple(taken[name] for name in sorted(taken))
        return replace(self, gathered=gathered, liars=MappingProxyType(liars))

    def openings(self, openings: Iterable[Opening]) -> Session:
        """The session with its `bond`. A CohortError unless everybody opened: begin a new one without the missing."""
        commitments = {advert.name: advert.commitment for advert in self.gathered}
        opened = {
            opening.name: opening for opening in openings
            if opening.session == self.session and digest(opening.nonce) == commitments.get(opening.name)
        }  # fmt: skip
        if missing := sorted(commitments.keys() - opened.keys()):
            raise CohortError(
                "an opening of everybody who sent an advert",
                f"none of {', '.join(missing)}",
                "Begin a new session without them: joint randomness that some may withhold is not random.",
                where="secure session",
            )
        return replace(self, opened=tuple(opened[name] for name in sorted(opened)))

    def call(self, label: str, cohort: Iterable[str]) -> Call:
        """A call for a sum; the first goes out with `opened`, later ones ride in a statement of survivors."""
        return Call(self.session, label, tuple(sorted(cohort)))

    @cached_property
    def session(self) -> bytes:
        """The name of the session in every message."""
        return name_of(self.invite())

    @cached_property
    def bond(self) -> Bond:
        """What the members share, once all have opened."""
        shared = schedule.transcript(self.agreement.digest, self.gathered, self.opened)
        return Bond(self.agreement, self.session, shared, self.members)

    @property
    def members(self) -> tuple[str, ...]:
        """Sorted by name; nobody before all have opened."""
        return tuple(opening.name for opening in self.opened)

    def _fault(self, advert: Advert, taken: Mapping[str, Advert]) -> str:
        """Why an advert cannot be shown to others; "" if it can, or was shown before."""
        if advert.session != self.session or not genuine(advert, self.agreement.roster.get(advert.name, b"")):
            return "an advert that is not signed by it for this session"
        if not usable(advert.channel):
            return "a key of low order"
        if advert.channel in {other.channel for other in taken.values() if other.name != advert.name}:
            return "a key that another silo has"
        if taken.get(advert.name, advert) != advert:
            return "two different adverts"
        return ""

    def _enough(self, count: int, liars: Mapping[str, str]) -> None:
        if count < self.agreement.minimum:
            raise CohortError(
                f"{self.agreement.minimum} silos or more",
                f"{count}, and refused: {_listed(liars)}",
                "Wait for more silos, or agree on a lower [cohort] minimum.",
                where="secure session",
            )


class Round:
    """One sum. Messages may come in any order within their step; each `True` says that one was taken.

    `label`, `cohort`: as called. `task`: digest of the task to mask for. `size`: of the vector, in words. `liars`: who
    sent what no honest silo would have sent, and what; `disputes`: pairs of whom one lied, and nobody can tell which.
    """

    def __init__(self, session: Session, label: str, cohort: Iterable[str], task: str, size: int) -> None:
        self.session, self.task, self.size = session, task, size
        self.call = session.call(label, cohort)
        self.scope = schedule.scope(session.bond, self.call)
        self.deposits: dict[str, Deposit] = {}
        self.next: dict[str, Deposit] = {}  # for the next sum, as they rode in reveals
        self.liars: dict[str, str] = {}
        self.disputes: set[tuple[str, str]] = set()
        self._total = np.zeros(size, WORDS[session.agreement.word])
        self._participants: tuple[str, ...] | None = None
        self._masked: set[str] = set()
        self._statement: Survivors | None = None
        self._reveals: dict[str, Reveal] = {}
        self._finished = False

    def deposit(self, deposit: Deposit) -> bool:
        """Takes a silo's deposit, up to `deliveries`."""
        name = deposit.name
        if self._participants is not None or name in self.deposits or not self._mine(deposit, "a deposit"):
            return False
        if deposit.call != name_of(self.call) or deposit.boxes.keys() != self._near[name].keys():
            return self._lies(name, "a deposit for another call, or not with a box for each neighbour")
        if not usable(deposit.public):
            return self._lies(name, "a deposit with a key of low order")
        self.deposits[name] = deposit
        return True

    def deliveries(self) -> dict[str, Delivery]:
        """For each participant its parcels; deposits that come later are late. A CohortError when too few came.

        Who has fewer neighbours than the threshold cannot take part, and leaves its neighbours with one less.
        """
        if self._participants is None:
            self._participants = self._core(self.deposits.keys())
        self._enough(len(self._participants), "deposits")
        return {name: self._delivery(name) for name in self._participants}

    def masked(self, masked: Masked, words: masks.Words) -> bool:
        """Adds a silo's vector to the sum, up to `survivors`."""
        name = masked.name
        late = self._participants is None or self._statement is not None or name in self._masked
        if late or not self._mine(masked, "a masked vector"):
            return False
        if name not in (self._participants or ()):
            return False
        if words.dtype != self._total.dtype or words.shape != self._total.shape or masked.task != self.task:
            return self._lies(name, "a vector of another shape, or for another task")
        if digest(np.ascontiguousarray(words).data) != masked.words:
            return self._lies(name, "words that are not those it signed")
        np.add(self._total, words, out=self._total)
        self._masked.add(name)
        return True

    @property
    def arrived(self) -> tuple[str, ...]:
        """Whose vectors are in the sum, sorted."""
        return tuple(sorted(self._masked))

    def survivors(self, next: Call | None = None) -> Survivors:
        """The statement to put to all survivors, always the same; vectors that come later are late.

        A CohortError, before anything is asked, when the sum could not be found.
        """
        if self._statement is None:
            self._enough(len(self._masked), "masked vectors")
            self._reachable()
            self._statement = sign(
                Survivors(
                    self.session.session, self.call.label, name_of(self.call), self.task, self._participants or (),
                    tuple(sorted(self._masked)), next,
                ),
                self.session.identity,
            )  # fmt: skip
        return self._statement

    def reveal(self, reveal: Reveal) -> bool:
        """Takes a survivor's answer, and the deposit for the next sum that rides in it."""
        name = reveal.name
        if self._statement is None or self._finished or name in self._reveals or not self._mine(reveal, "a reveal"):
            return False
        if name not in self._masked:
            return False
        near = self._near[name].keys()
        size = KEY * len(near & self._delivered) + TAG
        if reveal.statement != name_of(self._statement):
            return self._lies(name, "an answer to another statement")
        if reveal.keys.keys() != near & self._masked or len(reveal.sealed) != size:
            return self._lies(name, "a reveal that is not about its neighbours")
        self._reveals[name] = reveal
        if reveal.next is not None:
            self.next[name] = reveal.next
        return True

    def finish(self) -> masks.Words:
        """The exact sum over the survivors, modulo 2^word.

        A CohortError when reveals are missing (ask again when more have come), or when a silo dealt so falsely that its
        mask cannot be taken off: it is named, in the error and in `liars`.
        """
        if not self._finished:
            secrets_ = self._recovered(self._shares())
            masks.add(self._total, *self._left(secrets_))
            self._finished = True
        return self._total

    def _core(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of `names` that have enough neighbours among those of `names` that do (a core of the graph)."""
        left = set(names)
        while few := {name for name in left if len(left & self._near[name].keys()) < self.scope.threshold}:
            left -= few
        return tuple(sorted(left))

    def _delivery(self, name: str) -> Delivery:
        parcels = {}
        for dealer in self._near[name].keys() & self._delivered:
            deposit = self.deposits[dealer]
            box = deposit.boxes[name]
            parcels[dealer] = Parcel(deposit.public, deposit.commitment, box.of_self, box.of_pair, box.sealed)
        return Delivery(self.session.session, self.call.label, parcels)

    def _reachable(self) -> None:
        """Whether every secret that must be found has enough holders among the survivors."""
        for name in self._participants or ():
            left = len(self._masked & self._near[name].keys())
            if left < self.scope.threshold:
                raise self._too_few(f"neighbours of {name} with a masked vector", left, self.scope.threshold)

    def _shares(self) -> dict[str, dict[int, bytes]]:
        """For each participant the shares of its one secret that opened and are those it dealt, by their points."""
        shares: dict[str, dict[int, bytes]] = {name: {} for name in self._participants or ()}
        for holder in sorted(self._reveals):
            for dealer, share in self._values(holder).items():
                box = self.deposits[dealer].boxes[holder]
                if digest(share) == (box.of_self if dealer in self._masked else box.of_pair):
                    shares[dealer][self._near[dealer][holder]] = share
                else:
                    self._lies(holder, f"a share that is not the one that {dealer} dealt")
        return shares

    def _values(self, holder: str) -> dict[str, bytes]:
        """What a survivor revealed, by its neighbours; nothing, as long as too few were shown the same statement."""
        locks = self._unlocked(holder)
        if len(locks) < self.scope.threshold:
            return {}
        reveal = self._reveals[holder]
        try:
            blob = unseal(shamir.recover(self._enough_of(locks)), reveal.sealed, reveal.statement)
        except WireError:
            self._lies(holder, "values that its own key does not open")
            return {}
        near = sorted(self._delivered & self._near[holder].keys())
        return {name: blob[KEY * i : KEY * (i + 1)] for i, name in enumerate(near)}

    def _unlocked(self, holder: str) -> dict[int, bytes]:
        """The shares of the key of a survivor's values, by their points."""
        out = {}
        for name, key in self._reveals[holder].keys.items():
            if name in self._reveals:
                pad = self._reveals[name].keys[holder].key
                if digest(pad)[:CHECK] == key.check:
                    out[self._near[holder][name]] = schedule.xor(key.lock, pad)
                else:
                    self._dispute(holder, name)
        return out

    def _recovered(self, shares: Mapping[str, Mapping[int, bytes]]) -> dict[str, bytes]:
        """The self secret of each survivor, the pair secret of each other participant, as their deposits promised."""
        if missing := {name: len(held) for name, held in shares.items() if len(held) < self.scope.threshold}:
            name = min(missing, key=lambda name: (missing[name], name))
            raise self._too_few(f"shares of the secret of {name} that opened", missing[name], self.scope.threshold)
        return {name: self._secret(name, held) for name, held in shares.items()}

    def _secret(self, name: str, held: Mapping[int, bytes]) -> bytes:
        deposit = self.deposits[name]
        try:
            secret = shamir.recover(self._enough_of(held))
            known = (
                digest(secret) == deposit.commitment if name in self._masked else Pair(secret).public == deposit.public
            )
        except WireError:
            known = False
        if known:
            return secret
        self._lies(name, "shares of another secret than it published")
        raise CohortError(
            "secrets that are those their silos published",
            f"another of {name}, which dealt false shares",
            f"Begin another sum, without {name}.",
            where=self.call.label,
        )

    def _left(self, secrets_: Mapping[str, bytes]) -> tuple[list[bytes], list[int]]:
        """The masks that are in the sum: every survivor's own, and those that it shares with the dead."""
        seeds = [schedule.self_seed(secrets_[name], self.scope, self.task, name) for name in sorted(self._masked)]
        signs = [-1] * len(seeds)
        for dead in sorted(self._delivered - self._masked):
            pair = Pair(secrets_[dead])
            for name in self._near[dead]:
                if name in self._masked:
                    public = self.deposits[name].public
                    seeds.append(schedule.pair_seed(pair, public, self.scope, self.task, dead, name))
                    signs.append(schedule.sign_of(dead, name))
        return seeds, signs

    def _enough_of(self, held: Mapping[int, bytes]) -> dict[int, bytes]:
        """As many shares as it takes, of the lowest points: fewer different choices are fewer weights to compute."""
        return {point: held[point] for point in sorted(held)[: self.scope.threshold]}

    @cached_property
    def _near(self) -> dict[str, dict[str, int]]:
        """Each silo's neighbours, sorted, and where they stand on its polynomials."""
        return {name: self.scope.points(name) for name in self.call.cohort}

    @property
    def _delivered(self) -> frozenset[str]:
        return frozenset(self._participants or ())

    def _mine(self, message: Deposit | Masked | Reveal, what: str) -> bool:
        """Whether a message is of this sum, and its sender's own; one of another may be a replay, nobody's fault."""
        if (message.session, message.label) != (self.session.session, self.call.label):
            return False
        if message.name not in self.call.cohort:
            return False
        if not genuine(message, self.session.agreement.roster[message.name]):
            return self._lies(message.name, f"{what} in its name that it did not sign")
        return True

    def _lies(self, name: str, why: str) -> bool:
        self.liars.setdefault(name, why)
        return False

    def _dispute(self, one: str, other: str) -> None:
        """Of two who disagree on a pad one lied; who disagrees with more than can be corrupt is the one."""
        self.disputes.add((min(one, other), max(one, other)))
        often = Counter(name for pair in self.disputes for name in pair)
        for name in (one, other):
            if often[name] > self.session.agreement.colluders:
                self._lies(name, "pads that too many others contradict")

    def _enough(self, count: int, what: str) -> None:
        least = self.session.agreement.minimum
        if count < least:
            raise self._too_few(what, count, least)

    def _too_few(self, what: str, count: int, least: int) -> CohortError:
        return CohortError(
            f"{least} or more {what}",
            f"{count}; lied: {_listed(self.liars)}",
            "Begin another sum, under a new label; nothing of this one was learned.",
            where=self.call.label,
        )


def _listed(liars: Mapping[str, str]) -> str:
    return "; ".join(f"{name} ({why})" for name, why in sorted(liars.items())) or "nobody"
