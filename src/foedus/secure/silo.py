"""The silo's side of a secure sum, as a value: every step returns the next `Member` and what to send. Read this first.

    join ─▶ open ─▶ deposit ─▶ deliver ─▶ mask ─▶ reveal        once a session; then, for each sum:
                       ▲                            │           deliver, mask, reveal, with the next deposit
                       └────────── next call ───────┘           riding in the reveal

A silo believes nobody: the roster and the coordinator's key come from the agreement that it signed. A step that is
refused (`SiloError`) leaves the value as it was, and the value goes forward only: keep the newest. Each label is dealt
for once, masked once, and revealed for one statement.

What the coordinator can make of honest silos' answers, whatever it says to whom, is a sum in which every honest silo
has at least t − c honest neighbours beside it (t: the threshold, c: corrupt neighbours). Two rules give that. A reveal
holds one value a neighbour, so that 2t > k + c keeps both secrets of one silo from opening. And a reveal opens only if
t neighbours of the silo that made it were shown the same statement, byte for byte.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import MappingProxyType
from typing import TypeVar

from ..errors import CohortError, GuaranteeError, SiloError, WireError
from . import masks, schedule, shamir
from .keys import Entropy, Identity, Pair, Secretive, seal, unseal, usable
from .messages import (
    CHECK,
    KEY,
    WORDS,
    Advert,
    Agreement,
    Box,
    Call,
    Delivery,
    Deposit,
    Invitation,
    Key,
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
from .schedule import Bond, Scope

KEPT = 4
"""Sums that a silo keeps open at a time; the secrets of older ones are forgotten."""


@dataclass(frozen=True, repr=False)
class _Joined(Secretive):
    session: bytes
    pair: Pair
    nonce: bytes
    advert: Advert


@dataclass(frozen=True, repr=False)
class _Opened(Secretive):
    joined: _Joined
    adverts: tuple[Advert, ...]


@dataclass(frozen=True, repr=False)
class _Bound(Secretive):
    """An established session, with the keys of the channels to one's neighbours."""

    bond: Bond
    channels: Mapping[str, bytes]


@dataclass(frozen=True, repr=False)
class _Dealt(Secretive):
    """`pair` and `secret` of one sum; others hold shares of both."""

    sum_: Scope
    pair: Pair
    secret: bytes
    deposit: Deposit


@dataclass(frozen=True, repr=False)
class _Ready(Secretive):
    """The seeds of one's masks, and the shares one holds: for each neighbour of its self and of its pair secret."""

    sum_: Scope
    task: str
    seeds: tuple[bytes, ...]
    signs: tuple[int, ...]
    shares: Mapping[str, tuple[bytes, bytes]]


@dataclass(frozen=True, repr=False)
class _Sent(Secretive):
    """The words are masked; of the secrets, only the shares of others are left."""

    sum_: Scope
    task: str
    shares: Mapping[str, tuple[bytes, bytes]]


@dataclass(frozen=True, repr=False)
class _Revealed(Secretive):
    statement: bytes
    reveal: Reveal


_Phase = _Dealt | _Ready | _Sent | _Revealed
P = TypeVar("P", _Dealt, _Ready, _Sent)


@dataclass(frozen=True, repr=False)
class Member(Secretive):
    """A silo in one session. `entropy`: where its secrets come from; only a simulator passes another."""

    name: str
    identity: Identity
    agreement: Agreement
    entropy: Entropy = secrets.token_bytes
    _session: _Joined | _Opened | _Bound | None = None
    _sums: Mapping[str, _Phase] = field(default_factory=lambda: MappingProxyType({}))
    _used: frozenset[str] = frozenset()

    def join(self, invitation: Invitation) -> tuple[Member, Advert]:
        """Takes part: a fresh channel key, and a commitment to this silo's part of the joint randomness."""
        if self._session is not None:
            raise self._refused("one session for a member", "a second invitation", "Make a new Member for it.")
        if invitation.agreement != self.agreement.digest:
            raise self._refused("an invitation to what was agreed", "another agreement", "Compare the treaties.")
        if not genuine(invitation, self.agreement.coordinator):
            raise self._forged("an invitation")
        if self.agreement.roster.get(self.name) != self.identity.public:
            raise self._refused("this identity in the roster", "another, or none", "Add its public key to the treaty.")
        pair, nonce, session = Pair.fresh(self.entropy), self.entropy(KEY), name_of(invitation)
        advert = sign(Advert(session, self.name, pair.public, digest(nonce)), self.identity)
        return replace(self, _session=_Joined(session, pair, nonce, advert)), advert

    def open(self, adverts: Sequence[Advert]) -> tuple[Member, Opening]:
        """Checks who takes part, then opens the commitment."""
        if not isinstance(joined := self._session, _Joined):
            raise self._late("adverts")
        self._check_adverts(joined, adverts)
        opening = Opening(joined.session, self.name, joined.nonce)
        return replace(self, _session=_Opened(joined, tuple(adverts))), opening

    def deposit(self, openings: Sequence[Opening] | None, call: Call) -> tuple[Member, Deposit]:
        """Deals this silo's two secrets for a sum among its neighbours; the same call again gets the same answer.

        `openings`: of everybody, with the first call of a session; later ones are not looked at.
        """
        me = self if openings is None or isinstance(self._session, _Bound) else self._establish(openings)
        phase = me._sums.get(call.label)
        if isinstance(phase, _Dealt) and phase.deposit.call == name_of(call):
            return me, phase.deposit
        sum_, pair, secret = me._scope(call), Pair.fresh(self.entropy), shamir.fresh(self.entropy)
        bare = Deposit(call.session, self.name, call.label, name_of(call), pair.public, digest(secret), {})
        deposit = sign(replace(bare, boxes=me._boxes(sum_, bare, pair, secret)), self.identity)
        me = me._with(call.label, _Dealt(sum_, pair, secret, deposit))
        return replace(me, _used=me._used | {call.label}), deposit

    def deliver(self, delivery: Delivery, task: str) -> Member:
        """Opens the neighbours' boxes and derives the masks. `task`: digest of the task that will be masked for.

        This silo's own secrets are forgotten here; a neighbour that dealt falsely is named, and the sum goes on without
        this silo.
        """
        dealt = self._phase(delivery.label, _Dealt, delivery.session)
        sum_ = dealt.sum_
        if not set(delivery.parcels) <= set(sum_.neighbours(self.name)) or len(delivery.parcels) < sum_.threshold:
            expected = f"parcels of {sum_.threshold} or more of this silo's neighbours, and of no one else"
            raise self._refused(expected, f"{len(delivery.parcels)}", "Leave this silo out of the sum.")
        shares = {name: self._opened(sum_, name, parcel) for name, parcel in sorted(delivery.parcels.items())}
        pairs = [self._pair_seed(dealt, task, name, delivery.parcels[name]) for name in shares]
        seeds = (schedule.self_seed(dealt.secret, sum_, task, self.name), *pairs)
        signs = (1, *(schedule.sign_of(self.name, name) for name in shares))
        return self._with(delivery.label, _Ready(sum_, task, seeds, signs, shares))

    def mask(self, words: masks.Words) -> tuple[Member, Masked]:
        """Masks a vector, in place, for the sum that was delivered last; it is then ready to leave."""
        label, ready = self._ready()
        if words.dtype != WORDS[self.agreement.word]:
            expected = f"words of {self.agreement.word} bits"
            raise self._refused(expected, f"{words.dtype}", "Lay the update out as the treaty's [secure] word says.")
        masks.add(words, ready.seeds, ready.signs)
        masked = Masked(ready.sum_.bond.session, self.name, label, ready.task, digest(words.data))
        me = self._with(label, _Sent(ready.sum_, ready.task, ready.shares))
        return me, sign(masked, self.identity)

    def reveal(self, survivors: Survivors) -> tuple[Member, Reveal]:
        """Answers the coordinator's statement, once; the same statement again gets the same answer."""
        statement, phase = name_of(survivors), self._sums.get(survivors.label)
        if isinstance(phase, _Revealed) and phase.statement == statement:
            return self, phase.reveal
        sent = self._phase(survivors.label, _Sent, survivors.session)
        self._check_survivors(sent, survivors)
        reveal = self._reveal(sent, survivors, statement)
        me, deposit = self, None
        if survivors.next is not None and self.name in survivors.next.cohort:
            me, deposit = self.deposit(None, survivors.next)
        reveal = sign(replace(reveal, next=deposit), self.identity)
        return me._with(survivors.label, _Revealed(statement, reveal)), reveal

    def _check_adverts(self, joined: _Joined, adverts: Sequence[Advert]) -> None:
        names, channels = {advert.name for advert in adverts}, {advert.channel for advert in adverts}
        if joined.advert not in adverts or len(channels) < len(adverts) or len(names) < len(adverts):
            raise self._refused(
                "this silo's advert as it was sent, and one name and one key for each silo",
                f"{len(adverts)} adverts of {len(names)} names with {len(channels)} keys",
                "Do not go on with this coordinator, unless it can explain them.",
            )
        if len(adverts) < self.agreement.minimum:
            raise self._refused(f"{self.agreement.minimum} silos or more", f"{len(adverts)}", "Wait for more of them.")
        for advert in adverts:
            public = self.agreement.roster.get(advert.name, b"")
            if advert.session != joined.session or not _sound(advert, public):
                raise self._forged(f"the advert of {advert.name}")

    def _establish(self, openings: Sequence[Opening]) -> Member:
        if not isinstance(opened := self._session, _Opened):
            raise self._late("openings")
        adverts, session = {advert.name: advert for advert in opened.adverts}, opened.joined.session
        if sorted(opening.name for opening in openings) != sorted(adverts):
            raise self._refused("an opening of everybody who sent an advert", "others", "Begin a new session.")
        for opening in openings:
            if opening.session != session or digest(opening.nonce) != adverts[opening.name].commitment:
                raise self._forged(f"the opening of {opening.name}")
        shared = schedule.transcript(self.agreement.digest, opened.adverts, openings)
        bond = Bond(self.agreement, session, shared, tuple(sorted(adverts)))
        with self._own_words():
            near = bond.members if bond.circle is None else bond.circle[0][self.name]
        channels = {
            name: schedule.channel(opened.joined.pair, adverts[name].channel, bond)
            for name in near
            if name != self.name
        }
        return replace(self, _session=_Bound(bond, channels))

    @property
    def _bound(self) -> _Bound:
        if not isinstance(self._session, _Bound):
            raise self._late("a call without openings")
        return self._session

    def _scope(self, call: Call) -> Scope:
        with self._own_words():
            sum_ = schedule.scope(self._bound.bond, call)
            threshold = sum_.threshold
        if call.label in self._used or self.name not in call.cohort:
            came = f'"{call.label}", {"which was used before" if call.label in self._used else "not for this silo"}'
            raise self._refused("a call to this silo, with a new label", came, "Give every sum a label of its own.")
        if len(sum_.neighbours(self.name)) < threshold:
            came = f"{len(sum_.neighbours(self.name))} of them"
            raise self._refused(f"{threshold} neighbours or more", came, "Call more silos, or begin a new session.")
        return sum_

    def _boxes(self, sum_: Scope, deposit: Deposit, pair: Pair, secret: bytes) -> dict[str, Box]:
        points = sum_.points(self.name)
        of_self = shamir.split(secret, sum_.threshold, list(points.values()), self.entropy)
        of_pair = shamir.split(pair.secret, sum_.threshold, list(points.values()), self.entropy)
        return {
            name: self._box(sum_, deposit, name, mine, ours)
            for name, mine, ours in zip(points, of_self, of_pair, strict=True)
        }

    def _box(self, sum_: Scope, deposit: Deposit, name: str, of_self: bytes, of_pair: bytes) -> Box:
        box = Box(digest(of_self), digest(of_pair), b"")
        key = schedule.box_key(self._bound.channels[name], sum_, self.name, name)
        context = schedule.box_context(sum_, self.name, name, deposit, box)
        return replace(box, sealed=seal(key, of_self + of_pair, context))

    def _opened(self, sum_: Scope, name: str, parcel: Parcel) -> tuple[bytes, bytes]:
        """The two shares in a neighbour's box, checked against what it told everybody."""
        key = schedule.box_key(self._bound.channels[name], sum_, name, self.name)
        try:
            shares = unseal(key, parcel.sealed, schedule.box_context(sum_, name, self.name, parcel, parcel))
        except WireError:
            raise self._accuses(name, "a box that does not open, or was changed on the way") from None
        of_self, of_pair = shares[:KEY], shares[KEY:]
        if (digest(of_self), digest(of_pair)) != (parcel.of_self, parcel.of_pair):
            raise self._accuses(name, "shares that are not those it promised")
        return of_self, of_pair

    def _pair_seed(self, dealt: _Dealt, task: str, name: str, parcel: Parcel) -> bytes:
        try:
            return schedule.pair_seed(dealt.pair, parcel.public, dealt.sum_, task, self.name, name)
        except WireError:
            raise self._accuses(name, "a key of low order") from None

    def _check_survivors(self, sent: _Sent, said: Survivors) -> None:
        sum_, (participants, survivors) = sent.sum_, (set(said.participants), set(said.survivors))
        near = set(sum_.neighbours(self.name))
        if not genuine(said, self.agreement.coordinator):
            raise self._forged("the statement of survivors")
        if said.call != name_of(sum_.call) or said.task != sent.task:
            raise self._refused("a statement about the call and task of this sum", "another", "Compare what was sent.")
        if not (self.name in survivors <= participants <= set(sum_.cohort)):
            raise self._refused("survivors, this silo among them, of the cohort", "others", "Compare what was sent.")
        if near & participants != set(sent.shares):
            raise self._refused("the neighbours whose parcels came", "others", "Compare what was sent.")
        if len(survivors) < self.agreement.minimum or len(near & survivors) < sum_.threshold:
            raise self._refused(
                f"{self.agreement.minimum} survivors or more, {sum_.threshold} of them neighbours of this silo",
                f"{len(survivors)}, {len(near & survivors)} of them neighbours",
                "Give this sum up, and begin another.",
            )

    def _reveal(self, sent: _Sent, said: Survivors, statement: bytes) -> Reveal:
        sum_, survivors = sent.sum_, set(said.survivors)
        values = [mine if name in survivors else ours for name, (mine, ours) in sent.shares.items()]
        key = shamir.fresh(self.entropy)
        sealed = seal(key, b"".join(values), statement)
        points = sum_.points(self.name)
        locks = shamir.split(key, sum_.threshold, list(points.values()), self.entropy)
        keys = {
            name: self._key(sum_, statement, name, share)
            for name, share in zip(points, locks, strict=True)
            if name in survivors
        }
        return Reveal(said.session, self.name, said.label, statement, sealed, keys)

    def _key(self, sum_: Scope, statement: bytes, name: str, share: bytes) -> Key:
        shared = self._bound.channels[name]
        pad = schedule.pad(shared, sum_, statement, self.name, name)
        return Key(
            schedule.xor(share, pad), schedule.pad(shared, sum_, statement, name, self.name), digest(pad)[:CHECK]
        )

    def _phase(self, label: str, kind: type[P], session: bytes | None = None) -> P:
        """Where the sum with this label is, if it is there. Messages of another session or time are refused."""
        phase = self._sums.get(label)
        if not isinstance(phase, kind) or session not in (None, self._bound.bond.session):
            raise self._late(f'a message about "{label}"')
        return phase

    def _ready(self) -> tuple[str, _Ready]:
        """The sum that was delivered and not masked for: there is at most one."""
        for label, phase in self._sums.items():
            if isinstance(phase, _Ready):
                return label, phase
        raise self._late("words to be masked")

    def _with(self, label: str, phase: _Phase) -> Member:
        """The sum at its next phase. Older ones are forgotten, and so is one that waits for words when another does."""
        others = {
            other: kept for other, kept in self._sums.items()
            if other != label and not (isinstance(kept, _Ready) and isinstance(phase, _Ready))
        }  # fmt: skip
        newest = [*others.items(), (label, phase)][-KEPT:]
        return replace(self, _sums=MappingProxyType(dict(newest)))

    @contextmanager
    def _own_words(self) -> Iterator[None]:
        """What the agreement forbids, this silo refuses."""
        try:
            yield
        except (CohortError, GuaranteeError) as error:
            raise self._refused(error.expected, error.came, error.do) from error

    def _accuses(self, name: str, came: str) -> SiloError:
        return self._refused(f"shares that {name} dealt", came, f"Find out whether {name} or the coordinator lied.")

    def _forged(self, what: str) -> SiloError:
        return self._refused(f"{what}, signed by whom the treaty names", "another", "Do not go on with who sent it.")

    def _late(self, what: str) -> SiloError:
        return self._refused("a message for the step that comes next", what, "It is late, early, or came twice.")

    def _refused(self, expected: str, came: str, do: str) -> SiloError:
        return SiloError(expected, came, do, where=self.name)


@lru_cache(maxsize=4096)
def _sound(advert: Advert, public: bytes) -> bool:
    """Whether an advert is genuine and its key usable. Remembered: many members may live in one process."""
    return genuine(advert, public) and usable(advert.channel)
