"""From a treaty's [secure] section to the stages, the agreement and the gathering that it asks for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from .errors import GuaranteeError
from .gather import EncryptedSums, Gather, Masked
from .governance.circle import Circle
from .privacy.plan import PrivacyPlan
from .secure.backends import check
from .secure.mail import purpose_of
from .secure.messages import Agreement
from .silo.evaluate import HELD_OUT, MEASURES
from .silo.keyring import Keyring
from .silo.membership import Membership
from .stages.base import Chain, Stage, chain
from .stages.encrypt import Encrypt, Encrypted
from .stages.grid import Grid
from .stages.mask import Mask
from .stages.weigh import WEIGHT, Weigh
from .stages.words import SCALED, Layout, Limit, Words, layout_of, room
from .treaty import Treaty
from .types import Key

SCALARS = 2.0**-10
"""The grid of weights, counts and sums of losses."""
FINEST = 2**38
"""Steps that the largest number of an update is cut into, at most."""
LOSS: tuple[Key, ...] = (("metric", "loss"), ("metric", "targets"))

Shapes = Mapping[Key, tuple[int, ...]]


@dataclass(frozen=True)
class SecureSums:
    """What a treaty with secure sums needs beside its algorithm. `stages`: what becomes of an update; `measures`: of a
    silo's evaluation sums; `membership`: the silos' side, of those in this process; `gather`: the coordinator's.
    """

    agreement: Agreement
    circle: Circle
    membership: Membership | Keyring
    stages: Chain
    measures: Chain
    gather: Gather


def secure_sums(
    treaty: Treaty, model: str, circle: Circle, plan: PrivacyPlan | None, shapes: Shapes, domains: Iterable[str]
) -> SecureSums:
    """The agreement that every silo of the circle holds the coordinator to, and both sides of it in this process.

    `shapes`: of every part of an update; `domains`: all that evaluation sums may be of. Raises `GuaranteeError` for
    what cannot be kept.
    """
    silos, encrypted = len(circle.roster), treaty.secure.sums == "encrypted"
    parties = silos if encrypted else treaty.cohort.size or silos  # one key, and so one room, for both kinds of sum
    updates, measures = _updates(treaty, plan, shapes, parties), _measures(treaty, domains, silos)
    return (_encrypted if encrypted else _masked)(treaty, _agreement(treaty, model, circle), circle, updates, measures)


def _updates(treaty: Treaty, plan: PrivacyPlan | None, shapes: Shapes, parties: int) -> Chain:
    """An update as integers on a public grid, and these as words."""
    numbers = integers(treaty, plan, parties)
    wide = [*_beside(numbers), *(LOSS if treaty.disclosure.loss else ())]
    single = dict(shapes)
    if treaty.privacy.quantile is not None and treaty.privacy.unit == "silo":
        single["within", "sum"] = (1,)
    return chain(*numbers, Words(layout_of(single, wide, treaty.secure.word, parties)))


def _measures(treaty: Treaty, domains: Iterable[str], parties: int) -> Chain:
    """A silo's evaluation sums as words: one place for each measure and domain, whoever has which."""
    wide = [(measure, domain) for measure in MEASURES for domain in domains]
    return chain(Grid(SCALARS), Words(layout_of({}, wide, treaty.secure.word, parties)))


def _agreement(treaty: Treaty, model: str, circle: Circle) -> Agreement:
    s, silos, neighbours = treaty.secure, len(circle.roster), treaty.secure.neighbours
    if in_shares(treaty):  # every silo masks with every other: then no lie divides the survivors, and the noise
        neighbours = max(2, silos - 1)
    return Agreement(
        treaty=treaty.digest(), model=model, roster=dict(circle.roster), coordinator=circle.chair, word=s.word,
        corrupt=Fraction(colluding(treaty, silos), silos), dropout=_share(s.dropout), neighbours=neighbours,
        threshold=s.threshold, minimum=treaty.cohort.minimum, group_size=s.group_size,
    )  # fmt: skip


def _masked(treaty: Treaty, agreement: Agreement, circle: Circle, updates: Chain, measures: Chain) -> SecureSums:
    membership = Membership(agreement, circle.silos)
    gather = Masked(
        agreement, circle.coordinator, {"train": _layout(updates).length, "evaluate": _layout(measures).length}
    )
    mask = Mask(membership)
    return SecureSums(
        agreement, circle, membership, chain(*updates.stages, mask), chain(*measures.stages, mask), gather
    )


def _encrypted(treaty: Treaty, agreement: Agreement, circle: Circle, updates: Chain, measures: Chain) -> SecureSums:
    _can_be_encrypted(treaty)
    train, evaluate = Encrypted(_layout(updates)), Encrypted(_layout(measures))
    rounds, holders = treaty.algorithm.rounds, tuple(sorted(circle.roster)[: treaty.secure.key_holders])
    sums = {purpose_of("train", "", i): train for i in range(rounds)}
    sums |= {purpose_of("evaluate", split, i): evaluate for split in HELD_OUT for i in range(rounds + 1)}
    keys = Keyring(agreement, circle.silos, holders, sums)
    gather = EncryptedSums(agreement, circle.coordinator, holders, {"train": train, "evaluate": evaluate})
    return SecureSums(
        agreement, circle, keys, chain(*updates.stages, Encrypt(train, keys)),
        chain(*measures.stages, Encrypt(evaluate, keys)), gather,
    )  # fmt: skip


def _can_be_encrypted(treaty: Treaty) -> None:
    """Raises `GuaranteeError` for what treaties can say of encrypted sums and no run can keep yet."""
    s = treaty.secure
    check(s.scheme)
    if s.encrypted_share < 1:
        raise GuaranteeError(
            "all numbers encrypted",
            f"encrypted_share = {s.encrypted_share:g}: no run can sum the rest under masks for the same silos yet",
            'Leave encrypted_share out, or take sums = "masked", which hides as much for fewer bytes.',
            where="[secure] encrypted_share",
        )
    if s.group_size is not None:
        raise GuaranteeError(
            "one sum over all silos of a round under encryption",
            f"group_size = {s.group_size}",
            'Leave group_size out: the sum of all is seen, and not that of each group. Or take sums = "masked".',
            where="[secure] group_size",
        )


def in_shares(treaty: Treaty) -> bool:
    """Whether silos add shares of one noise."""
    return treaty.privacy.unit != "none" and treaty.privacy.placement == "shared"


def colluding(treaty: Treaty, silos: int) -> int:
    """How many silos may be in league with the coordinator; one at least where it could take off its share of noise."""
    return max(math.floor(_share(treaty.secure.corrupt) * silos), int(in_shares(treaty)))


def _share(x: float) -> Fraction:
    """0.1 as a tenth, not as the nearest binary fraction."""
    return Fraction(str(x))


def integers(treaty: Treaty, plan: PrivacyPlan | None, parties: int) -> tuple[Stage, ...]:
    """The stages that make an update integers of which `parties` fit into a word."""
    s = treaty.secure
    if plan is not None and plan.terms.word:  # the plan proves the room, noise included
        return plan.stages()
    if plan is not None and not plan.terms.local:
        largest = s.range if plan.at_silos else float(plan.terms.max_norm or s.range)
        return (*plan.stages(), Limit(largest), Grid(_step(largest, s.word, parties)))
    weigh = plan.stages() if plan else (Weigh(treaty.server.weighting, treaty.server.max_weight),)
    heaviest = treaty.server.max_weight if treaty.server.weighting == "examples" and treaty.server.max_weight else 1.0
    step = _step(s.range * heaviest, s.word, parties)
    return (Limit(s.range, count=True), *weigh, Grid(step, stochastic=True, scalars=SCALARS))


def _step(largest: float, word: int, parties: int) -> float:
    """So fine that the largest number has room, with a step to spare for rounding; no finer than float64 can count."""
    return largest / max(1, min(room(word, parties), FINEST) - 1)


def _beside(numbers: Sequence[Stage]) -> Iterator[Key]:
    """The single numbers that stages add."""
    for stage in numbers:
        if isinstance(stage, Weigh):
            yield WEIGHT
        if isinstance(stage, Limit) and stage.count:
            yield SCALED


def _layout(stages: Chain) -> Layout:
    return next(stage.layout for stage in stages.stages if isinstance(stage, Words))
