"""One training step of a Llama-like model with LoRA, written out by hand: forward and backward in few passes over
memory.

Why not autograd: the base is frozen, so most of what autograd would keep and compute is thrown away; its fp32 casts,
norms, rotary embedding and attention backward took more time than the matrix products. Here
- frozen weights are held once in the compute dtype (bf16 where the processor has it), q|k|v and gate|up as one matrix
  each, with the weight of the norm before them multiplied in, so that a norm is x · rsqrt(mean x²) and its output
  serves three uses;
- LoRA's products ride on these: one for all A that share an input, one for their B (block-diagonal), K silos by
  `bmm`;
- padding is skipped: only attention sees rows of equal length, all else a list of tokens;
- attention is explicit products, the queries of one key head together: no copies of keys, and a cheap backward;
  outputs of the query and key projections are reordered so that rotary pairs stand side by side and one complex
  product turns them;
- losses are sums, so the gradient of silo k's leaves is known up to one factor when the loss is: it is computed at
  once, and activations go back to one workspace that the next step reuses. The residual stream, norms, rotary
  embedding, attention scores, softmax and losses are fp32 whatever the compute dtype.

Clipping unit by unit costs little more: the gradient of an adapter is one product over all tokens of a silo, and that
of its units is the same product cut at their borders, so the operations are the same ones. What is new is a norm and a
weighted sum, and room for all units' gradients: layer ℓ's lie in workspace that the layers above it have given back.

Letters: K silos, T tokens a silo, N units of all silos, B rows of s positions, h heads, n key heads, d head dimension,
R ranks that share an input. Read `Llama.run` first, then `Llama.clipped`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import head
from .clipping import ClippedSums, Clipping

if TYPE_CHECKING:
    from .shallow import Shallow

FAMILIES = ("llama", "mistral", "qwen2")
KEPT = 256
"""Up to this many positions the attention probabilities are kept for the backward pass; beyond, they are made again."""
SCORES = 1 << 24
"""How many attention scores are held at a time where they are not kept."""
BLOCK = 1 << 25
"""Bytes that the workspace grows by."""
STEP = 32
"""Units of unlike lengths are multiplied in windows of 1, 1½, 2, 3, 4, 6, 8, 12, … times so many tokens."""


@dataclass(frozen=True)
class Lora:
    """The adapter of one linear layer: names of its leaves, its scale, and which outputs of the fused product it adds
    to.

    `order`: output i of that range is row order[i] of B; None when they are as they were.
    """

    a: str
    b: str
    scale: float
    start: int
    stop: int
    order: Tensor | None


@dataclass(frozen=True)
class Product:
    """Linear layers that share an input, as one. `weight`: (out, in), norm folded in; `fold`: that norm's weight
    (in,)."""

    weight: Tensor
    bias: Tensor | None
    fold: Tensor | None
    loras: tuple[Lora, ...]


@dataclass(frozen=True)
class Layer:
    qkv: Product
    o: Product
    gate_up: Product
    down: Product


@dataclass(frozen=True)
class Tokens:
    """What is computed: the tokens of K silos, T each, and where they are in (B, s). Indices are None where all is
    dense."""

    silos: int
    rows: int
    length: int
    ids: Tensor  # (K·T,)
    spread: Tensor | None  # (B·s,) the token at each position; where there is none, its row's first
    gather: Tensor | None  # (K·T,) the position of each token
    hole: Tensor | None  # (B·s, 1) bool: no token here
    spare: Tensor | None  # (K·T, 1) bool: a token that only fills up its silo's T
    predicts: Tensor  # (p,) the token whose state predicts each target
    targets: Tensor  # (p,)
    bias: Tensor | None = None  # (K, C) what each silo adds to each logit


def lay_out(
    ids: Tensor, mask: Tensor, where: Tensor, targets: Tensor, silos: int, bias: Tensor | None = None
) -> Tokens | None:
    """Tokens of right-padded rows; None when the padding is not on the right.

    `ids`, `mask`: (B, s), B = K · rows a silo. `where`: (p,) flat positions whose states predict `targets`. `bias`:
    (K, C), or one for all silos.

    Holes are filled from their own row: attention multiplies them by zero, and zero times another row's NaN is NaN.
    """
    rows, length = ids.shape
    there = mask.bool()
    lengths = there.sum(1)
    if bool((there != (torch.arange(length, device=ids.device) < lengths[:, None])).any()):
        return None
    if bool(there.all()):
        return Tokens(silos, rows, length, ids.reshape(-1), None, None, None, None, where, targets, bias)
    there = there.reshape(silos, -1)
    counts = there.sum(1)
    width = int(counts.max())
    spare = torch.arange(width, device=ids.device) >= counts[:, None]
    rank = there.cumsum(1) - 1 + torch.arange(silos, device=ids.device)[:, None] * width
    first = rank.view(rows, length)[:, :1].clamp(min=0).expand(rows, length)  # of a row without tokens: any
    spread = torch.where(there, rank, first.reshape(silos, -1)).reshape(-1)
    gather = torch.zeros(silos * width, dtype=torch.long, device=ids.device)
    present = there.reshape(-1).nonzero()[:, 0]
    gather[spread[present]] = present
    hole = ~there.reshape(-1, 1)
    return Tokens(
        silos, rows, length, ids.reshape(-1)[gather], spread, gather, hole,
        spare.reshape(-1, 1) if bool(spare.any()) else None, spread[where], targets, bias,
    )  # fmt: skip


@dataclass(frozen=True)
class Window:
    """Tokens of one unit, and of neighbours up to a usual length: the library plans every new length anew, 0.25 ms.

    `slot`: where its rows begin in a copy of the narrow factor in which the neighbours' are zero.
    """

    unit: int
    slot: int
    token: int
    length: int


@dataclass(frozen=True)
class Units:
    """Whose tokens are whose. Units are numbered through all silos; each has a contiguous run of tokens, or none.

    `counts`: units of each silo. `runs`: (first unit, units, first token, tokens each), for neighbours of equal length.
    `windows`: used instead of runs where there are some; token `owned[i]` belongs in row `slots[i]` of the copy.
    `shares`: (K·T, 1) float32, one over the number of targets of the unit that a token belongs to, 0 for nobody's.
    """

    counts: tuple[int, ...]
    runs: tuple[tuple[int, int, int, int], ...]
    windows: tuple[Window, ...]
    owned: Tensor
    slots: Tensor
    shares: Tensor

    def products(self, narrow: Tensor, wide: Tensor, out: Tensor) -> Tensor:
        """narrow' wide over the tokens of each unit, in `out`; (K·T, R) and (K·T, c) to (N, R, c).

        Through windows, what is not finite in one unit may spread to others: zero times NaN is NaN.
        """
        if self.windows:
            return self._through_windows(narrow, wide, out)
        for unit, units, token, length in self.runs:
            here, into = slice(token, token + units * length), out[unit : unit + units]
            left, right = (x[here].view(units, length, x.shape[1]) for x in (narrow, wide))
            torch.bmm(left.transpose(1, 2), right, out=into)
        return out

    def _through_windows(self, narrow: Tensor, wide: Tensor, out: Tensor) -> Tensor:
        last = self.windows[-1]
        copy = narrow.new_zeros(last.slot + last.length, narrow.shape[1])
        copy.index_copy_(0, self.slots, narrow.index_select(0, self.owned))
        if len(self.windows) < len(out):
            out.zero_()  # for units without tokens
        for w in self.windows:
            left = copy[w.slot : w.slot + w.length]
            torch.mm(left.t(), wide[w.token : w.token + w.length], out=out[w.unit])
        return out


def lay_out_units(tokens: Tokens, units: Sequence[Tensor]) -> Units:
    """`units`: for each silo, the unit of each of its rows, ascending from 0, or −1 for nobody's; rows that are missing
    at the end are nobody's."""
    counts = [int(silo.max()) + 1 if len(silo) else 0 for silo in units]
    nobody, rows = sum(counts), tokens.rows // tokens.silos
    of_row = torch.full((tokens.silos, rows), nobody, device=tokens.ids.device)
    for k, silo in enumerate(units):
        of_row[k, : len(silo)] = torch.where(silo < 0, nobody, silo + sum(counts[:k]))
    place = torch.arange(len(tokens.ids), device=of_row.device) if tokens.gather is None else tokens.gather
    unit = of_row.view(-1)[place // tokens.length]
    if tokens.spare is not None:
        unit = unit.masked_fill(tokens.spare[:, 0], nobody)
    targets = torch.bincount(unit[tokens.predicts], minlength=nobody + 1)
    shares = 1.0 / targets.clamp(min=1).float()
    shares[nobody] = 0.0
    spans = _spans(unit, nobody)
    windows, slots = _windows(spans, len(unit))
    owned = [token for start, length in spans for token in range(start, start + length)]
    owned, slots = (torch.tensor(x, dtype=torch.long, device=unit.device) for x in (owned, slots))
    return Units(tuple(counts), _runs(spans), windows, owned, slots, shares[unit][:, None])


def _spans(unit: Tensor, nobody: int) -> list[tuple[int, int]]:
    """(first token, tokens) of every unit, from the unit of each token."""
    lengths, starts, at = [0] * (nobody + 1), [0] * (nobody + 1), 0
    for number, length in zip(*(x.tolist() for x in torch.unique_consecutive(unit, return_counts=True)), strict=True):
        if lengths[number] and number != nobody:
            raise ValueError("Expected the rows of a unit to stand side by side. Sort the rows of each silo by unit.")
        lengths[number], starts[number], at = length, at, at + length
    return list(zip(starts[:nobody], lengths[:nobody], strict=True))


def _runs(spans: Sequence[tuple[int, int]]) -> tuple[tuple[int, int, int, int], ...]:
    runs: list[tuple[int, int, int, int]] = []
    for number, (start, length) in enumerate(spans):
        if runs:
            first, units, token, each = runs[-1]
            if each == length and (token + units * each == start or not length):
                runs[-1] = first, units + 1, token, each
                continue
        runs.append((number, 1, start, length))
    return tuple(runs)


def _windows(spans: Sequence[tuple[int, int]], tokens: int) -> tuple[tuple[Window, ...], list[int]]:
    """Windows, and the slots of the units' tokens; none where all units are equally long."""
    windows: list[Window] = []
    slots: list[int] = []
    at = 0
    for unit, (start, length) in enumerate(spans):
        if length:
            usual = min(_usual(length), tokens)
            token = min(start, tokens - usual)
            windows.append(Window(unit, at, token, usual))
            slots += range(at + start - token, at + start - token + length)
            at += usual
    return (tuple(windows) if len({length for _, length in spans}) > 1 else ()), slots


def _usual(length: int) -> int:
    """The least of STEP · 1, 1½, 2, 3, 4, 6, 8, 12, … that is not less."""
    power = STEP
    while 2 * power < length:
        power *= 2
    return next(usual for usual in (power, 3 * power // 2, 2 * power) if usual >= length)


class Workspace:
    """Memory that a step takes and gives back whole, for what it keeps from its forward to its backward pass.

    The system's allocator would return it after each step and fault every page in again: 4 % of a step.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.blocks: list[Tensor] = []
        self.touched: list[int] = []  # how many bytes of each block were ever taken: the rest costs no memory yet
        self.at = (0, 0)  # the block in use, and how many of its bytes are taken
        self.end: tuple[int, int] | None = None  # a block, and where in it begins what was taken from the end

    def reset(self) -> None:
        """Give back everything."""
        self.at, self.end = (0, 0), None

    def give_back(self, at: tuple[int, int]) -> None:
        """What was taken since `at`, but not from the end."""
        self.at = at

    def take(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, valid until it is given back."""
        size = dtype.itemsize * math.prod(shape)
        block, used = self.at
        while block < len(self.blocks) and used + size > len(self.blocks[block]):
            block, used = block + 1, 0
        if block == len(self.blocks):
            self.blocks.append(torch.empty(max(size, BLOCK), dtype=torch.uint8, device=self.device))
            self.touched.append(0)
        self.touched[block] = max(self.touched[block], used + size)
        self.at = block, used + -(-size // 64) * 64
        return self.blocks[block][used : used + size].view(dtype).view(shape)

    def take_from_end(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """The same, valid until all is given back; in memory of its own when too little was given back so far.

        The end is that of what was ever taken, so nothing becomes resident that was not.

        Between this and `reset`, `take` must not be called: it does not look where the end begins.
        """
        size = dtype.itemsize * math.prod(shape)
        block, end = self.end or (len(self.blocks) - 1, self.touched[-1])
        while block >= self.at[0]:
            start = (end - size) // 64 * 64
            if start >= (self.at[1] if block == self.at[0] else 0):
                self.end = block, start
                return self.blocks[block][start : start + size].view(dtype).view(shape)
            block, end = block - 1, self.touched[block - 1]
        return torch.empty(shape, dtype=dtype, device=self.device)


class Llama:
    """The step for one model. `weights` are taken in `dtype`; `names` are the trainable parameters, all of them LoRA's.
    LoRA's parameters that are not trained (`fixed`) keep their values, and have no gradient.

    Build it with `Llama.of`, which answers None for a model that this file does not cover.
    """

    def __init__(self, core: Any, dtype: torch.dtype, names: Mapping[nn.Parameter, str]) -> None:
        config, body = core.config, core.model
        self.dtype, self.eps = dtype, float(config.rms_norm_eps)
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.table, self.rotary = body.embed_tokens.weight, body.rotary_emb
        frozen = {x: f"fixed {i}" for i, x in enumerate(_lora_weights(core)) if x not in names}
        self.fixed = {name: x.detach()[None] for x, name in frozen.items()}
        self.layers = [self._layer(layer, {**names, **frozen}) for layer in body.layers]
        self.head = (core.lm_head.weight.detach() * body.norm.weight.detach()).to(dtype)
        self.space = Workspace(self.table.device)

    @staticmethod
    def of(core: Any, dtype: torch.dtype, names: Mapping[nn.Parameter, str]) -> Llama | None:
        """The step for `core` (a causal language model from transformers), or None where a part has no rule here."""
        return Llama(core, dtype, names) if _covers(core, names) else None

    def _layer(self, layer: Any, names: Mapping[nn.Parameter, str]) -> Layer:
        attention, mlp, dtype = layer.self_attn, layer.mlp, self.dtype
        first, second = layer.input_layernorm.weight.detach(), layer.post_attention_layernorm.weight.detach()
        return Layer(
            _product(
                [attention.q_proj, attention.k_proj, attention.v_proj],
                first,
                names,
                dtype,
                turned=(True, True, False),
                dim=self.dim,
            ),
            _product([attention.o_proj], None, names, dtype),
            _product([mlp.gate_proj, mlp.up_proj], second, names, dtype),
            _product([mlp.down_proj], None, names, dtype),
        )

    @torch.no_grad()
    def run(
        self, leaves: Mapping[str, Tensor], tokens: Tokens, *, gradient: bool, hits: bool = False,
        terms: Shallow | None = None,
    ) -> Outcome:  # fmt: skip
        """Losses of the targets, and with `gradient` that of their sum in every leaf, or of the goals that `terms` are
        of."""
        nll, hit, adapters = self._run(leaves, tokens, gradient, hits, None, terms)
        return Outcome(nll, hit, self._gradients(adapters))

    @torch.no_grad()
    def clipped(
        self, leaves: Mapping[str, Tensor], tokens: Tokens, units: Sequence[Tensor], clippings: Sequence[Clipping],
        terms: Shallow | None = None,
    ) -> ClippedSums:  # fmt: skip
        """Sums of the units' clipped gradients, each that of the mean loss of the unit's targets, or of the goal that
        `terms` are of; see `Clipping`.

        `units`: for each silo, the unit of each of its rows: 0 … n_k − 1 ascending, −1 for a row that is nobody's;
        rows that are missing at the end are nobody's. `clippings`: one for each silo, with the same parts.

        A unit's gradient is clipped as it is stored, in the compute dtype: rounding comes before the norm, and what a
        unit adds keeps its bound up to the rounding of float32. A unit whose squared norm overflows float32 adds zero.
        """
        whose = lay_out_units(tokens, units)
        nll, adapters, squares = self._each(leaves, tokens, whose, clippings[0], terms)
        if whose.windows and not bool(torch.isfinite(squares).all()):  # it may be its neighbour's: once more, apart
            nll, adapters, squares = self._each(leaves, tokens, replace(whose, windows=()), clippings[0], terms)
        if terms is not None:
            squares = squares + terms.squares(clippings)
        alone = squares.split(whose.counts)
        factors = [clipping.factors(x) for clipping, x in zip(clippings, alone, strict=True)]
        weights = [torch.block_diag(*(f[None, :, j] for f in factors)) for j in range(squares.shape[1])]
        unsound = (~torch.isfinite(squares).all(1)).nonzero()[:, 0]
        for adapter in adapters:
            adapter.add_up(weights, clippings[0], unsound)
        owner = tokens.predicts.div(len(tokens.ids) // tokens.silos, rounding_mode="floor")
        return ClippedSums(
            self._gradients(adapters) | (terms.sums(clippings, factors) if terms else {}),
            [x.sqrt().float() for x in alone],
            sums(nll, owner, tokens.silos),
            torch.bincount(owner, minlength=tokens.silos),
        )

    def _each(
        self, leaves: Mapping[str, Tensor], tokens: Tokens, units: Units, clipping: Clipping, terms: Shallow | None
    ) -> tuple[Tensor, list[_Adapter], Tensor]:
        """Losses, adapters that know their units' gradients, and the (N, parts) squared norms of these."""
        nll, _, adapters = self._run(leaves, tokens, True, False, units, terms)
        squares = [{n: x for n, x in adapter.squares.items() if n not in self.fixed} for adapter in adapters]
        return nll, adapters, _by_part(squares, units, clipping)

    def _gradients(self, adapters: Sequence[_Adapter]) -> dict[str, Tensor]:
        found = {name: g for adapter in adapters for name, g in adapter.gradients().items()}
        return {name: g for name, g in found.items() if name not in self.fixed}

    def _run(
        self, leaves: Mapping[str, Tensor], tokens: Tokens, gradient: bool, hits: bool, units: Units | None,
        terms: Shallow | None,
    ) -> tuple[Tensor, Tensor | None, list[_Adapter]]:  # fmt: skip
        """Losses, hits, and the adapters; with `gradient`, these know their gradients: the silo's, or its units'."""
        self.space.reset()
        leaves = {**leaves, **{n: x.expand(tokens.silos, *x.shape[1:]) for n, x in self.fixed.items()}}
        x = F.embedding(tokens.ids, self.table).float()
        turn = self._angles(tokens, x)
        adapters = [
            [_Adapter(p, leaves, tokens.silos, self.dtype, self.space, units) for p in _products(layer)]
            for layer in self.layers
        ]
        kept, ends = [], []
        for layer, adapter in zip(self.layers, adapters, strict=True):
            x, saved = self._forward(layer, adapter, x, tokens, turn, gradient)
            kept.append(saved)
            ends.append(self.space.at)
        last, inverse = self._normal(x)
        states = last if len(tokens.predicts) == len(last) else last.index_select(0, tokens.predicts)
        nll, slope, hit = self._judged(states, tokens, gradient, hits)
        flat = [adapter for layer in adapters for adapter in layer]
        if slope is None:
            return nll, hit, flat
        g = torch.zeros_like(x)
        into = torch.zeros_like(last).index_copy_(0, tokens.predicts, slope)
        weights = inverse if units is None else inverse * units.shares
        self._normal_backward(into, last, weights if terms is None else weights * terms.scales, g)
        if terms is not None:
            self._normal_backward(terms.slope(last), last, inverse, g)
        if not any(adapter.product.loras for adapter in flat):
            return nll, hit, flat
        for depth in reversed(range(len(self.layers))):
            self.space.give_back(ends[depth])
            self._backward(self.layers[depth], adapters[depth], g, kept.pop(), tokens, turn, deepest=depth == 0)
        return nll, hit, flat

    def _judged(
        self, states: Tensor, tokens: Tokens, gradient: bool, hits: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """`head.forward` of all silos, each with its own bias where there are some."""
        if tokens.bias is None:
            return head.forward(states, self.head, None, tokens.targets, gradient=gradient, hits=hits)
        owner = tokens.predicts.div(len(tokens.ids) // tokens.silos, rounding_mode="floor")
        counts = torch.bincount(owner, minlength=tokens.silos).tolist()
        biases = tokens.bias.to(self.dtype).expand(tokens.silos, -1)
        own = zip(states.split(counts), biases, tokens.targets.split(counts), strict=True)
        parts = [head.forward(x, self.head, b, t, gradient=gradient, hits=hits) for x, b, t in own]
        nll, slope, hit = zip(*parts, strict=True)
        return torch.cat(nll), torch.cat(slope) if gradient else None, torch.cat(hit) if hits else None

    def _forward(
        self, layer: Layer, adapter: Sequence[_Adapter], x: Tensor, tokens: Tokens, turn: Turn, keep: bool
    ) -> tuple[Tensor, tuple]:
        """One decoder layer; `x` (K·T, width) float32 is overwritten with the result."""
        mark = self.space.at
        x1, r1 = self._normal(x)
        qkv, t1 = self._apply(layer.qkv, adapter[0], x1)
        mixed, attention = self._attend(qkv, tokens, turn)
        y, t2 = self._apply(layer.o, adapter[1], mixed)
        x.add_(y)
        x2, r2 = self._normal(x)
        room = self.space.take(len(x), len(layer.gate_up.weight), dtype=self.dtype)
        gate_up, t3 = self._apply(layer.gate_up, adapter[2], x2, room)
        gate, up = gate_up.chunk(2, -1)
        switch = torch.ops.aten.silu.out(gate, out=self.space.take(*gate.shape, dtype=self.dtype))
        y, t4 = self._apply(layer.down, adapter[3], switch * up)
        x.add_(y)
        if not keep:
            self.space.give_back(mark)
            return x, ()
        return x, (x1, r1, t1, attention, mixed, t2, x2, r2, t3, gate_up, switch, t4)

    def _backward(
        self, layer: Layer, adapter: Sequence[_Adapter], g: Tensor, kept: tuple, tokens: Tokens, turn: Turn, *,
        deepest: bool,
    ) -> None:  # fmt: skip
        """The same layer back: `g`, float32, is the gradient of its output and becomes that of its input, in place."""
        x1, r1, t1, attention, mixed, t2, x2, r2, t3, gate_up, switch, t4 = kept
        gate, up = gate_up.chunk(2, -1)
        d_act = self._pull(layer.down, adapter[3], g.to(self.dtype), switch * up, t4)
        d_gate_up = torch.empty_like(gate_up)
        torch.mul(d_act, switch, out=d_gate_up[:, up.shape[1] :])
        torch.ops.aten.silu_backward.grad_input(d_act.mul_(up), gate, grad_input=d_gate_up[:, : up.shape[1]])
        self._normal_backward(self._pull(layer.gate_up, adapter[2], d_gate_up, x2, t3), x2, r2, g)
        d_mixed = self._pull(layer.o, adapter[1], g.to(self.dtype), mixed, t2)
        d_qkv = self._attend_backward(d_mixed, attention, tokens, turn)
        if deepest:
            adapter[0].learn(d_qkv, x1, t1)
        else:
            self._normal_backward(self._pull(layer.qkv, adapter[0], d_qkv, x1, t1), x1, r1, g)

    def _normal(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x / rms x in the compute dtype, 1 / rms x in float32); the norm's weight is in the next product."""
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(self.eps).rsqrt_()
        return torch.mul(x, r, out=self.space.take(*x.shape, dtype=self.dtype)), r

    def _normal_backward(self, g: Tensor, y: Tensor, r: Tensor, total: Tensor) -> None:
        """total += r · (g − y · mean(g · y)), with g the gradient of y = x · r."""
        inner = (g * y).sum(-1, keepdim=True, dtype=torch.float32).div_(-y.shape[-1])
        total.addcmul_(g.float().addcmul_(y, inner), r)

    def _apply(
        self, product: Product, adapter: _Adapter, x: Tensor, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x W' + (x A') B', in `out` if given, and x A'."""
        if product.bias is None:
            out = torch.mm(x, product.weight.t(), out=out)
        else:
            out = torch.addmm(product.bias, x, product.weight.t(), out=out)
        return out, adapter.add(out, x)

    def _pull(self, product: Product, adapter: _Adapter, g: Tensor, x: Tensor, t: Tensor | None) -> Tensor:
        """The gradient of `x`, given `g` of its product; those of A and B stay with the adapter."""
        d = torch.mm(g, product.weight)
        pulled = adapter.learn(g, x, t)
        if pulled is not None:
            adapter.push(d, pulled)
        return d

    def _angles(self, tokens: Tokens, x: Tensor) -> Turn:
        """Rotary tables, those of the queries with 1/√d in them, and the causal mask."""
        positions = torch.arange(tokens.length, device=x.device)[None]
        cos, sin = (t[0, :, : self.dim // 2].float() for t in self.rotary(x, positions))
        keys = torch.complex(cos, sin)
        bias = torch.full((tokens.length, tokens.length), float("-inf"), device=x.device).triu_(1)
        return Turn(keys, keys * self.dim**-0.5, bias.repeat(self.heads // self.key_heads, 1))

    def _attend(self, qkv: Tensor, tokens: Tokens, turn: Turn) -> tuple[Tensor, tuple]:
        """Causal attention; (K·T, (h + 2n)·d) to (K·T, h·d)."""
        n, d, s, rows = self.key_heads, self.dim, tokens.length, tokens.rows
        group = self.heads // n
        padded = qkv if tokens.spread is None else qkv.index_select(0, tokens.spread)
        q, k, v = padded.view(rows, s, -1, d).split([self.heads, n, n], 2)
        q = q.unflatten(2, (n, group)).permute(0, 2, 3, 1, 4)  # rows n group s d
        q = _rotate(q, turn.queries).view(rows * n, group * s, d)
        k = _rotate(k.transpose(1, 2), turn.keys).view(rows * n, s, d)
        v = self.space.take(rows, n, s, d, dtype=self.dtype).copy_(v.transpose(1, 2)).view(rows * n, s, d)
        p = self.space.take(rows * n, group * s, s, dtype=self.dtype) if s <= KEPT else None
        out = torch.empty(rows * n, group * s, d, dtype=self.dtype, device=v.device)
        for part in _parts(tokens, rows * n, group):
            weights = _probabilities(q[part], k[part], turn)
            weights = weights.to(self.dtype) if p is None else p[part].copy_(weights)
            torch.bmm(weights, v[part], out=out[part])
        mixed = self.space.take(rows * s, self.heads * d, dtype=self.dtype)
        mixed.view(rows, s, n, group, d).copy_(out.view(rows, n, group, s, d).permute(0, 3, 1, 2, 4))
        if tokens.gather is not None:
            mixed = mixed.index_select(0, tokens.gather)
        q = self.space.take(*q.shape, dtype=self.dtype).copy_(q)
        k = self.space.take(*k.shape, dtype=self.dtype).copy_(k)
        return mixed, (q, k, v, p)

    def _attend_backward(self, g: Tensor, kept: tuple, tokens: Tokens, turn: Turn) -> Tensor:
        """The gradient of `qkv`, given `g` of the heads' outputs."""
        q, k, v, p = kept
        n, d, s, rows = self.key_heads, self.dim, tokens.length, tokens.rows
        group = self.heads // n
        if tokens.spread is not None:
            g = g.index_select(0, tokens.spread).masked_fill_(tokens.hole, 0)
        g = g.view(rows, s, n, group, d).permute(0, 2, 3, 1, 4).reshape(rows * n, group * s, d)
        d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for part in _parts(tokens, rows * n, group):
            weights = p[part] if p is not None else _probabilities(q[part].float(), k[part].float(), turn).to(q.dtype)
            torch.bmm(weights.transpose(1, 2), g[part], out=d_v[part])
            d_p = torch.bmm(g[part], v[part].transpose(1, 2))
            d_s = torch.ops.aten._softmax_backward_data(d_p, weights, -1, weights.dtype)
            torch.bmm(d_s, k[part], out=d_q[part])
            torch.bmm(d_s.transpose(1, 2), q[part], out=d_k[part])
        d_q = _rotate(d_q.view(rows, n, group, s, d), torch.conj_physical(turn.queries))
        d_k = _rotate(d_k.view(rows, n, s, d), torch.conj_physical(turn.keys))
        out = torch.empty(rows, s, self.heads + 2 * n, d, dtype=self.dtype, device=g.device)
        out[:, :, : self.heads].unflatten(2, (n, group)).copy_(d_q.permute(0, 3, 1, 2, 4))
        out[:, :, self.heads : self.heads + n].copy_(d_k.transpose(1, 2))
        out[:, :, self.heads + n :].copy_(d_v.view(rows, n, s, d).transpose(1, 2))
        out = out.view(rows * s, -1)
        if tokens.gather is not None:
            out = out.index_select(0, tokens.gather)
            if tokens.spare is not None:
                out.masked_fill_(tokens.spare, 0)
        return out


@dataclass(frozen=True)
class Outcome:
    """`nll`: (p,) float32. `hits`: (p,) bool or None. `gradients`: of the sum of `nll`, by leaf; {} unless asked
    for."""

    nll: Tensor
    hits: Tensor | None
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Turn:
    """What attention does to positions. The keys' rotations, and the queries' with 1/√d in them: complex, (s, d / 2);
    the causal mask of the queries of one key head: (group · s, s)."""

    keys: Tensor
    queries: Tensor
    bias: Tensor


class _Adapter:
    """K silos' LoRA of one fused product: all A as (K, R, in), all B as a block-diagonal (K, out, R), in the compute
    dtype.

    Gradients: `d_a` and `d_b` of the silos, in float32 and the same shapes; before them, when there are units,
    `each_a` (N, R, in) and `each_b` (N, R, out) of these, in the compute dtype.
    """

    def __init__(
        self, product: Product, leaves: Mapping[str, Tensor], silos: int, dtype: torch.dtype, space: Workspace,
        units: Units | None,
    ) -> None:  # fmt: skip
        self.product, self.leaves, self.silos, self.space, self.units = product, leaves, silos, space, units
        self.squares: dict[str, Tensor] = {}
        self.d_a: Tensor | None = None
        if not product.loras:
            return
        a = torch.cat([leaves[lora.a] for lora in product.loras], 1)
        self.a = (a if product.fold is None else a * product.fold).to(dtype)
        self.b = torch.zeros(silos, len(product.weight), a.shape[1], dtype=dtype, device=a.device)
        for lora, ranks in self._blocks():
            b = leaves[lora.b] if lora.order is None else leaves[lora.b].index_select(1, lora.order)
            torch.mul(b, lora.scale, out=self.b[:, lora.start : lora.stop, ranks])

    def add(self, y: Tensor, x: Tensor) -> Tensor | None:
        """y += (x A') B'; returns x A'."""
        if not self.product.loras:
            return None
        t = _matmul(self._by_silo(x), self.a.transpose(1, 2))
        _add_matmul(self._by_silo(y), t, self.b.transpose(1, 2))
        return t

    def learn(self, g: Tensor, x: Tensor, t: Tensor | None) -> Tensor | None:
        """Keeps the gradients of A and B; returns that of x A'."""
        if t is None:
            return None
        g = self._by_silo(g)
        pulled = _matmul(g, self.b)
        if self.units is None:
            self.d_a = _matmul(pulled.transpose(1, 2), self._by_silo(x)).float()
            self.d_b = _matmul(g.transpose(1, 2), t).float()
        else:
            self._learn_each(self.units, g.flatten(0, 1), x, t.flatten(0, 1), pulled.flatten(0, 1))
        return pulled

    def _learn_each(self, units: Units, g: Tensor, x: Tensor, t: Tensor, pulled: Tensor) -> None:
        """The gradients of every unit, and the squared norms (N,) of those of each leaf."""
        count, ranks = sum(units.counts), t.shape[1]
        room = [self.space.take_from_end(count, ranks, y.shape[1], dtype=x.dtype) for y in (x, g)]
        self.each_a, self.each_b = units.products(pulled, x, room[0]), units.products(t, g, room[1])
        for lora, ranks_here in self._blocks():
            a, b = self._leaves_of_each(lora, ranks_here)
            a = a.float() if self.product.fold is None else a * self.product.fold
            self.squares[lora.a] = _square(a)
            self.squares[lora.b] = _square(b.float()) * lora.scale**2

    def add_up(self, weights: Sequence[Tensor], clipping: Clipping, unsound: Tensor) -> None:
        """From units to silos. `weights`: for each part, (K, N). `unsound`: units whose numbers must not enter a
        sum."""
        if not self.squares:
            return
        for each in (self.each_a, self.each_b):
            each.index_fill_(0, unsound, 0)  # zero times NaN is NaN
        self.d_a = self.a.new_empty(self.a.shape, dtype=torch.float32)
        self.d_b = self.b.new_empty(self.b.shape, dtype=torch.float32)
        for lora, ranks in self._blocks():
            a, b = self._leaves_of_each(lora, ranks)
            self.d_a[:, ranks] = _weighted(weights[clipping.part(lora.a)], a)
            self.d_b[:, lora.start : lora.stop, ranks] = _weighted(weights[clipping.part(lora.b)], b).transpose(1, 2)

    def _leaves_of_each(self, lora: Lora, ranks: slice) -> tuple[Tensor, Tensor]:
        """One adapter's A (N, r, in) and B (N, r, out) of every unit, before norm weight and scale."""
        return self.each_a[:, ranks], self.each_b[:, ranks, lora.start : lora.stop]

    def push(self, d: Tensor, pulled: Tensor) -> None:
        """d += (gradient of x A') A."""
        _add_matmul(self._by_silo(d), pulled, self.a)

    def gradients(self) -> dict[str, Tensor]:
        """By leaf, float32, in its shape."""
        if self.d_a is None:
            return {}
        d_a = self.d_a if self.product.fold is None else self.d_a * self.product.fold
        out = {}
        for lora, ranks in self._blocks():
            out[lora.a] = d_a[:, ranks]
            d_b = self.d_b[:, lora.start : lora.stop, ranks] * lora.scale
            out[lora.b] = d_b if lora.order is None else d_b.index_select(1, lora.order.argsort())
        return out

    def _blocks(self) -> list[tuple[Lora, slice]]:
        blocks, start = [], 0
        for lora in self.product.loras:
            stop = start + self.leaves[lora.a].shape[1]
            blocks.append((lora, slice(start, stop)))
            start = stop
        return blocks

    def _by_silo(self, x: Tensor) -> Tensor:
        return x.view(self.silos, -1, x.shape[-1])


class Losses(torch.autograd.Function):
    """(K,) sums of the targets' losses as a function of the leaves, for autograd; gradients were made with the
    losses."""

    @staticmethod
    def forward(ctx: Any, step: Llama, tokens: Tokens, owner: Tensor, names: Sequence[str], *leaves: Tensor) -> Tensor:
        outcome = step.run(dict(zip(names, leaves, strict=True)), tokens, gradient=True)
        ctx.save_for_backward(*(outcome.gradients[name] for name in names))
        return sums(outcome.nll, owner, tokens.silos)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, None, *(d * g.view(-1, *[1] * (d.dim() - 1)) for d in ctx.saved_tensors)


class Totals(torch.autograd.Function):
    """(K,) values of the silos' goals as a function of the leaves, for autograd, as `Losses`; and their
    sums of losses."""

    @staticmethod
    def forward(
        ctx: Any, step: Llama, tokens: Tokens, owner: Tensor, terms: Shallow, names: Sequence[str], *leaves: Tensor
    ) -> tuple[Tensor, Tensor]:
        outcome = step.run(dict(zip(names, leaves, strict=True)), tokens, gradient=True, terms=terms)
        gradients = outcome.gradients | terms.gradients()
        ctx.save_for_backward(*(gradients[name] for name in names))
        losses = sums(outcome.nll, owner, tokens.silos)
        ctx.mark_non_differentiable(losses)
        return losses * terms.scales.view(tokens.silos, -1)[:, 0] + terms.values, losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, None, None, *(d * g.view(-1, *[1] * (d.dim() - 1)) for d in ctx.saved_tensors)


def sums(x: Tensor, owner: Tensor, silos: int) -> Tensor:
    """(K,) sums of `x` by `owner`, whose values ascend: each a contiguous run, so the order of addition is fixed."""
    counts = torch.bincount(owner, minlength=silos).tolist()
    return torch.stack([part.sum() for part in x.split(counts)])


def _product(
    linears: Sequence[Any], fold: Tensor | None, names: Mapping[nn.Parameter, str], dtype: torch.dtype, *,
    turned: Sequence[bool] = (), dim: int = 0,
) -> Product:  # fmt: skip
    """`turned`: linear layers whose outputs go through the rotary embedding, in heads of `dim`."""
    weights, biases, loras, start = [], [], [], 0
    for i, linear in enumerate(linears):
        base = getattr(linear, "base_layer", linear)
        order = _pairs(len(base.weight), dim, base.weight.device) if any(turned[i : i + 1]) else None
        stop = start + len(base.weight)
        bias = base.weight.new_zeros(len(base.weight)) if base.bias is None else base.bias.detach()
        weights.append(_rows(base.weight.detach(), order))
        biases.append(_rows(bias, order))
        if base is not linear:
            (adapter,) = linear.active_adapters
            a, b = linear.lora_A[adapter].weight, linear.lora_B[adapter].weight
            loras.append(Lora(names[a], names[b], float(linear.scaling[adapter]), start, stop, order))
        start = stop
    weight, bias = torch.cat(weights), torch.cat(biases)
    weight = weight if fold is None else weight * fold
    return Product(weight.to(dtype), bias.to(dtype) if bool(bias.any()) else None, fold, tuple(loras))


def _pairs(size: int, dim: int, device: torch.device) -> Tensor:
    """The order of a projection's outputs in which the two halves of each head alternate: (size,)."""
    return torch.arange(size, device=device).view(-1, 2, dim // 2).transpose(1, 2).reshape(-1)


def _rows(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else x.index_select(0, order)


def _products(layer: Layer) -> tuple[Product, ...]:
    return layer.qkv, layer.o, layer.gate_up, layer.down


def _covers(core: Any, names: Mapping[nn.Parameter, str]) -> bool:
    """Whether every part of this model is one that `Llama` computes, and every trainable parameter is LoRA's."""
    config = core.config
    if getattr(config, "model_type", "") not in FAMILIES or getattr(config, "hidden_act", "") != "silu":
        return False
    if not hasattr(core, "lm_head") or type(core.lm_head) is not nn.Linear or core.lm_head.bias is not None:
        return False
    if type(core.model.embed_tokens) is not nn.Embedding:
        return False
    kinds = getattr(config, "layer_types", None) or []
    if getattr(config, "sliding_window", None) is not None and (not kinds or set(kinds) != {"full_attention"}):
        return False
    for layer in core.model.layers:
        if layer._forward_hooks:  # the bridge of a cut (`cut.py`)
            return False
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
                       mlp.gate_proj, mlp.up_proj, mlp.down_proj):  # fmt: skip
            if type(linear) is nn.Linear:
                continue
            if not _plain_lora(linear):
                return False
    return set(names) <= set(_lora_weights(core))


def _lora_weights(core: Any) -> list[nn.Parameter]:
    """LoRA's parameters in the decoder layers, trained or not."""
    layers = [module for layer in core.model.layers for module in layer.modules() if hasattr(module, "lora_A")]
    return [half[name].weight for x in layers for half in (x.lora_A, x.lora_B) for name in half]


def _plain_lora(linear: Any) -> bool:
    """A PEFT LoRA layer over nn.Linear: one active adapter, no dropout, no bias, none of the variants."""
    if type(getattr(linear, "base_layer", None)) is not nn.Linear or len(getattr(linear, "active_adapters", ())) != 1:
        return False
    (adapter,) = linear.active_adapters
    return (
        adapter in getattr(linear, "lora_A", {})
        and type(linear.lora_dropout[adapter]) is nn.Identity
        and linear.lora_B[adapter].bias is None
        and not linear.merged
        and not getattr(linear, "lora_variant", {})
    )


def _parts(tokens: Tokens, count: int, group: int) -> list[slice]:
    """Which of the `count` (row, key head) pairs are attended to at a time: all, where their scores are kept."""
    step = count if tokens.length <= KEPT else max(1, SCORES // (group * tokens.length**2))
    return [slice(start, start + step) for start in range(0, count, step)]


def _probabilities(q: Tensor, k: Tensor, turn: Turn) -> Tensor:
    """Softmax of causal scores, float32."""
    scores = torch.baddbmm(turn.bias.expand(len(q), *turn.bias.shape), q, k.transpose(1, 2))
    return torch.softmax(scores, -1, out=scores)


def _rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary embedding of pairs that stand side by side, in float32 and contiguous. `turn`: complex, (s, d / 2)."""
    pairs = torch.empty(x.shape, dtype=torch.float32, device=x.device).copy_(x).unflatten(-1, (-1, 2))
    return torch.view_as_real(torch.view_as_complex(pairs).mul_(turn)).flatten(-2)


def _by_part(squares: Sequence[Mapping[str, Tensor]], units: Units, clipping: Clipping) -> Tensor:
    """(N, parts) float64, from the (N,) squared norms of each leaf."""
    device = units.shares.device
    total = torch.zeros(sum(units.counts), len(clipping.norms), dtype=torch.float64, device=device)
    for adapter in squares:
        for name, square in adapter.items():
            total[:, clipping.part(name)] += square
    return total


def _square(x: Tensor) -> Tensor:
    """(N, ·, ·) to (N,) squared norms."""
    return torch.linalg.vector_norm(x, dim=(1, 2)).square_()


def _weighted(weights: Tensor, each: Tensor) -> Tensor:
    """(K, N) and (N, r, c) to (K, r, c) float32."""
    return (weights @ each.float().flatten(1)).view(len(weights), *each.shape[1:])


def _matmul(x: Tensor, y: Tensor) -> Tensor:
    """Batched over silos; one silo is a plain product, which is quicker."""
    return torch.mm(x[0], y[0])[None] if len(x) == 1 else torch.bmm(x, y)


def _add_matmul(out: Tensor, x: Tensor, y: Tensor) -> None:
    if len(out) == 1:
        out[0].addmm_(x[0], y[0])
    else:
        out.baddbmm_(x, y)
