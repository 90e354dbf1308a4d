"""Governance: the ledger of what happened, and the folder that a run lives in."""

from .folder import RunFolder
from .ledger import Ledger, verify

__all__ = ["Ledger", "RunFolder", "verify"]
