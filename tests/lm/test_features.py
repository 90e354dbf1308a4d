"""Vectors of texts: the sentence encoder's as its authors compute them, and any base's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from foedus.lm.adapters import LoRA, attach, load_params, params_of
from foedus.lm.features import features, load_encoder, sentence_embeddings
from foedus.lm.load import load_base
from foedus.lm.tiny import FAMILIES

TEXTS = ["The doctor treated a fever.", "", "A judge heard the appeal, at some length, in the old court house."]


@pytest.fixture(scope="module")
def encoder():
    return load_encoder()


def test_similar_sentences_are_nearer_than_others(encoder):
    said = [
        "A man is playing a guitar.",
        "Someone plays a musical instrument.",
        "The stock market fell sharply today.",
        "Shares lost much of their value.",
    ]
    cosine = sentence_embeddings(encoder, said) @ sentence_embeddings(encoder, said).T
    assert min(cosine[0, 1], cosine[2, 3]) > 0.4 > 0.2 > cosine[:2, 2:].max()
    assert np.allclose(np.diag(cosine), 1, atol=1e-6)


def test_an_embedding_is_the_normalised_mean_over_the_tokens(encoder):
    batch = encoder.tokenizer(TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        mean = encoder.model(**batch).last_hidden_state[0].mean(0)
    assert np.allclose(sentence_embeddings(encoder, TEXTS)[0], mean / mean.norm(), atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_do_not_depend_on_the_batch(family):
    base = load_base(f"tiny:{family}", "features")
    together = features(base, TEXTS)
    alone = np.concatenate([features(base, [text], batch=1) for text in TEXTS])
    assert together.shape == (3, 32) and together.dtype == np.float32
    assert np.allclose(together, alone, atol=1e-5)
    assert features(base, []).shape == (0, 32)


def test_a_text_without_a_token_is_all_zeros():
    assert not features(load_base("tiny:gpt2", "features"), [""]).any()


def test_a_model_with_a_head_has_the_features_of_its_body():
    head, bare = load_base("tiny:llama"), load_base("tiny:llama", "features")
    names = dict(head.model.model.named_parameters())
    bare.model.load_state_dict({name: names[name] for name, _ in bare.model.named_parameters()})
    assert np.array_equal(features(head, TEXTS), features(bare, TEXTS))


def test_an_adapter_takes_part():
    base = load_base("tiny:llama")
    before = features(base, TEXTS)
    attach(base, LoRA(), seed=0)
    assert np.array_equal(features(base, TEXTS), before)
    load_params(base.model, {name: x + np.float32(0.1) for name, x in params_of(base.model).items()})
    assert not np.allclose(features(base, TEXTS), before, atol=1e-3)
