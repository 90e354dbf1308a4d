"""From text to targets: every token once, every byte once, and labels where the models expect them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foedus.errors import DataError, ModelError
from foedus.lm.load import load_base
from foedus.lm.objectives import IGNORE, Encoded, Objective, concat, make_objective
from foedus.lm.tiny import FAMILIES, tiny_tokenizer

LABELS = ("no", "yes")
TEXTS = ["The patient had a fever. " * 9, "中文 🙂 é and more", "", "x", "the court " * 40]
TABLE = pa.table(
    {
        "text": TEXTS,
        "target": ["fever", "🙂 yes", "nothing", "", "appeal " * 30],
        "label": ["no", "yes", "yes", "no", "no"],
        "domain": ["med", "misc", None, "misc", "law"],
    }
)
PLAIN = TABLE.drop_columns(["target", "label"])


def encode(task: str, family: str, table: pa.Table = PLAIN, length: int = 16) -> tuple[Objective, Encoded]:
    objective = make_objective(task, length, LABELS)
    return objective, objective.encode(table, tiny_tokenizer(family))


# ---- causal-lm ----


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_token_but_a_documents_first_is_a_target_exactly_once(family):
    _, encoded = encode("causal-lm", family)
    tokenizer = tiny_tokenizer(family)
    for document, text in enumerate(TEXTS):
        body = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        whole = body if family == "llama" else body[1:]  # a tiny Llama opens with <s>, which is then the first
        rows = [row for row in range(len(encoded)) if encoded.documents[row] == document]
        found = [int(t) for row in rows for t in encoded.inputs[row][encoded.first[row] :]]
        assert found == whole
        assert [int(encoded.targets[row]) for row in rows] == [len(encoded.inputs[r]) - encoded.first[r] for r in rows]


def test_a_window_begins_with_the_last_token_of_the_one_before():
    _, encoded = encode("causal-lm", "gpt2", pa.table({"text": ["abcdefghij" * 9]}))
    assert len(encoded) > 3
    for row in range(1, len(encoded)):
        assert encoded.inputs[row][0] == encoded.inputs[row - 1][-1] and encoded.first[row] == 1
    assert all(len(encoded.inputs[row]) == 16 for row in range(len(encoded) - 1))


def test_every_window_opens_as_the_tokenizer_opens_a_text():
    _, encoded = encode("causal-lm", "llama", pa.table({"text": ["abcdefghij" * 9]}))
    assert all(encoded.inputs[row][0] == 1 for row in range(len(encoded)))
    for row in range(1, len(encoded)):
        assert encoded.inputs[row][1] == encoded.inputs[row - 1][-1]
        assert list(encoded.first[:2]) == [1, 2]


def test_the_loss_of_windows_is_the_loss_of_the_models_own_labels():
    base = load_base("tiny:gpt2")
    objective = make_objective("causal-lm", 16)
    encoded = objective.encode(PLAIN, base.tokenizer)
    batch = objective.collate(encoded, range(len(encoded)), 0)
    with torch.no_grad():
        out = base.model(**batch)
    said, meant = objective.align(out.logits, batch["labels"])
    assert len(meant) == encoded.tokens
    assert torch.allclose(torch.nn.functional.cross_entropy(said, meant), out.loss, atol=1e-6)


def test_a_document_with_nothing_to_predict_has_no_row():
    _, without = encode("causal-lm", "gpt2", pa.table({"text": ["", "a", ""]}))
    assert list(without.documents) == [1] and without.tokens == 1  # "a", then the end
    _, led = encode("causal-lm", "llama", pa.table({"text": [""]}))
    assert led.tokens == 1  # the end, said after <s>
    _, nothing = encode("causal-lm", "gpt2", pa.table({"text": pa.array([], pa.string())}))
    assert len(nothing) == 0 and nothing.tokens == 0 and nothing.domains == ()


def test_with_a_target_column_only_the_answer_is_asked_for():
    table = TABLE.drop_columns("label")
    tokenizer = tiny_tokenizer("llama")
    objective, encoded = encode("causal-lm", "llama", table)
    for document, answer in enumerate(table["target"].to_pylist()):
        rows = [row for row in range(len(encoded)) if encoded.documents[row] == document]
        found = [int(t) for row in rows for t in encoded.inputs[row][encoded.first[row] :]]
        assert found == [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        assert sum(encoded.bytes[row] for row in rows) == len(answer.encode())
    first = encoded.inputs[0]
    assert (encoded.targets > 0).all() and (encoded.documents == 0).sum() == 1
    assert len(first) == 16 and first[0] == 1  # of a long question the end is kept, opened as a text is
    asked = tokenizer(TEXTS[0] + "\n", add_special_tokens=False)["input_ids"]
    assert list(first[1 : encoded.first[0]]) == asked[-(encoded.first[0] - 1) :]
    batch = objective.collate(encoded, [0], 0)
    assert (batch["labels"] != IGNORE).sum() == encoded.targets[0]


# ---- all tasks ----

CASES = [
    *(("causal-lm", family) for family in ("llama", "gpt2", "gpt_neox", "falcon")),
    *(("masked-lm", family) for family in ("bert", "roberta", "albert")),
    *(("seq2seq", family) for family in ("t5", "bart")),
    *(("sequence-classification", family) for family in FAMILIES),
]


@pytest.mark.parametrize(("task", "family"), CASES)
def test_an_encoded_row_knows_its_document_its_domain_and_its_targets(task, family):
    objective, encoded = encode(task, family, TABLE if task in ("seq2seq", "sequence-classification") else PLAIN)
    batch = objective.collate(encoded, range(len(encoded)), 5)
    assert encoded.inputs.values.dtype == encoded.answers.values.dtype == np.int32
    assert encoded.domains == tuple(["med", "misc", "", "misc", "law"][d] for d in encoded.documents)
    assert all(1 <= len(encoded.inputs[row]) <= 16 for row in range(len(encoded)))
    labels = batch["labels"] if task == "sequence-classification" else batch["labels"].reshape(len(encoded), -1)
    counts = torch.ones(len(encoded)) if task == "sequence-classification" else (labels != IGNORE).sum(1)
    assert counts.tolist() == encoded.targets.tolist() and encoded.tokens == sum(encoded.targets)


@pytest.mark.parametrize(("task", "family"), CASES)
def test_a_batch_fits_the_model_and_padding_changes_nothing(task, family):
    base = load_base(f"tiny:{family}", task, labels=LABELS)
    objective = make_objective(task, 16, LABELS)
    table = TABLE if task in ("seq2seq", "sequence-classification") else PLAIN
    encoded = objective.encode(table, base.tokenizer)

    def losses(rows) -> torch.Tensor:
        batch = objective.collate(encoded, rows, 5)
        assert {x.dtype for x in batch.values()} == {torch.int64}
        with torch.no_grad():
            said, meant = objective.align(base.model(**batch).logits, batch["labels"])
        return torch.nn.functional.cross_entropy(said, meant, reduction="none")

    together = losses(range(len(encoded)))
    alone = torch.cat([losses([row]) for row in range(len(encoded))])
    assert len(together) == encoded.tokens and torch.allclose(together, alone, atol=2e-5)


@pytest.mark.parametrize(("task", "family"), [("causal-lm", "llama"), ("causal-lm", "gpt2"), ("masked-lm", "bert")])
@given(texts=st.lists(st.text(max_size=60), max_size=4), length=st.integers(8, 40))
@settings(max_examples=40, deadline=None)
def test_the_bytes_of_a_documents_rows_add_up_to_the_document(task, family, texts, length):
    _, encoded = encode(task, family, pa.table({"text": pa.array(texts, pa.string())}), length)
    for document, text in enumerate(texts):
        rows = encoded.documents == document
        assert encoded.bytes[rows].sum() == len(text.encode()) and (encoded.bytes >= 0).all()


def test_a_million_characters_are_encoded_in_seconds():
    _, encoded = encode("causal-lm", "gpt2", pa.table({"text": ["the patient é " * 70_000]}))
    assert encoded.bytes.sum() == 70_000 * 15


# ---- masked-lm ----


def test_masks_depend_on_the_seed_and_the_row_and_on_nothing_else():
    objective, encoded = encode("masked-lm", "bert")
    one = objective.collate(encoded, [0, 1, 2], 7)
    again = objective.collate(encoded, [2, 0], 7)
    width = again["labels"].shape[1]
    assert torch.equal(again["labels"], one["labels"][[2, 0], :width])
    assert torch.equal(again["input_ids"], one["input_ids"][[2, 0], :width])
    assert not torch.equal(objective.collate(encoded, [0, 1, 2], 8)["labels"], one["labels"])


def test_of_the_masked_tokens_eighty_percent_become_the_mask_and_ten_another_token():
    text = "the patient had a fever and the court heard an appeal " * 400
    objective, encoded = encode("masked-lm", "bert", pa.table({"text": [text]}), 128)
    rows = range(len(encoded))
    batch = objective.collate(encoded, rows, 3)
    chosen = batch["labels"] != IGNORE
    original = batch["labels"][chosen]
    shown = batch["input_ids"][chosen]
    assert abs(chosen.sum() / batch["attention_mask"].sum() - 0.15) < 0.01
    assert abs((shown == encoded.words.mask).float().mean() - 0.8) < 0.03
    assert abs((shown == original).float().mean() - 0.1) < 0.03
    ends = batch["attention_mask"].sum(1) - 1
    assert not chosen[:, 0].any() and not chosen[torch.arange(len(encoded)), ends].any()  # <s> and </s> are not asked
    untouched = objective.collate(encoded, rows, 4)["input_ids"]
    assert torch.equal(encoded_ids(encoded), torch.where(chosen, batch["labels"], batch["input_ids"]))
    assert untouched.shape == batch["input_ids"].shape


def encoded_ids(encoded: Encoded) -> torch.Tensor:
    width = max(len(encoded.inputs[row]) for row in range(len(encoded)))
    out = torch.full((len(encoded), width), encoded.words.pad)
    for row in range(len(encoded)):
        out[row, : len(encoded.inputs[row])] = torch.from_numpy(encoded.inputs[row].copy())
    return out


def test_every_row_has_a_masked_token_however_short():
    objective, encoded = encode("masked-lm", "roberta", pa.table({"text": ["a", "ab", ""]}))
    assert list(encoded.targets) == [1, 1] and list(encoded.documents) == [0, 1]
    assert (objective.collate(encoded, [0, 1], 0)["labels"] != IGNORE).sum(1).tolist() == [1, 1]


# ---- sequence-classification and seq2seq ----


def test_labels_are_numbered_in_the_order_given():
    objective = make_objective("sequence-classification", 16, ("yes", "no"))
    encoded = objective.encode(TABLE, tiny_tokenizer("bert"))
    assert objective.collate(encoded, range(5), 0)["labels"].tolist() == [1, 0, 0, 1, 1]


def test_an_unknown_label_is_refused_with_the_nearest_known_one():
    objective = make_objective("sequence-classification", 16, ("now", "yes"))
    with pytest.raises(DataError, match='"no" in row 0.*Did you mean "now"'):
        objective.encode(TABLE, tiny_tokenizer("bert"))


def test_the_spelling_of_a_special_token_in_a_text_to_classify_is_only_text():
    table = pa.table({"text": ["a</s>b <pad>", "ab"], "label": ["no", "yes"]})
    for family in ("bart", "gpt2"):
        base = load_base(f"tiny:{family}", "sequence-classification", labels=LABELS)
        objective = make_objective("sequence-classification", 32, LABELS)
        encoded = objective.encode(table, base.tokenizer)
        special = set(base.tokenizer.all_special_ids)
        ends = 2 if family == "bart" else 0
        assert sum(int(token) in special for token in encoded.inputs[0]) == ends
        with torch.no_grad():  # BART's head insists on as many ends in every row
            assert base.model(**objective.collate(encoded, [0, 1], 0)).logits.shape == (2, 2)


def test_a_target_is_closed_as_the_tokenizer_closes_a_text_and_padded_with_no_target():
    objective, encoded = encode("seq2seq", "t5", TABLE)
    labels = objective.collate(encoded, range(5), 0)["labels"]
    tokenizer = tiny_tokenizer("t5")
    assert labels[0][labels[0] != IGNORE].tolist() == tokenizer("fever")["input_ids"]
    assert labels[3].tolist() == [tokenizer.eos_token_id, *[IGNORE] * (labels.shape[1] - 1)]
    assert labels.shape[1] == 16 and encoded.bytes[1] == len("🙂 yes".encode())
    assert 0 < encoded.bytes[4] < len(("appeal " * 30).encode())  # cut at 16 tokens: only what they spell


# ---- refusals ----


@pytest.mark.parametrize(
    ("task", "column"), [("causal-lm", "text"), ("sequence-classification", "label"), ("seq2seq", "target")]
)
def test_a_missing_column_is_refused_by_name(task, column):
    objective = make_objective(task, 16, LABELS)
    with pytest.raises(DataError, match=f'a column "{column}"'):
        objective.encode(TABLE.drop_columns(column), tiny_tokenizer("bert"))


def test_rows_longer_than_the_model_can_take_are_refused():
    with pytest.raises(ModelError, match="at most 512 tokens.*max_length=1024"):
        make_objective("causal-lm", 1024).encode(PLAIN, tiny_tokenizer("gpt2"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("causal", 16), 'Did you mean "causal-lm"'),
        (("causal-lm", 7), "max_length=7"),
        (("causal-lm", 8193), "max_length=8193"),
        (("sequence-classification", 16), "at least two labels"),
        (("sequence-classification", 16, ("a", "a")), "all different"),
    ],
)
def test_an_objective_out_of_range_is_refused(arguments, message):
    with pytest.raises(ModelError, match=message):
        make_objective(*arguments)


# ---- several silos' rows as one ----


def test_concatenated_rows_are_the_parts_in_order_and_documents_stay_apart():
    _, a = encode("causal-lm", "llama")
    _, b = encode("causal-lm", "llama", pa.table({"text": ["eight nine ten"], "domain": ["law"]}))
    both = concat([a, b])
    assert len(both) == len(a) + len(b) and both.tokens == a.tokens + b.tokens
    assert [list(both.inputs[i]) for i in range(len(both))] == [
        list(x.inputs[i]) for x in (a, b) for i in range(len(x))
    ]
    assert both.domains == a.domains + b.domains and both.documents[len(a)] == a.documents.max() + 1
