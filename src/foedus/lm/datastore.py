"""Next-token prediction from a store of text (kNN-LM, Khandelwal et al. 2020, arXiv 1911.00172), and how far to trust
it for each token (kNN-Adapter, Huang et al. 2023, arXiv 2302.10879).

    keys k = f(c), the input of the last feed-forward block; values v, the token that came next
    p_kNN(w | c) ∝ Σ_{j in N(c)} 1[v_j = w] exp(−d_j / T),  d_j = ‖f(c) − k_j‖²
    p(w | c) = λ p_kNN + (1 − λ) p_LM,  (λ, T) of c by a small network

The base is frozen, so keys never age. After the norm before that block they are all about equally long; here they have
length one, which changes nothing but the unit of T, and is the same for every base.

A store holds its text word for word, for whoever can query it: it never leaves the silo whose text it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ..errors import ModelError
from ..seeds import generator
from .heads import head, is_head
from .objectives import Encoded, Ragged

if TYPE_CHECKING:
    from ..types import Params
    from .bench import Batch, Bench
    from .terms import Seen

HEAD = "knn"
"""The name of the network that gives (λ, T)."""
EXACT = 1_000_000
"""So many keys are searched through one by one; more are put in √n cells, of which the nearest are searched."""
PROBES = 32  # as in the kNN-LM code
TOKENS, BLOCK = 2048, 256  # tokens in a pass through the model; positions whose logits exist at once
QUERY = 32  # of the key's numbers, those that the network is given
WIDEST = 4.0  # the largest squared distance of two vectors of length one


@dataclass(frozen=True)
class Lookup:
    """How a store is queried; public, the same at every silo.

    `neighbours`: k of a token, 1 … 256. `dims`: of a key, by a random projection drawn from `seed` alone where the base
    is wider. `weight` in (0, 1) and `temperature` > 0: the constant (λ, T) that the network starts from.
    """

    neighbours: int = 64
    dims: int = 64
    weight: float = 0.25
    temperature: float = 0.03
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.neighbours <= 256 or self.dims < 1:
            raise ValueError(f"Expected 1 <= neighbours={self.neighbours} <= 256 and dims={self.dims} >= 1.")
        if not 0 < self.weight < 1 or not self.temperature > 0:
            raise ValueError(f"Expected 0 < weight={self.weight} < 1 and temperature={self.temperature} > 0.")

    @property
    def ranks(self) -> list[int]:
        """1, 2, 4, … up to the number of neighbours: where the network looks."""
        return [2**i for i in range(self.neighbours.bit_length())]

    def sizes(self, width: int) -> tuple[int, ...]:
        """Of the network, for a base of this width: what `attach_head` takes."""
        return 2 * len(self.ranks) + 3 + min(QUERY, self.dims, width), 128, 128, 2

    def projection(self, width: int) -> np.ndarray | None:
        """(width, dims) float32, which keeps squared distances in the mean; None where keys are narrow enough."""
        if width <= self.dims:
            return None
        draw = generator(self.seed, "keys", width, self.dims).standard_normal((width, self.dims))
        return (draw / math.sqrt(self.dims)).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Datastore:
    """Keys and the tokens that followed. `index`: of faiss, over float16 keys; `tokens`: (entries,) int32."""

    index: Any
    tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def of(cls, keys: np.ndarray, tokens: np.ndarray, exact: int = EXACT) -> Datastore:
        """`keys`: (entries, dims) float16. Up to `exact` of them every search compares all."""
        faiss = _faiss()
        entries, dims = keys.shape
        cells = f"IVF{math.isqrt(entries)}," if entries > exact else ""
        index = faiss.index_factory(dims, f"{cells}SQfp16", faiss.METRIC_L2)
        if cells:
            index.nprobe = PROBES
        if entries:
            index.train(keys.astype(np.float32))
            index.add(keys.astype(np.float32))
        return cls(index, tokens.astype(np.int32))

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest entries of each query, nearest first: (n, k) squared distances and (n, k) tokens.

        ∞ and −1 where there are fewer.
        """
        if not len(self) or not len(queries):
            return np.full((len(queries), k), np.inf, np.float32), np.full((len(queries), k), -1, np.int64)
        distances, entries = self.index.search(np.ascontiguousarray(queries, np.float32), k)
        none = entries < 0
        tokens = np.where(none, -1, self.tokens[np.where(none, 0, entries)].astype(np.int64))
        return np.where(none, np.inf, np.maximum(distances, 0.0)).astype(np.float32), tokens


@dataclass(frozen=True, eq=False)
class Found:
    """What base and store say at the targets of a batch, (b, t, …); where `mask` is false nothing is meant.

    `distances` and `tokens`: (b, t, k), of the neighbours. `near`: (b, t, k), −log p_LM of these tokens, in nats; `nll`
    of the target. `best`: the base's first choice, and `peak` its −log p. `features`: (b, t, f), for the network.
    """

    mask: Tensor
    targets: Tensor
    distances: Tensor
    tokens: Tensor
    nll: Tensor
    near: Tensor
    best: Tensor
    peak: Tensor
    features: Tensor


@dataclass(frozen=True, eq=False)
class Reader:
    """Reads text with a frozen base: into a store, or beside one."""

    bench: Bench
    lookup: Lookup

    def __post_init__(self) -> None:
        moved = [name for name in self.bench.start() if not is_head(name)]
        if moved:
            do = "Take no adapter with this algorithm: keys of a model that moves would age."
            raise ModelError("a frozen base", f"{len(moved)} trained parameters, such as {moved[0]}", do)

    def store(self, encoded: Encoded, exact: int = EXACT) -> Datastore:
        """All targets of these rows, each under what came before it."""
        keys, tokens = [np.zeros((0, self._dims), np.float16)], [np.zeros(0, np.int32)]
        for rows in _groups(encoded):
            batch = self._here(self.bench.objective.collate(encoded, rows, 0))
            _, inner = self._states(batch)
            asked, targets = self.bench.objective.align(inner, batch["labels"])
            keys.append(self._keys(asked).cpu().numpy().astype(np.float16))
            tokens.append(targets.cpu().numpy().astype(np.int32))
        return Datastore.of(np.concatenate(keys), np.concatenate(tokens), exact)

    @torch.no_grad()
    def read(self, batch: Batch, store: Datastore) -> Found:
        """What there is to know of a batch's targets before anybody weighs base and store."""
        batch = self._here(batch)
        states, inner = self._states(batch)
        labels = batch["labels"]
        places = torch.arange(labels.numel(), device=labels.device).view(*labels.shape, 1)
        chosen, targets = self.bench.objective.align(places, labels)
        chosen = chosen[:, 0]
        states, inner = states.flatten(0, 1)[chosen], inner.flatten(0, 1)[chosen]
        blocks = zip(states.split(BLOCK), inner.split(BLOCK), targets.split(BLOCK), strict=True)
        parts = [self._block(*block, store) for block in blocks]
        if not parts:
            parts = [self._block(states, inner, targets, store)]
        columns = [torch.cat(column) for column in zip(*parts, strict=True)]
        mask = torch.zeros(labels.numel(), dtype=torch.bool, device=labels.device).index_fill_(0, chosen, True)
        return Found(*(_placed(x, chosen, labels.shape) for x in (mask[chosen], targets, *columns)))

    @property
    def _dims(self) -> int:
        return min(self.lookup.dims, int(_core(self.bench).config.hidden_size))

    def _here(self, batch: Batch) -> dict[str, Tensor]:
        return {name: x.to(self.bench.device) for name, x in batch.items()}

    @torch.no_grad()
    def _states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(b, t, p) each: what the output head is given, and what the last feed-forward block is given."""
        kept: list[Tensor] = []
        hook = _last_block(_core(self.bench)).register_forward_pre_hook(lambda module, args: kept.append(args[0]))
        try:
            states = self.bench.see(self.bench.start(), batch).states()
        finally:
            hook.remove()
        return states, kept[-1].float()

    def _keys(self, inner: Tensor) -> Tensor:
        """(n, p) to (n, dims)."""
        projection = self.lookup.projection(inner.shape[-1])
        keys = F.normalize(inner, dim=-1)
        return keys if projection is None else keys @ torch.from_numpy(projection).to(keys)

    def _block(self, states: Tensor, inner: Tensor, targets: Tensor, store: Datastore) -> tuple[Tensor, ...]:
        """The columns of `Found` from `distances` on, for some targets."""
        keys = self._keys(inner)
        distances, tokens = (
            torch.from_numpy(x).to(keys.device) for x in store.search(keys.cpu().numpy(), self.lookup.neighbours)
        )
        logp = self.bench.logs(states)
        peak, best = logp.max(-1)
        entropy = -(logp.exp() * logp).sum(-1) / math.log(logp.shape[-1])
        about = [_of_neighbours(distances, tokens, self.lookup), entropy[:, None], peak.exp()[:, None]]
        features = torch.cat([*about, keys[:, :QUERY]], 1)
        nll, near = -logp.gather(1, targets[:, None])[:, 0], -logp.gather(1, tokens.clamp(min=0))
        return distances, tokens, nll, near, best, -peak, features


@dataclass(frozen=True, eq=False)
class Interpolated:
    """A goal's term: −log (λ p_kNN + (1 − λ) p_LM), in nats, the mean over a row's own targets (kNN-Adapter).

    A row's loss depends on the row, the base and the store; that the store holds nothing of the row's unit, nor of any
    other unit that is to be protected, is for its maker to see to.
    """

    reader: Reader
    store: Datastore
    weight: float = 1.0

    def __call__(self, seen: Seen) -> Tensor:
        found = self.reader.read(seen.batch, self.store)
        nll = -log_mixture(found, seen.head(HEAD, found.features), self.reader.lookup)
        return (nll * found.mask).sum(1) / found.mask.sum(1).clamp(min=1)


@dataclass(eq=False)
class Stores:
    """Each silo's store, made when first asked for. In this process alone: it is never written, sent or pickled."""

    made: dict[int, tuple[Encoded, Reader, Datastore]] = field(default_factory=dict, repr=False)

    def of(self, reader: Reader, encoded: Encoded, whole: Encoded | None = None) -> Datastore:
        """The store of `encoded`, which stands for `whole` (itself when left out)."""
        key = encoded if whole is None else whole
        if id(key) not in self.made or self.made[id(key)][1].bench is not reader.bench:
            self.made[id(key)] = key, reader, reader.store(encoded)
        return self.made[id(key)][2]

    def __reduce__(self) -> Any:
        return Stores, ()


def log_mixture(found: Found, answers: Tensor, lookup: Lookup) -> Tensor:
    """log p of the targets, (b, t). `answers`: (b, t, 2), of the network; zeros mean the constant (λ, T)."""
    weights, log_own, log_base = _weighed(found.distances, answers, lookup)
    own = (weights * (found.tokens == found.targets[..., None])).sum(-1)
    return torch.logaddexp(log_own + own.clamp(min=1e-30).log(), log_base - found.nll)


@torch.no_grad()
def mixture_scores(reader: Reader, store: Datastore, params: Params, batch: Batch) -> dict[str, np.ndarray]:
    """Per row of `batch`, as `Bench.scores`: "nll" (float64, nats), "targets" and "correct" (int64) of the mixture."""
    found = reader.read(batch, store)
    answers = network(reader.bench, params, found.features)
    nll = -log_mixture(found, answers, reader.lookup).double()
    hits = _first_choice(found, answers, reader.lookup) == found.targets

    def total(x: Tensor) -> np.ndarray:
        return (x * found.mask).sum(1).cpu().numpy()

    return {"nll": total(nll), "targets": total(found.mask.long()), "correct": total(hits.long())}


def network(bench: Bench, params: Params, features: Tensor) -> Tensor:
    """What the network of these parameters answers, (…, 2)."""
    inside = f"foedus_heads.{HEAD}."
    own = {
        name.rpartition(inside)[2]: torch.from_numpy(np.asarray(x, np.float32)).to(features.device)
        for name, x in params.items()
        if inside in name
    }
    return functional_call(head(bench, HEAD), own, (features,))


def rows_of(encoded: Encoded, rows: np.ndarray) -> Encoded:
    """These rows alone, in this order."""

    def ragged(values: np.ndarray, bounds: np.ndarray) -> Ragged:
        whole = Ragged(values, bounds)
        return Ragged.of([whole[int(row)] for row in rows])

    texts = {name: x for name in ("inputs", "answers", "places") if (x := getattr(encoded, name)) is not None}
    silent = encoded.silent
    return replace(
        encoded,
        **{name: getattr(encoded, name)[rows] for name in ("first", "targets", "bytes", "documents", "topics")},
        **{name: ragged(x.values, x.bounds) for name, x in texts.items()},
        domains=tuple(encoded.domains[int(row)] for row in rows),
        silent=None if silent is None else ragged(silent, encoded.inputs.bounds).values.astype(bool),
    )


# ---- base and store together ----


def _weighed(distances: Tensor, answers: Tensor, lookup: Lookup) -> tuple[Tensor, Tensor, Tensor]:
    """(b, t, k) weights of the neighbours, which add up to 1, and log λ and log (1 − λ). λ = 0 without neighbours."""
    some = torch.isfinite(distances[..., 0])
    logit = answers[..., 0] + math.log(lookup.weight / (1 - lookup.weight))
    logit = torch.where(some, logit, torch.full_like(logit, -1e4))
    temperature = F.softplus(answers[..., 1] + _softplus_inverse(lookup.temperature)).clamp(min=1e-12)
    scaled = torch.where(some[..., None], distances, torch.zeros_like(distances)) / temperature[..., None]
    return (-scaled).softmax(-1), F.logsigmoid(logit), F.logsigmoid(-logit)


def _first_choice(found: Found, answers: Tensor, lookup: Lookup) -> Tensor:
    """(b, t): the most probable token of the mixture: a neighbour's, or the base's first choice."""
    weights, log_own, log_base = _weighed(found.distances, answers, lookup)
    tokens = torch.cat([found.tokens, found.best[..., None]], -1)
    weights = torch.cat([weights, torch.zeros_like(weights[..., :1])], -1)
    near = torch.cat([found.near, found.peak[..., None]], -1)
    own = torch.stack([(weights * (tokens == tokens[..., j, None])).sum(-1) for j in range(tokens.shape[-1])], -1)
    logp = torch.logaddexp(log_own[..., None] + own.clamp(min=1e-30).log(), log_base[..., None] - near)
    logp = logp.masked_fill(tokens < 0, -math.inf)
    return tokens.gather(-1, logp.argmax(-1, keepdim=True))[..., 0]


def _of_neighbours(distances: Tensor, tokens: Tensor, lookup: Lookup) -> Tensor:
    """(n, 2 ranks + 1): log d and the share of different tokens at each rank, and the largest p_kNN at the constant T.

    As Zheng et al. 2021 (arXiv 2105.13022) have them, and kNN-Adapter's summary names them.
    """
    ranks = torch.tensor(lookup.ranks, device=tokens.device)
    logs = distances[:, ranks - 1].clamp(1e-4, WIDEST).log()
    same = (tokens[:, :, None] == tokens[:, None, :]) & (tokens >= 0)[:, None, :]
    fresh = (tokens >= 0) & ~same.tril(-1).any(-1)
    different = fresh.float().cumsum(1)[:, ranks - 1] / ranks
    own = (-distances / lookup.temperature).softmax(-1).nan_to_num()
    return torch.cat([logs, different, (own[:, None, :] * same).sum(-1).amax(-1, keepdim=True)], 1)


# ---- the base, rows and places ----


def _core(bench: Bench) -> Any:
    return bench.model.get_base_model() if hasattr(bench.model, "get_base_model") else bench.model


def _last_block(core: nn.Module) -> nn.Module:
    """The last feed-forward block."""
    blocks = [module for name, module in core.named_modules() if name.endswith(".mlp")]
    if not blocks:
        came = f"{type(core).__name__} without them"
        raise ModelError("blocks called mlp, whose last one's input is the key", came, "Use a Llama, GPT-2 or NeoX.")
    return blocks[-1]


def _groups(encoded: Encoded) -> Iterator[np.ndarray]:
    """Rows of like length together, about `TOKENS` tokens in a group."""
    lengths = np.diff(encoded.inputs.bounds)
    rows = np.argsort(-lengths, kind="stable")
    while len(rows):
        size = max(1, TOKENS // max(1, int(lengths[rows[0]])))
        yield rows[:size]
        rows = rows[size:]


def _placed(values: Tensor, chosen: Tensor, shape: Sequence[int]) -> Tensor:
    """(n, …) at their places in (b, t, …), zeros elsewhere."""
    out = values.new_zeros(math.prod(shape), *values.shape[1:])
    out[chosen] = values
    return out.view(*shape, *values.shape[1:])


def _softplus_inverse(x: float) -> float:
    return x + math.log(-math.expm1(-x))


def _faiss() -> ModuleType:
    try:
        import faiss
    except ImportError as error:
        do = 'Install it: pip install "foedus[knn]".'
        raise ModelError("the library faiss, which searches a store of text", "none installed", do) from error
    return faiss  # type: ignore[no-any-return]


__all__ = [
    "HEAD", "Datastore", "Found", "Interpolated", "Lookup", "Reader", "Stores", "log_mixture", "mixture_scores",
    "network", "rows_of",
]  # fmt: skip
