"""Every example goes to exactly one silo, which one does not depend on the order of rows, and mistakes are named."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foedus.data import Columns, Partition, from_dataset, partition
from foedus.data.partition import safe_names
from foedus.errors import DataError


def table(labels, **columns):
    """One example a label, each with a text of its own."""
    texts = [f"text {i}" for i in range(len(labels))]
    return pa.table({"text": texts, "label": labels, "domain": [f"d.{one}" for one in labels], **columns})


def contents(silos):
    return {name: sorted(mine["text"].to_pylist()) for name, mine in silos.items()}


def skew(silos):
    """Mean share of a silo's commonest label."""
    return np.mean([max(np.unique(mine["label"], return_counts=True)[1]) / mine.num_rows for mine in silos.values()])


TEN = table([str(i % 10) for i in range(2000)])
partitions = st.one_of(
    st.builds(Partition, by=st.sampled_from(["domain", "label"])),
    st.builds(
        Partition,
        by=st.sampled_from(["iid", "dirichlet", "quantity"]),
        count=st.integers(1, 12),
        alpha=st.floats(1e-6, 1e6),
    ),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from("abcde"), min_size=12, max_size=80), partitions, st.integers(0, 9), st.randoms())
def test_every_example_is_at_exactly_one_silo_in_whatever_order_the_rows_come(labels, how, seed, random):
    examples = table(labels)
    silos = partition(examples, how, seed)
    shuffled = list(range(len(labels)))
    random.shuffle(shuffled)
    assert sorted(sum(contents(silos).values(), [])) == sorted(examples["text"].to_pylist())
    assert contents(partition(examples.take(shuffled), how, seed)) == contents(silos)
    assert all(mine.num_rows > 0 for mine in silos.values())
    assert how.count in (None, len(silos))


def test_each_value_of_a_column_is_a_silo():
    silos = partition(table(["b", "a", "b"]), Partition("domain"), 0)
    assert contents(silos) == {"d.a": ["text 1"], "d.b": ["text 0", "text 2"]}
    assert list(silos) == ["d.a", "d.b"]
    assert silos["d.b"].column_names == ["text", "label", "domain"]


def test_names_choose_which_values_are_silos_and_their_order():
    silos = partition(table(["a", "b", "c", "b"]), Partition("label", names=("c", "b")), 0)
    assert list(silos) == ["c", "b"]
    assert silos["b"].num_rows == 2


def test_silos_can_be_made_by_any_column_under_its_own_name():
    rows = [{"text": "a", "ward": 1, "place": "x"}, {"text": "b", "ward": 2, "place": "x"}]
    examples = from_dataset(rows, Columns(domain="place", own=("ward",)))
    assert contents(partition(examples, Partition("column:ward"), 0)) == {"1": ["a"], "2": ["b"]}
    assert contents(partition(examples, Partition("column:place"), 0)) == {"x": ["a", "b"]}
    assert contents(partition(examples, Partition("column:domain"), 0)) == {"x": ["a", "b"]}


def test_iid_silos_are_equal_in_size_and_mixture():
    silos = partition(TEN, Partition("iid", count=3), 1)
    assert [mine.num_rows for mine in silos.values()] == [667, 667, 666]
    assert list(silos) == ["silo-0", "silo-1", "silo-2"]
    assert skew(silos) < 0.15


def test_dirichlet_silos_are_equal_in_size_and_the_more_skewed_the_smaller_alpha_is():
    skews = []
    for alpha in (0.01, 1.0, 100.0, 1e6):
        silos = partition(TEN, Partition("dirichlet", count=20, alpha=alpha), 3)
        assert {mine.num_rows for mine in silos.values()} == {100}
        skews.append(skew(silos))
    assert skews == sorted(skews, reverse=True)
    assert skews[0] > 0.9 and skews[-1] < 0.2


def test_dirichlet_over_few_silos_draws_the_shares_of_hsu_et_al():
    """The first silo never meets a label that has run out, so its labels are 100 draws from q ~ Dir(α·p)."""
    alpha, firsts = 5.0, []
    for seed in range(60):
        silo = partition(TEN, Partition("dirichlet", count=20, alpha=alpha), seed)["silo-00"]
        firsts.append(np.bincount([int(one) for one in silo["label"].to_pylist()], minlength=10) / silo.num_rows)
    q = np.random.default_rng(0).dirichlet(np.full(10, alpha / 10), 20000)
    drawn = np.random.default_rng(1).multinomial(100, q) / 100
    assert np.abs(np.mean(firsts, axis=0) - 0.1).max() < 0.06
    assert np.std(firsts) == pytest.approx(np.std(drawn), rel=0.1)


def test_dirichlet_takes_the_domain_where_there_is_no_label():
    by_label = partition(TEN, Partition("dirichlet", count=4), 0)
    by_domain = partition(TEN.drop_columns("label"), Partition("dirichlet", count=4), 0)
    assert contents(by_label) == contents(by_domain)


def test_quantity_silos_differ_in_size_and_each_has_its_minimum():
    for alpha, least in ((0.1, 25), (1e-6, 1), (1e9, 249)):
        silos = partition(TEN, Partition("quantity", count=8, alpha=alpha, min_examples=least), 5)
        sizes = [mine.num_rows for mine in silos.values()]
        assert sum(sizes) == 2000 and min(sizes) >= least
    assert max(sizes) - min(sizes) <= 2


def test_another_seed_is_another_draw_and_the_same_seed_is_the_same():
    for by in ("iid", "dirichlet", "quantity"):
        how = Partition(by, count=5)
        assert contents(partition(TEN, how, 1)) == contents(partition(TEN, how, 1))
        assert contents(partition(TEN, how, 1)) != contents(partition(TEN, how, 2))


def test_a_large_silo_keeps_a_subset_that_new_rows_of_others_do_not_move():
    how = Partition("label", max_examples=30)
    small = partition(TEN, how, 0)
    smaller = partition(TEN.filter(pa.compute.not_equal(TEN["label"], "3")), how, 0)
    assert {mine.num_rows for mine in small.values()} == {30}
    assert contents(smaller) == {name: texts for name, texts in contents(small).items() if name != "3"}
    assert [row for row in TEN.to_pylist() if row["text"] in contents(small)["3"]] == small["3"].to_pylist()


def test_drawn_silos_can_be_named():
    assert list(partition(TEN, Partition("iid", count=2, names=("north", "south")), 0)) == ["north", "south"]


def test_silo_names_are_fit_for_folders_and_never_meet():
    values = [
        "sci.med",
        "a/b",
        "a:b",
        "..",
        ".hidden",
        "",
        "CON",
        "con.txt",
        "Šport",
        "Us",
        "us",
        "x" * 200,
        "x" * 201,
        "ends.",
    ]
    names = safe_names(values)
    assert len({name.casefold() for name in names}) == len(values)
    assert all(name and not name.startswith((".", "-")) and not name.endswith(".") for name in names)
    assert all("/" not in name and "\\" not in name and ":" not in name and len(name) <= 80 for name in names)
    assert names[0] == "sci.med" and names[8] == "Šport"


@given(st.lists(st.text(max_size=100), unique=True, max_size=12))
def test_any_values_make_folder_names(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("silos")
    for name in safe_names(values):
        (folder / name).mkdir()


MISTAKES = {
    "unknown way": (dict(by="domian"), 'a way to make silos; got "domian". Did you mean "domain"'),
    "column of no name": (dict(by="column:"), "a way to make silos"),
    "no count": (dict(by="iid"), 'a count for by = "iid"; got count=None'),
    "count not wanted": (dict(by="domain", count=3), 'no count for by = "domain"; got count=3'),
    "count of none": (dict(by="iid", count=0), "count ≥ 1; got count=0"),
    "alpha zero": (dict(by="dirichlet", count=2, alpha=0.0), "alpha=0.0"),
    "alpha NaN": (dict(by="dirichlet", count=2, alpha=float("nan")), "alpha=nan"),
    "minimum of none": (dict(min_examples=0), "min_examples ≥ 1"),
    "maximum of none": (dict(max_examples=0), "max_examples ≥ 1"),
    "maximum below minimum": (dict(min_examples=5, max_examples=4), "min_examples ≤ max_examples"),
    "names twice": (dict(by="iid", count=2, names=("A", "a")), '"a" twice'),
    "values twice": (dict(by="label", names=("a", "a")), '"a" twice'),
    "too few names": (dict(by="iid", count=3, names=("a", "b")), "3 silo names; got 2"),
    "name of a path": (dict(by="iid", count=1, names=("../x",)), 'fit for folder names; got "../x"'),
    "name too long": (dict(by="iid", count=1, names=("x" * 81,)), "fit for folder names"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_partition_that_cannot_be_is_refused_at_once(mistake):
    arguments, message = MISTAKES[mistake]
    with pytest.raises(DataError) as caught:
        Partition(**arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (Partition("author"), 'a column "author" to make silos by; got no such column'),
        (Partition("column:ward"), 'a column "ward"'),
        (Partition("label", names=("a", "z")), 'names that are values of label; got "z"'),
        (Partition("label", min_examples=2), 'at least 2 examples at every silo; got 1 at "b" and 1 more such silos'),
        (Partition("iid", count=5), "5 silos of at least 1"),
        (Partition("quantity", count=2, min_examples=3), "4 examples for 2 silos of at least 3"),
        (Partition("dirichlet", count=2, min_examples=3), "4 examples for 2 silos of at least 3"),
    ],
)
def test_a_partition_that_the_examples_do_not_allow_is_refused(how, message):
    with pytest.raises(DataError) as caught:
        partition(table(["a", "a", "b", "c"]), how, 0)
    assert message in str(caught.value)


def test_label_skew_without_labels_or_domains_is_refused():
    with pytest.raises(DataError, match="a label or a domain"):
        partition(pa.table({"text": ["a", "b"]}), Partition("dirichlet", count=2), 0)


@pytest.mark.parametrize("how", [Partition("label"), Partition("iid", count=1), Partition("dirichlet", count=1)])
def test_no_examples_make_no_silos(how):
    with pytest.raises(DataError, match="examples to make silos of; got none"):
        partition(TEN.slice(0, 0), how, 0)


def test_a_missing_value_is_refused_before_it_becomes_a_silo():
    with pytest.raises(DataError, match="a value for author in every row; got none in 1 rows"):
        partition(pa.table({"text": ["a", "b"], "author": ["x", None]}), Partition("author"), 0)


def test_a_silo_may_hold_several_values_of_a_column_and_others_are_left_out():
    how = Partition("label", names=("north", "south"), members=(("a", "c"), ("b",)))
    silos = partition(table(["b", "a", "c", "d", "a"]), how, 0)
    held = {name: part["label"].to_pylist() for name, part in silos.items()}
    assert held == {"north": ["a", "c", "a"], "south": ["b"]}


@pytest.mark.parametrize("wrong", [
    {"names": ("x",), "members": (("a",), ("b",))}, {"members": (("a",),)}, {"names": ("x",), "members": ((),)},
    {"names": ("x", "y"), "members": (("a",), ("a",))}, {"names": ("a/b",), "members": (("a",),)},
    {"by": "iid", "count": 1, "names": ("x",), "members": (("a",),)},
])  # fmt: skip
def test_members_that_name_no_silo_or_are_at_two_are_refused(wrong):
    with pytest.raises(DataError):
        Partition(**{"by": "domain"} | wrong)


def test_members_that_the_column_does_not_have_are_refused_with_the_nearest():
    how = Partition("domain", names=("north",), members=(("aa", "b"),))
    with pytest.raises(DataError, match="values of domain"):
        partition(table(["a", "b"]), how, 0)
