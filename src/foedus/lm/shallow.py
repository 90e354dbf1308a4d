"""Terms that need only the last layer's states, beside the step of `fast.py`.

That step has the states at hand before it goes back. Here the terms are computed on them, in one small graph from the
states to the silo's value: its gradient in the states joins that of the cross-entropy, and what units did to the heads
is noted by the rules of `per_example.py`. The layers are passed once, forward and backward, whatever the terms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..errors import ModelError
from . import heads
from .clipping import Clipping
from .fast import Tokens
from .per_example import Uses, collect
from .terms import Batch, Goal, Pass, Seen


class Shallow:
    """The terms of K silos' goals. Call `slope` first; then the others know.

    `weight`: (width,) of the final norm, which the states that `fast.py` has are without. `leaves`: (K, *shape) of the
    heads, by the model's names. `units`: for each silo, as in `Bench.clipped`. `scales`: (K,) what the gradient of each
    silo's cross-entropy is multiplied by.
    """

    def __init__(
        self, model: nn.Module, weight: Tensor, leaves: Mapping[str, Tensor], batches: Sequence[Batch],
        units: Sequence[Tensor], goals: Sequence[Goal], tokens: Tokens, scales: Tensor,
    ) -> None:  # fmt: skip
        self.model, self.weight, self.leaves, self.tokens = model, weight.detach().float(), leaves, tokens
        self.batches, self.units = batches, units
        self.goals = [Goal(0.0, goal.terms) for goal in goals]
        self.scales = scales.repeat_interleave(len(tokens.ids) // tokens.silos)[:, None]
        self.uses: list[Uses] = []
        self.values = torch.zeros(len(goals), device=self.weight.device)

    def slope(self, states: Tensor) -> Tensor:
        """(K·T, width), the normalised states, to the gradient of the goals' terms in them, float32."""
        found = [self._silo(k, x) for k, x in enumerate(states.float().chunk(self.tokens.silos))]
        self.uses = [uses for _, uses in found]
        return torch.cat([slope for slope, _ in found])

    def squares(self, clippings: Sequence[Clipping]) -> Tensor:
        """(N, parts): squared norms of what each unit did to the heads."""
        return torch.cat([uses.squares(clipping) for uses, clipping in zip(self.uses, clippings, strict=True)])

    def sums(self, clippings: Sequence[Clipping], factors: Sequence[Tensor]) -> dict[str, Tensor]:
        """(K, *shape) by name: sums over the units of factor · gradient. `factors`: for each silo, (units, parts)."""
        parts = [uses.sums(*given) for uses, *given in zip(self.uses, clippings, factors, strict=True)]
        return {name: torch.stack([part[name] for part in parts]) for name in self.leaves}

    def gradients(self) -> dict[str, Tensor]:
        """(K, *shape) by name, where each silo is one unit."""
        return {name: torch.cat([uses.each(name) for uses in self.uses]) for name in self.leaves}

    def _silo(self, k: int, states: Tensor) -> tuple[Tensor, Uses]:
        states = states.detach().requires_grad_()
        goal, units = self.goals[k], self.units[k]

        def loss() -> Tensor:
            value = goal.value(self._seen(k, states), units)
            self.values[k] = value.detach()
            return value

        params = {name: x[k] for name, x in self.leaves.items()}
        with torch.enable_grad():
            uses = collect(self.model, params, units, loss if goal.active and bool((units >= 0).any()) else None)
        return torch.zeros_like(states) if states.grad is None else states.grad, uses

    def _seen(self, k: int, states: Tensor) -> Seen:
        batch = self.batches[k]
        none = batch["labels"].new_zeros(0)
        hidden = _Last(self._padded(k, states * self.weight)[: len(batch["labels"]), : batch["input_ids"].shape[1]])

        def run(ids: Tensor) -> Pass:
            return Pass(hidden, none, _refuse, _refuse, _refuse) if ids is batch["input_ids"] else _refuse()

        return Seen(batch, none, run, lambda name, x: heads.head(self.model, name)(x))

    def _padded(self, k: int, states: Tensor) -> Tensor:
        """The T tokens of a silo as (rows, length, width), zero where there is none."""
        tokens, count = self.tokens, self.tokens.rows // self.tokens.silos * self.tokens.length
        if tokens.gather is None:
            return states.view(-1, tokens.length, states.shape[1])
        here = slice(k * len(states), (k + 1) * len(states))
        place = tokens.gather[here] - k * count
        if tokens.spare is not None:
            real = ~tokens.spare[here, 0]
            states, place = states[real], place[real]
        padded = states.new_zeros(count, states.shape[1]).index_copy(0, place, states)
        return padded.view(-1, tokens.length, states.shape[1])


class _Last(tuple[Tensor, ...]):
    """The hidden states of all layers, of which only the last are known."""

    def __new__(cls, states: Tensor) -> _Last:
        return super().__new__(cls, (states,))

    def __getitem__(self, layer: Any) -> Any:
        return super().__getitem__(0) if layer == -1 else _refuse()


def _refuse(*_: Any) -> NoReturn:
    raise ModelError("a term that says it is shallow to need the last layer's states only", "more", "Correct it.")
