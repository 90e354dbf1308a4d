"""From hidden states to cross-entropy without ever holding all the logits.

A vocabulary of 49,152 makes the logits of 1,024 tokens 200 MB in fp32, and each pass over them costs as much as a
layer. Here they exist for 4,096 words at a time, at target positions only, with a running maximum and sum as in flash
attention (Milakov & Gimelshein 2018). The gradient of the states is made while the logits are in the cache: the head
is frozen, so nothing else is needed of them later.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS, WORDS = 1024, 4096
"""The block of logits held at a time: 16 MB in fp32. Blocks of 128 rows and all words took 1.3 times as long."""


def cross_entropy(states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of each target; (p,) float32, differentiable (once) in `states`.

    `states`: (p, d). `weight`: (C, d) and `bias`: (C,) or None, both frozen; products run in the dtype of `weight`.
    `targets`: (p,) in [0, C).
    """
    if states.requires_grad and torch.is_grad_enabled():
        return _CrossEntropy.apply(states, weight, bias, targets)
    return forward(states, weight, bias, targets)[0]


@torch.no_grad()
def forward(
    states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, gradient: bool = False, hits: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(nll, gradient, hits): (p,) float32; (p, d) d nll / d states in the dtype of `weight`; (p,) whether it is the
    arg max.

    The last two are None unless asked for. Sums, maxima and losses are float32. Of equal logits the first is the arg
    max.
    """
    states = states.to(weight.dtype)
    parts = [
        _rows(x, weight, bias, t[:, None], gradient, hits)
        for x, t in zip(states.split(ROWS), targets.split(ROWS), strict=True)
    ]
    nll, slope, best = ([part[i] for part in parts] for i in range(3))
    return torch.cat(nll), torch.cat(slope) if gradient else None, torch.cat(best) == targets if hits else None


def _rows(
    states: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, gradient: bool, hits: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(nll, d nll / d states, arg max) of some rows, going through the words block by block."""
    top = torch.full(target.shape, float("-inf"), device=states.device)  # running maximum of the logits
    total = torch.zeros_like(top)  # running sum of exp(logit − top)
    chosen = torch.zeros_like(top)  # logit of the target
    best = torch.zeros_like(target)
    slope = torch.zeros(states.shape, device=states.device)  # running sum of exp(logit − top) · weight
    for start in range(0, len(weight), WORDS):
        block = weight[start : start + WORDS]
        logits = states @ block.t() if bias is None else torch.addmm(bias[start : start + WORDS], states, block.t())
        logits = logits.float()
        place = target - start
        inside = (place >= 0) & (place < len(block))
        chosen = torch.where(inside, logits.gather(1, place.clamp(0, len(block) - 1)), chosen)
        highest = logits.amax(1, keepdim=True)
        if hits:
            better = (highest > top)[:, 0].nonzero()[:, 0]
            best[better, 0] = logits[better].argmax(1) + start
        highest = torch.maximum(top, highest)
        shrink = (top - highest).exp_()
        p = logits.sub_(highest).exp_()
        total.mul_(shrink).add_(p.sum(1, keepdim=True))
        if gradient:
            slope.mul_(shrink).add_(p.to(weight.dtype) @ block)
        top = highest
    nll = top.add_(total.log()).sub_(chosen)[:, 0]
    if gradient:
        slope = slope.div_(total).sub_(weight[target[:, 0]])
    return nll, slope.to(weight.dtype), best[:, 0]


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
