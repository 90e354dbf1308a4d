"""The treaty as a value: its defaults, its canonical form, its digest, and what it says in plain words."""

import dataclasses
import json
import pickle
import tomllib
from pathlib import Path

import pytest

from foedus.errors import TreatyError
from foedus.treaty import SECTIONS, Mistakes, Treaty, describe, from_dict, load, not_covered, parse, privacy, statement
from foedus.treaty.rules import OWN

TREATIES = sorted((Path(__file__).parent.parent / "treaties").glob("*.toml"))
LEAST = """
[treaty]
name = "least"
[model]
base = "tiny:gpt2"
[data]
source = "posts.csv"
domain = "topic"
[silos]
by = "domain"
[algorithm]
rounds = 5
[local]
steps = 2
"""
IN_MEMORY = {
    "treaty": {"name": "mine"},
    "model": {"base": "tiny:gpt2"},
    "algorithm": {"rounds": 2},
    "local": {"epochs": 1},
}


@pytest.fixture
def least() -> Treaty:
    return parse(LEAST)


# values


def test_absent_keys_take_their_defaults(least):
    assert (least.name, least.seed, least.treaty.purpose, least.treaty.format) == ("least", 0, "", 1)
    assert (least.model.task, least.model.max_length) == ("causal-lm", 128)
    assert (least.adapter.kind, least.adapter.rank, least.adapter.alpha, least.adapter.dropout) == ("lora", 8, 16, 0)
    assert (least.adapter.targets, least.adapter.embeddings) == (("all-linear",), False)
    assert (least.data.text, least.data.keep, least.data.test_source) == (("text",), None, None)
    assert (least.silos.count, least.silos.min_examples, least.silos.names) == (None, 1, ())
    assert (least.split.by, least.split.validation, least.split.test) == ("hash", 0.1, 0.1)
    assert least.algorithm.name == "fedavg"
    assert (least.local.epochs, least.local.batch, least.local.optimizer, least.local.lr) == (None, 8, "adamw", 1e-3)
    assert (least.local.schedule, least.local.warmup, least.local.max_grad_norm) == ("constant", 0, None)
    assert (least.server.optimizer, least.server.lr, least.server.weighting) == ("sgd", 1.0, "examples")
    assert (least.cohort.sampling, least.cohort.minimum) == ("full", 1)
    assert (least.evaluation.every, least.evaluation.baselines) == (1, ("base",))
    assert (least.disclosure.loss, least.disclosure.holdings) == (True, True)
    assert (least.performance.precision, least.performance.cohort_batch) == ("auto", "auto")


def test_a_treaty_is_frozen_all_the_way(least):
    with pytest.raises(dataclasses.FrozenInstanceError):
        least.local = None
    with pytest.raises(Exception, match="frozen"):
        least.local.lr = 1.0


@pytest.mark.parametrize("path", TREATIES, ids=lambda path: path.stem)
def test_a_treaty_compares_hashes_and_pickles_by_its_sections(path):
    treaty = load(path)
    again = pickle.loads(pickle.dumps(treaty))
    assert again == treaty == parse(path.read_text())
    assert hash(again) == hash(treaty) == hash(parse(path.read_text()))
    assert again.folder == treaty.folder
    assert len({again, treaty}) == 1


def test_integers_are_good_numbers_and_become_floats(least):
    assert least.replace(**{"local.lr": 1}).local.lr == 1.0
    assert isinstance(parse(LEAST + "lr = 1").local.lr, float)
    assert parse(LEAST + "lr = 1").digest() == parse(LEAST + "lr = 1.0").digest()


def test_minus_zero_is_zero(least):
    signed, unsigned = (least.replace(**{"local.weight_decay": x}) for x in (-0.0, 0.0))
    assert signed == unsigned and signed.digest() == unsigned.digest()


def test_one_column_may_stand_outside_a_list(least):
    assert parse(LEAST.replace("domain =", 'text = ["text"]\ndomain =')) == least
    assert least.replace(**{"data.text": ["title", "body"]}).data.text == ("title", "body")


def test_sets_have_one_order_and_sequences_keep_theirs(least):
    one = least.replace(**{"data.keep": ["b", "a"], "evaluation.baselines": ["pooled", "base"]})
    other = least.replace(**{"data.keep": ["a", "b"], "evaluation.baselines": ["base", "pooled"]})
    assert one == other and one.digest() == other.digest()
    assert least.replace(**{"data.text": ["b", "a"]}) != least.replace(**{"data.text": ["a", "b"]})


def test_sections_put_together_by_hand_are_checked_too(least):
    with pytest.raises(Mistakes, match="mu only with"):
        dataclasses.replace(least, algorithm=type(least.algorithm)(rounds=3, mu=0.5))


# data in Python


def test_without_data_and_silos_the_silos_are_handed_over_in_python():
    treaty = from_dict(IN_MEMORY)
    assert (treaty.data.source, treaty.silos.by) == ("memory", "given")
    assert parse(treaty.resolved()) == treaty


def test_columns_and_least_examples_can_be_set_for_data_in_python():
    treaty = from_dict(IN_MEMORY | {"data": {"source": "memory", "text": "body"}, "silos": {"min_examples": 5}})
    assert (treaty.data.text, treaty.silos.by, treaty.silos.min_examples) == (("body",), "given", 5)


def test_data_in_python_need_no_validation_share_for_they_may_come_split():
    assert from_dict(IN_MEMORY | {"split": {"validation": 0.0}}).split.validation == 0.0


def test_sections_may_be_handed_over_as_values_and_none_means_not_written(least):
    tables = {name: getattr(least, name) for name in SECTIONS}
    assert from_dict(tables) == least
    assert from_dict(IN_MEMORY | {"local": {"epochs": 1, "steps": None}}) == from_dict(IN_MEMORY)


def test_reading_leaves_the_callers_values_alone():
    before = json.dumps(IN_MEMORY)
    from_dict(IN_MEMORY)
    assert json.dumps(IN_MEMORY) == before


# from files


def test_relative_paths_start_at_the_treatys_own_folder(tmp_path, monkeypatch, least):
    (tmp_path / "t.toml").write_text(LEAST)
    monkeypatch.chdir(tmp_path)
    treaty = load("t.toml")
    assert treaty.folder == tmp_path.resolve()
    assert treaty == least and treaty.digest() == least.digest() and least.folder is None


def test_a_test_source_leaves_no_share_to_be_held_out_for_the_test(least):
    treaty = least.replace(**{"data.test_source": "test.csv", "split.test": None})
    assert treaty.split.test == 0.0
    assert parse(treaty.resolved()) == treaty


@pytest.mark.parametrize("path", TREATIES, ids=lambda path: path.stem)
def test_every_treaty_that_we_ship_is_sound_commented_and_named_after_its_file(path):
    treaty, text = load(path), path.read_text()
    assert path.stem in (treaty.name, f"{treaty.name}-deploy")  # whose name is that of the model it releases
    assert treaty.treaty.purpose
    assert text.startswith("# ")
    assert all(len(line) <= 120 for line in text.splitlines())
    assert parse(treaty.resolved()) == treaty


def test_the_shipped_treaties_show_every_algorithm_partition_sampling_and_adapter():
    treaties = [load(path) for path in TREATIES]
    assert {t.algorithm.name for t in treaties} == {"fedavg", "fedprox", "alignment"}
    assert {t.silos.by for t in treaties} >= {"domain", "dirichlet", "quantity", "iid"}
    assert {t.cohort.sampling for t in treaties} == {"full", "fixed", "poisson"}
    assert {t.adapter.kind for t in treaties} == {"lora", "full"}
    assert {t.split.by for t in treaties} == {"hash", "time"}


# canonical form and digest


def test_the_resolved_treaty_says_every_key_that_applies_and_no_other(least):
    tables = tomllib.loads(least.resolved())
    assert list(tables) == [name for name in SECTIONS if name not in ("topics", *OWN)]
    assert tables["local"] == {
        "steps": 2, "batch": 8, "optimizer": "adamw", "lr": 0.001, "weight_decay": 0.0,
        "keep_optimizer": False, "schedule": "constant", "warmup": 0,
    }  # fmt: skip
    assert tables["server"] == {"optimizer": "sgd", "lr": 1.0, "weighting": "examples"}
    assert tables["algorithm"] == {"name": "fedavg", "rounds": 5}
    assert tables["silos"] == {"by": "domain", "min_examples": 1}
    assert "rank" not in tomllib.loads(least.replace(**{"adapter.kind": "full"}).resolved())["adapter"]


def test_the_resolved_treaty_says_its_digest_and_explains_its_keys(least):
    text = least.resolved()
    assert least.digest() in text.splitlines()[1]
    assert "# tokens; longer texts are cut into windows of this length" in text
    assert max(map(len, text.splitlines())) <= 120
    for unit in ("example", "author", "silo"):
        more = {} if unit == "silo" else {"privacy.rate": 0.1}
        private = least.replace(**{"privacy.unit": unit, "privacy.epsilon": 8.0, "data.author": "who", **more,
                                   "server.weighting": "uniform", "disclosure.loss": False})  # fmt: skip
        assert max(map(len, private.resolved().splitlines())) <= 120


def test_any_sign_in_a_text_survives_the_resolved_treaty(least):
    odd = least.replace(**{"treaty.purpose": 'quotes ", \\ and\nlines\r\t, \x00\x1b\x7f, \u2028, 😀 # no comment'})
    assert parse(odd.resolved()) == odd


def test_the_digest_is_known_and_does_not_drift(least):
    assert least.digest() == "d37c9d77f6ccdc71fc9315a4dcfa239f4cac238700c6d2c5325e9e27e63478a7"


def test_how_fast_a_run_goes_is_no_part_of_what_is_agreed(least):
    fast = least.replace(**{"performance.threads": 2, "performance.precision": "bf16", "performance.cohort_batch": 4})
    assert fast != least
    assert fast.digest() == least.digest()


def test_a_default_written_out_changes_no_digest(least):
    assert parse(LEAST + "batch = 8\nlr = 0.001\n[server]\n[cohort]\nsampling = 'full'").digest() == least.digest()


# replace


def test_replace_changes_dotted_keys_and_nothing_else(least):
    treaty = least.replace(**{"algorithm.rounds": 3, "treaty.seed": 7})
    assert (treaty.algorithm.rounds, treaty.seed) == (3, 7)
    assert treaty.replace(**{"algorithm.rounds": 5, "treaty.seed": 0}) == least


def test_replace_takes_out_what_is_none_and_what_no_longer_applies(least):
    assert least.replace(**{"local.steps": None, "local.epochs": 1}).local.epochs == 1
    prox = least.replace(**{"algorithm.name": "fedprox", "algorithm.mu": 0.5})
    assert prox.replace(**{"algorithm.name": "fedavg"}) == least
    assert least.replace(**{"adapter.rank": 4}).replace(**{"adapter.kind": "full"}).adapter.kind == "full"


def test_replace_takes_whole_sections(least):
    treaty = least.replace(local={"epochs": 2}, silos={"by": "iid", "count": 3})
    assert (treaty.local.steps, treaty.local.epochs, treaty.silos.count) == (None, 2, 3)


def test_replace_keeps_the_folder():
    treaty = load(TREATIES[0])
    assert treaty.replace(**{"treaty.seed": 9}).folder == treaty.folder is not None


def test_replace_refuses_what_a_treaty_would(least):
    with pytest.raises(TreatyError, match="mu only with"):
        least.replace(**{"algorithm.mu": 0.5})
    with pytest.raises(TreatyError, match=r"\[algorithm\] ronds"):
        least.replace(**{"algorithm.ronds": 3})
    with pytest.raises(TreatyError, match="Move it under"):
        least.replace(rounds=3)
    with pytest.raises(TreatyError, match="epsilon only with"):
        least.replace(**{"privacy.epsilon": 8.0})


# plain words


def test_without_privacy_the_statement_promises_nothing_and_says_what_leaks(least):
    words = statement(least)
    assert words.startswith("No privacy guarantee: unit none, epsilon none. Updates are not protected.")
    for leak in ("membership", "properties of the data", "exact recovery of whole sequences", "curious coordinator"):
        assert leak in words
    assert privacy(least) == {"unit": "none", "epsilon": None, "delta": None, "statement": words}


def test_a_silo_is_told_all_that_leaves_it(least):
    said = "\n".join(describe(least, 4_884_480))
    assert "its update, in every round it takes part in: 4,884,480 numbers, unprotected" in said
    assert "as its weight: how many training examples it has" in said
    assert "its training loss" in said
    assert "its holdings" in said
    assert "evaluation sums by domain, every round and at the end" in said
    assert "one number for each trained parameter" in describe(least)[0]


def test_what_the_treaty_keeps_at_home_is_not_said_to_leave(least):
    quiet = least.replace(
        **{"server.weighting": "uniform", "disclosure.loss": False, "disclosure.holdings": False, "evaluation.every": 9}
    )
    said = "\n".join(describe(quiet))
    assert "training examples" not in said
    assert "training loss," not in said
    assert "holdings" not in said
    assert "at the end: nats" in said and "every" not in said.partition("evaluation sums")[2]


def test_a_silo_is_told_of_what_it_might_not_think_of(least):
    said = "\n".join(describe(least.replace(**{"model.task": "sequence-classification", "data.label": "label"})))
    assert "the names of its labels" in said
    said = "\n".join(describe(least.replace(**{"evaluation.baselines": ["local", "pooled"]})))
    assert 'for the baseline "local": the same sums' in said
    assert 'for the baseline "pooled": all its training text' in said
    assert "pooled" not in "\n".join(describe(least))


METHODS = {
    "scaffold": {"local.optimizer": "sgd"},
    "alignment": {"alignment.public_text": "friends", "alignment.attention": "entropy", "alignment.every": 2},
    "fedlap": {},
    "knn-adapter": {"knn.public_text": "reuters-r8"},
    "alone": {},
}
PRIVATE = {"privacy.unit": "example", "privacy.epsilon": 8.0, "privacy.rate": 0.1}


def method(least, name: str, **more) -> Treaty:
    return least.replace(**{"algorithm.name": name, **METHODS[name], **more})


def test_a_silo_is_told_what_a_method_sends_beside_its_update(least):
    said = {name: "\n".join(describe(method(least, name))) for name in METHODS}
    assert "how its control variate changed, as many numbers again" in said["scaffold"]
    assert "the mean embedding of its text, 128 numbers a layer, exactly, every 2 rounds" in said["alignment"]
    assert "what it weighs, which follows from how unsure the model is of its text" in said["alignment"]
    assert "in place of an update, in every round: 16 synthetic texts of 16 tokens" in said["fedlap"]
    assert "can be like its own texts" in said["fedlap"]
    assert "no update: zeros" in said["alone"]


def test_a_silo_is_told_whether_what_a_method_sends_is_noised(least):
    more = {**PRIVATE, "server.weighting": "uniform", "disclosure.loss": False}
    said = "\n".join(describe(method(least, "alignment", **more)))
    assert "from a survey with noise of its own, every 2 rounds" in said
    whole = more | {"privacy.unit": "silo", "privacy.rate": None}
    assert "inside the clip of the update" in "\n".join(describe(method(least, "alignment", **whole)))
    assert "made of gradients that were noised" in "\n".join(describe(method(least, "fedlap", **more)))


def test_a_silo_is_told_of_its_class_means(least):
    means = method(least, "alignment", **{"alignment.head": "means", "data.label": "label"})
    assert "for each topic the mean features of its texts and its share of them, exactly" in "\n".join(describe(means))
    assert means.headed and "the names of its topics, once" in "\n".join(describe(means))
    assert not method(least, "alignment").headed


def test_a_silo_is_told_of_its_tokens_and_they_never_leave_without_noise(least):
    more = {**PRIVATE, "server.weighting": "uniform", "disclosure.loss": False, "alignment.tokens": 50}
    counted = method(least, "alignment", **more)
    said = "each of the first 50 tokens is in its text, and was expected there, from a survey with noise of its own"
    assert counted.marginal and said in "\n".join(describe(counted))
    for unit in ({"privacy.unit": "silo", "privacy.rate": None}, dict.fromkeys(PRIVATE)):
        with pytest.raises(TreatyError, match=r"\[alignment\] tokens"):
            method(least, "alignment", **{**more, **unit})


def test_what_a_method_reads_outside_its_guarantee_is_said(least):
    more = {**PRIVATE, "server.weighting": "uniform", "disclosure.loss": False}
    said = " ".join(not_covered(method(least, "knn-adapter", **more)))
    assert "what a silo's own store of text answers" in said
    public = method(least, "knn-adapter", **more, **{"knn.answers": "public"})
    assert "store of text" not in " ".join(not_covered(public))
    topical = least.replace(**{"data.label": "label", "topics.weight": 0.1})
    assert "the names of the topics" in not_covered(topical)


def test_what_asks_for_nothing_is_in_no_resolved_treaty_and_no_digest(least):
    off = least.replace(**{"data.missing": 0.0, "data.scrub": False, "data.unlabelled": [], "model.layers": None,
                           "adapter.blocks": None, "silos.members": []})  # fmt: skip
    labelled = least.replace(**{"data.label": "label"})
    assert off.digest() == least.digest() and off.tables() == least.tables()
    assert labelled.replace(**{"topics.weight": 0.0, "topics.denoise": 0.0}).tables() == labelled.tables()
    assert least.replace(**{"data.scrub": True}).data.scrub == ("addresses", "names", "urls")


def test_what_belongs_to_a_method_goes_with_it(least):
    aligned = method(least, "alignment")
    assert set(aligned.tables()["alignment"]) >= {"weight", "features", "gamma", "every"}
    assert "largest" not in aligned.tables()["alignment"] and "noise_ratio" not in aligned.tables()["alignment"]
    assert aligned.replace(**{"algorithm.name": "fedavg"}) == least
    topical = least.replace(**{"data.label": "label", "topics.weight": 0.1, "topics.smoothing": 0.1})
    assert topical.replace(**{"topics.weight": 0.0}) == least.replace(**{"data.label": "label"})
    assert parse(aligned.resolved()) == aligned


DIGESTS = {
    "newsgroups": "622ea46667e9834dfb8ac6b37c047153d6e6b965ce0bcbf21c81028f6463a185",
    "newsgroups-private": "33541a18d74092177ddd6249f4ad00de45334634c55ca6f72a719f9aeed81b17",
    "newsgroups-secure": "f616172a918a473d9064d8aca10feb883a2423a62b797dcd4a9db39b75ab919f",
}


@pytest.mark.parametrize("name", DIGESTS)
def test_the_digests_of_treaties_from_before_the_methods_are_what_they_were(name):
    assert load(next(path for path in TREATIES if path.stem == name)).digest() == DIGESTS[name]


def test_a_capped_weight_is_said_to_be_capped(least):
    assert any("400 at most" in line for line in describe(least.replace(**{"server.max_weight": 400})))
