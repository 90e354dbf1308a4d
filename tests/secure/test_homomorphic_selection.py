"""A part of the coordinates is encrypted: which, is public; and both parts together are all of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus.errors import WireError
from foedus.secure.selective import Selection, everything, select, sensitivity


@given(st.lists(st.floats(0, 10), min_size=1, max_size=70), st.floats(0, 1))
def test_the_most_sensitive_share_is_chosen_and_split_words_join_again(sizes, share):
    sizes = np.array(sizes)
    selection = select(sizes, share)
    assert selection.count == -int(-share * len(sizes) // 1)
    if 0 < selection.count < len(sizes):
        assert sizes[selection.chosen].min() >= sizes[~selection.chosen].max()
    words = np.arange(len(sizes), dtype=np.uint32)
    left, right = selection.split(words)
    assert (selection.join(left, right) == words).all() and len(left) + len(right) == len(words)


def test_sums_of_the_parts_join_to_the_sum():
    selection, rng = select(np.arange(50.0), 0.3), np.random.default_rng(0)
    each = rng.integers(0, 2**16, (4, 50)).astype(np.uint32)
    halves = [selection.split(words) for words in each]
    left, right = (np.sum(half, axis=0, dtype=np.uint32) for half in zip(*halves, strict=True))
    assert (selection.join(left, right) == each.sum(0)).all()


def test_a_choice_is_a_value_with_one_form_and_one_digest():
    one, two = select(np.array([3.0, 1.0, 2.0]), 0.5), select(np.array([30.0, 0.0, 20.0]), 0.6)
    assert one == two and hash(one) == hash(two) and one.digest == two.digest
    assert one.digest != everything(3).digest and everything(3).count == 3
    assert Selection(3, one.bits).chosen.tolist() == [True, False, True]


def test_lengths_are_part_of_the_digest():
    assert select(np.zeros(3), 0.0).digest != select(np.zeros(4), 0.0).digest


@pytest.mark.parametrize("bits", [b"", b"\xff\xff", b"\xff"])
def test_a_choice_in_another_form_is_refused(bits):
    with pytest.raises(WireError, match="a bit for each of 3"):
        Selection(3, bits)


@pytest.mark.parametrize(("sizes", "share"), [([1.0, np.nan], 0.5), ([1.0], 1.1), ([1.0], -0.1)])
def test_a_choice_by_no_sizes_is_refused(sizes, share):
    with pytest.raises(ValueError, match="Expected 0 <= share"):
        select(np.array(sizes), share)


def test_sensitivity_is_the_mean_size_of_a_gradient():
    found = sensitivity([{"w": np.array([1.0, -3.0])}, {"w": np.array([-1.0, 0.0])}])
    assert found["w"].tolist() == [1.0, 1.5]
