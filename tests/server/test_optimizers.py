"""Server optimizers against the paper's equations written out, and their limits."""

import math

import numpy as np
import pytest

from foedus.server import Adaptive, Sgd

X = {"w": np.array([1.0, -2.0]), "v": np.array([[0.5]])}
DELTAS = [{"w": np.array([0.1, -0.3]), "v": np.array([[0.7]])}, {"w": np.array([-0.2, 0.0]), "v": np.array([[0.1]])}]


def walk(optimizer, params=X, deltas=DELTAS):
    state = optimizer.init(params)
    for delta in deltas:
        params, state = optimizer.step(params, delta, state)
    return params, state


def test_sgd_with_lr_one_adds_the_mean_delta():
    params, state = walk(Sgd(1.0))
    np.testing.assert_allclose(params["w"], X["w"] + DELTAS[0]["w"] + DELTAS[1]["w"])
    assert state == {}


def test_momentum_remembers():
    params, _ = walk(Sgd(0.5, momentum=0.9))
    m1 = DELTAS[0]["w"]
    m2 = 0.9 * m1 + DELTAS[1]["w"]
    np.testing.assert_allclose(params["w"], X["w"] + 0.5 * m1 + 0.5 * m2)


@pytest.mark.parametrize("rule", ["adagrad", "adam", "yogi"])
def test_adaptive_follows_algorithm_2_of_reddi_et_al(rule):
    lr, b1, b2, tau = 0.3, 0.9, 0.99, 1e-3
    params, _ = walk(Adaptive(rule, lr, b1, b2, tau))
    x, m, v = 0.5, 0.0, tau**2
    for d in (0.7, 0.1):
        m = b1 * m + (1 - b1) * d
        v = {
            "adagrad": v + d * d,
            "adam": b2 * v + (1 - b2) * d * d,
            "yogi": v - (1 - b2) * d * d * math.copysign(1, v - d * d),
        }[rule]
        x += lr * m / (math.sqrt(v) + tau)
    assert params["v"][0, 0] == pytest.approx(x, rel=1e-12)


def test_yogi_moves_its_second_moment_by_at_most_its_share_and_keeps_it_positive():
    rng = np.random.default_rng(0)
    optimizer = Adaptive("yogi")
    params, state = {"w": np.zeros(50)}, optimizer.init({"w": np.zeros(50)})
    for _ in range(200):
        delta = {"w": rng.normal(size=50) * rng.choice([1e-4, 1.0, 30.0])}
        before = state["v", "w"]
        params, state = optimizer.step(params, delta, state)
        most = (1 - optimizer.beta2) * delta["w"] ** 2 + 1e-15 * before  # and the rounding of v itself
        assert np.all(np.abs(state["v", "w"] - before) <= most * (1 + 1e-9))
        assert np.all(state["v", "w"] > 0)


def test_adaptive_without_memory_and_with_a_huge_tau_is_sgd():
    tau = 1e9
    params, _ = walk(Adaptive("adam", lr=tau, beta1=0.0, beta2=0.0, tau=tau))
    v_share = 2.0  # sqrt(v) is about |delta|, nothing beside tau; v0 = tau² counts only for beta2 > 0
    np.testing.assert_allclose(params["w"], X["w"] + sum(d["w"] for d in DELTAS), atol=1e-6 * v_share)


@pytest.mark.parametrize(
    "optimizer", [Sgd(1.0), Sgd(1.0, 0.9), Adaptive("adam"), Adaptive("yogi"), Adaptive("adagrad")]
)
def test_steps_keep_the_dtype_and_leave_their_arguments_alone(optimizer):
    params = {"w": np.ones(3, np.float32)}
    delta = {"w": np.full(3, 0.25)}
    state = optimizer.init(params)
    moved, _ = optimizer.step(params, delta, state)
    assert moved["w"].dtype == np.float32
    np.testing.assert_array_equal(params["w"], np.ones(3))
    again, _ = optimizer.step(params, delta, state)
    np.testing.assert_array_equal(moved["w"], again["w"])


@pytest.mark.parametrize("build", [lambda: Sgd(0.0), lambda: Sgd(1.0, 1.0), lambda: Adaptive("adam", tau=0.0),
                                   lambda: Adaptive("adam", beta2=1.0), lambda: Adaptive("rmsprop")])  # fmt: skip
def test_values_out_of_range_are_refused_by_name(build):
    with pytest.raises(ValueError, match="Expected"):
        build()
