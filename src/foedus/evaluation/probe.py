"""Domain accuracy, in the three senses that the word has.

D1   macro accuracy of a model's own topic head            higher is better
D2   macro accuracy of a linear probe that tells silos apart by their features; alignment should lower it to chance
D3   macro accuracy of the next token                      `figures(...)["token_accuracy"]["macro"]`

Macro: the mean over classes of the share of each that was recognised, so that no class counts for its size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

FOLDS, STRENGTH = 5, 1.0


@dataclass(frozen=True)
class Probe:
    """`accuracy`: macro, of examples that the probe was not trained on. `chance`: what guessing gets, 1 / classes."""

    accuracy: float
    chance: float


def macro_accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """The mean recall of the classes that `labels` (n,) names; −1 is no label. NaN without any."""
    classes = np.unique(labels[labels >= 0])
    recalls = [float((predictions[labels == c] == c).mean()) for c in classes]
    return sum(recalls) / len(recalls) if recalls else math.nan


def probe(features: np.ndarray, labels: np.ndarray, seed: int) -> Probe:
    """A logistic regression of `labels` (n,) on `features` (n, p), cross-validated over 5 folds; every class weighs the
    same.

    Features are standardised, so that small ones are told apart as well as large ones; C = 1. Raises `ValueError` for
    fewer than two classes, or one with fewer examples than folds.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2 or counts.min() < FOLDS:
        raise ValueError(f"Expected two classes or more of {FOLDS} examples or more, got {counts.tolist()}.")
    model = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=2000))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed % 2**32)
    predictions = cross_val_predict(model, np.asarray(features, np.float64), labels, cv=folds)
    recalls = [(predictions[labels == c] == c).mean() for c in classes]
    return Probe(float(np.mean(recalls)), 1.0 / len(classes))


def a_distance(x: np.ndarray, y: np.ndarray, seed: int) -> float:
    """Proxy A-distance 2(1 − 2ε) in [0, 2] (Ben-David et al. 2007): ε is the error of a probe that tells rows of `x`
    from rows of `y`; 0 where it does no better than guessing.
    """
    labels = np.repeat([0, 1], [len(x), len(y)])
    found = probe(np.concatenate([x, y]), labels, seed)
    return max(0.0, 2.0 * (2.0 * found.accuracy - 1.0))
