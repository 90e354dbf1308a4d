"""Sources on disk for the tests of the data room."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROWS = [
    {"text": "one fish", "topic": "sea", "who": "ann", "when": "2015-02-02T00:00:00Z", "score": 3},
    {"text": "two fish", "topic": "sea", "who": "bob", "when": "2015-02-03T12:00:00Z", "score": 1},
    {"text": "red, fish\nin lines", "topic": "land", "who": "ann", "when": "2015-02-04T00:00:00.5Z", "score": 0},
]


@pytest.fixture
def write(tmp_path):
    """`write(name, content)`: a file of that name (gzipped for .gz) with these bytes or this text; its name."""

    def to(name, content):
        data = content if isinstance(content, bytes) else content.encode()
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return name

    return to


@pytest.fixture
def files(tmp_path, write):
    """ROWS in every format of file; the folder they are in."""

    def separated(delimiter):
        lines = [delimiter.join(ROWS[0])]
        lines += [delimiter.join(f'"{value}"' for value in row.values()) for row in ROWS]
        return "\n".join(lines) + "\n"

    lines = "\n".join(json.dumps(row | {"ignored": [1] if row["score"] else "a"}) for row in ROWS)
    for suffix in ("", ".gz"):
        write(f"rows.csv{suffix}", separated(","))
        write(f"rows.tsv{suffix}", separated("\t"))
        write(f"rows.jsonl{suffix}", lines + "\n\n")
        write(f"lines.json{suffix}", lines)
        write(f"rows.json{suffix}", json.dumps(ROWS, indent=1))
    header, *rest = separated("\t").splitlines(keepends=True)
    write("rows.tab", header + "string\td\td\ttime\tc\n" + "include=True\tclass\t\t\t\n" + "".join(rest))
    write("marked.csv", b"\xef\xbb\xbf" + separated(",").encode())
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    return tmp_path
