"""Engines: the narrow waist between the server's loop and the silos. Read `base.py` for the contract."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .base import Ask, Engine

if TYPE_CHECKING:
    from .in_process import InProcess
    from .processes import Processes
    from .remote import Remote

_WHERE = {"InProcess": "in_process", "Processes": "processes", "Remote": "remote"}
__all__ = ["Ask", "Engine", "InProcess", "Processes", "Remote"]


def __getattr__(name: str) -> Any:
    """An engine is loaded when it is used: a process that only carries messages needs no PyTorch."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)
