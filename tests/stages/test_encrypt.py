"""Encryption as a stage: the sum comes back to the last unit, whatever share of it was encrypted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest

from foedus.errors import CohortError, GuaranteeError, SiloError, WireError
from foedus.secure.backends import Ring, SecretKey
from foedus.secure.selective import Selection, select
from foedus.stages import chain
from foedus.stages.base import Chain, Plain
from foedus.stages.encrypt import ENCRYPTED, Encrypt, Encrypted, selection_of
from foedus.stages.words import SUM, Words, layout_of
from foedus.types import Key, Task, Total, Update

W: Key = ("delta", "w")
COUNT: Key = ("metric", "count")
TASK = Task(0, "model", {"w": np.zeros((20, 3))}, ("a", "b", "c"), 1)


@cache
def key_of(ring: Ring) -> SecretKey:
    return SecretKey.fresh(ring)


def some(layout) -> Selection:
    return select(np.random.default_rng(5).random(layout.length), 0.4)


def updates(layout, silos: int = 3) -> list[Update]:
    """Updates at the limits of their room, and in between."""
    rng, most = np.random.default_rng(0), layout.room
    each = [rng.integers(-most, most, (20, 3), endpoint=True) for _ in range(silos)]
    for x in each:
        x[0], x[1] = most, -most
    return [Update({W: x, COUNT: np.array([2**40 * (i - 1)])}, silo="abcd"[i]) for i, x in enumerate(each)]


def layout(word: int, parties: int):
    return layout_of({W: (20, 3)}, [COUNT], word, parties)


@dataclass(frozen=True)
class Added(Plain):
    """Stands for masks that cancel in the sum of three: it adds so much to every word."""

    hides = True
    masks: Mapping[str, int]

    def encode(self, update: Update, task: Task) -> Update:
        words = update.tensors[SUM]
        return replace(update, tensors={SUM: words + np.array(self.masks[update.silo], np.int64).astype(words.dtype)})


MASKS = Added({"a": 12345, "b": -2345, "c": -10000})


def stages_of(what: Encrypted) -> Chain:
    return chain(Words(what.layout), Encrypt(what, key_of(what.sums.ring).public, what.selection and MASKS))


def summed(stages, what: Encrypted, each: list[Update], minimum: int = 3) -> Total:
    """What a coordinator and a key holder do together; masked words are added as they are."""
    key = key_of(what.sums.ring)
    adder, rest = what.adder(key.public), None
    for update in each:
        sent = stages.encode(update, TASK).tensors
        adder.add(sent[ENCRYPTED].tobytes())
        if SUM in sent:
            rest = sent[SUM] if rest is None else rest + sent[SUM]
    opened = what.open(key, adder.total(), minimum)
    others = {} if rest is None else {SUM: rest}
    return stages.decode(Total({ENCRYPTED: opened.values} | others, 1.0, opened.count), TASK)


@pytest.mark.parametrize("share", ["all", "some"])
@pytest.mark.parametrize(("word", "parties"), [(16, 3), (16, 5), (16, 16), (32, 3), (32, 100), (64, 7)])
def test_the_sum_that_is_decrypted_is_the_sum_of_the_updates(word, parties, share):
    places = layout(word, parties)
    what = Encrypted(places, None if share == "all" else some(places))
    stages = stages_of(what)
    total = summed(stages, what, updates(places))
    assert (total.tensors[W] == sum(update.tensors[W] for update in updates(places))).all()
    assert total.tensors[COUNT].tolist() == [0] and total.count == 3 and stages.hides


def test_an_update_leaves_as_bytes_alone_or_beside_masked_words():
    places = layout(32, 3)
    for selection, left in ((None, {ENCRYPTED}), (some(places), {ENCRYPTED, SUM})):
        what = Encrypted(places, selection)
        stages = stages_of(what)
        sent = stages.encode(updates(places)[0], TASK).tensors
        assert sent.keys() == left and sent[ENCRYPTED].dtype == np.uint8
        if selection is not None:
            plain = Words(places).encode(updates(places)[0], TASK).tensors[SUM][~selection.chosen]
            assert (sent[SUM] == plain + np.uint32(12345)).all()


def test_a_selection_alone_hides_nothing():
    places = layout(32, 3)
    what = Encrypted(places, some(places))
    key = key_of(what.sums.ring).public
    for rest in (None, Plain()):
        with pytest.raises(GuaranteeError, match="hides the words that are not encrypted"):
            Encrypt(what, key, rest)
    assert Encrypt(what, key, MASKS).hides


def test_fewer_silos_than_the_minimum_are_not_opened_and_dropped_ones_are_not_missed():
    places = layout(32, 5)
    what = Encrypted(places)
    stages = stages_of(what)
    with pytest.raises(CohortError):
        summed(stages, what, updates(places, 2))
    total = summed(stages, what, updates(places, 4))
    assert (total.tensors[W] == sum(update.tensors[W] for update in updates(places, 4))).all() and total.count == 4


def test_words_that_have_no_room_are_not_encrypted():
    places = layout(32, 3)
    what = Encrypted(places)
    words = np.full(places.length, 2**31, np.uint32)
    with pytest.raises(SiloError, match="nothing has left"):
        Encrypt(what, key_of(what.sums.ring).public).encode(Update({SUM: words}), TASK)


def test_one_key_serves_training_and_evaluation():
    training, measures = Encrypted(layout(32, 5)), Encrypted(layout_of({}, [COUNT], 32, 5))
    assert training.sums.ring == measures.sums.ring
    key = key_of(training.sums.ring).public
    blob = chain(Words(measures.layout), Encrypt(measures, key)).encode(Update({COUNT: np.array([1])}), TASK)
    with pytest.raises(WireError):
        Encrypted(layout_of({W: (200, 300)}, [COUNT], 32, 5)).adder(key).add(blob.tensors[ENCRYPTED].tobytes())


def test_a_selection_for_another_layout_or_of_nothing_is_refused():
    places = layout(32, 3)
    for selection in (select(np.zeros(3), 1.0), select(np.zeros(places.length), 0.0)):
        with pytest.raises(GuaranteeError, match="a selection among"):
            Encrypted(places, selection)


def test_a_selection_by_public_sizes_takes_weights_and_counts_first_and_then_the_most_sensitive():
    places = layout_of({W: (20, 3), ("weight", "sum"): (1,)}, [COUNT], 32, 3)
    sizes = {"w": np.arange(60.0).reshape(20, 3)}
    others = places.length - 60
    chosen = selection_of(places, sizes, (others + 5) / places.length).chosen
    assert np.flatnonzero(chosen).tolist() == list(range(55, places.length))
