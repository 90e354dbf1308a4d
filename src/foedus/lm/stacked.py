"""Parameters that stand where a module expects one tensor: K silos' versions of it, or its half-width copy.

A module is called as it is, through `torch.func.functional_call`; what changes is what its parameters do when a
function takes them. `Stacked` holds (K, *shape) and says it is (*shape): a linear layer becomes K products over a
batch in which silo k owns the k-th block of rows. `Half` holds bf16 and says it is float32: the product runs in bf16,
and its weight gets no gradient. Each function below is one rule, tested against the plain module. What has no rule
raises `NoRule`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class NoRule(NotImplementedError):
    """A function for which K versions of a parameter have no rule here. The silos must then go one by one."""


class Stacked(Tensor):
    """K versions of one parameter, for a batch of K · `rows` rows. Make it with `stack`."""

    rows: int

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {}, cls, _STACKED)


class Half(Tensor):
    """A frozen matrix in bf16, which says that it is float32. Make it with `halve`."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {}, cls, _HALF)


def stack(leaf: Tensor, rows: int) -> Stacked:
    """(K, *shape), differentiable, as a parameter of shape (*shape) over K · `rows` rows."""
    stacked = leaf.as_subclass(Stacked)
    stacked.rows = rows
    return stacked


def halve(weight: Tensor) -> Half:
    """A bf16 copy of a frozen matrix."""
    return weight.detach().to(torch.bfloat16).as_subclass(Half)


def _dispatch(func: Any, args: Any, kwargs: Any, kind: type, rules: dict[Any, Callable[..., Any]]) -> Any:
    rule = rules.get(func)
    if rule is None:
        raise NoRule(f"Expected a function with a rule for {kind.__name__.lower()} parameters; got {func}.")
    return rule(*args, **kwargs)


def _raw(x: Any) -> Any:
    """The plain tensor behind a stacked or half one."""
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(Tensor) if isinstance(x, Stacked | Half) else x


def _by_silo(x: Tensor, w: Stacked) -> Tensor:
    """(K · rows · …, d) as (K, …, d)."""
    silos = len(_raw(w))
    if x.dim() < 2 or x.shape[0] % (silos * w.rows):
        raise NoRule(f"Expected an input whose rows are those of {silos} silos × {w.rows}; got {tuple(x.shape)}.")
    return x.reshape(silos, -1, x.shape[-1])


def _shift(y: Tensor, bias: Tensor | None) -> Tensor:
    if not isinstance(bias, Stacked):
        return y if bias is None else y + _raw(bias)
    return (_by_silo(y, bias) + _raw(bias)[:, None]).view_as(y)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, Stacked):
        return _shift(F.linear(x, weight), bias)
    y = torch.bmm(_by_silo(x, weight), _raw(weight).transpose(1, 2))
    return _shift(y.view(*x.shape[:-1], -1), bias)


def _matmul(x: Tensor, weight: Tensor) -> Tensor:
    if not isinstance(weight, Stacked) or isinstance(x, Stacked):
        raise NoRule("Expected an activation times a stacked parameter.")
    return torch.bmm(_by_silo(x, weight), _raw(weight)).view(*x.shape[:-1], -1)


def _addmm(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    plain = not isinstance(weight, Stacked)
    return _shift(torch.mm(x, weight) if plain else _matmul(x, weight), bias)


def _embedding(
    ids: Tensor,
    weight: Stacked,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    *rest: Any,
    **named: Any,
) -> Tensor:
    """One table of K · V rows. Ids that all rows share, such as positions, are looked up once a row."""
    if max_norm is not None or any(rest[1:]) or named.get("scale_grad_by_freq") or named.get("sparse"):
        raise NoRule("Expected an embedding without max_norm, scale_grad_by_freq or sparse gradients.")
    table = _raw(weight)
    silos, size, width = table.shape
    total = silos * weight.rows
    if ids.dim() == 1 or (ids.shape[0] == 1 and total > 1):
        ids = (ids if ids.dim() > 1 else ids[None]).expand(total, *ids.shape[-1:])
    if ids.shape[0] != total:
        raise NoRule(f"Expected ids of {total} rows, or of one; got {tuple(ids.shape)}.")
    first = torch.arange(silos, device=ids.device).repeat_interleave(weight.rows) * size
    out = F.embedding(ids + first.view(-1, *[1] * (ids.dim() - 1)), table.reshape(-1, width))
    if padding_idx is None or padding_idx < 0:
        return out
    return torch.where((ids == padding_idx)[..., None], out.detach(), out)


def _layer_norm(
    x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    return _scale_shift(F.layer_norm(x, shape, None, None, eps), weight, bias)


def _rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    return _scale_shift(F.rms_norm(x, shape, None, eps), weight, None)


def _scale_shift(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        y = _mul(y, weight) if isinstance(weight, Stacked) else y * weight
    return _shift(y, bias)


def _mul(x: Tensor, y: Tensor) -> Tensor:
    return _elementwise(torch.mul, x, y)


def _add(x: Tensor, y: Tensor) -> Tensor:
    return _elementwise(torch.add, x, y)


def _elementwise(function: Callable[[Tensor, Tensor], Tensor], x: Any, y: Any) -> Tensor:
    """A vector or a number of each silo, with the activations of its rows; a constant leaves it stacked."""
    w, x = (x, y) if isinstance(x, Stacked) else (y, x)
    if isinstance(x, Stacked):
        raise NoRule("Expected a stacked parameter and an activation; got two stacked parameters.")
    if not isinstance(x, Tensor) or x.dim() == 0:
        return stack(function(_raw(w), x), w.rows)
    if _raw(w).dim() > 2:
        raise NoRule(f"Expected a vector for each silo; got {tuple(w.shape)}.")
    return function(_by_silo(x, w), _raw(w).view(len(_raw(w)), 1, -1)).view_as(x)


def _transpose(w: Stacked, *_: Any) -> Stacked:
    if _raw(w).dim() != 3:
        raise NoRule("Expected a matrix for each silo to transpose.")
    return stack(_raw(w).transpose(1, 2), w.rows)


def _to(w: Stacked, *args: Any, **kwargs: Any) -> Stacked:
    return stack(_raw(w).to(*args, **kwargs), w.rows)


def _shape(w: Stacked) -> torch.Size:
    return _raw(w).shape[1:]


def _size(w: Stacked, dim: int | None = None) -> Any:
    return _shape(w) if dim is None else _shape(w)[dim]


class _HalfProduct(torch.autograd.Function):
    """x W, with W frozen in bf16: no weight gradient, and x need not be kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        return torch.matmul(x.to(weight.dtype), weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return torch.matmul(g.to(ctx.weight.dtype), ctx.weight.t()).to(ctx.dtype), None


def _half_matmul(x: Tensor, weight: Half) -> Tensor:
    return _HalfProduct.apply(x, _raw(weight))


def _half_linear(x: Tensor, weight: Half, bias: Tensor | None = None) -> Tensor:
    y = _HalfProduct.apply(x, _raw(weight).t())
    return y if bias is None else y + bias


def _half_addmm(bias: Tensor, x: Tensor, weight: Half) -> Tensor:
    return _HalfProduct.apply(x, _raw(weight)) + bias


def _half_transpose(w: Half, *_: Any) -> Half:
    return _raw(w).t().as_subclass(Half)


def _getters(*names: str) -> dict[Any, Callable[..., Any]]:
    return {getattr(Tensor, name).__get__: lambda w, name=name: getattr(_raw(w), name) for name in names}


_FACTS = _getters("device", "layout", "requires_grad", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized")

_STACKED: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.addmm: _addmm,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.mul: _mul,
    Tensor.mul: _mul,
    Tensor.__mul__: _mul,
    Tensor.__rmul__: _mul,
    torch.add: _add,
    Tensor.add: _add,
    Tensor.__add__: _add,
    Tensor.__radd__: _add,
    Tensor.t: _transpose,
    torch.t: _transpose,
    Tensor.T.__get__: _transpose,
    Tensor.to: _to,
    Tensor.float: lambda w: _to(w, torch.float32),
    Tensor.type_as: lambda w, other: _to(w, other.dtype),
    Tensor.shape.__get__: _shape,
    Tensor.size: _size,
    Tensor.dim: lambda w: len(_shape(w)),
    Tensor.ndim.__get__: lambda w: len(_shape(w)),
    Tensor.is_floating_point: lambda w: True,
    Tensor.dtype.__get__: lambda w: _raw(w).dtype,
    **_FACTS,
}

_HALF: dict[Any, Callable[..., Any]] = {
    F.linear: _half_linear,
    torch.matmul: _half_matmul,
    Tensor.matmul: _half_matmul,
    Tensor.__matmul__: _half_matmul,
    torch.addmm: _half_addmm,
    Tensor.t: _half_transpose,
    torch.t: _half_transpose,
    Tensor.T.__get__: _half_transpose,
    Tensor.shape.__get__: lambda w: _raw(w).shape,
    Tensor.size: lambda w, *dim: _raw(w).size(*dim),
    Tensor.dim: lambda w: _raw(w).dim(),
    Tensor.ndim.__get__: lambda w: _raw(w).ndim,
    Tensor.is_floating_point: lambda w: True,
    Tensor.dtype.__get__: lambda w: torch.float32,
    **_FACTS,
}
