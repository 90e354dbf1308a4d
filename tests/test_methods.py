"""Every algorithm that a treaty can name is built from it, takes a round, and sends what the estimate counts."""

import numpy as np
import pytest

from foedus import loop, methods
from foedus.build import build, silo_splits
from foedus.data import holdings
from foedus.errors import DataError
from foedus.estimate import estimate
from foedus.lm.heads import is_head
from foedus.treaty import from_dict

PLAIN = {"local": {"steps": 1, "batch": 4, "optimizer": "sgd", "lr": 0.1}}
PRIVATE = {"privacy": {"unit": "example", "noise_multiplier": 0.5, "rate": 0.3}}
PUBLIC = "public.csv"
OWN = {
    "alignment": {"alignment": {"public_text": PUBLIC, "attention": "entropy", "features": 16, "project": 8}},
    "udalm": {"topics": {"weight": 0.1}},
    "knn-adapter": {"knn": {"public_text": PUBLIC, "neighbours": 4, "width": 8}},
    "fedlap": {"fedlap": {"samples": 2, "length": 6, "vocabulary": 8, "boost": 1, "passes": 2}},
}
NAMES = list(methods._ALGORITHMS)


@pytest.fixture
def folder(tmp_path):
    lines = [f"line {i} of what {'everybody' if i % 3 else 'nobody'} may read, number {i * i}" for i in range(60)]
    (tmp_path / PUBLIC).write_text("text\n" + "\n".join(f'"{line}"' for line in lines))
    return tmp_path


def texts(silo: int) -> list[dict[str, str]]:
    return [{"text": f"the {i} of silo {silo} says so {i * 7}", "topic": "ab"[i % 2]} for i in range(24)]


def treaty(folder, name: str, **more):
    tables = {"treaty": {"name": "x"}, "model": {"base": "tiny:llama", "max_length": 16},
              "algorithm": {"name": name, "rounds": 2}, "data": {"source": "memory", "label": "topic"}}  # fmt: skip
    for section, table in {**PLAIN, **OWN.get(name, {}), **more}.items():
        tables[section] = tables.get(section, {}) | table
    return from_dict(tables, folder=folder)


def place(folder, name: str, **more):
    return build(treaty(folder, name, **more), {f"s{k}": texts(k) for k in range(3)})


def test_a_treaty_can_name_every_algorithm_that_can_be_built_and_no_other():
    from foedus.treaty.schema import Algorithm as Section

    assert set(NAMES) == set(Section.model_json_schema()["properties"]["name"]["enum"])


@pytest.mark.parametrize("more", [{}, PRIVATE], ids=["plain", "private"])
@pytest.mark.parametrize("name", NAMES)
def test_every_algorithm_takes_a_round_by_its_treaty_and_sends_the_parts_that_it_announces(name, more, folder):
    at = place(folder, name, **more)
    f, engine = at.federation, at.engine()
    state, release = loop.one_round(f, engine, loop.start(f, at.bench.start()))
    parts = f.algorithm.parts({key: x.shape for key, x in state.params.items()})
    assert {key: x.shape for key, x in release.tensors.items() if key in parts} == dict(parts)
    assert all(np.isfinite(x).all() for x in state.params.values())


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "alignment", "fedlap"])
def test_the_estimate_counts_the_bytes_of_every_part(name, folder):
    at = place(folder, name)
    f, engine = at.federation, at.engine()
    _, release = loop.one_round(f, engine, loop.start(f, at.bench.start()))
    assert estimate(at).bytes_up == release.receipts[0].bytes_up


def test_topics_give_a_head_a_term_and_labels_in_their_order(folder):
    at = place(folder, "fedavg", topics={"weight": 0.1, "denoise": 0.2})
    assert at.bench.objective.topics == ("a", "b")
    assert [type(term).__name__ for term in at.plan.goal.terms] == ["Topic", "Denoise"]
    assert sum(map(is_head, at.bench.start())) == 2
    assert not any(map(is_head, place(folder, "fedavg").bench.start()))


def test_topics_of_one_kind_are_refused(folder):
    alike = {f"s{k}": [{**row, "topic": "a"} for row in texts(k)] for k in range(3)}
    with pytest.raises(DataError, match="two topics"):
        build(treaty(folder, "fedavg", topics={"weight": 0.1}), alike)


def test_a_silo_without_labels_trains_without_and_keeps_those_of_its_test(folder):
    at = place(folder, "fedavg", topics={"weight": 0.1}, data={"unlabelled": ["s1"]})
    known = {name: {which: set((x.topics >= 0).tolist()) for which, x in silo.splits.items() if len(x)}
             for name, silo in at.silos.items()}  # fmt: skip
    assert known["s1"]["train"] == {False} and known["s1"].get("test", {True}) == {True}
    assert known["s0"]["train"] == {True}


def test_labels_are_missing_in_training_alone(folder):
    at = place(folder, "fedavg", topics={"weight": 0.1}, data={"missing": 0.5})
    whole = place(folder, "fedavg", topics={"weight": 0.1})
    for name, silo in at.silos.items():
        assert 0 < silo.splits["train"].tokens < whole.silos[name].splits["train"].tokens
        assert silo.splits["test"].tokens == whole.silos[name].splits["test"].tokens


def test_only_the_network_of_a_store_is_trained(folder):
    assert all(map(is_head, place(folder, "knn-adapter").bench.start()))


def test_surveys_of_protected_units_are_planned_and_no_others(folder):
    at = place(folder, "alignment", **PRIVATE)
    assert at.plan.survey.rounds == (0, 1) and set(at.plan.survey.shares) == {"embedding", "count", "phi"}
    assert place(folder, "alignment").plan.survey is None
    assert place(folder, "fedavg", **PRIVATE).plan.survey is None


def test_what_was_scrubbed_stands_with_the_holdings(folder):
    data = {"s0": [{"text": f"write to a{i}@b.org of number {i}"} for i in range(9)] + [{"text": "x@y.org"}]}
    scrubbing = treaty(folder, "fedavg", data={"label": None, "scrub": True})
    held = holdings(silo_splits(scrubbing, data))["s0"]
    assert held["scrubbed"] == {"dropped": 1, "email": 10}
    assert held["train"] + held["validation"] + held["test"] == 9
    assert "scrubbed" not in holdings(silo_splits(treaty(folder, "fedavg"), {"s0": texts(0)}))["s0"]
