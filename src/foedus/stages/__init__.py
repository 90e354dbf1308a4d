"""Stages: what happens to one update before it leaves its silo, and is undone after the sum. Read `base.py` first."""

from .base import Chain, Plain, Stage, chain
from .weigh import Weigh

__all__ = ["Chain", "Plain", "Stage", "Weigh", "chain"]
