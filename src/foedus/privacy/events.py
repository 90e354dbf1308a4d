"""Events: what a release costs, as plain values that a ledger can write and an accountant can read back.

    gaussian(z)   poisson(rate, of)   mixture(z, sensitivities, probabilities)   zcdp(rho)   symmetric(rho)
    cut(chance)   none(why)   repeat(of, times)   together(a, b, …)

An event is a dictionary of strings, numbers, lists and events, the same after a trip through JSON. It speaks of
neighbours that differ in one unit, added or removed, and of a vector that this unit moves by at most the bound, in L2.
A noise multiplier z is the standard deviation of the noise over that bound. Next: `accountant.py` turns events into ε.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..errors import GuaranteeError, one_of

Event = Mapping[str, Any]


def gaussian(multiplier: float) -> dict[str, Any]:
    """Noise N(0, (multiplier · bound)²) on every coordinate of one vector. `multiplier`: > 0 and finite.

    >>> gaussian(2)
    {'mechanism': 'gaussian', 'multiplier': 2.0}
    """
    return {"mechanism": "gaussian", "multiplier": _positive("multiplier", multiplier)}


def poisson(rate: float, of: Event) -> dict[str, Any]:
    """The event `of`, on a sample that each unit enters by a secret coin of its own, with chance `rate`, 0 to 1.

    Not for shuffled epochs nor for batches of a fixed size: those units do not enter independently of one another.
    """
    return {"mechanism": "poisson", "rate": _share("rate", rate), "of": check(of)}


def mixture(multiplier: float, sensitivities: Sequence[float], probabilities: Sequence[float]) -> dict[str, Any]:
    """A Gaussian whose unit moves the vector by a random length: `sensitivities[i]` bounds with `probabilities[i]`.

    The lengths are ≥ 0, the probabilities sum to 1. A group of k units under Poisson sampling is of this kind, with
    binomial probabilities of 0 to k bounds: see `accountant.group` (Charles et al. 2024, arXiv 2407.07737).
    """
    lengths = [_number("sensitivities", x) for x in sensitivities]
    chances = [_share("probabilities", x) for x in probabilities]
    if not lengths or len(lengths) != len(chances) or min(lengths) < 0 or abs(math.fsum(chances) - 1) > 1e-9:
        raise _refused("as many sensitivities >= 0 as probabilities that sum to 1", f"{lengths} and {chances}")
    return {
        "mechanism": "mixture",
        "multiplier": _positive("multiplier", multiplier),
        "sensitivities": lengths,
        "probabilities": chances,
    }


def zcdp(rho: float) -> dict[str, Any]:
    """Anything that is `rho`-zCDP, rho ≥ 0 (Bun and Steinke 2016); discrete Gaussian noise is, with rho = 1 / (2z²)."""
    return {"mechanism": "zcdp", "rho": _concentration(rho)}


def symmetric(rho: float) -> dict[str, Any]:
    """Noise that is added, has the law of its own negative, and is `rho`-zCDP: shares of discrete Gaussian noise are.

    On a Poisson sample it costs less than `zcdp`, of which only rho is known: see `accountant._by_curve`.
    """
    return {"mechanism": "symmetric", "rho": _concentration(rho)}


def cut(chance: float) -> dict[str, Any]:
    """Noise whose tail was cut off: with at most this `chance`, 0 to 1, something else came of the events beside it."""
    return {"mechanism": "cut", "chance": _share("chance", chance)}


def none(why: str = "") -> dict[str, Any]:
    """A release with no guarantee at all, and `why`: its ε is infinite."""
    return {"mechanism": "none", "why": str(why)} if why else {"mechanism": "none"}


def repeat(of: Event, times: int) -> dict[str, Any]:
    """The same event `times` over, each with fresh noise and a fresh sample. `times`: a whole number ≥ 0."""
    if isinstance(times, bool) or not isinstance(times, int) or times < 0:
        raise _refused("times to be a whole number >= 0", f"times={times!r}")
    return {"mechanism": "repeat", "times": times, "of": check(of)}


def together(*of: Event) -> dict[str, Any]:
    """All of these events, in any order, each free to depend on what the earlier ones released."""
    return {"mechanism": "together", "of": [check(event) for event in of]}


def joint(*multipliers: float) -> float:
    """The multiplier of several Gaussians released at once: 1/z² = Σ 1/zⱼ². Of none at all: infinite.

    >>> round(joint(5.0, 5.0), 3)
    3.536
    """
    precision = math.fsum(_positive("multiplier", z) ** -2 for z in multipliers)
    return precision**-0.5 if precision else math.inf


def check(event: Event) -> dict[str, Any]:
    """The same event in canonical form, or a `GuaranteeError` that says what is wrong with it."""
    name = event.get("mechanism") if isinstance(event, Mapping) else None
    if name not in _FIELDS:
        do = one_of(str(name), _FIELDS)
        raise GuaranteeError("an event whose mechanism the accountant knows", f"{event!r:.80}", do)
    required, make = _FIELDS[str(name)]
    if unknown := set(event) - {"mechanism", *required} - ({"why"} if name == "none" else set()):
        raise _refused(f"an event of kind {name} with {', '.join(required) or 'no field'}", f"also {sorted(unknown)}")
    if missing := [field for field in required if field not in event]:
        raise _refused(f"an event of kind {name} with {', '.join(required)}", f"none of the name {missing[0]}")
    return make(event)


def _together(events: Any) -> dict[str, Any]:
    if isinstance(events, Mapping | str) or not isinstance(events, Iterable):
        raise _refused("a list of events", repr(events)[:80])
    return together(*events)


_FIELDS: dict[str, tuple[tuple[str, ...], Callable[[Event], dict[str, Any]]]] = {
    "gaussian": (("multiplier",), lambda e: gaussian(e["multiplier"])),
    "poisson": (("rate", "of"), lambda e: poisson(e["rate"], e["of"])),
    "mixture": (
        ("multiplier", "sensitivities", "probabilities"),
        lambda e: mixture(e["multiplier"], e["sensitivities"], e["probabilities"]),
    ),
    "zcdp": (("rho",), lambda e: zcdp(e["rho"])),
    "symmetric": (("rho",), lambda e: symmetric(e["rho"])),
    "cut": (("chance",), lambda e: cut(e["chance"])),
    "none": ((), lambda e: none(e.get("why", ""))),
    "repeat": (("times", "of"), lambda e: repeat(e["of"], e["times"])),
    "together": (("of",), lambda e: _together(e["of"])),
}


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _refused(f"{name} to be a finite number", f"{name}={value!r}")
    return float(value)


def _positive(name: str, value: Any) -> float:
    if (number := _number(name, value)) <= 0:
        raise _refused(f"{name} > 0", f"{name}={number}")
    return number


def _concentration(rho: Any) -> float:
    if (value := _number("rho", rho)) < 0:
        raise _refused("rho >= 0", f"rho={value}")
    return value


def _share(name: str, value: Any) -> float:
    if not 0 <= (number := _number(name, value)) <= 1:
        raise _refused(f"{name} from 0 to 1", f"{name}={number}")
    return number


def _refused(expected: str, came: str) -> GuaranteeError:
    return GuaranteeError(expected, came, "An event that is not well formed has no cost that could be stated.")
