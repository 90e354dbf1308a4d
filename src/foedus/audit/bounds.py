"""What an attacker's scores prove: lower bounds on ε, and how well members are told from others.

An audit scores units that took part (members) and units that did not (others); the higher, the more like a member.
From these two samples come

one_run           ε by the theorem of Steinke et al. 2023 (arXiv 2305.08846): assumes only that a fair coin decided
                  for each canary whether it took part
one_run_fdp       tighter, by Mahloujifar et al. 2024 (arXiv 2410.22235): for mechanisms whose trade-off curve is a
                  Gaussian's
clopper_pearson   ε from a true and a false positive rate (arXiv 2101.04535): canaries must not influence one another
gaussian_fit      the μ of a Gaussian mechanism, and its ε: an *estimate*, for nothing here checks that it is Gaussian
curve             area under the ROC curve, and true positive rates at low false positive rates, with intervals

A lower bound far below the stated ε proves nothing: with a thousand ideal canaries and a true ε of 8 the first method
says about 2 (see `ceiling`). One above the stated ε proves that the statement is wrong. Neighbours are add-or-remove of
one unit. NumPy and SciPy only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr, ndtri
from scipy.stats import beta, binom

SHARES = (0.05, 0.2)
"""Shares of the canaries at either end that are guessed: fixed before any score is seen, each paid for (Bonferroni).
Of five such lists this one gave the highest bounds on ideal canaries, for ε of 2, 4 and 8 and 200 to 5,000 of them."""
TAILS = (0.0, 0.02, 0.1, 0.3)
"""Shares of the others (or of the members) that may stand beyond a threshold of `clopper_pearson`; chosen likewise."""
MIDDLE = 0.2
"""The share of the others beyond the one threshold of `gaussian_fit`: the middle of the curve says most about μ."""
MOST = 64.0
"""No bound above this is looked for."""


@dataclass(frozen=True, eq=False)
class Scores:
    """An attack's scores of `members`, (m,), and of `others`, (n,); both at least one, none NaN. Higher: a member."""

    members: np.ndarray
    others: np.ndarray

    def __post_init__(self) -> None:
        for name in ("members", "others"):
            x = np.asarray(getattr(self, name), np.float64)
            object.__setattr__(self, name, x)
            if x.ndim != 1 or not len(x) or np.isnan(x).any():
                raise ValueError(f"Expected {name} of shape (n,), n > 0, without NaN; got {x.shape}.")

    def __len__(self) -> int:
        return len(self.members) + len(self.others)

    def swapped(self) -> Scores:
        """Others as members, scores negated: what tells that a unit did *not* take part."""
        return Scores(-self.others, -self.members)

    def halves(self, generator: np.random.Generator) -> tuple[Scores, Scores]:
        """Two disjoint halves at random, to choose on one and to prove on the other. Two of each are needed."""
        if min(len(self.members), len(self.others)) < 2:
            raise ValueError(f"Expected two members and two others to split; got {self.members} and {self.others}.")
        sides = [np.array_split(generator.permutation(x), 2) for x in (self.members, self.others)]
        (a, b), (c, d) = sides
        return Scores(a, c), Scores(b, d)


@dataclass(frozen=True)
class Bound:
    """With probability `confidence`, the mechanism is not (ε', `delta`)-DP for any ε' below `epsilon` ≥ 0.

    `estimate`: true where that holds only under a hypothesis about the mechanism that no score can confirm. `assumes`:
    what must be true besides, in words. `canaries`: how many scores went in.
    """

    method: str
    epsilon: float
    delta: float
    confidence: float
    canaries: int
    assumes: str
    estimate: bool = False


Method = Callable[[Scores, float, float], Bound]


# ---- lower bounds ----


def one_run(scores: Scores, delta: float, confidence: float = 0.95) -> Bound:
    """Theorem 5.2 of Steinke et al. 2023: canaries may influence one another in any way.

    The top and the bottom of the ranking are guessed to be members and others; the rest is passed over.
    """

    def refuted(guess: Guess, epsilon: float, level: float) -> bool:
        return one_run_p(guess, epsilon, delta) <= level

    epsilon = _best(guesses(scores), refuted, confidence)
    return Bound("one-run", epsilon, delta, confidence, len(scores), "each canary's fair coin")


def one_run_fdp(scores: Scores, delta: float, confidence: float = 0.95) -> Bound:
    """Algorithm 3 of Mahloujifar et al. 2024, for the family of Gaussian trade-off curves.

    What is refuted is that the mechanism's curve lies above that of a Gaussian one with (ε, δ). For a mechanism that
    is not Gaussian (one with Poisson sampling, say) that is not the same as refuting (ε, δ).
    """

    def refuted(guess: Guess, epsilon: float, level: float) -> bool:
        return fdp_mass(guess, gaussian_mu(epsilon, delta), level) > guess.guesses / guess.canaries

    epsilon = _best(guesses(scores), refuted, confidence)
    assumes = "each canary's fair coin; a Gaussian trade-off curve"
    return Bound("f-DP one-run", epsilon, delta, confidence, len(scores), assumes)


def clopper_pearson(scores: Scores, delta: float, confidence: float = 0.95) -> Bound:
    """ε ≥ ln((TPR − δ) / FPR), and the same for those told not to be members, by exact binomial limits."""
    level = _error(confidence) / (4 * len(TAILS))  # two directions, two rates
    pairs = [_limits(side, share, level) for side in (scores, scores.swapped()) for share in TAILS]
    epsilon = max((math.log((hit - delta) / false) for hit, false in pairs if hit - delta > false), default=0.0)
    return Bound("Clopper-Pearson", epsilon, delta, confidence, len(scores), "canaries independent of one another")


def gaussian_fit(scores: Scores, delta: float, confidence: float = 0.95) -> Bound:
    """μ ≥ Φ⁻¹(TPR) − Φ⁻¹(FPR) for a Gaussian mechanism (Dong et al. 2019, equation 6), and the ε of that μ.

    Invariant under any increasing function of the scores. An estimate: a mechanism that is not Gaussian may have a
    smaller ε than this.
    """
    hit, false = _limits(scores, MIDDLE, _error(confidence) / 2)
    mu = max(0.0, float(ndtri(hit) - ndtri(false)))
    assumes = "canaries independent of one another; a Gaussian mechanism"
    return Bound("Gaussian fit", gaussian_epsilon(mu, delta), delta, confidence, len(scores), assumes, estimate=True)


METHODS: dict[str, Method] = {
    "one-run": one_run,
    "f-DP one-run": one_run_fdp,
    "Clopper-Pearson": clopper_pearson,
    "Gaussian fit": gaussian_fit,
}


SOURCES = {
    "one-run": "Steinke et al. 2023 (arXiv 2305.08846)",
    "f-DP one-run": "Mahloujifar et al. 2024 (arXiv 2410.22235)",
    "Clopper-Pearson": "Nasr et al. 2021 (arXiv 2101.04535)",
    "Gaussian fit": "Nasr et al. 2023 (arXiv 2302.07956)",
}


def lower_bounds(scores: Scores, delta: float, confidence: float = 0.95) -> list[Bound]:
    """All four. Each holds with `confidence` by itself; all of them together, with less."""
    return [method(scores, delta, confidence) for method in METHODS.values()]


def p_value(method: Method, scores: Scores, epsilon: float, delta: float) -> float:
    """The least significance, 1e-12 … 1, at which `method` contradicts the claim of (ε, δ); ≤ 0.001 is a planted bug
    caught."""

    def contradicts(log_level: float) -> bool:
        return method(scores, delta, 1 - math.exp(log_level)).epsilon > epsilon

    low, high = math.log(1e-12), math.log(0.5)
    if not contradicts(high):
        return 1.0
    if contradicts(low):
        return 1e-12
    while high - low > 0.01:
        middle = (low + high) / 2
        low, high = (low, middle) if contradicts(middle) else (middle, high)
    return math.exp(high)


def ceiling(method: Method, epsilon: float, delta: float, canaries: int, *, trials: int = 3, seed: int = 0) -> float:
    """The mean bound over some trials of *ideal* canaries: those of a Gaussian mechanism that is exactly (ε, δ)-DP.

    No audit of that mechanism with so many canaries can expect more from `method`; compare one's own with this.
    """
    generator = np.random.default_rng(seed)
    return float(np.mean([method(ideal(epsilon, delta, canaries, generator), delta, 0.95).epsilon
                          for _ in range(trials)]))  # fmt: skip


def ideal(epsilon: float, delta: float, canaries: int, generator: np.random.Generator) -> Scores:
    """Scores of ideal canaries, each a member by a fair coin: N(μ, 1) for members and N(0, 1) for others."""
    inside = coins(canaries, generator)
    x = generator.standard_normal(canaries) + gaussian_mu(epsilon, delta) * inside
    return Scores(x[inside], x[~inside])


def coins(count: int, generator: np.random.Generator) -> np.ndarray:
    """A fair coin for each of `count` ≥ 10 canaries, (count,) bool. Should all agree, they are tossed again, which adds
    at most 2^(1 − count) to the chance that a bound is wrong."""
    if count < 10:
        raise ValueError(f"Expected count={count} ≥ 10 canaries.")
    while True:
        inside = generator.random(count) < 0.5
        if inside.any() and not inside.all():
            return inside


# ---- guesses, for the bounds from one run ----


@dataclass(frozen=True)
class Guess:
    """Of `canaries`, `guesses` were called member or other, and `correct` of these calls were right."""

    canaries: int
    guesses: int
    correct: int


def guesses(scores: Scores) -> list[Guess]:
    """The ends of the ranking as guesses, for every share: the top alone, and both ends.

    Where scores are equal the wrong ones are taken first, so that no bound feeds on the order of ties.
    """
    return [guess for share in SHARES for guess in _ends(scores, max(1, round(share * len(scores))))]


def _ends(scores: Scores, count: int) -> list[Guess]:
    top, bottom = _correct(scores, count), _correct(scores.swapped(), count)
    return [Guess(len(scores), count, top), Guess(len(scores), 2 * count, top + bottom)]


def _correct(scores: Scores, count: int) -> int:
    """How many members are among the `count` highest, ties broken against us."""
    x = np.concatenate([scores.others, scores.members])
    order = np.argsort(-x, kind="stable")[:count]
    return int((order >= len(scores.others)).sum())


def one_run_p(guess: Guess, epsilon: float, delta: float) -> float:
    """The probability, at most, of so many correct guesses under (ε, δ)-DP.

    With B ~ Binomial(guesses, e^ε / (1 + e^ε)): P[B ≥ v] + 2 m δ · max over i of P[v − i ≤ B < v] / i.
    """
    v, chance = guess.correct, 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(v - 1, guess.guesses, chance))
    i = np.arange(1, v + 1)
    steepest = float(np.max((binom.sf(v - i - 1, guess.guesses, chance) - tail) / i, initial=0.0)) if delta else 0.0
    return min(1.0, tail + 2 * guess.canaries * delta * steepest)


def fdp_mass(guess: Guess, mu: float, level: float) -> float:
    """The least share of guesses there would have to be, if so many were right with probability `level` or more and
    the trade-off curve were Φ(Φ⁻¹(1 − α) − μ). More than there were: refuted.

    The letters are the paper's: r and h, bounds on the mass of right and of wrong guesses, are driven from `correct`
    guesses down to none.
    """
    m, c, v = guess.canaries, guess.guesses, guess.correct
    r, h = level * v / m, level * (c - v) / m
    for i in range(v - 1, -1, -1):
        wider = max(h, float(ndtr(ndtri(r) - mu)))
        if wider == h:
            break  # neither r nor h will change again
        r, h = min(1.0, r + i / (c - i) * (wider - h)), wider
    return r + h


def _best(
    options: Sequence[Guess], refuted: Callable[[Guess, float, float], bool], confidence: float, step: float = 1e-3
) -> float:
    """The largest ε, on a grid of `step`, refuted by any of the guesses; each is tested at its share of the error."""
    level = _error(confidence) / len(options)
    best = 0.0
    for guess in sorted(options, key=lambda guess: -guess.correct / guess.guesses):
        low, high = best, min(MOST, max(1.0, 2 * best))
        if 2 * guess.correct <= guess.guesses or not refuted(guess, low + step, level):
            continue
        while high < MOST and refuted(guess, high, level):
            low, high = high, min(MOST, 2 * high)
        while high - low > step:
            middle = (low + high) / 2
            low, high = (middle, high) if refuted(guess, middle, level) else (low, middle)
        best = low
    return best


def _error(confidence: float) -> float:
    if not 0.5 <= confidence < 1:
        raise ValueError(f"Expected 0.5 ≤ confidence={confidence} < 1.")
    return 1 - confidence


# ---- rates, for the bounds from independent canaries ----


def _limits(scores: Scores, share: float, level: float) -> tuple[float, float]:
    """(least true positive rate, greatest false positive rate) at the threshold that `share` of the others exceed;
    each is wrong with probability at most `level`."""
    ordered = np.sort(scores.others)[::-1]
    beyond = int(share * len(ordered))
    hits = int((scores.members > ordered[beyond]).sum())
    return lowest(hits, len(scores.members), level), highest(beyond, len(ordered), level)


def lowest(hits: int, trials: int, level: float) -> float:
    """Clopper and Pearson's lower limit on a probability, wrong with probability at most `level`."""
    return float(beta.ppf(level, hits, trials - hits + 1)) if hits else 0.0


def highest(hits: int, trials: int, level: float) -> float:
    """Clopper and Pearson's upper limit.

    It also holds for the probability of lying beyond the (hits + 1)-th largest of the trials themselves, which has
    exactly the distribution Beta(hits + 1, trials − hits): so a threshold may be taken from them.
    """
    return float(beta.ppf(1 - level, hits + 1, trials - hits)) if hits < trials else 1.0


# ---- Gaussian mechanisms ----


def gaussian_delta(epsilon: float, mu: float) -> float:
    """δ(ε) of a Gaussian mechanism with μ = sensitivity / std > 0 (Balle and Wang 2018, theorem 8)."""
    if mu == 0:
        return 0.0
    first, second = log_ndtr(mu / 2 - epsilon / mu), epsilon + log_ndtr(-mu / 2 - epsilon / mu)
    return float(np.exp(first) * -np.expm1(min(second - first, 0.0)))


@lru_cache(maxsize=4096)
def gaussian_mu(epsilon: float, delta: float) -> float:
    """The μ at which a Gaussian mechanism is exactly (ε, δ)-DP; ε ≥ 0, 0 < δ < 1."""
    if not (epsilon >= 0 and 0 < delta < 1):
        raise ValueError(f"Expected epsilon={epsilon} ≥ 0 and 0 < delta={delta} < 1.")
    return float(brentq(lambda mu: gaussian_delta(epsilon, mu) - delta, 1e-9, 10 + 2 * epsilon, xtol=1e-10))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The ε ≥ 0 of a Gaussian mechanism at `delta`; ∞ for an infinite μ."""
    if math.isinf(mu):
        return math.inf
    if gaussian_delta(0.0, mu) <= delta:
        return 0.0
    return float(brentq(lambda epsilon: gaussian_delta(epsilon, mu) - delta, 0.0, mu * mu + 40 * mu, xtol=1e-9))


# ---- curves ----


@dataclass(frozen=True)
class Rate:
    """The true positive rate where at most `fpr` of the others are taken for members; [low, high] at 95 %.

    `resolved`: false when there are fewer than 1 / `fpr` others, so that no rate as low can be seen; then it is the
    rate without any false positive.
    """

    fpr: float
    tpr: float
    low: float
    high: float
    resolved: bool


@dataclass(frozen=True)
class Curve:
    """An attack's power: area under the ROC curve with its 95 % interval, rates at low FPR, and some of the curve's
    points (fpr, tpr), both ascending."""

    auc: float
    auc_low: float
    auc_high: float
    rates: tuple[Rate, ...]
    points: tuple[tuple[float, float], ...]
    members: int
    others: int


def curve(scores: Scores, fprs: Sequence[float] = (0.001, 0.01)) -> Curve:
    """The ROC curve of some scores. Units should be independent: several windows of one document are one unit.

    An AUC of 0.5 is a coin. Ties count half.
    """
    auc = _auc(scores)
    low, high = _auc_interval(auc, len(scores.members), len(scores.others))
    rates = tuple(_rate(scores, fpr) for fpr in fprs)
    return Curve(auc, low, high, rates, _points(scores), len(scores.members), len(scores.others))


def _auc(scores: Scores) -> float:
    """P[member > other] + ½ P[equal] (Mann and Whitney)."""
    ordered = np.sort(scores.others)
    below = np.searchsorted(ordered, scores.members, "left")
    above = np.searchsorted(ordered, scores.members, "right")
    return float((below + above).mean() / 2 / len(ordered))


def _auc_interval(auc: float, m: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Newcombe 2006, method 5: every θ with |AUC − θ| ≤ z √V(θ). At 0 and 1 it is no point, as a bootstrap's is."""
    size = (m + n) / 2 - 1

    def beyond(theta: float) -> float:
        spread = theta * (1 - theta) * (1 + size * (1 - theta) / (2 - theta) + size * theta / (1 + theta)) / (m * n)
        return abs(auc - theta) - z * math.sqrt(spread)

    low = brentq(beyond, 0.0, auc - 1e-9) if auc > 1e-9 else 0.0
    high = brentq(beyond, auc + 1e-9, 1.0) if auc < 1 - 1e-9 else 1.0
    return float(low), float(high)


def _rate(scores: Scores, fpr: float) -> Rate:
    """The threshold comes from the others alone, so the members beyond it are a plain binomial."""
    ordered = np.sort(scores.others)[::-1]
    hits, trials = int((scores.members > ordered[int(fpr * len(ordered))]).sum()), len(scores.members)
    return Rate(fpr, hits / trials, lowest(hits, trials, 0.025), highest(hits, trials, 0.025), fpr * len(ordered) >= 1)


def _points(scores: Scores, most: int = 199) -> tuple[tuple[float, float], ...]:
    cuts = np.unique(np.concatenate([scores.members, scores.others]))
    cuts = np.concatenate([cuts[np.unique(np.linspace(0, len(cuts) - 1, most).astype(int))], [np.inf]])[::-1]

    def share(x: np.ndarray) -> np.ndarray:
        return 1 - np.searchsorted(np.sort(x), cuts, "left") / len(x)

    return tuple(zip(share(scores.others).tolist(), share(scores.members).tolist(), strict=True))
