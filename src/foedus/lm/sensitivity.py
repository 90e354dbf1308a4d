"""Which modules public text asks to change most: so that a private run trains few numbers, chosen without private data.

Noise grows with the root of how many numbers are trained, so modules that matter little cost more than they bring
(sensitivity-aware masks, at the grain of modules). Nothing private is read here.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .adapters import LoRA, target_modules
from .load import Base
from .objectives import Encoded, Objective

ROWS, MOST = 8, 64
"""Rows of public text at a time, and at most."""


def most_sensitive(base: Base, adapter: LoRA, objective: Objective, public: Encoded, share: float) -> LoRA:
    """`adapter` on the `share` (in (0, 1], at least one) of its modules with the largest squared gradient for each
    number that LoRA would train there, on public rows.
    """
    names = target_modules(base, adapter)
    weights = {name: base.model.get_submodule(name).weight for name in names}
    grown = dict.fromkeys(names, 0.0)
    base.model.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    chosen = range(0, len(public), max(1, len(public) // MOST))[:MOST]
    for start in range(0, len(chosen), ROWS):
        batch = objective.collate(public, chosen[start : start + ROWS], 0)
        loss = base.model(**batch).loss
        for name, gradient in zip(names, torch.autograd.grad(loss, list(weights.values())), strict=True):
            grown[name] += float(gradient.square().sum()) / sum(gradient.shape)
    base.model.requires_grad_(False)
    best = sorted(names, key=lambda name: -grown[name])[: max(1, round(share * len(names)))]
    return replace(adapter, targets=tuple(name for name in names if name in best))
