"""Missing labels: nested, by text and seed alone, and only what the kind says."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foedus.data.missing import KINDS, Missing
from foedus.errors import DataError
from foedus.lm.objectives import IGNORE, concat, make_objective
from foedus.lm.tiny import tiny_tokenizer

TEXTS = [f"the number {i} is said of many things that are long enough to be cut" for i in range(200)]
QUICK = settings(max_examples=50, deadline=None, derandomize=True)


@QUICK
@given(st.floats(0, 0.99), st.floats(0, 0.99), st.sampled_from(KINDS), st.integers(0, 9))
def test_what_is_missing_at_a_lower_rate_is_missing_at_a_higher_one(one, other, kind, seed):
    few, many = (Missing(rate, kind, seed) for rate in sorted((one, other)))
    assert (few.topics(TEXTS) <= many.topics(TEXTS)).all()
    assert all((few.tokens(text, 1, 20) <= many.tokens(text, 1, 20)).all() for text in TEXTS[:20])


def test_who_loses_a_label_depends_on_text_and_seed_and_not_on_the_other_texts():
    missing = Missing(0.5, "sequence", 3)
    assert (missing.topics(TEXTS)[50:60] == missing.topics(TEXTS[50:60])).all()
    assert (missing.topics(TEXTS) != Missing(0.5, "sequence", 4).topics(TEXTS)).any()
    assert (missing.topics(TEXTS) == Missing(0.5, "topic", 3).topics(TEXTS)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rates_hold_on_average(kind):
    missing = Missing(0.3, kind)
    lost = [missing.tokens(text, 0, 50) for text in TEXTS] if kind == "token" else missing.topics(TEXTS)
    assert abs(np.mean(lost) - 0.3) < 0.1


@pytest.mark.parametrize("wrong", [{"rate": 1.0}, {"rate": -0.1}, {"rate": 0.1, "kind": "word"}])
def test_an_impossible_setting_is_refused(wrong):
    with pytest.raises(DataError):
        Missing(**wrong)


@pytest.fixture(scope="module")
def objective():
    return make_objective("causal-lm", 24, topics=("even", "odd"))


@pytest.fixture(scope="module")
def encoded(objective):
    return objective.encode(table(TEXTS), tiny_tokenizer("llama"))


def table(texts):
    return pa.table({"text": texts, "label": [("even", "odd")[i % 2] for i in range(len(texts))]})


def labels(objective, data):
    return objective.collate(data, range(len(data)), 0)


def test_a_lost_sequence_has_neither_targets_nor_topic_and_keeps_its_text(objective, encoded):
    missing = Missing(0.4, "sequence", 1)
    batch, before = labels(objective, encoded.without(missing, TEXTS)), labels(objective, encoded)
    lost = missing.topics(TEXTS)[encoded.documents]
    assert ((batch["labels"] == IGNORE).all(1).numpy() == lost).all()
    assert ((batch["topics"] == -1).numpy() == lost).all()
    assert (batch["input_ids"] == before["input_ids"]).all()
    assert (batch["labels"][~lost] == before["labels"][~lost]).all()


def test_lost_tokens_are_no_targets_and_topics_stay(objective, encoded):
    less = encoded.without(Missing(0.4, "token", 1), TEXTS)
    batch, before = labels(objective, less), labels(objective, encoded)
    asked = before["labels"] != IGNORE
    left = (batch["labels"] != IGNORE)[asked].float().mean()
    assert 0.5 < left < 0.7
    assert (batch["topics"] == before["topics"]).all()
    assert less.tokens == int((batch["labels"] != IGNORE).sum())


def test_a_lost_topic_is_all_that_is_lost(objective, encoded):
    missing = Missing(0.4, "topic", 1)
    batch, before = labels(objective, encoded.without(missing, TEXTS)), labels(objective, encoded)
    assert (batch["labels"] == before["labels"]).all()
    assert ((batch["topics"] == -1).numpy() == missing.topics(TEXTS)[encoded.documents]).all()


def test_masked_models_are_not_asked_for_what_was_lost():
    objective = make_objective("masked-lm", 24, topics=("even", "odd"))
    data = objective.encode(table(TEXTS), tiny_tokenizer("bert"))
    missing = Missing(0.4, "sequence", 1)
    batch = labels(objective, data.without(missing, TEXTS))
    assert ((batch["labels"] == IGNORE).all(1).numpy() == missing.topics(TEXTS)[data.documents]).all()


def test_a_text_without_topics_says_so(encoded):
    assert set(encoded.topics.tolist()) == {0, 1}
    assert set(encoded.without_topics().topics.tolist()) == {-1}


def test_parts_keep_their_topics_and_what_they_lost_when_they_come_together(objective, encoded):
    less = encoded.without(Missing(0.4, "token", 1), TEXTS)
    both = labels(objective, concat([encoded, less]))
    assert (both["labels"][: len(encoded)] == labels(objective, encoded)["labels"]).all()
    assert (both["labels"][len(encoded) :] == labels(objective, less)["labels"]).all()
    assert both["topics"].tolist() == [*encoded.topics, *less.topics]


def test_topics_rows_and_draws_come_with_every_batch_and_belong_to_the_row(objective, encoded):
    one, two = objective.collate(encoded, [3, 1], 7), objective.collate(encoded, [1, 2], 7)
    assert one["rows"].tolist() == [3, 1]
    assert one["draws"][1] == two["draws"][0] != two["draws"][1]
    assert one["topics"].tolist() == [encoded.topics[3], encoded.topics[1]]


def test_without_topics_a_batch_is_what_it_was(encoded):
    plain = make_objective("causal-lm", 24)
    batch = plain.collate(plain.encode(table(TEXTS), tiny_tokenizer("llama")), [0, 1], 0)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_a_label_that_is_no_topic_is_unknown(objective):
    odd = pa.table({"text": ["one and two", "three and four"], "label": ["even", "prime"]})
    assert objective.encode(odd, tiny_tokenizer("llama")).topics.tolist() == [0, -1]


def test_topics_without_a_label_column_are_refused(objective):
    with pytest.raises(DataError, match="label"):
        objective.encode(pa.table({"text": ["one"]}), tiny_tokenizer("llama"))
