"""What a federation of this size costs: parameters, bytes, hours, money, and noise; arithmetic, with its assumptions.

Bytes are those of our own messages, header included. Time is 6 · N · D floating-point operations for N parameters and
D tokens (Kaplan et al. 2020, "Scaling Laws for Neural Language Models"), of which a frozen base saves a third, at a
speed that is given or assumed. Prices are the reader's own: none is assumed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from .. import wire
from ..privacy.noise import SystemSource
from ..privacy.plan import Terms, make_plan
from ..types import Task
from .answers import Answers

USUAL = {"none": 0.02, "cpu": 0.05, "gpu": 20.0}
"""Teraflop/s that training reaches, assumed where none is given: an office machine, some server cores, one GPU of a
data centre at a third of its peak. `foedus check` measures a step; give that instead."""

LORA = 2 / 3
"""Of a full training step's operations: gradients of frozen weights are not taken."""

PROTOCOL = 8192
"""Bytes of keys and shares of a masked round, at most, for up to 32 neighbours."""


SMALL = 1_000_000


@dataclass(frozen=True)
class Shape:
    """A decoder of `layers` blocks, as its public config.json has it; `parameters`: of the whole base."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    head: int
    parameters: float

    def linear(self) -> dict[str, tuple[int, int]]:
        """The linear layers of a block: name → (in, out)."""
        wide, narrow = self.heads * self.head, self.key_heads * self.head
        return {
            "self_attn.q_proj": (self.hidden, wide), "self_attn.k_proj": (self.hidden, narrow),
            "self_attn.v_proj": (self.hidden, narrow), "self_attn.o_proj": (wide, self.hidden),
            "mlp.gate_proj": (self.hidden, self.inner), "mlp.up_proj": (self.hidden, self.inner),
            "mlp.down_proj": (self.inner, self.hidden),
        }  # fmt: skip


SHAPES: dict[str, Shape] = {
    "tiny:llama": Shape(32, 64, 2, 4, 2, 8, 26e3),
    "smollm2-135m-instruct": Shape(576, 1536, 30, 9, 3, 64, 135e6),
    "HuggingFaceTB/SmolLM2-360M-Instruct": Shape(960, 2560, 32, 15, 5, 64, 362e6),
    "Qwen/Qwen2.5-0.5B-Instruct": Shape(896, 4864, 24, 14, 2, 64, 494e6),
    "meta-llama/Llama-3.2-1B-Instruct": Shape(2048, 8192, 16, 32, 8, 64, 1.24e9),
    "qwen2.5-coder-1.5b-instruct": Shape(1536, 8960, 28, 12, 2, 128, 1.54e9),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": Shape(2048, 8192, 24, 32, 32, 64, 1.71e9),
    "mistralai/Mistral-7B-Instruct-v0.3": Shape(4096, 14336, 32, 32, 8, 128, 7.25e9),
    "Qwen/Qwen2.5-7B-Instruct": Shape(3584, 18944, 28, 28, 4, 128, 7.62e9),
    "meta-llama/Llama-3.1-8B-Instruct": Shape(4096, 14336, 32, 32, 8, 128, 8.03e9),
}


@dataclass(frozen=True)
class Costs:
    """`bytes_*`: of one silo in one round. `hours`: of the whole, of which `hours_network`. `money`: None where no
    price was given. `noise`: the noise multiplier for the ε that was asked, and `felt`: its standard deviation over
    the clip norm, in a step's mean over all silos; None where nobody is to be protected. `assumed`: in words.
    """

    parameters: int
    bytes_down: int
    bytes_up: int
    bytes_total: int
    step_seconds: float
    hours: float
    hours_network: float
    money: float | None
    epsilon: float | None
    noise: float | None
    felt: float | None
    assumed: tuple[str, ...]

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self) | {"assumed": list(self.assumed)}


def costs(a: Answers) -> Costs:
    """What a federation by these answers costs. Raises `GuaranteeError` where no noise gives the ε asked for."""
    factors = lora(SHAPES[a.base], a.rank)
    down, up = sizes(factors, a)
    step = a.step_seconds or _step_seconds(a)
    network = a.rounds * (down + up) * 8 / (a.network_mbps * 1e6) / 3600
    hours = a.rounds * a.steps * step / 3600 + network
    total = (down + up) * a.silos * a.rounds
    epsilon, noise, felt = _noise(a)
    return Costs(
        parameters=sum(x * y for x, y in factors.values()), bytes_down=down, bytes_up=up, bytes_total=total,
        step_seconds=step, hours=hours, hours_network=network, money=_money(a, hours, total), epsilon=epsilon,
        noise=noise, felt=felt, assumed=tuple(_assumed(a)),
    )  # fmt: skip


def lora(shape: Shape, rank: int) -> dict[str, tuple[int, int]]:
    """The factors A (rank × in) and B (out × rank) of every linear layer of the blocks."""
    found = {}
    for layer in range(shape.layers):
        for name, (inside, outside) in shape.linear().items():
            place = f"base_model.model.model.layers.{layer}.{name}"
            found[f"{place}.lora_A.default.weight"] = (rank, inside)
            found[f"{place}.lora_B.default.weight"] = (outside, rank)
    return found


def sizes(factors: dict[str, tuple[int, int]], a: Answers) -> tuple[int, int]:
    """Bytes of a task and of a report, as they are packed; beyond `SMALL` numbers, headers and 4 bytes a number."""
    numbers = sum(x * y for x, y in factors.values())
    whole = numbers <= SMALL
    sent = {name: np.zeros(shape if whole else (0, max(shape)), np.float32) for name, shape in factors.items()}
    rest = 0 if whole else 4 * numbers
    cohort = tuple(f"silo-{i + 1}" for i in range(a.silos))
    down = len(wire.pack_task(Task(0, "0" * 64, sent, cohort, 0)))
    up = len(wire.pack({("delta", name): x for name, x in sent.items()}, {"round": 0}))
    return down + rest, up + rest + (PROTOCOL if a.silos >= 3 else 0)


def _step_seconds(a: Answers) -> float:
    speed = (a.teraflops or USUAL[a.hardware]) * 1e12
    return 6 * LORA * SHAPES[a.base].parameters * a.batch * a.tokens / speed


def _money(a: Answers, hours: float, total: int) -> float | None:
    if not (a.price_hour or a.price_gb or a.price_setup):
        return None
    return a.silos * (a.price_setup + hours * a.price_hour) + total / 1e9 * a.price_gb


def _noise(a: Answers) -> tuple[float | None, float | None, float | None]:
    """ε as accounted, the multiplier, and what training feels of it."""
    if a.unit == "none":
        return None, None, None
    common = {"unit": a.unit, "epsilon": a.epsilon, "delta": a.delta, "rounds": a.rounds}
    if a.unit == "silo":
        epsilon, multiplier = _calibrated(Terms(**common, silos=a.silos, expected=float(a.silos)))
        return epsilon, multiplier, multiplier / a.silos
    rate = min(1.0, a.batch / a.examples)
    epsilon, multiplier = _calibrated(Terms(**common, rate=rate, divisor=float(a.batch), steps=a.steps))
    return epsilon, multiplier, multiplier / a.batch / a.silos**0.5


@lru_cache(maxsize=64)
def _calibrated(terms: Terms) -> tuple[float, float]:
    plan = make_plan(terms, SystemSource())
    return plan.epsilon, plan.multiplier


def _assumed(a: Answers) -> list[str]:
    found = ["LoRA on every linear layer of the blocks, 4 bytes a number, every silo in every round, all at once"]
    if not a.step_seconds:
        speed = a.teraflops or USUAL[a.hardware]
        source = "given" if a.teraflops else f'usual for "{a.hardware}"'
        found.append(f"{speed:g} teraflop/s ({source}), 4 operations a parameter and token: easily wrong by 3")
    if not (a.price_hour or a.price_gb or a.price_setup):
        found.append("no price was given, so no money is said")
    if a.unit != "none":
        found.append(f"noise for one {a.unit}, each of {a.examples:,} by chance in a step, add or remove one")
    return found
