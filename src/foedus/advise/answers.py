"""What the advice starts from: one question a field, answered in a file or at the prompt."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import TreatyError, one_of


@dataclass(frozen=True)
class Question:
    """`choices`: allowed words, () for a number. `least`: the smallest number. `default`: None where one must say."""

    asks: str
    choices: tuple[str, ...] = ()
    least: float = 0.0
    default: Any = None


QUESTIONS: dict[str, Question] = {
    "where": Question("Where do the texts lie?", ("one-organisation", "several-organisations")),
    "silos": Question("At how many organisations, or places that may not see each other's text?", least=1),
    "examples": Question("How many texts has each of them, about?", least=1),
    "sensitivity": Question("How sensitive are they?", ("public", "internal", "personal", "special")),
    "pooling": Question("May they be brought to one place?", ("yes", "under-governance", "no")),
    "task": Question("What should the model do?", ("write", "classify", "extract", "answer-from-documents")),
    "changes": Question("Do the facts that it must know change every few weeks?", ("no", "yes"), default="no"),
    "quality": Question("How good must it be?", ("indicative", "good", "best"), default="good"),
    "hardware": Question("What does each place have to compute with?", ("none", "cpu", "gpu"), default="cpu"),
    "network_mbps": Question("How many Mbit/s can each place send?", least=0.001, default=100.0),
    "base": Question("Which base model?", default="smollm2-135m-instruct"),
    "rank": Question("Which LoRA rank?", least=1, default=8),
    "rounds": Question("How many rounds?", least=1, default=20),
    "steps": Question("How many local steps a round?", least=1, default=10),
    "batch": Question("How many texts a step?", least=1, default=16),
    "tokens": Question("How many tokens has a text, about?", least=1, default=256),
    "unit": Question("Whose presence must be protected?", ("none", "example", "author", "silo"), default="none"),
    "epsilon": Question("With which ε for the whole treaty?", least=0.01, default=8.0),
    "delta": Question("With which δ?", least=1e-15, default=1e-5),
    "teraflops": Question("How many teraflop/s does each place reach? 0: assume what is usual", default=0.0),
    "step_seconds": Question("How long does a step take, by `foedus check`? 0: estimate it", default=0.0),
    "price_hour": Question("What does an hour of one place's machine cost? 0: leave money out", default=0.0),
    "price_gb": Question("What does a gigabyte sent cost?", default=0.0),
    "price_setup": Question("What does it cost to set up one place?", default=0.0),
}
WHOLE = ("silos", "examples", "rank", "rounds", "steps", "batch", "tokens")


@dataclass(frozen=True)
class Answers:
    """One value for each of `QUESTIONS`. Raises `TreatyError` for one that does not fit."""

    where: str
    silos: int
    examples: int
    sensitivity: str
    pooling: str
    task: str
    changes: str = "no"
    quality: str = "good"
    hardware: str = "cpu"
    network_mbps: float = 100.0
    base: str = "smollm2-135m-instruct"
    rank: int = 8
    rounds: int = 20
    steps: int = 10
    batch: int = 16
    tokens: int = 256
    unit: str = "none"
    epsilon: float = 8.0
    delta: float = 1e-5
    teraflops: float = 0.0
    step_seconds: float = 0.0
    price_hour: float = 0.0
    price_gb: float = 0.0
    price_setup: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            check(field.name, getattr(self, field.name))

    @property
    def sensitive(self) -> bool:
        """Whether people are in the texts."""
        return self.sensitivity in ("personal", "special")

    def plain(self) -> dict[str, Any]:
        """As a file would have it."""
        return asdict(self)


def check(name: str, value: Any) -> None:
    """Raises `TreatyError` for an answer that is none."""
    question = QUESTIONS[name]
    if question.choices:
        if value not in question.choices:
            raise _wrong(name, f"one of {', '.join(question.choices)}", value, one_of(str(value), question.choices))
    elif name == "base":
        from .cost import SHAPES

        if value not in SHAPES:
            raise _wrong(name, "a base model whose shape is known", value, one_of(str(value), SHAPES))
    else:
        kind = "a whole number" if name in WHOLE else "a number"
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < question.least or (name in WHOLE and not isinstance(value, int)):
            raise _wrong(name, f"{kind} of at least {question.least:g}", value, f"It answers: {question.asks}")
        if name == "delta" and value >= 1:
            raise _wrong(name, "a number below 1", value, "Well below 1 / the number of texts.")


def load(path: Path) -> Answers:
    """The answers in a TOML file. Raises `TreatyError` for what does not fit, and for what is missing."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        do = "Write key = value lines; `foedus advise` without --answers asks for each."
        raise TreatyError("answers in TOML", str(error), do, where=str(path)) from None
    return from_table(found, str(path))


def from_table(found: Mapping[str, Any], where: str = "") -> Answers:
    """Answers from plain values by name."""
    for name in found:
        if name not in QUESTIONS:
            raise TreatyError("a question that is asked", f'"{name}"', one_of(name, QUESTIONS), where=where)
    missing = [name for name, q in QUESTIONS.items() if q.default is None and name not in found]
    if missing:
        do = f"Add {missing[0]}: {QUESTIONS[missing[0]].asks}"
        raise TreatyError("an answer to every question without a default", f"none to {', '.join(missing)}", do,
                          where=where)  # fmt: skip
    return Answers(**found)


def _wrong(name: str, expected: str, value: Any, do: str) -> TreatyError:
    return TreatyError(expected, repr(value), do, where=name)
