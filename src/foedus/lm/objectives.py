"""From text to targets: how examples become rows of tokens, rows a batch, and which positions of a batch are predicted.

One `Objective` a task; all share one shape. `encode` runs once over a silo's examples, `collate` once a step, and
`align` pairs what the model says at a position with what should have been said there. Read `bench.py` next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice

import numpy as np
import pyarrow as pa
import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase

from ..data.missing import Missing
from ..errors import DataError, ModelError, one_of
from ..seeds import derive, generator

IGNORE = -100  # the label of a position that is not a target
MASKED, BY_MASK, BY_OTHER = 0.15, 0.8, 0.1  # Devlin et al. 2019, section 3.1


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths in one int32 array; row i is `values[bounds[i]:bounds[i + 1]]`."""

    values: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.bounds[row] : self.bounds[row + 1]]

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Ragged:
        bounds = np.fromiter(accumulate(map(len, rows), initial=0), np.int64, len(rows) + 1)
        values = np.fromiter((token for row in rows for token in row), np.int32, int(bounds[-1]))
        return cls(values, bounds)


@dataclass(frozen=True)
class Words:
    """What collating must know about a tokenizer: ids of padding and mask (−1 without one), how many ids there are, and
    how many tokens it puts before and after a text.
    """

    pad: int
    mask: int
    size: int
    before: int
    after: int


@dataclass(frozen=True)
class Encoded:
    """Examples as rows of tokens; `len()` is the number of rows. All per-row arrays have that length.

    `inputs`: token ids. `first`: where in a row the targets begin (causal-lm). `answers`: the decoder's tokens
    (seq2seq) or the number of the label (sequence-classification). `targets`: how many positions of the row are
    predicted. `bytes`: UTF-8 bytes of the text that the row's targets spell; over the rows of a document they add up
    to the whole document. `documents`: the row of the table that a row comes from. `domains`: that document's domain,
    "" without one. `topics`: that document's place among `Objective.topics`, −1 where it is unknown. `silent`: for each
    of `inputs.values`, whether it is no target although it could be; None where all are. `places`: what the model is
    shown for each token instead of its id, where states of frozen blocks are kept (`kept.py`).
    """

    inputs: Ragged
    answers: Ragged
    first: np.ndarray
    targets: np.ndarray
    bytes: np.ndarray
    documents: np.ndarray
    domains: tuple[str, ...]
    words: Words
    topics: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    silent: np.ndarray | None = None
    places: Ragged | None = None

    def __post_init__(self) -> None:
        if not len(self.topics):
            object.__setattr__(self, "topics", np.full(len(self.inputs), -1))

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def tokens(self) -> int:
        """The number of targets in all."""
        return int(self.targets.sum())

    def take(self, rows: np.ndarray) -> Encoded:
        """Some of the rows, in this order; what is kept or lost is decided afterwards."""
        arrays = {name: getattr(self, name)[rows] for name in ("first", "targets", "bytes", "documents", "topics")}
        inputs, answers = (Ragged.of([part[row].tolist() for row in rows]) for part in (self.inputs, self.answers))
        return replace(self, inputs=inputs, answers=answers, domains=tuple(self.domains[row] for row in rows), **arrays)

    def without_topics(self) -> Encoded:
        """The same rows, no topic of which is known."""
        return replace(self, topics=np.full(len(self), -1))

    def without(self, missing: Missing, texts: Sequence[str]) -> Encoded:
        """The same rows after some labels were lost. `texts`: of the documents, as they were encoded. Of masked-lm,
        `targets` are then what would have been asked for.
        """
        topics = np.where(missing.topics(texts)[self.documents], -1, self.topics)
        if missing.kind == "topic" or not len(self):
            return replace(self, topics=topics)
        window = _within(self.documents)
        lengths = np.diff(self.inputs.bounds)
        where = zip(self.documents, window, lengths, strict=True)
        lost = [missing.tokens(texts[doc], int(place), int(length)) for doc, place, length in where]
        left = [int((~x[first:]).sum()) for x, first in zip(lost, self.first, strict=True)]
        return replace(self, topics=topics, silent=np.concatenate(lost), targets=np.minimum(self.targets, left))

    def asked(self, row: int, labels: np.ndarray) -> np.ndarray:
        """The labels of a row without those that were lost."""
        if self.silent is None:
            return labels
        return np.where(self.silent[self.inputs.bounds[row] : self.inputs.bounds[row + 1]], IGNORE, labels)


@dataclass(frozen=True)
class Objective:
    """One task: how to encode, collate and align. Make it with `make_objective`.

    `max_length`: tokens in a row, special ones included. `labels`: of sequence-classification, in the order of the
    classes. `topics`: what the documents of a language model are about (their column `label`), in order. `windows`:
    only so many of the first rows of a document, ≥ 1; None for all.
    """

    task: str
    max_length: int
    labels: tuple[str, ...] = ()
    topics: tuple[str, ...] = ()
    windows: int | None = None

    def encode(self, examples: pa.Table, tokenizer: PreTrainedTokenizerBase) -> Encoded:
        """The examples (columns `text`, and `target`, `label`, `domain` where the task has them) as rows of tokens.

        causal-lm: a document is tokenised, closed by the end token, and cut into windows of `max_length`; every token
        but the first is a target exactly once, so a window begins with the last token of the one before. Every window
        opens as the tokenizer opens a text. With a `target` column only the target's tokens are targets, and of a
        text that is too long the end is kept. masked-lm: consecutive windows. The other two: one row a document, cut
        at `max_length`. A document of which nothing is left to predict has no row. Raises `DataError` for a missing
        column or an unknown label, `ModelError` for a `max_length` that the model cannot take.
        """
        if self.max_length > tokenizer.model_max_length:
            came, do = f"max_length={self.max_length}", "Lower model.max_length."
            raise ModelError(f"at most {tokenizer.model_max_length} tokens in a row", came, do)
        encoded = _ENCODERS[self.task](self, _columns(self, examples), tokenizer)
        if self.windows is not None:
            encoded = encoded.take(np.flatnonzero(_within(encoded.documents) < self.windows))
        return replace(encoded, topics=self._numbers(examples)[encoded.documents]) if self.topics else encoded

    def _numbers(self, examples: pa.Table) -> np.ndarray:
        """The place of each document's label among the topics; −1 where it is none of them."""
        place = {topic: i for i, topic in enumerate(self.topics)}
        if "label" not in examples.column_names:
            came = f"columns {', '.join(examples.column_names) or 'none'}"
            raise DataError('a column "label" for topics', came, "Name it as data.label in the treaty.")
        return np.array([place.get(label, -1) for label in _strings(examples, "label")], np.int64)

    def ready(self, encoded: Encoded, rows: Sequence[int]) -> None:
        """Does now, for all of these rows at once, what `collate` would else do for a few at a time: nothing here."""

    def collate(self, encoded: Encoded, rows: Sequence[int], generator_seed: int) -> dict[str, torch.Tensor]:
        """A batch of these rows: `input_ids` and `attention_mask` (b, t), `labels` (b, t) or (b,), all int64.

        Padded on the right to the longest row. masked-lm draws its masks here, from (`generator_seed`, row): they do
        not depend on the other rows of the batch. In causal-lm a label stands at its own token; `align` shifts. With
        topics also `topics`, `rows` and `draws` (b,): the row's topic, its number, and the seed of what is drawn for
        it, none of which the model is shown.
        """
        ids = [encoded.inputs[row] for row in rows]
        shown = ids if encoded.places is None else [encoded.places[row] for row in rows]
        batch = {
            "input_ids": _padded(shown, encoded.words.pad),
            "attention_mask": _padded([np.ones_like(x) for x in ids], 0),
        } | self._beside(encoded, rows, generator_seed)
        if self.task == "causal-lm":
            labels = [encoded.asked(r, _from(x, encoded.first[r])) for x, r in zip(ids, rows, strict=True)]
            return batch | {"labels": _padded(labels, IGNORE)}
        if self.task == "sequence-classification":
            return batch | {"labels": torch.tensor([int(encoded.answers[row][0]) for row in rows])}
        if self.task == "seq2seq":
            return batch | {"labels": _padded([encoded.answers[row] for row in rows], IGNORE)}
        masked = [
            _mask(x, generator(generator_seed, "mask", int(r)), encoded.words) for x, r in zip(ids, rows, strict=True)
        ]
        inputs = [x for x, _ in masked]
        labels = [encoded.asked(r, x) for (_, x), r in zip(masked, rows, strict=True)]
        return batch | {"input_ids": _padded(inputs, encoded.words.pad), "labels": _padded(labels, IGNORE)}

    def _beside(self, encoded: Encoded, rows: Sequence[int], seed: int) -> dict[str, torch.Tensor]:
        if not self.topics:
            return {}
        draws = [derive(seed, "row", int(row)) >> 1 for row in rows]  # int64 has 63 bits for it
        return {
            "topics": torch.from_numpy(encoded.topics[np.asarray(rows, np.int64)]),
            "rows": torch.tensor([int(row) for row in rows]),
            "draws": torch.tensor(draws),
        }

    def align(self, states: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is said at the p targets, (p, d), and what should be, (p,), row after row.

        `states`: (b, t, d), hidden states or logits alike; a causal model says at t what stands at t + 1. For
        sequence-classification `states` are the logits (b, C), and come back with their labels.
        """
        if self.task == "sequence-classification":
            return states, labels
        if self.task == "causal-lm":
            states, labels = states[:, :-1], labels[:, 1:]
        chosen = labels != IGNORE
        return states[chosen], labels[chosen]


def make_objective(
    task: str, max_length: int, labels: Sequence[str] = (), topics: Sequence[str] = (), windows: int | None = None
) -> Objective:
    """The objective of `task`, with rows of at most `max_length` (8…8192) tokens; classification needs its `labels`,
    and language models may have `topics`.
    """
    if task not in _ENCODERS:
        raise ModelError("a known task", f'task="{task}"', one_of(task, _ENCODERS))
    if not 8 <= max_length <= 8192:
        raise ModelError("8 ≤ max_length ≤ 8192", f"max_length={max_length}", "128 suits short texts.")
    classifies = task == "sequence-classification"
    if classifies and (len(labels) < 2 or len(set(labels)) < len(labels)):
        raise ModelError(
            "at least two labels, all different", f"labels={list(labels)}", "Name them in the order to use."
        )
    if topics and task not in ("causal-lm", "masked-lm"):
        raise ModelError("topics beside a language model", f'task="{task}"', "Classify, or learn topics, not both.")
    return Objective(task, max_length, tuple(labels) if classifies else (), tuple(topics), windows)


def concat(parts: Sequence[Encoded]) -> Encoded:
    """The rows of all parts, one part after another; they share a tokenizer."""

    def ragged(name: str) -> Ragged:
        pieces: list[Ragged] = [getattr(part, name) for part in parts]
        lengths = np.concatenate([np.diff(piece.bounds) for piece in pieces])
        return Ragged(np.concatenate([piece.values for piece in pieces]), np.concatenate([[0], np.cumsum(lengths)]))

    names = ("first", "targets", "bytes", "topics")
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    if any(part.silent is not None for part in parts):
        heard = [np.zeros(len(part.inputs.values), bool) if part.silent is None else part.silent for part in parts]
        arrays["silent"] = np.concatenate(heard)
    documents = np.concatenate([part.documents + offset for part, offset in zip(parts, _offsets(parts), strict=True)])
    if all(part.places is not None for part in parts):
        arrays["places"] = ragged("places")
    domains = tuple(domain for part in parts for domain in part.domains)
    return Encoded(
        ragged("inputs"), ragged("answers"), **arrays, documents=documents, domains=domains, words=parts[0].words
    )


def _within(documents: np.ndarray) -> np.ndarray:
    """The place of each row among those of its document, which stand together."""
    starts = np.flatnonzero(np.r_[True, documents[1:] != documents[:-1]])
    return np.arange(len(documents)) - np.repeat(starts, np.diff(np.r_[starts, len(documents)]))


def _offsets(parts: Sequence[Encoded]) -> list[int]:
    ends = np.cumsum([int(part.documents.max(initial=-1)) + 1 for part in parts])
    return [0, *map(int, ends[:-1])]


# ---- encoding ----


@dataclass(frozen=True)
class _Columns:
    text: list[str]
    second: list[str]  # target or label; [] when the task has none
    domain: list[str]


@dataclass
class _Rows:
    """Rows as they are found, one append a row."""

    inputs: list[Sequence[int]]
    answers: list[Sequence[int]]
    facts: list[tuple[int, int, int, int]]  # first, targets, bytes, document

    @classmethod
    def none(cls) -> _Rows:
        return cls([], [], [])

    def add(self, inputs: Sequence[int], answers: Sequence[int], first: int, targets: int, size: int, doc: int) -> None:
        self.inputs.append(inputs)
        self.answers.append(answers)
        self.facts.append((first, targets, size, doc))

    def encoded(self, columns: _Columns, words: Words) -> Encoded:
        first, targets, size, docs = np.array(self.facts, np.int64).reshape(-1, 4).T.copy()
        domains = tuple(columns.domain[doc] for doc in docs)
        return Encoded(Ragged.of(self.inputs), Ragged.of(self.answers), first, targets, size, docs, domains, words)


def _columns(objective: Objective, examples: pa.Table) -> _Columns:
    needed = {"sequence-classification": "label", "seq2seq": "target"}.get(objective.task)
    second = needed or ("target" if objective.task == "causal-lm" and "target" in examples.column_names else None)
    for name in filter(None, ("text", needed)):
        if name not in examples.column_names:
            came = f"columns {', '.join(examples.column_names) or 'none'}"
            raise DataError(f'a column "{name}" for {objective.task}', came, f"Name it as data.{name} in the treaty.")
    has_domain = "domain" in examples.column_names
    domain = _strings(examples, "domain") if has_domain else [""] * examples.num_rows
    return _Columns(_strings(examples, "text"), _strings(examples, second) if second else [], domain)


def _strings(examples: pa.Table, name: str) -> list[str]:
    return [x or "" for x in examples.column(name).to_pylist()]


def _words(tokenizer: PreTrainedTokenizerBase, before: list[int], after: list[int]) -> Words:
    mask = tokenizer.mask_token_id
    return Words(tokenizer.pad_token_id or 0, -1 if mask is None else mask, len(tokenizer), len(before), len(after))


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text: ([CLS], [SEP]), ([BOS], []), …"""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]


@dataclass(frozen=True)
class _Texts:
    """Texts and their tokens."""

    texts: list[str]
    tokens: list[list[int]]
    batch: BatchEncoding

    @classmethod
    def of(cls, texts: list[str], tokenizer: PreTrainedTokenizerBase, *, plain: bool) -> _Texts:
        """`plain`: the spelling of a special token in the text is text, and does not become that token."""
        if not texts:
            return cls([], [], BatchEncoding())
        options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        batch = tokenizer(texts, add_special_tokens=False, split_special_tokens=plain, **options)
        return cls(texts, batch["input_ids"], batch)

    def bytes(self, i: int, start: int, stop: int) -> int:
        """UTF-8 bytes of text i from its token `start` to its token `stop`; what lies between tokens counts too."""
        return len(self.texts[i][self._char(i, start) : self._char(i, stop)].encode())

    def _char(self, i: int, token: int) -> int:
        if token <= 0:
            return 0
        return self.batch.token_to_chars(i, token).start if token < len(self.tokens[i]) else len(self.texts[i])


def _causal(objective: Objective, columns: _Columns, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    before, _ = _around(tokenizer)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    prompts = [text + "\n" for text in columns.text] if columns.second else []
    asked = _Texts.of(prompts, tokenizer, plain=False)
    said = _Texts.of(columns.second or columns.text, tokenizer, plain=False)
    width = objective.max_length - len(before)
    rows = _Rows.none()
    for doc, tokens in enumerate(said.tokens):
        answer = tokens + end
        prompt = asked.tokens[doc][-max(width - len(answer), 1) :] if prompts else []
        body, skip = prompt + answer, len(prompt)
        for start, target, stop in islice(_windows(skip, len(body), width, bool(before)), objective.windows):
            size = said.bytes(doc, target - skip if start else 0, stop - skip)
            rows.add(before + body[start:stop], (), len(before) + target - start, stop - target, size, doc)
    return rows.encoded(columns, _words(tokenizer, before, []))


def _windows(target: int, length: int, width: int, led: bool) -> Iterator[tuple[int, int, int]]:
    """(start, first target, stop) of each window over `length` tokens, the targets beginning at `target`.

    Each target is in exactly one window, with at least one token before it: a special one when the window is `led` by
    some, else one of the document's.

    >>> list(_windows(0, 10, 4, led=False))
    [(0, 1, 4), (3, 4, 7), (6, 7, 10)]
    """
    start, target = 0, target if led else max(target, 1)
    while target < length:
        stop = min(start + width, length)
        yield start, target, stop
        start, target = stop - 1, stop


def _masked(objective: Objective, columns: _Columns, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    if tokenizer.mask_token_id is None:
        raise ModelError("a tokenizer with a mask token", "one without", "Use a base made for masked-lm.")
    before, after = _around(tokenizer)
    texts = _Texts.of(columns.text, tokenizer, plain=True)
    width = objective.max_length - len(before) - len(after)
    rows = _Rows.none()
    for doc, tokens in enumerate(texts.tokens):
        for start in range(0, len(tokens), width):
            ids = tokens[start : start + width]
            size = texts.bytes(doc, start, start + width)
            rows.add(before + ids + after, (), len(before), _masks(len(ids)), size, doc)
    return rows.encoded(columns, _words(tokenizer, before, after))


def _classes(objective: Objective, columns: _Columns, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    before, after = _around(tokenizer)
    texts = _Texts.of(columns.text, tokenizer, plain=True)
    width = objective.max_length - len(before) - len(after)
    classes = {label: i for i, label in enumerate(objective.labels)}
    rows = _Rows.none()
    for doc, label in enumerate(columns.second):
        if label not in classes:
            raise DataError("a label that the treaty names", f'"{label}" in row {doc}', one_of(label, classes))
        inputs = before + texts.tokens[doc][:width] + after
        rows.add(inputs or [tokenizer.eos_token_id or 0], (classes[label],), 0, 1, texts.bytes(doc, 0, width), doc)
    return rows.encoded(columns, _words(tokenizer, before, after))


def _pairs(objective: Objective, columns: _Columns, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    before, after = _around(tokenizer)
    asked = _Texts.of(columns.text, tokenizer, plain=False)
    said = _Texts.of(columns.second, tokenizer, plain=False)
    width = objective.max_length - len(before) - len(after)
    rows = _Rows.none()
    for doc in range(len(columns.text)):
        answer = before + said.tokens[doc][:width] + after
        rows.add(before + asked.tokens[doc][:width] + after, answer, 0, len(answer), said.bytes(doc, 0, width), doc)
    return rows.encoded(columns, _words(tokenizer, before, after))


_ENCODERS: dict[str, Callable[[Objective, _Columns, PreTrainedTokenizerBase], Encoded]] = {
    "causal-lm": _causal,
    "masked-lm": _masked,
    "sequence-classification": _classes,
    "seq2seq": _pairs,
}


# ---- collating ----


def _padded(rows: Sequence[np.ndarray], filler: int) -> torch.Tensor:
    out = np.full((len(rows), max(map(len, rows), default=0)), filler, np.int64)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return torch.from_numpy(out)


def _from(ids: np.ndarray, first: int) -> np.ndarray:
    """Labels of a row whose targets begin at `first`."""
    labels = ids.copy()
    labels[:first] = IGNORE
    return labels


def _masks(length: int) -> int:
    """How many of `length` tokens are masked: 15 %, rounded, at least one (BERT's create_pretraining_data.py)."""
    return max(1, round(MASKED * length))


def _mask(ids: np.ndarray, draw: np.random.Generator, words: Words) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, labels) of one row: of the chosen tokens 80 % become the mask, 10 % another token, 10 % stay."""
    body = np.arange(words.before, len(ids) - words.after)
    chosen = draw.permutation(body)[: _masks(len(body))]
    kind = draw.random(len(chosen))
    other = draw.integers(0, words.size, len(chosen))
    inputs, labels = ids.copy(), np.full_like(ids, IGNORE)
    labels[chosen] = ids[chosen]
    replaced = np.where(kind < BY_MASK, words.mask, np.where(kind < BY_MASK + BY_OTHER, other, ids[chosen]))
    inputs[chosen] = replaced
    return inputs, labels
