"""Foedus: federated fine-tuning of language models that organisations can actually trust.

Three depths: carry out a treaty (`foedus run treaty.toml`), use the facade (`FederatedTrainer`), or compose the verbs
by hand (`foedus.loop.run`). Names are loaded when they are first used, so that `import foedus` is quick.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

# Telemetry of the libraries underneath stays off; a user who wants it sets these before importing foedus.
for _name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "DISABLE_TELEMETRY"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Waiting threads sleep: beside another busy process, spinning ones made a round 15 times slower (measured).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Matrix products leave a plan behind for every new number of tokens, 18 MB a step with SmolLM2; 1,024 by default.
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "64")

_WHERE = {
    "types": ("Key", "Receipt", "Release", "Report", "State", "Task", "Total", "Tree", "Update"),
    "errors": ("FoedusError",),
    "treaty": ("Treaty", "load", "parse"),
    "lm.adapters": ("Full", "LoRA"),
    "lm.load": ("load_base",),
    "assets": ("fetch",),
    "build": ("build",),
    "execute": ("begin", "execute"),
    "governance": ("RunFolder", "Ledger"),
    "trainer": ("FederatedTrainer", "run"),
    "stages": ("Stage",),
}
_HOME = {name: module for module, names in _WHERE.items() for name in names}

__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'foedus' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


class _Package(ModuleType):
    """This package, in which `foedus.build` is the function and not the file of that name, once that is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _HOME or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return __all__
