"""Perplexity, bits per byte and accuracy from sums that add.

micro       exp(Σ nll / Σ targets) over everything
macro       the mean over silos of each silo's own figure
by_domain   exp(Σ nll / Σ targets) over a domain, whichever silos hold it
by_silo     likewise over a silo
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..types import Tree

Evaluation = dict[str, dict[str, Any]]
Sums = dict[str, float]

TOGETHER = "all silos"
"""What stands in place of the silos where only their sum was seen."""


def figures(by_silo: Mapping[str, Tree], *, labelled: bool) -> Evaluation:
    """Figures from each silo's sums, keyed by (measure, domain) as `silo/evaluate.py` gives them.

    `labelled`: the targets are labels, so "accuracy" is reported and bits per byte are not; otherwise the targets are
    tokens, and the share that was the arg max is "token_accuracy". A silo or domain without targets is left out.
    """
    silos = {silo: _add(tree.items()) for silo, tree in by_silo.items()}
    domains = _by_domain(by_silo.values())
    everything = _add(item for tree in by_silo.values() for item in tree.items())
    measures: dict[str, Callable[[Sums], float]] = {"perplexity": _perplexity}
    measures |= {"accuracy": _accuracy} if labelled else {"bits_per_byte": _bits, "token_accuracy": _accuracy}
    return {name: _table(measure, everything, silos, domains) for name, measure in measures.items()}


def _table(measure: Callable[[Sums], float], everything: Sums, silos: Mapping[str, Sums], domains: Mapping[str, Sums]):
    by_silo = {silo: measure(sums) for silo, sums in silos.items() if sums["targets"] > 0}
    by_domain = {domain: measure(sums) for domain, sums in sorted(domains.items()) if sums["targets"] > 0}
    macro = sum(by_silo.values()) / len(by_silo) if by_silo else math.nan
    micro = measure(everything) if everything["targets"] > 0 else math.nan
    return {"micro": micro, "macro": macro, "by_domain": by_domain, "by_silo": by_silo}


def _by_domain(trees: Iterable[Tree]) -> dict[str, Sums]:
    out: dict[str, list] = {}
    for tree in trees:
        for key, x in tree.items():
            out.setdefault(key[1], []).append((key, x))
    return {domain: _add(items) for domain, items in out.items()}


def _add(items: Iterable) -> Sums:
    sums = dict.fromkeys(("nll", "targets", "correct", "bytes"), 0.0)
    for (measure, _), x in items:
        sums[measure] += float(x[0])
    return sums


def _perplexity(sums: Sums) -> float:
    return math.exp(min(sums["nll"] / sums["targets"], 700.0))


def _bits(sums: Sums) -> float:
    return sums["nll"] / math.log(2) / max(sums["bytes"], 1.0)


def _accuracy(sums: Sums) -> float:
    return sums["correct"] / sums["targets"]
