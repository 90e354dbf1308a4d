"""The treaty: one TOML file that says what is trained, on what, by whom, and what leaves a silo.

`schema.py` has every key; `rules.py` what they must agree on; `combinations.py` which features go together, the
product's and others'; `core.py` the value, its canonical form and its digest.
"""

from .combinations import COMBINATIONS, Combination, decide
from .core import Treaty, from_dict
from .deployed import obstacles, roster
from .features import beside
from .mistakes import Mistakes
from .reading import load, parse
from .schema import SECTIONS
from .words import describe, not_covered, privacy, statement, unprotected

__all__ = [
    "COMBINATIONS",
    "SECTIONS",
    "Combination",
    "Mistakes",
    "Treaty",
    "beside",
    "decide",
    "describe",
    "from_dict",
    "load",
    "not_covered",
    "obstacles",
    "parse",
    "privacy",
    "roster",
    "statement",
    "unprotected",
]
