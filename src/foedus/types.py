"""The six nouns. Every arrow in the system goes from one of these to another; all are frozen values.

    State ──Task──▶ silo ──Update──▶ stages ──Report──▶ server ──Total──▶ mechanism ──Release──▶ State

A `Task` and a `Release` are public. An `Update` is private to its silo, a `Total` to the server's round.
Read `loop.py` to see them move.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Key = tuple[str, str]
"""(part, parameter), for example `("delta", "layers.3.q_proj.lora_A")`. A pair, so no name is ever parsed."""

Tree = Mapping[Key, np.ndarray]
Params = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Task:
    """What the server asks of one cohort. Public.

    `model`: digest of the frozen base. `settings`: this round's public knobs, such as a clip norm. `extra`: shared
    state of the algorithm, such as SCAFFOLD's control variate.
    """

    round: int
    model: str
    params: Params
    cohort: tuple[str, ...]
    seed: int
    settings: Mapping[str, float] = field(default_factory=dict)
    extra: Tree = field(default_factory=dict)


@dataclass(frozen=True)
class Update:
    """One silo's contribution, private to it. A delta is **local minus global**; `weight` is its number of examples;
    `silo`: whose it is, so that stages with secrets know them apart.
    """

    tensors: Tree
    weight: float = 1.0
    silo: str = ""


@dataclass(frozen=True)
class Receipt:
    """What is public about one silo's part in a round. `disclosed` holds only what the treaty says silos disclose."""

    silo: str
    round: int
    task: str = ""  # SHA-256 of the task as sent
    payload: str = ""  # SHA-256 of the payload as sent
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0
    disclosed: Mapping[str, float] = field(default_factory=dict)
    failure: str = ""  # why this silo was left out of the round; "" when it was not


@dataclass(frozen=True)
class Report:
    """What crosses the wire from one silo: encoded tensors (see `wire.py`) and a receipt. `mail`: what it sends to
    other silos, and only they can read (see `secure/`).
    """

    silo: str
    round: int
    payload: bytes
    receipt: Receipt
    mail: bytes = b""


@dataclass(frozen=True)
class Total:
    """A sum over one cohort. `bound`: the most one unit can move it, in L2; infinite when nobody knows."""

    tensors: Tree
    bound: float
    count: int


@dataclass(frozen=True)
class Release:
    """The only thing that a server optimizer, a checkpoint, a metric or a report may see.

    `event`: what the accountant composes. `unit`: whose presence it protects ("" when nobody's).
    `receipts`: who took part, in the order of the cohort, with the failures named.
    """

    tensors: Tree
    event: Mapping[str, Any]
    unit: str = ""
    receipts: tuple[Receipt, ...] = ()


@dataclass(frozen=True)
class State:
    """All that passes from one round to the next; a checkpoint is exactly this."""

    round: int
    params: Params
    optimizer: Tree = field(default_factory=dict)
    mechanism: Tree = field(default_factory=dict)
    settings: Mapping[str, float] = field(default_factory=dict)
    extra: Tree = field(default_factory=dict)
