"""A run's guarantee as its readers meet it: the same figures and words on the page, in the card and on a terminal.

`guarantee_of` reads what a summary or a ledger records; `privacy.py` works out what the rounds cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..privacy.statement import round_up, statement
from .words import thousands

UNITS = {
    "example": ("one example", "a row of a silo's data, with all its windows"),
    "author": ("one author", "everything that one author wrote in one silo"),
    "silo": ("one silo", "all that it holds"),
}

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Guarantee:
    """What a run promises. `epsilon` None: nothing. `sentences`: the whole statement, none where nothing was protected.

    `simulated`: the figures hold for real noise, and this run's was not. `noise`: (multiplier, how it was added), or
    None.
    """

    unit: str
    epsilon: float | None
    delta: float | None
    neighbours: str = ""
    against: str = ""
    simulated: bool = False
    rdp: float | None = None
    noise: tuple[str, str] | None = None
    sentences: tuple[str, ...] = ()
    not_covered: tuple[str, ...] = ()

    @property
    def stated(self) -> bool:
        """Whether there is an ε that would hold with real noise."""
        return self.unit != "none" and self.epsilon is not None

    @property
    def protected(self) -> bool:
        """Whether somebody is protected."""
        return self.stated and not self.simulated

    @property
    def protects(self) -> str:
        """The unit with its number: "one example"."""
        return UNITS.get(self.unit, (f"one {self.unit}", ""))[0]

    @property
    def what(self) -> str:
        """The unit, spelled out."""
        return UNITS.get(self.unit, ("", self.unit))[1].capitalize()

    @property
    def short(self) -> str:
        """ε, δ, the unit and the adversary on one line, or "" without a guarantee."""
        if not self.stated:
            return ""
        parts = [f"epsilon = {epsilon_text(self.epsilon)}"]
        parts += [f"delta = {self.delta:g}"] if self.delta is not None else []
        neighbours = f" ({self.neighbours})" if self.neighbours else ""
        return f"{' and '.join(parts)} for {self.protects}{neighbours}{', ' * bool(self.against)}{self.against}"


def guarantee_of(privacy: Values) -> Guarantee:
    """The guarantee in a summary's `privacy` (or in the facts that open a ledger); what is not recorded is left out."""
    epsilon, unit = privacy.get("epsilon"), str(privacy.get("unit") or "none")
    known = "terms" in privacy
    return Guarantee(
        unit=unit,
        epsilon=epsilon,
        delta=privacy.get("delta"),
        neighbours=str(privacy.get("neighbours") or ""),
        against=_against(unit, privacy["terms"]) if known else "",
        simulated=bool(privacy.get("simulated_noise")),
        rdp=privacy.get("epsilon_rdp"),
        noise=_noise(unit, privacy) if known else None,
        sentences=tuple(statement(privacy, epsilon)) if known else (),
        not_covered=tuple(privacy.get("not_covered") or ()),
    )


def epsilon_text(epsilon: float | None) -> str:
    """ε to two places, never down, as the statement has it.

    >>> epsilon_text(7.991), epsilon_text(None)
    ('8.00', 'none')
    """
    return "none" if epsilon is None else round_up(epsilon)


def sections(sentences: Sequence[str]) -> list[tuple[str, str]]:
    """The statement as (heading, text); what has no heading and follows one that has comes last, under "Also".

    A heading in capitals is a warning, and what follows it goes on as if it were not there.

    >>> sections(("Holds.", "How: by noise.", "Silos add up."))
    [('', 'Holds.'), ('How', 'by noise.'), ('Also', 'Silos add up.')]
    """
    found: list[tuple[str, str]] = []
    also: list[str] = []
    for sentence in sentences:
        head, colon, rest = sentence.partition(": ")
        if colon and len(head.split()) <= 2:
            found.append((head, rest))
        elif found and found[-1][0] and not found[-1][0].isupper():
            also.append(sentence)
        else:
            found.append(("", sentence))
    return [*found, *([("Also", " ".join(also))] if also else [])]


def _distributed(terms: Values) -> bool:
    """Whether the noise came in shares, in sums of which nobody sees a part."""
    return terms["placement"] == "shared" and bool(terms.get("word"))


def _against(unit: str, terms: Values) -> str:
    if _distributed(terms):
        few = terms["colluding"]
        return f"against the coordinator and {few} {'silo' if few == 1 else 'silos'} in league with it"
    if unit != "silo" or terms["placement"] == "silo":
        return "against everybody outside the silo"
    if terms["placement"] == "shared":
        return "against whoever sees only sums; the coordinator sees more"
    return "against all but the coordinator, which is trusted"


def _noise(unit: str, facts: Values) -> tuple[str, str] | None:
    multiplier, rate = facts.get("noise_multiplier"), float(facts["sampling_rate"])
    if multiplier is None:
        return None
    whole = unit == "silo" or _distributed(facts["terms"])
    steps = f"{thousands(facts['steps'])} {'rounds' if whole else 'steps in each silo'}"
    if facts["terms"]["bands"] > 1:
        return f"{multiplier:.3f}", f"times the clip norm, correlated over {steps}"
    ratio = facts["terms"]["ratio"]
    falls = "" if ratio == 1 else f" at first and {multiplier * ratio:.3f} in the last round"
    drawn = "" if rate == 1 else f", each unit in {100 * rate:.3g}\u00a0% of them by chance"
    return f"{multiplier:.3f}", f"times the clip norm{falls}, in {steps}{drawn}"
