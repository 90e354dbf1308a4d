"""The order in which a silo reads its data."""

from types import SimpleNamespace

import numpy as np
import pytest

from foedus.silo.shard import Shard, Silo, pool


def silo(name: str, size: int) -> Silo:
    return Silo(name, {"train": None}, (Shard(name, 0, size),))


@pytest.mark.parametrize("size,batch,steps", [(10, 3, 4), (7, 7, 3), (5, 4, 10)])
def test_steps_cut_one_endless_stream_of_epochs(size, batch, steps):
    one = silo("a", size)
    read = [r for round in range(6) for step in range(steps) for r in one.rows(1, round, step, batch, steps, None)]
    for epoch in range(len(read) // size):
        assert sorted(read[epoch * size : (epoch + 1) * size]) == list(range(size))


@pytest.mark.parametrize("size,batch,epochs", [(10, 3, 1), (8, 4, 2), (5, 8, 1)])
def test_epochs_read_every_row_once_each_and_the_last_batch_may_be_smaller(size, batch, epochs):
    one = silo("a", size)
    for round in range(3):
        steps = one.local_steps(batch, None, epochs)
        read = np.concatenate([one.rows(1, round, step, batch, None, epochs) for step in range(steps)])
        assert sorted(read) == sorted(list(range(size)) * epochs)


def test_the_order_depends_on_seed_name_and_round_alone():
    a = silo("a", 50)
    first = a.rows(1, 2, 0, 8, 5, None)
    np.testing.assert_array_equal(first, silo("a", 50).rows(1, 2, 0, 8, 5, None))
    for other in (silo("b", 50).rows(1, 2, 0, 8, 5, None), a.rows(2, 2, 0, 8, 5, None), a.rows(1, 3, 0, 8, 5, None)):
        assert list(first) != list(other)


def encoded(texts):
    import pyarrow as pa

    from foedus.lm.load import load_base
    from foedus.lm.objectives import make_objective

    base = load_base("tiny:llama")
    return make_objective("causal-lm", 16).encode(
        pa.table({"text": texts, "domain": ["d"] * len(texts)}), base.tokenizer
    )


def test_each_pooled_batch_is_the_silos_batches_together():
    silos = [
        Silo(name, {"train": encoded([f"{name} {i} some words here" for i in range(n)])})
        for name, n in (("a", 9), ("b", 5))
    ]
    both = pool("pooled", silos)
    for round in range(3):
        for step in range(2):
            rows = both.rows(1, round, step, 3, 2, None)
            expected = [s.splits["train"].inputs[r] for s in silos for r in s.rows(1, round, step, 3, 2, None)]
            assert [list(both.splits["train"].inputs[r]) for r in rows] == [list(x) for x in expected]
    assert both.examples == sum(s.examples for s in silos)


def test_a_silo_reads_its_own_training_rows():
    one = Silo("a", {"train": SimpleNamespace(__len__=lambda: 3)}, (Shard("a", 0, 3),))
    assert one.shards == (Shard("a", 0, 3),)
