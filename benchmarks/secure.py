"""What the protocol of secure sums costs: `python -m benchmarks.secure [--quick]`. Masks alone: `benchmarks.masks`.

- A silo's keys and shares, among 100 silos: what it does for each sum (draws, shares and seals its secrets, opens its
  neighbours' boxes, agrees a seed with each), and once a session (joins, checks everybody's signature, opens, makes the
  keys of its channels). Beside it Flower's `_share_keys`, which agrees keys, shares and seals, and opens nothing.
- The coordinator's sum over 100 silos, a tenth of whom vanish when they have dealt their shares: vectors added, secrets
  recovered, masks taken off. What it checks while vectors arrive (digests, signatures) is shown apart. Beside it the
  cipher and the adder alone for as many words, and Flower's workflow.
- 10,000 simulated silos in groups of 100, one in twenty of whom vanishes before some step: the memory of the process
  that holds the coordinator and one group at a time, whether the total is exact, and seconds.

A tenth of the silos may be corrupt and a tenth drop out, for which the search chooses 32 neighbours of 100. Ours and
Flower's take turns in one process, in processor time of one core; each figure is the best of several.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ParamSpec, TypeVar

import numpy as np

from foedus.secure import simulate
from foedus.secure.keys import Identity
from foedus.secure.messages import Agreement
from foedus.secure.parameters import choose
from foedus.secure.server import Round, Session
from foedus.secure.silo import Member

from .apart import apart, installed, peak
from .masks import limit
from .table import Row, faster, finish, share, show

KEYS, SERVER, MEMORY = 6e-3, 0.150, 0.01  # s of a silo, s of the coordinator, of a vector for each silo more
BAD = "0.1"  # share of silos that may be corrupt, and that may drop out
P, T = ParamSpec("P"), TypeVar("T")
Terms = tuple[Agreement, Identity, Mapping[str, Identity]]


@dataclass(frozen=True)
class Size:
    """Sums over `silos` of `words` each, `turns` of them; one over `many` in groups of `silos`, of `short` words."""

    silos: int = 100
    words: int = 10**6
    turns: int = 10
    many: int = 10_000
    short: int = 10**5


QUICK = Size(silos=40, words=10**4, turns=1, many=400, short=10**3)


def rows(size: Size = Size()) -> list[Row]:
    """Silo, coordinator, scale."""
    return [*silo_rows(size), *server_rows(size), *scale_rows(size)]


def timed(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[T, float]:
    """What a call gives, and its processor seconds."""
    began = time.process_time()
    return call(*args, **kwargs), time.process_time() - began


def terms(silos: int) -> Terms:
    """What so many silos agree on, in words of 16 bits; the identities of the coordinator and of each."""
    return simulate.agree(simulate.names(silos), word=16, corrupt=BAD, dropout=BAD, minimum=max(3, silos // 2))


def gathered(agreed: Terms) -> tuple[Session, dict[str, Member], float]:
    """A new session and its members; and the seconds in which the first of them joined, checked the others, opened."""
    agreement, coordinator, identities = agreed
    session, me = Session.begin(coordinator, agreement), next(iter(identities))
    members = {name: Member(name, identity, agreement) for name, identity in identities.items()}
    joined = {name: timed(member.join, session.invite()) for name, member in members.items()}
    session = session.adverts(advert for (_, advert), _ in joined.values())
    opened = {name: timed(member.open, session.gathered) for name, ((member, _), _) in joined.items()}
    session = session.openings(opening for (_, opening), _ in opened.values())
    return session, {name: member for name, ((member, _), _) in opened.items()}, joined[me][1] + opened[me][1]


# A silo


def silo_rows(size: Size) -> Iterator[Row]:
    """With as many neighbours as are chosen, and with all."""
    for neighbours in (None, size.silos - 1):
        agreement, *identities = terms(size.silos)
        agreed = replace(agreement, neighbours=neighbours), *identities
        graph = choose(size.silos, float(BAD), float(BAD), neighbours=neighbours)
        peer = None
        if installed("flwr"):
            from .peer_secagg import share_keys

            peer = share_keys(graph.neighbours, graph.threshold)
        turns = [(*silo_seconds(agreed), timed(peer)[1] if peer else 0.0) for _ in range(size.turns + 1)][1:]
        once, ours, theirs = map(min, zip(*turns, strict=True))
        name = f"keys and shares: {size.silos} silos, {graph.neighbours} neighbours, threshold {graph.threshold}"
        yield share(f"{name}, for a sum, against the limit", ours, KEYS, "s", 1.0)
        yield faster(f"{name}, for a sum, against Flower's SecAgg+", ours, theirs if peer else None, "s")
        yield share(f"{name}, once a session, beside a sum", once, ours, "s")


def silo_seconds(agreed: Terms) -> tuple[float, float]:
    """Seconds of one silo, the first: once a session, and for a sum."""
    session, members, joining = gathered(agreed)
    me, (first, second) = next(iter(members)), (session.call(label, members) for label in ("first", "second"))
    (members[me], _), establishing = timed(members[me].deposit, session.opened, first)
    dealt = {name: timed(member.deposit, session.opened, second) for name, member in members.items()}
    round = Round(session, second.label, members, simulate.TASK, 1)
    for (_, deposit), _ in dealt.values():
        round.deposit(deposit)
    (member, _), dealing = dealt[me]
    _, delivering = timed(member.deliver, round.deliveries()[me], simulate.TASK)
    return joining + establishing - dealing, dealing + delivering


# The coordinator


def server_rows(size: Size) -> Iterator[Row]:
    """One sum of vectors, beside its limit and Flower's."""
    session, members, _ = gathered(terms(size.silos))
    graph = choose(size.silos, float(BAD), float(BAD))
    turns = [server_seconds(session, members, turn, size.words) for turn in range(size.turns + 1)]
    ours, arriving, bare = map(min, zip(*turns, strict=True))
    theirs = None
    if installed("flwr"):
        from .peer_secagg import Server

        theirs = Server(size.silos, size.silos // 10, graph.neighbours, graph.threshold, size.words).seconds()
    name = f"coordinator: {size.silos} silos × {size.words:,} words, a tenth gone, {graph.neighbours} neighbours"
    yield share(f"{name}, add, recover, unmask, against the limit", ours, SERVER, "s", 1.0)
    yield share(f"{name}, beside the cipher and the adder alone", ours, bare, "s")
    yield faster(f"{name}, against Flower's workflow, best of {size.turns} and one run", ours, theirs, "s")
    yield share(f"{name}, checks while vectors arrive, beside the sum", arriving, ours, "s")


def server_seconds(session: Session, members: Mapping[str, Member], turn: int, words: int) -> tuple[float, ...]:
    """Seconds of one sum: to add, recover and unmask; to check what arrived; of cipher and adder for as many masks.

    In each turn others vanish, so that nothing is known from the one before.
    """
    round, draw = Round(session, f"sum {turn}", members, simulate.TASK, words), np.random.default_rng(turn)
    dealt = {name: member.deposit(session.opened, round.call) for name, member in members.items()}
    for _, deposit in dealt.values():
        round.deposit(deposit)
    gone = set(list(members)[turn % 10 :: 10])
    vectors, answers, exact = [], {}, np.zeros(words, np.uint16)
    for name, delivery in round.deliveries().items():
        if name not in gone:
            vector = draw.integers(0, 2**16, words, np.uint16)
            np.add(exact, vector, out=exact)
            answers[name], masked = dealt[name][0].deliver(delivery, simulate.TASK).mask(vector)
            vectors.append((masked, vector))
    total = np.zeros_like(exact)
    _, arriving = timed(lambda: [round.masked(*answer) for answer in vectors])
    _, adding = timed(lambda: [np.add(total, vector, out=total) for _, vector in vectors])
    for member in answers.values():
        round.reveal(member.reveal(round.survivors())[1])
    total, unmasking = timed(round.finish)
    assert (total == exact).all(), "Expected the exact sum over the survivors."
    shared = sum(len(set(round.scope.neighbours(name)) - gone) for name in gone)
    _, bare = timed(limit, (len(vectors) + shared) * words, np.uint16)
    return adding + unmasking, arriving - adding, bare


# Many silos


def scale_rows(size: Size) -> list[Row]:
    """Many silos beside a tenth of them, each in a process of its own."""
    few = apart(many, size.many // 10, size.silos, size.short)
    lots = apart(many, size.many, size.silos, size.short)
    name = f"scale, simulated: {size.many:,} silos × {size.short:,} words in groups of {size.silos}, 5 % vanish"
    (memory, wrong, seconds), (less, _, sooner) = lots, few
    more = (memory - less) / (size.many - size.many // 10)
    return [
        share(f"{name}, peak memory, beside a tenth of them", memory / 2**20, less / 2**20, "MiB"),
        share(f"{name}, memory for each silo more, beside its vector", more, 4 * size.short, "bytes", MEMORY),
        share(f"{name}, words of the sum that are wrong, of all", wrong, size.short, "words", 0.0),
        share(f"{name}, time, beside ten times a tenth of them", seconds, 10 * sooner, "s"),
    ]


def many(silos: int, group: int, words: int) -> tuple[int, int, float]:
    """The peak in bytes of a sum over `silos` in groups, how many of its words are wrong, and its seconds."""
    began = time.process_time()
    found = simulate.grouped(
        silos, group, lambda name: words_of(name, words), vanishes, corrupt=BAD, dropout=BAD, minimum=max(3, group // 2)
    )
    seconds, most = time.process_time() - began, peak()
    exact = np.zeros_like(found.total)
    for name in simulate.names(silos):
        if vanishes(name) in ("", "reveal"):  # who has masked is in the sum
            np.add(exact, words_of(name, words), out=exact)
    assert not found.lost, "Expected a sum of every group."
    return most, int((found.total != exact).sum()), seconds


def words_of(name: str, words: int) -> np.ndarray:
    """A silo's words, of 32 bits."""
    return np.random.default_rng(int(name.removeprefix("silo"))).integers(0, 2**32, words, np.uint32)


def vanishes(name: str) -> str:
    """The step before which a silo vanishes, one in twenty of them, by lot; "" for the others."""
    lot, step, *_ = hashlib.sha256(name.encode()).digest()
    return simulate.GONE[step % len(simulate.GONE)] if lot < 256 // 20 else ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.secure", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sums, shown and not kept")
    if parser.parse_args().quick:
        show(rows(QUICK))
    else:
        finish("secure", rows())
