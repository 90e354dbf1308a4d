"""What a survey may ask of a row: each a vector of norm at most 1, so that one unit moves a sum by no more.

The mean embedding is `terms.embedding`. Sums and noise are those of `silo/survey.py`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..discriminant import COUNTED, Discriminant
from ..marginals import Marginals
from .terms import Seen


def uncertainty(seen: Seen, words: int) -> Tensor:
    """Mean entropy of the next token over that of a uniform choice among `words`: (b, 1) in [0, 1]."""
    return (seen.entropy() / math.log(words)).clamp(0, 1)[:, None]


def mistakes(seen: Seen) -> Tensor:
    """Whether the topic head is wrong; of a row without a label, one minus its largest probability: (b, 1)."""
    chances = seen.head("topics", seen.features()).softmax(-1)
    topics = seen.batch["topics"]
    wrong = (chances.argmax(-1) != topics).float()
    return torch.where(topics >= 0, wrong, 1 - chances.amax(-1))[:, None]


def moments(seen: Seen, through: np.ndarray) -> Tensor:
    """First and second moments of u, the features through a map (p, d') at length one: (u, u uᵀ)/√2, (b, d' + d'²)."""
    features = seen.features()
    u = F.normalize(features @ torch.as_tensor(through, dtype=features.dtype, device=features.device), dim=-1)
    return torch.cat([u, (u[:, :, None] * u[:, None, :]).flatten(1)], 1) / math.sqrt(2)


def topic_rows(seen: Seen, of: Discriminant) -> Tensor:
    """The row's scaled features and a count, at its topic's place: (b, C · (p + 1)), zeros elsewhere, and everywhere
    where the topic is unknown. See `discriminant.py`.
    """
    x, topics = seen.features(), seen.batch["topics"]
    center, scale = (torch.as_tensor(y, dtype=x.dtype, device=x.device) for y in (of.center, of.scale))
    f = (x - center) @ scale
    f = f / f.norm(dim=1, keepdim=True).clamp(min=1.0) * math.sqrt(1 - COUNTED**2)
    row = torch.cat([f, f.new_full((len(f), 1), COUNTED)], 1)
    places = F.one_hot(topics.clamp(min=0), of.topics).to(row) * (topics >= 0).to(row)[:, None]
    return (places[:, :, None] * row[:, None, :]).flatten(1)


def token_rows(seen: Seen, of: Marginals) -> Tensor:
    """How often each token is a target of the row, and how often the model expects it there: (b, 2K), in rooms."""
    return torch.cat([seen.counts(of.counted), seen.expected(of.counted)], 1) / of.room


def covariance(means: np.ndarray, width: int) -> np.ndarray:
    """(d', d') of u, from the means of what `moments` gives."""
    first, second = means[:width] * math.sqrt(2), means[width:].reshape(width, width) * math.sqrt(2)
    return second - np.outer(first, first)
