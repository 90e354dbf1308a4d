"""Which sums were opened, and for whom: so that a crash never opens a round a second time for other survivors.

Two sums over the same round that differ in one silo give that silo away. `Journal` is each silo's own memory, written
before it gives its shares; `Openings` is the coordinator's, so that it can go on where it was cut off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from ..errors import GuaranteeError
from .ledger import Ledger


@dataclass(frozen=True)
class Journal:
    """One hash-chained file per silo. `purpose`: which round of what, in words, whatever the session; `words`: the
    digest of what the silo gave before any mask.
    """

    folder: Path
    _open: dict[str, Ledger] = field(default_factory=dict, repr=False)

    def gives(self, silo: str, purpose: str, words: str) -> None:
        """Refuses to give anything else to a sum that was opened."""
        opened = self._opened(silo, purpose)
        if opened is not None and opened["words"] != words:
            raise _twice(silo, purpose, "another update")

    def opens(self, silo: str, purpose: str, words: str, survivors: Sequence[str]) -> None:
        """Notes, durably, that the silo helps to open this sum; refuses for any but the first survivors."""
        opened = self._opened(silo, purpose)
        if opened is not None and opened["survivors"] != list(survivors):
            raise _twice(silo, purpose, "other survivors")
        self.gives(silo, purpose, words)
        if opened is None:
            body = {"purpose": purpose, "words": words, "survivors": list(survivors)}
            self._ledger(silo).append("opened", body)

    def _opened(self, silo: str, purpose: str) -> dict[str, object] | None:
        bodies = (record["body"] for record in self._ledger(silo).records)
        return next((body for body in bodies if body["purpose"] == purpose), None)

    def _ledger(self, silo: str) -> Ledger:
        if silo not in self._open:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._open[silo] = Ledger(self.folder / f"{quote(silo, safe='')}.jsonl")
        return self._open[silo]


@dataclass(frozen=True)
class Openings:
    """The coordinator's, in the run's ledger: the survivors of each sum, before anybody is asked to open it."""

    ledger: Ledger

    def survivors(self, purpose: str) -> tuple[str, ...] | None:
        """Those for whom this sum may have been opened already."""
        bodies = (record["body"] for record in self.ledger.records if record["kind"] == "survivors")
        names = next((body["survivors"] for body in bodies if body["purpose"] == purpose), None)
        return None if names is None else tuple(names)

    def decide(self, purpose: str, survivors: Sequence[str]) -> None:
        """Writes down, durably, for whom the sum is about to be opened."""
        self.ledger.once("survivors", {"purpose": purpose, "survivors": list(survivors)}, same=("purpose",))


def _twice(silo: str, purpose: str, other: str) -> GuaranteeError:
    return GuaranteeError(
        f"the sum {purpose!r} to be opened once, since silo {silo!r} could be read off two that differ",
        f"a request to open it again for {other}",
        "Bring back every silo that took part and resume, or begin a new treaty.",
    )
