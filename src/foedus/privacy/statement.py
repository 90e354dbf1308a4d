"""A guarantee in plain words, from the facts of a plan as a ledger records them: unit, neighbours, adversary, ε, δ."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Facts = Mapping[str, Any]

UNITS = {
    "example": "one example (a row of a silo's data, with all its windows)",
    "author": "one author (everything that one author wrote in one silo)",
    "silo": "one silo (all that it holds)",
}
SIMULATED = (
    "SIMULATED NOISE: it was drawn from the treaty's seed, so whoever knows the seed can take it off. The figures say"
    " what real noise would cost; nobody is protected by this run."
)
UNBOUNDED = "No guarantee: noise was added, but what one unit can do to it was not limited, so no epsilon holds."
AGAINST_ALL = (
    "Against: whoever sees everything that leaves a silo, in every round: the coordinator, other silos, and all who get"
    " the model, together, with any knowledge of their own. Trusted: the silo itself, its machine and its random"
    " numbers."
)
NOT_PROMISED = (
    "Not promised: that nothing can be learned about a person from what others wrote, or from many examples of one"
    " person."
)


def statement(facts: Facts, epsilon: float | None) -> list[str]:
    """Sentences. `epsilon`: what was spent, its upper end; None or infinite where there is no guarantee."""
    simulated = [SIMULATED] if facts.get("simulated_noise") else []
    if epsilon is None or not math.isfinite(epsilon):
        return [*simulated, UNBOUNDED]
    unit = str(facts["unit"])
    return [
        *simulated,
        f"Differential privacy with epsilon = {round_up(epsilon)} and delta = {facts['delta']:g}, for the presence of"
        f" {UNITS[unit]}.",
        _neighbours(facts),
        _adversary(facts),
        _mechanism(facts),
        *_surveys(facts),
        *_beyond(facts),
    ]


def _neighbours(facts: Facts) -> str:
    if facts["unit"] == "silo" and _distributed(facts):
        return f"Neighbours: two federations that differ in one silo, {facts['neighbours']}."
    return f"Neighbours: two collections of data of which one has one {facts['unit']} more ({facts['neighbours']})."


def _distributed(facts: Facts) -> bool:
    """Whether the noise was made of shares in secure sums; no older record has the word."""
    terms = facts["terms"]
    return bool(terms["placement"] == "shared" and terms.get("word"))


def _adversary(facts: Facts) -> str:
    terms = facts["terms"]
    if _distributed(facts):
        return _against_shares(terms)
    if facts["unit"] != "silo" or terms["placement"] == "silo":
        return AGAINST_ALL
    if terms["placement"] == "shared":
        return (
            f"Against: whoever sees only the sum of at least {terms['minimum']} updates, in every round, and the model."
            " The coordinator of this version sees each update with a share of the noise alone: against it this"
            " guarantee does not hold."
        )
    secret = ", and nobody else learns who took part" if terms["rate"] < 1 else ""
    return (
        "Against: whoever sees the released models of all rounds, with any knowledge of their own. Trusted: the"
        f" coordinator, which sees every update before it adds the noise{secret}."
    )


def _against_shares(terms: Mapping[str, Any]) -> str:
    least, colluding = terms["minimum"], terms["colluding"]
    who = (
        f"the coordinator and at most {colluding} of the silos together, and all others who get the model"
        if colluding
        else "the coordinator, and all who get the model, but not a silo that took part: it can take its own share off"
    )
    return (
        f"Against: {who}, with any knowledge of their own. They see the sum of at least {least} silos' updates in every"
        f" round, each with a share of the noise, and the shares of {least - colluding} make it whole. A round of fewer"
        f" than {least} silos is abandoned, and nothing of it is released. Trusted: the silo itself; that all but those"
        " who collude add their shares; and the secure sum, which shows nobody a single update."
    )


def _mechanism(facts: Facts) -> str:
    terms, rate, z = facts["terms"], facts["sampling_rate"], facts["noise_multiplier"]
    kind = "correlated Gaussian" if terms["bands"] > 1 else "discrete Gaussian" if terms["discrete"] else "Gaussian"
    drawn = "every unit in all of it" if rate == 1 else f"each unit in a step with probability {rate:g}"
    if terms["bands"] > 1 and rate < 1:
        drawn = f"each unit in every {round(1 / rate)}th step, and none by chance"
    whole = facts["unit"] == "silo" or _distributed(facts)
    what = "rounds" if whole else "steps in each silo"
    last = f" in the first round and {z * terms['ratio']:.3f} in the last" if terms["ratio"] != 1 else ""
    shares = f", in shares in words of {terms['word']} bits" if _distributed(facts) else ""
    rounding = " It covers what rounding to integers adds to an update." if shares else ""
    noise = f"{kind} noise of multiplier {z:.3f}{last}{shares}"
    return f"How: {facts['steps']:,} {what}, {drawn}, clipped, with {noise}.{rounding}"


def _surveys(facts: Facts) -> list[str]:
    """What leaves a silo beside its steps; no older record has the word."""
    terms, unit = facts["terms"], facts["unit"]
    rounds = terms.get("surveys", ())
    if not rounds:
        return []
    names = ", ".join(name for name, _ in terms["survey_parts"])
    drawn = "every unit" if terms["survey_rate"] == 1 else f"each unit with probability {terms['survey_rate']:g}"
    if unit == "author" and terms["group"] > 1:
        drawn = drawn.replace("unit", "example")
    times = "once" if len(rounds) == 1 else f"{len(rounds)} times"
    ratio = "the multiplier" if terms["survey_ratio"] == 1 else f"{terms['survey_ratio']:g} times the multiplier"
    return [
        f"Surveys: {times}, in round{'s' * (len(rounds) > 1)} {', '.join(str(round + 1) for round in rounds)}, each"
        f" silo also releases sums of what the model makes of its units ({names}), {drawn} in them: each part clipped"
        f" to norm 1, with Gaussian noise of all parts together of {ratio} of that round's steps. They leave the silo"
        " inside its update, for whoever sees that, and what is made of their sum goes to all silos. The epsilon"
        " covers them."
    ]


def _beyond(facts: Facts) -> list[str]:
    """What a reader may think is promised, and is not."""
    unit, lines = facts["unit"], [NOT_PROMISED]
    if unit == "example":
        lines.append("Several examples of one author or one case are protected as a group only: a larger epsilon.")
    if unit != "silo" and _distributed(facts):
        lines.append(
            "All silos' units are in one sum and under one budget: whoever is in several silos, or there under several"
            " names, is protected as a group only: a larger epsilon."
        )
        return lines
    if unit == "author":
        lines.append(
            "Whoever writes in several silos, or under several names, spends the epsilon of each: they add up."
        )
    if unit != "silo":
        lines.append("Each silo spends its own budget; silos do not add up for a unit that is in one silo alone.")
    return lines


def round_up(epsilon: float) -> str:
    """To two places, never down.

    >>> round_up(7.991)
    '8.00'
    """
    return f"{math.ceil(epsilon * 100 - 1e-9) / 100:.2f}"
