"""The contract of an engine: it carries asks to silos and brings answers back, as they arrive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..types import Report, Tree


@dataclass(frozen=True)
class Ask:
    """One question to one silo. `kind`: "train", "evaluate" with a `split` to look at, or a step of a secure sum.

    `payload`: a packed task, the same for a whole cohort. `mail`: what other silos sent to this one (see `secure/`).
    """

    kind: str
    silo: str
    payload: bytes
    split: str = ""
    mail: bytes = b""


class Engine(Protocol):
    """`ask` yields one report for every ask, in any order; a silo that failed answers with `receipt.failure`.

    `memory`: what silos keep to themselves, of those that live in this process.
    """

    @property
    def memory(self) -> dict[str, Tree]: ...
    def ask(self, asks: Sequence[Ask]) -> Iterator[Report]: ...
