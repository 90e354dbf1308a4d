"""Canaries: units made up for the audit, each taking part by the toss of a fair coin.

**Input canaries** are texts. Put those whose coin fell right into a silo's training split (`insert`), train, and ask
the released parameters: how do their losses compare (`scores`, for the bounds in `bounds.py`), how far up do they rank
among texts made the same way (`exposure`, Carlini et al. 2019, arXiv 1802.08232), and does the model finish them
(`extract`)?

**Gradient canaries** go past the model: each is a vector of the greatest norm that the clip lets through, on
coordinates of its own, added to the sum of clipped gradients of the steps it is drawn for (Nasr et al. 2023, arXiv
2302.07956, and Steinke et al. 2023 for many in one run). The attacker sees every release and knows everything but the
coins, as the guarantee assumes. They reach what ideal canaries of the same mechanism reach, and while they do, the
noise itself is looked at.

Canaries take part in training, so an audit with them is a run of its own: never insert them into a run whose result is
used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.stats import binom, chi2, kstest, norm

from ..errors import GuaranteeError, ModelError
from ..lm.bench import Bench
from ..lm.objectives import Encoded, concat
from ..privacy.steps import PrivateSteps
from ..types import Params
from .bounds import METHODS, MOST, SOURCES, Scores, ceiling, coins, highest, lowest
from .membership import TOKENS, documents_of, predictions, read, select

WRONG = 1e-3
"""A self-check fails below this p-value. A sound run fails one of ten checks once in a hundred audits."""
PROMPTS = 64
"""Prompts that are continued side by side."""
WATCHED = 4096
"""Coordinates of the noise that are kept of each step, to look for repetitions."""


# ---- texts ----


@dataclass(frozen=True, eq=False)
class Planted:
    """Input canaries: one document each in `data`, and their coins, (n,) bool. `kind`: in words, how they were made."""

    data: Encoded
    members: np.ndarray
    kind: str

    def __post_init__(self) -> None:
        if self.members.shape != documents_of(self.data).shape:
            raise ValueError(f"Expected members of shape {documents_of(self.data).shape}; got {self.members.shape}.")


@dataclass(frozen=True)
class Exposure:
    """In bits, log₂ of how many times likelier to be found than at random a canary is; `most` is all that can be seen.

    `mean` and `highest` over those inserted; `baseline`: the mean over those that were not, 1.44 (= 1 / ln 2) in
    expectation.
    """

    kind: str
    canaries: int
    mean: float
    highest: float
    most: float
    baseline: float


@dataclass(frozen=True)
class Extraction:
    """How many of `tried` texts the model finished word for word after their first `prefix` tokens; rates in [0, 1].

    `low`, `high`: of the rate of `exact`, at 95 %. `tokens`: mean share of right tokens in their place. `examples`:
    (prompt, truth, recovered), only of texts that are canaries.
    """

    kind: str
    tried: int
    exact: int
    low: float
    high: float
    tokens: float
    prefix: int
    examples: tuple[tuple[str, str, str], ...] = ()


def random_texts(bench: Bench, count: int, tokens: int, generator: np.random.Generator) -> list[str]:
    """Texts of `tokens` tokens, each uniform over the vocabulary's plain ASCII words and parts of words."""
    tokenizer = bench.base.tokenizer
    words = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    plain = [i for i, word in enumerate(words) if word.strip().isalnum() and word.isascii()]
    ids = generator.choice(np.setdiff1d(plain, tokenizer.all_special_ids), (count, tokens))
    return [text.strip() for text in tokenizer.batch_decode(ids)]


def hardest(bench: Bench, base: Params, data: Encoded, count: int, *, seed: int) -> Encoded:
    """The `count` documents of `data` with the highest mean loss under `base`: natural texts that stand out."""
    loss = read(bench, base, data, seed=seed).loss
    return select(data, documents_of(data)[np.argsort(-loss, kind="stable")[:count]])


def plant(data: Encoded, kind: str, generator: np.random.Generator) -> Planted:
    """Tosses the coins: which of these documents will take part."""
    return Planted(data, coins(len(documents_of(data)), generator), kind)


def insert(train: Encoded, planted: Planted) -> Encoded:
    """A training split with the canaries that take part, after its own documents."""
    return concat([train, select(planted.data, documents_of(planted.data)[planted.members])])


def scores(bench: Bench, released: Params, base: Params, planted: Planted, *, seed: int) -> Scores:
    """How much each canary's loss fell from the base's; higher for one that took part."""
    gain = read(bench, base, planted.data, seed=seed).loss - read(bench, released, planted.data, seed=seed).loss
    return Scores(gain[planted.members], gain[~planted.members])


def exposure(bench: Bench, released: Params, planted: Planted, references: Encoded, *, seed: int) -> Exposure:
    """Ranks the canaries by their loss among `references`, N documents that were made the same way and never inserted.

    log₂(N + 1) − log₂ rank (definition 5 of Carlini et al. 2019 with a sample for the whole space). Of equal losses
    half come before.
    """
    ordered = np.sort(read(bench, released, references, seed=seed).loss)
    loss = read(bench, released, planted.data, seed=seed).loss
    before = (np.searchsorted(ordered, loss, "left") + np.searchsorted(ordered, loss, "right")) / 2
    bits = np.log2((len(ordered) + 1) / (before + 1))
    inside, outside = bits[planted.members], bits[~planted.members]
    most = math.log2(len(ordered) + 1)
    return Exposure(planted.kind, len(inside), float(inside.mean()), float(inside.max()), most, float(outside.mean()))


def extract(
    bench: Bench,
    params: Params,
    data: Encoded,
    kind: str,
    *,
    prefix: int,
    suffix: int,
    beams: int = 1,
    show: int = 0,
) -> Extraction:
    """Prompts with the first `prefix` tokens of each document and compares the next `suffix` with its own.

    `beams`: continuations kept in the search; 1 is greedy, and any of them may be right. Documents that are too short
    are left out. `show`: how many to quote: only ever of canaries. Held-out documents are the control. Causal models
    only.
    """
    if bench.objective.task != "causal-lm":
        came = f'task="{bench.objective.task}"'
        raise ModelError("a causal language model to prompt", came, "Leave extraction out for this task.")
    rows = [row for row in _first_rows(data) if len(data.inputs[row]) >= data.first[row] + prefix + suffix]
    starts = [data.first[row] + prefix for row in rows]
    prompts = [np.asarray(data.inputs[row][:at], np.int64) for row, at in zip(rows, starts, strict=True)]
    truths = [np.asarray(data.inputs[row][at : at + suffix]) for row, at in zip(rows, starts, strict=True)]
    found = [_nearest(said, truth) for said, truth in zip(continuations(bench, params, prompts, suffix, beams), truths,
                                                          strict=True)]  # fmt: skip
    shares = [float((a == b).mean()) for a, b in zip(found, truths, strict=True)]
    exact, tried = sum(share == 1 for share in shares), len(rows)
    shown = zip(prompts[:show], truths[:show], found[:show], strict=True)
    decode = bench.base.tokenizer.decode
    examples = tuple(tuple(decode(x, skip_special_tokens=True) for x in three) for three in shown)
    low, high = lowest(exact, tried, 0.025), highest(exact, tried, 0.025)
    return Extraction(kind, tried, exact, low, high, float(np.mean(shares)) if shares else 0.0, prefix, examples)


@torch.no_grad()
def continuations(
    bench: Bench, params: Params, prompts: Sequence[np.ndarray], length: int, beams: int = 1
) -> list[np.ndarray]:
    """For each prompt of token ids its likeliest continuations by beam search, (beams, length), the best first."""
    leaves = {name: x[0].detach() for name, x in bench.leaves([params]).items()}
    out: list[np.ndarray] = [np.empty(0)] * len(prompts)
    for size in sorted({len(prompt) for prompt in prompts}):
        alike = [i for i, prompt in enumerate(prompts) if len(prompt) == size]
        for group in (alike[i : i + PROMPTS] for i in range(0, len(alike), PROMPTS)):
            ids = torch.from_numpy(np.stack([prompts[i] for i in group]))[:, None]
            found = _search(bench, leaves, ids, length, beams)
            for i, x in zip(group, found[:, :, size:].numpy(), strict=True):
                out[i] = x
    return out


def _search(
    bench: Bench, leaves: Mapping[str, torch.Tensor], ids: torch.Tensor, length: int, beams: int
) -> torch.Tensor:
    """Beam search from (n, 1, t) token ids to (n, beams, t + length)."""
    total = torch.zeros(ids.shape[:2])
    for _ in range(length):
        logp = torch.log_softmax(_next(bench, leaves, ids.flatten(0, 1)), -1).view(*total.shape, -1)
        paths = (logp + total[..., None]).flatten(1)
        total, at = paths.topk(min(beams, paths.shape[1]), dim=1)
        before = (at // logp.shape[-1])[..., None].expand(-1, -1, ids.shape[2])
        ids = torch.cat([ids.gather(1, before), (at % logp.shape[-1])[..., None]], 2)
    return ids


def _next(bench: Bench, leaves: Mapping[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Logits of what follows each of some rows of equal length, (rows, words)."""
    chunks = ids.split(max(1, TOKENS // ids.shape[1]))
    batches = [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in chunks]
    return torch.cat([predictions(bench, leaves, batch)[:, -1].float().cpu() for batch in batches])


def _nearest(said: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return said[np.argmax((said == truth).sum(1))]


def _first_rows(data: Encoded) -> Iterator[int]:
    yield from np.unique(data.documents, return_index=True)[1]


# ---- gradients ----


Step = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""One private step: the flat sum of the units' clipped gradients, (d,), to what is released of it, (d,)."""


@dataclass(frozen=True)
class Tensor:
    """A tensor's place in the flat vector: `size` coordinates after those of the tensors before it.

    `part`: the part of the gradient that it is clipped with, to L2 norm `norm` > 0. `std`: what the plan says is the
    standard deviation of the noise on each of its coordinates in the sum, > 0.
    """

    name: str
    size: int
    norm: float
    std: float
    part: int = 0

    def __post_init__(self) -> None:
        if self.size < 1 or not self.norm > 0 or not self.std > 0:
            raise ValueError(f"Expected size={self.size}, norm={self.norm} and std={self.std} > 0.")


@dataclass(frozen=True, eq=False)
class GradientCanaries:
    """n canaries, orthogonal because no two share a coordinate. Make them with `gradient_canaries`.

    `places`: (n, w) coordinates. `values`: (n, w), what a canary adds there: in each part of the gradient a vector of
    that part's norm. `std`: (n, w), of the noise there. `members`: (n,) bool, the coins.
    """

    places: np.ndarray
    values: np.ndarray
    std: np.ndarray
    members: np.ndarray

    @property
    def multiplier(self) -> float:
        """The noise multiplier z that a canary meets: 1/z² = Σ (value / std)². The plan's own if every part is used."""
        return float(1 / np.sqrt(np.square(self.values[0] / self.std[0]).sum()))

    def add(self, total: np.ndarray, present: np.ndarray) -> np.ndarray:
        """`total` with the canaries that are `present`, (n,) bool."""
        out = np.array(total, np.float64)
        out[self.places[present]] += self.values[present]
        return out

    def seen(self, residual: np.ndarray) -> np.ndarray:
        """(n,) how much of each canary there is in a release less what others put in: 0 or 1, plus N(0, z²)."""
        return self.multiplier**2 * (residual[self.places] * self.values / self.std**2).sum(1)


@dataclass(frozen=True)
class Check:
    """A self-check of the mechanism. `p`: the probability of what was seen, or of worse, if all is well."""

    name: str
    p: float
    detail: str

    @property
    def passed(self) -> bool:
        return self.p >= WRONG


@dataclass(frozen=True, eq=False)
class Trial:
    """What a run of gradient canaries left: scores for the bounds, self-checks of the noise, and who was in which step,
    (steps, n) bool."""

    scores: Scores
    checks: tuple[Check, ...]
    present: np.ndarray
    multiplier: float


def gradient_canaries(
    tensors: Sequence[Tensor], count: int, generator: np.random.Generator, *, width: int = 1
) -> GradientCanaries:
    """`count` ≥ 2 canaries for a gradient made of `tensors`.

    `width`: coordinates that a canary takes in each part, with random signs; 1 is a Dirac vector. A part with fewer
    than `count` · `width` coordinates is left alone, which makes canaries weaker; with no part left they are refused.
    """
    part = np.repeat([t.part for t in tensors], [t.size for t in tensors])
    std = np.repeat([t.std for t in tensors], [t.size for t in tensors])
    norms = {t.part: t.norm for t in tensors}
    roomy = [p for p in sorted(norms) if np.count_nonzero(part == p) >= count * width]
    if not roomy:
        raise ValueError(f"Expected a part of {count * width} coordinates or more; got {len(part)} in all.")
    places = [generator.permutation(np.flatnonzero(part == p))[: count * width].reshape(count, width) for p in roomy]
    signs = generator.choice([-1.0, 1.0], (count, width * len(roomy)))
    values = signs * np.repeat([norms[p] / math.sqrt(width) for p in roomy], width)
    place = np.concatenate(places, 1)
    return GradientCanaries(place, values, std[place], coins(count, generator))


def mechanism(steps: PrivateSteps, shapes: Mapping[str, tuple[int, ...]], round: int = 0) -> tuple[list[Tensor], Step]:
    """One round's private steps of a plan, for `run` (with `rate=steps.rate` and `scale=steps.divisor`).

    What the plan says of its noise goes into the tensors, and what it adds is its own code: they must agree. Noise
    comes from the plan's source, and `run`'s generator is not asked for any. Steps with correlated noise are refused:
    their ε is one of the whole run, and no step's by itself.
    """
    if steps.factors is not None or steps.bare_std is not None:
        came = "correlated noise" if steps.factors is not None else "noise without a clip"
        raise GuaranteeError("a plan with independent noise and a clip", came, "Audit it with input canaries.")
    growth = steps.following.growth if steps.following else 1.0
    multiplier = steps.multipliers[round] * steps.sensitivity * growth
    tensors = [
        Tensor(name, math.prod(shape), steps.parts.norms[part], steps.parts.std(name, multiplier), part)
        for name, shape in shapes.items()
        for part in [steps.parts.of.get(name, 0)]
    ]
    ends = np.cumsum([t.size for t in tensors])[:-1]

    def step(total: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        pieces = zip(shapes.items(), np.split(total, ends), strict=True)
        sums = {name: x.reshape(shape).astype(np.float32) for (name, shape), x in pieces}
        noise = steps.noise(shapes, round, 1.0, steps.source.generator("audit"))
        return np.concatenate([x.ravel() for x in steps.released(sums, noise).values()])

    return tensors, step


def run(
    step: Step,
    sums: Iterable[np.ndarray],
    tensors: Sequence[Tensor],
    canaries: GradientCanaries,
    generator: np.random.Generator,
    *,
    rate: float = 1.0,
    scale: float = 1.0,
    independent: bool = True,
) -> Trial:
    """Runs the mechanism once on everybody's clipped sums and the canaries, and scores the canaries.

    `sums`: for each step the flat sum over the real units, (d,); it may be lazy and follow what was released. `rate`:
    q in (0, 1], a member's chance of being in a step. `scale`: what a release is multiplied by to be a sum again (a
    public divisor). `independent`: whether noise should be fresh in every step, as it is not when it is correlated on
    purpose. `generator`: draws who is in a step, and is handed to `step`.
    """
    z = canaries.multiplier
    n = len(canaries.members)
    score, present, watch = np.zeros(n), [], _Watch(tensors)
    for total in sums:
        here = canaries.members & (generator.random(n) < rate)
        fed = canaries.add(total, here)
        released = np.asarray(step(fed.copy(), generator), np.float64) * scale
        watch.see(released - fed, fed)
        score += evidence(canaries.seen(released - total), z, rate)
        present.append(here)
    split = Scores(score[canaries.members], score[~canaries.members])
    return Trial(split, tuple(watch.checks(independent)), np.array(present), z)


def evidence(y: np.ndarray, multiplier: float, rate: float) -> np.ndarray:
    """log(1 − q + q exp((2y − 1) / 2z²)): the log-likelihood ratio of a member against anybody else, for one step.

    `y`: how much of a canary a release holds, 0 or 1 plus N(0, z²). Summed over steps, no test beats it (Neyman and
    Pearson).
    """
    return np.logaddexp(_log(1 - rate), math.log(rate) + (2 * y - 1) / (2 * multiplier**2))


def ideal(multiplier: float, rate: float, steps: int, count: int, generator: np.random.Generator) -> Scores:
    """Scores of ideal canaries of this very mechanism: what `run` can reach at best.

    With sampling that is less than ideal canaries of a Gaussian mechanism with the same (ε, δ) reach (see
    `bounds.ideal`): its ε is spent on rare events that few canaries show.
    """
    members = coins(count, generator)
    score = np.zeros(count)
    for _ in range(steps):
        present = members & (generator.random(count) < rate)
        score += evidence(present + multiplier * generator.standard_normal(count), multiplier, rate)
    return Scores(score[members], score[~members])


def sampling(present: np.ndarray, rate: float) -> list[Check]:
    """Whether every unit was in every step by a coin of its own.

    `present`: (steps, units) bool, of units that took part. Batches of one size, and epochs in which everybody comes
    once, both vary too little; both are caught by that.
    """
    steps, units = present.shape
    drawn = int(present.sum())
    by_step = _spread(present.sum(1), units, rate)
    by_unit = _spread(present.sum(0), steps, rate)
    return [
        Check("units are drawn at the stated rate", _two_sided(*_tails(binom(steps * units, rate), drawn)),
              f"{drawn} of {steps * units} draws at a rate of {rate:g}"),
        Check("batches vary in size as Poisson sampling has it", by_step, f"chi-square, {steps} steps"),
        Check("units vary in how often they are drawn", by_unit, f"chi-square, {units} units"),
    ]  # fmt: skip


@dataclass
class _Watch:
    """Looks at noise as it goes by, tensor by tensor, in units of what it should be."""

    tensors: Sequence[Tensor]
    squares: np.ndarray = field(init=False)
    kept: list[np.ndarray] = field(default_factory=list)
    twins: np.ndarray = field(init=False)
    steps: int = 0

    def __post_init__(self) -> None:
        self.ends = np.cumsum([t.size for t in self.tensors])
        self.std = np.repeat([t.std for t in self.tensors], [t.size for t in self.tensors])
        self.squares = np.zeros(len(self.tensors))
        self.twins = np.zeros(max(0, len(self.tensors) - 1))
        self.leaning = np.zeros(2)
        self.stride = -(-int(self.ends[-1]) // WATCHED)

    def see(self, noise: np.ndarray, fed: np.ndarray) -> None:
        if noise.shape != (self.ends[-1],):
            raise ValueError(f"Expected a release of shape {(int(self.ends[-1]),)}; got {noise.shape}.")
        noise, fed = noise / self.std, fed / self.std
        pieces = np.split(noise, self.ends[:-1])
        self.squares += [np.square(x).sum() for x in pieces]
        self.twins += [_dot(a, b) for a, b in zip(pieces, pieces[1:], strict=False)]
        self.leaning += [fed @ noise, fed @ fed]
        self.kept.append(noise[:: self.stride])
        self.steps += 1

    def checks(self, independent: bool) -> Iterator[Check]:
        sizes = np.array([t.size for t in self.tensors]) * self.steps
        sides = [_two_sided(chi2.cdf(s, n), chi2.sf(s, n)) for s, n in zip(self.squares, sizes, strict=True)]
        worst = int(np.argmin(sides))
        ratio = math.sqrt(self.squares[worst] / sizes[worst])
        yield Check(
            "the noise has the stated size on every tensor",
            min(1.0, min(sides) * len(sides)),
            f"chi-square on {len(sides)} tensors; furthest off, {self.tensors[worst].name}: {ratio:.4f} of it",
        )
        lean, power = self.leaning
        slope = f"{1 + lean / power:.4f} of the sum, ± {1 / math.sqrt(power):.4f}" if power else "no sum to see"
        yield Check("the sum goes in once, unscaled", self._normal(lean / math.sqrt(power or 1.0)), slope)
        shape = kstest(np.concatenate(self.kept)[:100_000], norm.cdf).pvalue
        yield Check("the noise is Gaussian", float(shape), "Kolmogorov-Smirnov")
        if len(self.twins):
            p = self._normal(self.twins / math.sqrt(self.steps))
            yield Check("no two tensors get the same noise", p, "correlation of neighbouring tensors")
        if independent and self.steps > 1:
            seen = np.array(self.kept)
            products = (seen @ seen.T)[np.triu_indices(self.steps, 1)] / math.sqrt(seen.shape[1])
            yield Check("the noise is fresh in every step", self._normal(products), f"{len(products)} pairs of steps")

    @staticmethod
    def _normal(x: np.ndarray | float) -> float:
        """The p-value of the largest of some values that should be standard normal."""
        return float(min(1.0, 2 * norm.sf(np.abs(x).max()) * np.size(x)))


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    """The inner product of the first coordinates of two tensors, scaled to variance 1."""
    n = min(len(a), len(b))
    return float(a[:n] @ b[:n]) / math.sqrt(n)


def _spread(counts: np.ndarray, trials: int, rate: float) -> float:
    """The p-value of how much binomial counts vary about their known mean; both too much and too little is odd.

    The sum of squares is taken for a multiple of a chi-square variable with its own mean and variance, as counts near
    zero are far from normal.
    """
    if rate == 1:
        return float((counts == trials).all())
    variance = trials * rate * (1 - rate)
    fourth = variance * (1 + 3 * rate * (1 - rate) * (trials - 2))  # E (X − mean)⁴
    ratio = (fourth - variance**2) / (2 * variance)
    statistic, freedom = float(np.square(counts - trials * rate).sum()) / ratio, len(counts) * variance / ratio
    return _two_sided(chi2.cdf(statistic, freedom), chi2.sf(statistic, freedom))


def _tails(law: Any, x: int) -> tuple[float, float]:
    return float(law.cdf(x)), float(law.sf(x - 1))


def _two_sided(below: float, above: float) -> float:
    return float(min(1.0, 2 * min(below, above)))


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


# ---- for the audit's page ----


def exposure_record(x: Exposure) -> dict[str, Any]:
    """An entry of "exposure" in audit.json."""
    return {"kind": x.kind, "canaries": x.canaries, "mean": x.mean, "max": x.highest, "most_possible": x.most,
            "baseline": x.baseline}  # fmt: skip


def extraction_record(x: Extraction) -> dict[str, Any]:
    """An entry of "extraction" in audit.json; its examples are canaries."""
    examples = [dict(zip(("prompt", "truth", "recovered"), example, strict=True), source="canary")
                for example in x.examples]  # fmt: skip
    return {"kind": x.kind, "tried": x.tried, "exact": x.exact, "tokens": x.tokens, "prefix": x.prefix,
            "examples": examples}  # fmt: skip


def bound_records(scores: Scores, canaries: str, stated: float | None, delta: float) -> list[dict[str, Any]]:
    """Entries of "bounds" in audit.json, one for each method. `canaries`: "gradient" or "input". `stated`: the ε to set
    beside them; what ideal canaries of a Gaussian mechanism would reach is given for it, unless it is None or infinite.
    """
    reached = stated if stated is not None and 0 < stated < MOST else None
    return [
        {
            "canaries": canaries,
            "method": name,
            "source": SOURCES[name],
            "epsilon": bound.epsilon if math.isfinite(bound.epsilon) else None,
            "estimate": bound.estimate,
            "ceiling": None if reached is None else ceiling(method, reached, delta, len(scores)),
            "count": len(scores),
            "confidence": bound.confidence,
            "delta": delta,
        }
        for name, method in METHODS.items()
        for bound in [method(scores, delta, 0.95)]
    ]


def check_record(x: Check) -> dict[str, Any]:
    """An entry of "checks" in audit.json."""
    return {"name": x.name, "passed": x.passed, "p": x.p, "detail": x.detail}
