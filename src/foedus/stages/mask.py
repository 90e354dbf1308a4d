"""Masks: after this stage single updates cannot be read, and their sum can.

The secrets are not here but with `masks`, the silo's side of a secure sum (`secure/silo.py`); without them the stage
refuses, so nothing ever leaves in clear because a key was missing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import numpy as np

from ..types import Task, Update
from .base import Plain
from .words import SUM


class Masks(Protocol):
    """A silo's masks of the round that it was told to take part in."""

    def add(self, silo: str, words: np.ndarray) -> None:
        """Adds them to the words, in place and once; raises `SiloError` where there are none."""


@dataclass(frozen=True)
class Mask(Plain):
    """Adds a silo's masks to its words. In the sum over the survivors they have been taken off again, exactly."""

    hides: ClassVar[bool] = True
    masks: Masks = field(repr=False)

    def encode(self, update: Update, task: Task) -> Update:
        words = update.tensors[SUM].copy()
        self.masks.add(update.silo, words)
        return replace(update, tensors={SUM: words})
