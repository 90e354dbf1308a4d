"""ROUGE-1, ROUGE-2 and ROUGE-L: how much of a text another one repeats, word by word (Lin 2004).

Words are what stands between spaces, in lower case, without punctuation; there is no stemming and no stop list. Every
score is the harmonic mean of precision and recall, in [0, 1], and 0 where one of the two texts has no words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rouge:
    """The three scores, each in [0, 1]."""

    one: float
    two: float
    longest: float


def rouge(truth: str, found: str) -> Rouge:
    """How much of `truth` is in `found`.

    >>> rouge("the patient has diabetes", "The patient has asthma")
    Rouge(one=0.75, two=0.6666666666666666, longest=0.75)
    """
    left, right = _words(truth), _words(found)
    return Rouge(_overlap(left, right, 1), _overlap(left, right, 2), _longest(left, right))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _overlap(truth: Sequence[str], found: Sequence[str], n: int) -> float:
    left, right = _grams(truth, n), _grams(found, n)
    return _mean((left & right).total(), left.total(), right.total())


def _grams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _longest(truth: Sequence[str], found: Sequence[str]) -> float:
    """From the longest common subsequence, by the usual table kept one line at a time."""
    line = [0] * (len(found) + 1)
    for word in truth:
        before = line
        line = [0]
        for j, other in enumerate(found):
            line.append(before[j] + 1 if word == other else max(before[j + 1], line[j]))
    return _mean(line[-1], len(truth), len(found))


def _mean(common: int, left: int, right: int) -> float:
    return 2 * common / (left + right) if common else 0.0
