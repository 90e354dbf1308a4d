"""Opens whatever a treaty calls a source: a catalogued data set, a file, a folder, a Hugging Face data set.

A `Source` knows its column names and can give some of its columns as they are; `readers.py` makes them canonical. Files
are read by Arrow where that is safe. JSON is not: Arrow's parser overflows the stack on deep nesting (seen with
pyarrow 26), and fails on a column of mixed types that nobody asked for, so Python's own reads it.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from ..assets import CATALOG, fetch
from ..errors import DataError, one_of

KINDS = "csv, tsv, tab (Orange), jsonl, json, parquet; gzipped with .gz, except parquet"


@dataclass(frozen=True)
class Source:
    """`names`: its columns. `take(names)`: these columns, unchanged. `roles`: which of them is the text, the label, and
    so on, where the source itself says so. `where`: how errors call it."""

    where: str
    names: tuple[str, ...]
    take: Callable[[Sequence[str]], pa.Table]
    roles: Mapping[str, str] = field(default_factory=dict)


def open_source(source: str, base: Path) -> Source:
    """The source that this string names; relative paths start at `base`. Catalogued names win over paths: write
    "./friends" for a folder of that name."""
    name, _, split = source.partition(":")
    if name in CATALOG:
        return _catalogued(name, split)
    if name == "hf":
        return _hub(split, base)
    path = (base / Path(source).expanduser()).absolute()
    if path.is_file():
        return _file(path)
    if path.is_dir():
        return _folder(path, "")
    head, _, split = source.rpartition(":")
    if head and (base / head / "dataset_dict.json").is_file():
        return _folder((base / head).absolute(), split)
    names = [asset.name for asset in CATALOG.values() if asset.kind == "dataset"]
    came = f'"{source}", and there is no {path}'
    raise DataError('a catalogued name, a path, or "hf:org/name"', came, one_of(source, names), where="data source")


def open_object(rows: Any) -> Source:
    """The same for an object in memory: a `datasets.Dataset`, a `pyarrow.Table`, a list of dictionaries."""
    where = f"a {type(rows).__name__}"
    if isinstance(rows, pa.Table):
        return _table(rows, where)
    if isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
        return _rows(rows, where)
    library = sys.modules.get("datasets")  # an object of a library that nobody imported cannot be here
    if library and isinstance(rows, library.Dataset):
        return _hugging_face(rows, where)
    do = 'Choose one split (ds["train"]), load without streaming, or pass a path to foedus.data.read.'
    raise DataError("a datasets.Dataset, a pyarrow.Table or a list of dictionaries", where, do)


def nearest(value: str, values: Sequence[str]) -> str:
    """The advice for an unknown value of a column: as `one_of`, but columns can have many values."""
    return one_of(value, values) if len(values) <= 100 else f"The source has {len(values)} others."


@contextmanager
def reading(where: str) -> Iterator[None]:
    """What a reader can raise on bad input, as a `DataError` that names the source."""
    try:
        yield
    except DataError:
        raise
    except UnicodeError as error:
        do = "Save the file as UTF-8 (for example with iconv -f latin1 -t utf-8)."
        raise DataError("text encoded in UTF-8", _short(error), do, where=where) from error
    except (OSError, EOFError, zlib.error) as error:
        do = "Check the path, the permissions and that the file is whole."
        raise DataError("a file that can be read", _short(error), do, where=where) from error
    except (pa.ArrowException, csv.Error, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        if "UTF8" in str(error):
            do = "Save the file as UTF-8 (for example with iconv -f latin1 -t utf-8)."
            raise DataError("text encoded in UTF-8", _short(error), do, where=where) from error
        do = "Mend the file, or convert it to one of: " + KINDS + "."
        raise DataError("a well-formed file of its kind", _short(error), do, where=where) from error


def _catalogued(name: str, split: str) -> Source:
    asset = CATALOG[name]
    if asset.kind != "dataset":
        names = [one.name for one in CATALOG.values() if one.kind == "dataset"]
        raise DataError("the name of a data set", f'"{name}", a model', one_of(name, names), where="data source")
    split = split or next(iter(asset.splits))
    if split not in asset.splits:
        raise DataError(f"a split of {name}", f'"{split}"', one_of(split, asset.splits), where="data source")
    path = fetch(name) / asset.splits[split]
    with reading(f"{name}:{split}"):
        return _grouped(_orange(path.read_bytes(), f"{name}:{split}", asset.columns), asset.groups)


def _grouped(source: Source, groups: Mapping[str, tuple[str, Mapping[str, str]]]) -> Source:
    """The source with further columns, each made of one of its own."""

    def column(table: pa.Table, name: str) -> pa.ChunkedArray | pa.Array:
        if name not in groups:
            return table[name]
        own, belongs = groups[name]
        return pa.array([belongs[value] for value in table[own].to_pylist()])

    def take(names: Sequence[str]) -> pa.Table:
        table = source.take(list(dict.fromkeys(groups[name][0] if name in groups else name for name in names)))
        return pa.table({name: column(table, name) for name in names})

    return Source(source.where, (*source.names, *groups), take, source.roles)


def _file(path: Path) -> Source:
    where, kind = path.name, path.name.removesuffix(".gz").rpartition(".")[2].lower()
    if kind not in _FILES or (kind == "parquet" and path.suffix == ".gz"):
        raise DataError(f"a file of a known kind ({KINDS})", f'"{where}"', "Convert it to one of these.", where=where)
    with reading(where):
        return _FILES[kind](_bytes(path), where)


def _folder(path: Path, split: str) -> Source:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved(path, split)
    files = sorted(one for one in path.rglob("*") if one.name.endswith((".txt", ".txt.gz")) and one.is_file())
    if not files:
        do = "Name one file, or put each text into its own .txt file, in a sub-folder for each domain."
        raise DataError("a folder of .txt files, or one saved by datasets.save_to_disk", "neither", do, where=path.name)
    rows = []
    for file in files:
        with reading(str(file.relative_to(path))):
            inside = file.relative_to(path).parts
            text = _bytes(file).decode("utf-8-sig")
            rows.append({"text": text, "folder": inside[0] if len(inside) > 1 else None, "file": "/".join(inside)})
    roles = {"text": "text"}
    if any(row["folder"] for row in rows):
        roles |= {"domain": "folder", "label": "folder"}
    return _rows(rows, path.name, roles)


def _saved(path: Path, split: str) -> Source:
    from datasets import DatasetDict, load_from_disk

    with reading(path.name):
        loaded = load_from_disk(str(path))
    if not isinstance(loaded, DatasetDict):
        return _hugging_face(loaded, path.name)
    split = split or "train"
    if split not in loaded:
        raise DataError(f"a split of {path.name}", f'"{split}"', one_of(split, loaded), where="data source")
    return _hugging_face(loaded[split], f"{path.name}:{split}")


def _hub(name: str, base: Path) -> Source:
    """`org/name[:config][:split]`. One word after the name is a split if it is a usual word for one, else a config."""
    from datasets import load_dataset

    repository, *more = name.split(":")
    if len(more) == 1 and more[0] in _SPLITS:
        more = ["", more[0]]
    config, split, *rest = [*more, "", ""]
    if not repository or any(rest):
        raise DataError("hf:org/name[:config][:split]", f'"hf:{name}"', "Leave the rest out.", where="data source")
    local = base / repository
    try:
        loaded = load_dataset(str(local) if local.exists() else repository, config or None, split=split or "train")
    except Exception as error:  # a library that runs builders, decoders and a network client: there is no narrower tree
        do = "Check the name, the config, the split and the network; offline, use a local folder or a saved data set."
        raise DataError("a data set that the datasets library loads", _short(error), do, where=f"hf:{name}") from error
    return _hugging_face(loaded, f"hf:{name}")


def _hugging_face(dataset: Any, where: str) -> Source:
    def take(names: Sequence[str]) -> pa.Table:
        table = dataset.select_columns(list(names)).with_format("arrow")[:]
        for name in names:
            words = getattr(dataset.features[name], "names", None)  # of a ClassLabel
            if words is not None:
                table = table.set_column(table.column_names.index(name), name, _words(table[name], words))
        return table

    return Source(where, tuple(dataset.column_names), take)


def _words(numbers: pa.ChunkedArray, words: Sequence[str]) -> pa.ChunkedArray:
    """Class numbers as their names; the library writes −1 for a missing one."""
    known = pc.if_else(pc.greater_equal(numbers, 0), numbers, pa.scalar(None, numbers.type))
    return pc.take(pa.chunked_array([pa.array(words, pa.string())]), known)


def _csv(data: bytes, where: str, *, delimiter: str = ",", quoted: bool = True, skip: int = 0) -> Source:
    lines = csv.reader(
        io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", newline=""),
        delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
    )  # fmt: skip
    header = next((line for line in lines if line), None)
    if header is None:
        raise _nothing(where, "an empty file")

    def take(names: Sequence[str]) -> pa.Table:
        block = min(len(data) + 1, _BLOCK)
        try:
            return pa_csv.read_csv(
                pa.BufferReader(data),
                pa_csv.ReadOptions(use_threads=False, block_size=block, skip_rows_after_names=skip),
                pa_csv.ParseOptions(
                    delimiter=delimiter, quote_char='"' if quoted else False, newlines_in_values=quoted
                ),
                pa_csv.ConvertOptions(include_columns=list(names), column_types=dict.fromkeys(names, pa.string())),
            )
        except pa.ArrowInvalid as error:
            raise _uneven(error, where) from None

    return Source(where, tuple(header), take)


def _uneven(error: pa.ArrowInvalid, where: str) -> Exception:
    """Arrow's complaint about a row without that row's content, which is private; any other complaint as it is."""
    found = re.search(r"Row #(\d+): Expected (\d+) columns, got (\d+)", str(error))
    if not found:
        return error
    row, expected, came = found.groups()
    do = "Quote fields that hold a delimiter or a line break, and double the quotes inside them."
    return DataError(f"{expected} fields in every row", f"{came} in row {row} of the file", do, where=where)


def _tsv(data: bytes, where: str) -> Source:
    """Tab-separated values, with or without quoting: quotes are quoting if every field that opens with one also closes
    with one, as spreadsheets and pandas write them; in plain files (GLUE's) they belong to the text."""
    return _csv(data, where, delimiter="\t", quoted=not _BARE_QUOTE.search(_QUOTED.sub(rb"\1", data)))


def _orange(data: bytes, where: str, roles: Mapping[str, str] | None = None) -> Source:
    """A `.tab` file of Orange: after the names a line of types and a line of flags, then tab-separated values."""
    source = _csv(data, where, delimiter="\t", skip=2)
    return Source(where, source.names, source.take, roles or {})


def _jsonl(data: bytes, where: str) -> Source:
    rows = []
    for number, line in enumerate(data.decode("utf-8-sig").split("\n"), 1):
        if line.strip():
            rows.append(_object(line, f"{where}, line {number}"))
    return _rows(rows, where)


def _object(line: str, where: str) -> dict[str, Any]:
    with reading(where):
        row = json.loads(line)
    if not isinstance(row, dict):
        raise DataError(
            "a JSON object", f"a {type(row).__name__}", "Write one object with named fields a line.", where=where
        )
    return row


def _json(data: bytes, where: str) -> Source:
    """An array of objects, or one object a line."""
    text = data.decode("utf-8-sig")
    if not text.lstrip().startswith("["):
        return _jsonl(data, where)
    rows = json.loads(text)
    odd = [row for row in rows if not isinstance(row, dict)]
    if odd:
        came = f"a {type(odd[0]).__name__} in it"
        raise DataError("an array of JSON objects", came, "Name the fields of every row.", where=where)
    return _rows(rows, where)


def _parquet(data: bytes, where: str) -> Source:
    file = pq.ParquetFile(pa.BufferReader(data))

    def take(names: Sequence[str]) -> pa.Table:
        return file.read(columns=list(names))

    return Source(where, tuple(file.schema_arrow.names), take)


def _rows(rows: Sequence[Mapping[str, Any]], where: str, roles: Mapping[str, str] | None = None) -> Source:
    if not rows:
        raise _nothing(where, "no rows")
    names = tuple(dict.fromkeys(name for row in rows for name in row))

    def take(names: Sequence[str]) -> pa.Table:
        return pa.table({name: _column(name, [row.get(name) for row in rows], where) for name in names})

    return Source(where, names, take, roles or {})


def _column(name: str, values: list[Any], where: str) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, TypeError) as error:
        kinds = sorted({type(value).__name__ for value in values if value is not None})
        do = "Write text, whole numbers of at most 64 bits or dates, the same in every row."
        raise DataError(f'one type in column "{name}"', " and ".join(kinds), do, where=where) from error


def _table(table: pa.Table, where: str) -> Source:
    return Source(where, tuple(table.column_names), lambda names: table.select(list(names)))


def _bytes(path: Path) -> bytes:
    data = path.read_bytes()
    return gzip.decompress(data) if path.suffix == ".gz" else data


def _nothing(where: str, came: str) -> DataError:
    return DataError("at least one example", came, "Check that this is the file you meant.", where=where)


def _short(value: object) -> str:
    """One line, at most 200 characters, without a full stop at the end."""
    text = " ".join(str(value).split()) or type(value).__name__
    return (text if len(text) <= 200 else text[:199] + "…").rstrip(".")


_FILES: Mapping[str, Callable[[bytes, str], Source]] = {
    "csv": _csv, "tsv": _tsv, "tab": _orange, "jsonl": _jsonl, "ndjson": _jsonl, "json": _json, "parquet": _parquet,
}  # fmt: skip
_SPLITS = {"train", "training", "validation", "valid", "val", "dev", "test", "testing"}
_BLOCK = 1 << 25  # bytes that Arrow parses at once (the fastest of 2^20 … 2^28 here); no row may be longer
_QUOTED = re.compile(rb'((?:^|[\t\n]))"(?:[^"]|"")*"(?=[\t\r\n]|$)')
_BARE_QUOTE = re.compile(rb'(?:^|[\t\n])"')
