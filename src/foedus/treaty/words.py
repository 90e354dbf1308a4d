"""A treaty in plain words: what leaves a silo, and what is promised about it. Short and honest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..privacy.statement import statement as words
from ..secure.backends import trust
from ..secure.parameters import SMALL
from .core import Treaty

_LEARNED = (
    "one can learn whether a given text was used (membership), properties of the data such as its topics and classes,"
    " and the text itself: exact recovery of whole sequences has been measured from full gradients, and from LoRA's"
    " wherever the rank is at least the number of tokens. A smaller rank, more local steps or more silos make that"
    " harder and promise nothing."
)
_OPEN = (
    f"Updates are not protected. From a silo's update, from the sum of all, or from the finished model {_LEARNED}"
    " Nothing stops a curious coordinator, or whoever reads its memory or its wires: it sees every update by itself."
)
_SECRET = (
    f"A sum is not a guarantee: from it, or from the finished model, {_LEARNED} The sums of two rounds can be"
    " subtracted: who was in one of them alone shows in what is left."
)


def statement(treaty: Treaty, facts: Mapping[str, Any] | None = None) -> str:
    """The guarantee in words, or that there is none. `facts`: of the treaty's privacy plan."""
    if facts is None:
        return unprotected(treaty)
    uncovered = "; ".join(not_covered(treaty))
    beside = [f"Not covered by the guarantee: {uncovered}."] if uncovered else []
    return " ".join([*words(facts, facts["epsilon"]), *_sums(treaty), *beside])


def unprotected(treaty: Treaty | None = None) -> str:
    """What a treaty without [privacy] promises; without a treaty, what sums in the open do."""
    none = "No privacy guarantee: unit none, epsilon none."
    secret = _sums(treaty) if treaty else []
    return " ".join([none, *secret, _SECRET] if secret else [none, _OPEN])


def privacy(treaty: Treaty, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The guarantee as `summary.json` records it: unit, epsilon, delta, statement, and how it was earned."""
    if facts is None:
        return {"unit": "none", "epsilon": None, "delta": None, "statement": statement(treaty)}
    return {**facts, "statement": statement(treaty, facts), "not_covered": not_covered(treaty)}


def not_covered(treaty: Treaty) -> list[str]:
    """What reads private data and is not charged to the guarantee."""
    often = treaty.evaluation.every <= treaty.algorithm.rounds
    secret = treaty.secure.sums != "open"
    validated = "the silos' validation shares together" if secret else "each silo's validation share"
    found = [
        (treaty.disclosure.loss, "the sum of the silos' training losses" if secret else "each silo's training loss"),
        (treaty.disclosure.holdings, "how much each silo holds"),
        (often, f"the exact evaluation sums on {validated}, and what is chosen by them (when to stop, which round to"
                " keep, hyper-parameters)"),
        (True, "the final evaluation sums on held-out examples"),
        ("pooled" in treaty.evaluation.baselines, "the pooled baseline, which is for simulations"),
        ("local" in treaty.evaluation.baselines, "the baselines of silos alone"),
        (treaty.model.task == "sequence-classification", "the names of the labels"),
        (treaty.headed, "the names of the topics"),
        (_answers_from_its_text(treaty), "what a silo's own store of text answers, the figures measured with it among"
                                         " that"),
        (True, "hyper-parameters that were tuned on the same data in earlier runs"),
        (True, "how long a silo took, and that it failed"),
    ]  # fmt: skip
    return [what for holds, what in found if holds]


def describe(treaty: Treaty, numbers: int | None = None) -> list[str]:
    """What leaves a silo, a line each. `numbers`: how many parameters are trained, where the model is known."""
    return [*_each_round(treaty, numbers), *_evaluations(treaty), *_once(treaty)]


def _each_round(treaty: Treaty, numbers: int | None) -> list[str]:
    many = f"{numbers:,} numbers" if numbers is not None else "one number for each trained parameter"
    secret = treaty.secure.sums != "open"
    beside = "in the same secret sum" if secret else "with its update"
    lines = [*_update(treaty, many), *_beside_the_update(treaty, beside)]
    if treaty.server.weighting == "examples":
        most = treaty.server.max_weight
        capped = f", {most:g} at most" if most is not None else ""
        lines.append(f"{beside}, as its weight: how many training examples it has{capped}")
    if treaty.disclosure.loss:
        lines.append(f"{beside}: the sum of its training losses, and of how many targets")
        if not secret:
            lines.append("its training loss, every round, under its name in the run's records")
    if secret and (treaty.privacy.unit == "none" or treaty.privacy.placement == "silo"):
        lines.append(f"{beside}: whether a number of its update was above {treaty.secure.range:g}, and all scaled down")
    if treaty.secure.sums == "masked":
        lines.append("public keys, and shares of its masks' secrets, each sealed for the one silo that keeps it")
    if treaty.secure.sums == "encrypted":
        holders = treaty.secure.key_holders
        first = "first silo" if holders == 1 else f"first {holders} silos"
        lines.append(f"from the {first} by name: public keys to encrypt under, and every sum, decrypted once")
    return lines


def _update(treaty: Treaty, many: str) -> list[str]:
    """The line about what a round is for."""
    how, name = f"{_protected(treaty)}{_hidden(treaty)}", treaty.algorithm.name
    if name == "alone":
        return ["no update: zeros, in every round it takes part in; what it learns stays with it"]
    if name != "fedlap":
        return [f"its update, in every round it takes part in: {many}, {how}"]
    f, noised = treaty.fedlap, treaty.privacy.unit != "none"
    made = "made of gradients that were noised" if noised else "made of its gradients, which can be like its own texts"
    return [f"in place of an update, in every round: {f.samples} synthetic texts of {f.length} tokens, {made}"]


def _beside_the_update(treaty: Treaty, beside: str) -> list[str]:
    """What else an algorithm's silos send, a line each."""
    if treaty.algorithm.name == "scaffold":
        return [f"{beside}: how its control variate changed, as many numbers again, {_protected(treaty)}"]
    if treaty.algorithm.name != "alignment":
        return []
    a, rounds = treaty.alignment, treaty.alignment.every
    when = "every round" if rounds == 1 else f"every {rounds} rounds"
    how = f"from a survey with noise of its own, {when}" if treaty.privacy.unit in _INSIDE else f"exactly, {when}"
    how = f"inside the clip of the update, {when}" if treaty.privacy.unit == "silo" else how
    lines = [f"{beside}: the mean embedding of its text, {a.features} numbers a layer, {how}, with its length"]
    if a.head == "means":
        lines.append(f"{beside}: for each topic the mean features of its texts and its share of them, {how}")
    if treaty.marginal:
        lines.append(
            f"{beside}: how often each of the first {a.tokens} tokens is in its text, and was expected there, {how}"
        )
    if a.target is not None:
        lines.append(f"from {a.target} alone: the same by itself; whatever is made of it goes to all silos")
    if a.attention != "none":
        named = treaty.disclosure.attention and treaty.secure.sums == "open"
        shown = ", and its weight stands under its name in the run's records" if named else ""
        lines.append(f"{beside}: what it weighs, which follows from {_ATTENTION[a.attention]}{shown}")
    return lines


_INSIDE = ("example", "author")
_ATTENTION = {
    "entropy": "how unsure the model is of its text",
    "rank": "how rich the features of its text are",
    "error": "how often the topic head is wrong about its text",
    "distance": "how far its text is from the others'",
}


def _answers_from_its_text(treaty: Treaty) -> bool:
    return treaty.algorithm.name == "knn-adapter" and treaty.knn.answers == "own"


def _protected(treaty: Treaty) -> str:
    p = treaty.privacy
    if p.unit == "none":
        return "unprotected" if treaty.secure.sums == "open" else "without noise"
    if p.max_norm == "none":
        return "with noise that guarantees nothing"
    if p.placement == "silo":
        return "with noise that the silo added"
    return (
        "clipped, with a share of the noise"
        if p.placement == "shared"
        else "clipped, without noise until the coordinator adds it"
    )


def _hidden(treaty: Treaty) -> str:
    """How an update is kept from the coordinator, as the end of a sentence about it."""
    s = treaty.secure
    if s.sums == "open":
        return ""
    how = "masked"
    if s.sums == "encrypted":
        how = "encrypted" if s.encrypted_share == 1 else f"{s.encrypted_share:.0%} of them encrypted, the rest masked"
    return f", {how}: the coordinator reads the sum of {_crowd(treaty)} and no single one"


def _crowd(treaty: Treaty) -> str:
    if treaty.secure.group_size is not None:
        return f"a random group of {treaty.secure.group_size} silos or more ({treaty.cohort.minimum} if some vanish)"
    return f"at least {treaty.cohort.minimum} silos"


def _if_it_lies(treaty: Treaty) -> str:
    """What a lying coordinator can make of silos that mask with some of the others only."""
    if treaty.secure.group_size is not None or treaty.privacy.placement == "shared":
        return ""
    return (
        f"Of more than {SMALL} silos each masks with some: a coordinator that lies may then learn sums of fewer, in"
        " which each honest silo stands beside at least threshold − corrupt honest neighbours. "
    )


def _sums(treaty: Treaty) -> list[str]:
    """What secure sums keep from whom, in sentences; none for sums in the open."""
    s = treaty.secure
    if s.sums == "open":
        return []
    lines = [f"Secure sums: the coordinator sees only the sum of the updates of {_crowd(treaty)}, and no single one."]
    if s.group_size is not None:
        lines.append(f"A silo hides in its group, of {treaty.cohort.minimum} at least, and not among all silos.")
    if s.sums == "masked" or s.encrypted_share < 1:
        lines.append(
            f"Masks hold against a coordinator that lies and up to {100 * s.corrupt:g}% of the silos (rounded down) in"
            " league with it, where silos know each other's public keys beforehand; each of those takes its own part"
            f" off a sum. {_if_it_lies(treaty)}No mask stops a silo from sending a false update."
        )
    if s.sums == "encrypted":
        lines.append(trust(s.key_holders))
    return lines


def _evaluations(treaty: Treaty) -> list[str]:
    often = treaty.evaluation.every
    rounds = "round" if often == 1 else f"{often} rounds"
    when = f"every {rounds} and at the end" if often <= treaty.algorithm.rounds else "at the end"
    secret = treaty.secure.sums != "open"
    alone = ", under its name: no mask covers them" if secret else ""
    kept = ", read only as the sum of all silos" if secret else ""
    lines = [f"evaluation sums by domain, {when}: nats of loss, targets, bytes of text, correct predictions{kept}"]
    if "local" in treaty.evaluation.baselines:
        lines.append(
            f'for the baseline "local": the same sums, and losses, of a model trained on its text alone{alone}'
        )
    if "pooled" in treaty.evaluation.baselines:
        lines.append(
            'for the baseline "pooled": all its training text; ask for it only where one party may hold it all'
        )
    if secret and {"local", "pooled"} & set(treaty.evaluation.baselines):
        lines.append("(these baselines are for simulations: they show what secure sums hide)")
    return lines


def _once(treaty: Treaty) -> list[str]:
    lines = ["its name, how long it took, how many bytes it sent, and if it failed why"]
    if treaty.model.task == "sequence-classification":
        lines.append("the names of its labels, once: the model's classes are those of all silos")
    if treaty.headed:
        lines.append("the names of its topics, once: the topic head's classes are those of all silos")
    if treaty.disclosure.holdings:
        lines.append("its holdings, once: how many examples and tokens it has, by split, domain and label")
        if treaty.data.scrub:
            lines.append("with its holdings: how many addresses, names and URLs were replaced by marks")
    return lines
