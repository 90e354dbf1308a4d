"""The privacy plan: sampler, clip, noise and accounting event, made together so that they cannot disagree.

`make_plan(terms, source)` finds the noise multiplier for the ε that was asked, or the ε of the multiplier that was
given. What the run then needs (`steps_at_silos`, `survey`, `stages`, `mechanism`, `sampler`, `aggregator`) comes from
the plan alone, and a test holds that nothing else makes them. Read `accountant.py` for ε, `statement.py` for the words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

from ..errors import GuaranteeError
from ..server.aggregators import Aggregator, ExpectedMean, WeightedMean
from ..server.samplers import Sampler, SecretPoisson
from ..stages.base import Stage, chain
from ..stages.clip import Clip
from ..stages.grid import OTHERS, Grid
from ..stages.noise import AddNoise
from ..stages.weigh import Weigh
from . import accountant, events, shares
from .correlated import Banded, optimal, sensitivity
from .mechanisms import AtSilos, Bare, Correlated, DiscreteGaussian, Gaussian, Mechanism
from .noise import Source
from .shares import CUT, FEWEST, GROWTH, NUMBERS, Lattice
from .steps import Following, PrivateSteps, parts_of
from .survey import COUNT, Survey

Event = Mapping[str, Any]
NEIGHBOURS = "add or remove one"
EMPTIED = "with all its data or with none; it takes part in both"
FINE = 2**-12
"""The grid of discrete noise, as a share of the noise's standard deviation."""
SWAMPED = 3.0
"""A mean whose noise is so many times longer than the longest update it may hold says little about anything."""


@dataclass(frozen=True)
class Terms:
    """What is asked for. Public numbers only.

    `unit`: whose presence is protected. Exactly one of `epsilon` (> 0; the multiplier is found), `noise_multiplier` (>
    0) and `noise_std` (> 0, in update units: a bare σ). `delta` in (0, 1). `max_norm`: the clip, > 0; None with a bare
    σ means no clip and no guarantee. `ratio`: the last round's multiplier over the first's, declared before the run.

    Inside silos (`unit` "example" or "author"): `steps` a round; `rate` q and `divisor` B as in `steps.py`; `rows` of
    a unit in a step; `group`: when single examples are sampled to protect authors, the most examples one author has,
    else 1. `clipping` and `shares`: see `parts_of`. `quantile`: the clip norm follows it. `bands`: > 1 for correlated
    noise, in steps (inside silos) or rounds.

    Whole silos (`unit` "silo"): `silos` that could take part, `expected` of them in a round (public: the mean's
    divisor), `rate` of each one's taking part where nobody learns who did, else 1; `placement` of the noise: "server",
    "silo" (each protects its own update), or "shared" (each adds a share, and only the sum is protected); `minimum` of
    silos whose shares make the noise whole. `discrete`: integers on a public grid.

    Secure sums: `word`, the bits of a coordinate (16, 32 or 64; 0 where sums are in the open), and `parties`, the most
    silos whose words are added. With them a placement of "shared" is distributed noise, for units inside silos too: it
    is whole without the shares of `colluding` silos. Inside silos that takes one step of plain SGD a round, of the
    learning rate `lr` (> 0), and a mean over `expected` silos.

    Surveys (see `survey.py`), for units inside silos, with noise in each silo: `surveys`, the rounds that take one,
    from 0 and ascending; `survey_parts`, each part's name and its share of 1/z², "count" among them, adding up to 1;
    `survey_rate`, q in (0, 1] of a unit's being in one; `survey_ratio`, > 0, its multiplier z over that of the round's
    steps.
    """

    unit: Literal["example", "author", "silo"]
    delta: float
    rounds: int
    epsilon: float | None = None
    noise_multiplier: float | None = None
    noise_std: float | None = None
    max_norm: float | None = 1.0
    ratio: float = 1.0
    steps: int = 1
    rate: float = 1.0
    divisor: float = 1.0
    rows: int = 1
    group: int = 1
    clipping: Literal["whole", "layers", "factors"] = "whole"
    shares: tuple[float, ...] = ()
    quantile: float | None = None
    bands: int = 1
    silos: int = 1
    expected: float = 1.0
    placement: Literal["server", "silo", "shared"] = "server"
    minimum: int = 1
    discrete: bool = False
    word: int = 0
    parties: int = 1
    colluding: int = 0
    lr: float = 0.0
    surveys: tuple[int, ...] = ()
    survey_parts: tuple[tuple[str, float], ...] = ()
    survey_rate: float = 1.0
    survey_ratio: float = 1.0

    def __post_init__(self) -> None:
        given = [name for name in ("epsilon", "noise_multiplier", "noise_std") if getattr(self, name) is not None]
        _check(len(given) == 1, "exactly one of epsilon, noise_multiplier and noise_std", " and ".join(given) or "none")
        for name in (*given, "max_norm", "ratio", "divisor", "expected", "survey_ratio"):
            value = getattr(self, name)
            _check(value is None or 0 < value < math.inf, f"0 < {name} < ∞", f"{name}={value}")
        _check(0 < self.delta < 1, "0 < delta < 1", f"delta={self.delta}")
        for name in ("rate", "survey_rate"):
            _check(0 < getattr(self, name) <= 1, f"0 < {name} ≤ 1", f"{name}={getattr(self, name)}")
        for name in ("rounds", "steps", "rows", "group", "bands", "silos", "minimum", "parties"):
            _check(getattr(self, name) >= 1, f"{name} ≥ 1", f"{name}={getattr(self, name)}")
        _check(self.max_norm is not None or self.noise_std is not None, "a max_norm to clip to", "none")
        _check(self.max_norm is not None or self.quantile is None, "a max_norm for the quantile to start from", "none")
        _check(self.word in (0, 16, 32, 64), "word 16, 32 or 64, or 0 for sums in the open", f"word={self.word}")
        _check(self.colluding >= 0 and 0 <= self.lr < math.inf, "colluding ≥ 0 and 0 ≤ lr < ∞",
               f"colluding={self.colluding} and lr={self.lr}")  # fmt: skip
        self._check_shares()
        self._check_combinations()
        if self.surveys or self.survey_parts:
            self._check_surveys()
        if self.distributed and self.local:
            self._check_one_step()

    def _check_combinations(self) -> None:
        whole = self.unit == "silo"
        _check(not self.discrete or self.distributed or (whole and self.rate == 1 and self.bands == 1),
               "discrete noise for whole silos, all of them in every round", f"unit={self.unit!r}, rate={self.rate:g}",
               "No tight accountant is known for sampled discrete noise: take the Gaussian.")  # fmt: skip
        _check(self.bands == 1 or (self.ratio == 1 and self.quantile is None and self.group == 1),
               "correlated noise with one multiplier and one clip norm", "a schedule, a quantile or a group",
               "Leave them out, or take independent noise.")  # fmt: skip
        _check(self.bands == 1 or not whole or self.placement == "server", "correlated noise at the server",
               f"placement={self.placement!r}", "Place the noise at the server.")  # fmt: skip
        _check(self.rate == 1 or not whole or self.placement == "server",
               "a secret of who took part, which only a trusted coordinator keeps", f"placement={self.placement!r}",
               "Place the noise at the server, or leave hide_cohort out.")  # fmt: skip
        _check(self.quantile is None or self.clipping == "whole", "one clip norm to follow a quantile",
               f"clipping={self.clipping!r}", 'Clip "whole".')  # fmt: skip
        _check(self.quantile is None or not self.discrete, "a fixed clip norm with discrete noise", "a quantile",
               "Leave out the quantile.")  # fmt: skip
        _check(not self.shares or self.clipping != "whole", "shares for several parts", "one part",
               'Clip by "layers" or "factors".')  # fmt: skip

    def _check_shares(self) -> None:
        _check(self.discrete or self.word == 0, "noise that is an integer, in sums of integers that wrap",
               "Gaussian noise in floating point", 'Set noise = "discrete-gaussian".')  # fmt: skip
        if self.placement != "shared":
            return
        _check(not self.local or self.word > 0, "secure sums, where shares of noise protect units inside silos",
               "sums in the open", 'Set sums = "masked" in [secure], or placement = "silo".')  # fmt: skip
        _check(self.sharing >= 1, f"minimum > {self.colluding}, the silos that may take their shares of the noise off",
               f"minimum={self.minimum}", "Raise [cohort] minimum, or lower [secure] corrupt.")  # fmt: skip
        _check(self.word == 0 or self.parties >= self.minimum, f"parties ≥ {self.minimum}, the fewest silos in a sum",
               f"parties={self.parties}")  # fmt: skip

    def _check_surveys(self) -> None:
        names, parts = [name for name, _ in self.survey_parts], [share for _, share in self.survey_parts]
        in_order = bool(self.surveys) and list(self.surveys) == sorted(set(self.surveys) & set(range(self.rounds)))
        _check(in_order, f"surveys in some of the rounds 0 to {self.rounds - 1}, ascending", f"surveys={self.surveys}")
        _check(COUNT in names and len(set(names)) == len(names), f"survey_parts by name, {COUNT!r} among them",
               ", ".join(names) or "none")  # fmt: skip
        _check(all(share > 0 for share in parts) and math.isclose(sum(parts), 1.0, rel_tol=1e-9),
               "shares of survey_parts > 0 that add up to 1", f"{parts}")  # fmt: skip
        _check(self.local, "surveys of units inside silos, which have noise of their own", f"unit={self.unit!r}",
               "Leave them out: what a whole silo finds is one more part of its update, inside the clip.")  # fmt: skip
        _check(self.placement != "shared", "surveys beside steps with noise in each silo", "shares of noise",
               'Leave the surveys out, or set placement = "silo".')  # fmt: skip
        _check(self.bands == 1, "surveys beside independent noise", f"bands={self.bands}",
               "Leave the bands out, or the surveys.")  # fmt: skip

    def _check_one_step(self) -> None:
        _check(self.steps == 1 and self.lr > 0, "one local step, of a known learning rate, under shares of noise",
               f"steps={self.steps} and lr={self.lr:g}",
               'Set steps = 1 in [local], or placement = "silo", where each step has noise of its own.')  # fmt: skip
        plain = self.bands == 1 and self.group == 1 and self.quantile is None and self.clipping == "whole"
        _check(plain and self.max_norm is not None, "one fixed clip norm a unit, and independent noise, under shares",
               "bands, a quantile, examples in groups, several parts or no clip",
               'Leave them out, or set placement = "silo".')  # fmt: skip

    @property
    def distributed(self) -> bool:
        """Whether silos add shares of the noise to sums of which nobody sees a part."""
        return self.placement == "shared" and self.word > 0

    @property
    def sharing(self) -> int:
        """Among how many silos the noise is divided: as many as are left, when the fewest come and some collude."""
        return self.minimum - self.colluding if self.placement == "shared" else 1

    @property
    def unit_norm(self) -> float:
        """The most that one unit moves a silo's update, before it is rounded; L2, in update units."""
        norm = math.inf if self.max_norm is None else self.max_norm
        return norm * self.lr / self.divisor if self.distributed and self.local else norm

    @property
    def largest(self) -> float:
        """No number of an update is larger; inside silos, that of a whole batch whose units agree in one number."""
        return self.unit_norm * self.divisor if self.local else self.unit_norm

    @property
    def local(self) -> bool:
        """Whether silos protect units of their own, step by step."""
        return self.unit != "silo"

    @property
    def period(self) -> int:
        """With correlated noise: a unit takes part in every so-manieth step or round."""
        return max(1, round(1 / self.rate)) if self.local else 1


@dataclass(frozen=True)
class PrivacyPlan:
    """Terms with their noise. Make it with `make_plan`; `source` is where the noise and the secret coins come from."""

    terms: Terms
    multiplier: float
    source: Source

    def __post_init__(self) -> None:
        tail = self._lattice.tail if self._lattice else None
        if tail is not None and tail.std * min(self.multipliers) / max(self.multipliers) < FEWEST * (1 + GROWTH):
            raise GuaranteeError(
                f"words with room for {FEWEST:g} steps in the standard deviation of a silo's noise",
                f"{self.terms.word} bits for {self.terms.parties} silos",
                f"Set word = {min(64, 2 * self.terms.word)} in [secure], sum in smaller groups, or lower noise_ratio.",
            )

    # ---- what it costs ----

    @property
    def multipliers(self) -> tuple[float, ...]:
        """The noise multiplier of each round."""
        return _schedule(self.terms, self.multiplier)

    @cached_property
    def events(self) -> tuple[Event, ...]:
        """What each round costs the unit that takes part in all of it."""
        return round_events(self.terms, self.multiplier)

    def event(self, rounds: int | None = None) -> Event:
        """What the first `rounds` rounds cost together; all of them by default."""
        return composed(self.events[:rounds])

    @cached_property
    def epsilon(self) -> float:
        """ε of the whole run at the plan's δ, from above; ∞ where there is no guarantee."""
        return accountant.upper(self.event(), self.terms.delta)

    def noise_ratio(self, numbers: int) -> float:
        """Length of the noise in a round's mean of whole silos over the longest update it may hold, for `numbers`
        numbers.
        """
        t = self.terms
        several = 1.0 if t.placement == "server" else math.sqrt(max(1.0, t.expected / t.sharing))
        return math.sqrt(numbers) * max(self.multipliers) * several / t.expected

    def check_silos(self, numbers: int, accepted: bool, beside: int = 0) -> None:
        """Refuses words too small for so many `numbers`; and a guarantee for whole silos whose noise drowns what is
        learned, unless that was `accepted`. `beside`: how many of them are no difference of parameters.
        """
        self._check_words(numbers)
        self._check_beside(beside)
        ratio = self.noise_ratio(numbers)
        if self.terms.local or ratio <= SWAMPED or accepted:
            return
        raise GuaranteeError(
            f"noise of at most {SWAMPED:g} times the longest update, so that a guarantee on silos leaves a signal",
            f"{ratio:,.0f} times, with {self.terms.silos} silos and {numbers:,} trained numbers",
            'Protect examples or authors instead (unit = "example" or "author"), which few silos can afford; or train'
            " fewer numbers with many more silos; or say accept_noise = true to see what it costs.",
        )

    def _check_beside(self, beside: int) -> None:
        """What rounding adds to a bound is known for the difference of parameters, and for a few numbers beside it."""
        if self.terms.discrete and beside > OTHERS:
            raise GuaranteeError(
                "an update that is little but a difference of parameters, under discrete noise",
                f"{beside:,} numbers beside it",
                'Set noise = "gaussian" in [privacy], or take an algorithm that sends nothing else.',
            )

    def growth(self, numbers: int) -> float:
        """By what share of itself rounding may lengthen what one unit adds to `numbers` numbers. Noise covers it."""
        t = self.terms
        sides = 2 if t.local else 1
        return sides * math.sqrt(numbers + OTHERS) * self._step / 2 / t.unit_norm if t.discrete else 0.0

    def _check_words(self, numbers: int) -> None:
        t, grown = self.terms, self.growth(numbers)
        if not t.word or (grown <= GROWTH and numbers + OTHERS <= NUMBERS):
            return
        others = {word: replace(self, terms=replace(t, word=word)) for word in (32, 64) if word > t.word}
        larger = [word for word, plan in others.items() if plan.growth(numbers) <= GROWTH]
        raise GuaranteeError(
            f"rounding that lengthens what one {t.unit} adds by {GROWTH:.0%} at most, for its noise grows alike",
            f"{grown:.0%} with {numbers:,} numbers in words of {t.word} bits for {t.parties} silos",
            f"Set word = {larger[0]} in [secure]." if larger else "Sum in smaller groups, or train fewer numbers.",
        )

    @property
    def at_silos(self) -> bool:
        """Whether it is silos that add the noise."""
        return self.terms.local or self.terms.placement != "server"

    # ---- what a run needs, all of it from here ----

    def steps_at_silos(self, names: Sequence[str]) -> PrivateSteps | None:
        """The private steps of each silo for the parameters `names`; None where whole silos are protected."""
        t = self.terms
        if not t.local:
            return None
        norm = t.max_norm if t.max_norm is not None else math.inf
        return PrivateSteps(
            unit=t.unit, rate=t.rate, divisor=t.divisor, steps=t.steps, rows=t.rows,
            parts=parts_of(names, t.clipping, norm, t.shares), multipliers=self.multipliers, source=self.source,
            following=Following(t.quantile) if t.quantile is not None else None,
            factors=self._factors, sensitivity=self._sensitivity, period=t.period,
            bare_std=t.noise_std if t.max_norm is None else None, lr=t.lr if t.distributed else None,
        )  # fmt: skip

    def survey(self) -> Survey | None:
        """The surveys of each silo; None where none are taken with noise of their own."""
        t = self.terms
        if not t.surveys:
            return None
        multipliers = tuple(self.multipliers[round] * t.survey_ratio for round in t.surveys)
        return Survey(t.surveys, multipliers, dict(t.survey_parts), t.survey_rate, t.rows, self.source)

    def stages(self) -> tuple[Stage, ...]:
        """What becomes of an update in its silo."""
        t = self.terms
        if t.local and not t.distributed:
            return (Weigh("uniform"),)
        out: list[Stage] = []
        if not t.local and t.max_norm is not None:
            out.append(Clip(t.max_norm, t.quantile, bit=0.5) if t.quantile is not None else Clip(t.max_norm))
        cells = self._lattice
        if t.discrete:
            out.append(Grid(self._step, most=cells.most if cells else None, rounded=2 if t.local else 1))
        if t.placement != "server":
            out.append(AddNoise(
                chain(*out), self.multipliers, self.source, t.sharing, self._step if t.discrete else None,
                tail=cells.tail if cells else None, incoming=t.unit_norm if t.local else math.inf,
            ))  # fmt: skip
        return tuple(out)

    def mechanism(self) -> Mechanism:
        """How the server releases the total."""
        t = self.terms
        if t.max_norm is None and not t.local:
            return Bare(t.noise_std or 0.0, self.events, self.source)
        if self.at_silos:
            return AtSilos(t.unit, self.events)
        if t.bands > 1 and self._factors is not None:
            return Correlated(t.unit, self.multiplier, self._sensitivity, self._factors, self.events, self.source)
        if t.discrete:
            return DiscreteGaussian(t.unit, self.multipliers, self.events, self.source, self._step)
        return Gaussian(t.unit, self.multipliers, self.events, self.source)

    def sampler(self) -> Sampler | None:
        """Who is asked, where that bears on the guarantee; None leaves it to the treaty."""
        if self.terms.local or self.terms.rate == 1:
            return None
        return SecretPoisson(self.terms.rate, self.source)

    def aggregator(self) -> Aggregator:
        """How updates are added, and what their sum is divided by: for whole silos, a public expected count."""
        t = self.terms
        return WeightedMean() if t.local and not t.distributed else ExpectedMean(t.expected)

    @property
    def _step(self) -> float:
        """The grid of discrete noise."""
        return _step(self.terms, self.multipliers)

    @cached_property
    def _lattice(self) -> Lattice | None:
        return _lattice(self.terms, self.multipliers)

    @property
    def _factors(self) -> Banded | None:
        return optimal(_length(self.terms), self.terms.bands) if self.terms.bands > 1 else None

    @property
    def _sensitivity(self) -> float:
        return 1.0 if self._factors is None else _sensitivity(self.terms, self._factors)


def make_plan(terms: Terms, source: Source) -> PrivacyPlan:
    """The plan for these terms. Raises `GuaranteeError` where no noise gives the ε that was asked."""
    if terms.noise_multiplier is not None:
        return PrivacyPlan(terms, terms.noise_multiplier, source)
    if terms.noise_std is not None:
        return PrivacyPlan(terms, terms.noise_std / (terms.max_norm or 1.0), source)  # a bare σ is z times the bound
    assert terms.epsilon is not None
    multiplier = accountant.calibrate(lambda z: composed(round_events(terms, z)), terms.epsilon, terms.delta)
    return PrivacyPlan(terms, multiplier, source)


def round_events(terms: Terms, multiplier: float) -> tuple[Event, ...]:
    """What each round costs, for the multiplier of the first round."""
    if terms.max_norm is None:
        return (events.none("nothing is clipped, so no noise covers what one unit can do"),) * terms.rounds
    if terms.bands > 1:  # one Gaussian for all rounds: paid with the first
        return (events.gaussian(multiplier), *(events.together(),) * (terms.rounds - 1))
    multipliers = _schedule(terms, multiplier)
    if terms.discrete:
        return _discrete_events(terms, multipliers)
    return tuple(_round_event(terms, z, round in terms.surveys) for round, z in enumerate(multipliers))


def composed(rounds: Sequence[Event]) -> Event:
    """Rounds one after another; equal ones counted, so that the accountant composes them at once."""
    runs: list[tuple[Event, int]] = []
    for event in rounds:
        if runs and runs[-1][0] == event:
            runs[-1] = event, runs[-1][1] + 1
        else:
            runs.append((event, 1))
    return events.together(*(events.repeat(event, times) for event, times in runs))


def _round_event(t: Terms, z: float, surveyed: bool) -> Event:
    if not t.local:
        return events.poisson(t.rate, events.gaussian(z)) if t.rate < 1 else events.gaussian(z)
    steps = events.repeat(_drawn(t, t.rate, z), t.steps)
    return events.together(steps, _drawn(t, t.survey_rate, z * t.survey_ratio)) if surveyed else steps


def _drawn(t: Terms, rate: float, z: float) -> Event:
    """One Gaussian on a sample that each unit, or each example of an author, enters with chance `rate`."""
    if t.group > 1:  # single examples sampled, authors protected: Charles et al. 2024 (arXiv 2407.07737)
        chances = tuple(math.comb(t.group, j) * rate**j * (1 - rate) ** (t.group - j) for j in range(t.group + 1))
        return events.mixture(z, tuple(map(float, range(t.group + 1))), chances)
    return events.poisson(rate, events.gaussian(z)) if rate < 1 else events.gaussian(z)


def _discrete_events(t: Terms, multipliers: Sequence[float]) -> tuple[Event, ...]:
    """Integers: known by their zCDP, on a Poisson sample of units or without; and the end of the tails, if any."""
    unit = t.unit_norm / math.sqrt(t.sharing) / _step(t, multipliers)  # of a share's σ for z = 1, growth left out
    noises = [events.symmetric(shares.concentration(z, t.sharing, z * unit)) for z in multipliers]
    drawn = [events.poisson(t.rate, noise) if t.rate < 1 else noise for noise in noises]
    cells = _lattice(t, multipliers)
    if cells is None or cells.tail is None:
        return tuple(drawn)
    return tuple(events.together(event, events.cut(CUT / t.rounds)) for event in drawn)


def _lattice(t: Terms, multipliers: Sequence[float]) -> Lattice | None:
    """The grid that fits the words; None where numbers are no words, or not whole."""
    if not (t.word and t.discrete and t.max_norm):
        return None
    std = 0.0 if t.placement == "server" else max(multipliers) * t.unit_norm * (1 + GROWTH) / math.sqrt(t.sharing)
    return shares.fitted(t.word, t.parties, t.largest, std, t.rounds * max(t.parties, t.silos))


def _step(t: Terms, multipliers: Sequence[float]) -> float:
    """Without words, so fine that rounding adds little."""
    cells = _lattice(t, multipliers)
    return cells.step if cells else min(multipliers) * (t.max_norm or 1.0) * FINE


def _schedule(t: Terms, first: float) -> tuple[float, ...]:
    """Multipliers that grow or fall by a constant factor from round to round."""
    return tuple(first * t.ratio ** (r / max(1, t.rounds - 1)) for r in range(t.rounds))


def _length(t: Terms) -> int:
    """How many releases the correlated noise runs over."""
    return t.rounds * t.steps if t.local else t.rounds


def _sensitivity(t: Terms, factors: Banded) -> float:
    """Of a unit that takes part in every `period`-th release."""
    length = _length(t)
    return sensitivity(factors.coefficients, length, t.period, -(-length // t.period))


def _check(holds: bool, expected: str, came: str, do: str = "Correct it in [privacy], or among the options.") -> None:
    if not holds:
        raise GuaranteeError(expected, came, do)


def facts(plan: PrivacyPlan, *, lower: bool = False) -> dict[str, Any]:
    """The plan as plain numbers, for records and programs. `lower`: with the optimistic end of ε too, which takes long
    for many different rounds.
    """
    t, finite = plan.terms, math.isfinite(plan.epsilon)
    rdp = accountant.renyi(plan.event(), t.delta)
    return {
        "unit": t.unit, "neighbours": EMPTIED if t.distributed and not t.local else NEIGHBOURS, "delta": t.delta,
        "epsilon": plan.epsilon if finite else None,
        "epsilon_lower": accountant.epsilon(plan.event(), t.delta).lower if finite and lower else None,
        "epsilon_rdp": rdp if math.isfinite(rdp) else None,
        "noise_multiplier": plan.multiplier if t.max_norm is not None else None,
        "sampling_rate": t.rate, "steps": t.steps * t.rounds if t.local else t.rounds,
        "terms": _in_json(asdict(t)),
        "simulated_noise": plan.source.simulated,
        "event": plan.event(),
    }  # fmt: skip


def _in_json(terms: Mapping[str, Any]) -> dict[str, Any]:
    """The same after a trip through JSON."""
    lists = {name: list(x) for name, x in terms.items() if isinstance(x, tuple)}
    return {**terms, **lists, "survey_parts": [list(part) for part in terms["survey_parts"]]}
