"""What tasks and reports under a treaty look like: names, shapes, kinds of numbers, all of them finite.

Both sides know it before anything comes, since both build the same model from the same treaty. `Agreed` is what the
treaty alone says of a task; `TaskForm` what the model and the algorithm say, at the silo; `ReportForm` what may come
back, at the coordinator.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import wire
from ..engines.base import Ask
from ..errors import WireError
from ..governance.envelope import Reason, Refused
from ..governance.order import BYE
from ..silo.evaluate import HELD_OUT, MEASURES
from ..stages.base import Chain
from ..stages.encrypt import ENCRYPTED, Encrypt
from ..treaty import Treaty, roster
from ..treaty.deployed import domains
from ..types import Key, Report, Task, Tree, Update

if TYPE_CHECKING:
    from ..build import Workplace
    from ..silo.handler import Handler

HELLO, AGREE, TRAIN, EVALUATE = "hello", "agree", "train", "evaluate"
"""Beside the work: "hello" brings signatures, "agree" asks what came of the treaty at the silo, "bye" ends a run."""
_STEPS = {"open": (), "masked": ("join", "open", "deposit", "unmask"), "encrypted": ("keys", "decrypt")}
MOST_HEADER = 1 << 24
"""Bytes of names and shapes in a task or a payload: 100,000 tensors."""
MOST_SCALARS = 64
"""Single numbers that an algorithm may share beside its tensors."""
MOST_DOMAINS = 10_000
MOST_AGREED = 1 << 24
"""Bytes of what a silo says that it came to (`same_work`)."""
CLOSE = 1e-6
"""How far two machines' floating point may be apart, relatively, in what they came to."""


@dataclass(frozen=True)
class Like:
    """One array. `kind`: the letter of its kind of numbers ("f", "i", "u"), or its exact type. `shape`: None for a
    vector of any length.
    """

    kind: str
    shape: tuple[int, ...] | None

    @classmethod
    def exactly(cls, x: np.ndarray) -> Like:
        return cls(x.dtype.str, x.shape)

    @classmethod
    def kin(cls, x: np.ndarray) -> Like:
        """Of the same kind of numbers, however wide."""
        return cls(x.dtype.kind, x.shape)

    def check(self, name: object, x: np.ndarray) -> None:
        """Raises `Refused` for an array that is another, or holds what is no number."""
        of_kind = self.kind in (x.dtype.str, x.dtype.kind)
        if not of_kind or (x.shape != self.shape if self.shape is not None else x.ndim != 1):
            expected = f"{_spelled(name)} as {self.kind} {self.shape}"
            raise Refused(Reason.WRONG_SHAPE, expected, f"{x.dtype.str} {x.shape}")
        finite(name, x)


SCALAR = Like("f", (1,))
COUNT = Like("i", (1,))


def finite(name: object, x: np.ndarray) -> None:
    """Raises `Refused` for an array with a NaN or an infinity."""
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        raise Refused(Reason.NON_FINITE, f"finite numbers in {_spelled(name)}", "others")


@dataclass(frozen=True)
class Agreed:
    """What a treaty lets anybody ask of one of its silos."""

    treaty: Treaty
    silo: str

    def ask(self, ask: Ask) -> None:
        """Raises `Refused` for an ask of a kind, or in a shape, that the treaty does not have."""
        if ask.silo != self.silo:
            raise Refused(Reason.MISDIRECTED, "an ask for this silo", "one for another")
        kinds = (HELLO, AGREE, TRAIN, EVALUATE, BYE, *_STEPS[self.treaty.secure.sums])
        if ask.kind not in kinds:
            raise Refused(Reason.NOT_AGREED, f"one of {', '.join(kinds)}", f"{ask.kind[:40]!r}")
        if (ask.split != "") != (ask.kind == EVALUATE) or (ask.payload != b"") != (ask.kind in (TRAIN, EVALUATE)):
            raise Refused(Reason.MALFORMED, f"a task and a split where {ask.kind} needs them", "otherwise")

    def task(self, kind: str, split: str, task: Task) -> None:
        """Raises `Refused` for a task that the treaty does not have."""
        t, last = self.treaty, self.treaty.algorithm.rounds
        if not 0 <= task.round < last + (kind == EVALUATE):
            raise Refused(Reason.NOT_AGREED, f"one of the {last} rounds that were agreed", f"round {task.round}")
        if kind == EVALUATE and not self._due(split, task.round):
            came = f"{split[:40]!r} after round {task.round}"
            raise Refused(Reason.NOT_AGREED, "an evaluation that the treaty speaks of", came)
        if task.seed != t.seed:
            raise Refused(Reason.NOT_AGREED, "the treaty's seed", "another")
        known = roster(t)
        if self.silo not in task.cohort or list(task.cohort) != [name for name in known if name in task.cohort]:
            raise Refused(
                Reason.NOT_AGREED, "a cohort of the treaty's silos in their order, this one among them", "others"
            )
        if kind == TRAIN and len(task.cohort) < t.cohort.minimum:
            raise Refused(Reason.NOT_AGREED, f"{t.cohort.minimum} silos or more", f"{len(task.cohort)}")

    def _due(self, split: str, round: int) -> bool:
        """At the start and at the end; the validation share every so many rounds as well."""
        rounds, every = self.treaty.algorithm.rounds, self.treaty.evaluation.every
        return split in HELD_OUT and (round in (0, rounds) or (split == "validation" and round % every == 0))


@dataclass(frozen=True)
class TaskForm:
    """`params`: as the model has them. `extra`: shared state that every training task carries; `parts`: shapes of what
    may join it, as parts of the updates do; beside these an algorithm shares single numbers. `settings`: their names.
    """

    model: str
    params: Mapping[str, Like]
    extra: Mapping[Key, Like]
    parts: Mapping[Key, tuple[int, ...]]
    settings: frozenset[str]

    @classmethod
    def of(cls, handler: Handler) -> TaskForm:
        """As this silo's own model and algorithm have it."""
        start = handler.bench.start()
        return cls(
            handler.model,
            {name: Like.exactly(x) for name, x in start.items()},
            {key: Like.exactly(x) for key, x in handler.algorithm.extra(start).items()},
            handler.algorithm.parts({name: x.shape for name, x in start.items()}),
            frozenset(handler.stages.start()),
        )

    def check(self, kind: str, task: Task) -> None:
        """Raises `Refused` for a task of another form."""
        if task.model != self.model:
            raise Refused(Reason.WRONG_MODEL, f"the base model {self.model[:12]}", f"{task.model[:12]}")
        _same_names("parameters", self.params, task.params)
        for name, like in self.params.items():
            like.check(name, task.params[name])
        training = kind == TRAIN
        if not training and task.extra or training and not self.extra.keys() <= task.extra.keys():
            raise Refused(Reason.WRONG_SHAPE, f"the shared state that {kind} needs", "other state")
        for key, x in task.extra.items():
            self._shared(key, x)
        if sum(x.size == 1 for x in task.extra.values()) > MOST_SCALARS + len(self.extra):
            raise Refused(Reason.WRONG_SHAPE, f"at most {MOST_SCALARS} numbers of shared state", "more")
        if set(task.settings) != (self.settings if training else set()):
            raise Refused(Reason.WRONG_SHAPE, f"settings {', '.join(sorted(self.settings)) or 'none'}", "others")
        finite("settings", np.array(list(task.settings.values()), np.float64))

    def _shared(self, key: Key, x: np.ndarray) -> None:
        if len(key) != 2:
            raise Refused(Reason.WRONG_SHAPE, "keys of two words", f"one of {len(key)}")
        if key in self.extra:
            self.extra[key].check(key, x)
        elif key in self.parts:
            Like("f", self.parts[key]).check(key, x)
        elif key[1] in self.params:
            Like("f", self.params[key[1]].shape).check(key, x)
        else:
            (COUNT if x.dtype.kind == "i" else SCALAR).check(key, x)


@dataclass(frozen=True)
class ReportForm:
    """`train`, `evaluate`: every array of a payload; None: sums by domain, of `domains` where these are known.
    `disclosed`: the facts that a receipt may hold.
    """

    train: Mapping[Key, Like]
    evaluate: Mapping[Key, Like] | None
    domains: tuple[str, ...] | None
    disclosed: frozenset[str]

    @classmethod
    def of(cls, place: Workplace) -> ReportForm:
        """As the coordinator's own place has it: what zeros of the update's shape are encoded to."""
        rules, start = place.federation, place.bench.start()
        task = Task(0, rules.model, start, rules.silos, rules.seed, rules.stages.start(), rules.algorithm.extra(start))
        metric = {("metric", name): np.zeros(1) for name in ("loss", "targets") if place.treaty.disclosure.loss}
        zeros = {key: np.zeros(shape, np.float32) for key, shape in place.parts.items()}
        update = Update(zeros | metric, silo=rules.silos[0])  # whose noise, where it is simulated, has a form like any
        secure = place.sums is not None
        return cls(
            _encoded(rules.stages, update, task),
            _encoded(place.measures, Update({}), task) if secure else None,
            domains(place.treaty),
            frozenset(name for name in ("loss", "attention") if getattr(place.treaty.disclosure, name) and not secure)
            | {name for name in ("examples",) if place.treaty.disclosure.holdings},
        )

    def check(self, kind: str, report: Report) -> None:
        """Raises `Refused` for a report of another form."""
        odd = sorted(set(report.receipt.disclosed) - self.disclosed)
        if odd:
            raise Refused(Reason.NOT_AGREED, f"no facts but {', '.join(self.disclosed) or 'none'}", ", ".join(odd))
        if kind not in (TRAIN, EVALUATE):
            if report.payload:
                raise Refused(Reason.WRONG_SHAPE, f"no payload with {kind}", f"{len(report.payload)} bytes")
            return
        tensors = opened(report.payload)
        like = self.train if kind == TRAIN else self.evaluate
        if like is None:
            self._by_domain(tensors)
            return
        optional = {key for key in like if key[0] in _SOMETIMES}
        _same_names("tensors", like, tensors, optional)
        for key, x in tensors.items():
            like[key].check(key, x)

    def _by_domain(self, tensors: Tree) -> None:
        if len(tensors) > MOST_DOMAINS * len(MEASURES):
            raise Refused(Reason.WRONG_SHAPE, f"at most {MOST_DOMAINS:,} domains", "more")
        for key, x in tensors.items():
            if len(key) != 2 or key[0] not in MEASURES or (self.domains and key[1] not in self.domains):
                raise Refused(Reason.WRONG_SHAPE, "measures of the treaty's domains", "others")
            SCALAR.check(key, x)


def same_work(own: Mapping[str, Any], said: bytes) -> None:
    """Raises `Refused` where a silo came to another model, other shapes or another privacy plan by the same treaty than
    this side did. `own`: `Workplace.agreed()`; `said`: the silo's, in canonical JSON.
    """
    try:
        if len(said) > MOST_AGREED:
            raise ValueError
        theirs = json.loads(said)
        apart = next(_apart("", json.loads(wire.canonical(own)), theirs), None)
    except (ValueError, RecursionError) as error:
        raise Refused(Reason.MALFORMED, "what a silo came to by its treaty", type(error).__name__) from error
    if apart is not None:
        where, here, there = apart
        do = "Both sides must load the same base model, and run versions of foedus that build alike."
        raise Refused(Reason.NOT_AGREED, f"{where} = {here} by this treaty, as here", f"{there} there", do)


def _apart(where: str, one: Any, other: Any) -> Iterator[tuple[str, str, str]]:
    """The places in which two values of JSON are not the same, with what stands there."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        for name in one:
            yield from _apart(f"{where}.{name}".lstrip("."), one[name], other[name])
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for i, pair in enumerate(zip(one, other, strict=True)):
            yield from _apart(f"{where}[{i}]", *pair)
    elif isinstance(one, float) and isinstance(other, float):
        if not math.isclose(one, other, rel_tol=CLOSE):
            yield where, repr(one), repr(other)
    elif type(one) is not type(other) or one != other:
        yield where, _spelled(one), _spelled(other)


_SOMETIMES = ("embedding", "topics", "target")
"""Parts of updates that are there in some rounds only."""


def opened(blob: bytes) -> Tree:
    """The tensors in a payload. Raises `Refused` for anything else."""
    bounded(blob)
    try:
        return wire.unpack(blob)[0]
    except WireError as error:
        raise Refused(Reason.MALFORMED, error.expected, error.came) from error


def task_of(blob: bytes) -> Task:
    """The task in a payload. Raises `Refused` for anything else, and for one that is spelled as nobody of us would."""
    bounded(blob)
    try:
        task = wire.unpack_task(blob)
    except WireError as error:
        raise Refused(Reason.MALFORMED, error.expected, error.came) from error
    if not all(isinstance(name, str) for name in task.cohort) or len(set(task.cohort)) < len(task.cohort):
        raise Refused(Reason.MALFORMED, "a cohort of names", "something else")
    if not all(type(value) in (int, float) for value in task.settings.values()):
        raise Refused(Reason.MALFORMED, "settings that are numbers", "others")
    return task


def bounded(blob: bytes) -> None:
    """Raises `Refused` for names and shapes that nobody should parse."""
    size = int.from_bytes(blob[:8], "little")
    if size > MOST_HEADER:
        raise Refused(Reason.OVERSIZED, f"at most {MOST_HEADER:,} bytes of names and shapes", f"{size:,}")


def _encoded(stages: Chain, update: Update, task: Task) -> dict[Key, Like]:
    plain, hiding = stages.split()
    found = {key: Like.kin(np.asarray(x)) for key, x in plain.encode(update, task).tensors.items()}
    encrypted = any(isinstance(stage, Encrypt) for stage in hiding.stages)
    return {ENCRYPTED: Like("u", None)} if encrypted else found


def _same_names(what: str, expected: Collection[Any], came: Collection[Any], optional: Collection[Any] = ()) -> None:
    missing = [name for name in expected if name not in came and name not in optional]
    odd = [name for name in came if name not in expected]
    for word, names in (("none called", missing), ("one called", odd)):
        if names:
            raise Refused(Reason.WRONG_SHAPE, f"the {what} that both sides have", f"{word} {_spelled(names[0])}")


def _spelled(name: object) -> str:
    """A name from a message, safe to show."""
    words = " ".join(name) if isinstance(name, tuple) else str(name)
    return repr(words[:80])
