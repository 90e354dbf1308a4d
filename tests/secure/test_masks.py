"""Masks are AES in counter mode, uniform over the whole word, cancel in pairs, and never come twice."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from foedus import secure
from foedus.errors import GuaranteeError
from foedus.secure import keys, masks

SEED = bytes(range(32))
DTYPES = [np.uint16, np.uint32, np.uint64]
LEAST = 1e-6  # the least p-value; seeds are fixed, so what passes once passes always
EACH = pytest.mark.parametrize("dtype", DTYPES)
borders = st.sampled_from([masks.CHUNK // 2, masks.CHUNK // 4, masks.CHUNK // 8]).flatmap(
    lambda words: st.integers(-2, 2).map(lambda by: words + by)
)
lengths = st.integers(0, 300) | borders


def seeds(count: int, *words: keys.Word) -> list[bytes]:
    return [keys.hkdf(SEED, b"test", *words, i) for i in range(count)]


def test_the_generator_is_pinned():
    assert masks.keystream(SEED, 4, np.uint16).tolist() == [0x4CFC, 0x0FED, 0x256E, 0x160F]
    assert masks.keystream(SEED, 4, np.uint32).tolist() == [0x0FED4CFC, 0x160F256E, 0x31613993, 0x9E25C571]
    assert masks.keystream(SEED, 2, np.uint64).tolist() == [0x160F256E0FED4CFC, 0x9E25C57131613993]


@EACH
def test_the_keystream_is_the_cipher_of_a_counter(dtype):
    """Block by block, with the counter kept here: AES-128 in ECB mode of first, first + 1, …, big end first."""
    derived = keys.hkdf(SEED, b"", "keystream")
    first, count = int.from_bytes(derived[16:], "big"), 20_000  # blocks, over three chunks
    counters = b"".join(((first + i) % 2**128).to_bytes(16, "big") for i in range(count))
    expected = Cipher(AES(derived[:16]), ECB()).encryptor().update(counters)
    size = np.dtype(dtype).itemsize
    words = np.frombuffer(expected, np.dtype(dtype).newbyteorder("<"))
    assert np.array_equal(masks.keystream(SEED, 16 * count // size - 3, dtype), words[:-3])


@EACH
def test_a_shorter_keystream_is_the_beginning_of_a_longer_one(dtype):
    long = masks.keystream(SEED, 150_000, dtype)
    for count in (0, 1, 7, masks.CHUNK // long.itemsize, 149_999):
        assert np.array_equal(masks.keystream(SEED, count, dtype), long[:count])


@settings(max_examples=40)
@given(st.sampled_from(DTYPES), lengths, st.integers(2, 6), st.integers(0, 2**32))
def test_masks_are_invisible_in_the_sum(dtype, length, n, draw):
    """Everybody masks with everybody; the sum of what is sent is the sum of what was hidden, modulo the word."""
    rng = np.random.default_rng(draw)
    plain = rng.integers(0, np.iinfo(dtype).max, (n, length), dtype, endpoint=True)
    sent = plain.copy()
    for i in range(n):
        others = [j for j in range(n) if j != i]
        pairs = [keys.hkdf(SEED, b"", draw, min(i, j), max(i, j)) for j in others]
        masks.add(sent[i], pairs, [1 if i < j else -1 for j in others])
    assert np.array_equal(sent.sum(0, dtype), plain.sum(0, dtype))
    assert length < 8 or not np.any(np.all(sent == plain, axis=1))


@settings(max_examples=30)
@given(st.sampled_from(DTYPES), lengths, st.lists(st.sampled_from([1, -1]), max_size=5))
def test_adding_many_at_once_is_adding_one_by_one_and_taking_off_undoes_it(dtype, length, signs):
    chosen = seeds(len(signs))
    start = masks.keystream(keys.hkdf(SEED, b"", "start"), length, dtype)
    at_once, one_by_one = start.copy(), start.copy()
    masks.add(at_once, chosen, signs)
    for seed, sign in zip(chosen, signs, strict=True):
        stream = masks.keystream(seed, length, dtype)
        one_by_one = one_by_one + stream if sign > 0 else one_by_one - stream
    assert np.array_equal(at_once, one_by_one)
    masks.add(at_once, chosen, [-sign for sign in signs])
    assert np.array_equal(at_once, start)


def test_only_the_part_that_is_given_is_touched():
    whole = np.zeros(100, np.uint32)
    masks.add(whole[10:20], [SEED], [1])
    assert not whole[:10].any() and not whole[20:].any()
    assert np.array_equal(whole[10:20], masks.keystream(SEED, 10, np.uint32))


@EACH
def test_masks_are_uniform_over_the_whole_word(dtype):
    """Chi-square of each byte of the word and of neighbouring bytes together; both ends of the range are reached."""
    size = np.dtype(dtype).itemsize
    stream = masks.keystream(SEED, 2**22 // size, dtype)
    columns = stream.astype(np.dtype(dtype).newbyteorder("<")).view(np.uint8).reshape(-1, size)
    for column in columns.T:
        assert stats.chisquare(np.bincount(column, minlength=256)).pvalue > LEAST
    assert stats.chisquare(np.bincount(columns.reshape(-1, 2).view("<u2")[:, 0], minlength=2**16)).pvalue > LEAST
    top = np.iinfo(dtype).max
    assert stream.min() < top * 1e-4 and stream.max() > top * (1 - 1e-4)
    if size == 2:
        assert len(np.unique(stream)) == 2**16


def test_a_masked_zero_looks_like_a_masked_anything():
    for value in (0, 1, 2**16 - 1):
        words = np.full(2**20, value, np.uint16)
        masks.add(words, seeds(3, value), [1, -1, 1])
        assert stats.chisquare(np.bincount(words, minlength=2**16)).pvalue > LEAST


def test_ten_thousand_sessions_share_no_block_of_keystream():
    """The seeds of a session differ by its transcript alone: 64 blocks of each, 640,000 blocks, all different."""
    sessions = [keys.hkdf(SEED, session.to_bytes(32, "big"), "mask", "train 1", "a", "b") for session in range(10_000)]
    streams = np.concatenate([masks.keystream(seed, 128, np.uint64) for seed in sessions]).reshape(-1, 2)
    assert len(np.unique(streams.view([("a", "u8"), ("b", "u8")]))) == 640_000
    assert len({keys.hkdf(seed, b"", "keystream")[:16] for seed in sessions}) == 10_000


NO_WORDS = [np.zeros(4, np.int32), np.zeros(4, np.uint8), np.zeros(4), np.zeros(4, ">u4"), np.zeros((2, 2), np.uint16)]


@pytest.mark.parametrize("words", [*NO_WORDS, np.zeros(8, np.uint16)[::2]])
def test_what_is_no_vector_of_words_is_refused(words):
    with pytest.raises(GuaranteeError, match="a contiguous vector"):
        masks.add(words, [SEED], [1])


@pytest.mark.parametrize("seed", [b"", bytes(4), bytes(31), bytes(33)])
def test_a_seed_of_fewer_or_more_than_256_bits_is_refused(seed):
    with pytest.raises(GuaranteeError, match="seeds of 32 bytes"):
        masks.add(np.zeros(4, np.uint16), [SEED, seed], [1, 1])


@pytest.mark.parametrize("signs", [[], [1, 1], [0], [2]])
def test_a_sign_too_few_or_too_many_or_other_than_one_is_refused(signs):
    words = np.zeros(4, np.uint16)
    with pytest.raises(GuaranteeError, match="one sign"):
        masks.add(words, [SEED], signs)
    assert not words.any()


def test_nothing_of_the_protocol_draws_from_a_generator_that_is_no_cipher():
    """Neither NumPy's generators nor Python's, nor a log: only `entropy`, which is the operating system's."""
    for file in sorted(Path(secure.__file__).parent.glob("**/*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Attribute) and node.attr == "random":
                names = ["numpy.random"]
            else:
                continue
            for name in names:
                assert not name.startswith(("random", "numpy.random", "torch", "logging")), f"{file.name}: {name}"
                assert "seeds" not in name.split("."), f"{file.name} draws from seeds"
