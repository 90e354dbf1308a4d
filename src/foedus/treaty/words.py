"""A treaty in plain words: what leaves a silo, and what is promised about it. Short and honest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..privacy.statement import statement as words
from .core import Treaty

_LEAKS = (
    "Updates are not protected. From a silo's update, from the sum of all, or from the finished model one can learn"
    " whether a given text was used (membership), properties of the data such as its topics and classes, and the text"
    " itself: exact recovery of whole sequences has been measured from full gradients, and from LoRA's wherever the"
    " rank is at least the number of tokens. A smaller rank, more local steps or more silos make that harder and"
    " promise nothing. Nothing stops a curious coordinator, or whoever reads its memory or its wires: it sees every"
    " update by itself."
)


def statement(treaty: Treaty, facts: Mapping[str, Any] | None = None) -> str:
    """The guarantee in words, or that there is none. `facts`: of the treaty's privacy plan."""
    if facts is None:
        return unprotected()
    uncovered = "; ".join(not_covered(treaty))
    beside = f" Not covered by the guarantee: {uncovered}." if uncovered else ""
    return " ".join(words(facts, facts["epsilon"])) + beside


def unprotected() -> str:
    """What a treaty without [privacy] promises."""
    return f"No privacy guarantee: unit none, epsilon none. {_LEAKS}"


def privacy(treaty: Treaty, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The guarantee as `summary.json` records it: unit, epsilon, delta, statement, and how it was earned."""
    if facts is None:
        return {"unit": "none", "epsilon": None, "delta": None, "statement": statement(treaty)}
    return {**facts, "statement": statement(treaty, facts), "not_covered": not_covered(treaty)}


def not_covered(treaty: Treaty) -> list[str]:
    """What reads private data and is not charged to the guarantee."""
    often = treaty.evaluation.every <= treaty.algorithm.rounds
    found = [
        (treaty.disclosure.loss, "each silo's training loss"),
        (treaty.disclosure.holdings, "how much each silo holds"),
        (often, "the exact evaluation sums on each silo's validation share, and what is chosen by them (when to stop,"
                " which round to keep, hyper-parameters)"),
        (True, "the final evaluation sums on held-out examples"),
        ("pooled" in treaty.evaluation.baselines, "the pooled baseline, which is for simulations"),
        ("local" in treaty.evaluation.baselines, "the baselines of silos alone"),
        (treaty.model.task == "sequence-classification", "the names of the labels"),
        (True, "hyper-parameters that were tuned on the same data in earlier runs"),
        (True, "how long a silo took, and that it failed"),
    ]  # fmt: skip
    return [what for holds, what in found if holds]


def describe(treaty: Treaty, numbers: int | None = None) -> list[str]:
    """What leaves a silo, a line each. `numbers`: how many parameters are trained, where the model is known."""
    return [*_each_round(treaty, numbers), *_evaluations(treaty), *_once(treaty)]


def _each_round(treaty: Treaty, numbers: int | None) -> list[str]:
    many = f"{numbers:,} numbers" if numbers is not None else "one number for each trained parameter"
    lines = [f"its update, in every round it takes part in: {many}, {_protected(treaty)}"]
    if treaty.server.weighting == "examples":
        most = treaty.server.max_weight
        capped = f", {most:g} at most" if most is not None else ""
        lines.append(f"with its update, as its weight: how many training examples it has{capped}")
    if treaty.disclosure.loss:
        lines.append("with its update: the sum of its training losses, and of how many targets")
        lines.append("its training loss, every round, under its name in the run's records")
    return lines


def _protected(treaty: Treaty) -> str:
    p = treaty.privacy
    if p.unit == "none":
        return "unprotected"
    if p.max_norm == "none":
        return "with noise that guarantees nothing"
    if p.unit != "silo" or p.placement == "silo":
        return "with noise that the silo added"
    return (
        "clipped, with a share of the noise"
        if p.placement == "shared"
        else "clipped, without noise until the coordinator adds it"
    )


def _evaluations(treaty: Treaty) -> list[str]:
    often = treaty.evaluation.every
    rounds = "round" if often == 1 else f"{often} rounds"
    when = f"every {rounds} and at the end" if often <= treaty.algorithm.rounds else "at the end"
    lines = [f"evaluation sums by domain, {when}: nats of loss, targets, bytes of text, correct predictions"]
    if "local" in treaty.evaluation.baselines:
        lines.append('for the baseline "local": the same sums, and losses, of a model trained on its text alone')
    if "pooled" in treaty.evaluation.baselines:
        lines.append(
            'for the baseline "pooled": all its training text; ask for it only where one party may hold it all'
        )
    return lines


def _once(treaty: Treaty) -> list[str]:
    lines = ["its name, how long it took, how many bytes it sent, and if it failed why"]
    if treaty.model.task == "sequence-classification":
        lines.append("the names of its labels, once: the model's classes are those of all silos")
    if treaty.disclosure.holdings:
        lines.append("its holdings, once: how many examples and tokens it has, by split, domain and label")
    return lines
