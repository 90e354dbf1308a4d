"""Gradient inversion: what a silo's text loses when its gradient is seen. Read `defences.py` and `span.py` next.

`attack` computes the gradient a silo would send for some rows, defends it, attacks it, and compares what was found
with the truth. One step of plain SGD is assumed, which is the worst case: several steps, or AdamW, bend what is sent
out of the span that the exact attack looks for. That stops this attack, not every attack: it is no guarantee.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from scipy.optimize import linear_sum_assignment

from ..lm.bench import Bench
from ..lm.objectives import Encoded
from ..types import Params
from .defences import Defence, added, clipped, finished, gradients, sent
from .optimise import Optimiser, optimise
from .rouge import Rouge, rouge
from .span import span_bag, span_check
from .tokens import bag_recall, token_bag

SENTENCE = "the patient has diabetes"
"""The documented example, in the docs, the tests and the audit's page."""
NO_DEFENCE = Defence()

Kind = Literal["span", "span bag", "token bag", "dlg", "tag"]
Row = tuple[int, ...]


@dataclass(frozen=True)
class Recovery:
    """What an attack recovered. Shares are in [0, 1]; None where the attack does not say it: a bag has no order.

    `exact`: share of rows recovered whole. `tokens`: share of tokens recovered in their place; for a bag, share of the
    different tokens, of which as many are named as there are. `rouge`: mean over rows. `truth` and `found` are text:
    private, unless the rows were an example.
    """

    attack: str
    defence: str
    batch: int
    exact: float | None
    tokens: float
    rouge: Rouge | None
    seconds: float
    truth: tuple[str, ...]
    found: tuple[str, ...]

    def row(self) -> dict[str, Any]:
        """A row of the audit's table: figures only, no text."""
        scores = self.rouge
        return {
            "attack": self.attack,
            "defence": self.defence,
            "batch": self.batch,
            "exact": self.exact,
            "tokens": self.tokens,
            "rouge1": scores.one if scores else None,
            "rouge2": scores.two if scores else None,
            "rougeL": scores.longest if scores else None,
            "seconds": self.seconds,
        }

    def example(self) -> dict[str, Any]:
        """The text itself, for the audit's page. Only for rows that are no silo's: the example sentence, a canary."""
        told = {"attack": self.attack, "defence": self.defence, "batch": self.batch, "source": "example"}
        return told | {"truth": list(self.truth), "recovered": list(self.found)}


def encode(bench: Bench, texts: Sequence[str]) -> Encoded:
    """Texts as rows, for `attack`: examples that are no silo's."""
    return bench.objective.encode(pa.table({"text": list(texts)}), bench.base.tokenizer)


def attack(
    bench: Bench, params: Params, encoded: Encoded, rows: Sequence[int], *, defence: Defence = NO_DEFENCE,
    kind: Kind = "span", others: Sequence[int] = (), optimiser: Optimiser | None = None, seed: int = 0,
) -> Recovery:  # fmt: skip
    """Attacks what a silo would send for one step on `rows` at `params`.

    `others`: rows of other silos whose gradients are in the same sum, where only the sum is seen; the attacker looks
    for these rows too, and is judged by `rows`. `kind`: "span" finds whole rows, "span bag" their tokens; "token bag"
    reads the gradient of embeddings or of the head; "dlg" and "tag" optimise. `optimiser`: for those two. `seed`: of
    the noise and of the attack's own draws; nothing of it is sent to anybody.
    """
    each = gradients(bench, params, encoded, [*rows, *others])
    message = sent(each, defence, np.random.default_rng([seed, 0]))
    name = f"{defence.name}, sum with {len(others)} more rows" if others else defence.name
    return attack_on(
        bench, params, message, encoded, rows, defence=name, kind=kind, others=others, optimiser=optimiser, seed=seed
    )


def attack_on(
    bench: Bench, params: Params, message: Params, encoded: Encoded, rows: Sequence[int], *, defence: str,
    kind: Kind = "span", others: Sequence[int] = (), optimiser: Optimiser | None = None, seed: int = 0,
) -> Recovery:  # fmt: skip
    """Attacks a `message` that was seen, read as a mean gradient at `params`, for `rows`; see `attack`.

    `defence`: what was done to it, in words.
    """
    tokens = [_inputs(encoded, row) for row in [*rows, *others]]
    return _judged(bench, params, message, tokens, len(rows), defence, kind, optimiser, seed)


def survey(
    bench: Bench, params: Params, encoded: Encoded, *, sent_is: str, batches: Sequence[int],
    defences: Sequence[Defence], kinds: Sequence[Kind] = ("span", "span bag"), optimiser: Optimiser | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of the audit's table: every kind of attack on the first 1, 4, … rows under every defence; no text.

    `sent_is`: what is sent, in words, such as "LoRA, rank 8". `batches`: how many rows; those beyond what `encoded`
    holds are left out.
    """
    totals: dict[float, dict[str, np.ndarray]] = {defence.clip: {} for defence in defences}
    tokens: list[Row] = []
    table = []
    for n, gradient in enumerate(gradients(bench, params, encoded, range(min(len(encoded), max(batches)))), 1):
        tokens.append(_inputs(encoded, n - 1))
        totals = {clip: added(total, clipped(gradient, clip)) for clip, total in totals.items()}
        for defence in defences if n in batches else ():
            message = finished(totals[defence.clip], n, defence, np.random.default_rng([seed, 0]))
            judged = [_judged(bench, params, message, tokens, n, defence.name, k, optimiser, seed) for k in kinds]
            table += [outcome.row() | {"sent": sent_is} for outcome in judged]
    names = [defence.name for defence in defences]
    return sorted(table, key=lambda row: (kinds.index(row["attack"]), names.index(row["defence"]), row["batch"]))


def examples(bench: Bench, params: Params, *, sent_is: str, defences: Sequence[Defence]) -> list[dict[str, Any]]:
    """What the span check makes of the documented sentence under each defence, for the audit's page."""
    encoded = encode(bench, [SENTENCE])
    told = [attack(bench, params, encoded, [0], defence=defence) for defence in defences]
    return [outcome.example() | {"sent": sent_is} for outcome in told]


def invert(
    bench: Bench, params: Params, message: Params, lengths: Sequence[int], *, kind: Kind = "span",
    optimiser: Optimiser | None = None, seed: int = 0,
) -> list[Row]:  # fmt: skip
    """The rows that an attacker reads from `message`, a mean gradient at `params`; a bag is one row without order.

    `lengths`: of each row, without its last token, which no gradient depends on as an input; ≥ 1.
    """
    if kind == "span":
        return span_check(bench, params, message, lengths)
    if kind == "span bag":
        return [tuple(span_bag(bench, params, message, lengths))]
    if kind == "token bag":
        return [tuple(token_bag(bench, message, sum(lengths)))]
    how = optimiser or Optimiser(kind)
    return optimise(bench, params, message, lengths, how, np.random.default_rng([seed, 1]))


# ---- how much was recovered ----


def _judged(
    bench: Bench, params: Params, message: Params, tokens: Sequence[Row], judged: int, defence: str, kind: Kind,
    optimiser: Optimiser | None, seed: int,
) -> Recovery:  # fmt: skip
    """Attacks and compares. `tokens`: of all rows in the message; the first `judged` of them are the truth."""
    started = time.perf_counter()
    found = invert(bench, params, message, [len(row) for row in tokens], kind=kind, optimiser=optimiser, seed=seed)
    seconds = time.perf_counter() - started
    if kind in ("token bag", "span bag"):
        return _bag(bench, kind, defence, tokens[:judged], tokens[judged:], found[0], seconds)
    return _whole(bench, kind, defence, tokens[:judged], found, seconds)


def _inputs(encoded: Encoded, row: int) -> Row:
    """A row's tokens but the last, which is a target and never an input."""
    return tuple(map(int, encoded.inputs[row][:-1]))


def _bag(
    bench: Bench, kind: str, defence: str, truth: Sequence[Row], others: Sequence[Row], found: Row, seconds: float
) -> Recovery:
    truth, others, (named,) = _spoken(bench, truth), _spoken(bench, others), _spoken(bench, [found])
    words = " ".join(_text(bench, (token,)) for token in named)
    told = tuple(_text(bench, row) for row in truth)
    recall = bag_recall(truth, named, others)
    return Recovery(kind, defence, len(truth), None, recall, None, seconds, told, (words,))


def _whole(bench: Bench, kind: str, defence: str, truth: Sequence[Row], found: list[Row], seconds: float) -> Recovery:
    pairs = list(zip(truth, _matched(truth, found), strict=True))
    special = set(bench.base.tokenizer.all_special_ids)
    right = [t == f for left, other in pairs for t, f in _places(left, other) if t not in special]
    texts = [(_text(bench, left), _text(bench, other)) for left, other in pairs]
    scores = [rouge(left, other) for left, other in texts]
    mean = Rouge(*(float(np.mean([getattr(s, name) for s in scores])) for name in ("one", "two", "longest")))
    exact = float(np.mean([left == other for left, other in pairs]))
    told, read = zip(*texts, strict=True)
    return Recovery(kind, defence, len(truth), exact, float(np.mean(right or [0.0])), mean, seconds, told, read)


def _matched(truth: Sequence[Row], found: list[Row]) -> list[Row]:
    """For each true row the found one that goes with it, () where none is left: the best pairing of all."""
    if not found:
        return [()] * len(truth)
    agree = np.array([[sum(t == f for t, f in zip(left, other, strict=False)) for other in found] for left in truth])
    pairs = dict(zip(*linear_sum_assignment(-agree), strict=True))
    return [found[pairs[i]] if i in pairs else () for i in range(len(truth))]


def _places(truth: Row, found: Row) -> list[tuple[int, int | None]]:
    return [(token, found[i] if i < len(found) else None) for i, token in enumerate(truth)]


def _spoken(bench: Bench, rows: Sequence[Row]) -> list[Row]:
    """Rows without the tokens that every row has, such as the one it begins with."""
    special = set(bench.base.tokenizer.all_special_ids)
    return [tuple(token for token in row if token not in special) for row in rows]


def _text(bench: Bench, row: Row) -> str:
    return str(bench.base.tokenizer.decode(list(row), skip_special_tokens=True))
