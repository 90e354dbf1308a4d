"""One silo's encoded data, and the order in which local steps read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from ..lm.objectives import Encoded, concat
from ..seeds import derive, generator


@dataclass(frozen=True)
class Shard:
    """`size` consecutive rows of a silo's training data, from `offset` on, shuffled under `name`."""

    name: str
    offset: int
    size: int

    def pick(self, seed: int, epoch: int, positions: np.ndarray) -> np.ndarray:
        """The rows at some positions of one epoch's order."""
        return self.offset + _order(derive(seed, "shuffle", self.name, epoch), self.size)[positions]


@dataclass(frozen=True)
class Units:
    """Whom a guarantee protects: the unit of each training row, (rows,) in 0 … n − 1, and a key of each unit, (n,)
    uint64.

    A key comes from the unit's own content or name, so it does not change when others come or go.
    """

    of: np.ndarray
    keys: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def _by_unit(self) -> tuple[np.ndarray, np.ndarray]:
        return np.argsort(self.of, kind="stable"), np.searchsorted(np.sort(self.of), np.arange(len(self.keys) + 1))

    def rows(self, unit: int, most: int, random: np.random.Generator) -> np.ndarray:
        """The rows of one unit, in order; when it has more than `most`, so many of them at random."""
        order, bounds = self._by_unit
        mine = order[bounds[unit] : bounds[unit + 1]]
        return mine if len(mine) <= most else np.sort(random.choice(mine, most, replace=False))


@dataclass(frozen=True)
class Silo:
    """A silo's name and its encoded splits ("train", "validation", "test").

    A silo reads one shard. The pooled baseline is a silo that reads everybody's, so that each of its batches is the
    silos' batches together. `units`: whom its private steps protect, where there are some.
    """

    name: str
    splits: Mapping[str, Encoded]
    shards: tuple[Shard, ...] = ()
    units: Units | None = None

    def __post_init__(self) -> None:
        if not self.shards:
            object.__setattr__(self, "shards", (Shard(self.name, 0, len(self.splits["train"])),))

    @property
    def examples(self) -> int:
        """How many rows it trains on. Private unless the treaty discloses it."""
        return len(self.splits["train"])

    def rows(self, seed: int, round: int, step: int, batch: int, steps: int | None, epochs: int | None) -> np.ndarray:
        """The rows of one local step of one round; shards that are through with their epochs add none."""
        return np.concatenate([_step(s, seed, round, step, batch, steps, epochs) for s in self.shards])

    def local_steps(self, batch: int, steps: int | None, epochs: int | None) -> int:
        """How many local steps one round takes: as said, or `epochs` times the batches of the largest shard."""
        return steps if steps is not None else (epochs or 1) * max(-(-shard.size // batch) for shard in self.shards)


def pool(name: str, silos: Sequence[Silo]) -> Silo:
    """All silos' training data as one silo that reads their batches side by side."""
    sizes = [silo.examples for silo in silos]
    offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    shards = tuple(Shard(s.name, int(o), n) for s, o, n in zip(silos, offsets, sizes, strict=True))
    return Silo(name, {"train": concat([silo.splits["train"] for silo in silos])}, shards)


def _step(shard: Shard, seed: int, round: int, step: int, batch: int, steps: int | None, epochs: int | None):
    if steps is not None:  # one endless stream of epochs, cut into rounds
        stream = np.arange(batch) + (round * steps + step) * batch
        epoch, position = np.divmod(stream, shard.size)
        return np.concatenate([shard.pick(seed, int(e), position[epoch == e]) for e in np.unique(epoch)])
    epochs = epochs or 1
    epoch, at = divmod(step, -(-shard.size // batch))
    if epoch >= epochs:
        return np.empty(0, np.int64)
    return shard.pick(seed, round * epochs + epoch, np.arange(at * batch, min((at + 1) * batch, shard.size)))


@lru_cache(maxsize=1024)
def _order(seed: int, size: int) -> np.ndarray:
    return generator(seed).permutation(size)
