"""Refused messages in a ledger: each with its reason, and never so many records that a flood fills the disk.

The 1st, 2nd, 4th, 8th … refusal of a kind is written at once, with how many there were by then; `flush` writes where
the others stand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any

from ..wire import canonical
from .envelope import Refused
from .ledger import Ledger

KINDS = 256
"""How many kinds of refusal are told apart; what comes beyond is counted by reason alone."""


@dataclass
class _Kind:
    """Refusals with the same reason and facts. `written`: how many of them the ledger shows."""

    facts: Mapping[str, Any]
    count: int = 0
    written: int = 0


class Refusals:
    """Counts refusals into a ledger. Of one kind are those with the same reason and the same facts."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._kinds: dict[bytes, _Kind] = {}
        self._lock = Lock()

    def note(self, refused: Refused, **facts: Any) -> None:
        """Counts a refusal. `facts`: digests, names and clauses; never anything of a message that nobody signed."""
        told = {"reason": refused.reason.value, **{name: fact for name, fact in facts.items() if fact}}
        with self._lock:
            if canonical(told) not in self._kinds and len(self._kinds) >= KINDS:
                told = {"reason": refused.reason.value}
            kind = self._kinds.setdefault(canonical(told), _Kind(told))
            kind.count += 1
            if not kind.count & (kind.count - 1):
                self._write(kind)

    def flush(self) -> None:
        """Writes every count that the ledger does not show yet."""
        with self._lock:
            for kind in self._kinds.values():
                if kind.written < kind.count:
                    self._write(kind)

    def _write(self, kind: _Kind) -> None:
        self.ledger.append("refused", {**kind.facts, "count": kind.count})
        kind.written = kind.count
