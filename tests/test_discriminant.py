"""A head of class means is Fisher's discriminant, as scikit-learn has it, of sums that one row moves by at most 1."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from foedus.discriminant import COUNTED, RIDGE, Discriminant, discriminant
from foedus.errors import DataError
from foedus.lm.statistics import topic_rows

NAMES = {"0.weight": "w", "0.bias": "b"}
P, TOPICS = 12, 3


@pytest.fixture(scope="module")
def texts():
    """Features of three topics that share a covariance, and of public text with that covariance."""
    random = np.random.default_rng(0)
    mix = random.normal(size=(P, P)) / 3
    topics = random.integers(0, TOPICS, 3000)
    centres = random.normal(size=(TOPICS, P)) / 2
    return (
        0.3 * random.normal(size=(4000, P)) @ mix,
        centres[topics] + 0.3 * random.normal(size=(3000, P)) @ mix,
        topics,
    )


class Row:
    """What a term sees of rows whose features are given."""

    def __init__(self, x, topics):
        self.x, self.batch = torch.tensor(x, dtype=torch.float32), {"topics": torch.tensor(topics)}

    def features(self):
        return self.x


def far(of: Discriminant, by: float = 1e3) -> Discriminant:
    """The same, of texts so far out that no row is ever clipped."""
    return Discriminant(of.topics, of.center, of.scale / by, of.room * by, of.names)


def said(head, x):
    return x @ head["w"].T.astype(float) + head["b"]


def made(of: Discriminant, rows):
    """The head of these rows' sums."""
    return of.head(of.centres(rows.double().sum(0).numpy()))


def test_without_noise_or_clip_it_decides_as_fishers_discriminant(texts):
    public, x, topics = texts
    of = far(discriminant(public, TOPICS, NAMES))
    head = made(of, topic_rows(Row(x, topics), of))
    covariance = np.cov(public.T) + RIDGE * np.trace(np.cov(public.T)) / P * np.eye(P)
    theirs = LinearDiscriminantAnalysis(
        solver="lsqr", priors=np.full(TOPICS, 1 / TOPICS), covariance_estimator=Fixed(covariance)
    ).fit(x, topics)
    ours = said(head, x)
    assert (ours.argmax(1) == theirs.predict(x)).mean() > 0.999
    between = theirs.decision_function(x)
    np.testing.assert_allclose(ours - ours.mean(1, keepdims=True), between - between.mean(1, keepdims=True), atol=0.05)


class Fixed:
    """An estimator of covariance that has it already."""

    def __init__(self, covariance):
        self.covariance = covariance

    def fit(self, x):
        self.covariance_ = self.covariance
        return self


def test_a_row_adds_at_most_one_and_nothing_where_its_topic_is_unknown(texts):
    public, x, topics = texts
    of = discriminant(public, TOPICS, NAMES)
    rows = topic_rows(Row(100 * x, topics), of)
    assert rows.shape == (len(x), of.size)
    assert rows.norm(dim=1).max() <= 1 + 1e-6
    assert not topic_rows(Row(x, np.full(len(x), -1)), of).any()


def test_a_row_stands_at_the_place_of_its_topic(texts):
    public, x, topics = texts
    of = discriminant(public, TOPICS, NAMES)
    rows = topic_rows(Row(x, topics), of).view(len(x), TOPICS, -1)
    counts = rows[:, :, -1] / COUNTED
    np.testing.assert_allclose(counts, np.eye(TOPICS)[topics], atol=1e-6)
    assert not rows[counts == 0].any()


def test_what_the_sums_are_divided_by_does_not_matter(texts):
    public, x, topics = texts
    of = discriminant(public, TOPICS, NAMES)
    sums = topic_rows(Row(x, topics), of).double().sum(0).numpy()
    one, other = (of.head(of.centres(x)) for x in (sums, sums / 7))
    assert all(np.allclose(one[name], other[name], rtol=1e-5, atol=1e-5) for name in one)


@pytest.mark.parametrize("missing", [0, 2])
def test_a_topic_that_nobody_has_does_not_break_the_others(texts, missing):
    public, x, topics = texts
    there = topics != missing
    of = discriminant(public, TOPICS, NAMES)
    head = made(of, topic_rows(Row(x[there], topics[there]), of))
    assert all(np.isfinite(y).all() for y in head.values())
    assert (said(head, x[there]).argmax(1) == topics[there]).mean() > 0.7


def test_where_noise_left_no_row_no_head_is_made():
    of = discriminant(np.random.default_rng(0).normal(size=(30, P)), TOPICS, NAMES)
    for sums in (np.zeros(of.size), np.full(of.size, -1.0)):
        assert of.centres(sums) is None
    assert of.still.keys() == of.head(np.ones((TOPICS, P))).keys() and not any(y.any() for y in of.still.values())


def test_a_topic_that_noise_starved_weighs_no_more_than_a_true_mean_could(texts):
    public, _, _ = texts
    of = discriminant(public, TOPICS, NAMES)
    noisy = np.random.default_rng(0).normal(size=of.size).reshape(TOPICS, -1)
    noisy[:, -1] = 1.0, -5.0, 5.0
    head = of.head(of.centres(noisy))
    centres = np.linalg.solve(of.scale, head["w"].astype(float).T / of.room**2)
    assert np.linalg.norm(centres, axis=0).max() <= 1 + 1e-4


def test_fewer_public_texts_than_features_do(texts):
    public, x, topics = texts
    of = discriminant(public[: P // 2], TOPICS, NAMES)
    head = made(of, topic_rows(Row(x, topics), of))
    assert (said(head, x).argmax(1) == topics).mean() > 0.6


def test_class_means_outlive_a_model_that_moves_and_shrinks_all_features(texts):
    public, x, topics = texts
    before, now = (discriminant(y, TOPICS, NAMES) for y in (public, 0.3 * public + 2.0))
    centres = before.centres(topic_rows(Row(x, topics), before).double().sum(0).numpy())
    old, new = before.head(centres), now.head(centres)
    np.testing.assert_allclose(said(new, 0.3 * x + 2.0), said(old, x), atol=1e-3)
    right = (said(old, x).argmax(1) == topics).mean()
    assert (said(old, 0.3 * x + 2.0).argmax(1) == topics).mean() < right - 0.2


def test_public_text_that_is_all_alike_is_refused():
    with pytest.raises(DataError, match="alike"):
        discriminant(np.ones((5, P)), TOPICS, NAMES)
