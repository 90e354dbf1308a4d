"""Governance: the ledger of what happened, what silos spent of their privacy, and the folder that a run lives in."""

from .budget import Budget, Cap
from .custody import KeptMechanism, SiloCustody
from .folder import RunFolder
from .ledger import Ledger, verify

__all__ = ["Budget", "Cap", "KeptMechanism", "Ledger", "RunFolder", "SiloCustody", "verify"]
