"""Gradient inversion by optimisation: dummy inputs are moved until their gradient looks like the one that was sent.

DLG (Zhu et al. 2019) compares gradients by squared distance and learns inputs and labels together; TAG (Deng et al.
2021) adds an L1 term that weighs the first layers most. Both work on embeddings, which are read as the
nearest tokens at the end. They need many gradients of a gradient, so they are for short rows and small models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..lm.bench import Bench
from ..types import Params


@dataclass(frozen=True)
class Optimiser:
    """`kind`: "dlg" or "tag". `steps` of Adam, ≥ 1, at `lr` > 0. `l1`: the weight of TAG's second term, ≥ 0."""

    kind: Literal["dlg", "tag"] = "tag"
    steps: int = 300
    lr: float = 0.05
    l1: float = 0.01

    def __post_init__(self) -> None:
        if self.kind not in ("dlg", "tag") or self.steps < 1 or not self.lr > 0 or not self.l1 >= 0:
            raise ValueError(f"Expected a kind dlg or tag, steps ≥ 1, lr > 0 and l1 ≥ 0; got {self}.")


def optimise(
    bench: Bench, params: Params, sent: Params, lengths: Sequence[int], how: Optimiser, generator: np.random.Generator
) -> list[tuple[int, ...]]:
    """The rows whose gradient comes nearest to `sent`, one for each of `lengths`; `generator` draws the start."""
    table = bench.model.get_input_embeddings().weight.detach()
    values = {name: torch.from_numpy(np.asarray(x, np.float32)) for name, x in params.items()}
    tables = {id(table)}
    matched = [n for n, p in bench.model.named_parameters() if n in sent and id(p) not in tables and np.any(sent[n])]
    if not matched:
        return []
    goal = {name: torch.from_numpy(np.asarray(sent[name], np.float32)) for name in matched}
    inputs, labels = _start(table, lengths, generator)
    adam = torch.optim.Adam([inputs, labels], lr=how.lr)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        for _ in range(how.steps):
            adam.zero_grad()
            unlike = distance(dummy_gradient(bench, values, matched, inputs, labels, lengths), goal, how)
            inputs.grad, labels.grad = torch.autograd.grad(unlike, [inputs, labels])
            adam.step()
    return _read(table, inputs.detach(), lengths)


def _start(table: Tensor, lengths: Sequence[int], generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Inputs (b, t, d) as long as embeddings are, and label scores (b, t, V)."""
    size = (len(lengths), max(lengths))
    inputs = generator.standard_normal((*size, table.shape[1])) * float(table.std())
    labels = 0.1 * generator.standard_normal((*size, table.shape[0]))
    return tuple(torch.from_numpy(x.astype(np.float32)).requires_grad_() for x in (inputs, labels))  # type: ignore[return-value]


def dummy_gradient(
    bench: Bench, values: Mapping[str, Tensor], names: Sequence[str], inputs: Tensor, labels: Tensor,
    lengths: Sequence[int],
) -> dict[str, Tensor]:  # fmt: skip
    """The mean over rows of the gradients of their mean losses, as silos send it; differentiable.

    `inputs`: (b, t, d) in place of embeddings. `labels`: (b, t, V) scores of the token that follows. `names`: of the
    parameters whose gradients are wanted. Places beyond a row's length do not count.
    """
    leaves = {name: values[name].clone().requires_grad_() for name in names}
    mask = torch.arange(inputs.shape[1]) < torch.tensor(lengths)[:, None]  # (b, t)
    given = {"inputs_embeds": inputs, "attention_mask": mask.long(), "use_cache": False}
    logits = functional_call(bench.model, {**values, **leaves}, (), given).logits
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.softmax(-1).flatten(0, 1), reduction="none")
    mean = (losses.view(mask.shape) * mask).sum(1) / mask.sum(1)
    found = torch.autograd.grad(mean.mean(), list(leaves.values()), create_graph=True)
    return dict(zip(names, found, strict=True))


def distance(found: Mapping[str, Tensor], goal: Mapping[str, Tensor], how: Optimiser) -> Tensor:
    """How unlike two gradients are, relative to the length of `goal`: for DLG, 1 for a gradient of zero."""
    size = sum(x.square().sum() for x in goal.values()).sqrt()
    total = found[next(iter(found))].new_zeros(())
    for place, (name, x) in enumerate(goal.items()):
        total = total + (found[name] - x).square().sum() / size**2
        if how.kind == "tag":
            total = total + how.l1 * (1 - place / len(goal)) * (found[name] - x).abs().sum() / size
    return total


def _read(table: Tensor, inputs: Tensor, lengths: Sequence[int]) -> list[tuple[int, ...]]:
    """The tokens whose embeddings point most nearly the same way."""
    likeness = F.normalize(inputs, dim=-1) @ F.normalize(table, dim=-1).T
    return [tuple(row[:length].tolist()) for row, length in zip(likeness.argmax(-1), lengths, strict=True)]
