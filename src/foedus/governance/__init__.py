"""Governance: the ledger of what happened, what silos spent of their privacy, and the folder that a run lives in."""

from .budget import Budget, Cap
from .custody import TRAY, Accounted, KeptMechanism, SiloCustody, Tray
from .folder import RunFolder
from .ledger import Ledger, verify
from .openings import Journal, Openings

__all__ = [
    "TRAY",
    "Accounted",
    "Budget",
    "Cap",
    "Journal",
    "KeptMechanism",
    "Ledger",
    "Openings",
    "RunFolder",
    "SiloCustody",
    "Tray",
    "verify",
]
