"""A line carries opaque bytes to silos and brings their answers back. What the bytes mean, it does not know.

`Line` is the coordinator's end, `Answer` a silo's. `flower.py` has the line that crosses machines; `Loopback` here is
one in this process that misbehaves as a network does, for tests. `remote.py` makes an engine of either.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from ..errors import RunError
from ..seeds import generator

_Due = TypeVar("_Due", bound=tuple[Any, ...])


class Away(RunError):
    """Whoever carries a line does not answer, for now."""


class Line(Protocol):
    """Each message gets any number of answers, in any order: usually one. A message that is lost may be lost without a
    word; where the line knows, it says so.
    """

    def silos(self) -> frozenset[str]:
        """Who is reachable now."""

    def send(self, silo: str, blob: bytes) -> str:
        """Takes a message and returns its name; never waits for the network. What goes wrong, `poll` tells."""

    def poll(self) -> Iterator[tuple[str, bytes | str]]:
        """What has come since: (name, answer) in bytes, or (name, why it will never come) in text. Never waits."""

    def close(self) -> None:
        """Lets go of the network. Any number of times."""


class Answer(Protocol):
    """A silo's end: takes one message and gives its answer. It answers one message after the other, and the same bytes
    again with the same answer.
    """

    def __call__(self, blob: bytes) -> bytes: ...


@dataclass(frozen=True)
class Faults:
    """How a loopback misbehaves. Probabilities are of each message, and of each answer, on its own.

    `drop`: it is lost without a word. `refuse`: it is lost, and the line says so. `duplicate`: it arrives twice.
    `delay_s`: the most seconds that it takes, drawn uniformly, so that answers overtake each other. `crash`: a silo to
    the messages, counted from 0, at which its process dies: before it answers, or after it did and before the answer
    leaves, by the toss of a coin; it is back for the next message.
    """

    drop: float = 0.0
    refuse: float = 0.0
    duplicate: float = 0.0
    delay_s: float = 0.0
    crash: Mapping[str, frozenset[int]] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("drop", "refuse", "duplicate"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"Expected {name}={value} between 0 and 1.")
        if not 0 <= self.delay_s < float("inf"):
            raise ValueError(f"Expected delay_s={self.delay_s} >= 0.")


class Loopback:
    """A line to silos in this process. `start`: for each silo, what starts its process: called once at first, and again
    after each crash. Silos work inside `poll`.
    """

    def __init__(self, start: Mapping[str, Callable[[], Answer]], faults: Faults | None = None) -> None:
        self.faults = faults = faults or Faults()
        self._start, self._answers = dict(start), {silo: begin() for silo, begin in start.items()}
        self._draw = generator(faults.seed, "loopback")
        self._sent, self._heard = 0, dict.fromkeys(start, 0)
        self._under_way: list[tuple[float, str, str, bytes]] = []  # (when it arrives, silo, name, message)
        self._coming: list[tuple[float, str, bytes | str]] = []

    def silos(self) -> frozenset[str]:
        return frozenset(self._answers)

    def send(self, silo: str, blob: bytes) -> str:
        name, self._sent = f"{self._sent}", self._sent + 1
        if silo not in self._answers:
            self._coming.append((0.0, name, f'no silo "{silo}" is on this line'))
            return name
        for when in self._fates(name):
            self._under_way.append((when, silo, name, blob))
        return name

    def poll(self) -> Iterator[tuple[str, bytes | str]]:
        for _, silo, name, blob in _take_due(self._under_way):
            if (answer := self._ask(silo, blob)) is not None:
                self._coming += [(when, name, answer) for when in self._fates(name)]
        yield from ((name, answer) for _, name, answer in _take_due(self._coming))

    def close(self) -> None:
        self._under_way.clear()
        self._coming.clear()

    def _ask(self, silo: str, blob: bytes) -> bytes | None:
        """The answer of a silo; None when its process died over it."""
        count, self._heard[silo] = self._heard[silo], self._heard[silo] + 1
        if count not in self.faults.crash.get(silo, ()):
            return self._answers[silo](blob)
        if self._draw.random() < 0.5:
            self._answers[silo](blob)
        self._answers[silo] = self._start[silo]()
        return None

    def _fates(self, name: str) -> list[float]:
        """When what is sent now arrives: never, once or twice."""
        drop, refuse, twice = self._draw.random(3)
        if refuse < self.faults.refuse:
            self._coming.append((0.0, name, "the line broke"))
            return []
        copies = 0 if drop < self.faults.drop else 1 + int(twice < self.faults.duplicate)
        return [time.monotonic() + self.faults.delay_s * self._draw.random() for _ in range(copies)]


def _take_due(queue: list[_Due]) -> list[_Due]:
    """Takes out of a queue what is due by now, in the order of its times."""
    now = time.monotonic()
    due = sorted((item for item in queue if item[0] <= now), key=lambda item: item[0])
    queue[:] = [item for item in queue if item[0] > now]
    return due
