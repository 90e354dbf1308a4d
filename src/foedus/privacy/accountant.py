"""What a run has cost: events in, ε out. The only file that knows Google's dp-accounting; it loads it when first asked.

Neighbours differ in one unit, added or removed. What is stated is the `upper` end: a pessimistic privacy loss
distribution (PLD, Koskela et al. 2020; rounded by connecting the dots, Doroshenko et al. 2022, arXiv 2207.04380), or
Rényi accounting where that is lower. The central limit theorem is not used: it states less than is spent.

    epsilon(event, delta)     the cost, from below and above      calibrate(event_of, ε, δ)   the least noise for ε
    upper(event, delta)       only what is stated, faster         delta(event, ε)             the other way round
    group(event, k, delta)    the cost for k units together       advantage, tpr_at, reconstruction_bound   in attacks
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from typing import Any

import numpy as np

from ..errors import GuaranteeError
from .events import Event, check, gaussian, mixture, none, poisson, repeat, symmetric, together, zcdp
from .events import cut as cut_off

FINEST, COARSEST = 1e-6, 1e-3  # steps of privacy loss between which the accountant chooses
POINTS = 250_000  # that one distribution may have
HOPELESS = 500.0  # nats: an ε above it is told by Rényi accounting alone, which takes no memory
FAR = 1e-9  # how near ε is found by bisection, relative


@dataclass(frozen=True)
class Epsilon:
    """ε in nats. `upper` holds, and is what is stated; it is at least `lower`; `rdp` is what Rényi accounting says.

    `lower` is rounded down at every step, so it lies far below when thousands of steps are composed.
    """

    lower: float
    upper: float
    rdp: float


_Mixture = tuple[float, tuple[float, ...], tuple[float, ...]]  # multiplier, lengths rising to 1, their chances
_Curve = tuple[float, float, bool]  # rate of a Poisson sample, ρ of the release on it, whether by symmetric noise


@dataclass(frozen=True)
class _Bill:
    """An event, sorted. `precision`: Σ 1/z² of all Gaussians without sampling; `sampled`: the others and their counts.

    `rho`: of all zCDP parts without sampling together; `curves`: the sampled ones. `cut`: the chance that all this does
    not describe what happened. `unbounded`: something in it has no guarantee.
    """

    precision: float = 0.0
    rho: float = 0.0
    sampled: tuple[tuple[_Mixture, int], ...] = ()
    curves: tuple[tuple[_Curve, int], ...] = ()
    cut: float = 0.0
    unbounded: bool = False

    @property
    def free(self) -> bool:
        return not (self.unbounded or self.precision or self.sampled or self.concentrated)

    @property
    def exact(self) -> bool:
        """Whether it is one Gaussian and nothing else, for which ε has a closed form."""
        return bool(self.precision) and not (self.unbounded or self.sampled or self.concentrated)

    @property
    def concentrated(self) -> bool:
        """Whether some of it is known by its Rényi divergences alone."""
        return bool(self.rho or self.curves)


def epsilon(event: Event, delta: float) -> Epsilon:
    """The ε of an event at `delta` (0 < δ < 1), from below and from above. An event without a guarantee: infinity.

    >>> round(epsilon(gaussian(1.0), 1e-5).upper, 3)
    4.377
    """
    bill = _bill(event)
    return Epsilon(_lower(bill, _chance(delta)), _upper(bill, delta), _reserved(_renyi, bill, delta))


def upper(event: Event, delta: float) -> float:
    """Only the ε that is stated: `epsilon(event, delta).upper`, without the work for the other two."""
    return _upper(_bill(event), _chance(delta))


def renyi(event: Event, delta: float) -> float:
    """Only what Rényi accounting says: `epsilon(event, delta).rdp`, without the work for the other two."""
    return _reserved(_renyi, _bill(event), _chance(delta))


def delta(event: Event, epsilon: float) -> float:
    """The δ of an event at `epsilon` ≥ 0, from above. An event without a guarantee: 1."""
    return float(_profile(_bill(event), np.array([_not_negative(epsilon)]))[0])


def calibrate(event_of: Callable[[float], Event], epsilon: float, delta: float) -> float:
    """The least noise multiplier z, rounded up to four digits, with which `event_of(z)` costs at most `epsilon`.

    `event_of`: must cost less the more noise there is. The result is checked: `upper(event_of(z), delta) <= epsilon`.
    """
    if not 0 < epsilon < math.inf:
        raise _refused("an epsilon > 0 and finite", f"epsilon={epsilon}", "Ask for an epsilon between 0.1 and 10.")
    _chance(delta)
    near = _search(lambda z: _rough(_bill(event_of(z)), delta, epsilon, 8), epsilon, 1.0, 0.02)
    near = _search(lambda z: _rough(_bill(event_of(z)), delta, epsilon, 1), epsilon, near, 4e-4)
    for _ in range(200):
        near = _round_up(near)
        if upper(event_of(near), delta) <= epsilon:
            return near
        near *= 1.0005
    raise _out_of_reach(near)


def group(event: Event, size: int, delta: float) -> float:
    """The ε, at this same `delta`, for `size` units that come or go together; for example all rows of one person.

    By the loss distribution of the group itself. The naive size · ε would also need δ to grow, by e^(size · ε).
    """
    return upper(grouped(event, size), delta)


def grouped(event: Event, size: int) -> dict[str, Any]:
    """The same event, for groups of `size` ≥ 1 units: each enters the sample by itself, and lengths add up."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise _refused("a group of at least one unit", f"size={size!r}", "Say how many units come or go together.")
    bill = _bill(event)
    parts: list[Event] = [none()] if bill.unbounded else []
    parts += [gaussian(bill.precision**-0.5 / size)] if bill.precision else []
    parts += [zcdp(bill.rho * size**2)] if bill.rho else []
    parts += [cut_off(bill.cut)] if bill.cut else []
    parts += [  # in the sample when one of them is, and then at worst all of them are
        repeat(poisson(-math.expm1(size * math.log1p(-rate)), zcdp(rho * size**2)), times)
        for (rate, rho, _), times in bill.curves
    ]
    parts += [repeat(_mixture_event(_crowd(part, size)), times) for part, times in bill.sampled]
    return together(*parts)


def advantage(event: Event) -> float:
    """The most by which any attacker's true positive rate can exceed its false positive rate: δ at ε = 0."""
    return delta(event, 0.0)


def tpr_at(event: Event, fpr: float) -> float:
    """The highest true positive rate, 0 to 1, of any membership attack whose false positive rate is at most `fpr`.

    From the whole privacy profile: min over ε of δ(ε) + e^ε · fpr and of 1 − e^−ε (1 − δ(ε) − fpr)
    (Dong, Roth and Su 2019, arXiv 1905.02383, section 2), each at every ε of a grid, which can only raise it.
    """
    if not 0 <= fpr <= 1:
        raise _refused("a false positive rate from 0 to 1", f"fpr={fpr}", "Common ones are 0.001 and 0.01.")
    bill = _bill(event)
    levels = _levels(bill)
    profile = _profile(bill, levels)
    direct = profile + np.exp(levels) * fpr
    mirrored = 1 - np.exp(-levels) * np.maximum(0.0, 1 - profile - fpr)
    return float(min(1.0, direct.min(), mirrored.min()))


def reconstruction_bound(event: Event, prior: float) -> float:
    """The highest chance of reconstructing a unit for anybody whose chance would be `prior`, 0 to 1, without the run.

    The blow-up of Hayes, Mahloujifar and Balle 2023 (arXiv 2302.07225): sup P(E) over E with Q(E) ≤ prior,
    P with the unit and Q without, read off the whole privacy profile. Kaissis et al. 2023 (arXiv 2307.03928) use one
    (ε, δ).
    """
    return tpr_at(event, prior)


# Bills: an event is taken apart once, and equal parts are counted.


def _bill(event: Event) -> _Bill:
    """An event, sorted. Gaussians without sampling become one (their precisions add); equal samples are counted."""
    sampled: Counter[_Mixture] = Counter()
    curves: Counter[_Curve] = Counter()
    precision = rho = cut = 0.0
    unbounded = False
    for leaf, times in _leaves(check(event), 1):
        match leaf["mechanism"]:
            case "gaussian":
                precision += times * leaf["multiplier"] ** -2
            case "zcdp" | "symmetric":
                rho += times * leaf["rho"]
            case "poisson":
                curves[leaf["rate"], leaf["of"]["rho"], leaf["of"]["mechanism"] == "symmetric"] += times
            case "cut":
                cut += times * leaf["chance"]
            case "none":
                unbounded = True
            case _:
                sampled[_merged(leaf["multiplier"], leaf["sensitivities"], leaf["probabilities"])] += times
    kept = tuple(sorted((part, times) for part, times in sampled.items() if any(part[1])))
    known = tuple(sorted((curve, times) for curve, times in curves.items() if curve[1]))
    return _Bill(precision, rho, kept, known, min(1.0, cut), unbounded)


def _leaves(event: Event, times: int) -> Iterator[tuple[Event, int]]:
    """Gaussians, mixtures, zCDP (sampled or not), cut and none, each with how often it happens; whatever happens never
    is left out.
    """
    if times == 0:
        return
    match event["mechanism"]:
        case "repeat":
            yield from _leaves(event["of"], times * event["times"])
        case "together":
            for part in event["of"]:
                yield from _leaves(part, times)
        case "poisson":
            yield from ((leaf, times * count) for leaf, count in _sampled(event["rate"], event["of"]))
        case _:
            yield event, times


def _sampled(rate: float, of: Event) -> Iterator[tuple[Event, int]]:
    """The leaves of `of` on a Poisson sample. Several Gaussians on one and the same sample are one, and so is zCDP."""
    leaves = [] if rate == 0 else list(_leaves(of, 1))
    if rate == 1 or len(leaves) == 0:
        yield from leaves
    elif all(leaf["mechanism"] == "gaussian" for leaf, _ in leaves):
        precision = math.fsum(count * leaf["multiplier"] ** -2 for leaf, count in leaves)
        yield mixture(precision**-0.5, [0.0, 1.0], [1 - rate, rate]), 1
    elif all(leaf["mechanism"] in ("zcdp", "symmetric") for leaf, _ in leaves):
        known = symmetric if all(leaf["mechanism"] == "symmetric" for leaf, _ in leaves) else zcdp
        yield poisson(rate, known(math.fsum(count * leaf["rho"] for leaf, count in leaves))), 1
    elif any(leaf["mechanism"] == "none" for leaf, _ in leaves):
        yield none(), 1
    elif len(leaves) == 1 and leaves[0][1] == 1 and leaves[0][0]["mechanism"] == "mixture":
        leaf = leaves[0][0]
        chances = [1 - rate, *(rate * p for p in leaf["probabilities"])]
        yield mixture(leaf["multiplier"], [0.0, *leaf["sensitivities"]], chances), 1
    else:
        raise _refused(
            "a Poisson sample of Gaussians, of zCDP releases, or of one mixture",
            f"a sample of {', '.join(sorted({leaf['mechanism'] for leaf, _ in leaves}))}",
            "Give each release a sample of its own, or state the cost without sampling (rate 1).",
        )


def _merged(multiplier: float, lengths: Sequence[float], chances: Sequence[float]) -> _Mixture:
    """A mixture in canonical form: one entry a length, rising, no impossible ones, in units of the longest."""
    total: dict[float, float] = {}
    for length, chance in zip(lengths, chances, strict=True):
        if chance > 0:
            total[length] = total.get(length, 0.0) + chance
    longest = max(total) or 1.0
    lengths = tuple(sorted(total))
    return multiplier / longest, tuple(x / longest for x in lengths), tuple(total[x] for x in lengths)


def _crowd(part: _Mixture, size: int) -> _Mixture:
    """The mixture of `size` units: the lengths of independent units add up, at worst in one direction."""
    multiplier, lengths, chances = part
    now = {0.0: 1.0}
    for _ in range(size):
        then: dict[float, float] = {}
        for had, chance in now.items():
            for length, share in zip(lengths, chances, strict=True):
                total = round(had + length, 12)
                then[total] = then.get(total, 0.0) + chance * share
        now = then
    if len(now) > 1000:
        raise _refused("a group whose lengths take at most 1000 values", f"{len(now)}", "Ask for a smaller group.")
    return multiplier, tuple(now), tuple(now.values())


def _mixture_event(part: _Mixture) -> dict[str, Any]:
    total = math.fsum(part[2])
    return mixture(part[0], part[1], [chance / total for chance in part[2]])


# Costs of a bill.


def _reserved(cost: Callable[[_Bill, float], float], bill: _Bill, delta: float) -> float:
    """The cost of a bill whose tails were cut, at what is left of δ: a cut takes (1 + e^ε) times its chance.

    Coupled until the first cut, a run R and the run M that its events describe agree but for the chance β. So with
    neighbours x and x', P[R(x) ∈ S] ≤ P[M(x) ∈ S] + β ≤ e^ε P[M(x') ∈ S] + δ + β ≤ e^ε (P[R(x') ∈ S] + β) + δ + β.
    """
    if not bill.cut:
        return cost(bill, delta)
    whole = replace(bill, cut=0.0)
    taken = 4 * bill.cut
    while taken < delta:
        found = cost(whole, delta - taken)
        if bill.cut * (1 + math.exp(min(found, 700.0))) <= taken:
            return found
        taken *= 2
    return math.inf


def _upper(bill: _Bill, delta: float) -> float:
    if bill.unbounded:
        return math.inf
    if bill.cut:
        return _finite(_reserved(_upper, bill, delta))
    if bill.free:
        return 0.0
    if bill.exact:
        return _exact_epsilon(bill.precision, delta)
    renyi = _renyi(bill, delta)
    if bill.concentrated or renyi > HOPELESS:
        return _finite(renyi)
    return _finite(min(renyi, _epsilon_at(_losses(bill, _step(bill, renyi), True), delta)))


def _lower(bill: _Bill, delta: float) -> float:
    """At least this, by losses rounded down. What zCDP parts cost at least is not known; they count as nothing."""
    if bill.unbounded or bill.free:
        return math.inf if bill.unbounded else 0.0
    if bill.exact:
        return _exact_epsilon(bill.precision, delta)
    renyi = _renyi(bill, delta)
    sure = _Bill(bill.precision, 0.0, bill.sampled)
    if sure.free or renyi > HOPELESS:
        return 0.0
    if sure.exact:
        return _exact_epsilon(sure.precision, delta)
    fine = max(1e-4, _step(sure, renyi) / 10)
    return min(_upper(bill, delta), _epsilon_at(_losses(sure, fine, False), delta))


def _rough(bill: _Bill, delta: float, epsilon: float, coarser: float) -> float:
    """An upper end of ε near `epsilon`, found faster than `_upper`: no Rényi accounting, `coarser` steps of loss."""
    if bill.unbounded or bill.free or bill.exact or bill.concentrated:
        return _upper(replace(bill, cut=0.0), delta)
    smallest = min(part[0] for part, _ in bill.sampled)
    if 0.5 / smallest**2 > HOPELESS:
        return _renyi(bill, delta)
    return _epsilon_at(_losses(bill, _step(bill, epsilon) * coarser, True), delta)


def _profile(bill: _Bill, levels: np.ndarray) -> np.ndarray:
    """δ at each ε of `levels` (rising, ≥ 0), from above."""
    if bill.unbounded:
        return np.ones_like(levels)
    if bill.cut:
        whole = _profile(replace(bill, cut=0.0), levels)
        return np.asarray(np.minimum(1.0, whole + bill.cut * (1 + np.exp(np.minimum(levels, 700.0)))))
    if bill.free:
        return np.zeros_like(levels)
    if bill.exact:
        return _exact_delta(bill.precision, levels)
    renyi = _renyi(bill, 1e-5)
    if bill.concentrated or renyi > HOPELESS:
        return np.array([min(1.0, _renyi_delta(bill, level)) for level in levels])
    found = _losses(bill, _step(bill, renyi), True).get_delta_for_epsilon(np.asarray(levels, float))
    return np.asarray(np.clip(found, 0.0, 1.0), float)


def _levels(bill: _Bill) -> np.ndarray:
    """A grid of ε on which a privacy profile is read: dense near 0, up to where δ no longer matters."""
    most = 50.0 if bill.unbounded else max(1.0, min(300.0, _upper(replace(bill, cut=0.0), 1e-9)))
    count = 200 if bill.concentrated else 2000
    return most * np.linspace(0.0, 1.0, count) ** 2


def _step(bill: _Bill, epsilon: float) -> float:
    """The step of privacy loss for a bill of some `epsilon`: connecting the dots then errs by less than a thousandth.

    Measured: the error is near 1.4 (step · √times / ε)² of ε. Wide losses get longer steps, lest they fill the memory;
    the result is then higher than it need be, never lower.
    """
    times = sum(count for _, count in bill.sampled) or 1
    slow = 4 if any(len(part[1]) > 2 for part, _ in bill.sampled) else 1  # mixtures take long
    wanted = slow * min(COARSEST, max(FINEST, epsilon / (50 * math.sqrt(times))))
    return max(wanted, *(_width(part) / POINTS for part, _ in bill.sampled), 0.0)


def _width(part: _Mixture) -> float:
    """How far the privacy losses of a mixture reach, roughly: 10 standard deviations out."""
    z, _, chances = part
    return max(0.0, 0.5 / z**2 + 10 / z + math.log(chances[-1]))


def _exact_delta(precision: float, levels: np.ndarray) -> np.ndarray:
    """δ of one Gaussian (Balle and Wang 2018, arXiv 1805.06530, theorem 8), with μ = √precision = 1/z."""
    from scipy.special import log_ndtr

    mu = math.sqrt(precision)
    first, second = log_ndtr(mu / 2 - levels / mu), levels + log_ndtr(-mu / 2 - levels / mu)
    with np.errstate(divide="ignore"):
        return np.asarray(np.exp(first + np.log1p(-np.exp(np.minimum(0.0, second - first)))), float)


def _exact_epsilon(precision: float, delta: float) -> float:
    """ε of one Gaussian, by bisection of `_exact_delta`; the upper end of the last interval."""
    low, high = 0.0, 1.0
    while float(_exact_delta(precision, np.array([high]))[0]) > delta:
        low, high = high, high * 2
    while high - low > FAR * max(high, 1e-3):
        middle = (low + high) / 2
        low, high = (middle, high) if float(_exact_delta(precision, np.array([middle]))[0]) > delta else (low, middle)
    return 0.0 if low == 0.0 and float(_exact_delta(precision, np.zeros(1))[0]) <= delta else high


# dp-accounting, from here on.


def _losses(bill: _Bill, step: float, pessimistic: bool) -> Any:
    """The privacy loss distribution of a whole bill, rounded up (`pessimistic`) or down to a grid of `step`."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    with _tried("a composition"):
        parts = [_loss(part, step, pessimistic).self_compose(times) for part, times in bill.sampled]
        if bill.precision:
            parts.append(pld.from_gaussian_mechanism(bill.precision**-0.5, **_rounding(step, pessimistic)))
        return reduce(lambda whole, part: whole.compose(part), parts)


@lru_cache(maxsize=128)
def _loss(part: _Mixture, step: float, pessimistic: bool) -> Any:
    """The loss distribution of one sampled Gaussian, or of one mixture. Kept, for schedules ask for them again."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    z, lengths, chances = part
    rounding = _rounding(step, pessimistic)
    with _tried(f"a multiplier of {z:.4g}"):
        if lengths in ((1.0,), (0.0, 1.0)):
            return pld.from_gaussian_mechanism(z, sampling_prob=min(1.0, chances[-1]), **rounding)
        return pld.from_mixture_gaussian_mechanism(z, lengths, chances, **rounding)


def _rounding(step: float, pessimistic: bool) -> dict[str, Any]:
    # "Connecting the dots" exists for upper ends only; lower ends use the older buckets.
    return {
        "value_discretization_interval": step,
        "pessimistic_estimate": pessimistic,
        "use_connect_dots": pessimistic,
    }


def _epsilon_at(losses: Any, delta: float) -> float:
    return float(losses.get_epsilon_for_delta(delta))


@lru_cache(maxsize=256)
def _renyi(bill: _Bill, delta: float) -> float:
    """ε by Rényi accounting, over the orders of card 00."""
    from dp_accounting.rdp import compute_epsilon

    if bill.unbounded or bill.free:
        return math.inf if bill.unbounded else 0.0
    return float(compute_epsilon(_ORDERS, _divergences(bill), delta)[0])


def _renyi_delta(bill: _Bill, epsilon: float) -> float:
    from dp_accounting.rdp.rdp_privacy_accountant import compute_delta

    return float(compute_delta(_ORDERS, _divergences(bill), epsilon)[0])


_FEW = np.array([1 + x / 10 for x in range(1, 100)])
_ORDERS = np.concatenate([_FEW, np.arange(12.0, 256.0)])


@lru_cache(maxsize=64)
def _divergences(bill: _Bill) -> np.ndarray:
    """Rényi divergences of a bill at each of `_ORDERS`, in nats."""
    total = _ORDERS * (bill.precision / 2 + bill.rho)
    for part, times in bill.sampled:
        total = total + times * np.concatenate([_by_quadrature(part, _FEW), _by_series(part)])
    for curve, times in bill.curves:
        total = total + times * _by_curve(*curve)
    return np.asarray(np.where(np.isnan(total), math.inf, total))


def _by_curve(rate: float, rho: float, mirrored: bool) -> np.ndarray:
    """Rényi divergences of a ρ-zCDP release on a Poisson sample, for one unit more or less, at each of `_ORDERS`.

    Whole orders: Zhu and Wang 2019 (Poisson Subsampled Rényi DP, ICML), theorem 5, where ε(l) is lρ; its factor 3 makes
    it hold for every mechanism. It falls away where a mirror swaps the release without the unit, p, and the one with
    it, p' (`mirrored`; x → 2c + Δ − x does, for symmetric noise around c): D(m ‖ p) with m = (1 − q) p + q p' is the
    sum without the factor, and D(p ‖ m) is no larger (Mironov, Talwar and Zhang 2019, arXiv 1908.10530, theorem 5).
    Between whole orders (order − 1) times the divergence is convex, so a chord is above it. A sample never costs more
    than the whole.
    """
    from scipy.special import gammaln

    whole, drawn = np.arange(2.0, 256.0)[:, None], np.arange(256.0)  # (254, 1) orders and (256,) powers of the rate
    absent = np.maximum(whole - drawn, 0)
    terms = gammaln(whole + 1) - gammaln(drawn + 1) - gammaln(absent + 1)
    terms = terms + absent * math.log1p(-rate) + drawn * math.log(rate) + drawn * (drawn - 1) * rho
    terms = terms + np.where((drawn >= 3) & (not mirrored), math.log(3), 0.0)
    logs = np.logaddexp.reduce(np.where(drawn <= whole, terms, -np.inf), axis=1)
    chords = np.interp(_ORDERS, [1.0, *whole[:, 0]], [0.0, *logs])
    return np.asarray(np.minimum(chords / (_ORDERS - 1), _ORDERS * rho))


def _by_quadrature(part: _Mixture, orders: np.ndarray) -> np.ndarray:
    """Rényi divergences of a mixture, the larger of both directions, by the trapezoidal rule.

    For the fractional orders, where dp-accounting's series often does not converge or gives too much. The integrands
    are analytic with Gaussian tails, for which the rule errs by less than rounding once a standard deviation has 20
    points.
    """
    z, lengths, chances = part
    reach = orders.max() + 14 * z
    x = np.linspace(-reach, reach, math.ceil(40 * reach / z) + 1)
    weights = np.log(np.array(chances))[:, None] - 0.5 * ((x - np.array(lengths)[:, None]) / z) ** 2
    bare, mixed = -0.5 * (x / z) ** 2, np.logaddexp.reduce(weights, axis=0)
    unit = math.log((x[1] - x[0]) / (z * math.sqrt(2 * math.pi)))
    moments = [max(_moment(bare, mixed, order), _moment(mixed, bare, order)) + unit for order in orders]
    return np.asarray(np.array(moments) / (orders - 1))


def _moment(q: np.ndarray, p: np.ndarray, order: float) -> float:
    """log Σ q (p/q)^order, of log densities."""
    return float(np.logaddexp.reduce(q + order * (p - q)))


def _by_series(part: _Mixture) -> np.ndarray:
    """Rényi divergences at the whole orders from 12 on: Mironov, Talwar and Zhang 2019 (arXiv 1908.10530), section 3.3.

    A mixture costs no more than if every unit that enters had the longest length, which is 1 here.
    """
    from scipy.special import gammaln

    z, lengths, chances = part
    rate = math.fsum(p for x, p in zip(lengths, chances, strict=True) if x > 0)
    order, j = _ORDERS[len(_FEW) :, None], np.arange(256.0)  # (244, 1) and (256,)
    if rate >= 1:
        return np.asarray(order[:, 0] / (2 * z**2))
    absent = np.maximum(order - j, 0)
    terms = gammaln(order + 1) - gammaln(j + 1) - gammaln(absent + 1)
    terms = terms + absent * math.log1p(-rate) + j * math.log(rate) + j * (j - 1) / (2 * z**2)
    return np.asarray(np.logaddexp.reduce(np.where(j <= order, terms, -np.inf), axis=1) / (order[:, 0] - 1))


@contextmanager
def _tried(what: str) -> Iterator[None]:
    """An error of dp-accounting becomes one of ours: better no ε than a wrong one."""
    try:
        yield
    except (ArithmeticError, ValueError, MemoryError) as error:
        came = f"{type(error).__name__} for {what}: {error}"
        raise _refused("a cost that dp-accounting can compute", came, "Use more noise, or fewer steps.") from error


# Searching, checking.


def _search(cost: Callable[[float], float], target: float, start: float, near: float) -> float:
    """A z whose cost is at most `target`, and less than `near` below it (relative): regula falsi on log z and log cost.

    The Illinois rule halves the cost at an end that stays, so that the interval shrinks from both ends (Dowell and
    Jarratt 1971).
    """

    def above(x: float) -> float:
        return _log(cost(math.exp(x)) / target) + near / 2

    (a, fa), (b, fb) = _bracket(above, math.log(start), near / 2)
    x, fx = (a, fa) if abs(fa) < abs(fb) else (b, fb)
    while abs(fx) > near / 2 and b - a > FAR:
        share = fa / (fa - fb) if math.isfinite(fa) and math.isfinite(fb) else 0.5
        x = a + (b - a) * min(0.95, max(0.05, share))
        fx = above(x)
        if fx > 0:
            (a, fa), fb = (x, fx), fb / 2
        else:
            (b, fb), fa = (x, fx), fa / 2
    return math.exp(x)


Point = tuple[float, float]


def _bracket(f: Callable[[float], float], x: float, near: float) -> tuple[Point, Point]:
    """Two points, f > 0 at the first and f ≤ 0 at the second, from x on; or the same twice, if f is `near` 0 there.

    ε falls at least as fast as 1/z, so a step in log z somewhat longer than f crosses over.
    """
    here = (x, f(x))
    up = here[1] > 0
    while abs(here[0]) < 30:
        if abs(here[1]) <= near:
            return here, here
        step = min(3.0, 1.1 * abs(here[1])) if math.isfinite(here[1]) else 1.0
        there = here[0] + (step if up else -step)
        then = (there, f(there))
        if (then[1] > 0) != up:
            return (here, then) if up else (then, here)
        here = then
    raise _out_of_reach(math.exp(min(here[0], 30)))


def _log(x: float) -> float:
    return math.log(x) if 0 < x < math.inf else (math.inf if x > 0 else -math.inf)


def _round_up(z: float) -> float:
    """z with four digits, never less than it was."""
    unit = 10.0 ** (math.floor(math.log10(z)) - 3)
    rounded = float(f"{math.ceil(z / unit - 1e-9) * unit:.12g}")
    return rounded if rounded >= z * (1 - 1e-9) else rounded + unit


def _chance(delta: float) -> float:
    if not 0 < delta < 1:
        raise _refused("a delta between 0 and 1", f"delta={delta}", "Common is 1e-5, or less than 1 / number of units.")
    return delta


def _not_negative(epsilon: float) -> float:
    if not 0 <= epsilon < math.inf:
        raise _refused("an epsilon >= 0 and finite", f"epsilon={epsilon}", "Ask for the delta of a finite epsilon.")
    return epsilon


def _finite(epsilon: float) -> float:
    if not math.isfinite(epsilon):
        raise _refused("a finite epsilon", f"{epsilon}", "Use more noise or a larger delta; this one cannot be stated.")
    return epsilon


def _out_of_reach(z: float) -> GuaranteeError:
    came = f"none up to a noise multiplier of {z:.3g}"
    return _refused("an epsilon that some amount of noise reaches", came, "Ask for a larger epsilon, or release less.")


def _refused(expected: str, came: str, do: str) -> GuaranteeError:
    return GuaranteeError(expected, came, do)
