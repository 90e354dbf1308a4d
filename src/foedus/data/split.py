"""What is held out: every silo's examples into train, validation and test.

By hash, an example's place depends on the seed and its text alone: the same text never lands in two splits, not even at
two silos, and new rows never move old ones. By time, the oldest examples are for training and the newest for the test.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import DataError, one_of
from ..seeds import derive


@dataclass(frozen=True)
class SplitPlan:
    """`by`: "hash" or "time". `validation`, `test`: shares of the examples, 0 ≤ share, together below 1."""

    by: str = "hash"
    validation: float = 0.1
    test: float = 0.1

    def __post_init__(self) -> None:
        if self.by not in ("hash", "time"):
            raise DataError('split by "hash" or "time"', f'"{self.by}"', one_of(self.by, ("hash", "time")))
        if not (0 <= self.validation and 0 <= self.test and self.validation + self.test < 1):
            came = f"validation={self.validation}, test={self.test}"
            raise DataError("shares ≥ 0 that leave something for training", came, "Take 0.1 and 0.1.")


@dataclass(frozen=True)
class Splits:
    """One silo's examples, each in exactly one of the three; validation and test may be empty, train never is.

    `scrubbed`: how many marks of each kind `scrub` put into them, and how many texts it dropped.
    """

    train: pa.Table
    validation: pa.Table
    test: pa.Table
    scrubbed: Mapping[str, int] = field(default_factory=dict)


def split(table: pa.Table, how: SplitPlan, seed: int) -> Splits:
    """The splits of one silo's examples, each in the table's order.

    By time, exactly ⌊n·test⌋ examples are test and ⌊n·validation⌋ validation; equal times are ordered by the hash, so
    the order of rows never matters. By hash, the shares hold on average. Raises `DataError` for no examples, for a
    split by time without times, and when nothing is left for training.
    """
    if not table.num_rows:
        raise DataError("examples to split", "none", "Leave this silo out, or check the partition.")
    place = _by_time(table, how, seed) if how.by == "time" else _by_hash(table, how, seed)
    if not (place == _TRAIN).any():
        came = f"none of its {table.num_rows} (validation {how.validation:g}, test {how.test:g})"
        raise DataError("an example to train on", came, "Hold out less, or give this silo more examples.")
    return Splits(*(table.filter(pa.array(place == part)) for part in (_TRAIN, _VALIDATION, _TEST)))


def bound_contributions(table: pa.Table, most: int, seed: int) -> pa.Table:
    """At most `most` examples of each author, in the table's order: those whose texts hash lowest under `seed`.

    Whom another author's examples crowd out never matters: the choice is each author's own. Raises `DataError` for a
    table without authors.
    """
    if "author" not in table.column_names:
        raise DataError("a column with authors, to bound what one contributes", "none", "Name it with [data] author.")
    share = shares(table, seed, "contributions")
    authors = np.asarray(table["author"].to_pylist(), dtype=object).astype(str)
    order = np.lexsort((share, authors))
    starts = np.flatnonzero(np.r_[True, authors[order][1:] != authors[order][:-1]])
    place = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    return table.take(np.sort(order[place < most]))


def shares(table: pa.Table, seed: int, purpose: str) -> np.ndarray:
    """A number in [0, 1) for every example, as `share_of` its text."""
    return share_of(table["text"].to_pylist(), seed, purpose)


def share_of(texts: Sequence[str], seed: int, purpose: str) -> np.ndarray:
    """A number in [0, 1) for every text, uniform over texts: SHA-256 of the seed, the purpose and the text."""
    salt = derive(seed, purpose).to_bytes(8, "little")
    heads = b"".join(hashlib.sha256(salt + text.encode()).digest()[:8] for text in texts)
    return (np.frombuffer(heads, "<u8") >> np.uint64(11)) * 2.0**-53


def holdings(silos: Mapping[str, Splits]) -> dict[str, dict[str, Any]]:
    """Who holds what: for each silo the numbers of examples in train, validation and test, and over all three by domain
    and by label (empty where the source has none), in alphabetical order; and what was scrubbed, where something was.
    """
    return {name: _holding(splits) for name, splits in silos.items()}


def _holding(splits: Splits) -> dict[str, Any]:
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    everything = pa.concat_tables(list(parts.values()))
    sizes = {name: part.num_rows for name, part in parts.items()}
    scrubbed = {"scrubbed": dict(sorted(splits.scrubbed.items()))} if splits.scrubbed else {}
    return sizes | {"domains": _counts(everything, "domain"), "labels": _counts(everything, "label")} | scrubbed


def _counts(table: pa.Table, column: str) -> dict[str, int]:
    if column not in table.column_names:
        return {}
    counts = pc.value_counts(table[column]).to_pylist()
    return dict(sorted((one["values"], one["counts"]) for one in counts))


def _by_hash(table: pa.Table, how: SplitPlan, seed: int) -> np.ndarray:
    share = shares(table, seed, "split")
    return np.where(share < how.test, _TEST, np.where(share < how.test + how.validation, _VALIDATION, _TRAIN))


def _by_time(table: pa.Table, how: SplitPlan, seed: int) -> np.ndarray:
    if "timestamp" not in table.column_names:
        do = 'Name the column of times in the treaty\'s [data] section, or split by "hash".'
        raise DataError("a timestamp for every example, to split by time", "no timestamp column", do)
    oldest_first = np.lexsort((shares(table, seed, "split"), table["timestamp"].to_numpy()))
    rows = table.num_rows
    test, validation = (int(rows * part + 1e-9) for part in (how.test, how.validation))  # 0.29 × 100 is 29
    place = np.full(rows, _TRAIN)
    place[oldest_first[rows - test :]] = _TEST
    place[oldest_first[rows - test - validation : rows - test]] = _VALIDATION
    return place


_TRAIN, _VALIDATION, _TEST = 0, 1, 2
