"""Membership inference: can the released parameters tell a text that they were trained on from one that they were not?

Members are documents of a silo's training split, others are documents of its held-out splits, so that both come from
the same distribution. Every attack gives each document one score, higher for a likelier member:

loss        minus the mean loss of its tokens (Yeom et al. 2018, arXiv 1709.01604)
reference   how much the loss fell from the base model's (Carlini et al. 2021, arXiv 2012.07805, section 5)
min-k%++    the fifth of its tokens that are least likely for where they stand (Zhang et al. 2024, arXiv 2404.02936)
zlib        minus the loss over the size of the compressed text (Carlini et al. 2021)
lira        how far its loss lies below that under adapters trained without it; see `shadows.py`

and a control, **base**: the base model's own loss, which cannot know the members. An area under its curve that is not
about 0.5 says that the two samples differ in kind, and then no other figure here means anything.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from ..errors import DataError
from ..lm.bench import Bench
from ..lm.objectives import Encoded, Ragged, concat
from ..seeds import derive, generator
from ..types import Params
from .bounds import Curve, Scores, curve

if TYPE_CHECKING:
    from .shadows import Shadows

LOWEST = 0.2
"""The share of a document's tokens that Min-K%++ looks at; the paper's own choice on WikiMIA."""
TOKENS = 512
"""About how many tokens go through the model at once. Their logits over 50,000 words take 100 MB in float32."""
FEW = 64
"""With fewer shadows than this, one variance serves all documents (Carlini et al. 2022, arXiv 2112.03570, V-C)."""
CONTROL = "base"


@dataclass(frozen=True)
class Attack:
    """An attack and how well it told members from others. `control`: it saw nothing of the training."""

    name: str
    curve: Curve
    note: str = ""
    control: bool = False


@dataclass(frozen=True, eq=False)
class Reading:
    """What a model says of n documents, each array (n,), in the order of `documents_of`.

    `nll`: sum of the cross-entropies of a document's targets in nats, float64. `targets`: how many. `lowest`: the mean
    of (log p − E log p) / std log p over the `LOWEST` share of its targets for which that is least, float64.
    """

    nll: np.ndarray
    targets: np.ndarray
    lowest: np.ndarray

    @property
    def loss(self) -> np.ndarray:
        """(n,) mean cross-entropy of a document's targets, nats."""
        return self.nll / self.targets


def infer(
    bench: Bench,
    released: Params,
    base: Params,
    members: Encoded,
    others: Encoded,
    *,
    seed: int,
    shadows: Shadows | None = None,
) -> list[Attack]:
    """Every attack on `released`, and the control. A document is one unit, however many rows it has.

    `base`: the parameters before any training, which everybody knows. `shadows`: adapters trained on halves of
    `concat([members, others])`, for "lira", which is left out without them. Under masked-lm all models see the same
    masks, drawn from `seed`.
    """
    data = concat([members, others])
    target, reference = (read(bench, params, data, seed=seed) for params in (released, base))
    scores = scores_of(target, reference, compressed(bench, data))
    if shadows is not None:
        scores["lira"] = lira(bench, target, data, shadows, seed=seed)
    inside = np.arange(len(target.nll)) < len(documents_of(members))
    notes = {"lira": f"{len(shadows.params)} shadow adapters" if shadows else "", CONTROL: "control: untrained base"}
    return [Attack(name, curve(Scores(x[inside], x[~inside])), notes.get(name, ""), name == CONTROL)
            for name, x in scores.items()]  # fmt: skip


def scores_of(target: Reading, reference: Reading, sizes: np.ndarray) -> dict[str, np.ndarray]:
    """(n,) scores by attack, without "lira". `sizes`: (n,) bytes of each document, compressed."""
    return {
        "loss": -target.loss,
        "reference": reference.loss - target.loss,
        "min-k%++": target.lowest,
        "zlib": -target.nll / sizes,
        CONTROL: -reference.loss,
    }


def lira(bench: Bench, target: Reading, data: Encoded, shadows: Shadows, *, seed: int) -> np.ndarray:
    """Offline LiRA (Carlini et al. 2022, section IV-C): the standardised gain over adapters that never saw the text.

    The statistic is the mean log-likelihood of a document's targets. Every document has to be outside of two shadows at
    least.
    """
    said = np.stack([-read(bench, params, data, seed=seed).loss for params in shadows.params])  # (16, 400) by shadow
    return standardised(-target.loss, said, ~shadows.inside)


def standardised(x: np.ndarray, said: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """(x − mean) / std over the shadows that a document is outside of; (n,). `said`, `outside`: (shadows, n)."""
    counts = outside.sum(0)
    if counts.min() < 2:
        raise ValueError(f"Expected every document outside of two shadows or more; one is outside of {counts.min()}.")
    mean = np.where(outside, said, 0.0).sum(0) / counts
    squares = np.where(outside, (said - mean) ** 2, 0.0).sum(0)
    variance = squares / (counts - 1) if counts.min() >= FEW else np.full_like(x, squares.sum() / (counts - 1).sum())
    return (x - mean) / np.sqrt(np.maximum(variance, 1e-12))


# ---- what a model says ----


@torch.no_grad()
def read(bench: Bench, params: Params, data: Encoded, *, seed: int) -> Reading:
    """Every document of `data` through the model under `params`, in the bench's precision."""
    leaves = {name: x[0].detach() for name, x in bench.leaves([params]).items()}
    said: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for rows in _batches(data):
        batch = bench.objective.collate(data, rows, derive(seed, "membership"))
        owners, *values = _targets(bench, leaves, batch)
        said.append((rows[owners], *values))
    row, logp, standard = (np.concatenate(x) for x in zip(*said, strict=True))
    document = np.searchsorted(documents_of(data), data.documents[row])
    order = np.argsort(document, kind="stable")
    cuts = np.searchsorted(document[order], np.arange(1, len(documents_of(data))))
    nll = [-float(x.sum()) for x in np.split(logp[order], cuts)]
    lowest = [_lowest(x) for x in np.split(standard[order], cuts)]
    return Reading(np.array(nll), np.bincount(document), np.array(lowest))


def predictions(bench: Bench, leaves: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
    """The model's logits for a batch under `leaves` ({name: its own shape}); positions as the model has them."""
    here = {name: x.to(bench.device) for name, x in batch.items()}
    half = torch.autocast(bench.device.type, torch.bfloat16) if bench.precision == "bf16" else nullcontext()
    with half:
        return functional_call(bench.model, dict(leaves), (), bench._inputs(here)).logits


def _targets(bench: Bench, leaves: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> list[np.ndarray]:
    """(row in the batch, log p, standardised log p) of each of the p targets, each (p,), row after row."""
    labels = batch["labels"]
    states, targets = bench.objective.align(predictions(bench, leaves, batch), labels.to(bench.device))
    at = torch.arange(len(labels)).view(-1, *[1] * labels.dim()).expand(*labels.shape, 1)
    owners = bench.objective.align(at, labels)[0].reshape(-1)
    pieces = [_standard(x, t) for x, t in zip(states.split(128), targets.split(128), strict=True)]
    return [owners.numpy(), *(torch.cat(x).double().cpu().numpy() for x in zip(*pieces, strict=True))]


def _standard(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log p of each target, and how many standard deviations of log p it lies above its mean over the vocabulary."""
    logp = torch.log_softmax(logits.float(), -1)
    p = logp.exp()
    mean = (p * logp).sum(-1)
    spread = (p * (logp - mean[:, None]) ** 2).sum(-1).sqrt()
    chosen = logp.gather(1, targets[:, None])[:, 0]
    return chosen, (chosen - mean) / spread.clamp(min=1e-6)


def _lowest(x: np.ndarray) -> float:
    count = max(1, int(LOWEST * len(x)))
    return float(np.partition(x, count - 1)[:count].mean())


def _batches(data: Encoded) -> Iterator[np.ndarray]:
    """Rows of like length together, longest first."""
    lengths = np.diff(data.inputs.bounds)
    rows = np.argsort(-lengths, kind="stable")
    while len(rows):
        size = max(1, TOKENS // max(1, int(lengths[rows[0]])))
        yield rows[:size]
        rows = rows[size:]


# ---- documents ----


def documents_of(data: Encoded) -> np.ndarray:
    """The ids of the documents that have rows, ascending."""
    return np.unique(data.documents)


def select(data: Encoded, documents: Sequence[int] | np.ndarray) -> Encoded:
    """The rows of some documents, in their order; documents keep their ids."""
    rows = np.flatnonzero(np.isin(data.documents, documents))
    arrays = {name: getattr(data, name)[rows] for name in ("first", "targets", "bytes", "documents")}
    inputs, answers = (Ragged.of([x[row] for row in rows]) for x in (data.inputs, data.answers))
    return Encoded(inputs, answers, **arrays, domains=tuple(data.domains[row] for row in rows), words=data.words)


def sample(data: Encoded, count: int, *, seed: int) -> Encoded:
    """At most `count` documents, always the same ones for a seed."""
    documents = documents_of(data)
    if not len(documents):
        raise DataError("documents to draw from", "a split without any", "Give every silo some held-out documents.")
    return select(data, generator(seed, "audit documents").permutation(documents)[:count])


def compressed(bench: Bench, data: Encoded) -> np.ndarray:
    """(n,) bytes of each document's text after zlib."""
    texts = {document: b"" for document in documents_of(data)}
    for row, document in enumerate(data.documents):
        tokens = [*data.inputs[row][data.first[row] :], *data.answers[row]]
        texts[document] += bench.base.tokenizer.decode(tokens, skip_special_tokens=True).encode()
    return np.array([len(zlib.compress(text)) for text in texts.values()])


# ---- for the audit's page ----


def section(attacks: Sequence[Attack], drawn: str) -> dict[str, Any]:
    """The "membership" section of audit.json; `drawn`: in words, which documents were compared."""
    first = attacks[0].curve
    return {
        "confidence": 0.95,
        "members": first.members,
        "nonmembers": first.others,
        "target": "the released adapter",
        "drawn": drawn,
        "attacks": [_record(attack) for attack in attacks],
    }


def _record(attack: Attack) -> dict[str, Any]:
    c = attack.curve
    unseen = [f"{rate.fpr:.1%}" for rate in c.rates if not rate.resolved]
    few = f"too few non-members to resolve {', '.join(unseen)}" if unseen else ""
    note = "; ".join(filter(None, (attack.note, few)))
    return {
        "name": attack.name,
        "auc": {"value": c.auc, "low": c.auc_low, "high": c.auc_high},
        "tpr": {f"{r.fpr:g}": {"value": r.tpr, "low": r.low, "high": r.high} for r in c.rates},
        "curve": [list(point) for point in c.points],
    } | ({"note": note} if note else {})
