"""The same text never lands in two splits, new rows move no old ones, and by time the past is for training."""

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foedus.data import SplitPlan, Splits, holdings, split
from foedus.data.split import shares
from foedus.errors import DataError

HALF = SplitPlan(validation=0.25, test=0.25)
words = st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=40)


def texts(*words):
    return pa.table({"text": pa.array(words, pa.string())})


def parts(splits):
    return [set(part["text"].to_pylist()) for part in (splits.train, splits.validation, splits.test)]


def halves(table, seed):
    """The splits, or None where chance left nothing to train on."""
    try:
        return split(table, HALF, seed)
    except DataError:
        return None


@settings(max_examples=150, deadline=None)
@given(words, words, st.integers(0, 5))
def test_a_text_is_in_one_split_and_stays_there_when_rows_are_added(old, new, seed):
    before, after = halves(texts(*old), seed), halves(texts(*new, *old), seed)
    if before and after:
        assert sum(part.num_rows for part in (after.train, after.validation, after.test)) == len(old) + len(new)
        assert sum(map(len, parts(after))) == len(set(old) | set(new))
        assert all(few <= many for few, many in zip(parts(before), parts(after), strict=True))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.text("ab", min_size=1, max_size=9)), min_size=1, max_size=40, unique=True),
    st.randoms(),
    st.floats(0, 0.49),
    st.floats(0, 0.49),
)
def test_by_time_the_oldest_train_and_the_newest_test_in_whatever_order_they_come(rows, random, validation, test):
    how = SplitPlan("time", validation, test)

    def splits():
        times, said = zip(*rows, strict=True)
        return split(pa.table({"text": said, "timestamp": pa.array(times, pa.float64())}), how, 0)

    def sets(parts):
        return [sorted(part.to_pylist(), key=str) for part in (parts.train, parts.validation, parts.test)]

    first = splits()
    random.shuffle(rows)
    assert sets(first) == sets(splits())
    times = [part["timestamp"].to_pylist() for part in (first.train, first.validation, first.test)]
    assert [len(part) for part in times[1:]] == [int(len(rows) * share + 1e-9) for share in (validation, test)]
    assert max(times[0]) <= min(times[1] + times[2], default=9) and max(times[1], default=0) <= min(times[2], default=9)


def test_the_shares_hold_on_average_and_the_order_of_the_table_is_kept():
    table = texts(*(f"text {i:05d}" for i in range(20000)))
    splits = split(table, SplitPlan(validation=0.1, test=0.2), 7)
    assert splits.validation.num_rows / 20000 == pytest.approx(0.1, abs=0.01)
    assert splits.test.num_rows / 20000 == pytest.approx(0.2, abs=0.01)
    assert splits.train["text"].to_pylist() == sorted(splits.train["text"].to_pylist())


def test_the_hash_is_the_same_on_every_machine_and_python():
    assert shares(texts("one", "two"), 0, "split").tolist() == [0.09364823156244761, 0.8093199265198995]


def test_another_seed_is_another_split():
    table = texts(*map(str, range(100)))
    assert parts(split(table, HALF, 0)) == parts(split(table, HALF, 0)) != parts(split(table, HALF, 1))


def test_nothing_held_out_leaves_everything_for_training():
    splits = split(texts("a", "b"), SplitPlan(validation=0, test=0), 0)
    assert (splits.train.num_rows, splits.validation.num_rows, splits.test.num_rows) == (2, 0, 0)
    assert splits.test.schema == splits.train.schema


def test_what_a_subset_keeps_says_nothing_about_where_it_is_held_out():
    table = texts(*map(str, range(2000)))
    kept = shares(table, 0, "max_examples") < 0.1
    held = shares(table, 0, "split")[kept] < 0.5
    assert held.mean() == pytest.approx(0.5, abs=0.12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(by="date"), 'split by "hash" or "time"; got "date"'),
        (dict(validation=-0.1), "validation=-0.1"),
        (dict(validation=0.5, test=0.5), "shares ≥ 0 that leave something for training"),
        (dict(test=float("nan")), "test=nan"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_at_once(arguments, message):
    with pytest.raises(DataError, match=message):
        SplitPlan(**arguments)


def test_a_split_by_time_needs_times():
    with pytest.raises(DataError, match="a timestamp for every example, to split by time; got no timestamp column"):
        split(texts("a"), SplitPlan("time"), 0)


def test_a_silo_without_examples_cannot_be_split():
    with pytest.raises(DataError, match="examples to split; got none"):
        split(texts(), SplitPlan(), 0)


def test_a_silo_that_would_have_nothing_to_train_on_is_refused():
    with pytest.raises(DataError, match="an example to train on; got none of its 1"):
        for seed in range(20):
            split(texts("only"), SplitPlan(validation=0.49, test=0.49), seed)


def test_holdings_count_what_each_silo_has():
    rows = pa.table({"text": list("abc"), "domain": ["x", "y", "x"], "label": ["1", "1", "0"]})
    plain = texts("a")
    silos = {"north": Splits(rows, rows.slice(0, 1), rows.slice(0, 0)), "south": Splits(plain, plain, plain)}
    assert holdings(silos) == {
        "north": {"train": 3, "validation": 1, "test": 0, "domains": {"x": 3, "y": 1}, "labels": {"0": 1, "1": 3}},
        "south": {"train": 1, "validation": 1, "test": 1, "domains": {}, "labels": {}},
    }
