"""Encryption: after this stage single updates cannot be read, and their sum only by a key holder.

Words are encrypted as integers from 0 up. Where only a selection of them is, another stage hides the others; the two
sums become words again in `decode`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Protocol

import numpy as np

from ..errors import GuaranteeError
from ..secure import bfv
from ..secure.backends import Adder, PublicKey, SecretKey
from ..secure.bfv import Opened, Sums
from ..secure.selective import Selection, select
from ..types import Key, Task, Total, Update
from .base import Plain, Stage
from .words import DTYPES, SUM, Layout

ENCRYPTED: Key = ("encrypted", "sum")


@dataclass(frozen=True)
class Encrypted:
    """What is encrypted of vectors with this layout: all words, or a `selection` of them. Public, and the same for
    silos, coordinator and key holders.
    """

    layout: Layout
    selection: Selection | None = None

    def __post_init__(self) -> None:
        if self.selection is not None and (self.selection.length != self.layout.length or not self.selection.count):
            raise GuaranteeError(
                f"a selection among {self.layout.length} words, of one at least",
                f"{self.selection.count} among {self.selection.length}",
                "Make it for this layout.",
            )

    @cached_property
    def sums(self) -> Sums:
        """The integers that are encrypted. `parties` of them add up to less than 2^word."""
        count = self.layout.length if self.selection is None else self.selection.count
        return Sums(count, (2**self.layout.word - 1) // self.layout.parties, self.layout.parties)

    def adder(self, key: PublicKey) -> Adder:
        """For the coordinator: `add` every silo's ("encrypted", "sum") as bytes; `total` goes to a key holder."""
        return bfv.adder(self.sums, key)

    def open(self, key: SecretKey, total: bytes, minimum: int) -> Opened:
        """For a key holder: see `bfv.decrypt`. `Encrypt.decode` takes its `values`."""
        return bfv.decrypt(self.sums, key, total, minimum)

    def raised(self, words: np.ndarray) -> np.ndarray:
        """The words to encrypt as integers from 0 up: those with a sign are moved by `_shift`."""
        moved: np.ndarray = (words + self._shift).astype(np.uint64)
        return moved

    def lowered(self, values: np.ndarray, count: int) -> np.ndarray:
        """The sum's words, modulo 2^word, from the sum of `count` silos' integers."""
        dtype = DTYPES[self.layout.word]
        with np.errstate(over="ignore"):
            lowered: np.ndarray = values.astype(dtype) - self._shift * np.array(count, dtype)
        return lowered

    @cached_property
    def _shift(self) -> np.ndarray:
        """(encrypted,): what brings a word's range to begin at 0. Wide numbers' words begin there already."""
        shift = np.zeros(self.layout.length, DTYPES[self.layout.word])
        shift[: sum(math.prod(shape) for _, shape in self.layout.single)] = self.layout.room
        return shift if self.selection is None else self.selection.split(shift)[0]


class Keys(Protocol):
    """The public key of the sum that a silo was told to take part in."""

    def key(self, silo: str) -> PublicKey:
        """Raises `SiloError` where there is none."""


@dataclass(frozen=True)
class Encrypt(Plain):
    """Replaces a silo's words by their ciphertexts under `key`, or that which it has among `Keys`: ("encrypted",
    "sum"), bytes. Where only a selection is encrypted, `rest` hides the others, such as a `Mask`; without it the stage
    cannot be made.

    `decode` takes the decrypted sum under that same name, and that of the others, if there are any, as words.
    Guarantees: what is encrypted is read by no-one without the secret key; `backends.trust` says who that is.
    """

    hides: ClassVar[bool] = True
    what: Encrypted
    key: PublicKey | Keys = field(repr=False)
    rest: Stage | None = None

    def __post_init__(self) -> None:
        if self.what.selection is not None and (self.rest is None or not self.rest.hides):
            raise GuaranteeError(
                "a stage that hides the words that are not encrypted",
                "none" if self.rest is None else f"{type(self.rest).__name__}, after which they can be read",
                "Give a Mask for the rest, or encrypt all of them.",
            )

    def encode(self, update: Update, task: Task) -> Update:
        words, hidden = update.tensors[SUM], {}
        if self.what.selection is not None and self.rest is not None:
            words, others = self.what.selection.split(words)
            hidden = dict(self.rest.encode(replace(update, tensors={SUM: others}), task).tensors)
        key = self.key if isinstance(self.key, PublicKey) else self.key.key(update.silo)
        blob = bfv.encrypt(self.what.sums, key, self.what.raised(words))
        return replace(update, tensors=hidden | {ENCRYPTED: np.frombuffer(blob, np.uint8)})

    def decode(self, total: Total, task: Task) -> Total:
        words = self.what.lowered(total.tensors[ENCRYPTED], total.count)
        if self.what.selection is not None:
            words = self.what.selection.join(words, total.tensors[SUM])
        return replace(total, tensors={SUM: words})


def selection_of(layout: Layout, sizes: Mapping[str, np.ndarray], share: float) -> Selection:
    """The `share` of a layout's words with the largest public `sizes`, which are by trained parameter (see
    `selective.sensitivity`). Words of anything else, such as weights and counts, come first of all.
    """
    first = 1.0 + max((float(x.max(initial=0.0)) for x in sizes.values()), default=0.0)
    rank = np.full(layout.length, first)
    start = 0
    for (_, name), shape in layout.single:
        end = start + math.prod(shape)
        if name in sizes:
            rank[start:end] = sizes[name].reshape(-1)
        start = end
    return select(rank, share)
