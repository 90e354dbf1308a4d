"""The comparison a user needs first: the base model, each silo alone, federated, pooled; and what it says in words.

The page, the model card and the terminal all take their figures from here, so they cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..evaluation import TOGETHER

PHASES = ("base", "local_only", "federated", "pooled")
TITLES = {"base": "Base model", "local_only": "Each silo alone", "federated": "Federated", "pooled": "Pooled"}
EXPLAINED = {
    "base": "the model as it was, untouched",
    "local_only": "every silo trains on its own text only",
    "federated": "this run: the text stays in its silo",
    "pooled": "all text in one place, the same number of steps",
}
LOWER_IS_BETTER = {"perplexity": True, "bits_per_byte": True, "accuracy": False, "token_accuracy": False}
METRICS = tuple(LOWER_IS_BETTER)
METRIC_TITLES = {
    "perplexity": "Perplexity",
    "bits_per_byte": "Bits per byte",
    "accuracy": "Accuracy",
    "token_accuracy": "Next-token accuracy",
}
SAME = 0.0005
"""Relative differences below this are called "the same": they would print as 0.0 %."""

NEAR = 0.1
"""Up to this far above pooled training is called "within"."""

Evaluation = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One line of a comparison: a domain, a silo or a mean, with its value in each phase that has one."""

    name: str
    values: Mapping[str, float]

    def change(self, start: str = "base", end: str = "federated") -> float | None:
        """Relative change from one phase to another, −0.31 for 31 % lower; None where either is missing."""
        return relative(self.values.get(start), self.values.get(end))


@dataclass(frozen=True)
class Comparison:
    """One metric across the phases that were evaluated: the two means, then every domain and every silo."""

    metric: str
    phases: tuple[str, ...]
    micro: Row
    macro: Row
    domains: tuple[Row, ...]
    silos: tuple[Row, ...]

    @property
    def means(self) -> tuple[Row, ...]:
        """The two means; one where only the sum over all silos was seen."""
        return tuple(row for row in (self.micro, self.macro) if row.values)

    @property
    def title(self) -> str:
        """The metric's name as a heading."""
        return METRIC_TITLES.get(self.metric, self.metric)


def compare(evaluation: Evaluation, metric: str = "perplexity") -> Comparison | None:
    """The comparison of one metric, or None where no phase has it. `evaluation`: phase → metric → micro, macro, …"""
    found = {phase: evaluation[phase][metric] for phase in PHASES if (evaluation.get(phase) or {}).get(metric)}
    if not found:
        return None
    silos = _rows("by_silo", found)
    seen = {phase: x for phase, x in found.items() if set(x["by_silo"]) != {TOGETHER}}
    return Comparison(
        metric,
        tuple(found),
        _row("All text", "micro", found),
        _row("Mean over silos", "macro", seen),
        _rows("by_domain", found),
        tuple(row for row in silos if row.name != TOGETHER),
    )


def compare_all(evaluation: Evaluation) -> tuple[Comparison, ...]:
    """The comparison of every metric that some phase has, perplexity first."""
    found = (compare(evaluation, metric) for metric in METRICS)
    return tuple(comparison for comparison in found if comparison)


def relative(start: float | None, end: float | None) -> float | None:
    """(end − start) / start; None where either is missing, not finite, or the start is zero."""
    if start is None or end is None or not math.isfinite(start) or not math.isfinite(end) or start == 0:
        return None
    return end / start - 1


def verdict(evaluation: Evaluation) -> tuple[str, ...]:
    """What the figures say, in whole sentences, the most important one first. Never empty.

    >>> figures = lambda x: {"perplexity": {"micro": x, "macro": x, "by_domain": {"sci": x}, "by_silo": {}}}
    >>> verdict({"base": figures(50.0), "federated": figures(40.0)})[0].replace("\\xa0", " ")
    'Federated training lowered perplexity on 1 of 1 domains, by 20 % overall.'
    """
    perplexity = compare(evaluation)
    if perplexity is None or "federated" not in perplexity.micro.values:
        return ("No evaluation of the federated model is recorded.",)
    if not math.isfinite(perplexity.micro.values["federated"]):
        return ("The federated model's perplexity is not a finite number: training diverged.",)
    sentences = [_headline(perplexity), _exceptions(perplexity), _beside_alone(perplexity), _accuracy(evaluation)]
    return tuple(sentence for sentence in sentences if sentence)


def percent(fraction: float) -> str:
    """The size of a fraction in percent, without its sign: 31 %, 1.8 %, 0.06 %."""
    size = abs(fraction) * 100
    digits = 0 if size >= 9.95 else 1 if size >= 0.1 else 2
    return f"{size:.{digits}f}\u00a0%"


def signed_percent(fraction: float | None) -> str:
    """A change in percent, always with one decimal and a sign: −31.2 %, +0.4 %, 0.0 %; a dash where there is none."""
    if fraction is None:
        return "–"
    text = f"{abs(fraction) * 100:.1f}"
    sign = "" if float(text) == 0 else "−" if fraction < 0 else "+"
    return f"{sign}{text}\u00a0%"


def figure(value: float | None, metric: str = "perplexity") -> str:
    """One value of a metric as it is printed: 40.13, 1.204, 61.2 %; a dash where there is none."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞"
    if metric in ("accuracy", "token_accuracy"):
        return f"{value * 100:.1f}\u00a0%"
    if metric == "bits_per_byte":
        return f"{value:.3f}"
    return f"{value:,.0f}" if value >= 10_000 else f"{value:.1f}" if value >= 1000 else f"{value:.2f}"


def _row(name: str, key: str, found: Mapping[str, Mapping[str, Any]]) -> Row:
    """`null` stands for a value that was not finite."""
    values = {phase: means[key] for phase, means in found.items() if key in means}
    return Row(name, {phase: math.nan if value is None else float(value) for phase, value in values.items()})


def _rows(key: str, found: Mapping[str, Mapping[str, Any]]) -> tuple[Row, ...]:
    names = sorted({name for means in found.values() for name in means.get(key) or {}})
    flat = {phase: means.get(key) or {} for phase, means in found.items()}
    return tuple(_row(name, name, flat) for name in names)


def _headline(c: Comparison) -> str:
    change = c.micro.change()
    beside_pooled = _beside_pooled(c)
    if change is None:
        start = f"The federated model's perplexity is {figure(c.micro.values['federated'])}"
        return f"{start}{beside_pooled}; the base model was not evaluated beside it."
    if change < -SAME:
        where = _count(c, lower=True)
        return f"Federated training lowered perplexity{where}, by {percent(change)} overall{beside_pooled}."
    if change > SAME:
        where = _count(c, lower=False)
        rose = f"perplexity rose{where}, by {percent(change)} overall{beside_pooled}"
        return f"Federated training did not help here: {rose}."
    return f"Federated training left perplexity as it was overall{beside_pooled}."


def _count(c: Comparison, *, lower: bool) -> str:
    changes = [change for row in c.domains if (change := row.change()) is not None]
    if not changes:
        return ""
    return f" on {sum((change < 0) == lower and change != 0 for change in changes)} of {len(changes)} domains"


def _beside_pooled(c: Comparison) -> str:
    gap = c.micro.change("pooled", "federated")
    if gap is None:
        return ""
    if abs(gap) <= SAME:
        return ", and matched pooling the data"
    if gap < 0:
        return f", and ended {percent(gap)} below pooling the data"
    if gap > NEAR:
        return f", and stays {percent(gap)} above what pooling the data gives"
    return f", and came within {percent(gap)} of pooling the data"


def _exceptions(c: Comparison) -> str:
    """The domains that went the other way than the whole."""
    change = c.micro.change()
    if change is None or abs(change) <= SAME:
        return ""
    odd = [row for row in c.domains if (own := row.change()) is not None and abs(own) > SAME and own * change < 0]
    if not odd:
        return ""
    return f"It is {'higher' if change < 0 else 'lower'} than the base model's on {listed([row.name for row in odd])}."


def _beside_alone(c: Comparison) -> str:
    gap = c.micro.change("local_only", "federated")
    if gap is None:
        return ""
    if abs(gap) <= SAME:
        return "The silos reach the same perplexity alone."
    if gap < 0:
        return f"It is {percent(gap)} lower than what the silos reach alone."
    gain = "on this measure they gain nothing by federating"
    return f"It is {percent(gap)} higher than what the silos reach alone: {gain}."


def _accuracy(evaluation: Evaluation) -> str:
    c = compare(evaluation, "accuracy")
    if c is None or "federated" not in c.micro.values:
        return ""
    end = figure(c.micro.values["federated"], "accuracy")
    start = c.micro.values.get("base")
    return f"Accuracy is {end}." if start is None else f"Accuracy went from {figure(start, 'accuracy')} to {end}."


def listed(names: Sequence[str], most: int = 3) -> str:
    """Names as words: "a", "a and b", "a, b, c and 4 others"."""
    shown = list(names[:most])
    rest = len(names) - len(shown)
    if rest:
        shown.append(f"{rest} other{'s' if rest > 1 else ''}")
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
