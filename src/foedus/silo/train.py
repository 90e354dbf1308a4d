"""Local training: some steps of SGD or AdamW from the task's parameters, for one silo or several at once.

Silos that train together ("cohort batching") share every product with the frozen base; their parameters, losses,
gradients and optimizer states stay apart along a leading axis of length K. K = 1 is the ordinary case.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from ..errors import GuaranteeError, SiloError
from ..lm.bench import Bench
from ..lm.terms import PLAIN, Goal
from ..privacy.steps import PrivateSteps
from ..seeds import derive
from ..types import Params, Task, Tree
from .private import PrivateGradients, collate
from .shard import Silo

if TYPE_CHECKING:
    from ..privacy.survey import Survey


@dataclass(frozen=True)
class LocalPlan:
    """How a silo trains in a round. Exactly one of `steps` and `epochs`; `lr` in update units per step, > 0.

    `schedule` runs over the `rounds` of the treaty, after `warmup` rounds of linear growth. `keep`: whether the silo
    keeps its optimizer's state from round to round in its memory, which never leaves it. `privacy`: private steps
    instead of plain ones; `steps` is then theirs, `batch` bears on nothing, and `rows` bounds what goes through the
    model at once. Where their noise is added to the update (`privacy.lr`), whatever is not one plain step is refused.
    `goal`: what is minimised, where an algorithm has no other. `survey`: how silos answer with noised sums, and when;
    None: exactly.
    """

    lr: float
    batch: int
    steps: int | None = None
    epochs: int | None = None
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = 0
    rounds: int = 1
    keep: bool = False
    privacy: PrivateSteps | None = None
    rows: int = 32
    goal: Goal = PLAIN
    survey: Survey | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"Expected exactly one of steps={self.steps} and epochs={self.epochs}.")
        for name in ("lr", "batch"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Expected {name}={getattr(self, name)} > 0.")
        if self.privacy is not None and self.privacy.lr is not None:
            _check_plain(self, self.privacy.lr)

    def lr_at(self, round: int) -> float:
        """The learning rate of a round, counted from 0; > 0 in every round."""
        if round < self.warmup:
            return self.lr * (round + 1) / (self.warmup + 1)
        done = (round - self.warmup) / max(1, self.rounds - self.warmup)
        if self.schedule == "linear":
            return self.lr * (1 - done)
        if self.schedule == "cosine":
            return self.lr * (1 + math.cos(math.pi * done)) / 2
        return self.lr

    def steps_of(self, silo: Silo) -> int:
        """How many local steps a silo takes in a round."""
        return silo.local_steps(self.batch, self.steps, self.epochs)


@dataclass(frozen=True)
class Trained:
    """What local steps left behind. `loss`: sum of cross-entropies in nats over all steps; `targets`: how many."""

    params: Params
    loss: float
    targets: int
    memory: Tree


Memory = Tree


def train(
    bench: Bench,
    task: Task,
    silos: Sequence[Silo],
    plan: LocalPlan,
    memories: Sequence[Memory],
    *,
    pull: float = 0.0,
    goals: Sequence[Goal] | None = None,
    shifts: Sequence[Params] | None = None,
    still: Collection[str] = (),
) -> list[Trained]:
    """Trains every silo from `task.params`, all of them side by side.

    `pull`: μ ≥ 0 of FedProx, adds μ (w − w_global) to every gradient. `goals`: what each silo minimises; None:
    `plan.goal`. `shifts`: what is added to each silo's gradients after clipping and noise, such as SCAFFOLD's c − cᵢ.
    `still`: parameters that no step moves, noise neither; what they become here is not to be sent.
    Silos trained together take equally many steps, and their optimizers have taken equally many before. Raises
    `SiloError` naming the silos whose loss or parameters are no longer finite, and `GuaranteeError` for shifts under
    shares of noise.
    """
    goals = [plan.goal] * len(silos) if goals is None else goals
    steps = {plan.steps_of(silo) for silo in silos}
    if len(steps) != 1 or len({age(memory) for memory in memories}) != 1:
        raise ValueError(f"Expected silos in step with each other to train together; got {sorted(steps)} steps.")
    if plan.privacy is not None and plan.privacy.lr is not None:
        if shifts is not None:
            raise _unplain(plan.privacy.lr, "a shift of every gradient")
        return _one_step(bench, task, silos, plan, memories, plan.privacy.lr, goals)
    torch.manual_seed(derive(task.seed, "dropout", task.round, silos[0].name))
    leaves = bench.leaves([task.params] * len(silos))
    origin = {name: x.detach().clone() for name, x in leaves.items()} if pull else {}
    optimizer = _optimizer(leaves, plan, plan.lr_at(task.round), memories)
    loss, targets = np.zeros(len(silos)), np.zeros(len(silos), np.int64)
    gradients = PrivateGradients(bench, task, silos, plan, memories, goals) if plan.privacy else None
    offsets = _stacked(leaves, shifts) if shifts else {}
    for step in range(steps.pop()):
        optimizer.zero_grad()
        if gradients is None:
            sums, counts = _plain(bench, task, silos, plan, leaves, step, goals)
        else:
            sums, counts = gradients.fill(leaves, step)
        for name, x in leaves.items() if pull else ():
            x.grad.add_(x.detach() - origin[name], alpha=pull)
        if plan.max_grad_norm is not None:
            _clip(leaves, plan.max_grad_norm)
        for name, x in offsets.items():
            leaves[name].grad.add_(x)
        for name in still:
            leaves[name].grad = None
        optimizer.step()
        loss += sums
        targets += counts
    kept = [gradients.memory(k) if gradients else {} for k in range(len(silos))]
    return _unstack(leaves, optimizer, plan, silos, loss, targets, kept)


def _check_plain(plan: LocalPlan, lr: float) -> None:
    """What one unit moves is known for lr · gradient and for nothing that comes after it."""
    wrong = [
        name
        for name, right in {
            "lr": lr, "steps": 1, "optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "max_grad_norm": None,
            "schedule": "constant", "warmup": 0,
        }.items()
        if getattr(plan, name) != right
    ]  # fmt: skip
    if wrong:
        raise _unplain(lr, ", ".join(f"{name} = {getattr(plan, name)!r}" for name in wrong))


def _unplain(lr: float, came: str) -> GuaranteeError:
    return GuaranteeError(
        f"one step of plain SGD with learning rate {lr:g} in every round, under shares of noise",
        came,
        'Change it in [local], or set placement = "silo" in [privacy], where each step has noise of its own.',
    )


def _one_step(
    bench: Bench, task: Task, silos: Sequence[Silo], plan: LocalPlan, memories: Sequence[Memory], lr: float,
    goals: Sequence[Goal],
) -> list[Trained]:  # fmt: skip
    """w − lr g in float64, so that local minus global is −lr g to the last of the grid's steps. From w itself FedProx
    pulls nowhere.
    """
    leaves = bench.leaves([task.params] * len(silos))
    gradients = PrivateGradients(bench, task, silos, plan, memories, goals)
    released, loss, targets = gradients.released(leaves, 0)
    _check_finite(silos, [all(np.isfinite(x).all() for x in own.values()) for own in released])
    return [
        Trained({name: x.astype(np.float64) - lr * own[name] for name, x in task.params.items()},
                float(loss[k]), int(targets[k]), gradients.memory(k))
        for k, own in enumerate(released)
    ]  # fmt: skip


def _plain(
    bench: Bench, task: Task, silos: Sequence[Silo], plan: LocalPlan, leaves: Mapping[str, torch.Tensor], step: int,
    goals: Sequence[Goal],
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Fills in the gradients of each silo's goal; (K,) sums of cross-entropies and (K,) numbers of targets."""
    totals, sums, counts = bench.totals(leaves, [_batch(bench, silo, plan, task, step) for silo in silos], goals)
    if totals.requires_grad:
        totals.sum().backward()
    for x in leaves.values():
        x.grad = torch.zeros_like(x) if x.grad is None else x.grad  # of a head that no term asked
    return sums.double().cpu().numpy(), counts.cpu().numpy()


def age(memory: Memory) -> int:
    """How many steps a kept optimizer has taken; 0 when none is kept."""
    return next((1 + int(x) for (key, _), x in memory.items() if key == "step"), int(bool(memory)))


def _batch(bench: Bench, silo: Silo, plan: LocalPlan, task: Task, step: int) -> dict[str, torch.Tensor]:
    rows = silo.rows(task.seed, task.round, step, plan.batch, plan.steps, plan.epochs)
    return collate(bench, silo, rows, derive(task.seed, "collate", silo.name, task.round, step))


def _stacked(leaves: Mapping[str, torch.Tensor], each: Sequence[Params]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.stack([one[name] for one in each])).to(x) for name, x in leaves.items()}


def _optimizer(leaves, plan: LocalPlan, lr: float, memories: Sequence[Memory]) -> torch.optim.Optimizer:
    params = list(leaves.values())
    if plan.optimizer == "adamw":
        optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=plan.weight_decay, fused=True)
    else:
        optimizer = torch.optim.SGD(params, lr=lr, momentum=plan.momentum, weight_decay=plan.weight_decay, fused=True)
    if plan.keep and memories[0]:
        for name, x in leaves.items():
            parts = [key for key, parameter in memories[0] if parameter == name and not key.startswith("private")]
            optimizer.state[x] = {key: _restack(key, name, memories, x) for key in parts}
    return optimizer


def _restack(key: str, name: str, memories: Sequence[Memory], like: torch.Tensor) -> torch.Tensor:
    if key == "step":
        return torch.from_numpy(np.array(memories[0]["step", name])).to(like.device)
    return torch.from_numpy(np.stack([memory[key, name] for memory in memories])).to(like)


def _clip(leaves, max_norm: float) -> None:
    """Clips each silo's gradient to L2 norm `max_norm`, over all its parameters together."""
    grads = [x.grad for x in leaves.values()]
    norms = torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0).sqrt()
    factors = (max_norm / norms.clamp(min=1e-12)).clamp(max=1.0)
    for g in grads:
        g.mul_(factors.view(-1, *[1] * (g.dim() - 1)))


def _unstack(leaves, optimizer, plan: LocalPlan, silos: Sequence[Silo], loss, targets, kept) -> list[Trained]:
    arrays = {name: x.detach().cpu().numpy() for name, x in leaves.items()}
    unseen = plan.privacy is not None  # then whether a loss is finite is nobody's business
    sound = [
        (unseen or math.isfinite(loss[k])) and all(np.isfinite(x[k]).all() for x in arrays.values())
        for k in range(len(silos))
    ]
    _check_finite(silos, sound)
    memories = [kept[k] | (_memory(leaves, optimizer, k) if plan.keep else {}) for k in range(len(silos))]
    return [Trained({name: x[k] for name, x in arrays.items()}, float(loss[k]), int(targets[k]), memories[k])
            for k in range(len(silos))]  # fmt: skip


def _check_finite(silos: Sequence[Silo], sound: Sequence[bool]) -> None:
    lost = [silo.name for silo, good in zip(silos, sound, strict=True) if not good]
    if lost:
        raise SiloError(
            "a finite training loss and finite parameters",
            f"NaN or infinity at {', '.join(lost)}",
            "Lower [local] lr, set [local] max_grad_norm, or look for damaged text in that silo.",
        )


def _memory(leaves, optimizer: torch.optim.Optimizer, k: int) -> Memory:
    return {
        (key, name): value.cpu().numpy() if key == "step" else value[k].cpu().numpy()
        for name, x in leaves.items()
        for key, value in optimizer.state[x].items()
        if value is not None
    }
