"""Integers to words: exact sums, no wrap, nothing beside the layout."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus.errors import GuaranteeError, SiloError
from foedus.stages.words import SCALED, SUM, WIDE, Limit, Words, layout_of, room
from foedus.types import Task, Total, Update

TASK = Task(0, "m", {}, (), 0)
DELTA, WEIGHT, LOSS = ("delta", "a"), ("weight", "sum"), ("metric", "loss")


def made(word: int, parties: int, shape=(2, 3)):
    return layout_of({DELTA: shape}, [WEIGHT, LOSS], word, parties)


@given(st.sampled_from([16, 32, 64]), st.integers(1, 500), st.integers(0, 2**32))
def test_the_sum_of_words_is_the_sum_of_integers_up_to_the_last_unit_of_room(word, parties, seed):
    layout, random = made(word, parties), np.random.default_rng(seed)
    most = min(layout.room, 2**53)
    count = int(random.integers(1, parties + 1))
    ends = random.choice([-1, 1])
    updates = [
        {DELTA: np.full((2, 3), ends * most), WEIGHT: np.array([2 ** (WIDE - 1) - 1]), LOSS: np.array([-i])}
        for i in range(count)
    ]
    total = sum((layout.pack(u) for u in updates), np.zeros(layout.length, layout.pack(updates[0]).dtype))
    read = layout.unpack(total, count)
    assert (read[DELTA] == ends * most * count).all()
    assert read[WEIGHT] == [(2 ** (WIDE - 1) - 1) * count]
    assert read[LOSS] == [-sum(range(count))]


@pytest.mark.parametrize("word", [16, 32, 64])
@pytest.mark.parametrize("sign", [-1, 1])
def test_one_unit_beyond_the_room_is_refused_and_nothing_wraps(word, sign):
    layout = made(word, 100)
    layout.pack({DELTA: np.full((2, 3), sign * layout.room)})
    with pytest.raises(SiloError, match="could wrap"):
        layout.pack({DELTA: np.full((2, 3), sign * (layout.room + 1))})


def test_a_wide_number_without_room_is_refused():
    with pytest.raises(SiloError, match="'metric loss' below 2"):
        made(16, 3).pack({LOSS: np.array([2 ** (WIDE - 1)])})


def test_what_nobody_agreed_on_does_not_leave():
    with pytest.raises(GuaranteeError, match="'secret x' beside them"):
        made(32, 3).pack({("secret", "x"): np.array([1])})


def test_numbers_that_are_no_integers_or_have_another_shape_are_refused():
    for x in (np.zeros((2, 3)), np.zeros(6, np.int64)):
        with pytest.raises(GuaranteeError, match="Put a Grid"):
            made(32, 3).pack({DELTA: x})


def test_every_silo_sends_equally_many_words():
    layout = made(16, 20)
    assert len(layout.pack({})) == len(layout.pack({DELTA: np.ones((2, 3), int), LOSS: np.array([5])})) == layout.length


def test_words_take_two_bytes_for_each_of_many_numbers():
    layout = made(16, 100, (1000, 1000))
    assert layout.pack({}).nbytes <= 1.001 * 2 * 10**6


def test_room_is_what_the_parties_can_share():
    assert room(16, 1) == 2**15 - 1 and 7 * room(32, 7) <= 2**31 - 1 < 7 * (room(32, 7) + 1)
    with pytest.raises(ValueError, match="word=8"):
        room(8, 2)


def test_more_silos_than_a_word_can_count_are_refused():
    with pytest.raises(GuaranteeError, match="add a bit each"):
        made(16, 2**16 + 1)


def test_the_stage_reads_back_a_sum():
    stage = Words(made(32, 5))
    one = stage.encode(Update({DELTA: np.arange(6).reshape(2, 3)}, silo="a"), TASK)
    assert one.silo == "a" and set(one.tensors) == {SUM}
    total = stage.decode(Total({SUM: one.tensors[SUM] * np.uint32(2)}, 1.0, 2), TASK)
    assert (total.tensors[DELTA] == 2 * np.arange(6).reshape(2, 3)).all() and total.bound == 1.0


def test_an_update_that_is_too_large_is_scaled_as_a_whole_and_counted():
    update = Update({DELTA: np.array([0.5, -4.0]), ("delta", "b"): np.array([1.0]), LOSS: np.array([900.0])})
    out = Limit(2.0, count=True).encode(update, TASK).tensors
    assert out[DELTA].tolist() == [0.25, -2.0] and out[("delta", "b")] == [0.5]
    assert out[LOSS] == [900.0] and out[SCALED] == [1.0]
    assert Limit(4.0, count=True).encode(update, TASK).tensors[SCALED] == [0.0]
    assert SCALED not in Limit(4.0).encode(update, TASK).tensors


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_becomes_zero(odd):
    out = Limit(1.0).encode(Update({DELTA: np.array([odd, 3.0])}), TASK).tensors
    assert out[DELTA].tolist() == [0.0, 0.0]
