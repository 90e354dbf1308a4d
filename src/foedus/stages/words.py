"""Integers to words: an update as one vector of fixed length whose entries are added modulo 2^w, and never wrap.

Everything that a silo contributes, its weight and its sums of losses too, is a coordinate of that vector. The layout is
public and the same for the whole cohort, so that its length says nothing. The trained numbers take a word each; a
`wide` part, such as a count, takes several words of fewer bits, so that the sum of all of them fits too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import GuaranteeError, SiloError
from ..types import Key, Task, Total, Tree, Update
from .base import Plain

SUM: Key = ("words", "sum")
SCALED: Key = ("metric", "scaled")
WIDE = 48
"""Bits of one wide number, its sign included."""
DTYPES: Mapping[int, Any] = {16: np.dtype("<u2"), 32: np.dtype("<u4"), 64: np.dtype("<u8")}
_SIGNED: Mapping[int, Any] = {16: np.dtype("<i2"), 32: np.dtype("<i4"), 64: np.dtype("<i8")}


def room(word: int, parties: int) -> int:
    """The most, up or down, that one of `parties` may put into a coordinate, so that no sum of theirs wraps in a word
    of 16, 32 or 64 bits.

    >>> room(16, 100)
    327
    """
    if word not in DTYPES or parties < 1:
        raise ValueError(f"Expected word={word} in (16, 32, 64) and parties={parties} >= 1.")
    return ((1 << (word - 1)) - 1) // parties


@dataclass(frozen=True)
class Layout:
    """Which coordinate is what, for every silo of a cohort. `single`: tensors of one word a number, with their shapes;
    `wide`: keys of single numbers of up to 47 bits and a sign. In order; make one with `layout_of`.
    """

    single: tuple[tuple[Key, tuple[int, ...]], ...]
    wide: tuple[Key, ...]
    word: int
    parties: int

    def __post_init__(self) -> None:
        if self._limb < 1:
            raise GuaranteeError(
                f"words in which {self.parties} silos can add a bit each",
                f"{self.word} bits",
                "Take a larger [secure] word.",
            )

    @property
    def length(self) -> int:
        """Words in all."""
        return self._numbers + len(self.wide) * self._limbs

    @property
    def room(self) -> int:
        return room(self.word, self.parties)

    def pack(self, tensors: Tree) -> np.ndarray:
        """(length,) words of one silo's integers. What the layout names and the silo has not is zero; what it has and
        the layout does not name is refused, and so is a number that has no room.
        """
        self._only_known(tensors)
        words = np.zeros(self.length, DTYPES[self.word])
        for (key, shape), place in zip(self.single, self._places, strict=True):
            if key in tensors:
                words[place] = self._checked(key, shape, tensors[key]).reshape(-1).astype(words.dtype)
        for i, key in enumerate(self.wide):
            start = self._numbers + i * self._limbs
            words[start : start + self._limbs] = self._cut(key, tensors.get(key))
        return words

    def unpack(self, words: np.ndarray, count: int) -> dict[Key, np.ndarray]:
        """The sum of `count` silos' integers, int64, from the sum of their words."""
        signed = words.view(_SIGNED[self.word])
        out: dict[Key, np.ndarray] = {
            key: signed[place].astype(np.int64).reshape(shape)
            for (key, shape), place in zip(self.single, self._places, strict=True)
        }
        limbs = words[self._numbers :].reshape(len(self.wide), self._limbs)
        for key, own in zip(self.wide, limbs, strict=True):
            whole = sum(int(x) << (self._limb * place) for place, x in enumerate(own))
            out[key] = np.array([whole - count * 2 ** (WIDE - 1)], np.int64)
        return out

    @cached_property
    def _places(self) -> tuple[slice, ...]:
        ends = np.cumsum([0, *(math.prod(shape) for _, shape in self.single)])
        return tuple(slice(int(a), int(b)) for a, b in zip(ends, ends[1:], strict=False))

    @property
    def _numbers(self) -> int:
        return sum(math.prod(shape) for _, shape in self.single)

    @property
    def _limb(self) -> int:
        """Bits of a wide number in one word: so few that `parties` of them add up without a carry."""
        return min(WIDE, self.word - (self.parties - 1).bit_length())

    @property
    def _limbs(self) -> int:
        return -(-WIDE // self._limb)

    def _only_known(self, tensors: Tree) -> None:
        unknown = sorted(set(tensors) - {key for key, _ in self.single} - set(self.wide))
        if unknown:
            raise GuaranteeError(
                "an update with the parts that the cohort agreed on",
                f"{' '.join(unknown[0])!r} beside them",
                "Nothing leaves a silo beside the sum: name the part in the layout, or drop it.",
            )

    def _checked(self, key: Key, shape: tuple[int, ...], x: np.ndarray) -> np.ndarray:
        if x.shape != shape or not np.issubdtype(x.dtype, np.integer):
            raise GuaranteeError(
                f"integers of shape {shape} for {' '.join(key)!r}",
                f"{x.dtype} of shape {x.shape}",
                "Put a Grid before the words.",
            )
        most = max(int(x.max(initial=0)), -int(x.min(initial=0)))
        if most > self.room:
            raise _no_room(f"coordinates of at most {self.room} steps")
        return x

    def _cut(self, key: Key, x: np.ndarray | None) -> list[int]:
        value = 0 if x is None else int(np.asarray(x).reshape(-1)[0])
        if abs(value) >= 2 ** (WIDE - 1):
            raise _no_room(f"{' '.join(key)!r} below 2^{WIDE - 1} steps")
        shifted, mask = value + 2 ** (WIDE - 1), (1 << self._limb) - 1
        return [(shifted >> (self._limb * place)) & mask for place in range(self._limbs)]


def layout_of(shapes: Mapping[Key, tuple[int, ...]], wide: Iterable[Key], word: int, parties: int) -> Layout:
    """The layout for tensors of these shapes and these single numbers, in an order that everybody finds alike."""
    return Layout(tuple(sorted(shapes.items())), tuple(sorted(wide)), word, parties)


@dataclass(frozen=True)
class Words(Plain):
    """An update of integers as the one coordinate vector `("words", "sum")`; `decode` reads the sum of such vectors.

    Guarantees: all silos send equally many words; none can make a sum wrap, whatever its data; a part that nobody
    agreed on is refused.
    """

    layout: Layout

    def encode(self, update: Update, task: Task) -> Update:
        return replace(update, tensors={SUM: self.layout.pack(update.tensors)})

    def decode(self, total: Total, task: Task) -> Total:
        return replace(total, tensors=self.layout.unpack(total.tensors[SUM], total.count))


@dataclass(frozen=True)
class Limit(Plain):
    """Scales an update down, as a whole, until none of its numbers is larger than `largest` (> 0), in every part
    but `metric` and `weight`; with `count`, adds how often that was as the sum `("metric", "scaled")`.

    Guarantees: the direction of an update is kept and its norm never grows; one with a NaN or an infinity becomes zero.
    """

    largest: float
    count: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.largest < math.inf:
            raise ValueError(f"Expected 0 < largest={self.largest} < ∞.")

    def encode(self, update: Update, task: Task) -> Update:
        most = max((_largest(x) for _, x in self._limited(update.tensors)), default=0.0)
        factor = 1.0 if most <= self.largest else self.largest / most
        tensors = dict(update.tensors)
        if factor < 1.0:
            tensors |= {key: _scaled(x, factor) for key, x in self._limited(update.tensors)}
        if self.count:
            tensors[SCALED] = np.array([float(factor < 1.0)])
        return replace(update, tensors=tensors)

    def _limited(self, tensors: Tree) -> Iterator[tuple[Key, np.ndarray]]:
        return ((key, x) for key, x in tensors.items() if key[0] not in ("metric", "weight"))


def _largest(x: np.ndarray) -> float:
    """Infinite when a number is not finite."""
    most = float(np.abs(x).max(initial=0.0))
    return most if most < math.inf else math.inf


def _scaled(x: np.ndarray, factor: float) -> np.ndarray:
    return x * np.asarray(factor, x.dtype) if factor else np.zeros_like(x)


def _no_room(expected: str) -> SiloError:
    return SiloError(
        expected,
        "a larger one, whose sum could wrap",
        "Raise [secure] range or word in a new treaty; nothing has left this silo.",
    )
