"""The treaty: one TOML file that says what is trained, on what, by whom, and what leaves a silo.

`schema.py` has every key; `rules.py` what they must agree on; `core.py` the value, its canonical form and its digest.
"""

from .core import Treaty, from_dict
from .mistakes import Mistakes
from .reading import load, parse
from .schema import SECTIONS
from .words import describe, not_covered, privacy, statement, unprotected

__all__ = [
    "SECTIONS",
    "Mistakes",
    "Treaty",
    "describe",
    "from_dict",
    "load",
    "not_covered",
    "parse",
    "privacy",
    "statement",
    "unprotected",
]
