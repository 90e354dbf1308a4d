"""The federated loop. Read this file first.

Every round: sample a cohort, send it a task, sum what comes back, release the sum through the mechanism, and step.
The server sees only the sum. Checkpoints, evaluation and logs are ordinary code in the caller's
`for state, release in run(...)`; there are no callbacks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from . import tree
from .algorithms.base import Algorithm
from .engines.base import Engine
from .errors import CohortError, GuaranteeError
from .gather import Gather, InTheOpen
from .privacy.mechanisms import Mechanism
from .server.aggregators import Aggregator
from .server.optimizers import ServerOptimizer
from .server.samplers import Sampler
from .stages.base import Chain
from .types import Params, Receipt, Release, State, Task, Total, Update


@dataclass(frozen=True)
class Federation:
    """Who takes part and by which rules; everything the loop needs beside an engine and a state.

    `silos`: in the order in which they are summed. `model`: digest of the frozen base. `minimum`: the fewest reports
    that may make a round. `gather`: how a cohort's updates become a sum; in the open when left out.
    """

    algorithm: Algorithm
    stages: Chain
    aggregator: Aggregator
    mechanism: Mechanism
    server_optimizer: ServerOptimizer
    sampler: Sampler
    silos: tuple[str, ...]
    model: str
    rounds: int
    seed: int = 0
    minimum: int = 1
    gather: Gather | None = None

    def __post_init__(self) -> None:
        if self.stages.hides and not self.aggregator.linear:
            raise GuaranteeError(
                "an aggregator that needs only the sum, since a stage hides single updates",
                f"{self.aggregator}",
                "Use a mean, or drop the stage that hides.",
            )
        if self.stages.hides != (self.gather is not None and self.gather.blind):
            raise GuaranteeError(
                "a stage that hides single updates, and a way of gathering that needs only their sum, together",
                f"{self.stages} with {self.gather}",
                "Give both or neither.",
            )


def start(federation: Federation, params: Params) -> State:
    """The state before the first round."""
    return State(
        round=0,
        params=params,
        optimizer=federation.server_optimizer.init(params),
        mechanism=federation.mechanism.init(),
        settings=federation.stages.start(),
        extra=federation.algorithm.extra(params),
    )


def run(federation: Federation, engine: Engine, state: State) -> Iterator[tuple[State, Release]]:
    """Yields (state, release) after every round until `federation.rounds` are done; resumes from any state.

    Raises `CohortError` when fewer than `federation.minimum` silos report; the state yielded last stays good.
    """
    while state.round < federation.rounds:
        state, release = one_round(federation, engine, state)
        yield state, release


def one_round(federation: Federation, engine: Engine, state: State) -> tuple[State, Release]:
    """One round, from a task to the next state."""
    f = federation
    cohort = _cohort(f, state.round)
    task = Task(state.round, f.model, state.params, cohort, f.seed, state.settings, state.extra)
    total, receipts = (f.gather or InTheOpen(f.aggregator)).gather(engine, "train", task)
    _enough(f, cohort, receipts)
    total = _decoded(f, total, task)
    release, mechanism = f.mechanism.release(total, state.mechanism)
    release = replace(release, receipts=receipts)

    mean = f.aggregator.mean(release.tensors)
    params, optimizer, extra = state.params, state.optimizer, state.extra
    if total.count or release.unit:
        params, optimizer = f.server_optimizer.step(params, f.algorithm.direction(mean), optimizer)
        extra = f.algorithm.finish(extra, mean)
        params, extra = f.algorithm.refine(params, extra)
    return State(
        round=state.round + 1,
        params=params,
        optimizer=optimizer,
        mechanism=mechanism,
        settings=f.stages.learn(mean, state.settings),
        extra=extra,
    ), release


def _decoded(f: Federation, total: Total, task: Task) -> Total:
    """The total in update units, with the most that one unit can move it. Nobody's sum is zero, and a mechanism adds
    its noise to it all the same.
    """
    total = replace(total, bound=f.aggregator.bound(f.stages.bound(math.inf, task)))
    if total.count:
        return f.stages.decode(total, task)
    stages = f.stages.split()[0]
    parts = f.algorithm.parts({name: x.shape for name, x in task.params.items()})
    nothing = Update({key: np.zeros(shape) for key, shape in parts.items()})
    return stages.decode(replace(total, tensors=tree.zeros(stages.encode(nothing, task).tensors)), task)


def _cohort(federation: Federation, round: int) -> tuple[str, ...]:
    """The sampled silos; nobody when chance drew fewer than the minimum, and the round then changes nothing."""
    cohort = federation.sampler.cohort(federation.silos, round, federation.seed)
    return cohort if len(cohort) >= federation.minimum else ()


def _enough(federation: Federation, cohort: Sequence[str], receipts: Iterable[Receipt]) -> None:
    failures = {r.silo: r.failure for r in receipts if r.failure}
    came = len(cohort) - len(failures)
    if cohort and came < federation.minimum:
        why = "; ".join(f"{silo}: {failure}" for silo, failure in failures.items())
        raise CohortError(
            f"at least {federation.minimum} silos to report in a round",
            f"{came} of the {len(cohort)} that were asked ({why or 'nobody failed'})",
            "Mend the silos that failed and resume the run, or lower [cohort] minimum in a new treaty.",
        )
