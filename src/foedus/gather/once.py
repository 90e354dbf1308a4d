"""That no sum is opened for two sets of silos: whoever survived is written down before anybody is asked to open it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..errors import CohortError


class Openings(Protocol):
    """What the coordinator remembers of the sums it asked to open; see `governance/openings.py`."""

    def survivors(self, purpose: str) -> tuple[str, ...] | None: ...
    def decide(self, purpose: str, survivors: Sequence[str]) -> None: ...


def opened_before(openings: Openings | None, purpose: str) -> tuple[str, ...] | None:
    """Those for whom this sum may have been opened already; None when it was for nobody."""
    return openings.survivors(purpose) if openings is not None else None


def decide(openings: Openings | None, purpose: str, survivors: Sequence[str]) -> None:
    """Writes down who survived. Raises `CohortError` where the sum may have been opened for others."""
    before = opened_before(openings, purpose)
    if before is not None and list(before) != list(survivors):
        raise CohortError(
            f"the survivors for whom {purpose!r} may have been opened already, {', '.join(before)}",
            ", ".join(survivors) or "nobody",
            "Opened for others too, the two sums would give a silo away: bring back those silos and resume.",
        )
    if openings is not None:
        openings.decide(purpose, survivors)


def enough(minimum: int, came: int) -> None:
    """Raises `CohortError` when fewer came than a sum may have."""
    if came < minimum:
        raise CohortError(
            f"{minimum} silos or more in a sum",
            f"{came} at most",
            "Mend the silos that failed and resume: nothing was opened.",
        )
