"""kNN-Adapter (Huang et al. 2023, arXiv 2302.10879) over kNN-LM (Khandelwal et al. 2020), federated: the base is
frozen, each silo looks in its own store of text, and what is learned together is how far to trust it.

    N(c): the k entries nearest to c in the store;    p_kNN(w | c) ∝ Σ_{j in N(c)} 1[v_j = w] exp(−d_j / T)
    (λ, T) = (sigmoid, softplus) of a small network, of c's key, distances and what base and store say
    ℓ(c, w*) = −log (λ p_kNN(w*) + (1 − λ) p_LM(w*));    the network by FedAvg

Whom does the store hold? A unit in it bears on the loss of every other unit, and no clip on these bounds that. So:

- Nobody inside the silo is protected, or whole silos are: a silo's documents are parted, by key, into a store D1 and
  tuning text D2 that never meet. What a silo sends then depends on all it has; a clip of its update bounds that.
- Units inside the silo are protected: the network is tuned on all their text against a store of *public* text. A
  unit's loss is then its own, the private steps are what they are for any algorithm, and the guarantee covers the
  network. The silo's own store answers its own questions only, and nothing learned depends on it.

Either way what a store *answers* is covered by nothing: it holds text word for word. That includes figures: a
perplexity measured with it is a number about the text in it. With `answers = "public"` the public store answers too,
and all that leaves the silo is as protected as the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np

from ..errors import DataError, GuaranteeError
from ..lm.bench import Batch, Bench
from ..lm.datastore import Datastore, Interpolated, Lookup, Reader, Stores, mixture_scores, rows_of
from ..lm.objectives import Encoded
from ..lm.terms import Goal
from ..seeds import derive
from ..silo.shard import Silo, Units
from ..silo.train import LocalPlan, train
from ..types import Params, Task, Tree, Update
from .base import Averaging, delta

TUNING = 5
"""One unit in so many is tuned on; the others are the store."""


@dataclass(frozen=True)
class KnnAdapter(Averaging):
    """Trains the head "knn" of a frozen base (`attach` with `Frozen()`, `attach_head` with `lookup.sizes(width)`).

    `public`: text that nobody needs to protect, for the store that private steps tune against. `answers`: whose store
    `scores` looks in, the silo's "own" or the "public" one. `stores`: made when first asked for, kept in memory.
    """

    caveat: ClassVar[str] = (
        "The guarantee covers the trained network. It does not cover what a silo's own store of text answers, and so"
        " neither the figures measured with it."
    )

    local: LocalPlan
    lookup: Lookup = Lookup()
    public: Encoded | None = field(default=None, repr=False)
    answers: Literal["own", "public"] = "own"
    stores: Stores = field(default_factory=Stores, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.public is not None:
            return
        if self.local.privacy is not None:
            raise GuaranteeError(
                "public text to tune against, where units inside silos are protected",
                "none: in a store of their own text each unit bears on the loss of all others",
                "Name public text, or protect whole silos.",
            )
        if self.answers == "public":
            raise DataError(
                "public text, for the store that answers", "none", 'Name public text, or answer from "own".'
            )

    def train(
        self, bench: Bench, task: Task, silos: Sequence[Silo], memories: Sequence[Tree]
    ) -> list[tuple[Update, Tree]]:
        reader = Reader(bench, self.lookup)
        tuned = [self._tuned(silo) for silo in silos]
        goals = [self._goal(reader, silo) for silo in silos]
        results = train(bench, task, tuned, self.local, memories, goals=goals)
        return [(delta(task, silo, r), r.memory) for silo, r in zip(silos, results, strict=True)]

    def scores(self, bench: Bench, params: Params, silo: Silo, batch: Batch, memory: Tree) -> dict[str, np.ndarray]:
        reader = Reader(bench, self.lookup)
        store = self._public(reader) if self.answers == "public" else self._own(reader, silo)
        return bench.scores(params, batch) | mixture_scores(reader, store, params, batch)

    def _goal(self, reader: Reader, silo: Silo) -> Goal:
        """The mixture's loss in place of the base's own; the other terms stay."""
        store = self._own(reader, silo) if self.public is None else self._public(reader)
        return replace(self.local.goal, tokens=0.0).plus(Interpolated(reader, store, self.local.goal.tokens))

    def _tuned(self, silo: Silo) -> Silo:
        """The silo with the text that it tunes on: all of it beside a public store, else D2."""
        return silo if self.public is not None else _with_rows(silo, ~in_store(silo))

    def _own(self, reader: Reader, silo: Silo) -> Datastore:
        """Of D1, or of all its text where it was tuned beside a public one."""
        text = silo.splits["train"]
        stored = text if self.public is not None else rows_of(text, np.flatnonzero(in_store(silo)))
        return self.stores.of(reader, stored, whole=text)

    def _public(self, reader: Reader) -> Datastore:
        assert self.public is not None
        return self.stores.of(reader, self.public)


def in_store(silo: Silo) -> np.ndarray:
    """(rows,) whether a row is in D1. By the key of its unit, so nobody's coming or going moves another.

    Without units a document is one, and its key is its text's.
    """
    text = silo.splits["train"]
    if silo.units is not None:
        keys, of = silo.units.keys, silo.units.of
    else:
        _, first, of = np.unique(text.documents, return_index=True, return_inverse=True)
        keys = np.array([derive(0, "document", text.inputs[int(row)].tobytes().hex()) for row in first], np.uint64)
    store = (keys >> np.uint64(16)) % np.uint64(TUNING) != 0  # of other bits than the turns of units in private steps
    return store[of]


def _with_rows(silo: Silo, chosen: np.ndarray) -> Silo:
    """A silo that trains on these of its rows."""
    rows = np.flatnonzero(chosen)
    if not len(rows):
        raise DataError(
            "text to tune on beside the text in the store", "all of it in the store",
            "Give the silo more documents.", where=f"silo {silo.name!r}",
        )  # fmt: skip
    units = silo.units
    if units is not None:
        left, of = np.unique(units.of[rows], return_inverse=True)
        units = Units(of, units.keys[left])
    return Silo(silo.name, {**silo.splits, "train": rows_of(silo.splits["train"], rows)}, units=units)
