"""Whatever bytes a file holds, reading it gives a table or a `DataError`, never another exception and never a crash."""

import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foedus.data import Columns, read
from foedus.errors import DataError

COLUMNS = Columns(("text", "more"), label="label", timestamp="when")
HEAD = {"csv": b"text,more,label,when\n", "tsv": b"text\tmore\tlabel\twhen\n", "tab": b"text\tmore\tlabel\twhen\n\n\n"}
KINDS = ["csv", "tsv", "tab", "jsonl", "json", "parquet", "csv.gz", "jsonl.gz", "docx"]
quick = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)
objects = st.fixed_dictionaries({}, optional={name: values for name in ("text", "more", "label", "when")})


def attempt(folder, name, data):
    (folder / name).write_bytes(data)
    try:
        table = read(name, COLUMNS, base=folder)
    except DataError:
        return
    assert table.num_rows > 0 and table["text"].null_count == 0
    table.validate(full=True)


@pytest.mark.parametrize("kind", KINDS)
def test_random_bytes_are_a_table_or_a_data_error(kind, tmp_path):
    @quick
    @given(st.binary(max_size=300), st.booleans())
    def check(data, packed):
        data = HEAD.get(kind, b"") + data
        attempt(tmp_path, f"a.{kind}", gzip.compress(data) if packed and kind.endswith("gz") else data)

    check()


@pytest.mark.parametrize("kind", ["csv", "tsv", "tab"])
@quick
@given(lines=st.lists(st.text(alphabet='a1 "\t,\r\n\\-é\0', max_size=20), max_size=6))
def test_almost_separated_values_are_a_table_or_a_data_error(kind, lines, tmp_path):
    attempt(tmp_path, f"a.{kind}", HEAD[kind] + "\n".join(lines).encode())


@quick
@given(rows=st.lists(objects, max_size=4))
def test_any_json_objects_are_a_table_or_a_data_error(rows, tmp_path):
    attempt(tmp_path, "a.jsonl", "\n".join(json.dumps(row) for row in rows).encode())
    attempt(tmp_path, "a.json", json.dumps(rows).encode())


@settings(quick, max_examples=400)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8), st.integers(0, 40))
def test_a_damaged_parquet_file_is_a_table_or_a_data_error(tmp_path, flips, cut):
    data = bytearray(PARQUET[: len(PARQUET) - cut] if cut > 20 else PARQUET)
    for place, value in flips:
        data[place % len(data)] = value
    attempt(tmp_path, "a.parquet", bytes(data))


def _parquet():
    out = io.BytesIO()
    rows = {"text": ["one", "two", "é"] * 9, "more": [None, "x", ""] * 9, "label": [1, 2, 3] * 9, "when": [0.5] * 27}
    pq.write_table(pa.table(rows), out)
    return out.getvalue()


PARQUET = _parquet()
