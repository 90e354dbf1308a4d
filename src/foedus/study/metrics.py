"""The figures of a study: what each is called, which way is better, and where it lies in `measures.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """`lower`: True where lower is better, None where neither is. `kind`: how it is spelled ("share", "bytes", …).

    `path`: where it lies in a phase's figures, or, from "run" on, in the run's. `judged`: whether methods are compared
    by it.
    """

    key: str
    title: str
    path: tuple[str, ...]
    lower: bool | None
    kind: str = "number"
    judged: bool = False


METRICS = (
    Metric("perplexity", "Perplexity", ("perplexity", "micro"), True, judged=True),
    Metric("accuracy", "Domain accuracy (D1)", ("d1", "all"), False, "share", judged=True),
    Metric("mmd", "MMD²", ("mmd", "pairs", "mmd2"), True, "small", judged=True),
    Metric("mmd_p", "p of MMD²", ("mmd", "pairs", "p"), None, "p"),
    Metric("perplexity_target", "Perplexity, target", ("perplexity", "target"), True),
    Metric("accuracy_target", "Domain accuracy, target", ("d1", "target"), False, "share"),
    Metric("mmd_target", "MMD², sources to target", ("mmd", "target", "mmd2"), True, "small"),
    Metric("probe", "Silo told by a probe (D2)", ("d2", "accuracy"), True, "share"),
    Metric("tokens", "Next-token accuracy (D3)", ("d3",), False, "share"),
    Metric("variance", "Feature variance", ("spread", "variance"), None, "small"),
    Metric("rank", "Effective rank", ("spread", "effective_rank"), None),
    Metric("mmd_own", "MMD² at the features' own scale", ("spread", "own_scale"), None, "small"),
    Metric("epsilon", "ε", ("run", "epsilon"), None, "epsilon"),
    Metric("bytes_up", "Bytes up", ("run", "bytes_up"), True, "bytes"),
    Metric("seconds", "Seconds", ("run", "seconds"), True, "seconds"),
)
BY_KEY = {metric.key: metric for metric in METRICS}
FEDERATED = "federated"


def value(measures: Mapping[str, Any], metric: Metric, phase: str = FEDERATED) -> float | None:
    """One figure of a phase of a cell; None where it was not measured or is not finite. What a run cost, and what it
    promises, is the federated phase's.
    """
    of_run = metric.path[0] == "run"
    if of_run and phase != FEDERATED:
        return None
    found: Any = measures if of_run else (measures.get("phases") or {}).get(phase)
    for step in metric.path:
        found = found.get(step) if isinstance(found, Mapping) else None
    known = isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)
    return float(found) if known else None
