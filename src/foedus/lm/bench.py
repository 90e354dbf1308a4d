"""The work bench: one frozen base model, and the trainable parameters of K silos at once. K = 1 is the ordinary case.

A `Bench` never changes its model: parameters go in with every call, so a hundred silos share one base. What it
computes is a sum of cross-entropies and the number of targets behind it, never a mean, so that batches and silos can
be added; or the value of a goal, cross-entropy and terms (`terms.py`).

Two ways through the model give the same numbers within rounding: `fast.py`, for models of the Llama kind with LoRA,
and the model's own code with `stacked.py` under its parameters, for everything else. Both end in `head.py` where the
head is frozen. `clipped` gives sums of clipped gradients of single units instead, again by either way (`fast.py`, or
`per_example.py`). Terms go the first way where they need only the last layer (`shallow.py`), else the second, silo by
silo. A bench is for one thread at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ..errors import ModelError, one_of
from . import fast, head, heads, per_example
from .clipping import ClippedSums, Clipping
from .shallow import Shallow
from .stacked import NoRule, halve, stack
from .terms import PLAIN, UNSEEN, Goal, Pass, Seen, kind, name_of, shares

if TYPE_CHECKING:
    from .load import Base
    from .objectives import Objective

Batch = Mapping[str, Tensor]
Leaves = Mapping[str, Tensor]

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
MOST_TOKENS = 4096
MOST_TRAINED = 1 << 26
CALL_COST = 2_400_000_000
"""A layer's fixed cost, in products of a weight and a token that take as long; see `preferred_cohort`."""
TOLERANCES = {"fp32": 1e-3, "bf16": 0.05}
"""How far a gradient may be from what it should be, as a share of its norm, in `Bench.prove`."""
ROUNDED = {"fp32": 1.0, "bf16": 0.99}
"""To which share of a norm units are clipped. In bf16 what the other units add differs in its last bits where one comes
or goes; what that was seen to move (0.35 % of a norm, docs/sharp-edges.md) has room in the rest, three times over."""
IGNORED = -100
"""The label of a position that is no target, as in transformers."""


class Bench:
    """Losses and scores of one frozen base under given trainable parameters.

    `precision`: "fp32", "bf16", or "auto": bf16 where the processor multiplies it in hardware, else fp32. In bf16 the
    products with frozen matrices and LoRA's run in bf16; parameters, norms, softmax and losses stay float32. The
    model's parameters with `requires_grad` are the trainable ones, so build the bench after `attach`. LoRA's dropout,
    where there is some, draws from torch's global generator in `losses`.
    """

    def __init__(self, base: Base, objective: Objective, *, precision: str = "auto") -> None:
        self.base, self.objective = base, objective
        self.model: Any = base.model
        self.device = next(self.model.parameters()).device
        self.precision = _resolve(precision, self.device)
        self._core: Any = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        self._trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._heads = heads.names(self.model)
        self._bias_name = self._heads.get(heads.BIAS, {}).get("bias", "")
        self._dropouts = [m for name, m in self.model.named_modules() if "lora_dropout" in name and _drops(m)]
        accepted = inspect.signature(self._core.forward).parameters
        self._arguments = {"use_cache": False} if "use_cache" in accepted else {}
        self._head: tuple[Tensor, Tensor | None] | None = None
        self._halves: dict[str, Tensor] = {}
        self._prepared = False
        self._choices, self._proven = per_example.Choices(), set[Any]()
        self._fast = self._find_fast()
        if self._fast is None:
            self._prepare()
            if not self._halves and self._head is None:
                self.precision = "fp32"  # every matrix is trained: none is left to hold in bf16

    @cached_property
    def stacks(self) -> bool:
        """Whether `losses` takes several silos as one batch: every trainable parameter has a rule, nothing is random,
        and no silo has a bias of tokens to itself."""
        return not self._dropouts and not self._bias_name and (self._fast is not None or self._has_rules())

    def start(self) -> dict[str, np.ndarray]:
        """The model's own values of the trainable parameters: float32 copies, in the order of `named_parameters()`."""
        return {name: p.detach().float().cpu().numpy().copy() for name, p in self._trainable.items()}

    def leaves(self, params: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Tensor]:
        """K silos' parameters as (K, *shape) float32 leaves that require gradients."""
        stacked = {name: np.stack([np.asarray(p[name], np.float32) for p in params]) for name in self._trainable}
        return {name: torch.from_numpy(x).to(self.device).requires_grad_() for name, x in stacked.items()}

    def losses(self, leaves: Leaves, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        """(K,) sums of cross-entropy in nats, differentiable (once) in `leaves`, and (K,) numbers of targets (int64).

        Batch k belongs to row k of every leaf. Batches may differ in rows and in length. Where `stacks` is false the
        silos go one by one, with the same result.
        """
        with self._training():
            if len(batches) == 1 or self.stacks:
                return self._together(leaves, batches)
            alone = [self._together(_silo(leaves, k), [batch]) for k, batch in enumerate(batches)]
        sums, counts = zip(*alone, strict=True)
        return torch.cat(sums), torch.cat(counts)

    def totals(self, leaves: Leaves, batches: Sequence[Batch], goals: Sequence[Goal]) -> tuple[Tensor, Tensor, Tensor]:
        """(K,) values of the silos' goals, each silo's batch being one unit, differentiable (once) in `leaves`; and, as
        from `losses`, the sums and counts behind their cross-entropy: both 0 for a goal without it.
        """
        if all(goal.plain for goal in goals):
            sums, counts = self.losses(leaves, batches)
            return sums / counts.clamp(min=1), sums.detach(), counts
        if self._goes_fast(goals):
            return self._fast_totals(leaves, batches, goals)
        with self._training():
            silos = [_silo(leaves, k) for k in range(len(batches))]
            alone = [self._total(*each) for each in zip(silos, map(self._here, batches), goals, strict=True)]
        totals, sums, counts = zip(*alone, strict=True)
        return torch.stack(totals), torch.stack(sums), torch.stack(counts)

    def see(self, params: Mapping[str, np.ndarray], batch: Batch) -> Seen:
        """A batch as terms see it, under one silo's parameters, without gradients or dropout."""
        leaves = {name: x.detach() for name, x in self.leaves([params]).items()}
        return self._seen(leaves, self._here(batch))

    def clipped(
        self,
        leaves: Leaves,
        batches: Sequence[Batch],
        units: Sequence[Tensor],
        clippings: Sequence[Clipping],
        goals: Sequence[Goal] | None = None,
    ) -> ClippedSums:
        """Sums over units of their clipped gradients, for K silos, from one forward and one backward pass each.

        `leaves` and `batches`: as for `losses`. `units`: for each silo (rows,) int64, whose row it is: 0 … n − 1
        ascending, a unit's rows adjacent; −1 for a row of nobody, which has no targets. A unit's gradient is that of
        its silo's goal, by default the mean cross-entropy of its own targets, and zero without any. LoRA's dropout is
        on, as in `losses`. In bf16 it is clipped to a little less than its norm (`ROUNDED`).

        Before the first sum, `prove` tries on a few tokens whether units are told apart; it raises where not.
        """
        units = [x.to(self.device) for x in units]
        clippings = [clipping.within(ROUNDED[self.precision]) for clipping in clippings]
        goals = goals or [PLAIN] * len(batches)
        if self._goes_fast(goals) and not all(goal.plain for goal in goals):
            for goal in goals:
                self.prove(goal)
            return self._fast_clipped(leaves, batches, units, clippings, goals)
        if self._goes_fast(goals):
            tokens = self._tokens(self._here(self._merged(batches)), len(batches), leaves)
            if tokens is not None:
                self._prove(fast=True)
                return self._with_heads(self._fast.clipped(leaves, tokens, units, clippings))
        for batch, owners, goal in zip(batches, units, goals, strict=True):
            if bool((batch["labels"] != IGNORED).any()) or (goal.active and bool((owners >= 0).any())):
                self.prove(goal, fast=False)
        with self._training():
            parts = zip(batches, units, clippings, goals, strict=True)
            return _joined([self._clipped(_silo(leaves, k), *part) for k, part in enumerate(parts)])

    def prove(self, goal: Goal = PLAIN, *, fast: bool | None = None) -> None:
        """Try on a few tokens, once, that a unit's gradient is its own, whoever else is in the batch.

        Two units, one of them with two rows, go together as in `clipped`, and apart as in `losses`, without dropout:
        with the cross-entropy, and with each term of `goal`. Raises `ModelError` for a trainable parameter that has no
        rule, or no use in the cross-entropy, and `GuaranteeError` for one where the two differ; each by name, and so
        the term. `fast`: whether through `fast.py`; None: where that is how `clipped` goes.
        """
        fast = self._goes_fast([goal]) if fast is None else fast
        if goal.tokens:
            self._prove(fast=fast)
        for term in goal.active:
            self._prove(fast=fast, goal=Goal(0.0, (term,)))

    @torch.no_grad()
    def scores(self, params: Mapping[str, np.ndarray], batch: Batch) -> dict[str, np.ndarray]:
        """Per row of `batch`: "nll" (float64, nats), "targets" and "correct" (int64; targets that are the arg max)."""
        leaves = {name: x.detach() for name, x in self.leaves([params]).items()}
        batch = self._here(batch)
        nll, hits = self._predict(leaves, batch, 1, hits=True)
        return _per_row(self._owners(batch), len(batch["labels"]), nll, hits)

    def logs(self, states: Tensor) -> Tensor:
        """(p, C) float32 log-probabilities of what follows (p, d) last states, by the model's own output head."""
        self._prepare()
        if self._head is None:
            logits: Tensor = self._core.get_output_embeddings()(states)
        else:
            logits = F.linear(states.to(self._head[0].dtype), *self._head)
        return logits.float().log_softmax(-1)

    def _together(self, leaves: Leaves, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        """One pass for K silos."""
        silos = len(batches)
        batch = self._here(self._merged(batches))
        owners = self._owners(batch).div(len(batch["labels"]) // silos, rounding_mode="floor")
        counts = torch.bincount(owners, minlength=silos)
        if self._fast is not None and torch.is_grad_enabled():
            tokens = self._tokens(batch, silos, leaves)
            if tokens is not None:
                names = [name for name in self._trainable if not heads.is_head(name)]
                inputs = (leaves[name] for name in names)
                return fast.Losses.apply(self._fast, tokens, owners, names, *inputs), counts
        nll, _ = self._predict(leaves, batch, silos)
        return fast.sums(nll, owners, silos), counts

    def _predict(self, leaves: Leaves, batch: Batch, silos: int, *, hits: bool = False) -> tuple[Tensor, Any]:
        """Cross-entropy of each target, (p,) float32; with `hits`, also whether it is the arg max, (p,)."""
        if self._fast is not None and not torch.is_grad_enabled():
            tokens = self._tokens(batch, silos, leaves)
            if tokens is not None:
                outcome = self._fast.run(leaves, tokens, gradient=False, hits=hits)
                return outcome.nll, outcome.hits
        return self._judged(*self._said(leaves, batch, silos), self._bias(leaves), hits=hits)

    def _said(self, leaves: Leaves, batch: Batch, silos: int, **options: Any) -> tuple[Tensor, Tensor]:
        """What the model says at the targets, as what its frozen head is given or else as logits, and the targets."""
        if self._head is not None:
            states = self._states(leaves, batch, silos, **options)
        else:
            states = self._call(leaves, batch, silos, **options).logits
        return self._aligned(states, batch["labels"])

    def _judged(self, said: Tensor, targets: Tensor, bias: Tensor | None, *, hits: bool = False) -> tuple[Tensor, Any]:
        """As `_predict`, from what one silo's model said; `bias` as from `_bias`."""
        if self._head is None:
            nll = F.cross_entropy(said.float(), targets, reduction="none")
            return nll, said.argmax(-1) == targets if hits else None
        weight, bias = self._ends(bias)
        if hits:
            nll, _, hit = head.forward(said, weight, bias, targets, hits=True)
            return nll, hit
        return head.cross_entropy(said, weight, bias, targets), None

    def _logits(self, said: Tensor, bias: Tensor | None) -> Iterator[Tensor]:
        """Of all tokens, (≤ 128, C) float32 at a time."""
        for states in said.split(128):
            logits = states if self._head is None else F.linear(states.to(self._head[0].dtype), *self._ends(bias))
            yield logits.float()

    def _entropy(self, said: Tensor, bias: Tensor | None) -> Tensor:
        """(p,) entropies of the predictions, nats."""
        logs = (logits.log_softmax(-1) for logits in self._logits(said, bias))
        return torch.cat([-(x.exp() * x).sum(-1) for x in logs])

    def _chances(self, said: Tensor, bias: Tensor | None, tokens: int) -> Iterator[Tensor]:
        """Probabilities of the vocabulary's first K tokens, (≤ 128, K) at a time."""
        return (logits.softmax(-1)[:, :tokens] for logits in self._logits(said, bias))

    def _bias(self, leaves: Leaves) -> Tensor | None:
        """(K, C) of what each silo adds to each token's logit, or of what the model holds; None where it adds none."""
        if not self._bias_name:
            return None
        found = leaves.get(self._bias_name)
        return heads.head(self.model, heads.BIAS).bias.detach()[None] if found is None else found.detach()

    def _ends(self, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias of the output head, with what one silo adds to it."""
        assert self._head is not None
        weight, own = self._head
        if bias is None:
            return weight, own
        return weight, (bias[0] if own is None else bias[0] + own).to(weight.dtype)

    # ---- goals ----

    def _total(self, leaves: Leaves, batch: Batch, goal: Goal) -> tuple[Tensor, Tensor, Tensor]:
        """`totals` of one silo."""
        seen = self._seen(leaves, batch)
        units = torch.zeros(len(batch["labels"]), dtype=torch.long, device=self.device)
        total = goal.value(seen, units)
        losses = seen.losses.detach().sum() if goal.tokens else torch.zeros(1, device=self.device).sum()
        return total, losses, torch.tensor(len(seen.owners) if goal.tokens else 0, device=self.device)

    def _seen(self, leaves: Leaves, batch: Batch) -> Seen:
        """One silo's batch, under `leaves`, or where there are none, under what the model holds."""

        def apply(name: str, x: Tensor) -> Tensor:
            module = heads.head(self.model, name)
            params = {own: leaves[full][0] for own, full in self._heads[name].items() if full in leaves}
            return functional_call(module, params, (x,))

        return Seen(batch, self._owners(batch), partial(self._pass, leaves, batch), apply)

    def _pass(self, leaves: Leaves, batch: Batch, ids: Tensor) -> Pass:
        """One silo's batch with these input ids; of an encoder-decoder the hidden states are the encoder's."""
        self._prepare()
        core, found = self._core, []
        body = core.get_encoder() if core.config.is_encoder_decoder else core.base_model
        hook = body.register_forward_hook(lambda _, __, output: found.append(output))
        try:
            said, targets = self._said(leaves, {**batch, "input_ids": ids}, 1, output_hidden_states=True)
        finally:
            hook.remove()
        hidden = (*found[0].hidden_states[1:-1], found[0].last_hidden_state)
        bias = self._bias(leaves)
        return Pass(
            hidden, targets, lambda: self._judged(said, targets, bias)[0], lambda: self._entropy(said, bias),
            lambda tokens: self._chances(said, bias, tokens),
        )  # fmt: skip

    # ---- through the model's own code ----

    def _clipped(
        self, leaves: Leaves, batch: Batch, units: Tensor, clipping: Clipping, goal: Goal = PLAIN
    ) -> ClippedSums:
        """The sums of one silo."""
        batch = self._here(batch)
        owners = units[self._owners(batch)]
        if bool((owners < 0).any()):
            raise ValueError("Expected rows of nobody to have no targets.")
        losses = torch.zeros(1, device=self.device)
        if goal.active:
            self._prepare()

        def loss() -> Tensor:
            if goal.active:
                seen = self._seen({}, batch)
                total = goal.value(seen, units)
                nll = seen.losses if goal.tokens else losses
            else:
                nll, _ = self._predict({}, batch, 1)
                total = goal.tokens * (nll @ shares(owners))
            losses.add_(nll.detach().sum())
            return total

        params = {name: x[0] for name, x in leaves.items() if name != self._bias_name}
        given = {name: x[0].detach() for name, x in leaves.items() if name == self._bias_name}
        empty = bool((units < 0).all()) if goal.active else not (len(owners) and goal.tokens)
        uses = per_example.collect(
            self.model, params, units, None if empty else loss, choices=self._choices, frozen=self._halves | given
        )
        gradients, norms = uses.clipped(clipping)
        sums = {name: x[None] for name, x in gradients.items()}
        targets = len(owners) if goal.tokens else 0
        return self._with_heads(ClippedSums(sums, [norms], losses, torch.tensor([targets], device=self.device)))

    def _with_heads(self, found: ClippedSums) -> ClippedSums:
        """With the zeros of heads that nothing touched."""
        zeros = {
            name: torch.zeros(len(found.norms), *x.shape, device=self.device)
            for name, x in self._trainable.items()
            if heads.is_head(name) and name not in found.gradients
        }
        return replace(found, gradients={**found.gradients, **zeros})

    def _prove(self, *, fast: bool, goal: Goal = PLAIN) -> None:
        """One of the two ways through the model, with the cross-entropy or with one term."""
        term = goal.active[0] if goal.active else None
        known = fast, kind(term) if term else None
        if known in self._proven:
            return
        leaves, batch, units = self._trial()
        alone = [self._gradients(leaves, _rows(batch, units == u), fast, goal) for u in (0, 1)]

        def together(clipping: Clipping) -> ClippedSums:
            if self._fast is None or not fast:
                return self._clipped(leaves, batch, units, clipping, goal)
            if term is not None:
                return self._fast_clipped(leaves, [batch], [units], [clipping], [goal])
            return self._fast.clipped(leaves, self._tokens(batch, 1, leaves), [units], [clipping])

        self._choices.learned &= fast
        moved = per_example.compare(alone, together, TOLERANCES[self.precision], term=name_of(term) if term else "")
        self._choices.learned |= not fast
        if moved:
            self._proven.add(known)

    def _gradients(self, leaves: Leaves, batch: Batch, fast: bool, goal: Goal) -> dict[str, Tensor]:
        """By autograd: the gradient of the goal of all rows as one unit, by name; heads only where a term has them."""
        used = (name for name in leaves if goal.active or not heads.is_head(name))
        inputs = {name: leaves[name].detach().requires_grad_() for name in used}
        if goal.active:
            given = {**leaves, **inputs}
            total = self._fast_totals(given, [batch], [goal])[0] if fast else self._total(given, batch, goal)[0]
        else:
            given = {**leaves, **inputs}
            total = self._together(given, [batch])[0] if fast else self._predict(given, batch, 1)[0].sum()
            total = total / len(self._owners(batch))
        if total.requires_grad:
            total.backward()
        return {name: torch.zeros_like(x[0]) if x.grad is None else x.grad[0] for name, x in inputs.items()}

    def _trial(self) -> tuple[Leaves, Batch, Tensor]:
        """Parameters none of which is all zero, and three rows of five tokens, the last one shorter, of two units.

        Three and five, so that no two sizes agree by chance.
        """
        draw = np.random.default_rng(0)
        params = {
            n: x if x.any() else 0.02 * draw.standard_normal(x.shape, np.float32) for n, x in self.start().items()
        }
        batch = dict(self._probe(3, 5))
        end = batch["input_ids"][0, -1]
        words = np.setdiff1d(np.arange(min(200, len(self.base.tokenizer))), [int(end)])
        batch["input_ids"] = torch.from_numpy(draw.choice(words, (3, 5), replace=False)).to(self.device)
        batch["input_ids"][:2, -1] = batch["input_ids"][2, 3] = end
        batch["attention_mask"][2, 4] = 0
        if batch["labels"].dim() > 1:
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        batch["topics"] = torch.tensor([0, -1, 1], device=self.device)
        batch["rows"] = batch["draws"] = torch.arange(3, device=self.device)
        return self.leaves([params]), batch, torch.tensor([0, 1, 1], device=self.device)

    def _call(self, leaves: Leaves, batch: Batch, silos: int, **options: Any) -> Any:
        rows = len(batch["labels"]) // silos
        params = {name: x[0] if silos == 1 else stack(x, rows) for name, x in leaves.items()}
        return functional_call(self.model, params | self._halves, (), self._inputs(batch) | options)

    def _states(self, leaves: Leaves, batch: Batch, silos: int, **options: Any) -> Tensor:
        """What the output head is given, (b, t, d). The forward pass is left there."""
        hook = self._core.get_output_embeddings().register_forward_pre_hook(_stop)
        try:
            self._call(leaves, batch, silos, **options)
        except _Reached as reached:
            return reached.states
        finally:
            hook.remove()
        raise AssertionError("Expected the forward pass to reach its output head.")

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        inputs = {name: x for name, x in batch.items() if name not in UNSEEN} | self._arguments
        if self.objective.task == "seq2seq" and "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = self._core.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
        return inputs

    def _prepare(self) -> None:
        """Half-width copies of frozen matrices, and the frozen output head if the logits are what it says, as it says
        it: once, when first needed."""
        if self._prepared:
            return
        self._prepared = True
        output = self._output()
        if self.precision == "bf16":
            skip = {id(p) for p in self._trainable.values()} | {id(m.weight) for m in _embeddings(self.model)}
            self._halves = {
                name: halve(p) for name, p in _matrices(self.model) if id(p) not in skip and p is not output
            }
        if output is None:
            return
        dtype = PRECISIONS[self.precision]
        module = self._core.get_output_embeddings()
        self._head = module.weight.detach().to(dtype), None if module.bias is None else module.bias.detach().to(dtype)
        if not self._ends_in_head():
            self._head = None

    def _output(self) -> nn.Parameter | None:
        """The weight of the output head, if it is a plain frozen linear layer and the task is to predict tokens."""
        if self.objective.task == "sequence-classification":
            return None
        module = self._core.get_output_embeddings()
        frozen = type(module) is nn.Linear and not any(
            id(p) in map(id, self._trainable.values()) for p in module.parameters()
        )
        return module.weight if frozen else None

    @torch.no_grad()
    def _ends_in_head(self) -> bool:
        """Whether nothing follows the head, such as soft-capping: tried on a few tokens."""
        batch = self._probe(2, 4)
        leaves = {name: p.detach()[None] for name, p in self._trainable.items()}
        states = self._states(leaves, batch, 1)
        module = self._core.get_output_embeddings()
        return torch.allclose(self._call(leaves, batch, 1).logits, module(states), rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def _has_rules(self) -> bool:
        """Whether a few tokens of two silos pass: three rows of five tokens each, so that no two sizes agree by
        chance."""
        leaves = {name: torch.stack([p.detach(), p.detach()]) for name, p in self._trainable.items()}
        try:
            self._predict(leaves, self._probe(6, 5), 2)
        except NoRule:
            return False
        return True

    def _probe(self, rows: int, length: int) -> Batch:
        """A few rows of one word and the end token, without which BART's classifier refuses a row."""
        end = getattr(self.base.tokenizer, "eos_token_id", None) or 0
        ids = torch.full((rows, length), end + 1 if end < 5 else end - 1, device=self.device)
        ids[:, -1] = end
        classes = self.objective.task == "sequence-classification"
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.zeros(rows, dtype=torch.long, device=self.device) if classes else ids,
        }

    # ---- through fast.py ----

    def _find_fast(self) -> fast.Llama | None:
        if self.objective.task != "causal-lm" or self._dropouts:
            return None
        names = {p: name for name, p in self._trainable.items() if not heads.is_head(name)}
        return fast.Llama.of(self._core, PRECISIONS[self.precision], names)

    def _goes_fast(self, goals: Sequence[Goal]) -> bool:
        return self._fast is not None and all(goal.shallow for goal in goals)

    def _fast_totals(
        self, leaves: Leaves, batches: Sequence[Batch], goals: Sequence[Goal]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`totals` of shallow goals."""
        units = [torch.zeros(len(batch["labels"]), dtype=torch.long, device=self.device) for batch in batches]
        tokens, batches = self._all_tokens(leaves, batches, goals)
        owner = tokens.predicts.div(len(tokens.ids) // tokens.silos, rounding_mode="floor")
        counts = torch.bincount(owner, minlength=tokens.silos)
        scales = torch.tensor([goal.tokens for goal in goals], device=self.device) / counts.clamp(min=1)
        terms = self._shallow(leaves, batches, units, goals, tokens, scales)
        moved = {name: x for name, x in leaves.items() if name != self._bias_name}
        totals, sums = fast.Totals.apply(self._fast, tokens, owner, terms, list(moved), *moved.values())
        return totals, sums, counts

    def _fast_clipped(
        self, leaves: Leaves, batches: Sequence[Batch], units: Sequence[Tensor], clippings: Sequence[Clipping],
        goals: Sequence[Goal],
    ) -> ClippedSums:  # fmt: skip
        """`clipped` of shallow goals."""
        assert self._fast is not None
        tokens, batches = self._all_tokens(leaves, batches, goals)
        scales = torch.tensor([goal.tokens for goal in goals], device=self.device)
        terms = self._shallow(leaves, batches, units, goals, tokens, scales)
        return self._with_heads(self._fast.clipped(leaves, tokens, units, clippings, terms))

    def _shallow(
        self, leaves: Leaves, batches: Sequence[Batch], units: Sequence[Tensor], goals: Sequence[Goal],
        tokens: fast.Tokens, scales: Tensor,
    ) -> Shallow:  # fmt: skip
        own = {name: x.detach() for name, x in leaves.items() if heads.is_head(name) and name != self._bias_name}
        return Shallow(self.model, self._core.model.norm.weight, own, batches, units, goals, tokens, scales)

    def _all_tokens(
        self, leaves: Leaves, batches: Sequence[Batch], goals: Sequence[Goal]
    ) -> tuple[fast.Tokens, list[Batch]]:
        """The tokens of all rows, and the batches; a silo whose goal is without cross-entropy has no targets."""
        here = [self._here(batch) for batch in batches]
        silent = [
            batch if goal.tokens else {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}
            for batch, goal in zip(here, goals, strict=True)
        ]
        tokens = self._tokens(self._merged(silent), len(batches), leaves, every=True)
        if tokens is None:
            raise ModelError("batches padded on the right", "another padding", "Make them with `Objective.collate`.")
        return tokens, silent

    def _tokens(
        self, batch: Batch, silos: int, leaves: Leaves | None = None, *, every: bool = False
    ) -> fast.Tokens | None:
        """The tokens that targets depend on; rows without a target are left out, unless `every` row is asked for.
        `leaves`: of which silos' biases are; without, the model's own is.
        """
        bias = self._bias(leaves or {})
        ids, labels = batch["input_ids"], batch["labels"]
        positions = torch.arange(ids.numel(), device=self.device).view(*ids.shape, 1)
        where, targets = self.objective.align(positions, labels)
        mask = batch["attention_mask"]
        if every:
            return fast.lay_out(ids, mask, where[:, 0], targets, silos, bias)
        mask = mask * (labels[:, 1:] != IGNORED).any(1, keepdim=True)
        return fast.lay_out(ids, mask, where[:, 0], targets, silos, bias) if len(targets) else None

    # ---- batches ----

    def _merged(self, batches: Sequence[Batch]) -> Batch:
        """One batch in which silo k has the k-th block of rows, all blocks alike.

        Short rows are padded on the right; a silo with fewer rows gets its first one again, without targets.
        """
        if len(batches) == 1:
            return batches[0]
        rows = max(len(batch["labels"]) for batch in batches)
        padding = getattr(self.base.tokenizer, "pad_token_id", None) or 0
        fill = {"labels": IGNORED, "input_ids": padding, "decoder_input_ids": padding}
        filled = [_with_rows(batch, rows) for batch in batches]
        names = [name for name in batches[0] if name == "labels" or name not in UNSEEN]
        return {name: _cat([batch[name] for batch in filled], fill.get(name, 0)) for name in names}

    def _owners(self, batch: Batch) -> Tensor:
        """For each of the p targets, the row it is in; (p,), ascending."""
        labels = batch["labels"]
        rows = torch.arange(len(labels), device=labels.device).view(-1, *[1] * labels.dim())
        return self._aligned(rows.expand(*labels.shape, 1), labels)[0].squeeze(-1)

    def _aligned(self, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The objective's `align`, without the rows that only fill up a silo's block: a classifier has no such rows
        itself."""
        states, targets = self.objective.align(states, labels)
        real = targets != IGNORED
        return (states, targets) if bool(real.all()) else (states[real], targets[real])

    def _here(self, batch: Batch) -> Batch:
        return {name: x.to(self.device) for name, x in batch.items()}

    @contextmanager
    def without_dropout(self) -> Iterator[None]:
        """LoRA's dropout off: for checks, which compare batches in which it would fall differently."""
        kept, self._dropouts = self._dropouts, []
        try:
            yield
        finally:
            self._dropouts = kept

    @contextmanager
    def _training(self) -> Iterator[None]:
        """LoRA's dropout on, if there is any; the base's own stays off."""
        for module in self._dropouts:
            module.train()
        try:
            yield
        finally:
            for module in self._dropouts:
                module.eval()


def preferred_cohort(bench: Bench, rows: int, tokens: int, silos: int) -> int:
    """How many of `silos` to train at once, 1 … `silos`, when a silo's batch is `rows` rows of `tokens` positions.

    A pass costs a fixed time for each layer, whatever it computes, and a time for each token; stacking divides the
    first among the silos and leaves the second, until one batch falls out of the cache. Measured on two cores with
    AVX-512 bf16: processor time per silo fell 5-fold from 1 to 64 silos of 64 tokens with two layers of width 64, and
    was least at 4,096 tokens in all for every batch size; with SmolLM2-135M it fell 1.4-fold from 1 to 4 silos of 128
    tokens, and no further above 512 tokens in all. Hence this rule. It reads no clock: the size of a cohort decides
    how sums are rounded, so a timing would make two runs of one treaty differ. Parameters, gradients and moments of
    the silos in one cohort take at most 1 GiB.
    """
    if not bench.stacks:
        return 1
    parameters = list(bench.model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    whole = bench.base.size if bench.base.kept else sum(p.numel() for p in parameters)  # a table of states is no layer
    layers = max(1, getattr(bench.model.config, "num_hidden_layers", 1))
    room = min(MOST_TOKENS, CALL_COST * layers // whole)
    return max(1, min(silos, room // (rows * tokens), MOST_TRAINED // max(trained, 1)))


class _Reached(Exception):
    def __init__(self, states: Tensor) -> None:
        self.states = states


def _stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    raise _Reached(args[0])


def _resolve(precision: str, device: torch.device) -> str:
    if precision == "auto":
        return "bf16" if _multiplies_bf16(device) else "fp32"
    if precision not in PRECISIONS:
        raise ModelError("a known precision", f'precision="{precision}"', one_of(precision, [*PRECISIONS, "auto"]))
    return precision


def _multiplies_bf16(device: torch.device) -> bool:
    """Whether bf16 products run in hardware there. Emulated ones are slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        return any(torch.cpu.get_capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # PyTorch before 2.10


def _drops(module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout) and module.p > 0


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The weights of linear layers, nn.Linear's and GPT-2's transposed kind."""
    for name, p in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if name.endswith("weight") and (isinstance(owner, nn.Linear) or type(owner).__name__ == "Conv1D"):
            yield name, p


def _embeddings(model: nn.Module) -> list[nn.Embedding]:
    return [module for module in model.modules() if isinstance(module, nn.Embedding)]


def _joined(parts: Sequence[ClippedSums]) -> ClippedSums:
    """The sums of silos that went one by one."""
    return ClippedSums(
        {name: torch.cat([part.gradients[name] for part in parts]) for name in parts[0].gradients},
        [norms for part in parts for norms in part.norms],
        torch.cat([part.losses for part in parts]),
        torch.cat([part.targets for part in parts]),
    )


def _silo(leaves: Leaves, k: int) -> Leaves:
    return {name: x[k : k + 1] for name, x in leaves.items()}


def _rows(batch: Batch, chosen: Tensor) -> Batch:
    return {name: x[chosen] for name, x in batch.items()}


def _with_rows(batch: Batch, rows: int) -> Batch:
    missing = rows - len(batch["labels"])
    if not missing:
        return batch
    more = {name: x[:1].expand(missing, *x.shape[1:]) for name, x in batch.items()}
    more["labels"] = torch.full_like(more["labels"], IGNORED)
    return {name: torch.cat([x, more[name]]) for name, x in batch.items()}


def _cat(parts: Sequence[Tensor], filler: int) -> Tensor:
    if parts[0].dim() == 1:
        return torch.cat(list(parts))
    length = max(x.shape[1] for x in parts)
    return torch.cat([F.pad(x, (0, length - x.shape[1]), value=filler) for x in parts])


def _per_row(rows: Tensor, count: int, nll: Tensor, hits: Tensor) -> dict[str, np.ndarray]:
    """Sums over the targets of each of `count` rows, in float64 and in order."""

    def total(x: Tensor) -> np.ndarray:
        return np.bincount(rows.cpu().numpy(), weights=x.double().cpu().numpy(), minlength=count)

    correct, targets = total(hits), total(torch.ones_like(nll))
    return {"nll": total(nll), "targets": targets.astype(np.int64), "correct": correct.astype(np.int64)}
