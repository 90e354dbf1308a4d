"""Engines: the narrow waist between the server's loop and the silos. Read `base.py` for the contract."""

from .base import Ask, Engine
from .in_process import InProcess
from .processes import Processes

__all__ = ["Ask", "Engine", "InProcess", "Processes"]
