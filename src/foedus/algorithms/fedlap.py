"""FedLAP-DP (Wang, Chen, Kerkouche, Fritz 2024, arXiv 2302.01068): a silo sends no difference of parameters but a few
synthetic examples whose loss is like its own near w_t; the server descends on their sum, within a trust region.

silo i:   w ← w_t;  for each query:  g ← DP gradient at w                       the only look at the silo's text
                                     for boost:  Sᵢ ← Sᵢ − rate · ∇_S D(g, ∇_w ℓ(w; Sᵢ))
                    after `queries`:  w ← w − η ∇ℓ(w; Sᵢ), `inner` times          again from w_t after `visits`, or
                                                                                where ‖w − w_t‖ reaches r
server:   w ← w_t;  for each pass:   w ← w − η Σᵢ (nᵢ / n) ∇ℓ(w; Sᵢ)              never beyond ‖w − w_t‖ = r

Sᵢ is made of what private steps released and of a public seed, so all that follows is post-processing. The paper has
images with fixed labels. Here Sᵢ is soft text: L embeddings, and after each a distribution over the first V' tokens;
its topics, where the goal has some, are the classes in turn. η is [local] lr, in every round.

The server needs the union of the Sᵢ, and gets it as a sum: each silo fills a slot of its own and leaves the others
zero. So it works behind masks, at N times the bytes; but a slot has one owner, so masks hide nothing of Sᵢ. What
protects the text is the noise in g.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import GuaranteeError
from ..lm.bench import Bench
from ..lm.matching import Matcher, SoftText, Synthetic, descend
from ..lm.terms import Topic
from ..seeds import derive, generator
from ..silo.private import PrivateGradients, collate
from ..silo.shard import Silo
from ..silo.train import LocalPlan
from ..tree import as_part, minus, norm, part
from ..types import Key, Params, Task, Tree, Update
from .base import Averaging, Shapes

INPUTS, TARGETS, SHARE = "synthetic inputs", "synthetic targets", "synthetic share"
OWN = "synthetic"
"""Of a silo's memory."""
UNPROTECTED = 0.1
"""β of ‖g − g̃‖² where no noise is in g, as in the paper's code; beside noise lengths say nothing."""


@dataclass(frozen=True)
class FedLap(Averaging):
    """`bench`: the coordinator's base and parameters. `silos`: all that may ever take part, in the order of slots.

    `examples` s, `length` L and `vocabulary` V' of a silo's soft text. `radius`: r > 0, of the trust region, fixed, in
    update units. `queries`: at one place w; `visits`: places before the walk starts again; `boost`: matching steps to
    a query, of Adam with `rate`; `inner`: steps to the next place; `passes`: of the server, at most.
    """

    local: LocalPlan
    bench: Bench
    silos: tuple[str, ...]
    examples: int = 16
    length: int = 16
    vocabulary: int = 256
    radius: float = 1.5
    queries: int = 10
    visits: int = 5
    boost: int = 5
    inner: int = 2
    passes: int = 20
    rate: float = 0.1

    def __post_init__(self) -> None:
        for name in ("examples", "length", "vocabulary", "queries", "visits", "boost", "inner", "passes"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected {name}={getattr(self, name)} >= 1.")
        if not self.radius > 0 or not self.rate > 0:
            raise ValueError(f"Expected radius={self.radius} > 0 and rate={self.rate} > 0.")
        if self.local.privacy is not None and self.local.privacy.lr is not None:
            raise GuaranteeError(
                "steps with noise of their own, for synthetic examples to be made of",
                "exact ones, whose noise is added to the update in shares",
                'Set placement = "silo" in [privacy].',
            )

    # ---- at the silos ----

    def train(
        self, bench: Bench, task: Task, silos: Sequence[Silo], memories: Sequence[Tree]
    ) -> list[tuple[Update, Tree]]:
        return [self._one(bench, task, silo, memory) for silo, memory in zip(silos, memories, strict=True)]

    def _one(self, bench: Bench, task: Task, silo: Silo, memory: Tree) -> tuple[Update, Tree]:
        loss, queries = self._loss(bench), _Queries(bench, task, silo, self.local, memory)
        euclidean = UNPROTECTED if self.local.privacy is None else 0.0
        matcher = Matcher(loss, self._kept(bench, task, silo, memory), bench.device, self.rate, euclidean)
        w, visited = task.params, 1
        for step in range(self.local.steps_of(silo)):
            matcher.match(w, queries.gradient(w, step), self.boost)
            if (step + 1) % self.queries:
                continue
            w, out = descend(
                loss, w, [(1.0, matcher.synthetic)], lr=self.local.lr, steps=self.inner, origin=task.params,
                radius=self.radius, device=bench.device,
            )  # fmt: skip
            w, visited = (task.params, 1) if out or visited == self.visits else (w, visited + 1)
        found = matcher.synthetic
        kept = as_part(OWN, {"inputs": found.inputs, "targets": found.targets})
        metric = {"loss": np.array([queries.loss]), "targets": np.array([float(queries.targets)])}
        return Update(self._slots(silo, found) | as_part("metric", metric), silo.examples), {**queries.memory(), **kept}

    def _kept(self, bench: Bench, task: Task, silo: Silo, memory: Tree) -> Synthetic:
        """The examples of the silo's last round; at first noise."""
        own = part(memory, OWN)
        if own:
            return Synthetic(own["inputs"], own["targets"])
        random = generator(task.seed, "synthetic", silo.name)
        shapes = SoftText(bench).shape(self.examples, self.length, self.vocabulary)
        return Synthetic(*(random.standard_normal(shape, np.float32) for shape in shapes))

    def _slots(self, silo: Silo, found: Synthetic) -> dict[Key, np.ndarray]:
        """The silo's own slot filled, those of all others zero."""
        if silo.name not in self.silos:
            raise ValueError(f"Expected a silo of {', '.join(self.silos)}; got {silo.name}.")
        whole = {INPUTS: found.inputs, TARGETS: found.targets, SHARE: np.ones(1, np.float32)}
        return {
            (name, slot): x if slot == silo.name else np.zeros_like(x)
            for slot in self.silos
            for name, x in whole.items()
        }

    def _loss(self, bench: Bench) -> SoftText:
        weights = [term.weight for term in self.local.goal.terms if isinstance(term, Topic)]
        return SoftText(bench, sum(weights))

    # ---- at the server ----

    def parts(self, shapes: Shapes) -> dict[Key, tuple[int, ...]]:
        inputs, targets = SoftText(self.bench).shape(self.examples, self.length, self.vocabulary)
        whole: dict[str, tuple[int, ...]] = {INPUTS: inputs, TARGETS: targets, SHARE: (1,)}
        return {(name, slot): shape for slot in self.silos for name, shape in whole.items()}

    def direction(self, mean: Tree) -> Params:
        """None: the server moves in `refine`."""
        return {name: np.zeros_like(x) for name, x in self.bench.start().items()}

    def finish(self, extra: Tree, mean: Tree) -> Tree:
        """The union: each slot of the mean over its silo's share, which may be of equals or by examples."""
        shares = {slot: x for slot, x in part(mean, SHARE).items() if x[0] > 0}
        union = {(name, slot): mean[name, slot] / shares[slot] for slot in shares for name in (INPUTS, TARGETS)}
        return {**extra, **union, **as_part(SHARE, shares)}

    def refine(self, params: Params, extra: Tree) -> tuple[Params, Tree]:
        """w after the passes over the union, which is then left behind: no silo needs it."""
        shares = part(extra, SHARE)
        union = [
            (float(share[0]), Synthetic(extra[INPUTS, slot], extra[TARGETS, slot])) for slot, share in shares.items()
        ]
        w, _ = descend(
            self._loss(self.bench), params, union, lr=self.local.lr, steps=self.passes, origin=params,
            radius=self.radius, device=self.bench.device,
        )  # fmt: skip
        left = {key: x for key, x in extra.items() if key[0] not in (INPUTS, TARGETS, SHARE)}
        return w, {**left, ("report", "moved"): np.array([norm(minus(w, params))])}


class _Queries:
    """The gradients of one round at one silo: private steps where units are protected, else of plain batches.

    All that ever sees the silo's text. `loss` and `targets`: sums of cross-entropy in nats, and counts, for metrics.
    """

    def __init__(self, bench: Bench, task: Task, silo: Silo, plan: LocalPlan, memory: Tree) -> None:
        self.bench, self.task, self.silo, self.plan = bench, task, silo, plan
        self.loss, self.targets = 0.0, 0
        self._private = PrivateGradients(bench, task, [silo], plan, [memory]) if plan.privacy else None

    def gradient(self, params: Params, step: int) -> Params:
        """At `params`, in one step."""
        leaves = self.bench.leaves([params])
        if self._private is not None:
            (found,), losses, targets = self._private.released(leaves, step)
        else:
            found, losses, targets = self._plain(leaves, step)
        self.loss, self.targets = self.loss + float(losses[0]), self.targets + int(targets[0])
        return found

    def memory(self) -> Tree:
        """What the silo keeps of its private steps."""
        return self._private.memory(0) if self._private is not None else {}

    def _plain(self, leaves, step: int):
        plan, task, silo = self.plan, self.task, self.silo
        rows = silo.rows(task.seed, task.round, step, plan.batch, plan.steps, plan.epochs)
        batch = collate(self.bench, silo, rows, derive(task.seed, "collate", silo.name, task.round, step))
        totals, losses, targets = self.bench.totals(leaves, [batch], [plan.goal])
        totals.sum().backward()
        grads = {name: np.zeros(x.shape[1:], np.float32) if x.grad is None else x.grad[0].cpu().numpy()
                 for name, x in leaves.items()}  # fmt: skip
        return grads, losses, targets
