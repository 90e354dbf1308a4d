"""Cross-domain alignment with domain attention (after Wang et al., preprint 202509.1640; what that paper leaves open or
contradicts is settled in docs/papers.md).

Now and then a silo surveys its own text under the global model: the mean of φ(h(x)), φ random Fourier features of a
multi-bandwidth RBF kernel, and how uncertain or rich it is there. Both are noised where a unit is protected.

    μᵢ = mean_x φ(h(x));           m = Σᵢ μᵢ / n,  or μ of the target                 released as one sum
    ℓᵢ = ℓ + 2 λ ⟨φ(h(x)), cᵢ⟩     cᵢ = μᵢ − m₋ᵢ, held fixed for a round               ≈ λ ‖μᵢ − m₋ᵢ‖², the MMD²
    wᵢ = nᵢᵇ exp(γ φᵢ), in (0, 1]  and  w_{t+1} = w_t + Σᵢ wᵢ Δᵢ / Σᵢ wᵢ               two released sums
    m_c, n_c of each topic c: its features' mean and its texts, of which the topic head can be made     one more
    c_v, e_v of each token v: how often it is there and is expected, of which its logit's bias can be   one more

m₋ᵢ, the mean of the others, needs no message of its own: μᵢ − m₋ᵢ = n/(n − 1) · (μᵢ − m). The pull is a sum over
examples, so per-example clipping stays valid. λ = 0 and γ = 0, b = 1 is FedAvg.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from ..attention import Attention, ceiling, distance, richness
from ..discriminant import Discriminant
from ..kernels import FourierMap
from ..lm.bench import Bench
from ..lm.statistics import covariance, mistakes, moments, token_rows, topic_rows, uncertainty
from ..lm.terms import MeanPull, Pull, embedding
from ..marginals import Marginals
from ..silo.shard import Silo
from ..silo.survey import COUNT, Statistic, Surveyed, survey
from ..silo.train import LocalPlan, train
from ..tree import as_part, part
from ..types import Key, Params, Task, Tree, Update
from .base import Averaging, Shapes, delta

OWN = "alignment"
"""Of a silo's memory: what its surveys released, and what follows from that."""
Phi = Literal["none", "entropy", "rank", "error", "distance"]


@dataclass(frozen=True)
class Alignment(Averaging):
    """Local steps on a goal with a pull towards the others' mean embedding; silos weigh by domain attention.

    `weight`: λ ≥ 0. `maps`: layer → φ of its features, fixed and public. `every`: rounds between surveys, ≥ 1. `silos`:
    n of a round. `target`: the silo that others move to; "" for each other. `attention`: w of n and φ; `phi`: what φᵢ
    is; `cap`: of one silo's share, in (0, 1]. `momentum` in [0, 1): of a silo's own embedding from survey to survey.
    `schedule`: λ is "constant", grows over the first half ("ramp"), or follows the released shift ("shift"). `average`
    in [0, 1): of the running mean of released parameters that the last round hands out; 0 for the parameters
    themselves. `rate`: of units in a survey; `rows`: of a silo's text in an exact one. `moments`: (p, d') through which
    features go for "rank". `topics`: what makes the topic head of class means; None where there is none, or it learns.
    `again`: the same of the model with other parameters; None where what the model begins with has to do. `tokens`:
    what makes the bias of each token's logit; None where there is none. `scale`: of everything but the delta, beside
    which it is clipped where whole silos are protected.
    """

    local: LocalPlan
    maps: Mapping[int, FourierMap]
    rounds: int
    silos: int
    weight: float = 0.1
    every: int = 1
    target: str = ""
    attention: Attention = Attention(gamma=0.0, exponent=0.0)
    phi: Phi = "none"
    cap: float = 1.0
    momentum: float = 0.0
    schedule: Literal["constant", "ramp", "shift"] = "constant"
    average: float = 0.0
    rate: float = 1.0
    rows: int | None = None
    scale: float = 1.0
    moments: np.ndarray | None = field(default=None, repr=False)
    topics: Discriminant | None = None
    again: Callable[[Params], Discriminant] | None = field(default=None, repr=False, compare=False)
    tokens: Marginals | None = None

    def __post_init__(self) -> None:
        if not self.weight >= 0 or self.every < 1 or self.silos < 1 or not self.scale > 0 or not self.maps:
            raise ValueError(
                f"Expected weight={self.weight} >= 0, every={self.every} and silos={self.silos} >= 1,"
                f" scale={self.scale} > 0 and at least one map."
            )
        if not 0 <= self.momentum < 1 or not 0 <= self.average < 1:
            raise ValueError(f"Expected momentum={self.momentum} and average={self.average} in [0, 1).")
        if not 0 < self.cap <= 1 or not 0 < self.rate <= 1:
            raise ValueError(f"Expected cap={self.cap} and rate={self.rate} in (0, 1].")
        if (self.phi == "rank") != (self.moments is not None):
            raise ValueError(f"Expected moments with phi='rank' alone, got phi={self.phi!r}.")

    # ---- at the silos ----

    def train(
        self, bench: Bench, task: Task, silos: Sequence[Silo], memories: Sequence[Tree]
    ) -> list[tuple[Update, Tree]]:
        kept = [self._surveyed(bench, task, silo, memory) for silo, memory in zip(silos, memories, strict=True)]
        others = [{key: x for key, x in memory.items() if key[0] != OWN} for memory in memories]
        goals = [self.local.goal.plus(*self._pull(task, silo, own)) for silo, own in zip(silos, kept, strict=True)]
        results = train(bench, task, silos, self.local, others, goals=goals, still=self._made)
        kept = [{**own, "weight": self._weight(task, silo, own)} for silo, own in zip(silos, kept, strict=True)]
        return [
            (self._update(task, silo, delta(task, silo, r), own), {**r.memory, **as_part(OWN, own)})
            for silo, r, own in zip(silos, results, kept, strict=True)
        ]

    def _surveyed(self, bench: Bench, task: Task, silo: Silo, memory: Tree) -> Params:
        """What the silo keeps of its surveys, this round's included."""
        own = part(memory, OWN)
        if task.round % self.every:
            return own
        found = survey(bench, task, silo, self.local, self.statistics(bench, task), limit=self.rows)
        if found.sums[COUNT][0] < 1:
            return own
        past = self.momentum if "embedding" in own else 0.0
        mean, variance = found.mean("embedding"), np.array([found.std("embedding") ** 2])
        before = own if past else {"embedding": mean, "variance": variance}
        return {
            **own,
            **{name: found.mean(name) for name in self._tables},
            **({} if self.tokens is None else {"tokens noise": np.array([found.std("tokens") ** 2])}),
            "embedding": past * before["embedding"] + (1 - past) * mean,
            "variance": past**2 * before["variance"] + (1 - past) ** 2 * variance,
            "phi": np.array([self._phi(found)]),
            "examples": np.array([found.units / self.rate]),
            "round": np.array([task.round]),
        }

    def statistics(self, bench: Bench, task: Task) -> dict[str, Statistic]:
        """What a survey asks of each row."""
        out: dict[str, Statistic] = {"embedding": lambda seen: embedding(seen, self.maps)}
        if self.phi == "entropy":
            out["phi"] = lambda seen: uncertainty(seen, len(bench.base.tokenizer))
        if self.phi == "error":
            out["phi"] = mistakes
        if self.moments is not None:
            through = self.moments
            out["phi"] = lambda seen: moments(seen, through)
        if self.topics is not None:
            of = self._topics(task.params) if task.round else self.topics
            out["topics"] = lambda seen: topic_rows(seen, of)
        if self.tokens is not None:
            words = self.tokens
            out["tokens"] = lambda seen: token_rows(seen, words)
        return out

    def _phi(self, found: Surveyed) -> float:
        """φᵢ in [0, 1], of what was released."""
        if self.phi in ("none", "distance"):
            return 0.0
        if self.moments is not None:
            return richness(covariance(found.mean("phi"), self.moments.shape[1]))
        return float(np.clip(found.mean("phi")[0], 0.0, 1.0))

    def _pull(self, task: Task, silo: Silo, own: Params) -> list[Pull | MeanPull]:
        """The pull of this round on this silo; none before the first release."""
        weight, away = self._strength(task), self._away(task, silo, own)
        if weight == 0 or away is None:
            return []
        if self.local.privacy is None:
            return [MeanPull(weight, self.maps, own["embedding"] - away)]
        return [Pull(weight, self.maps, away)]

    def _away(self, task: Task, silo: Silo, own: Params) -> np.ndarray | None:
        """cᵢ: from where the silo should be to where it is, (D,)."""
        aims = task.extra.get(("target", "mean")), task.extra.get(("embedding", "mean"))
        aim = aims[0] if self.target not in ("", silo.name) else aims[1]
        if aim is None or "embedding" not in own or self.silos == 1:
            return None
        among = self.silos / (self.silos - 1) if aim is aims[1] else 1.0
        return among * (own["embedding"] - aim)

    def _strength(self, task: Task) -> float:
        """λ of a round."""
        if self.schedule == "ramp":
            return self.weight * min(1.0, 2 * task.round / self.rounds)
        if self.schedule == "shift":
            now, first = (task.extra.get((OWN, name), np.ones(1))[0] for name in ("shift", "first shift"))
            return self.weight * float(np.clip(now / first, 0.0, 1.0)) if first > 0 else 0.0
        return self.weight

    def _weight(self, task: Task, silo: Silo, own: Params) -> np.ndarray:
        """wᵢ, (1,). Where units inside silos are protected, of what the silo's surveys released alone."""
        released = self.local.privacy is not None
        examples = float(own["examples"][0] if "examples" in own else 1.0) if released else silo.examples
        phi = float(own["phi"][0]) if "phi" in own else 0.0
        if self.phi == "distance":
            away = self._away(task, silo, own)
            phi = 0.0 if away is None else distance(away, np.zeros_like(away))
        w, before = self.attention.weight(examples, phi), task.extra.get(("attention", "mean"))
        if before is None or self.cap == 1:
            return np.array([w])
        others = self.silos * float(before[0]) - float(own["weight"][0] if "weight" in own else 0.0)
        return np.array([min(w, ceiling(self.cap, max(others, (self.silos - 1) * self.attention.least())))])

    def _update(self, task: Task, silo: Silo, update: Update, own: Params) -> Update:
        """The update as its parts of the sums."""
        w = own["weight"]
        sent = {key: x for key, x in update.tensors.items() if key[0] != "delta" or key[1] not in self._made}
        tensors = {key: x * w.astype(x.dtype) if key[0] == "delta" else x for key, x in sent.items()}
        beside: dict[Key, np.ndarray] = {("attention", "weight"): w, ("attention", "square"): w * w}
        if task.round % self.every == 0:
            beside |= self._embedded(task, silo, own)
        return Update(tensors | {key: self.scale * x for key, x in beside.items()}, update.weight, update.silo)

    def _embedded(self, task: Task, silo: Silo, own: Params) -> dict[Key, np.ndarray]:
        """The mean embedding, and what lets the server tell the silos' shift from the noise; zeros of a silo that
        found nobody in its survey.
        """
        there = np.ones(1) if "round" in own and own["round"][0] == task.round else np.zeros(1)
        mean = own["embedding"] if there[0] else np.zeros(self._width)
        noise = own["variance"] * self._width if there[0] else there
        parts: dict[Key, np.ndarray] = {
            ("embedding", "mean"): mean, ("embedding", "count"): there, ("embedding", "noise"): noise,
            ("embedding", "square"): np.array([mean @ mean]),
        }  # fmt: skip
        for name, size in self._tables.items():
            parts[name, "mean"] = own[name] if there[0] else np.zeros(size)
        if self.tokens is not None:
            parts["tokens", "noise"] = own["tokens noise"] if there[0] else there
        if not self.target:
            return parts
        mine = float(silo.name == self.target)
        return parts | {("target", "mean"): mine * mean, ("target", "count"): mine * there}

    @property
    def _tables(self) -> dict[str, int]:
        """What surveys find for parameters to be made of, and how many numbers it is."""
        found = {"topics": self.topics, "tokens": self.tokens}
        return {name: of.size for name, of in found.items() if of is not None}

    @cached_property
    def _made(self) -> frozenset[str]:
        """The parameters that are made of what surveys find, and so have no delta."""
        return frozenset(self._still())

    def _still(self) -> Params:
        """No step of them."""
        return {name: x for of in (self.topics, self.tokens) if of is not None for name, x in of.still.items()}

    @property
    def _width(self) -> int:
        """D, of an embedding over all layers."""
        return sum(fourier.features for fourier in self.maps.values())

    # ---- at the server ----

    def parts(self, shapes: Shapes) -> Mapping[Key, tuple[int, ...]]:
        wide = (self._width,)
        single = [("attention", name) for name in ("weight", "square")]
        single += [("embedding", name) for name in ("count", "noise", "square")]
        learned = {name: shape for name, shape in shapes.items() if name not in self._made}
        out = {**super().parts(learned), ("embedding", "mean"): wide, **dict.fromkeys(single, (1,))}
        out |= {(name, "mean"): (size,) for name, size in self._tables.items()}
        if self.tokens is not None:
            out["tokens", "noise"] = (1,)
        return {**out, ("target", "mean"): wide, ("target", "count"): (1,)} if self.target else out

    def direction(self, mean: Tree) -> Params:
        """Σ wᵢ Δᵢ / Σ wᵢ. Where the sum of weights was noised it counts as no less than it can be."""
        weight = max(float(mean["attention", "weight"][0]) / self.scale, self.attention.least())
        return {name: x / weight for name, x in part(mean, "delta").items()} | self._still()

    def finish(self, extra: Tree, mean: Tree) -> Tree:
        w, square = (float(mean["attention", name][0]) / self.scale for name in ("weight", "square"))
        out = dict(extra) | {("attention", "mean"): np.array([w])}
        if square > 0:
            out["report", "effective silos"] = np.array([min(self.silos, self.silos * w * w / square)])
        if float(mean.get(("embedding", "count"), np.zeros(1))[0]) > self.scale / (2 * self.silos):
            out |= self._released(out, {name: x for name, x in part(mean, "embedding").items()})
            out |= {key: x for key, x in mean.items() if key[0] in self._tables}
        if float(mean.get(("target", "count"), np.zeros(1))[0]) > self.scale / (4 * self.silos):
            out["target", "mean"] = mean["target", "mean"] / mean["target", "count"]
        return out

    def _released(self, extra: Tree, sums: Params) -> dict[Key, np.ndarray]:
        """The mean embedding and the shift: the mean MMD² of two silos, without what the noise adds to it."""
        mean, square, noise = (sums[name] / sums["count"] for name in ("mean", "square", "noise"))
        within = float(square[0] - noise[0]) - float(mean @ mean - noise[0] / self.silos)
        shift = np.array([2 * self.silos / max(1, self.silos - 1) * within])
        first = extra.get((OWN, "first shift"), shift)
        return {
            ("embedding", "mean"): mean,
            (OWN, "shift"): shift,
            (OWN, "first shift"): first,
            ("report", "shift"): shift,
        }

    def refine(self, params: Params, extra: Tree) -> tuple[Params, Tree]:
        """With `average`, the last round hands out a running mean of all rounds' parameters (Polyak & Juditsky 1992). A
        bias of tokens and a head of class means are those of the last survey, the head as of the model after it; and
        once more after the last round.
        """
        done = int(extra.get((OWN, "rounds"), np.zeros(1))[0]) + 1
        extra = dict(extra) | {(OWN, "rounds"): np.array([done])}
        params, extra = self._averaged(params, extra, done)
        if self.topics is not None:
            params, extra = self._headed(params, extra, self.topics, last=done == self.rounds)
        if self.tokens is not None and ("tokens", "mean") in extra:
            std = float(np.sqrt(max(0.0, float(extra["tokens", "noise"][0])) / self.silos))
            params = params | self.tokens.moved(params, extra["tokens", "mean"], std)
        return params, {key: x for key, x in extra.items() if key[0] not in self._tables}

    def _headed(self, params: Params, extra: Tree, topics: Discriminant, last: bool) -> tuple[Params, Tree]:
        """Class means wait from survey to survey, in the shape of the head's weight."""
        key = "centres", topics.names["0.weight"]
        released = extra.get(("topics", "mean"))
        found = None if released is None else topics.centres(released)
        centres = extra.get(key) if found is None else found
        if centres is None:
            return params, extra
        if found is not None or last:
            params = params | self._topics(params).head(centres)
        return params, dict(extra) | {key: centres}

    def _topics(self, params: Params) -> Discriminant:
        """What makes the head, of the model with these parameters."""
        assert self.topics is not None
        return self.topics if self.again is None else self.again(params)

    def _averaged(self, params: Params, extra: Tree, done: int) -> tuple[Params, Tree]:
        if not self.average:
            return params, extra
        keep = (self.average - self.average**done) / (1 - self.average**done)  # 0 at first: no start to forget
        past = part(extra, "average") or params
        mean = {name: keep * past[name] + (1 - keep) * x for name, x in params.items() if name not in self._made}
        kept = dict(extra) | as_part("average", mean)
        return ({**params, **mean} if done == self.rounds else params), kept


def survey_parts(phi: Phi, topics: bool = False, tokens: bool = False) -> tuple[tuple[str, float], ...]:
    """What a survey releases, and each part's share of its budget: half of it for counts of `tokens`, and half of what
    there is else for the means of `topics`.
    """
    found = {"embedding": 0.8, "count": 0.2}
    if phi not in ("none", "distance"):
        found = {"embedding": 0.7, "count": 0.15, "phi": 0.15}
    if topics:
        found = {name: share / 2 for name, share in found.items()} | {"topics": 0.5}
    if tokens:
        found = {name: share / 2 for name, share in found.items()} | {"tokens": 0.5}
    return tuple(found.items())


def survey_rounds(rounds: int, every: int) -> tuple[int, ...]:
    """The rounds, from 0, in which silos survey their text."""
    return tuple(range(0, rounds, every))
