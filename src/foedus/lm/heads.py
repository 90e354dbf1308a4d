"""What a base is given beside its adapter: small networks on its features, which tell topics or domains apart, and a
bias of each token's logit.

A head lives inside the model, so its parameters are in `named_parameters()`: they start, travel, are clipped, noised,
averaged and saved with all others. The model's own forward pass never calls a network; a term does (`terms.py`). The
bias is part of what the model says, and gets no gradient: an algorithm makes it of what it knows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import ModelError, one_of
from ..seeds import generator

if TYPE_CHECKING:
    from .bench import Bench
    from .load import Base

PLACE = "foedus_heads"
BIAS = "tokens"
"""The name of the bias among the heads."""
WEIGHTS = "heads.safetensors"


def attach_head(base: Base, name: str, sizes: Sequence[int], seed: int) -> None:
    """Add the head `name`: linear layers of `sizes` (inputs, …, outputs), ReLU between them, float32, trainable.

    The last layer is zero, so every class starts as likely as any other; the others are drawn from `seed` and `name`,
    U(−1/√n, 1/√n) for n inputs. After `attach`, before the bench. Raises `ModelError` for a name that is taken, and
    for sizes that make no network. Heads on features have `width(base)` inputs.
    """
    held = _held(base.model)
    if name in held or not name.isidentifier():
        known = ", ".join(held) or "none"
        raise ModelError("a new name for a head, of letters and digits", f'"{name}" beside {known}', "Rename it.")
    if len(sizes) < 2 or min(sizes) < 1:
        raise ModelError("sizes from inputs to at least one output", f"{tuple(sizes)}", "Correct them.")
    device = next(base.model.parameters()).device
    core: Any = _core(base.model)
    if not held:
        setattr(core, PLACE, nn.ModuleDict())
    getattr(core, PLACE)[name] = _network(sizes, seed, name).to(device)


def attach_bias(base: Base) -> None:
    """Add a bias of each token's logit, (C,) float32, zero, to a model that predicts tokens. When as `attach_head`;
    raises `ModelError` for a model that has one, or has no logits of tokens.
    """
    core: Any = _core(base.model)
    output = core.get_output_embeddings()
    if output is None or BIAS in _held(core):
        came = "a model that predicts no tokens" if output is None else "one that has it"
        raise ModelError("a model that predicts tokens, without a bias of them", came, "Leave it out.")
    if not _held(core):
        setattr(core, PLACE, nn.ModuleDict())
    _put_bias(core, TokenBias(output.weight.shape[0]).to(output.weight.device))


class TokenBias(nn.Module):
    """b of logits + b. It moves by no gradient."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(tokens))

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits + self.bias.detach().to(logits.dtype)


def _put_bias(core: Any, bias: TokenBias) -> None:
    """Into the model, and into what it says."""
    getattr(core, PLACE)[BIAS] = bias
    core.get_output_embeddings().register_forward_hook(lambda _, __, logits: getattr(core, PLACE)[BIAS](logits))


def head(owner: Bench | nn.Module, name: str) -> nn.Module:
    """The head `name` of a bench or a model; `ModelError` where it has none of that name."""
    held = _held(owner if isinstance(owner, nn.Module) else owner.model)
    if name not in held:
        raise ModelError(f'a head "{name}"', "a model without it", one_of(name, held))
    return held[name]


def width(base: Base) -> int:
    """The size of the base's hidden states."""
    config: Any = base.model.config
    return int(config.hidden_size)


def is_head(name: str) -> bool:
    """Whether the parameter of this name belongs to a head."""
    return PLACE in name.split(".")


def names(model: nn.Module) -> dict[str, dict[str, str]]:
    """For each head, the model's name of each of its parameters."""
    full = {id(p): name for name, p in model.named_parameters()}
    return {name: {own: full[id(p)] for own, p in each.named_parameters()} for name, each in _held(model).items()}


def save_heads(model: nn.Module, folder: Path) -> None:
    """Write all heads into `folder`, where there are some."""
    weights = _weights(model)
    if weights:
        save_file(weights, folder / WEIGHTS)


def load_heads(model: nn.Module, folder: Path) -> None:
    """Put the heads that `save_heads` wrote on `model`, frozen; into those that it has already, as they are."""
    if not (folder / WEIGHTS).is_file():
        return
    weights = load_file(folder / WEIGHTS)
    core = _core(model)
    if not _held(core):
        setattr(core, PLACE, nn.ModuleDict())
    held = _held(core)
    for name in dict.fromkeys(key.partition(".")[0] for key in weights):
        own = {key.partition(".")[2]: x for key, x in weights.items() if key.partition(".")[0] == name}
        if name not in held and set(own) == {"bias"}:
            _put_bias(core, TokenBias(len(own["bias"])).requires_grad_(False))
        elif name not in held:
            matrices = [x for key, x in own.items() if key.endswith("weight")]
            sizes = (matrices[0].shape[1], *(len(x) for x in matrices))
            held[name] = _network(sizes, 0, name).requires_grad_(False)
        held[name].load_state_dict(own)


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{own}": p.detach().cpu() for name, each in _held(model).items() for own, p in each.named_parameters()
    }


@torch.no_grad()
def _network(sizes: Sequence[int], seed: int, name: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for depth, (inputs, outputs) in enumerate(pairwise(sizes)):
        linear = nn.Linear(inputs, outputs)
        linear.weight.zero_()
        linear.bias.zero_()
        if depth < len(sizes) - 2:
            draw = generator(seed, "head", name, depth).uniform(-1.0, 1.0, (outputs, inputs)) / math.sqrt(inputs)
            linear.weight.copy_(torch.from_numpy(draw.astype(np.float32)))
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _core(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _held(model: Any) -> Any:
    """A mapping from names to heads."""
    return getattr(_core(model), PLACE, {})
