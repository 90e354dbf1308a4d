"""What can go wrong, as one small tree. Every error says what was expected, what came, and what to do.

FoedusError
├── TreatyError       a treaty that cannot be read, or contradicts itself
├── DataError         a data source, a column, a partition or a split
├── ModelError        a base model, an adapter, or the two together
├── AssetError        something that `foedus fetch` could not bring or verify
├── WireError         bytes that are not a message of ours
├── GuaranteeError    a guarantee that would not hold; the run cannot be built
├── SiloError         one silo could not do its part of a round; others go on
├── CohortError       too few silos are left for the round to mean anything
└── RunError          a run's folder: missing, damaged, full, or somebody else's
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class FoedusError(Exception):
    """An error in three parts: what was `expected`, what `came`, and what to `do`; `where` it happened, if known."""

    def __init__(self, expected: str, came: str, do: str, *, where: str = "") -> None:
        self.expected, self.came, self.do, self.where = expected, came, do, where
        super().__init__(expected, came, do)

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), self.expected, self.came, self.do, self.where)

    def __str__(self) -> str:
        head = f"{self.where}: " if self.where else ""
        return f"{head}expected {self.expected}; got {self.came}. {self.do}"


class TreatyError(FoedusError):
    """A treaty that cannot be read, or contradicts itself."""


class DataError(FoedusError):
    """A data source, a column, a partition or a split."""


class ModelError(FoedusError):
    """A base model, an adapter, or the two together."""


class AssetError(FoedusError):
    """Something that `foedus fetch` could not bring or verify."""


class WireError(FoedusError):
    """Bytes that are not a message of ours."""


class GuaranteeError(FoedusError):
    """A guarantee that would not hold; the run cannot be built."""


class SiloError(FoedusError):
    """One silo could not do its part of a round; others go on."""


class CohortError(FoedusError):
    """Too few silos are left for the round to mean anything."""


class RunError(FoedusError):
    """A run's folder: missing, damaged, full, or somebody else's."""


def _again(kind: type[FoedusError], expected: str, came: str, do: str, where: str) -> FoedusError:
    return kind(expected, came, do, where=where)


def one_of(name: str, known: Iterable[str]) -> str:
    """The advice for an unknown `name`: the nearest known one first, then all of them.

    >>> one_of("fedavgg", ["fedprox", "fedavg"])
    'Did you mean "fedavg"? Known: fedavg, fedprox.'
    """
    known = sorted(known)
    near = get_close_matches(name, known, n=1)
    hint = f'Did you mean "{near[0]}"? ' if near else ""
    return f"{hint}Known: {', '.join(known) or 'none'}."
