"""Noise has the size and the shape it should, comes from the operating system, and never comes twice."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import random as python_random
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from randomgen import AESCounter
from scipy import stats

from foedus import seeds
from foedus.errors import GuaranteeError
from foedus.privacy import noise
from foedus.privacy.noise import SimulatedSource, SystemSource

MANY, LEAST = 2_000_000, 1e-6  # draws; the least p-value, met by chance once in a million runs of a test
SAMPLERS = [
    ("gaussian", lambda g, n: noise.gaussian(g, n, 3.0), 3.0),
    ("discrete", lambda g, n: noise.discrete_gaussian(g, n, 50.0), 50.0),
    ("discrete fine", lambda g, n: noise.discrete_gaussian(g, n, 2.0**22), 2.0**22),
    ("skellam", lambda g, n: noise.skellam(g, n, 900.0), 30.0),
    ("skellam wide", lambda g, n: noise.skellam(g, n, 4e12), 2e6),
]
NAMED = pytest.mark.parametrize(("draw", "std"), [case[1:] for case in SAMPLERS], ids=[case[0] for case in SAMPLERS])


def fresh() -> np.random.Generator:
    return SystemSource().generator("test")


def law(std: float, reach: int) -> np.ndarray:
    """Chances of the discrete Gaussian at −reach … reach."""
    weights = np.exp(-(np.arange(-reach, reach + 1.0) ** 2) / (2 * std**2))
    return weights / weights.sum()


def p_of_counts(draws: np.ndarray, chances: np.ndarray, reach: int) -> float:
    """p-value of a chi-square test, rare values put together."""
    counts = np.bincount(np.clip(draws, -reach, reach) + reach, minlength=2 * reach + 1).astype(float)
    expected = chances / chances.sum() * len(draws)
    common = expected >= 10
    seen, due = np.append(counts[common], counts[~common].sum()), np.append(expected[common], expected[~common].sum())
    if due[-1] < 1:
        assert seen[-1] < 20
        seen, due = seen[:-1], due[:-1] * seen[:-1].sum() / due[:-1].sum()
    return float(stats.chisquare(seen, due).pvalue)


@NAMED
def test_the_standard_deviation_is_right_within_half_a_percent(draw, std):
    x = draw(fresh(), MANY).astype(float)
    assert math.sqrt(np.mean(x**2)) == pytest.approx(std, rel=0.005)
    statistic = float(np.sum((x / std) ** 2))
    assert 2 * min(stats.chi2.cdf(statistic, MANY), stats.chi2.sf(statistic, MANY)) > LEAST
    assert abs(x.mean()) < 5 * std / math.sqrt(MANY)


@NAMED
def test_its_shape_is_the_bell(draw, std):
    x = draw(fresh(), 200_000).astype(float)
    x = x + np.random.default_rng().uniform(-0.5, 0.5, x.size) if std > 3 else x  # integers, spread over their steps
    assert stats.kstest(x / math.sqrt(std**2 + (1 / 12 if std > 3 else 0)), "norm").pvalue > LEAST
    assert abs(stats.kurtosis(x)) < 0.06


@NAMED
def test_coordinates_do_not_depend_on_one_another(draw, std):
    x = draw(fresh(), 1_000_000).astype(float) / std
    for lag in (1, 2, 3, 7, 64, 4096):
        assert abs(np.mean(x[:-lag] * x[lag:])) * 1000 < 5
        assert abs(np.corrcoef(x[:-lag] ** 2, x[lag:] ** 2)[0, 1]) * 1000 < 5


@pytest.mark.parametrize("std", [0.3, 0.5, 1.0, 1.7, 4.0, 30.0])
def test_discrete_noise_has_the_chances_of_the_definition(std):
    reach = int(8 * std) + 2
    assert p_of_counts(noise.discrete_gaussian(fresh(), MANY, std), law(std, reach), reach) > LEAST


@pytest.mark.parametrize("std", [0.5, 3.0])
def test_discrete_noise_agrees_with_opendp(std):
    reach = int(8 * std) + 2
    theirs = noise.exact_discrete_gaussian(20_000, std)
    assert theirs.dtype == np.int64 and p_of_counts(theirs, law(std, reach), reach) > LEAST
    ours = noise.discrete_gaussian(fresh(), 20_000, std)
    table = np.array([np.bincount(np.clip(x, -3, 3) + 3, minlength=7) for x in (ours, theirs)])
    assert stats.chi2_contingency(table[:, table.sum(0) > 10]).pvalue > LEAST


@pytest.mark.parametrize("scale", [1, 2, 10])
def test_the_discrete_laplace_inside_has_the_chances_of_its_definition(scale):
    x = noise._discrete_laplace(fresh(), MANY, scale)
    reach = 12 * scale
    chances = np.exp(-np.abs(np.arange(-reach, reach + 1)) / scale)
    assert p_of_counts(x, chances, reach) > LEAST


def test_a_sum_of_skellams_is_the_skellam_of_the_sum():
    x = sum(noise.skellam(fresh(), 200_000, 2.0) for _ in range(3))
    chances = stats.skellam.pmf(np.arange(-15, 16), 3.0, 3.0)
    assert p_of_counts(np.asarray(x), chances, 15) > LEAST


def test_types_are_wide_and_shapes_are_kept():
    for shape in ((), (0,), (3,), (2, 0, 4), (2, 3, 4)):
        assert noise.gaussian(fresh(), shape, 1.0).dtype == np.float64
        for x in (noise.discrete_gaussian(fresh(), shape, 9.0), noise.skellam(fresh(), shape, 9.0)):
            assert np.shape(x) == shape and np.asarray(x).dtype == np.int64
        assert noise.gaussian(fresh(), shape, 1.0).shape == shape


def test_no_noise_is_exactly_none():
    for x in (
        noise.gaussian(fresh(), 9, 0.0),
        noise.discrete_gaussian(fresh(), 9, 0.0),
        noise.skellam(fresh(), 9, 0.0),
    ):
        assert (x == 0).all()


@pytest.mark.parametrize("std", [-1.0, math.nan, math.inf, 2.0**41])
def test_a_standard_deviation_out_of_range_is_refused(std):
    with pytest.raises(GuaranteeError):
        noise.discrete_gaussian(fresh(), 3, std)
    with pytest.raises(GuaranteeError):
        noise.exact_discrete_gaussian(3, std)
    if std != 2.0**41:
        with pytest.raises(GuaranteeError, match="standard deviation"):
            noise.gaussian(fresh(), 3, std)


@pytest.mark.parametrize("variance", [4.1e12, 5e13, 1e16, -1.0, math.nan, math.inf])
def test_skellam_is_refused_where_the_poisson_sampler_is_wrong(variance):
    with pytest.raises(GuaranteeError, match="Poisson sampler is right"):
        noise.skellam(fresh(), 3, variance)


# Where it comes from.


def test_no_two_calls_give_the_same_noise():
    source = SystemSource()
    draws = {source.generator("server", 0).bytes(16) for _ in range(1000)}
    assert len(draws) == 1000


def test_two_calls_are_unrelated():
    a, b = (SystemSource().generator("server", 0).standard_normal(1_000_000) for _ in range(2))
    assert abs(np.mean(a * b)) * 1000 < 5


def test_neither_processes_nor_a_resumed_run_give_the_same_noise():
    code = "from foedus.privacy.noise import *; print(gaussian(SystemSource().generator('server', 0), 4, 1.0).tolist())"
    said = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in (1, 2)
    ]
    first, second = map(json.loads, said)
    assert not set(first) & set(second)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_draws_other_noise_than_its_parent():
    source = SystemSource()
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writes, source.generator("x").bytes(32))
        os._exit(0)
    ours = source.generator("x").bytes(32)
    os.waitpid(child, 0)
    assert os.read(reads, 32) not in (ours, b"")


def test_seeds_of_other_libraries_do_not_matter():
    import torch

    draws = set()
    before = np.random.get_state(), python_random.getstate(), torch.random.get_rng_state()
    for _ in range(3):
        torch.manual_seed(0)
        np.random.seed(0)
        python_random.seed(0)
        draws.add(SystemSource().generator("x").bytes(16))
    np.random.set_state(before[0])
    python_random.setstate(before[1])
    torch.random.set_rng_state(before[2])
    assert len(draws) == 3


def test_drawing_noise_leaves_the_seeds_of_other_libraries_alone():
    before = np.random.get_state()[1].tolist()
    noise.discrete_gaussian(fresh(), 1000, 5.0)
    noise.exact_discrete_gaussian(10, 5.0)
    assert np.random.get_state()[1].tolist() == before


def test_a_generator_of_real_noise_cannot_be_copied_or_kept():
    for keep in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(GuaranteeError, match="never the generator"):
            keep(fresh())


def test_nothing_that_is_printed_tells_the_key(capfd):
    generator = fresh()
    words = f"{generator!r} {generator} {SystemSource()!r} {vars(SystemSource())}"
    state = json.dumps(generator.bit_generator.state, default=lambda x: np.asarray(x).tolist())
    assert not [number for number in re.findall(r"\d{6,}", state) if number in words]
    assert capfd.readouterr() == ("", "")


def test_the_key_has_128_bits_of_the_operating_system(monkeypatch):
    asked = []
    monkeypatch.setattr(noise.secrets, "randbits", lambda bits: asked.append(bits) or 7)
    same = SystemSource().generator("x").bytes(16) == SystemSource().generator("y").bytes(16)
    assert sum(asked) == 256 and same  # 128 for each of two calls, and nothing else decides what is drawn


def test_the_cipher_gives_the_known_answer_of_the_standard():
    key, block = bytes(range(16)), bytes.fromhex("00112233445566778899aabbccddeeff")  # FIPS 197, appendix C.1
    cipher = AESCounter(key=np.frombuffer(key, np.uint64), counter=int.from_bytes(block, "little"))
    assert np.random.Generator(cipher).bytes(16).hex() == "69c4e0d86a7b0430d8cdb78070b4c55a"


def test_simulated_noise_says_so_and_can_be_repeated():
    source = SimulatedSource(3)
    assert source.simulated and not SystemSource().simulated
    again = [s.generator("server", 1).bytes(16) for s in (source, SimulatedSource(3))]
    assert again[0] == again[1]
    others = {SimulatedSource(4).generator("server", 1).bytes(16), source.generator("server", 2).bytes(16), *again}
    assert len(others) == 3


def test_simulated_noise_is_no_stream_that_a_run_uses_for_something_else():
    assert SimulatedSource(3).generator("sampling").bytes(16) != seeds.generator(3, "sampling").bytes(16)


@given(st.integers(1, 2**40))
def test_discrete_noise_of_any_size_stays_within_reach(std):
    x = noise.discrete_gaussian(SimulatedSource(0).generator(std), 50, float(std))
    assert (np.abs(x) < 12 * std + 1).all()
