"""How differently silos speak: between the features of their texts, and between their words.

Features are told apart by the unbiased MMD² of `kernels.py`, with bandwidths that are fixed for all methods. Features
that have all become alike are close too, so what they still tell stands beside it: variance, effective rank, and the
MMD² at the features' own scale.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from ..attention import effective_rank
from ..errors import DataError
from ..kernels import bandwidths, p_value, relabelled

MOST_WORDS, SMOOTHING = 20_000, 0.01
_WORD = re.compile(r"\w+")


def discrepancy(
    features: Mapping[str, np.ndarray],
    targets: Collection[str],
    bandwidths: Sequence[float],
    permutations: int,
    random: np.random.Generator,
) -> dict[str, Any]:
    """Unbiased MMD² between two silos or more, of their features (n_i ≥ 2, p) each.

    "pairs": over all pairs of silos; "target": over those of a silo in `targets` and one that is not, None without any.
    Each has "mmd2", the mean, which may be negative; "p" of "all silos speak alike"; and "null": mean, sd and 95 %
    quantile of "mmd2" when texts are dealt to the silos at random, over `permutations` ≥ 1 deals. "by_pair": of each.
    """
    names = list(features)
    observed, null = relabelled(list(features.values()), bandwidths, permutations, random)
    pairs = list(combinations(range(len(names)), 2))
    across = [(i, j) for i, j in pairs if (names[i] in targets) != (names[j] in targets)]
    return {
        "pairs": _mean_of(pairs, observed, null),
        "target": _mean_of(across, observed, null) if across else None,
        "by_pair": {f"{names[i]} | {names[j]}": float(observed[i, j]) for i, j in pairs},
    }


def _mean_of(pairs: Sequence[tuple[int, int]], observed: np.ndarray, null: np.ndarray) -> dict[str, Any]:
    i, j = np.array(pairs).T
    found, dealt = float(observed[i, j].mean()), null[:, i, j].mean(1)
    spread = {"mean": float(dealt.mean()), "sd": float(dealt.std()), "q95": float(np.quantile(dealt, 0.95))}
    return {"mmd2": found, "p": p_value(found, dealt), "null": spread}


def spread(features: Mapping[str, np.ndarray]) -> dict[str, float | None]:
    """What would show that features collapsed, over all silos together.

    "variance": the mean squared distance to the mean, in [0, 1] for rows of norm one. "effective_rank": in dimensions.
    "own_scale": mean MMD² of two silos with bandwidths of these very features, which shrinking does not lower; None
    when most are the same.
    """
    rows = np.concatenate([np.asarray(x, np.float64) for x in features.values()])
    covariance = np.cov(rows.T, bias=True)
    return {
        "variance": float(np.trace(covariance)),
        "effective_rank": effective_rank(covariance),
        "own_scale": _own_scale(list(features.values()), rows),
    }


def _own_scale(groups: Sequence[np.ndarray], rows: np.ndarray, most: int = 2000) -> float | None:
    """Bandwidths from `most` evenly spaced rows."""
    try:
        own = bandwidths(rows[:: -(-len(rows) // most)])
    except DataError:
        return None
    observed, _ = relabelled(groups, own, 0, np.random.default_rng(0))
    return float(observed[np.triu_indices(len(groups), 1)].mean())


# Words


def vocabulary(texts: Iterable[str], most: int = MOST_WORDS) -> tuple[str, ...]:
    """The `most` most frequent words; equally frequent ones in alphabetical order."""
    counts = Counter(word for text in texts for word in _words(text))
    return tuple(sorted(counts, key=lambda word: (-counts[word], word))[:most])


def unigrams(texts: Iterable[str], words: Sequence[str]) -> np.ndarray:
    """The distribution of these words, and, last, of all others, in texts: (len(words) + 1,). 0.01 more a count."""
    place = {word: i for i, word in enumerate(words)}
    found = [place.get(word, len(words)) for text in texts for word in _words(text)]
    counts = np.bincount(np.array(found, np.int64), minlength=len(words) + 1) + SMOOTHING
    return counts / counts.sum()


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """Jensen–Shannon divergence of two distributions without zeros, in bits: in [0, 1].

    It is convex, so from P to (1 − k)·P + k·Q it never falls as k grows.
    """
    middle = (p + q) / 2
    return float(max(0.0, (p @ np.log2(p / middle) + q @ np.log2(q / middle)) / 2))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
