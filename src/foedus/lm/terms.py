"""What a silo minimises: the cross-entropy of its tokens, plus terms of what the model shows on the way.

A term is one number a row. So a goal is a sum over rows, its gradient a sum over units, and each unit's share of it can
be clipped. Where a term seems to need the whole batch, as a distance of means does, its gradient at a fixed
coefficient does not: see `Pull`.

Read `Goal`, then `Seen`, then any of the terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..errors import ModelError
from ..seeds import generator

if TYPE_CHECKING:
    from ..kernels import FourierMap

Batch = Mapping[str, Tensor]
UNSEEN = ("labels", "topics", "rows", "draws")
"""What a batch carries that the model is never given."""


@dataclass(frozen=True, eq=False)
class Pass:
    """What one forward pass leaves behind.

    `hidden`: (b, t, p) after each layer, the last after the final norm. `targets`: (p,). `nll` and `entropy`: of each
    of them, in nats. `chances`: of the vocabulary's first K tokens in the place of each, (≤ 128, K) at a time.
    """

    hidden: tuple[Tensor, ...]
    targets: Tensor
    nll: Callable[[], Tensor]
    entropy: Callable[[], Tensor]
    chances: Callable[[int], Iterator[Tensor]]


@dataclass(frozen=True, eq=False)
class Seen:
    """A batch of b rows as terms and surveys see it. All is computed when first asked for, and is differentiable.

    `owners`: the row of each target, (p,) ascending. `run`: a pass of the model over some input ids. `apply`: a head by
    its name, on features. Make it with `Bench.see`.
    """

    batch: Batch
    owners: Tensor
    run: Callable[[Tensor], Pass]
    apply: Callable[[str, Tensor], Tensor]

    @property
    def mask(self) -> Tensor:
        """(b, t): 1 at tokens, 0 at padding."""
        return self.batch["attention_mask"]

    def states(self, layer: int = -1) -> Tensor:
        """(b, t, p) float32: after layer 0, 1, …; −1 is the last, after the final norm."""
        return self._pass.hidden[layer].float()

    def features(self, layer: int = -1) -> Tensor:
        """(b, p) float32: the mean of the states over the row's tokens, scaled to length one; 0 without tokens."""
        weights = self.mask[..., None].float()
        means = (self.states(layer) * weights).sum(1) / weights.sum(1).clamp(min=1.0)
        return F.normalize(means, dim=1)

    def nll(self) -> Tensor:
        """(b,): the mean cross-entropy of each row's targets, nats; 0 without targets."""
        return self._per_row(self.losses)

    def entropy(self) -> Tensor:
        """(b,): the mean entropy of what is predicted at each row's targets, nats; 0 without targets."""
        return self._per_row(self._pass.entropy())

    def counts(self, tokens: int) -> Tensor:
        """(b, K): how often each of the vocabulary's first K tokens is a target of each row."""
        targets, rows = self._pass.targets, len(self.batch["labels"])
        places = (self.owners * tokens + targets)[targets < tokens]
        return torch.bincount(places, minlength=rows * tokens).view(rows, tokens).float()

    def expected(self, tokens: int) -> Tensor:
        """(b, K): how often each of them would be one, as the model predicts them."""
        out, at = torch.zeros(len(self.batch["labels"]), tokens, device=self.owners.device), 0
        for found in self._pass.chances(tokens):
            out.index_add_(0, self.owners[at : at + len(found)], found)
            at += len(found)
        return out

    def head(self, name: str, x: Tensor) -> Tensor:
        """(b, C): what a head says about (b, p) features, with the parameters of this pass."""
        return self.apply(name, x)

    def again(self, input_ids: Tensor) -> Tensor:
        """(b,): `nll` when the model reads other input ids, (b, t), and must say the same."""
        return self._per_row(self.run(input_ids).nll())

    @cached_property
    def losses(self) -> Tensor:
        """(p,): the cross-entropy of each target."""
        return self._pass.nll()

    @cached_property
    def _pass(self) -> Pass:
        return self.run(self.batch["input_ids"])

    def _per_row(self, x: Tensor) -> Tensor:
        counts = torch.bincount(self.owners, minlength=len(self.batch["labels"])).clamp(min=1)
        return self._sums(x) / counts

    def _sums(self, x: Tensor) -> Tensor:
        """Over the targets of each row."""
        return x.new_zeros(len(self.batch["labels"]), *x.shape[1:]).index_add(0, self.owners, x)


class Term(Protocol):
    """One number a row, (b,), in nats, which may not depend on the other rows of the batch. Where units are clipped,
    `Bench.prove` tries that. A term may have `shallow` = True: it needs only the states of the last layer.
    """

    @property
    def weight(self) -> float: ...
    def __call__(self, seen: Seen) -> Tensor: ...


@dataclass(frozen=True)
class Goal:
    """A unit's loss: `tokens` · mean cross-entropy of its targets + Σ weight · mean of the term over its rows.

    A term of weight 0 is not computed, and neither is the cross-entropy with `tokens` = 0.
    """

    tokens: float = 1.0
    terms: tuple[Term, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "terms", tuple(self.terms))
        for name, x in [("tokens", self.tokens), *((name_of(term), term.weight) for term in self.terms)]:
            if not 0 <= x < math.inf:
                raise ValueError(f"Expected a finite weight ≥ 0 of {name}; got {x}.")

    @property
    def active(self) -> tuple[Term, ...]:
        """The terms that count."""
        return tuple(term for term in self.terms if term.weight)

    @property
    def plain(self) -> bool:
        """Whether it is the mean cross-entropy and nothing else."""
        return self.tokens == 1.0 and not self.active

    @property
    def shallow(self) -> bool:
        """Whether its terms need only the states of the last layer."""
        return all(getattr(term, "shallow", False) for term in self.active)

    def plus(self, *terms: Term) -> Goal:
        """With more terms."""
        return replace(self, terms=(*self.terms, *terms))

    def value(self, seen: Seen, units: Tensor) -> Tensor:
        """The sum of the units' losses. `units`: (b,) the unit of each row, −1 for a row of nobody, which adds 0."""
        total = torch.zeros((), device=units.device)
        if self.tokens:
            total = total + self.tokens * (seen.losses @ shares(units[seen.owners]))
        own = shares(units)
        for term in self.active:
            x = term(seen)
            if x.shape != own.shape:
                raise ValueError(f"Expected {len(own)} numbers of {name_of(term)}, one a row; got {tuple(x.shape)}.")
            total = total + term.weight * (torch.where(own > 0, x, 0.0) @ own)
        return total


PLAIN = Goal()


def shares(units: Tensor) -> Tensor:
    """(n,) units to (n,): one over how often each occurs, 0 for nobody's."""
    counts = torch.bincount(units + 1, minlength=1).float()
    each = counts.reciprocal()[units + 1]
    return each.masked_fill(units < 0, 0.0)


# ---- terms ----


@dataclass(frozen=True)
class Topic:
    """Cross-entropy of a head's prediction of `batch["topics"]`, (b,), from the features; an unknown topic, −1, adds 0.

    `smoothing` in [0, 1): of the label, over all classes (Szegedy et al. 2016, section 7). `threshold` in (0, 1]: an
    unknown topic is what the head itself predicts, where it gives that at least so much (pseudo-labels, Lee 2013; with
    a threshold, Sohn et al. 2020, eq. 4).
    """

    weight: float
    smoothing: float = 0.0
    threshold: float | None = None
    head: str = "topics"
    shallow: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"Expected smoothing={self.smoothing} in [0, 1).")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(f"Expected threshold={self.threshold} in (0, 1].")

    def __call__(self, seen: Seen) -> Tensor:
        scores = seen.head(self.head, seen.features())
        labels = _carried(seen, "topics", self)
        if self.threshold is not None:
            sure, best = scores.detach().softmax(1).max(1)
            labels = torch.where((labels < 0) & (sure >= self.threshold), best, labels)
        losses = F.cross_entropy(scores, labels.clamp(min=0), reduction="none", label_smoothing=self.smoothing)
        return torch.where(labels < 0, 0.0, losses)


@dataclass(frozen=True, eq=False)
class Pull:
    """2⟨φ(x), c⟩ for a fixed `coefficient` c: moves the mean of φ along −c, each row by itself.

    ‖μ − m‖² has the gradient 2 Jᵀ(μ − m). With c = μ̃ − m, measured before and held fixed, this term's sum over rows has
    that gradient wherever μ = μ̃, and is a sum over rows. `maps` and φ: see `embedding`. `coefficient`: (D · layers,).
    """

    weight: float
    maps: Mapping[int, FourierMap]
    coefficient: np.ndarray

    @property
    def shallow(self) -> bool:
        return set(self.maps) == {-1}

    def __call__(self, seen: Seen) -> Tensor:
        x = embedding(seen, self.maps)
        return 2 * x @ _tensor(self.coefficient, x)


@dataclass(frozen=True, eq=False)
class MeanPull:
    """‖mean of φ over the batch − m‖². Its rows depend on one another, so where units are clipped it is refused.

    `target`: m, (D · layers,).
    """

    weight: float
    maps: Mapping[int, FourierMap]
    target: np.ndarray

    @property
    def shallow(self) -> bool:
        return set(self.maps) == {-1}

    def __call__(self, seen: Seen) -> Tensor:
        x = embedding(seen, self.maps)
        return (x.mean(0) - _tensor(self.target, x)).square().sum().expand(len(x))


@dataclass(frozen=True)
class Reversal:
    """Cross-entropy of a head that tells domains apart, all rows being of domain `label`; on the way back to the
    features the gradient is multiplied by −`strength`, so that they come to say nothing of it (Ganin & Lempitsky 2015,
    section 3.2). The head itself learns at full `weight`.
    """

    weight: float
    label: int
    head: str = "domains"
    shallow: ClassVar[bool] = True
    strength: float = 1.0

    def __call__(self, seen: Seen) -> Tensor:
        scores = seen.head(self.head, _Reversed.apply(seen.features(), self.strength))
        labels = torch.full((len(scores),), self.label, device=scores.device)
        return F.cross_entropy(scores, labels, reduction="none")


@dataclass(frozen=True)
class Denoise:
    """Cross-entropy of the same targets when each input id is, with probability `rate`, another one of `size`.

    Padding stays. Each row's draws come from its number in `batch["draws"]`, (b,), and from nothing else. What is no
    id, such as a place among kept states (`kept.py`), becomes one of 1 … size − 1, wherever it was.
    """

    weight: float
    rate: float
    size: int

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ValueError(f"Expected rate={self.rate} in (0, 1].")
        if self.size < 2:
            raise ValueError(f"Expected size={self.size} ≥ 2.")

    def __call__(self, seen: Seen) -> Tensor:
        ids = seen.batch["input_ids"]
        return seen.again(torch.where(seen.mask.bool(), self._others(ids, _carried(seen, "draws", self)), ids))

    def _others(self, ids: Tensor, draws: Tensor) -> Tensor:
        changed = [self._noisy(row, int(draw)) for row, draw in zip(ids.cpu().numpy(), draws.tolist(), strict=True)]
        return torch.from_numpy(np.stack(changed)).to(ids)

    def _noisy(self, row: np.ndarray, draw: int) -> np.ndarray:
        random = generator(draw, "denoise")
        hit, steps = random.random(len(row)) < self.rate, random.integers(1, self.size, len(row))
        return np.where(hit, np.where(row < self.size, (row + steps) % self.size, steps), row)


def embedding(seen: Seen, maps: Mapping[int, FourierMap]) -> Tensor:
    """(b, D · layers) of norm 1: φ of the features of each layer of `maps`, side by side, over √layers."""
    parts = [fourier(seen.features(layer), each) for layer, each in maps.items()]
    return torch.cat(parts, 1) / math.sqrt(len(parts))


def fourier(x: Tensor, map: FourierMap) -> Tensor:
    """(b, p) to (b, D) of norm 1: [cos z; sin z] / √(D/2), z = x · frequencies (Rahimi & Recht 2007, algorithm 1)."""
    x = x if map.projection is None else x @ _tensor(map.projection, x)
    z = x @ _tensor(map.frequencies, x)
    return torch.cat([z.cos(), z.sin()], 1) / math.sqrt(z.shape[1])


def kind(term: Term) -> Any:
    """What `Bench.prove` knows a term by: all about it but the values of its numbers, which change from round to
    round."""
    return _kind(term)


def _kind(x: Any) -> Any:
    if isinstance(x, np.ndarray | Tensor):
        return tuple(x.shape)
    if isinstance(x, Mapping):
        return tuple((key, _kind(value)) for key, value in x.items())
    if is_dataclass(x):
        return type(x), *(_kind(getattr(x, field.name)) for field in fields(x))
    return type(x) if isinstance(x, float) else x


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * g, None


def _tensor(x: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(np.asarray(x, np.float32)).to(like.device)


def _carried(seen: Seen, name: str, term: Term) -> Tensor:
    if name not in seen.batch:
        do = "Make batches with an objective that has topics, and through `silo/train.py`."
        raise ModelError(f'"{name}" in the batch, for {name_of(term)}', ", ".join(seen.batch), do)
    return seen.batch[name]


def name_of(term: Any) -> str:
    """What messages call a term."""
    return getattr(term, "__name__", type(term).__name__)
