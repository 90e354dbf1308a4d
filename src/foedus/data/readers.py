"""Text from anywhere into one canonical table: `text`, and what else the treaty names a column for.

`read` takes what a treaty's `data.source` says; `from_dataset` takes an object in memory. Both give a `pyarrow.Table`
with `text` (string, never null or blank) and, where the source has them, `target`, `label`, `domain`, `author`
(strings, never blank) and `timestamp` (float64, seconds since 1970 UTC). `sources.py` opens the sources.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import DataError, one_of
from .sources import Source, nearest, open_object, open_source, reading

if TYPE_CHECKING:
    import datasets

ROLES = ("text", "target", "label", "domain", "author", "timestamp")


@dataclass(frozen=True)
class Columns:
    """Which columns of the source play which role. Several text columns are joined by a newline, blank ones left out.

    `own`: further columns to keep as strings under their own names, for a partition by them. Catalogued data sets and
    folders of text know their roles; a role named here wins.
    """

    text: str | tuple[str, ...] = "text"
    target: str | None = None
    label: str | None = None
    domain: str | None = None
    author: str | None = None
    timestamp: str | None = None
    own: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        named = [*self.texts, *self.own, *(getattr(self, role) for role in ROLES[1:])]
        if not self.texts or any(name is not None and (not isinstance(name, str) or not name) for name in named):
            raise DataError("column names that are words", repr(self), "Leave out a role that has no column.")
        if clash := set(self.own) & set(ROLES):
            do = f'Name it by its role: {min(clash)} = "{min(clash)}".'
            raise DataError("own columns beside the canonical ones", f'"{min(clash)}"', do)

    @property
    def texts(self) -> tuple[str, ...]:
        """The text columns, always as a tuple."""
        return (self.text,) if isinstance(self.text, str) else tuple(self.text)


def read(source: str, columns: Columns, *, base: Path) -> pa.Table:
    """The canonical table of a source, in the source's order.

    `source`: a catalogued name (`"20newsgroups"`, `"20newsgroups:test"`); a path to csv, tsv, tab, jsonl, json (all
    also with .gz) or parquet; a folder of .txt files, where a sub-folder's name is the domain and the label; a folder
    saved by `datasets.save_to_disk` (`"folder:split"`); or `"hf:org/name[:config][:split]"`. Relative paths start at
    `base`. Rows without text are dropped; `dropped(table)` says how many. Raises `DataError`, and nothing else, for
    whatever may be wrong with the source; `AssetError` if a catalogued one cannot be fetched.
    """
    return _canonical(open_source(source, base), columns)


def from_dataset(rows: datasets.Dataset | pa.Table | list[dict[str, Any]], columns: Columns) -> pa.Table:
    """The canonical table of a data set in memory; like `read` otherwise. Class numbers become their names."""
    return _canonical(open_object(rows), columns)


def dropped(table: pa.Table) -> int:
    """How many rows of the source had no text and were left out."""
    return int((table.schema.metadata or {}).get(b"dropped", b"0"))


def only(table: pa.Table, domains: Iterable[str]) -> pa.Table:
    """The examples of these domains. Raises `DataError` for one that the table does not have."""
    domains = list(domains)
    if "domain" not in table.column_names:
        do = "Name the domain column in the treaty's [data] section."
        raise DataError("examples with a domain, to keep some of them", "no domain column", do)
    known = pc.unique(table["domain"]).to_pylist()
    for domain in domains:
        if domain not in known:
            raise DataError("domains that the source has", f'"{domain}"', nearest(domain, known), where="data.keep")
    return table.filter(pc.is_in(table["domain"], pa.array(domains, pa.string())))


def _canonical(source: Source, columns: Columns) -> pa.Table:
    texts = [_resolve(source, "text", name) for name in columns.texts]
    roles = _roles(source, columns)
    owns = {name: _resolve(source, name, name) for name in columns.own}
    with reading(source.where):
        raw = source.take(list(dict.fromkeys([*texts, *roles.values(), *owns.values()])))
        raw.validate(full=True)
    raw = _without_views(raw)
    text = _joined([_strings(raw[name], name, source.where, numbers=False) for name in texts])
    kept = pc.is_valid(text)
    rows = np.flatnonzero(kept.to_numpy(zero_copy_only=False))
    if not len(rows):
        do = f"Check that column {' and '.join(texts)} is the text."
        raise DataError("at least one example with text", f"{len(text)} rows without", do, where=source.where)
    raw, out = raw.filter(kept), {"text": text.filter(kept)}
    for role, name in (roles | owns).items():
        out[role] = _typed(role, raw[name], name, source.where)
        _complete(out[role], name, role, rows, source.where)
    facts = {"dropped": str(len(text) - len(rows)), "source": source.where, "columns": json.dumps(roles)}
    return pa.table(out).replace_schema_metadata(facts).combine_chunks()


def _roles(source: Source, columns: Columns) -> dict[str, str]:
    """Which column plays which role besides the text: as named, else as the source itself says."""
    named = {role: getattr(columns, role) for role in ROLES[1:]}
    resolved = {role: _resolve(source, role, name) for role, name in named.items() if name is not None}
    known = {role: name for role, name in source.roles.items() if role in ROLES[1:]}
    return {role: (known | resolved)[role] for role in ROLES[1:] if role in known or role in resolved}


def _resolve(source: Source, role: str, name: str) -> str:
    """The source's own name for what the treaty calls `name`: a column, or a role that the source knows."""
    if source.names.count(name) > 1:
        do = "Rename one of them in the source."
        raise DataError(f'one column "{name}"', f"{source.names.count(name)} of that name", do, where=source.where)
    if name in source.names:
        return name
    if name in source.roles:
        return source.roles[name]
    came = f"no such column among {len(source.names)}"
    raise DataError(f'a column "{name}" (for {role})', came, one_of(name, source.names), where=source.where)


def _joined(parts: list[pa.ChunkedArray]) -> pa.ChunkedArray:
    """The parts of every row joined by newlines, blank ones left out; null where all are blank. Two at a time, because
    Arrow's own way to skip nulls drops rows in which all are null (pyarrow 26; narwhals issue 3965)."""
    return reduce(lambda a, b: pc.coalesce(pc.binary_join_element_wise(a, b, "\n"), a, b), map(_filled, parts))


def _without_views(table: pa.Table) -> pa.Table:
    """Views of strings as plain strings: Arrow does not filter views yet."""
    for place, (name, kind) in enumerate(zip(table.column_names, table.schema.types, strict=True)):
        if pa.types.is_string_view(kind):
            table = table.set_column(place, name, table[name].cast(pa.string()))
    return table


def _filled(strings: pa.ChunkedArray) -> pa.ChunkedArray:
    """The same strings with null for blank ones."""
    blank = pc.or_(pc.utf8_is_space(strings), pc.equal(pc.binary_length(strings), 0))
    return pc.if_else(blank, pa.scalar(None, pa.string()), strings)


def _typed(role: str, column: pa.ChunkedArray, name: str, where: str) -> pa.ChunkedArray:
    if role == "timestamp":
        return _seconds(column, name, where)
    strings = _strings(column, name, where, numbers=role != "target")
    return _filled(strings if role == "target" else pc.utf8_trim_whitespace(strings))


def _strings(column: pa.ChunkedArray, name: str, where: str, *, numbers: bool) -> pa.ChunkedArray:
    """The column as strings; whole numbers and truth values too, if `numbers`."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    column = column.cast(kind) if pa.types.is_dictionary(column.type) else column
    if numbers and pa.types.is_floating(kind):
        column = _whole(column)
        kind = column.type
    textual = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if textual or pa.types.is_null(kind) or (numbers and (pa.types.is_integer(kind) or pa.types.is_boolean(kind))):
        return column.cast(pa.string())
    wanted = "text or whole numbers" if numbers else "text"
    do = "Name another column, or convert this one in the source."
    raise DataError(f'{wanted} in column "{name}"', f"values of type {kind}", do, where=where)


def _whole(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Whole numbers that a missing value turned into floats, as integers; other floats stay as they are."""
    column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
    try:
        return column.cast(pa.int64())
    except pa.ArrowInvalid:
        return column


def _seconds(column: pa.ChunkedArray, name: str, where: str) -> pa.ChunkedArray:
    """Epoch numbers, dates and times, or either as text, as seconds since 1970 UTC; a time without a zone is UTC."""
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        seconds = _parsed(_filled(pc.utf8_trim_whitespace(column.cast(pa.string()))), name, where)
    elif pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        seconds = _since_1970(column)
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind):
        seconds = column.cast(pa.float64(), safe=False)
    else:
        raise _not_a_time(name, f"values of type {kind}", where)
    odd = pc.invert(pc.less(pc.abs(seconds), _YEAR_10000))
    if pc.any(odd).as_py():
        value = seconds.filter(odd)[0].as_py()
        raise _not_a_time(name, f"{value:g}" + (" (milliseconds?)" if abs(value) < 1e15 else ""), where)
    return seconds


def _parsed(strings: pa.ChunkedArray, name: str, where: str) -> pa.ChunkedArray:
    with suppress(pa.ArrowInvalid):
        return strings.cast(pa.float64())
    with suppress(pa.ArrowInvalid):
        return _since_1970(strings.cast(pa.timestamp("us")))
    return pa.chunked_array([pa.array((_instant(word, name, where) for word in strings.to_pylist()), pa.float64())])


def _instant(word: str | None, name: str, where: str) -> float | None:
    if word is None:
        return None
    try:
        when = datetime.fromisoformat(word)
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise _not_a_time(name, f'"{word[:40]}"', where) from None


def _since_1970(times: pa.ChunkedArray) -> pa.ChunkedArray:
    microseconds = times.cast(pa.timestamp("us", getattr(times.type, "tz", None)), safe=False).cast(pa.int64())
    return pc.divide(microseconds.cast(pa.float64(), safe=False), 1e6)


def _not_a_time(name: str, came: str, where: str) -> DataError:
    do = "Write seconds since 1970 UTC, or ISO dates such as 2015-02-02T12:00:00Z."
    return DataError(f'a time in column "{name}"', came, do, where=where)


def _complete(values: pa.ChunkedArray, name: str, role: str, rows: np.ndarray, where: str) -> None:
    """Raise unless no value is missing. `rows`: the source's row of each, from 0."""
    if values.null_count:
        first = int(rows[pc.index(pc.is_null(values), True).as_py()]) + 1
        came = f"none in {values.null_count} of {len(values)} rows, first in row {first}"
        do = f"Fill it in, leave these rows out, or do not name a column for {role}."
        raise DataError(f'a {role} in every row (column "{name}")', came, do, where=where)


_YEAR_10000 = 253402300800.0  # seconds; the same moment as milliseconds is in 1978, so most of those are noticed
