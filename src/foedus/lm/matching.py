"""Synthetic text that stands for real text near given parameters: soft embeddings whose gradient is like a given one
(FedLAP-DP, Wang et al. 2024, arXiv 2302.01068; gradient matching by Zhao, Mopuri and Bilen 2021, arXiv 2006.05929).

    D(g, g̃) = Σ over layers and output rows of (1 − cos(g_row, g̃_row)) / rows  [+ β ‖g − g̃‖²]
    X, Y ← arg min D(g, ∇_w ℓ(w; X, Y))                                            twice differentiable

A synthetic example is L input vectors, in units of the base's embeddings, and a distribution over a few tokens after
each. `g` is given: nothing here ever sees text. NumPy in, NumPy out; the algorithm is `algorithms/fedlap.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import ModelError
from .heads import head

if TYPE_CHECKING:
    from ..types import Params
    from .bench import Bench

Tensors = Mapping[str, Tensor]
Loss = Callable[[Tensors, Tensor, Tensor], Tensor]
"""(parameters, inputs, targets) → the mean loss of synthetic examples, twice differentiable in all three."""
EPSILON = 1e-6
PUBLIC = 256  # tokens whose embeddings set the scale


@dataclass(frozen=True, eq=False)
class Synthetic:
    """`inputs`: (s, L, p) and `targets`: (s, L, V'), float32: vectors in units of the base's embeddings, and logits."""

    inputs: np.ndarray
    targets: np.ndarray


class Matcher:
    """One silo's synthetic examples for a round, moved by Adam towards given gradients. `rate`: of a step, > 0.

    `euclidean`: β ≥ 0 of D.
    """

    def __init__(self, loss: Loss, start: Synthetic, device: Any = "cpu", rate: float = 0.1, euclidean: float = 0.0):
        self.loss, self.euclidean = loss, euclidean
        self.inputs, self.targets = (
            torch.tensor(x, dtype=torch.float32, device=device, requires_grad=True)
            for x in (start.inputs, start.targets)
        )
        self._optimizer = torch.optim.Adam([self.inputs, self.targets], lr=rate)

    @property
    def synthetic(self) -> Synthetic:
        """The examples as they are now."""
        return Synthetic(*(x.detach().cpu().numpy().copy() for x in (self.inputs, self.targets)))

    def match(self, params: Params, gradient: Params, steps: int) -> float:
        """Moves the examples so that their gradient at `params` is more like `gradient`; D before the last step."""
        w = {name: _tensor(x, self.inputs).requires_grad_() for name, x in params.items()}
        given = {name: _tensor(x, self.inputs) for name, x in gradient.items()}
        found = math.nan
        for _ in range(steps):
            self._optimizer.zero_grad()
            with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
                own = _gradient(self.loss(w, self.inputs, self.targets), w, create_graph=True)
                distance = difference(given, own, self.euclidean)
                distance.backward(inputs=[self.inputs, self.targets])
            self._optimizer.step()
            found = float(distance.detach())
        return found


def difference(given: Tensors, own: Tensors, euclidean: float = 0.0) -> Tensor:
    """D: 0 for gradients of equal direction in every row, 2 for opposite ones; a row of zeros counts 1."""
    cosines = [_cosines(x, own[name]) for name, x in given.items()]
    rows = 1 - torch.cat(cosines)
    apart = sum((x - own[name]).square().sum() for name, x in given.items()) if euclidean else 0.0
    return rows.mean() + euclidean * apart


def descend(
    loss: Loss, params: Params, examples: Sequence[tuple[float, Synthetic]], *, lr: float, steps: int,
    origin: Params, radius: float, device: Any = "cpu",
) -> tuple[dict[str, np.ndarray], bool]:  # fmt: skip
    """`steps` of gradient descent from `params` on Σ share · loss, never leaving ‖w − origin‖ ≤ `radius`; float32.

    A step that would leave is drawn back to the ball's surface, and is the last; whether there was one.
    """
    w, out = {name: np.asarray(x, np.float32) for name, x in params.items()}, False
    data = [(share, *(_tensor(x, device) for x in (s.inputs, s.targets))) for share, s in examples]
    for _ in range(steps):
        leaves = {name: _tensor(x, device).requires_grad_() for name, x in w.items()}
        slopes = [_gradient(share * loss(leaves, x, y), leaves) for share, x, y in data]
        moved = {name: x - np.float32(lr) * sum(g[name].cpu().numpy() for g in slopes) for name, x in w.items()}
        w, out = within(moved, origin, radius)
        if out:
            break
    return w, out


def within(params: Params, origin: Params, radius: float) -> tuple[dict[str, np.ndarray], bool]:
    """The nearest point to `params` in the ball around `origin`, and whether they lay outside.

    Guarantees: ‖result − origin‖ ≤ radius in float64, rounding to float32 included.
    """
    out, shrink, outside = dict(params), 1.0, False
    while (far := _distance(out, origin)) > radius:
        shrink, outside = shrink * min(radius / far, 1 - 2**-20), True
        out = {name: (x + shrink * (np.asarray(params[name], np.float64) - x)).astype(np.float32)
               for name, x in ((n, np.asarray(o, np.float64)) for n, o in origin.items())}  # fmt: skip
    return out, outside


@dataclass(frozen=True, eq=False)
class SoftText:
    """The loss of synthetic text under a causal model: cross-entropy against soft targets over the first V' tokens of
    the vocabulary, which tokenizers number by how common they are; and, with `topics` > 0, that weight times the
    cross-entropy of the head `head`, example i being of class i modulo the classes.

    Differentiable twice: through the model's own code, in float32.
    """

    bench: Bench
    topics: float = 0.0
    head: str = "topics"

    def __post_init__(self) -> None:
        if self.bench.objective.task != "causal-lm":
            do = "Use a causal base, or another algorithm."
            raise ModelError("causal-lm, for synthetic text", self.bench.objective.task, do)

    def shape(self, examples: int, length: int, vocabulary: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Of the inputs and the targets of so many examples."""
        core = _core(self.bench)
        words = min(vocabulary, core.get_output_embeddings().out_features)
        return (examples, length, int(core.config.hidden_size)), (examples, length, words)

    def __call__(self, params: Tensors, inputs: Tensor, targets: Tensor) -> Tensor:
        return functional_call(
            _Inside(self.bench.model),
            {f"model.{name}": x for name, x in params.items()},
            (lambda: self._loss(inputs, targets),),
        )

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        core = _core(self.bench)
        states = core.base_model(inputs_embeds=self._scale * inputs, use_cache=False).last_hidden_state  # (s, L, p)
        logp = core.get_output_embeddings()(states).float().log_softmax(-1)
        total = -(targets.softmax(-1) * logp[..., : targets.shape[-1]]).sum(-1).mean()
        if not self.topics:
            return total
        scores = head(self.bench, self.head)(F.normalize(states.float().mean(1), dim=1))
        classes = torch.arange(len(inputs), device=inputs.device) % scores.shape[-1]
        return total + self.topics * F.cross_entropy(scores, classes)

    @property
    def _scale(self) -> Tensor:
        """The size of a number in the embedding of a token, by the median, of which a few giants mean nothing; of the
        first tokens only: where states of frozen blocks are kept, what comes later is made of text (`kept.py`).
        """
        some = _core(self.bench).get_input_embeddings().weight.detach()[:PUBLIC].float()
        return some.abs().median() / 0.6745  # of a normal distribution with standard deviation one


class _Inside(nn.Module):
    """A model with its parameters replaced for as long as some work takes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], Tensor]) -> Tensor:
        return work()


def _gradient(loss: Tensor, leaves: Tensors, create_graph: bool = False) -> dict[str, Tensor]:
    """By name; zeros where the loss does not depend on a parameter."""
    found = torch.autograd.grad(loss, list(leaves.values()), create_graph=create_graph, allow_unused=True)
    return {name: torch.zeros_like(x) if g is None else g for (name, x), g in zip(leaves.items(), found, strict=True)}


def _cosines(x: Tensor, y: Tensor) -> Tensor:
    """(rows,) of a matrix's output rows; of a vector as one row."""
    x, y = (z.flatten(1) if z.dim() > 1 else z[None] for z in (x, y))
    return (x * y).sum(1) / (_lengths(x) * _lengths(y) + EPSILON)


def _lengths(x: Tensor) -> Tensor:
    """(rows,) norms, with a derivative at zero."""
    return (x.square().sum(1) + EPSILON**2).sqrt()


def _distance(params: Params, origin: Params) -> float:
    return math.sqrt(sum(float(np.sum((np.asarray(params[n], np.float64) - x) ** 2)) for n, x in origin.items()))


def _tensor(x: Any, like: Any) -> Tensor:
    device = like.device if isinstance(like, Tensor) else like
    return torch.from_numpy(np.array(x, np.float32)).to(device)


def _core(bench: Bench) -> Any:
    return bench.model.get_base_model() if hasattr(bench.model, "get_base_model") else bench.model
