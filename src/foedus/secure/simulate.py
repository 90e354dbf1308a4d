"""A deterministic simulator: silos that vanish, messages that come late, twice, again, out of order, or damaged.

`begin` gathers a session, `take` takes one sum under a `Schedule`; the same seed gives the same bytes. All messages
pass as bytes. `grouped` sums over many silos in sessions of their own, `regional` over two levels. For simulation only:
here secrets come from a seed.

    python -m foedus.secure.simulate --runs 1000 --silos 100
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Any, TypeVar

import numpy as np

from ..errors import CohortError, SiloError, WireError
from . import attack
from .keys import Entropy, Identity
from .masks import Words
from .messages import (
    Agreement,
    Delivery,
    Deposit,
    Masked,
    Message,
    Reveal,
    Survivors,
    pack,
    unpack,
)  # fmt: skip
from .server import Round, Session
from .silo import Member

GONE = ("deposit", "deliver", "mask", "reveal")
"""The steps before which a silo may vanish, for the rest of a sum."""
STEPS = {"deposit": Deposit, "deliver": Delivery, "mask": Masked, "survivors": Survivors, "reveal": Reveal}
"""The steps of a sum, and what passes in each: "deliver" and "survivors" go to a silo, the others come from it."""
FAULTS = ("late", "duplicated", "replayed", "altered")
"""What may happen to a message: it comes when the step is over, twice, after an old one, or with one bit flipped."""
TASK = "5a" * 32
T = TypeVar("T")


@dataclass(frozen=True)
class Schedule:
    """What goes wrong in one sum. `gone`: silo → the step before which it vanishes. `faults`: (step, silo) → what
    happens to that message. `reordered`: messages arrive in the reverse order.
    """

    gone: Mapping[str, str] = field(default_factory=dict)
    faults: Mapping[tuple[str, str], str] = field(default_factory=dict)
    reordered: bool = False


@dataclass(frozen=True)
class View:
    """All that the coordinator sees of one sum."""

    round: Round
    delivered: Mapping[str, Delivery]
    masked: Mapping[str, tuple[Masked, Words]]
    answers: tuple[tuple[Survivors, Reveal], ...]


@dataclass(frozen=True)
class Outcome:
    """`total`: the sum over `survivors`; None after an abort, and `error` says why. `refused`: what silos refused."""

    total: Words | None
    survivors: tuple[str, ...]
    error: str
    refused: tuple[str, ...]
    view: View


@dataclass(frozen=True)
class World:
    """A session and its silos, between two sums. `dealt`: deposits that came ahead, by label. `past`: old messages, by
    step and silo, for replays.
    """

    session: Session
    members: Mapping[str, Member]
    dealt: Mapping[str, Mapping[str, Deposit]] = field(default_factory=dict)
    past: Mapping[tuple[str, str], tuple[bytes, Words | None]] = field(default_factory=dict)


def entropy(seed: int, *names: str | int) -> Entropy:
    """A source of bytes of its own for these names: SHAKE-256 of them and of how often it was asked."""
    asked = 0

    def draw(count: int) -> bytes:
        nonlocal asked
        asked += 1
        return hashlib.shake_256(repr((seed, *names, asked)).encode()).digest(count)

    return draw


def names(count: int, prefix: str = "silo") -> list[str]:
    return [f"{prefix}{i:0{len(str(count - 1))}}" for i in range(count)]


def agree(
    silos: Sequence[str], seed: int = 0, *, word: int = 32, corrupt: str = "0", dropout: str = "0", minimum: int = 3
) -> tuple[Agreement, Identity, dict[str, Identity]]:
    """An agreement among silos of these names, and the identities of the coordinator and of each."""
    coordinator = Identity.fresh(entropy(seed, "coordinator"))
    identities = {name: Identity.fresh(entropy(seed, "identity", name)) for name in silos}
    roster = {name: identity.public for name, identity in identities.items()}
    shares = Fraction(corrupt), Fraction(dropout)
    agreement = Agreement("11" * 32, "22" * 32, roster, coordinator.public, word, *shares, minimum)
    return agreement, coordinator, identities


def begin(agreement: Agreement, coordinator: Identity, identities: Mapping[str, Identity], seed: int = 0) -> World:
    """A session of everybody."""
    session = Session.begin(coordinator, agreement, entropy(seed, "session"))
    members, adverts, openings = {}, [], []
    for name, identity in identities.items():
        member = Member(name, identity, agreement, entropy(seed, "silo", name))
        members[name], advert = member.join(session.invite())
        adverts.append(advert)
    session = session.adverts(adverts)
    for name, member in members.items():
        members[name], opening = member.open(session.gathered)
        openings.append(opening)
    return World(session.openings(openings), members)


def take(
    world: World, label: str, inputs: Mapping[str, Words], schedule: Schedule = Schedule(), *, ahead: str = ""
) -> tuple[World, Outcome]:
    """One sum over the silos of `inputs`, which stay as they are. `ahead`: the label of the next sum over the same
    silos, whose deposits ride along.
    """
    return _Sum(world, label, inputs, schedule, ahead).run()


def seen(view: View, corrupt: Mapping[str, Sequence[Member]] | None = None) -> attack.Seen:
    """What the coordinator saw of a sum, for `attack.opened`."""
    scopes = dict.fromkeys(view.round.call.cohort, view.round.scope)
    return attack.Seen(scopes, view.round.deposits, view.delivered, view.masked, view.answers, corrupt or {})


@dataclass(frozen=True)
class Grand:
    """A sum over many groups. `silos`: how many are in `total`; `lost`: which of the `groups` gave their sum up."""

    total: Words
    silos: int
    groups: int
    lost: tuple[int, ...]


def grouped(
    silos: int,
    group: int,
    inputs: Callable[[str], Words],
    gone: Callable[[str], str] = lambda name: "",
    seed: int = 0,
    **agreed: Any,
) -> Grand:
    """The sum over `silos` in groups of `group` or a few more, a session each, one after the other: the coordinator
    holds two vectors, whatever the number of silos. `gone`: silo → the step before which it vanishes; "" for who stays.
    `agreed`: see `agree`.
    """
    everybody, count = names(silos), max(1, silos // group)
    total, lost, summed = np.zeros_like(inputs(everybody[0])), [], 0
    for g in range(count):
        world = begin(*agree(everybody[g::count], seed + g, **agreed), seed + g)
        try:
            part, survivors = _straight(world, "group", inputs, gone, total.size)
        except CohortError:
            lost.append(g)
        else:
            np.add(total, part, out=total)
            summed += survivors
    return Grand(total, summed, count, tuple(lost))


def regional(
    regions: Mapping[str, Mapping[str, Words]],
    lower: Mapping[str, Schedule] | None = None,
    upper: Schedule = Schedule(),
    seed: int = 0,
    **agreed: Any,
) -> tuple[Outcome, dict[str, Outcome]]:
    """Edges → regions → server: each region sums over its edges as their coordinator, then takes part in the server's
    sum as a silo whose input is that sum. A region whose sum fails is missing above. The outcome at the server, and in
    each region.
    """
    below = {}
    for i, (region, inputs) in enumerate(regions.items()):
        world = begin(*agree(list(inputs), seed + 1 + i, **agreed), seed + 1 + i)
        below[region] = take(world, "edges", inputs, (lower or {}).get(region, Schedule()))[1]
    sums = {region: outcome.total for region, outcome in below.items() if outcome.total is not None}
    missing = dict.fromkeys(regions.keys() - sums.keys(), "deposit")
    world = begin(*agree(list(regions), seed, **agreed), seed)
    size = {region: np.zeros_like(next(iter(inputs.values()))) for region, inputs in regions.items()}
    schedule = Schedule({**upper.gone, **missing}, upper.faults, upper.reordered)
    return take(world, "regions", {**size, **sums}, schedule)[1], below


def _straight(
    world: World, label: str, inputs: Callable[[str], Words], gone: Callable[[str], str], size: int
) -> tuple[Words, int]:
    """One sum without a simulated network, each vector forgotten once it is added; and over how many."""
    members, opened = dict(world.members), world.session.opened
    round_ = Round(world.session, label, members, TASK, size)
    left = {name: GONE.index(gone(name)) if gone(name) else len(GONE) for name in members}
    for name in members:
        if left[name] > 0:
            members[name], deposit = members[name].deposit(opened, round_.call)
            round_.deposit(deposit)
    for name, delivery in round_.deliveries().items():
        if left[name] > 1:
            members[name] = members[name].deliver(delivery, TASK)
            if left[name] > 2:
                members[name], masked = members[name].mask(words := inputs(name).copy())
                round_.masked(masked, words)
    statement = round_.survivors()
    for name in statement.survivors:
        if left[name] > 3:
            round_.reveal(members[name].reveal(statement)[1])
    return round_.finish(), len(statement.survivors)


class _Sum:
    """One sum as a queue of events; a step of the coordinator is over when nothing is left to happen."""

    def __init__(self, world: World, label: str, inputs: Mapping[str, Words], schedule: Schedule, ahead: str) -> None:
        size = len(next(iter(inputs.values())))
        self.round = Round(world.session, label, inputs, TASK, size)
        self.world, self.inputs, self.schedule = world, inputs, schedule
        self.ahead = world.session.call(ahead, inputs) if ahead else None
        self.members, self.past = dict(world.members), dict(world.past)
        self.delivered: dict[str, Delivery] = {}
        self.masked: dict[str, tuple[Masked, Words]] = {}
        self.answers: list[tuple[Survivors, Reveal]] = []
        self.refused: list[str] = []
        self.due: list[Callable[[], None]] = []
        self.late: list[Callable[[], None]] = []

    def run(self) -> tuple[World, Outcome]:
        total: Words | None = None
        error, survivors = "", tuple[str, ...]()
        try:
            self._deposits()
            deliveries = self._over(self.round.deliveries)
            self._each("deliver", "deliver", deliveries, self._delivery)
            statement = self._over(lambda: self.round.survivors(self.ahead))
            self._each("reveal", "survivors", dict.fromkeys(statement.survivors, statement), self._statement)
            survivors = statement.survivors
            total = self._total()
        except CohortError as reason:
            error = str(reason)
        self._wake()
        survivors = survivors if total is not None else ()
        view = View(self.round, self.delivered, self.masked, tuple(self.answers))
        dealt = {self.ahead.label: dict(self.round.next)} if self.ahead else {}
        world = World(self.world.session, self.members, dealt, self.past)
        return world, Outcome(total, survivors, error, tuple(self.refused), view)

    def _total(self) -> Words:
        """The sum; if it cannot be found yet, with the answers that came late."""
        try:
            return self._over(self.round.finish)
        except CohortError:
            self._wake()
            return self.round.finish()

    def _deposits(self) -> None:
        """A deposit of everybody: the one that came ahead, or an answer to a call."""
        ahead = self.world.dealt.get(self.round.call.label, {})
        for name in self._here("deposit", self.inputs):
            deposit = ahead.get(name)
            if deposit is None:
                opened = self.world.session.opened
                self.members[name], deposit = self.members[name].deposit(opened, self.round.call)
            self._send("deposit", name, deposit, None, lambda message, _: self.round.deposit(message))
        self._settle()

    def _delivery(self, name: str, delivery: Delivery) -> None:
        """A silo prepares, and masks its vector if it is still there."""
        self.members[name] = self.members[name].deliver(delivery, TASK)
        self.delivered[name] = delivery
        if self._here("mask", [name]):
            words = self.inputs[name].copy()
            self.members[name], masked = self.members[name].mask(words)
            self._send("mask", name, masked, words, self._vector)

    def _vector(self, masked: Masked, words: Words | None) -> None:
        assert words is not None
        self.round.masked(masked, words)
        self.masked.setdefault(masked.name, (masked, words))

    def _statement(self, name: str, statement: Survivors) -> None:
        self.members[name], reveal = self.members[name].reveal(statement)
        self._send("reveal", name, reveal, None, lambda message, _: self._answer(statement, message))

    def _answer(self, statement: Survivors, reveal: Reveal) -> None:
        self.round.reveal(reveal)
        self.answers.append((statement, reveal))

    def _each(self, step: str, what: str, messages: Mapping[str, Message], hears: Callable[[str, Any], None]) -> None:
        """Sends a message to each silo that has not vanished before `step`, and lets everything happen."""
        for name in self._here(step, messages):
            self._send(what, name, messages[name], None, partial(_first, hears, name))
        self._settle()

    def _send(
        self, step: str, name: str, message: Message, words: Words | None, receive: Callable[[Any, Any], object]
    ) -> None:
        """Carries a message, as bytes, the way the schedule says."""
        now, fault = (pack(message), words), self.schedule.faults.get((step, name), "")
        old = self.past.get((step, name), now)
        self.past[step, name] = now
        damaged = _flip(now[0]), words
        copies = {"duplicated": [now, now], "replayed": [old, now], "altered": [damaged]}.get(fault, [now])

        def arrive() -> None:
            for blob, beside in copies:
                try:
                    receive(unpack(STEPS[step], blob), beside)
                except (SiloError, WireError) as error:
                    self.refused.append(f"{step} {name}: {error}")

        (self.late if fault == "late" else self.due).append(arrive)

    def _over(self, close: Callable[[], T]) -> T:
        """The coordinator ends a step; what was late for it comes now."""
        closed = close()
        self._wake()
        return closed

    def _wake(self) -> None:
        self.due, self.late = self.late, []
        self._settle()

    def _settle(self) -> None:
        """Lets everything happen that is due, and all that follows from it."""
        while self.due:
            self.due.pop(-1 if self.schedule.reordered else 0)()

    def _here(self, step: str, candidates: Iterable[str]) -> list[str]:
        """Those who have not vanished before `step`, or earlier."""
        over = GONE[: GONE.index(step) + 1]
        return [name for name in candidates if self.schedule.gone.get(name) not in over]


def _first(hears: Callable[[str, Any], None], name: str, message: Any, _: Any) -> None:
    hears(name, message)


def _flip(blob: bytes) -> bytes:
    """The blob with one bit flipped, anywhere."""
    place = int.from_bytes(hashlib.sha256(blob).digest()[:8]) % len(blob)
    return blob[:place] + bytes([blob[place] ^ 1]) + blob[place + 1 :]


def random_schedule(silos: Sequence[str], draw: Entropy, dropout: float) -> Schedule:
    """Up to `dropout` of the silos vanish, each before a step of its own; some messages of others go wrong."""

    def below(bound: int) -> int:
        return int.from_bytes(draw(8)) % bound

    order = sorted(silos, key=lambda name: draw(8))
    gone = {name: GONE[below(len(GONE))] for name in order[: below(int(dropout * len(silos)) + 1)]}
    faults = {
        (list(STEPS)[below(len(STEPS))], name): FAULTS[below(len(FAULTS))] for name in order[-below(4) - 1 :]
    }  # fmt: skip
    return Schedule(gone, faults, bool(below(2)))


def runs(count: int, silos: int, seed: int, every: int = 5) -> Iterator[tuple[Outcome, bool]]:
    """Random sums of `silos`, up to 13 % of whom vanish, `every` so many in a session; and whether each is `sound`."""
    everybody = names(silos)
    for i in range(count):
        draw = entropy(seed, "run", i)
        if i % every == 0:
            terms = agree(everybody, seed + i, corrupt="0.1", dropout="0.1", minimum=silos // 2)
            world = begin(*terms, seed + i)
        inputs = {name: np.frombuffer(draw(16), np.uint32).copy() for name in everybody}
        schedule = random_schedule(everybody, draw, 0.13)
        world, outcome = take(world, f"run {i}", inputs, schedule, ahead=f"run {i + 1}" if (i + 1) % every else "")
        yield outcome, sound(outcome, inputs)


def sound(outcome: Outcome, inputs: Mapping[str, Words]) -> bool:
    """Whether a sum is exact over its survivors, or was given up, with nothing that the coordinator can open but, where
    answers came that it had to refuse, that very sum.
    """
    if outcome.total is None:
        return attack.opened(seen(outcome.view)).keys() <= {
            frozenset(said.survivors) for said, _ in outcome.view.answers
        }
    return bool((outcome.total == np.sum([inputs[name] for name in outcome.survivors], 0, outcome.total.dtype)).all())


def main() -> None:
    """Random runs; ends with an error if one was neither exact nor given up cleanly."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--silos", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    exact = given_up = wrong = 0
    for outcome, well in runs(asked.runs, asked.silos, asked.seed):
        exact += well and outcome.total is not None
        given_up += well and outcome.total is None
        wrong += not well
    print(f"{asked.runs} runs of {asked.silos} silos: {exact} exact, {given_up} given up cleanly, {wrong} wrong")
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()
