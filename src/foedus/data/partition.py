"""Who holds which examples: one table into silos, by a column or by a draw.

Natural partitions put each value of a column into a silo of its own. Drawn ones make `count` silos: `iid`; `quantity`
(sizes from a Dirichlet); `dirichlet` (label skew, Hsu et al. 2019, arXiv 1909.06335, section 3). Every example goes to
exactly one silo, and which one depends on the seed and on the examples, not on the order of rows.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ..errors import DataError, one_of
from ..seeds import generator
from .sources import nearest
from .split import shares

DRAWN = ("dirichlet", "quantity", "iid")
NATURAL = ("domain", "author", "label")


@dataclass(frozen=True)
class Partition:
    """`by`: "domain", "author", "label", "column:<name>", or drawn: "dirichlet", "quantity", "iid".

    `count`: how many silos; drawn partitions need it, others have as many as the column has values. `alpha`: in (0,
    1e9], small is skewed; for dirichlet and quantity. `min_examples`: a silo with fewer is an error (a quantity
    partition gives each that many first). `names`: of the drawn silos, in order; or the values of the column that are
    silos, in order, the others being left out. `members`: of a natural partition, the values that each silo in `names`
    holds, others being left out. `max_examples`: a silo with more keeps a subset that its texts and the seed decide.
    """

    by: str = "domain"
    count: int | None = None
    alpha: float = 0.5
    min_examples: int = 1
    names: tuple[str, ...] = ()
    max_examples: int | None = None
    members: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.by not in (*DRAWN, *NATURAL) and not re.fullmatch("column:.+", self.by):
            raise _bad("a way to make silos", f'"{self.by}"', one_of(self.by, (*DRAWN, *NATURAL, "column:<name>")))
        if self.drawn != (self.count is not None):
            do = "Set silos.count." if self.drawn else f"Leave out silos.count; {self.by} has a silo for every value."
            raise _bad(f'{"a" if self.drawn else "no"} count for by = "{self.by}"', f"count={self.count}", do)
        _at_least_one("count", self.count)
        _at_least_one("min_examples", self.min_examples)
        _at_least_one("max_examples", self.max_examples)
        if not 0 < self.alpha <= 1e9:
            raise _bad("0 < alpha ≤ 1e9", f"alpha={self.alpha}", "Take 0.5; smaller is more skewed.")
        if self.max_examples is not None and self.max_examples < self.min_examples:
            came = f"max_examples={self.max_examples} < min_examples={self.min_examples}"
            raise _bad("min_examples ≤ max_examples", came, "Lower the one or raise the other.")
        _check_names(self)

    @property
    def drawn(self) -> bool:
        """Whether silos are made by a draw, not by the values of a column."""
        return self.by in DRAWN


def partition(table: pa.Table, how: Partition, seed: int) -> dict[str, pa.Table]:
    """The examples of each silo, in the table's order; silos in the order of `names`, else of the column's values.

    Silo names are fit for folder names: letters, digits, ".", "_" and "-", at most 80; others become "_", and values
    that would then share a name get a suffix. Raises `DataError` for a missing column, a missing value, fewer examples
    than silos need, and a silo with fewer than `min_examples`.
    """
    if not table.num_rows:
        raise _bad("examples to make silos of", "none", "Check data.source and data.keep.")
    rows = _draw(table, how, seed) if how.drawn else _natural(table, how)
    if how.max_examples is not None:
        share = shares(table, seed, "max_examples")
        rows = {name: _fewest(mine, share, how.max_examples) for name, mine in rows.items()}
    small = [name for name, mine in rows.items() if len(mine) < how.min_examples]
    if small:
        came = f'{len(rows[small[0]])} at "{small[0]}"' + (
            f" and {len(small) - 1} more such silos" if small[1:] else ""
        )
        do = "Lower silos.min_examples, choose the silos (silos.names, data.keep), or make fewer."
        raise _bad(f"at least {how.min_examples} examples at every silo", came, do)
    return {name: table.take(pa.array(mine)) for name, mine in rows.items()}


def _natural(table: pa.Table, how: Partition) -> dict[str, np.ndarray]:
    column = table[_column(table, how.by.removeprefix("column:"))]
    if column.null_count:
        do = "Fill it in, or leave these rows out."
        raise _bad(f"a value for {how.by} in every row", f"none in {column.null_count} rows", do)
    encoded = column.combine_chunks().dictionary_encode()
    values = [str(value) for value in encoded.dictionary.to_pylist()]
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    ordered = np.argsort(codes, kind="stable")
    groups = np.split(ordered, np.cumsum(np.bincount(codes, minlength=len(values)))[:-1])
    holders = dict(zip(values, groups, strict=True))
    chosen = list(how.names) or sorted(holders)
    held = how.members or [(name,) for name in chosen]
    for value in (value for mine in held for value in mine):
        if value not in holders:
            raise _bad(f"names that are values of {how.by}", f'"{value}"', nearest(value, list(holders)))
    rows = [np.sort(np.concatenate([holders[value] for value in mine])) for mine in held]
    return dict(zip(safe_names(chosen), rows, strict=True))


def _column(table: pa.Table, name: str) -> str:
    """The table's column of that name, canonical or as the source calls it."""
    if name in table.column_names:
        return name
    known = json.loads((table.schema.metadata or {}).get(b"columns", b"{}"))
    for role, own in known.items():
        if own == name and role in table.column_names:
            return role
    do = "Name it in the treaty's [data] section. " + one_of(name, {*table.column_names, *known.values()} - {"text"})
    raise _bad(f'a column "{name}" to make silos by', "no such column", do)


def _draw(table: pa.Table, how: Partition, seed: int) -> dict[str, np.ndarray]:
    count, rows = how.count or 0, table.num_rows
    if rows < count * how.min_examples:
        came = f"{rows} examples for {count} silos of at least {how.min_examples}"
        raise _bad("enough examples for every silo", came, "Make fewer silos, or lower silos.min_examples.")
    shuffled = np.argsort(shares(table, seed, "partition"), kind="stable")
    if how.by == "dirichlet":
        silos = _label_skew(table, shuffled, count, how.alpha, seed)
    else:
        sizes = _quantities(rows, how, seed) if how.by == "quantity" else _equal(rows, count)
        silos = np.split(shuffled, np.cumsum(sizes)[:-1])
    names = how.names or tuple(f"silo-{index:0{len(str(count - 1))}d}" for index in range(count))
    return {name: np.sort(mine) for name, mine in zip(names, silos, strict=True)}


def _equal(rows: int, count: int) -> np.ndarray:
    return rows // count + (np.arange(count) < rows % count)


def _quantities(rows: int, how: Partition, seed: int) -> np.ndarray:
    """Sizes that sum to `rows`: `min_examples` each, and of the rest a Dirichlet(α) share each (largest remainders)."""
    count = how.count or 0
    spare = rows - count * how.min_examples
    exact = spare * generator(seed, "partition", "quantity").dirichlet(np.full(count, how.alpha))
    sizes = np.floor(exact).astype(np.int64)
    largest = np.argsort(sizes - exact, kind="stable")[: spare - sizes.sum()]
    sizes[largest] += 1
    return how.min_examples + sizes


def _label_skew(table: pa.Table, shuffled: np.ndarray, count: int, alpha: float, seed: int) -> list[np.ndarray]:
    """Hsu et al. 2019: each silo draws its label distribution q ~ Dir(α·p), p the labels' shares of all examples, and
    then its equal part of the examples from q, without replacement; a label that has run out is left out and q
    renormalised. (Drawing each label's division over silos instead, as others do, makes silos of unequal size.)"""
    labels = _labels(table)[shuffled]
    queues = [shuffled[labels == label] for label in range(labels.max() + 1)]
    left = np.array([len(queue) for queue in queues])
    prior = left / left.sum()
    silos = []
    for index, size in enumerate(_equal(len(shuffled), count)):
        random = generator(seed, "partition", "dirichlet", index)
        take = _without_replacement(left, alpha * prior, int(size), random)
        silos.append(
            np.concatenate([queue[len(queue) - n :][:k] for queue, n, k in zip(queues, left, take, strict=True)])
        )
        left = left - take
    return silos


def _without_replacement(left: np.ndarray, weights: np.ndarray, size: int, random: np.random.Generator) -> np.ndarray:
    """How many of each label one silo takes: `size` draws from q ~ Dir(weights), when `left` of each are to be had and
    size ≤ their sum. Where all that is left has a q of zero, which a small α makes, q is drawn anew among those."""
    q, take = random.dirichlet(weights), np.zeros_like(left)
    while (missing := size - take.sum()) > 0:
        still = take < left
        if not (q[still].sum() > 0):
            q = np.zeros_like(q)
            q[still] = random.dirichlet(weights[still])
        chances = np.where(still, q, 0.0)
        take = np.minimum(left, take + random.multinomial(missing, chances / chances.sum()))
    return take


def _labels(table: pa.Table) -> np.ndarray:
    """Every row's label, else its domain, as its place in the alphabetical order."""
    name = next((name for name in ("label", "domain") if name in table.column_names), None)
    if name is None:
        do = "Name a label or domain column in the treaty's [data] section, or take quantity or iid."
        raise _bad("a label or a domain, for label skew", "neither", do)
    return np.unique(table[name].to_numpy(zero_copy_only=False).astype(str), return_inverse=True)[1]


def _fewest(mine: np.ndarray, share: np.ndarray, most: int) -> np.ndarray:
    return np.sort(mine[np.argsort(share[mine], kind="stable")[:most]])


def at_most(table: pa.Table, most: int, seed: int) -> pa.Table:
    """At most `most` of a silo's examples, the same that `partition` keeps with `max_examples`."""
    return table.take(pa.array(_fewest(np.arange(table.num_rows), shares(table, seed, "max_examples"), most)))


def safe_names(values: Sequence[str]) -> list[str]:
    """A folder name for each value, all different even where case does not count.

    >>> safe_names(["sci.med", "a/b", "a:b"])
    ['sci.med', 'a_b-c14cddc0', 'a_b-6783a31e']
    """
    plain = [_safe(value) for value in values]
    seen = Counter(name.casefold() for name in plain)
    return [
        name if seen[name.casefold()] == 1 and len(name) <= _LONGEST else f"{name[: _LONGEST - 9]}-{_tag(value)}"
        for name, value in zip(plain, values, strict=True)
    ]


def _safe(value: str) -> str:
    name = re.sub(r"[^\w.-]", "_", unicodedata.normalize("NFC", value))
    name = re.sub(r"^[.-]|\.$", "_", name) or "_"
    return f"{name}_" if name.partition(".")[0].upper() in _RESERVED else name


def _tag(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()[:8]


def _check_names(how: Partition) -> None:
    twice = [name for name, times in Counter(name.casefold() for name in how.names).items() if times > 1]
    if twice:
        raise _bad("silo names that differ, also in lower case", f'"{twice[0]}" twice', "Rename one of them.")
    if how.members and (how.drawn or len(how.members) != len(how.names)):
        came = f"{len(how.members)} for {len(how.names)} names, by {how.by}"
        raise _bad("the members of each named silo, by a column", came, "Give every silo a name and its own members.")
    every = Counter(value for mine in how.members for value in mine)
    if not all(how.members) or any(times > 1 for times in every.values()):
        raise _bad("members at every silo, none at two", f"{how.members}", "Give each value to one silo.")
    if not how.drawn and not how.members:
        return
    if how.drawn and how.names and len(how.names) != how.count:
        do = "Give one name for each silo, or none."
        raise _bad(f"{how.count} silo names", f"{len(how.names)}", do)
    for name in how.names:
        if name != _safe(name) or len(name) > _LONGEST:
            do = f'Use letters, digits, ".", "_" and "-", at most {_LONGEST}: "{_safe(name)[:_LONGEST]}".'
            raise _bad("silo names that are fit for folder names", f'"{name}"', do)


def _at_least_one(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise _bad(f"{name} ≥ 1", f"{name}={value}", "Set a positive whole number.")


def _bad(expected: str, came: str, do: str) -> DataError:
    return DataError(expected, came, do, where="silos")


_LONGEST = 80  # characters; 255 bytes is what file systems allow
_RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(1, 10))}
