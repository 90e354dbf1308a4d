"""Messages: what `pack` writes `unpack` reads, equal content is equal bytes, and nothing else is a message."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from foedus import wire
from foedus.errors import WireError
from foedus.types import Task

TREE = {("delta", "b"): np.arange(6, dtype=np.float32).reshape(2, 3), ("weight", "sum"): np.array([3.0])}


@given(
    st.dictionaries(
        st.tuples(st.text(max_size=8), st.text(max_size=8)),
        arrays(st.sampled_from([np.float32, np.float64, np.int64]), st.integers(0, 5), elements=st.integers(-9, 9)),
        max_size=4,
    )
)
def test_what_is_packed_is_unpacked(tree):
    again, facts = wire.unpack(wire.pack(tree, {"round": 3}))
    assert facts == {"round": 3}
    assert again.keys() == tree.keys()
    for key, x in tree.items():
        np.testing.assert_array_equal(again[key], x)
        assert again[key].dtype == x.dtype


def test_equal_content_gives_equal_bytes_whatever_the_order():
    assert wire.pack(TREE, {"a": 1, "b": 2}) == wire.pack(dict(reversed(TREE.items())), {"b": 2, "a": 1})


def test_a_task_survives_the_wire():
    task = Task(4, "abc", {"w": np.ones(3, np.float32)}, ("a", "b"), 7, {"clip": 0.5}, {("control", "w"): np.zeros(3)})
    again = wire.unpack_task(wire.pack_task(task))
    assert (again.round, again.model, again.cohort, again.seed, again.settings) == (
        4,
        "abc",
        ("a", "b"),
        7,
        {"clip": 0.5},
    )
    np.testing.assert_array_equal(again.params["w"], task.params["w"])
    np.testing.assert_array_equal(again.extra["control", "w"], task.extra["control", "w"])


@given(st.binary(max_size=200))
def test_noise_is_not_a_message(blob):
    with pytest.raises(WireError):
        wire.unpack(blob)


@given(st.integers(0, 400), st.integers(0, 255))
def test_a_damaged_message_is_refused_or_still_a_message(position, byte):
    blob = bytearray(wire.pack(TREE, {}))
    blob[position % len(blob)] = byte
    try:
        wire.unpack(bytes(blob))
    except WireError:
        pass


def test_a_truncated_message_is_refused_at_every_length():
    blob = wire.pack(TREE, {})
    for length in range(len(blob)):
        with pytest.raises(WireError):
            wire.unpack(blob[:length])


def test_a_message_that_is_not_a_task_is_refused():
    with pytest.raises(WireError, match="facts of a task"):
        wire.unpack_task(wire.pack(TREE, {}))


def test_canonical_json_refuses_nan():
    with pytest.raises(ValueError):
        wire.canonical({"x": float("nan")})


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3), (2, 3)])
@pytest.mark.parametrize("dtype", sorted(wire.DTYPES))
def test_every_shape_and_kind_of_number_survives(shape, dtype):
    """A kept optimizer's step count has no dimension: it once came back from a checkpoint with one."""
    x = np.ones(shape, dtype)
    again = wire.unpack(wire.pack({("a", "b"): x}, {}))[0]["a", "b"]
    assert again.shape == shape and again.dtype == x.dtype
    np.testing.assert_array_equal(again, x)


def test_our_blob_is_what_the_library_writes():
    from safetensors.numpy import save

    ours = wire.pack(TREE, {"round": 1})
    theirs = save({str(i): TREE[key] for i, key in enumerate(sorted(TREE))}, {"foedus": "x"})
    assert {k: v.tolist() for k, v in wire._tensors(ours).items()} == {
        k: v.tolist() for k, v in wire._tensors(theirs).items()
    }


def test_a_kind_of_number_that_no_message_holds_is_refused_by_name():
    with pytest.raises(WireError, match="complex128"):
        wire.pack({("a", "b"): np.ones(2, complex)}, {})
