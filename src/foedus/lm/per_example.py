"""The gradient of each unit, clipped, from one pass through a model's own code.

A unit is whoever is protected: an example, or an author with several rows. Parameters go in as `Shared` tensors, values
that every row sees alike; each function that takes one has a rule here, which notes on the way back what every row
did to it. What has no rule is refused by name, and so is an input in which the rows cannot be found.

What is noted: for a matrix its factors, in the letters of the code `left` and `right`, whose product over a unit's
tokens is the unit's gradient (a lookup is a product whose one factor is a one-hot, kept as ids); for all else the
gradient itself. From m tokens an o × i matrix has a gradient of rank m: where o · i ≤ m (o + i), as in LoRA, the
gradients take less memory than the factors and are formed at once, at the cost of the ordinary weight gradient. Else
the factors stay, norms come from their inner products ("ghost norms", Li et al. 2022, section 4), and one product
with clipped factors gives the sum ("book-keeping", Bu et al. 2023). Either way there is one backward pass.

Inner products are float64: in float32 a unit whose tokens cancel would seem to have a norm of zero, and pass unclipped.
The sum itself is float32, so the norm includes what its rounding may add (`DUST`).

Read `collect` first, then the rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional as F

from ..errors import GuaranteeError, ModelError
from .clipping import ClippedSums, Clipping

Rule = Callable[..., Any]
NOBODY = -1
"""The unit of a row that belongs to nobody."""

DUST = 1e-5
"""Rounding of a sum of products in float32, as a share of the sum of their norms; about 15 times that of 128 tokens."""


def collect(
    model: nn.Module,
    params: Mapping[str, Tensor],
    units: Tensor,
    loss: Callable[[], Tensor] | None,
    *,
    choices: Choices | None = None,
    frozen: Mapping[str, Tensor] | None = None,
) -> Uses:
    """What each unit's rows did to each of `params`, after one forward and one backward pass.

    `params`: the trainable parameters by their names in `model`. `units`: (rows,) int64, the unit of each row, 0 …
    n − 1 ascending with a unit's rows adjacent, or −1. `loss`: calls `model` and returns the sum of the units' losses;
    None where there is nothing to do. Gradient checkpointing may call the model again on the way back, so the
    parameters stay in place until then. `choices`: from an earlier pass with other sizes; None: what is ambiguous is
    decided by these. `frozen`: what stands in for other parameters.
    """
    uses = Uses({name: x.shape for name, x in params.items()}, Owners(units), choices or Choices())
    if loss is None:
        return uses
    shared = {f"model.{name}": share(x, name, uses) for name, x in params.items()}
    others = {f"model.{name}": x for name, x in (frozen or {}).items()}

    def work() -> None:
        total = loss()
        if total.requires_grad:
            total.backward()

    functional_call(_Inside(model), shared | others, (work,))
    return uses


def compare(
    alone: Sequence[Mapping[str, Tensor]],
    together: Callable[[Clipping], ClippedSums],
    tolerance: float,
    *,
    term: str = "",
) -> bool:
    """Raise unless units that are clipped `together` have the gradients that they have `alone`.

    Every parameter is a part of its own, with a norm that clips every unit of whose gradient it is more than rounding,
    so each unit's norm must be right in each. `tolerance`: the share of a gradient's norm by which it may be off.
    `term`: what the gradients are of, "" for the cross-entropy; a term need not move every parameter. Returns whether
    anything moved: if not, nothing is known yet.
    """
    norms = {name: torch.stack([one[name].norm() for one in alone]) for name in alone[0]}
    largest = max((float(x.max()) for x in norms.values()), default=0.0)
    for name, x in norms.items():
        if not (0 < float(x.max()) < math.inf or (term and float(x.max()) == 0)):
            raise _refuse(name, "a finite gradient other than zero", f"{float(x.max())}")
    if not largest:
        return False
    limits = {name: float(x.min()) / 2 + 0.01 * largest for name, x in norms.items()}
    sums = together(Clipping(tuple(limits.values()), {name: i for i, name in enumerate(limits)})).gradients
    for name, limit in limits.items():
        factors = (limit / norms[name]).clamp(max=1.0)
        wanted = sum(factor * one[name] for factor, one in zip(factors, alone, strict=True))
        off = float((sums[name][0] - wanted).norm()) / (limit * len(alone))
        if not off <= tolerance:
            of = f" of {term}" if term else ""
            came = f"that{of} in {name} off by {off:.2g} of it when units go through the model together"
            do = "Freeze it, or use a model and terms in which examples do not influence one another."
            raise GuaranteeError("each unit's gradient to be its own", came, do)
    return True


class _Inside(nn.Module):
    """A model with its parameters replaced for as long as some work takes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


# ---- who owns which rows ----


@dataclass(frozen=True, eq=False)
class Owners:
    """`units`: (rows,) int64, as in `collect`. Raises ValueError where they are in no order."""

    units: Tensor

    def __post_init__(self) -> None:
        own = self.units[self.units != NOBODY]
        steps = own.diff(prepend=own.new_full((1,), -1))
        if self.units.dim() != 1 or bool(((steps < 0) | (steps > 1)).any()) or bool((own[:1] != 0).any()):
            raise ValueError(f"Expected units 0, 1, … ascending without a gap, or −1; got {self.units.tolist()}.")

    @cached_property
    def count(self) -> int:
        """n, the number of units."""
        return int(self.units.max()) + 1 if len(self.units) else 0

    @cached_property
    def sizes(self) -> list[int]:
        """The number of rows of each unit, ≥ 1."""
        return torch.bincount(self.units[self.units != NOBODY], minlength=self.count).tolist()

    def own(self, x: Tensor) -> Tensor:
        """Without the rows of nobody."""
        return x if sum(self.sizes) == len(self.units) else x[self.units != NOBODY]

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """(rows, m, …) as one (tokens, …) for each unit; all alike in one (n, tokens, …) where they are as many."""
        x = self.own(x)
        if len(set(self.sizes)) == 1:
            return x.reshape(self.count, -1, *x.shape[2:])
        return [part.flatten(0, 1) for part in x.split(self.sizes)]

    def sum(self, x: Tensor) -> Tensor:
        """(rows, …) to (n, …): the sum over each unit's rows."""
        x = self.own(x)
        if len(x) == self.count:
            return x
        return x.new_zeros(self.count, *x.shape[1:]).index_add_(0, self.units[self.units != NOBODY], x)

    def spread(self, factors: Tensor) -> Tensor:
        """(n,) to (rows,): each row's factor; 0 for a row of nobody."""
        none = factors.new_zeros(1)
        return torch.cat([factors, none])[self.units]


# ---- what rows do to a parameter ----


@dataclass(frozen=True, eq=False)
class Factors:
    """One use of an o × i matrix: Σ over a row's m tokens of left ⊗ right.

    (rows, m, o) and (rows, m, i); or one of them (rows, m) int64: the places of ones in a one-hot.
    """

    left: Tensor
    right: Tensor

    @property
    def turned(self) -> Factors:
        """The same of the transposed matrix."""
        return Factors(self.right, self.left)


class Uses:
    """What each of n units did to the parameters: `squares` and `sums` for all, `each` for one of them."""

    def __init__(self, shapes: Mapping[str, torch.Size], owners: Owners, choices: Choices) -> None:
        self.shapes, self.owners, self.choices = shapes, owners, choices
        self.rows = len(owners.units)
        self._whole: dict[str, Tensor] = {}  # (n, *shape): gradients
        self._kept: dict[str, list[Factors]] = {name: [] for name in shapes}

    @property
    def touched(self) -> set[str]:
        """The parameters that something was noted of."""
        return {name for name in self.shapes if name in self._whole or self._kept[name]}

    def note_factors(self, source: Source, factors: Factors) -> None:
        """`factors` of a value that `source` tells how to take back to the parameter."""
        steps = list(source.steps)
        while steps and steps[-1].turns is not None:
            factors = factors.turned if steps.pop().turns else factors
        if steps or self._small(source.name, factors):
            whole = _products(factors, self.owners, _matrix_shape(steps, self.shapes[source.name]))
            self._add(source.name, _back(steps, whole))
        else:
            self._kept[source.name].append(factors)

    def note_rows(self, source: Source, gradients: Tensor) -> None:
        """(rows, *shape of the value): what each row adds."""
        self._add(source.name, _back(source.steps, self.owners.sum(gradients)))

    def each(self, name: str) -> Tensor:
        """(n, *shape): the gradient of every unit, in memory all at once."""
        shape = self.shapes[name]
        total = self._whole.get(name)
        for factors in self._kept[name]:
            part = _products(factors, self.owners, shape)
            total = part if total is None else total + part
        if total is None:
            return self.owners.units.new_zeros(self.owners.count, *shape, dtype=torch.float32)
        return total.float()

    def clipped(self, clipping: Clipping) -> tuple[dict[str, Tensor], Tensor]:
        """Sums over the units of their clipped gradients, by name, float32; and (n, parts) norms before."""
        squares = self.squares(clipping)
        return self.sums(clipping, clipping.factors(squares)), squares.sqrt().float()

    def squares(self, clipping: Clipping) -> Tensor:
        """(n, parts): squared norms of what each unit did to each part, float64; NaN or ∞ where it is not finite."""
        self._settle()
        total = self.owners.units.new_zeros(self.owners.count, len(clipping.norms), dtype=torch.float64)
        for name in self.shapes:
            total[:, clipping.part(name)] += self._square(name)
        return total

    def sums(self, clipping: Clipping, factors: Tensor) -> dict[str, Tensor]:
        """Σ over the units of factor · gradient, by name. `factors`: (n, parts); a unit with 0 adds exactly zero."""
        self._settle()
        return {name: self._sum(name, factors[:, clipping.part(name)]) for name in self.shapes}

    def _small(self, name: str, factors: Factors) -> bool:
        """Whether gradients take less memory than factors. Lookups stay: a unit meets few words of a vocabulary."""
        if name in self._whole:
            return True
        if factors.left.dim() == 2 or factors.right.dim() == 2:
            return False
        o, i = self.shapes[name]
        tokens = factors.left.shape[1] * sum(self.owners.sizes) // max(1, self.owners.count)
        return o * i <= tokens * (o + i)

    def _add(self, name: str, whole: Tensor) -> None:
        self._whole[name] = (
            self._whole[name] + whole if name in self._whole else whole
        )  # may be autograd's: not in place

    def _settle(self) -> None:
        """A parameter noted both ways is noted whole."""
        for name in self._whole.keys() & {name for name, kept in self._kept.items() if kept}:
            self._whole[name], self._kept[name] = self.each(name), []

    def _square(self, name: str) -> Tensor | float:
        if name in self._whole:
            return torch.linalg.vector_norm(self._whole[name].flatten(1), dim=1).double().square()
        kept = self._kept[name]
        square = sum(
            (1 if a is b else 2) * _inner(a, b, self.owners) for i, a in enumerate(kept) for b in kept[i:]
        )  # ‖Σ a‖² = Σ ‖a‖² + 2 Σ ⟨a, b⟩
        dust = DUST * sum(_length(factors, self.owners) for factors in kept)
        return square + dust**2

    def _sum(self, name: str, factors: Tensor) -> Tensor:
        sound = factors > 0  # 0 · NaN is NaN: what is left out is left out
        if name in self._whole:
            whole = self._whole[name].float()
            whole, factors = (whole, factors) if bool(sound.all()) else (whole[sound], factors[sound])
            return torch.mv(whole.flatten(1).t(), factors).view(self.shapes[name])
        total = self.owners.units.new_zeros(self.shapes[name], dtype=torch.float32)
        weights = self.owners.spread(factors)
        for kept in self._kept[name]:
            _add_weighted(total, kept, weights)
        return total


def _matrix_shape(steps: Sequence[Step], shape: torch.Size) -> torch.Size:
    return steps[-1].shape if steps else shape


def _back(steps: Sequence[Step], whole: Tensor) -> Tensor:
    """(n, *shape of a value) to (n, *shape of the parameter)."""
    for step in reversed(steps):
        whole = step.pull(whole)
    return whole


def _products(factors: Factors, owners: Owners, shape: torch.Size) -> Tensor:
    """(n, o, i): the product of each unit's factors."""
    if factors.left.dim() == 2:
        return _looked_up(factors, owners, shape)
    if factors.right.dim() == 2:
        return _looked_up(factors.turned, owners, torch.Size(reversed(shape))).transpose(1, 2)
    lefts, rights = owners.split(factors.left), owners.split(factors.right)
    if isinstance(lefts, Tensor) and isinstance(rights, Tensor):
        return torch.bmm(lefts.transpose(1, 2), rights)
    out = factors.left.new_empty(owners.count, *shape)
    for left, right, place in zip(lefts, rights, out, strict=True):
        torch.mm(left.t(), right, out=place)
    return out


def _looked_up(factors: Factors, owners: Owners, shape: torch.Size) -> Tensor:
    """The same where `left` is ids."""
    size, width = shape
    units = owners.own(owners.units)
    ids, rows = owners.own(factors.left) + units[:, None] * size, owners.own(factors.right)
    out = rows.new_zeros(owners.count * size, width)
    return out.index_add_(0, ids.flatten(), rows.flatten(0, 1)).view(owners.count, size, width)


def _inner(a: Factors, b: Factors, owners: Owners) -> Tensor:
    """(n,) inner products of two gradients, by unit: Σ over pairs of tokens ⟨left, left'⟩ ⟨right, right'⟩, float64."""
    parts = [owners.split(x) for x in (a.left, b.left, a.right, b.right)]
    found = [(_pairs(la, lb) * _pairs(ra, rb)).sum() for la, lb, ra, rb in zip(*parts, strict=True)]
    return torch.stack(found).clamp(min=0.0) if a is b else torch.stack(found)


def _length(factors: Factors, owners: Owners) -> Tensor:
    """(n,) Σ over a unit's tokens of ‖left‖ ‖right‖, float64."""
    left, right = (1.0 if x.dim() == 2 else x.norm(dim=-1).double() for x in (factors.left, factors.right))
    return owners.sum((left * right).sum(1))


def _pairs(x: Tensor, y: Tensor) -> Tensor:
    """(m, m') inner products of (m, d) with (m', d); ids stand for one-hots."""
    if x.dim() == y.dim() == 1:
        return (x[:, None] == y).double()
    if x.dim() == 1:
        return y[:, x].t().double()
    if y.dim() == 1:
        return x[:, y].double()
    x, y = x.double(), y.double()
    return x @ y.t()


def _add_weighted(total: Tensor, factors: Factors, weights: Tensor) -> None:
    """total += Σ over the rows of weight · left ⊗ right, without the rows of weight zero."""
    left, right = factors.left, factors.right
    if bool((weights == 0).any()):
        left, right, weights = (x[weights > 0] for x in (left, right, weights))
    if right.dim() == 2:
        total, left, right = total.t(), right, left
    if left.dim() == 2:
        total.index_add_(0, left.flatten(), (right * weights[:, None, None]).flatten(0, 1).float())
    elif left.shape[-1] < right.shape[-1]:
        total.addmm_((left * weights[:, None, None]).flatten(0, 1).t().float(), right.flatten(0, 1).float())
    else:
        total.addmm_(left.flatten(0, 1).t().float(), (right * weights[:, None, None]).flatten(0, 1).float())


# ---- parameters that every row shares ----


@dataclass(frozen=True, eq=False)
class Step:
    """One linear function on the way from a parameter to a value. `shape`: of its result. `turns`: whether it
    transposes a matrix, and None for any function that would not leave a product of factors one.
    """

    function: Callable[[Tensor], Tensor]
    at: Tensor
    shape: torch.Size
    turns: bool | None

    def pull(self, gradients: Tensor) -> Tensor:
        """(n, *shape of its result) to (n, *shape of its argument)."""
        _, back = torch.func.vjp(self.function, self.at.detach())
        return torch.func.vmap(lambda g: back(g)[0])(gradients)


@dataclass(frozen=True, eq=False)
class Source:
    """Where a value comes from: a parameter, through some steps; and where its uses are noted."""

    name: str
    uses: Uses
    steps: tuple[Step, ...] = ()


@dataclass
class Choices:
    """How uses that sizes leave open were taken: as one for each row, or as the same for all.

    A table of three positions in a batch of three rows looks like one for each. So a pass in which all sizes differ
    learns, and later passes (`learned`) decide as it did.
    """

    known: dict[tuple[str, str, int], bool] = field(default_factory=dict)
    learned: bool = False

    def by_row(self, name: str, function: str, dims: int, natural: bool) -> bool:
        """Whether the input of `dims` dimensions has the rows of the batch; `natural`: whether its sizes allow it."""
        key = name, function, dims
        if not self.learned:
            self.known.setdefault(key, natural)
        if key not in self.known and natural:
            raise _refuse(name, "a use that the probe has seen", f"a new use in {function}")
        if self.known.get(key) and not natural:
            raise _refuse(name, "an input with the rows of the batch", f"another in {function}")
        if not self.learned and self.known[key] != natural:
            raise _refuse(name, f"rows in {function} always or never", "both")
        return self.known.get(key, False)


class Shared(Tensor):
    """A value that every row of a batch sees alike, made from one parameter. Make it with `share`."""

    source: Source

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = _RULES.get(func)
        if rule is None:
            raise _refuse(_names(args, kwargs or {}), "functions that have a rule", _called(func))
        return rule(*args, **(kwargs or {}))


def share(x: Tensor, name: str, uses: Uses) -> Shared:
    """A parameter's value, under its name."""
    return _shared(x.detach().requires_grad_(), Source(name, uses))


def _shared(x: Tensor, source: Source) -> Shared:
    shared = x.as_subclass(Shared)
    shared.source = source
    return shared


def _raw(x: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(Tensor) if isinstance(x, Shared) else x


def _derive(w: Shared, function: Callable[[Tensor], Tensor], turns: bool | None = None) -> Shared:
    """`function` of a shared value is shared; it is linear."""
    raw, source = _raw(w), w.source
    value = function(raw)
    return _shared(value, Source(source.name, source.uses, (*source.steps, Step(function, raw, value.shape, turns))))


def _refuse(name: str, expected: str, came: str) -> ModelError:
    do = "Freeze it, or train what has rules: LoRA, prompts, prefixes, biases, norms, and plain layers."
    return ModelError(f"{expected}, for gradients of single examples", f"{came} on {name}", do)


def _called(func: Any) -> str:
    """The name of a function, or of the attribute that it gets or sets."""
    name = getattr(func, "__name__", str(func))
    return getattr(func.__self__, "__name__", name) if name in ("__get__", "__set__") else name


def _names(*nested: Any) -> str:
    """The parameters among some arguments."""
    found: list[str] = []
    for x in nested:
        if isinstance(x, Shared):
            found.append(x.source.name)
        elif isinstance(x, Mapping):
            found += [_names(*x.values())]
        elif isinstance(x, list | tuple):
            found += [_names(*x)]
    return " and ".join(filter(None, found))


def _blocks(x: Tensor, source: Source) -> Tensor:
    """(rows · …, d) as (rows, m, d)."""
    rows = source.uses.rows
    if x.dim() < 2 or x.shape[0] % rows:
        raise _refuse(source.name, f"an input of {rows} rows", f"one of shape {tuple(x.shape)}")
    return x.reshape(rows, -1, x.shape[-1])


# ---- rules ----


class _Linear(torch.autograd.Function):
    """x Wᵀ + b, where W or b or both are shared."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, of_weight: Source | None, of_bias: Source | None
    ) -> Tensor:
        ctx.save_for_backward(x if of_weight else None, weight)
        ctx.sources = of_weight, of_bias
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_weight, of_bias = ctx.sources
        if of_weight is not None:
            of_weight.uses.note_factors(of_weight, Factors(_blocks(g, of_weight), _blocks(x.detach(), of_weight)))
        if of_bias is not None:
            of_bias.uses.note_rows(of_bias, _blocks(g, of_bias).sum(1))
        return (g @ weight if ctx.needs_input_grad[0] else None), None, None, None, None


class _Lookup(torch.autograd.Function):
    """Rows of a shared table at ids, (rows, …)."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, table: Tensor, padding: int | None, source: Source) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.padding, ctx.source = padding, source
        return F.embedding(ids, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[None, ...]:
        (ids,) = ctx.saved_tensors
        if ctx.padding is not None:
            g = g.masked_fill((ids == ctx.padding)[..., None], 0.0)
        ctx.source.uses.note_factors(ctx.source, Factors(ids.reshape(len(ids), -1), _blocks(g, ctx.source)))
        return None, None, None, None


class _Spread(torch.autograd.Function):
    """A shared value once for each row: (*shape) to (rows, *shape)."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, source: Source) -> Tensor:
        ctx.source = source
        return value.expand(source.uses.rows, *value.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[None, None]:
        ctx.source.uses.note_rows(ctx.source, g)
        return None, None


def _spread(w: Shared) -> Tensor:
    return _Spread.apply(_raw(w), w.source)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if isinstance(x, Shared):
        raise _refuse(_names([x, weight, bias]), "an activation times a parameter", "a parameter times something")
    ours = [w for w in (weight, bias) if isinstance(w, Shared)]
    if not ours:
        return F.linear(x, weight, bias)
    for w in ours:
        _blocks(x, w.source)
    if type(weight) not in (Tensor, nn.Parameter, Shared):  # a frozen one in half width has a rule of its own
        return _add(F.linear(x, weight), bias)
    sources = (w.source if isinstance(w, Shared) else None for w in (weight, bias))
    return _Linear.apply(x, _raw(weight), _raw(bias), *sources)


def _matmul(x: Tensor, weight: Tensor) -> Tensor:
    if not isinstance(weight, Shared) or isinstance(x, Shared) or _raw(weight).dim() != 2:
        raise _refuse(_names([x, weight]), "an activation times a matrix", "another product")
    return _linear(x, _transpose(weight))


def _addmm(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(weight, Shared):
        return _linear(x, _transpose(weight), bias)
    return _add(torch.matmul(x, weight), bias)


def _embedding(
    ids: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Tensor:  # fmt: skip
    if not isinstance(weight, Shared) or max_norm is not None or scale_grad_by_freq or sparse:
        expected = "an embedding without max_norm, scale_grad_by_freq or sparse gradients"
        raise _refuse(_names([ids, weight]), expected, "another")
    source = weight.source
    padding = padding_idx if padding_idx is None or padding_idx >= 0 else padding_idx + len(_raw(weight))
    natural = ids.dim() > 1 and ids.shape[0] == source.uses.rows
    if source.uses.choices.by_row(source.name, "embedding", ids.dim(), natural):
        return _Lookup.apply(ids, _raw(weight), padding, source)
    return _derive(weight, lambda table: F.embedding(ids, table, padding_idx))


def _layer_norm(
    x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    y = F.layer_norm(x, shape, None, None, eps)
    y = y if weight is None else torch.mul(y, weight)
    return y if bias is None else torch.add(y, bias)


def _rms_norm(x: Tensor, shape: Any, weight: Tensor, eps: float | None = None) -> Tensor:
    return torch.mul(F.rms_norm(x, shape, None, eps), weight)


def _elementwise(function: Callable[..., Tensor], x: Any, y: Any, **options: Any) -> Tensor:
    """A shared value with the activations of rows; a constant leaves it shared."""
    w, other = (x, y) if isinstance(x, Shared) else (y, x)
    if isinstance(other, Shared):
        raise _refuse(_names([x, y]), "one parameter and an activation", "two parameters in one function")
    call = partial(function, **options)
    together = call if w is x else lambda a, b: call(b, a)
    source, value = w.source, _raw(w)
    if not isinstance(other, Tensor) or other.dim() < 2:
        return _with_constant(w, together, function, other)
    rows, alone = source.uses.rows, value.dim() < other.dim() or value.shape[0] == 1
    natural = other.dim() >= value.dim() and alone and other.shape[0] % rows == 0
    if not source.uses.choices.by_row(source.name, function.__name__, other.dim(), natural):
        return _with_constant(w, together, function, other)
    lead = other.dim() - value.dim()
    each = _spread(w).view(rows, *[1] * lead, *value.shape)
    return together(each, other.unflatten(0, (rows, -1))).flatten(0, 1)


def _with_constant(w: Shared, together: Rule, function: Callable[..., Tensor], other: Any) -> Shared:
    """A multiple of a shared value, or with something added. Linear up to what is added, which has no gradient."""
    if isinstance(other, Tensor) and other.requires_grad:
        raise _refuse(w.source.name, "an activation with rows", f"one without in {function.__name__}")
    return _derive(w, lambda value: together(value, other))


def _add(x: Any, y: Any, **options: Any) -> Any:
    if not isinstance(x, Shared) and not isinstance(y, Shared):
        return x if y is None else torch.add(x, y, **options)
    return _elementwise(torch.add, x, y, **options)


def _where(condition: Tensor, x: Any, y: Any) -> Tensor:
    """A shared value where a mask says so, and a constant elsewhere, or the other way round."""
    w, constant = (x, y) if isinstance(x, Shared) else (y, x)
    if isinstance(constant, Shared) or getattr(constant, "requires_grad", False):
        raise _refuse(_names([x, y]), "a parameter and a constant", "two variables in where")

    def where(value: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, *((value, y) if w is x else (x, value)))

    return _elementwise(where, w, condition)


def _over_rows(w: Shared, sizes: Sequence[int], lead: int, name: str) -> bool:
    """Whether a shared value, whose first dimension is 1 or that has none, is asked for once a row."""
    source = w.source
    free = lead > 0 or (_raw(w).dim() > 0 and _raw(w).shape[0] == 1)
    return source.uses.choices.by_row(source.name, name, len(sizes), free and sizes[0] == source.uses.rows)


def _expand(w: Shared, *sizes: Any) -> Tensor:
    sizes = tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], Sequence) else sizes
    lead = len(sizes) - _raw(w).dim()
    if not _over_rows(w, sizes, lead, "expand"):
        return _derive(w, lambda value: value.expand(*sizes))
    each = _spread(w)
    each = each.view(len(each), *[1] * (lead - 1), *_raw(w).shape) if lead else each.squeeze(1)
    return each.expand(*sizes)


def _repeat(w: Shared, *sizes: Any) -> Tensor:
    sizes = tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], Sequence) else sizes
    lead = len(sizes) - _raw(w).dim()
    if not _over_rows(w, sizes, lead, "repeat"):
        return _derive(w, lambda value: value.repeat(*sizes))
    each = _spread(w)
    each = each.view(len(each), *[1] * (lead - 1), *_raw(w).shape) if lead else each.squeeze(1)
    return each.repeat(1, *sizes[1:])


def _transpose(w: Shared, *_: Any) -> Shared:
    return _derive(w, lambda value: value.t(), turns=True if _raw(w).dim() == 2 else None)


def _cast(function: Callable[..., Tensor]) -> Rule:
    """A change of type or place leaves factors as they are."""

    def rule(w: Shared, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(w, Shared):
            return function(w, *(_raw(x) for x in args), **kwargs)
        args = tuple(_raw(x) for x in args)
        return _derive(w, lambda value: function(value, *args, **kwargs), turns=False)

    return rule


def _view(function: Callable[..., Tensor]) -> Rule:
    """A linear function of one shared value alone."""

    def rule(w: Shared, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(w, Shared) or _names(args, kwargs):
            raise _refuse(_names(w, args, kwargs), "one parameter in a view", _called(function))
        return _derive(w, lambda value: function(value, *args, **kwargs))

    return rule


def _attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Tensor:
    """Attention whose mask is shared, as T5's bias of relative positions."""
    if _names([query, key, value]):
        raise _refuse(_names([query, key, value]), "a parameter in the mask only", "attention over parameters")
    if len(query) != attn_mask.source.uses.rows or len(_raw(attn_mask)) != 1:
        raise _refuse(attn_mask.source.name, "one mask, and queries with the rows of the batch", "others in attention")
    mask = _spread(attn_mask).squeeze(1)
    return F.scaled_dot_product_attention(query, key, value, mask, *args, **kwargs)


def _fact(get: Callable[[Tensor], Any]) -> Rule:
    return lambda w, *args, **kwargs: get(_raw(w), *args, **kwargs)


def _both(function: Callable[..., Tensor]) -> Rule:
    return partial(_elementwise, function)


_FACTS = (
    "device", "layout", "dtype", "shape", "ndim", "requires_grad", "is_cuda", "is_cpu", "is_meta", "is_sparse",
    "is_quantized", "is_leaf", "grad_fn",
)  # fmt: skip
_VIEWS = (
    "view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "permute", "__getitem__", "contiguous", "clone",
    "neg", "__neg__", "narrow", "movedim",
)  # fmt: skip
_CASTS = ("to", "float", "half", "bfloat16", "double", "type_as", "type")

_RULES: dict[Any, Rule] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.mm: _matmul,
    torch.addmm: _addmm,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.scaled_dot_product_attention: _attend,
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__), _both(torch.mul)),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__), _add),
    **dict.fromkeys((torch.sub, Tensor.sub, Tensor.__sub__), _both(torch.sub)),
    torch.where: _where,
    Tensor.expand: _expand,
    Tensor.expand_as: lambda w, other: _expand(w, *other.shape),
    Tensor.repeat: _repeat,
    **dict.fromkeys((Tensor.t, torch.t, Tensor.T.__get__, Tensor.mT.__get__), _transpose),
    **{getattr(Tensor, name): _cast(getattr(Tensor, name)) for name in _CASTS},
    **{getattr(Tensor, name): _view(getattr(Tensor, name)) for name in _VIEWS},
    **{getattr(Tensor, name).__get__: _fact(getattr(Tensor, name).__get__) for name in _FACTS},
    **{getattr(Tensor, name): _fact(getattr(Tensor, name)) for name in ("size", "dim", "numel", "is_floating_point")},
    Tensor.__len__: _fact(len),
}
