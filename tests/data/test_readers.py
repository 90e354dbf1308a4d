"""Every kind of source gives the same canonical table, and every kind of mistake its own message."""

import json
from datetime import date, datetime

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from foedus.assets import fetch
from foedus.data import Columns, dropped, from_dataset, only, read
from foedus.errors import DataError

from .conftest import ROWS

FORMATS = [f"{name}{suffix}" for name in ("rows.csv", "rows.tsv", "rows.jsonl", "rows.json", "lines.json") for suffix in ("", ".gz")]  # fmt: skip # noqa: E501
FULL = Columns("text", label="score", domain="topic", author="who", timestamp="when")
CANONICAL = {
    "text": ["one fish", "two fish", "red, fish\nin lines"],
    "label": ["3", "1", "0"],
    "domain": ["sea", "sea", "land"],
    "author": ["ann", "bob", "ann"],
    "timestamp": [1422835200.0, 1422964800.0, 1423008000.5],
}


@pytest.mark.parametrize("name", [*FORMATS, "rows.tab", "rows.parquet", "marked.csv"])
def test_every_format_gives_the_same_table(files, name):
    table = read(name, FULL, base=files)
    assert table.to_pydict() == CANONICAL
    assert [str(kind) for kind in table.schema.types] == ["string"] * 4 + ["double"]
    assert dropped(table) == 0


@pytest.mark.parametrize("wrap", [list, pa.Table.from_pylist, datasets.Dataset.from_list])
def test_an_object_in_memory_gives_the_same_table_as_a_file(wrap):
    assert from_dataset(wrap(ROWS), FULL).to_pydict() == CANONICAL


def test_an_absolute_path_needs_no_base(files, tmp_path):
    assert read(str(files / "rows.csv"), FULL, base=tmp_path / "elsewhere").num_rows == 3


def test_only_the_columns_that_were_named_are_read(files):
    assert read("rows.csv", Columns(domain="topic"), base=files).column_names == ["text", "domain"]


def test_own_columns_are_kept_as_strings(files):
    table = read("rows.jsonl", Columns(own=("score", "who")), base=files)
    assert table.select(["score", "who"]).to_pydict() == {"score": ["3", "1", "0"], "who": ["ann", "bob", "ann"]}


def test_several_text_columns_are_joined_by_lines_and_blank_ones_left_out():
    rows = [{"a": "x", "b": "y"}, {"a": "x", "b": " "}, {"a": None, "b": "y"}, {"a": "", "b": None}]
    table = from_dataset(rows, Columns(("a", "b")))
    assert table["text"].to_pylist() == ["x\ny", "x", "y"]
    assert dropped(table) == 1


def test_blank_texts_are_dropped_and_counted(write, tmp_path):
    write("some.csv", 'text,d\none,1\n"",2\n"  \t",3\n\u2003,4\ntwo,5\n')
    table = read("some.csv", Columns(domain="d"), base=tmp_path)
    assert table["domain"].to_pylist() == ["1", "5"]
    assert dropped(table) == 3


def test_labels_and_domains_lose_the_blanks_around_them_and_texts_do_not():
    table = from_dataset([{"text": " a ", "d": " b "}], Columns(domain="d"))
    assert table.to_pylist() == [{"text": " a ", "domain": "b"}]


def test_one_column_can_play_two_roles(files):
    table = read("rows.csv", Columns(label="topic", domain="topic"), base=files)
    assert table["label"] == table["domain"]


@pytest.mark.parametrize(
    ("values", "seconds"),
    [
        ([0, 1422835200], [0.0, 1422835200.0]),
        ([-1.5, 2.25], [-1.5, 2.25]),
        (["0", " 1422835200.5 "], [0.0, 1422835200.5]),
        (["1970-01-02", "1969-12-31"], [86400.0, -86400.0]),
        (["1970-01-01 00:00:01", "1970-01-01T00:01:00"], [1.0, 60.0]),
        (["1970-01-01T01:00:00+01:00", "1970-01-02"], [0.0, 86400.0]),
        ([datetime(1970, 1, 1, 0, 0, 3), datetime(1970, 1, 2)], [3.0, 86400.0]),
        ([date(1970, 1, 3), date(1970, 1, 1)], [172800.0, 0.0]),
    ],
)
def test_times_of_every_kind_become_seconds(values, seconds):
    rows = [{"text": "a", "when": value} for value in values]
    assert from_dataset(rows, Columns(timestamp="when"))["timestamp"].to_pylist() == seconds


def test_times_with_a_zone_are_moments_and_not_clock_faces():
    kind = pa.timestamp("ns", "America/New_York")
    table = pa.table({"text": ["a"], "when": pa.array([3_600_000_000_000], kind)})
    assert from_dataset(table, Columns(timestamp="when"))["timestamp"].to_pylist() == [3600.0]


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([1, 0], ["1", "0"]),
        ([True, False], ["true", "false"]),
        ([1.0, 2.0], ["1", "2"]),
        (pa.array(["x", "y"]).dictionary_encode(), ["x", "y"]),
        (pa.array(["x", "y"], pa.large_string()), ["x", "y"]),
        (pa.array(["x", "y"], pa.string_view()), ["x", "y"]),
    ],
)
def test_labels_of_every_kind_become_words(values, labels):
    table = pa.table({"text": ["a", "b"], "label": values})
    assert from_dataset(table, Columns(label="label"))["label"].to_pylist() == labels


def test_class_numbers_become_class_names_in_the_order_of_the_rows():
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"]))
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, 1]}, features=features)
    table = from_dataset(data.select([2, 1]), Columns(label="label"))
    assert table.to_pydict() == {"text": ["c", "b"], "label": ["yes", "no"]}


def test_a_class_number_of_minus_one_is_a_missing_label():
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"]))
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, -1]}, features=features)
    with pytest.raises(DataError, match="none in 1 of 2 rows, first in row 2"):
        from_dataset(data, Columns(label="label"))


def test_a_folder_of_texts_takes_domain_and_label_from_its_sub_folders(write, tmp_path):
    for name in ("mail/sea/1.txt", "mail/sea/deep/2.txt.gz", "mail/land/3.txt", "mail/land/readme.md"):
        write(name, f"text of {name}")
    table = read("mail", Columns(), base=tmp_path)
    assert table["domain"].to_pylist() == table["label"].to_pylist() == ["land", "sea", "sea"]
    assert table["text"].to_pylist()[0] == "text of mail/land/3.txt"


def test_a_flat_folder_of_texts_has_no_domain(write, tmp_path):
    write("flat/a.txt", "a")
    assert read("flat", Columns(own=("file",)), base=tmp_path).to_pylist() == [{"text": "a", "file": "a.txt"}]


def test_data_saved_by_the_datasets_library_is_read_by_split(tmp_path):
    train, test = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[:1])
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "both")
    assert read("one", FULL, base=tmp_path).to_pydict() == CANONICAL
    assert read("both", FULL, base=tmp_path).num_rows == 3
    assert read("both:test", FULL, base=tmp_path).num_rows == 1
    with pytest.raises(DataError, match='a split of both; got "tset". Did you mean "test"'):
        read("both:tset", FULL, base=tmp_path)


def test_hugging_face_names_go_through_the_datasets_library(files, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    for split, rows in {"train": ROWS, "test": ROWS[:1]}.items():
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{split}.parquet")
        (tmp_path / "repo").mkdir(exist_ok=True)
        (tmp_path / f"{split}.parquet").rename(tmp_path / "repo" / f"{split}.parquet")
    assert read("hf:repo", FULL, base=tmp_path).to_pydict() == CANONICAL
    assert read("hf:repo:test", FULL, base=tmp_path).num_rows == 1
    assert read("hf:repo:default:test", FULL, base=tmp_path).num_rows == 1
    for wrong in ("hf:repo:default:nowhere", "hf:repo:other:train", "hf:nobody/nothing-here"):
        with pytest.raises(DataError, match="expected a data set that the datasets library loads"):
            read(wrong, FULL, base=tmp_path)


@pytest.mark.parametrize(
    ("source", "rows", "without_text", "domains", "columns"),
    [
        ("20newsgroups", 11293, 0, 20, {"text", "label", "domain"}),
        ("20newsgroups:test", 7528, 0, 20, {"text", "label", "domain"}),
        ("reuters-r8", 5485, 0, 8, {"text", "label", "domain"}),
        ("reuters-r52", 6532, 1, 52, {"text", "label", "domain"}),
        ("reuters-r52:test", 2568, 0, 52, {"text", "label", "domain"}),
        ("friends", 61510, 53, 10, {"text", "domain", "author"}),
        ("election-tweets", 6444, 0, 2, {"text", "label", "domain", "author", "timestamp"}),
    ],
)
def test_catalogued_texts_are_read_without_naming_a_column(source, rows, without_text, domains, columns, tmp_path):
    table = read(source, Columns(), base=tmp_path)
    assert (table.num_rows, dropped(table)) == (rows, without_text)
    assert len(set(table["domain"].to_pylist())) == domains
    assert set(table.column_names) == columns


def test_the_tab_reader_agrees_with_pythons_own(tmp_path):
    import csv

    path = fetch("election-tweets") / "election-tweets-2016.tab"
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t")][2:]
    table = read("election-tweets", Columns(), base=tmp_path)
    assert table["text"].to_pylist() == [row["Content"] for row in rows]


def test_the_roles_of_a_catalogued_text_can_be_renamed(tmp_path):
    columns = Columns("Title", domain="author", own=("Episode",))
    table = read("friends", columns, base=tmp_path)
    assert table.slice(0, 1).to_pylist()[0] | {"Episode": "01", "domain": "Monica"} == table.slice(0, 1).to_pylist()[0]
    assert table["text"][0].as_py() == "The One Where Monica Gets A Roommate"


def test_quotes_in_a_plain_tab_separated_file_belong_to_the_text(write, tmp_path):
    write("plain.tsv", 'text\td\n"open only\tx\nhe said "no"\ty\n"whole" start\tz\n')
    table = read("plain.tsv", Columns(domain="d"), base=tmp_path)
    assert table["text"].to_pylist() == ['"open only', 'he said "no"', '"whole" start']


def test_quotes_in_a_spreadsheets_tab_separated_file_are_quoting(write, tmp_path):
    write("quoted.tsv", 'text\td\n"he said ""no""\tand left"\tx\nplain\ty\n"two\nlines"\tz\n')
    table = read("quoted.tsv", Columns(domain="d"), base=tmp_path)
    assert table["text"].to_pylist() == ['he said "no"\tand left', "plain", "two\nlines"]


def test_only_keeps_the_domains_it_is_given(files):
    table = read("rows.csv", FULL, base=files)
    assert only(table, ["land"])["text"].to_pylist() == ["red, fish\nin lines"]
    assert dropped(only(table, ["land"])) == 0
    with pytest.raises(DataError, match='got "lnad". Did you mean "land"'):
        only(table, ["lnad"])
    with pytest.raises(DataError, match="no domain column"):
        only(table.select(["text"]), ["land"])


def test_a_deeply_nested_column_that_nobody_asked_for_is_no_danger(write, tmp_path):
    write("deep.jsonl", json.dumps({"text": "a"}) + "\n" + '{"text": "b", "x": ' + "[" * 100 + "]" * 100 + "}\n")
    assert read("deep.jsonl", Columns(), base=tmp_path).num_rows == 2


def test_parquet_text_that_is_not_utf8_is_refused(tmp_path):
    wrong = pa.array([b"caf\xe9"]).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": wrong}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="text encoded in UTF-8"):
        read("a.parquet", Columns(), base=tmp_path)


GOOD = "text,d,t\na,x,1\nb,y,2\n"
MISTAKES = {
    "missing column": (
        "a.csv",
        GOOD,
        Columns(domain="dd"),
        'a column "dd" (for domain).*Did you mean "d"? Known: d, t, te',
    ),
    "missing text": ("a.csv", GOOD, Columns("txt"), 'a column "txt" (for text).*Did you mean "text"'),
    "missing own": ("a.csv", GOOD, Columns(own=("e",)), 'a column "e" (for e)'),
    "two of a name": ("a.csv", "text,d,d\na,x,y\n", Columns(domain="d"), 'one column "d".*2 of that name'),
    "empty file": ("a.csv", "", Columns(), "a.csv: expected at least one example; got an empty file"),
    "empty gzip": ("a.csv.gz", "", Columns(), "an empty file"),
    "only a header": ("a.csv", "text,d\n", Columns(), "at least one example with text; got 0 rows without"),
    "only blank texts": ("a.csv", "text,d\n ,x\n", Columns(), "at least one example with text; got 1 rows without"),
    "empty jsonl": ("a.jsonl", "\n\n", Columns(), "at least one example; got no rows"),
    "empty json": ("a.json", "[]", Columns(), "at least one example; got no rows"),
    "latin-1 csv": ("a.csv", "text\ncafé\n".encode("latin-1"), Columns(), "text encoded in UTF-8.*iconv"),
    "latin-1 header": ("a.csv", "café,text\na,b\n".encode("latin-1"), Columns(), "text encoded in UTF-8"),
    "latin-1 jsonl": ("a.jsonl", '{"text": "café"}'.encode("latin-1"), Columns(), "text encoded in UTF-8"),
    "latin-1 text": ("a/x/a.txt", "café".encode("latin-1"), Columns(), "x/a.txt: expected text encoded in UTF-8"),
    "utf-16 csv": ("a.csv", "text\na\n".encode("utf-16"), Columns(), "text encoded in UTF-8"),
    "half a character": ("a.jsonl", '{"text": "\\ud800"}', Columns(), "text encoded in UTF-8"),
    "uneven rows": ("a.csv", "text,d\na,x\nb\n", Columns(), "2 fields in every row; got 1 in row 3 of the file"),
    "not gzip": ("a.csv.gz", None, Columns(), "a file that can be read"),
    "broken json": ("a.jsonl", '{"text": "a"}\n{"text": \n', Columns(), "a.jsonl, line 2: expected a well-formed file"),
    "array line": ("a.jsonl", "[1]\n", Columns(), "line 1: expected a JSON object; got a list"),
    "array of words": ("a.json", '["a"]', Columns(), "an array of JSON objects; got a str in it"),
    "array of nulls": ("a.json", "[null]", Columns(), "an array of JSON objects; got a NoneType in it"),
    "nested too deep": ("a.jsonl", '{"text": ' + "[" * 100_000, Columns(), "a well-formed file of its kind"),
    "mixed column": ("a.jsonl", '{"text": "a"}\n{"text": 1}', Columns(), 'one type in column "text"; got int and str'),
    "huge number": (
        "a.jsonl",
        f'{{"text": "a", "d": {2**80}}}',
        Columns(domain="d"),
        'one type in column "d"; got int',
    ),
    "text of numbers": ("a.jsonl", '{"text": 1}', Columns(), 'text in column "text"; got values of type int64'),
    "text of lists": ("a.jsonl", '{"text": ["a"]}', Columns(), r'text in column "text"; got values of type list'),
    "label of floats": ("a.jsonl", '{"text": "a", "l": 0.5}', Columns(label="l"), "text or whole numbers.*type double"),
    "target of numbers": ("a.jsonl", '{"text": "a", "y": 1}', Columns(target="y"), 'text in column "y"'),
    "label missing": (
        "a.csv",
        "text,l\n,x\na,x\nb,\n",
        Columns(label="l"),
        "a label in every row.*1 of 2 rows, first in row 3",
    ),
    "target missing": ("a.jsonl", '{"text": "a", "y": null}', Columns(target="y"), "a target in every row"),
    "time missing": ("a.csv", "text,t\na,1\nb,\n", Columns(timestamp="t"), "a timestamp in every row.*first in row 2"),
    "time of words": ("a.csv", GOOD, Columns(timestamp="d"), 'a time in column "d"; got "x".*ISO dates'),
    "time of no day": ("a.csv", "text,t\na,2015-02-30\n", Columns(timestamp="t"), 'a time in column "t"'),
    "time in millis": ("a.csv", "text,t\na,1422835200000\n", Columns(timestamp="t"), r"milliseconds\?"),
    "time not a number": ("a.csv", "text,t\na,nan\n", Columns(timestamp="t"), 'a time in column "t"; got nan'),
    "time of truths": ("a.jsonl", '{"text": "a", "t": true}', Columns(timestamp="t"), "values of type bool"),
    "not parquet": ("a.parquet", "text", Columns(), "a.parquet: expected a well-formed file"),
    "unknown kind": ("a.docx", "text", Columns(), "a file of a known kind.*Convert it"),
    "gzipped parquet": ("a.parquet.gz", "text", Columns(), "a file of a known kind"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_has_its_own_message(mistake, write, tmp_path):
    name, content, columns, message = MISTAKES[mistake]
    if content is None:
        (tmp_path / name).write_bytes(b"text\na\n")
    else:
        write(name, content)
    with pytest.raises(DataError, match=message.replace("(for", r"\(for").replace(")", r"\)").replace("? ", r"\? ")):
        read(name.partition("/")[0], columns, base=tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("20newsgroup", 'there is no .*Did you mean "20newsgroups"'),
        ("nowhere.csv", "a catalogued name, a path"),
        ("20newsgroups:tset", 'a split of 20newsgroups; got "tset". Did you mean "test"'),
        ("smollm2-135m-instruct", "the name of a data set; got .* a model"),
        ("empty", "a folder of .txt files"),
        ("hf:", r"hf:org/name\[:config\]\[:split\]"),
        ("hf:a:b:c:d", "Leave the rest out"),
    ],
)
def test_a_source_that_is_none_is_an_error_that_helps(source, message, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        read(source, Columns(), base=tmp_path)


@pytest.mark.parametrize("thing", [None, "text", [1], datasets.DatasetDict(), {"text": ["a"]}])
def test_an_object_that_is_no_data_set_is_refused(thing):
    with pytest.raises(DataError, match="a datasets.Dataset, a pyarrow.Table or a list"):
        from_dataset(thing, Columns())


@pytest.mark.parametrize("wrong", [{"text": ()}, {"text": ""}, {"label": ""}, {"domain": 3}, {"own": ("",)}])
def test_column_names_are_words(wrong):
    with pytest.raises(DataError, match="column names that are words"):
        Columns(**wrong)


def test_an_own_column_cannot_pose_as_a_canonical_one():
    with pytest.raises(DataError, match='label = "label"'):
        Columns(own=("label",))
