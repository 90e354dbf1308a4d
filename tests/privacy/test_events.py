"""Events are plain values: the same after a trip through JSON, and checked both when made and when read back."""

from __future__ import annotations

import doctest
import json
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus.errors import GuaranteeError
from foedus.privacy import events

multipliers = st.floats(1e-3, 1e3)
rates = st.floats(0, 1)
simple = st.one_of(
    st.builds(events.gaussian, multipliers),
    st.builds(events.zcdp, st.floats(0, 10)),
    st.builds(events.symmetric, st.floats(0, 10)),
    st.builds(events.cut, rates),
    st.builds(events.none, st.text(max_size=5)),
    st.builds(lambda z, q: events.mixture(z, [0.0, 1.0], [1 - q, q]), multipliers, rates),
)
anything = st.recursive(
    simple,
    lambda inner: st.one_of(
        st.builds(events.poisson, rates, inner),
        st.builds(events.repeat, inner, st.integers(0, 10**6)),
        st.lists(inner, max_size=3).map(lambda parts: events.together(*parts)),
    ),
    max_leaves=6,
)


@given(anything)
def test_an_event_is_the_same_after_a_trip_through_json(event):
    assert events.check(json.loads(json.dumps(event))) == event


def test_the_examples_in_the_docstrings_are_true():
    assert doctest.testmod(events).failed == 0


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: events.gaussian(0), "multiplier > 0"),
        (lambda: events.gaussian(-1), "multiplier > 0"),
        (lambda: events.gaussian(math.nan), "multiplier to be a finite number"),
        (lambda: events.gaussian(math.inf), "multiplier to be a finite number"),
        (lambda: events.gaussian(True), "multiplier to be a finite number"),
        (lambda: events.gaussian("1"), "multiplier to be a finite number"),
        (lambda: events.poisson(1.01, events.gaussian(1)), "rate from 0 to 1"),
        (lambda: events.poisson(-0.1, events.gaussian(1)), "rate from 0 to 1"),
        (lambda: events.poisson(0.1, {}), "an event whose mechanism the accountant knows"),
        (lambda: events.repeat(events.gaussian(1), -1), "times to be a whole number >= 0"),
        (lambda: events.repeat(events.gaussian(1), 2.0), "times to be a whole number >= 0"),
        (lambda: events.zcdp(-1), "rho >= 0"),
        (lambda: events.symmetric(-1), "rho >= 0"),
        (lambda: events.cut(1.5), "chance from 0 to 1"),
        (lambda: events.mixture(1, [0, 1], [0.5, 0.6]), "probabilities that sum to 1"),
        (lambda: events.mixture(1, [0, -1], [0.5, 0.5]), "sensitivities >= 0"),
        (lambda: events.mixture(1, [], []), "as many sensitivities"),
        (lambda: events.check({"mechanism": "gausian", "multiplier": 1}), 'Did you mean "gaussian"?'),
        (lambda: events.check({"mechanism": "gaussian"}), "with multiplier"),
        (lambda: events.check({"mechanism": "gaussian", "multiplier": 1, "delta": 0}), "also"),
        (lambda: events.check({"mechanism": "together", "of": "gaussian"}), "a list of events"),
    ],
)
def test_what_is_not_a_well_formed_event_is_refused_by_name(make, says):
    with pytest.raises(GuaranteeError, match=".*" + says.replace("?", r"\?")):
        make()


@given(st.lists(multipliers, min_size=1, max_size=5))
def test_gaussians_released_together_are_one_gaussian(several):
    assert events.joint(*several) ** -2 == pytest.approx(sum(z**-2 for z in several))
    assert events.joint(*several) <= min(several) * (1 + 1e-12)


def test_no_gaussian_at_all_needs_no_noise():
    assert events.joint() == math.inf


def test_events_load_no_heavy_library():
    heavy = ("torch", "scipy", "dp_accounting", "opendp", "randomgen")
    code = (
        f"import sys, foedus.privacy.events, foedus.privacy.accountant; print([m for m in {heavy} if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[]"
