"""Which messages are new: numbers that never go back, and rounds that come in their order, through any restart.

`Numbers` is the coordinator's: it writes a number down before it gives it. `Order` is the silo's: it writes down what
it took before it works on it. Both fail closed: a file that cannot be read stops the party, and is not begun anew.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import wire
from ..errors import RunError
from .disk import disk, write_whole
from .envelope import Reason, Refused

Stream = str
"""What is asked round by round: "train", "evaluate validation", "evaluate test"; and BYE, after which nothing is."""
BYE: Stream = "bye"


class Numbers:
    """The coordinator's numbers under one treaty, for each silo its own: 1, 2, 3, … Several processes may draw them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last = _read(path, _counts) or {}

    def next(self, silo: str) -> int:
        """A number above all that were given before for this silo, written down before it is given."""
        with disk(self.path), self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            known = _read(self.path, _counts) or {}
            number: int = max(known.get(silo, 0), self._last.get(silo, 0)) + 1
            write_whole(self.path, wire.canonical({**known, silo: number}))
        self._last[silo] = number
        return number


@dataclass(frozen=True)
class Taken:
    """What a silo took so far under one treaty. `number` and `ask`: of the last message, and its name; `rounds`: of
    each stream the last round, and the digest of its task.
    """

    number: int = 0
    ask: str = ""
    rounds: Mapping[Stream, tuple[int, str]] = field(default_factory=dict)

    def with_(self, number: int, ask: str, stream: Stream = "", round: int = 0, task: str = "") -> Taken:
        """After one more message."""
        rounds = {**self.rounds, stream: (round, task)} if stream else self.rounds
        return Taken(number, ask, rounds)


class Order:
    """A silo's order under one treaty. `records`: bodies of its ledger about messages that it took, oldest first: a
    file that was put back to an earlier day is noticed by them.
    """

    def __init__(self, path: Path, records: Iterable[Mapping[str, Any]] = ()) -> None:
        self.path = path
        self.taken = _read(path, _taken) or Taken()
        for body in records:
            if body["number"] > self.taken.number:
                stream = body.get("stream", "")
                self.taken = self.taken.with_(
                    body["number"], body["ask"], stream, body.get("round", 0), body.get("task", "")
                )

    def is_new(self, number: int, ask: str) -> bool:
        """True for a new message, False for the last one again. Raises `Refused` for any older."""
        last = self.taken
        if (number, ask) == (last.number, last.ask):
            return False
        if number <= last.number:
            raise Refused(Reason.REPLAYED, f"a number above {last.number}", str(number))
        return True

    def go_on(self) -> None:
        """Raises `Refused` after the coordinator's good-bye."""
        if BYE in self.taken.rounds:
            raise Refused(Reason.OUT_OF_ORDER, "a treaty whose run goes on", "an ask after its coordinator said bye")

    def check(self, stream: Stream, round: int, task: str) -> None:
        """Raises `Refused` for a round before the stream's last, for another task in the same one, and for an
        evaluation of a state that training has left behind.
        """
        last, known = self.taken.rounds.get(stream, (-1, ""))
        least = max(last, self.taken.rounds.get("train", (-1, ""))[0])
        if round < least:
            raise Refused(Reason.OUT_OF_ORDER, f"{stream} of round {least} or later", f"round {round}")
        if round == last and task != known:
            raise Refused(Reason.OUT_OF_ORDER, f"one task for {stream} of round {round}", "another task for it")

    def take(self, number: int, ask: str, stream: Stream = "", round: int = 0, task: str = "") -> None:
        """Notes a message as taken, durably."""
        taken = self.taken.with_(number, ask, stream, round, task)
        rounds = {name: list(last) for name, last in taken.rounds.items()}
        write_whole(self.path, wire.canonical({"number": taken.number, "ask": taken.ask, "rounds": rounds}))
        self.taken = replace(taken)


def _read(path: Path, shape: Any) -> Any:
    """What a file holds; None where there is none. Raises `RunError` for a file that holds something else."""
    try:
        return shape(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        do = "Restore the file as it was: begun anew, it would let old messages in again."
        raise RunError(f"{path.name} as it was written", type(error).__name__, do, where=str(path)) from error


def _count(x: Any) -> int:
    if type(x) is not int or x < 0:
        raise ValueError
    return x


def _counts(found: Any) -> dict[str, int]:
    return {str(silo): _count(x) for silo, x in found.items()}


def _taken(found: Any) -> Taken:
    rounds = {str(stream): (_count(round), str(task)) for stream, (round, task) in found["rounds"].items()}
    return Taken(_count(found["number"]), str(found["ask"]), rounds)
