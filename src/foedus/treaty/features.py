"""What a plan for federated learning may be made of, by name, and which of it a treaty asks for.

Many of these the product does not have; they have names all the same, so that `foedus check --with` can be asked about
them and a treaty that names one is told why not. `combinations.py` says which go together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import TreatyError, one_of


class Values(Protocol):
    """A treaty's values by dotted key."""

    def __getitem__(self, key: str) -> Any: ...


@dataclass(frozen=True)
class Feature:
    """`name`, and what it is `about`. `key`: the treaty's key that decides on it, and `holds`: whether a treaty asks
    for it; without them no treaty does. `also`: other names of it."""

    name: str
    about: str
    key: str = ""
    holds: Callable[[Values], bool] = lambda _: False
    also: tuple[str, ...] = ()


def _sums(*kinds: str) -> Callable[[Values], bool]:
    return lambda t: t["secure.sums"] in kinds


def _secure(t: Values) -> bool:
    return bool(t["secure.sums"] != "open")


def _private(t: Values) -> bool:
    return bool(t["privacy.unit"] != "none")


def _named(algorithm: str) -> Callable[[Values], bool]:
    return lambda t: bool(t["algorithm.name"] == algorithm)


def _shared(t: Values) -> bool:
    return _private(t) and bool(t["privacy.placement"] == "shared")


_ALL = (
    # how updates are summed
    Feature("open-sums", "the coordinator sees every update", "secure.sums", _sums("open")),
    Feature("masked-sums", "secure aggregation by masks that cancel", "secure.sums", _sums("masked"),
            ("secagg", "secagg+", "secure-aggregation")),
    Feature("encrypted-sums", "sums of homomorphic ciphertexts", "secure.sums", _sums("encrypted"),
            ("he", "homomorphic-encryption")),
    Feature("groups", "sums in random groups, each of them seen", "secure.group_size",
            lambda t: _secure(t) and t["secure.group_size"] is not None, ("buckets", "bucketing")),
    Feature("shared-secret-key", "all of the secret key at one silo or more", "secure.key_holders", _sums("encrypted")),
    Feature("ckks", "approximate encryption", "secure.scheme",
            lambda t: t["secure.sums"] == "encrypted" and t["secure.scheme"] == "ckks"),
    Feature("selective-encryption", "only some of the numbers encrypted", "secure.encrypted_share",
            lambda t: t["secure.sums"] == "encrypted" and t["secure.encrypted_share"] < 1),
    Feature("modular-sums", "sums modulo a power of two", "secure.word", _secure),
    Feature("varying-cohorts", "other silos from round to round, by chance or by accident", "cohort.sampling",
            lambda t: t["cohort.sampling"] != "full" or (_secure(t) and t["secure.dropout"] > 0), ("small-cohorts",)),
    Feature("untrusted-model", "a global model that silos did not make", "model.base", lambda _: True),
    Feature("silo-metrics", "losses and measures of single silos", "disclosure.loss", lambda _: True,
            ("client-metrics", "per-client-metrics")),
    Feature("unsigned-keys", "keys that the coordinator hands out, signed by nobody", also=("no-pki",)),
    Feature("plaintext-fallback", "going on in the open when secure sums fail"),
    Feature("model-per-silo", "another model for each silo", also=("model-per-client", "model-heterogeneous")),
    # weights and rules
    Feature("mean", "the (weighted) mean of updates", "algorithm.name", lambda _: True, ("weighted-mean",)),
    Feature("public-weights", "equal or published weights", "server.weighting",
            lambda t: t["server.weighting"] == "uniform", ("uniform-weights",)),
    Feature("example-weights", "weights that are numbers of examples", "server.weighting",
            lambda t: t["server.weighting"] == "examples", ("private-weights",)),
    Feature("krum", "the update closest to its neighbours"),
    Feature("multi-krum", "the mean of Krum's best"),
    Feature("bulyan", "a trimmed mean over Krum's best"),
    Feature("flame", "clusters of updates by cosine, clipped and noised"),
    Feature("median", "the median of each coordinate", also=("coordinate-median",)),
    Feature("trimmed-mean", "the mean of each coordinate without its extremes"),
    Feature("geometric-median", "the point nearest to all updates", also=("rfa",)),
    Feature("norm-bound", "a check at the coordinator that no update is longer than it may be",
            also=("norm-clipping-defence", "norm-bounding")),
    Feature("fltrust", "updates weighed by their cosine with a trusted one"),
    Feature("clustering", "silos put into clusters by the coordinator", also=("clustered", "cfl")),
    Feature("reputation", "scores of silos, from what they sent"),
    Feature("non-iid", "silos whose data differ", "silos.by", lambda t: t["silos.by"] != "iid", ("noniid",)),
    Feature("asynchronous", "updates of silos that began at different models", also=("async", "fedbuff", "fedasync")),
    Feature("scaffold", "control variates beside updates", "algorithm.name", _named("scaffold"), ("control-variates",)),
    Feature("alignment", "mean embeddings beside updates", "algorithm.name", _named("alignment"), ("mmd",)),
    Feature("domain-attention", "weights from what silos see in their text", "alignment.attention",
            lambda t: t["algorithm.name"] == "alignment" and t["alignment.attention"] != "none", ("attention",)),
    Feature("text-store", "predictions from each silo's own text", "algorithm.name", _named("knn-adapter"),
            ("knn-lm", "datastore")),
    Feature("synthetic-samples", "synthetic texts instead of updates", "algorithm.name", _named("fedlap"),
            ("fedlap-dp", "distillation")),
    # what is sent
    Feature("uniform-quantization", "rounding to a public grid", "secure.word", _secure, ("int8", "quantization")),
    Feature("block-quantization", "a scale for each block, from its largest number",
            also=("absmax", "int4", "blockwise")),
    Feature("nf4", "codes for unevenly spaced numbers", also=("nonuniform-quantization", "codebook")),
    Feature("entropy-coding", "codes of variable length", also=("zstd", "huffman", "qsgd", "elias", "gzip", "lz4")),
    Feature("top-k", "the largest coordinates, chosen by each silo", also=("sparsification",)),
    Feature("random-k", "coordinates drawn from a public seed", also=("rand-k",)),
    Feature("linear-sketch", "a public linear map to fewer numbers",
            also=("count-sketch", "fetchsgd", "hadamard", "jl", "sketch")),
    Feature("powersgd", "two low-rank factors, one found from the sum of the other"),
    Feature("seed-scalars", "one number for each public random direction", also=("fedkseed", "decomfl")),
    Feature("layer-budget", "bits or coordinates for each layer, from earlier rounds",
            also=("adaptive-budget",)),
    Feature("error-feedback", "what compression lost, added to the next update"),
    # adapters
    Feature("lora-both-factors", "LoRA with both factors trained", "adapter.freeze_a",
            lambda t: t["adapter.kind"] == "lora" and not t["adapter.freeze_a"]),
    Feature("flora", "silos' LoRA factors stacked"),
    Feature("fedex-lora", "the residual of averaged LoRA factors, from each product", also=("fedex",)),
    Feature("flora-na", "factors fitted to the silos' own by least squares"),
    # guarantees
    Feature("differential-privacy", "noise for the presence of somebody", "privacy.unit", _private, ("dp",)),
    Feature("distributed-noise", "noise of which each silo adds a share", "privacy.placement", _shared,
            ("distributed-dp", "ddg")),
    Feature("continuous-noise", "noise in floating point", "privacy.noise",
            lambda t: _private(t) and t["privacy.noise"] == "gaussian", ("gaussian", "laplace")),
    Feature("adaptive-clip", "a clip norm that follows the data", "privacy.quantile",
            lambda t: _private(t) and t["privacy.quantile"] is not None, ("adaptive-clipping",)),
)  # fmt: skip
FEATURES = {feature.name: feature for feature in _ALL}
KEYS = tuple(
    sorted({feature.key for feature in _ALL if feature.key} | {"adapter.kind", "secure.dropout", "privacy.unit"})
)
"""The dotted keys that features are read from."""


def features(treaty: Values) -> frozenset[str]:
    """The names of what a treaty asks for."""
    return frozenset(feature.name for feature in _ALL if feature.key and feature.holds(treaty))


def feature_named(name: str) -> str | None:
    """The feature that somebody means who writes "TopK", "multi_krum" or "secagg"; None where there is none.

    >>> feature_named("multi_krum"), feature_named("FedAsync"), feature_named("adamw")
    ('multi-krum', 'asynchronous', None)
    """
    return _SPELLED.get(_letters(name))


def beside(asked: frozenset[str], names: Iterable[str]) -> frozenset[str]:
    """These features and those with other `names`; sums are then no longer open where a name says otherwise. Raises
    `TreatyError` for a name that is none, with the nearest.
    """
    found = {name: feature_named(name) for name in names}
    for name in (name for name, feature in found.items() if feature is None):
        raise TreatyError("a feature that the validity matrix knows", f'"{name}"', one_of(name, FEATURES))
    all_of_it = asked | {feature for feature in found.values() if feature is not None}
    return all_of_it - {"open-sums"} if all_of_it & {"masked-sums", "encrypted-sums"} else all_of_it


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9+]", "", name.lower())


_SPELLED = {_letters(word): feature.name for feature in _ALL for word in (feature.name, *feature.also)}
