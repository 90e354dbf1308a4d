"""The study file: what it says, and how strictly it is read."""

from __future__ import annotations

import pytest

from foedus.errors import FoedusError, TreatyError
from foedus.study.spec import load

from .studies import STUDY, write_study


def mistakes(tmp_path, old: str, new: str) -> list[FoedusError]:
    assert old in STUDY
    with pytest.raises(TreatyError) as caught:
        load(write_study(tmp_path, STUDY.replace(old, new, 1)))
    return list(getattr(caught.value, "problems", (caught.value,)))


def test_a_study_has_methods_points_variants_and_published_figures(tmp_path):
    study = load(write_study(tmp_path))
    assert [method.key for method in study.method] == ["new", "prox", "plain", "pooled"]
    assert study.methods()["new"].changes() == {"algorithm.name": "fedprox", "algorithm.mu": 0.5}
    assert [point.x for point in study.curve[0].point] == [0.01, 0.02, 0.04]
    assert study.ablation[0].variant[0].key == "no-pull"
    assert study.published.curve[0].y == (20.0, 30.0)


def test_bare_dotted_keys_and_quoted_ones_mean_the_same(tmp_path):
    quoted = load(write_study(tmp_path))
    bare = load(write_study(tmp_path, STUDY.replace('"algorithm.name"', "algorithm.name")))
    assert bare == quoted and bare.digest() == quoted.digest()


def test_a_key_taken_out_counts_as_a_change(tmp_path):
    text = STUDY.replace('key = "plain"', 'key = "plain"\nunset = ["local.steps"]\nset = { "local.epochs" = 1 }')
    assert load(write_study(tmp_path, text)).methods()["plain"].changes() == {"local.steps": None, "local.epochs": 1}


def test_the_digest_moves_with_everything_but_the_number_of_jobs(tmp_path):
    digest = load(write_study(tmp_path)).digest()
    assert (
        load(write_study(tmp_path, STUDY.replace("seeds = [1, 2, 3]", "seeds = [1, 2, 3]\njobs = 7"))).digest()
        == digest
    )
    assert load(write_study(tmp_path, STUDY.replace("seeds = [1, 2, 3]", "seeds = [1, 2]"))).digest() != digest


@pytest.mark.parametrize(
    "old,new,where,said",
    [
        ('title = "FedProx"', 'titel = "FedProx"', '[[method]] "prox": titel', 'Did you mean "title"?'),
        ("seeds = [1, 2, 3]", "seed = [1, 2, 3]", "[study]: seed", 'Did you mean "seeds"?'),
        ('key = "pace"', 'key = "pace"\nlog = "yes"', '[[curve]] "pace": log', "a valid boolean"),
        ('role = "ours"', 'role = "best"', '[[method]] "new": role', "'ours', 'rival' or 'reference'"),
        ('label = "0.02"', 'lable = "0.02"', '[[curve]] "pace": [[point]] number 2: lable', 'Did you mean "label"?'),
        ("x = 0.02\n", "x = 0.2\n", '[[curve]] "pace": point', "x rises"),
        ('"algorithm.mu" = 0.5', '"mu" = 0.5', '[[method]] "new": set', "section.key"),
        ('methods = ["new", "plain"]', 'methods = ["new", "plian"]', '"pace": methods', 'Did you mean "plain"?'),
        ('figures = ["perplexity", "mmd"]', 'figures = ["perplexty"]', '"pace": figures', 'Did you mean "perplexity"?'),
        ('of = "new"', 'of = "knew"', '[[ablation]] "parts": of', 'Did you mean "new"?'),
        ('key = "prox"', 'key = "new"', "[[method]] key", '"new" twice'),
        ('role = "ours"', 'role = "rival"', "[[method]] role", "a method whose role is ours"),
        ('curve = "pace"', 'curve = "peace"', "[[published.curve]] curve", 'Did you mean "pace"?'),
        ("y = [20.0, 30.0]", "y = [20.0, 30.0, 40.0]", '[[published.curve]] "pace"', "2 and 3"),
        ("[published]", "[publised]", "publised", 'Did you mean "published"?'),
    ],
)
def test_a_mistake_is_told_in_three_parts_with_file_and_key(tmp_path, old, new, where, said):
    problems = mistakes(tmp_path, old, new)
    told = [f"{p.where}: {p.expected}; {p.came}; {p.do}" for p in problems]
    assert any(where in line and said in line for line in told), told
    assert all(str(tmp_path / "study.toml") in p.where and p.expected and p.came and p.do for p in problems)


def test_every_mistake_is_told_at_once(tmp_path):
    problems = mistakes(tmp_path, 'title = "FedProx"\nrole = "rival"', 'role = "best"')
    assert {p.where.rsplit(": ", 1)[1] for p in problems} == {"title", "role"}


def test_a_file_that_is_not_there_names_its_neighbour(tmp_path):
    path = write_study(tmp_path)
    with pytest.raises(TreatyError) as caught:
        load(path.with_name("stduy.toml"))
    assert 'Did you mean "study.toml"?' in caught.value.do


def test_what_is_not_toml_is_told_so(tmp_path):
    with pytest.raises(TreatyError, match="expected TOML"):
        load(write_study(tmp_path, "study: invented\n"))
