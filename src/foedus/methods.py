"""What a treaty's [algorithm] and [topics] ask for: the goal of local steps, the heads it needs, and the algorithm.

One function for each algorithm, which says where its arguments come from. `build.py` calls them, and nobody below it
sees a treaty.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from .algorithms.alignment import Alignment, survey_parts, survey_rounds
from .algorithms.base import Algorithm
from .algorithms.fedavg import FedAvg
from .algorithms.fedlap import FedLap
from .algorithms.fedprox import FedProx
from .algorithms.knn_adapter import KnnAdapter
from .algorithms.local import Alone
from .algorithms.reversal import Dann
from .algorithms.scaffold import Scaffold
from .algorithms.udalm import Udalm
from .attention import Attention
from .data import Splits
from .discriminant import Discriminant, discriminant
from .errors import DataError, ModelError, one_of
from .kernels import FourierMap, bandwidths, fourier_map
from .lm.bench import Bench
from .lm.datastore import HEAD as STORE
from .lm.datastore import Lookup
from .lm.heads import BIAS, attach_bias, attach_head, names, width
from .lm.load import Base
from .lm.objectives import Encoded
from .lm.statistics import token_rows
from .lm.terms import Denoise, Goal, Seen, Term, Topic
from .marginals import Marginals, marginals
from .seeds import derive, generator
from .silo import LocalPlan
from .treaty import Treaty
from .types import Params

TOPICS, DOMAINS = "topics", "domains"
PUBLIC_TEXTS, STORED_TEXTS, VARIED_TEXTS = 256, 512, 1024
"""Public texts on which the kernel's bandwidths are found; those of a public store; and those that tell how features
vary together."""
MOMENTS = 16
"""Dimensions in which the effective rank is taken: its second moments are that many squared."""


@dataclass(frozen=True)
class Site:
    """What an algorithm may need beside its treaty. `silos`: all of them, by name and in order. `public`: the rows of
    a source that everybody may read, of its first so many texts.
    """

    bench: Bench
    silos: tuple[str, ...]
    public: Callable[[str, int], Encoded]


def topics(treaty: Treaty, splits: Mapping[str, Splits]) -> tuple[str, ...]:
    """The topics that a language model learns beside its tokens, in alphabetical order; () where it learns none."""
    if not (treaty.headed or treaty.topics.denoise) or treaty.data.label is None:
        return ()
    tables = [table for parts in splits.values() for table in (parts.train, parts.validation, parts.test)]
    found = known_labels(treaty, {label for table in tables for label in _column(table, "label")})
    if len(found) < 2:
        raise DataError("at least two topics in [data] label", ", ".join(found) or "none", "Name another column.")
    return found


def known_labels(treaty: Treaty, found: Collection[str]) -> tuple[str, ...]:
    """All labels, in alphabetical order: those that the treaty declares, else those found. Raises `DataError` for one
    that it does not declare.
    """
    declared = treaty.data.labels or tuple(sorted(found))
    for odd in sorted(set(found) - set(declared)):
        raise DataError("labels that the treaty declares", f'"{odd}"', one_of(odd, declared), where="[data] labels")
    return declared


def put_heads(treaty: Treaty, base: Base, topics: tuple[str, ...], silos: tuple[str, ...]) -> None:
    """The small networks and the bias that the goal and the algorithm need, on a base that has its adapter."""
    if treaty.headed:
        attach_head(base, TOPICS, (width(base), len(topics)), treaty.seed)
    if treaty.marginal:
        attach_bias(base)
    if treaty.algorithm.name == "reversal":
        attach_head(base, DOMAINS, (width(base), len(silos)), treaty.seed)
    if treaty.algorithm.name == "knn-adapter":
        attach_head(base, STORE, lookup(treaty).sizes(width(base)), treaty.seed)


def goal(treaty: Treaty, base: Base) -> Goal:
    """What every local step minimises, whatever the algorithm: tokens, topics, and damaged copies."""
    t = treaty.topics
    terms: list[Term] = []
    if t.weight:
        terms.append(Topic(t.weight, t.smoothing, t.pseudo_labels))
    if t.denoise:
        terms.append(Denoise(t.denoise, t.denoise_rate, base.kept or len(base.tokenizer)))  # never anybody's place
    return Goal(terms=tuple(terms))


def surveys(treaty: Treaty) -> dict[str, Any]:
    """The surveys of units inside silos, in the numbers of a privacy plan; none where the algorithm takes none."""
    a = treaty.alignment
    if treaty.algorithm.name != "alignment" or treaty.privacy.unit not in ("example", "author"):
        return {}
    return {
        "surveys": survey_rounds(treaty.algorithm.rounds, a.every),
        "survey_parts": survey_parts(a.attention, a.head == "means", a.tokens > 0),
        "survey_rate": a.rate or treaty.privacy.rate, "survey_ratio": a.noise_ratio,
    }  # fmt: skip


def disclosed(treaty: Treaty) -> frozenset[str]:
    """The facts that silos let out under their own names; what they weigh, where that follows from their text."""
    attentive = treaty.alignment.attention != "none"
    asked = (name for name in ("loss", "holdings", "attention") if getattr(treaty.disclosure, name))
    return frozenset(name for name in asked if name != "attention" or attentive)


def caveat(treaty: Treaty) -> dict[str, str]:
    """What a reader of the guarantee must know of the algorithm, as "caveat"; {} where there is nothing to know."""
    own = treaty.algorithm.name == "knn-adapter" and treaty.knn.answers == "own" and treaty.privacy.unit != "none"
    return {"caveat": KnnAdapter.caveat} if own else {}


def ordinary(treaty: Treaty, plan: LocalPlan) -> Algorithm:
    """The algorithm of a baseline: the treaty's own where it needs no other silo, else FedAvg."""
    return _fedprox(treaty, plan) if treaty.algorithm.name == "fedprox" else FedAvg(plan)


def algorithm(treaty: Treaty, plan: LocalPlan, site: Site) -> Algorithm:
    """The treaty's algorithm, ready for its first round."""
    return _ALGORITHMS[treaty.algorithm.name](treaty, plan, site)


def lookup(treaty: Treaty) -> Lookup:
    """How a store of text is asked."""
    return Lookup(neighbours=treaty.knn.neighbours, dims=treaty.knn.width, seed=treaty.seed)


# ---- one algorithm each ----


def _fedprox(treaty: Treaty, plan: LocalPlan) -> FedProx:
    return FedProx(plan, mu=treaty.algorithm.mu)


def _scaffold(treaty: Treaty, plan: LocalPlan, site: Site) -> Scaffold:
    return Scaffold(plan, share=_cohort(treaty, site) / len(site.silos), warm=treaty.scaffold.warm)


def _alignment(treaty: Treaty, plan: LocalPlan, site: Site) -> Alignment:
    a = treaty.alignment
    attentive = a.attention != "none"
    again = _discriminants(treaty, site) if a.head == "means" else None
    return Alignment(
        plan, _maps(treaty, site), rounds=treaty.algorithm.rounds, silos=max(1, round(_cohort(treaty, site))),
        weight=a.weight, every=a.every, target=a.target or "", phi=a.attention,
        attention=Attention(gamma=a.gamma if attentive else 0.0, exponent=float(a.base), most=a.largest),
        cap=a.max_share or 1.0, momentum=a.momentum, schedule=a.schedule, average=a.average,
        rate=surveys(treaty).get("survey_rate", 1.0), rows=a.rows, scale=a.scale,
        moments=_moments(treaty, site) if a.attention == "rank" else None,
        topics=again(site.bench.start()) if again else None, again=again,
        tokens=_marginals(treaty, site) if a.tokens else None,
    )  # fmt: skip


def _maps(treaty: Treaty, site: Site) -> dict[int, FourierMap]:
    """For each layer φ, with bandwidths from public text under the model as it starts."""
    a = treaty.alignment
    if site.bench.base.kept and a.layers != (-1,):
        came, do = f"layers = {list(a.layers)}", "Leave out [performance] keep_states, or align the last layer."
        raise ModelError("the last layer alone, where blocks below the first trained one are not there", came, do)
    seen = _features(site, site.public(a.public_text or "", PUBLIC_TEXTS), a.layers, site.bench.start())
    return {
        layer: fourier_map(
            x.shape[1], a.features, bandwidths(x), derive(treaty.seed, "alignment", layer), a.project or None
        )
        for layer, x in seen.items()
    }


def _features(site: Site, text: Encoded, layers: tuple[int, ...], params: Params) -> dict[int, np.ndarray]:
    """(rows, p) of each layer, of the first row of each document."""
    found = {layer: [] for layer in layers}
    for seen in _seen(site, text, params):
        for layer in layers:
            found[layer].append(seen.features(layer).detach().cpu().numpy())
    return {layer: np.concatenate(x) for layer, x in found.items()}


def _seen(site: Site, text: Encoded, params: Params) -> Iterator[Seen]:
    """What the model shows of the first row of each document, some at a time."""
    rows, objective = np.unique(text.documents, return_index=True)[1], site.bench.objective
    objective.ready(text, rows)
    for some in np.array_split(rows, -(-len(rows) // 16)):
        yield site.bench.see(params, objective.collate(text, some, 0))


def _discriminants(treaty: Treaty, site: Site) -> Callable[[Params], Discriminant]:
    """What makes a topic head of class means, by public text under the model with some parameters; silos that survey
    under the same ones, one after another, look once.
    """
    text, head = site.public(treaty.alignment.public_text or "", VARIED_TEXTS), names(site.bench.model)[TOPICS]
    last: list[tuple[Params, Discriminant]] = []

    def made(params: Params) -> Discriminant:
        if not last or any(not np.array_equal(x, last[0][0][name]) for name, x in params.items()):
            seen = _features(site, text, (-1,), params)[-1]
            last[:] = [(params, discriminant(seen, len(site.bench.objective.topics), head))]
        return last[0][1]

    return made


def _marginals(treaty: Treaty, site: Site) -> Marginals:
    """What makes a bias of tokens; of public text only how long its rows are under the model as it starts."""
    text, params = site.public(treaty.alignment.public_text or "", PUBLIC_TEXTS), site.bench.start()
    name = names(site.bench.model)[BIAS]["bias"]
    whole = Marginals(min(treaty.alignment.tokens, len(params[name])), 1.0, len(params[name]), name)
    found = [token_rows(seen, whole).cpu().numpy() for seen in _seen(site, text, params)]
    return marginals(np.concatenate(found), whole.tokens, name)


def _moments(treaty: Treaty, site: Site) -> np.ndarray:
    """(p, d'): a random map, which keeps distances on average."""
    size = width(site.bench.base)
    return generator(treaty.seed, "alignment", "moments").standard_normal((size, MOMENTS)) / np.sqrt(MOMENTS)


def _knn(treaty: Treaty, plan: LocalPlan, site: Site) -> KnnAdapter:
    source = treaty.knn.public_text
    public = site.public(source, STORED_TEXTS) if source is not None else None
    return KnnAdapter(plan, lookup(treaty), public=public, answers=treaty.knn.answers)


def _fedlap(treaty: Treaty, plan: LocalPlan, site: Site) -> FedLap:
    f = treaty.fedlap
    return FedLap(
        plan, site.bench, site.silos, examples=f.samples, length=f.length, vocabulary=f.vocabulary, radius=f.radius,
        queries=f.queries, visits=f.visits, boost=f.boost, inner=f.inner, passes=f.passes, rate=f.rate,
    )  # fmt: skip


_ALGORITHMS: Mapping[str, Callable[[Treaty, LocalPlan, Site], Algorithm]] = {
    "fedavg": lambda treaty, plan, site: FedAvg(plan),
    "fedprox": lambda treaty, plan, site: _fedprox(treaty, plan),
    "scaffold": _scaffold,
    "alignment": _alignment,
    "reversal": lambda treaty, plan, site: Dann(plan, site.silos, weight=treaty.reversal.weight),
    "udalm": lambda treaty, plan, site: Udalm(
        plan, mix=treaty.udalm.mix, pretrain=treaty.udalm.pretrain, unlabelled=treaty.data.unlabelled
    ),
    "knn-adapter": _knn,
    "fedlap": _fedlap,
    "alone": lambda treaty, plan, site: Alone(plan),
}


def _cohort(treaty: Treaty, site: Site) -> float:
    """How many silos a round has, as expected."""
    c, silos = treaty.cohort, len(site.silos)
    return float(c.size) if c.size else silos * c.rate if c.rate else float(silos)


def _column(table: pa.Table, name: str) -> list[str]:
    if name not in table.column_names:
        raise DataError(f"a column with {name}s", "none", f"Name it with [data] {name}.")
    return [x for x in table[name].to_pylist() if x]
