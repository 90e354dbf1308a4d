"""The span check: exact texts from gradients, after DAGER (Petrov et al. 2024, NeurIPS).

The gradient of a linear layer is a sum over tokens of outer products, Σ g_t x_tᵀ, so its rows lie in the span of the
layer's inputs x_t. Where there are fewer tokens than dimensions, a vector that was no input lies outside. Into the
first block go embeddings: each token of the vocabulary is tried. Into the second go sums over a prefix: prefixes grow
token by token, and only those inside the span stay. LoRA has two spans: A's gradient has that of the inputs x_t, and
B's, when B is still zero and A's gradient with it, that of the A x_t.

Unlike there, candidates are ranked by their distance from the span and not only compared with a threshold, and the
attacker knows how long each row is: a defence must hold without relying on what an attacker may learn elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import ModelError
from ..lm.bench import Bench
from ..types import Params

Prefix = tuple[int, ...]

CHUNK = 1 << 14  # rows of a probe at once
CLEAN = 0.02  # a candidate this near to the span is kept whatever the others are
WORK = 1 << 22  # tokens that prefixes may be tried with; see `span_check`
COPY = 0.5  # the least distance of a token that only copies an earlier one; see `_news`


@dataclass(frozen=True)
class View:
    """One span. `module`: the layer whose inputs are compared; `into`: what they are mapped by first, (f, d), or None;
    `basis`: (f, k) with orthonormal columns.
    """

    module: str
    into: np.ndarray | None
    basis: np.ndarray

    def distances(self, inputs: np.ndarray) -> np.ndarray:
        """How far each of (n, d) inputs is from the span, relative to its length: (n,), in [0, 1]."""
        features = inputs if self.into is None else inputs @ self.into.T
        length = np.linalg.norm(features, axis=1)
        inside = np.linalg.norm(features @ self.basis, axis=1)
        return np.sqrt(np.clip(1.0 - (inside / np.maximum(length, 1e-12)) ** 2, 0.0, 1.0))


def span_bag(bench: Bench, params: Params, sent: Params, lengths: Sequence[int]) -> list[int]:
    """The tokens nearest to the span of the first block, at most as many as the rows have."""
    first = _views(bench, params, sent, sum(lengths))[0]
    if not first:
        return []
    table = _near(bench, params, first, lengths)
    best = sorted((distance, token) for place in table for token, distance in place.items())
    return list(dict.fromkeys(token for _, token in best))[: sum(lengths)]


def span_check(bench: Bench, params: Params, sent: Params, lengths: Sequence[int], work: int = WORK) -> list[Prefix]:
    """The rows that `sent` was computed from, as far as the span tells; at most one for each of `lengths`.

    `sent`: the mean gradient, by parameter. `lengths`: how many tokens of each row enter the loss's gradient: all but
    the last. `work`: how many tokens may go through the first block; when they are spent, rows stay as short as they
    are then. Four million take some minutes with SmolLM2-135M. Empty when nothing of the first two blocks was trained,
    or nothing was sent for it. Raises `ModelError` for a model that is not causal: there, an input of the second block
    depends on the whole row.
    """
    if bench.objective.task != "causal-lm":
        do = "Use the token bag, or the optimising attacks."
        raise ModelError("a causal language model for the span check", f"the task {bench.objective.task}", do)
    first, second = _views(bench, params, sent, sum(lengths))
    if not first or not second:
        return []
    return _grow(bench, params, second, _near(bench, params, first, lengths), lengths, work)


# ---- spans of what was sent ----


def _views(bench: Bench, params: Params, sent: Params, tokens: int) -> tuple[list[View], list[View]]:
    """The spans of the inputs of the first two blocks' first layers."""
    blocks = [_first_layers(bench, params, names) for names in _by_block(bench, sent)[:2]]
    views = [_views_of(bench, params, sent, modules, tokens) for modules in blocks]
    return views[0] if views else [], views[1] if len(views) > 1 else []


def _by_block(bench: Bench, sent: Params) -> list[list[str]]:
    """The names of the trained linear layers of each block, in the model's order."""
    blocks: dict[str, list[str]] = {}
    for name, module in bench.model.named_modules():
        numbers = [word for word in name.split(".") if word.isdecimal()]
        trained = f"{name}.lora_A.default.weight" in sent or _gradient(module, name, sent) is not None
        if numbers and trained and ".lora_" not in name:
            blocks.setdefault(numbers[0], []).append(name)
    return [blocks[number] for number in sorted(blocks, key=int)]


def _first_layers(bench: Bench, params: Params, names: Sequence[str]) -> list[str]:
    """Those of a block's layers that take the very same input as its first one, such as query, key and value."""
    seen: dict[str, Tensor] = {}  # kept, so that no later input takes the same place in memory
    _run(bench, params, torch.zeros(1, 2, dtype=torch.long), names, lambda name, x: seen.update({name: x}))
    return [name for name in names if name in seen and seen[name].data_ptr() == seen[names[0]].data_ptr()]


def _views_of(bench: Bench, params: Params, sent: Params, modules: Sequence[str], tokens: int) -> list[View]:
    """A's gradients and full ones share one span in the inputs' space; B's have one each in that of A's outputs."""
    whole = [x for name in modules if (x := _input_gradient(bench, sent, name)) is not None and np.any(x)]
    if whole:
        return [View(modules[0], None, _basis(np.concatenate(whole), tokens))]
    halves = [name for name in modules if np.any(sent.get(f"{name}.lora_B.default.weight", 0.0))]
    views = [
        View(modules[0], params[f"{name}.lora_A.default.weight"].astype(np.float64),
             _basis(sent[f"{name}.lora_B.default.weight"], tokens))
        for name in halves
    ]  # fmt: skip
    return _widest(views, [sent[f"{name}.lora_B.default.weight"].shape[0] for name in halves])


def _widest(views: Sequence[View], outputs: Sequence[int]) -> list[View]:
    """The views that hold most inputs. One as wide as its layer has outputs may lack some, and a query's lacks the
    first token of every row, which has one key and so no gradient.
    """
    whole = [view for view, most in zip(views, outputs, strict=True) if view.basis.shape[1] < most] or list(views)
    widest = max((view.basis.shape[1] for view in whole), default=0)
    return [view for view in whole if view.basis.shape[1] == widest]


def _input_gradient(bench: Bench, sent: Params, name: str) -> np.ndarray | None:
    """(rows, d_in): a gradient whose rows are in the span of the layer's inputs."""
    if (half := sent.get(f"{name}.lora_A.default.weight")) is not None:
        return half
    return _gradient(bench.model.get_submodule(name), name, sent)


def _gradient(module: nn.Module, name: str, sent: Params) -> np.ndarray | None:
    """The gradient of a plain linear layer's weight, with a column for each input; None for any other module."""
    gradient = sent.get(f"{name}.weight")
    if gradient is None or gradient.ndim != 2 or isinstance(module, nn.Embedding):
        return None
    return gradient.T if type(module).__name__ == "Conv1D" else gradient


def _basis(gradient: np.ndarray, tokens: int) -> np.ndarray:
    """(d, k): an orthonormal basis of the rows, of the strongest `tokens` directions at most; one is always left out,
    since in a span that is everything nothing can be told."""
    _, sizes, directions = np.linalg.svd(np.asarray(gradient, np.float64), full_matrices=False)
    rank = int((sizes > 1e-6 * sizes[0]).sum()) if sizes[0] > 0 else 0
    return directions[: min(rank, tokens, gradient.shape[1] - 1)].T


# ---- tokens, then prefixes ----


def _near(bench: Bench, params: Params, views: Sequence[View], lengths: Sequence[int]) -> list[dict[int, float]]:
    """For each place of a row, the tokens that may stand there with their distance from the first block's span.

    Learned positions enter the first block, so there each place has tokens of its own, at most one a row; rotary ones
    do not, and all places share at most as many as the rows have tokens.
    """
    longest = max(lengths)
    places = range(longest if _has_positions(bench, params, views[0].module) else 1)
    found = []
    for place in places:
        distances = np.concatenate(
            [_distances(views, x[:, -1]) for x in _tokens_at(bench, params, views[0].module, place)]
        )
        most = sum(length > place for length in lengths) if len(places) > 1 else sum(lengths)
        found.append(_best(distances, most))
    return found if len(places) > 1 else found * longest


def _best(distances: np.ndarray, most: int) -> dict[int, float]:
    order = np.argsort(distances, kind="stable")[:most]
    limit = max(CLEAN, 10 * float(distances[order[0]]))
    return {int(token): float(distances[token]) for token in order if distances[token] <= limit}


def _grow(
    bench: Bench, params: Params, views: Sequence[View], near: Sequence[dict[int, float]], lengths: Sequence[int],
    work: int,
) -> list[Prefix]:  # fmt: skip
    """Prefixes, longer by a token in every turn; as many are kept as rows are that long.

    Rows begin with the token that the tokenizer puts there, if it does, and hold no other special one.
    """
    special, opening = set(bench.base.tokenizer.all_special_ids), _opening(bench)
    prefixes: dict[Prefix, float] = {opening: 0.0}
    kept = [prefixes] * len(opening)
    for place in range(len(opening), len(near)):
        longer = [(*prefix, token) for prefix in prefixes for token in near[place] if token not in special]
        work -= len(longer) * (place + 1)
        if not longer or work < 0:
            break
        inputs = _inputs(bench, params, views[0].module, torch.tensor(longer), None)
        distances = np.concatenate([_news(views, x) for x in inputs])
        prefixes = _nearest(longer, distances, sum(length > place for length in lengths))
        kept.append(prefixes)
    return _chosen(kept, lengths)


def _opening(bench: Bench) -> Prefix:
    """What the tokenizer puts before every text: a token or none."""
    return tuple(token for token in bench.base.tokenizer("")["input_ids"] if token == bench.base.tokenizer.bos_token_id)


def _nearest(prefixes: Sequence[Prefix], distances: np.ndarray, most: int) -> dict[Prefix, float]:
    order = np.argsort(distances, kind="stable")[:most]
    return {prefixes[i]: float(distances[i]) for i in order}


def _chosen(kept: Sequence[dict[Prefix, float]], lengths: Sequence[int]) -> list[Prefix]:
    """One prefix for each row, the longest rows first; what a chosen one begins with is no row of its own."""
    chosen: list[Prefix] = []
    for length in sorted(lengths, reverse=True):
        at = kept[min(length, len(kept)) - 1] if kept else {}
        free = [prefix for prefix in at if not any(row[: len(prefix)] == prefix for row in chosen)]
        chosen += free[:1]
    return chosen


def _distances(views: Sequence[View], inputs: np.ndarray) -> np.ndarray:
    """The root mean square of the distances of (n, d) from all spans: (n,)."""
    return np.sqrt(np.mean([np.square(view.distances(inputs)) for view in views], axis=0))


def _news(views: Sequence[View], inputs: np.ndarray) -> np.ndarray:
    """The distances of the last of (n, places, d), divided by how much it differs from those before it: (n,).

    Attention over copies gives a copy, so a repeated token is near the span only because an earlier one is. It is
    pushed back up to `COPY`, though not so far that a text with "no no" would be lost.
    """
    last = inputs[:, -1:]
    distances = _distances(views, last[:, 0])
    if inputs.shape[1] == 1:
        return distances
    steps = np.linalg.norm(last - inputs[:, :-1], axis=2).min(1) / np.linalg.norm(last[:, 0], axis=1)
    return np.maximum(distances, np.minimum(COPY, distances / np.maximum(steps, 1e-6)))


# ---- inputs of a layer ----


def _has_positions(bench: Bench, params: Params, module: str) -> bool:
    """Whether a token's place shows in the input of the first block."""
    ids = torch.full((1, 1), 5)
    here, there = (next(_inputs(bench, params, module, ids, torch.full((1, 1), place))) for place in (0, 1))
    return not np.allclose(here, there)


def _tokens_at(bench: Bench, params: Params, module: str, place: int) -> Iterator[np.ndarray]:
    """What each token of the vocabulary would give as the layer's input at this place, by pieces of (n, 1, d)."""
    ids = torch.arange(bench.model.get_input_embeddings().weight.shape[0]).view(-1, 1)
    yield from _inputs(bench, params, module, ids, torch.full((1, 1), place))


@torch.no_grad()
def _inputs(bench: Bench, params: Params, module: str, ids: Tensor, places: Tensor | None) -> Iterator[np.ndarray]:
    """The layer's input at every place of each row of `ids`: (n, places, d) float64, a chunk of rows at a time."""
    for piece in ids.split(max(1, CHUNK // ids.shape[1])):
        found: list[np.ndarray] = []
        at = None if places is None else places.expand(piece.shape)
        _run(bench, params, piece, [module], lambda _, x, out=found: out.append(x.double().cpu().numpy()), at)
        yield found[0]


class _Reached(Exception):
    """The forward pass has come to the last layer that was asked for."""


@torch.no_grad()
def _run(bench: Bench, params: Params, ids: Tensor, modules: Sequence[str], see, places: Tensor | None = None) -> None:
    """A forward pass up to the last of `modules`; `see(name, input)` for each of them on the way."""
    left = set(modules)

    def hook_of(name: str):
        def hook(_, inputs) -> None:
            see(name, inputs[0])
            left.discard(name)
            if not left:
                raise _Reached

        return hook

    hooks = [bench.model.get_submodule(name).register_forward_pre_hook(hook_of(name)) for name in modules]
    given = {"input_ids": ids.to(bench.device), "attention_mask": torch.ones_like(ids).to(bench.device)}
    if places is not None:
        given["position_ids"] = places.to(bench.device)
    values = {name: torch.from_numpy(np.asarray(x, np.float32)).to(bench.device) for name, x in params.items()}
    try:
        functional_call(bench.model, values, (), given | {"use_cache": False})
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
