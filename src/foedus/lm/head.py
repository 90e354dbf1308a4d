"""From hidden states to cross-entropy without ever holding all the logits.

A vocabulary of 49,152 makes the logits of 1,024 tokens 200 MB in fp32, and each pass over them costs as much as a layer.
Here they exist for a few rows at a time, for target positions only, and the gradient of the hidden states is made while they
are in the cache: the head is frozen, so nothing else is needed of them later.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 128
"""Rows of logits held at a time. 64 to 512 ran alike; more only takes memory."""


def cross_entropy(states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of each target; (p,) float32, differentiable in `states`.

    `states`: (p, d). `weight`: (C, d) and `bias`: (C,) or None, both frozen; products run in the dtype of `weight`.
    `targets`: (p,) in [0, C).
    """
    if states.requires_grad and torch.is_grad_enabled():
        return _CrossEntropy.apply(states, weight, bias, targets)
    return forward(states, weight, bias, targets)[0]


def forward(
    states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, gradient: bool = False, hits: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(nll, gradient, hits): (p,) float32; (p, d) d nll / d states in the dtype of `weight`; (p,) whether it is the arg max.

    The last two are None unless asked for. Probabilities and losses are float32.
    """
    states = states.detach().to(weight.dtype)
    nll = torch.empty(len(targets), dtype=torch.float32, device=states.device)
    slope = torch.empty_like(states) if gradient else None
    hit = torch.empty(len(targets), dtype=torch.bool, device=states.device) if hits else None
    for start in range(0, len(targets), ROWS):
        rows = slice(start, start + ROWS)
        target = targets[rows, None]
        logits = states[rows] @ weight.t() if bias is None else torch.addmm(bias, states[rows], weight.t())
        p = torch.softmax(logits, -1, dtype=torch.float32)
        nll[rows] = _nll(p, logits, target)
        if hit is not None:
            hit[rows] = logits.argmax(-1) == target[:, 0]
        if slope is not None:
            p.scatter_add_(1, target, torch.full_like(target, -1, dtype=p.dtype))
            torch.mm(p.to(weight.dtype), weight, out=slope[rows])
    return nll, slope, hit


def _nll(p: Tensor, logits: Tensor, target: Tensor) -> Tensor:
    """−log p[target]; by way of the logits in the rows where p is too small to have a trustworthy logarithm."""
    chosen = p.gather(1, target)[:, 0]
    nll = chosen.log().neg_()
    far = (chosen < 1e-30).nonzero()[:, 0]
    if len(far):
        nll[far] = -torch.log_softmax(logits[far].float(), -1).gather(1, target[far])[:, 0]
    return nll


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        nll, slope, _ = forward(states, weight, bias, targets, gradient=True)
        ctx.save_for_backward(slope)
        ctx.dtype = states.dtype
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return (slope * g[:, None]).to(ctx.dtype), None, None, None
