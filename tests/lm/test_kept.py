"""Kept states: the model that begins at them says what the whole model says, and later runs find them on the disk."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from foedus.errors import ModelError
from foedus.lm import kept as room
from foedus.lm.adapters import Frozen, Full, LoRA, attach, load_params, params_of, save_adapter
from foedus.lm.bench import Bench
from foedus.lm.clipping import Clipping
from foedus.lm.features import features
from foedus.lm.heads import attach_head, width
from foedus.lm.kept import keep
from foedus.lm.load import load_base
from foedus.lm.objectives import make_objective
from foedus.lm.terms import Goal, Topic

from ..conftest import WORDS, sentences

LORA = LoRA(rank=4, blocks=1)


@pytest.fixture(autouse=True)
def small_tables(monkeypatch):
    monkeypatch.setattr(room, "CAPACITY", 1 << 15)


def prepared(folder=None, adapter=LORA):
    """A bench and an encoded text; from kept states where there is a folder for them."""
    base, objective = load_base("tiny:llama"), make_objective("causal-lm", 24, topics=tuple(WORDS))
    attach(base, adapter, 0)
    attach_head(base, "topics", (width(base), len(WORDS)), 0)
    objective = keep(base, objective, folder) if folder else objective
    text = [text for domain in WORDS for text in sentences(domain, 4)]
    labels = [domain for domain in WORDS for _ in range(4)]
    encoded = objective.encode(pa.table({"text": text, "label": labels}), base.tokenizer)
    return Bench(base, objective, precision="fp32"), encoded


def moved(bench) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(1)
    return {name: draw.normal(0, 0.05, x.shape).astype(np.float32) for name, x in bench.start().items()}


@pytest.fixture
def both(tmp_path):
    return prepared(), prepared(tmp_path / "states")


def test_losses_gradients_and_scores_are_those_of_the_whole_model(both):
    found = []
    for bench, encoded in both:
        params, batch = moved(bench), bench.objective.collate(encoded, range(8), 0)
        leaves = {name: x.detach() for name, x in bench.leaves([params]).items()}
        clipping = Clipping((1.0,), dict.fromkeys(leaves, 0))
        for goal in (Goal(), Goal(terms=(Topic(0.5),))):
            sums = bench.clipped(leaves, [batch], [torch.arange(8)], [clipping], goals=[goal])
            found.append((sums.losses, sums.norms[0], *(sums.gradients[name] for name in sorted(leaves))))
        found[-1] += (torch.from_numpy(bench.scores(params, batch)["nll"]), bench.see(params, batch).features())
    for whole, kept in zip(found[:2], found[2:], strict=True):
        for a, b in zip(whole, kept, strict=True):
            torch.testing.assert_close(a, b, rtol=0.02, atol=5e-3)  # kept states are bfloat16


def test_parameters_keep_their_names_and_the_adapter_fits_the_whole_model(both, tmp_path):
    (whole, _), (kept, _) = both
    params = moved(kept)
    assert list(params) == list(moved(whole))
    save_adapter(kept.base, LORA, params, tmp_path / "adapter", "")
    base = load_base("tiny:llama")
    attach(base, LORA, 0)
    attach_head(base, "topics", (width(base), len(WORDS)), 0)
    load_params(base.model, {name: x for name, x in params.items()})
    loaded = params_of(base.model)
    assert all(np.array_equal(loaded[name], x) for name, x in params.items())


def test_labels_are_tokens_and_not_places(both):
    batches = [bench.objective.collate(encoded, range(6), 0) for bench, encoded in both]
    assert torch.equal(batches[0]["labels"], batches[1]["labels"])
    assert not torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])


def test_a_row_is_computed_when_it_is_first_read_and_found_by_later_runs(tmp_path, monkeypatch):
    bench, first = prepared(tmp_path)
    states = bench.objective.states
    assert states.filled.sum() == states.lone and first.places.values.min() >= states.lone
    bench.objective.collate(first, [2, 0], 0)
    assert states.filled.sum() == states.lone + 2
    monkeypatch.setattr(room.States, "_states", None)  # nothing is computed any more
    bench, second = prepared(tmp_path)
    assert np.array_equal(first.places.values, second.places.values)
    bench.objective.collate(second, [0, 2], 0)
    with pytest.raises(TypeError):
        bench.objective.collate(second, [1], 0)


def test_a_row_whose_states_were_not_written_is_not_taken_for_filled(tmp_path, monkeypatch):
    bench, encoded = prepared(tmp_path)
    states, place = bench.objective.states, int(encoded.places[0][0])
    with monkeypatch.context() as broken:
        broken.setattr(room.States, "_states", None)
        with pytest.raises(TypeError):
            bench.objective.collate(encoded, [0], 0)
    assert not states.filled[place]
    bench.objective.collate(encoded, [0], 0)
    assert states.filled[place] and states.table[place].any()


def test_not_even_rounding_depends_on_the_company_a_row_is_read_in(tmp_path):
    alone, together = prepared(tmp_path / "alone"), prepared(tmp_path / "together")
    for rows, (bench, encoded) in ((([0], [1], [2]), alone), (([2, 1, 0],), together)):
        for some in rows:
            bench.objective.collate(encoded, some, 0)
    (a, x), (b, y) = ((bench.objective.states.table, encoded) for bench, encoded in (alone, together))
    assert all(torch.equal(a[x.places[row]], b[y.places[row]]) for row in range(3))


def test_where_company_changes_a_bit_rows_go_one_by_one(tmp_path, monkeypatch):
    bench, encoded = prepared(tmp_path / "alone")
    right, seen = room.States._through, []

    def rounding_by_company(self, rows):
        seen.append(len(rows))
        return right(self, rows) + (len(rows) - 1)

    monkeypatch.setattr(room.States, "_through", rounding_by_company)
    states, rows = bench.objective.states, np.stack([np.arange(4), np.arange(1, 5)])
    assert torch.equal(states._states(rows), torch.cat([right(states, row[None]) for row in rows]))
    assert seen == [2, 1, 1, 1]


def test_rows_of_one_length_go_through_the_blocks_together(tmp_path, monkeypatch):
    bench, encoded = prepared(tmp_path)
    right, seen = room.States._through, []
    monkeypatch.setattr(room.States, "_through", lambda self, rows: seen.append(rows.shape) or right(self, rows))
    bench.objective.ready(encoded, range(len(encoded)))
    assert max(rows for rows, _ in seen) > 1
    seen.clear()
    bench.objective.collate(encoded, range(len(encoded)), 0)
    assert not seen


def test_two_processes_that_fill_at_once_share_the_work(tmp_path, monkeypatch):
    (one, text), (other, _) = prepared(tmp_path), prepared(tmp_path)
    right, rows = room.States._states, []

    def while_another_works(self, some):
        rows.append(len(some))
        if len(rows) == 1:
            other.objective.ready(text, range(len(text)))
        return right(self, some)

    monkeypatch.setattr(room, "TOGETHER", 2)
    monkeypatch.setattr(room.States, "_states", while_another_works)
    one.objective.ready(text, range(len(text)))
    different = len({int(row[0]) for row in text.places})
    assert sum(rows) == different + rows[0]  # what both were at


def test_rows_of_the_same_tokens_share_a_place_and_others_do_not(tmp_path):
    bench, encoded = prepared(tmp_path)
    again = bench.objective.encode(
        pa.table({"text": ["new words", "new words"], "label": ["", ""]}), bench.base.tokenizer
    )
    assert np.array_equal(again.places[0], again.places[1])
    assert not set(again.places.values) & set(encoded.places.values)


def test_an_entry_that_a_crash_tore_is_written_again(tmp_path):
    _, whole = prepared(tmp_path)
    (index,) = tmp_path.glob("*/index")
    index.write_bytes(index.read_bytes()[:-5])
    _, again = prepared(tmp_path)
    assert index.stat().st_size % room.ENTRY.itemsize == 0
    assert np.array_equal(whole.places.values, again.places.values)


def test_a_full_table_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "LONE", 50)
    monkeypatch.setattr(room, "CAPACITY", 60)
    with pytest.raises(ModelError, match="at most 60 tokens"):
        prepared(tmp_path)


@pytest.mark.parametrize("adapter", [Full(), LoRA(rank=2)])
def test_a_model_that_is_trained_from_its_first_block_on_is_refused(adapter, tmp_path):
    with pytest.raises(ModelError, match="blocks below"):
        prepared(tmp_path, adapter)


def test_other_objectives_and_families_are_refused(tmp_path):
    base = load_base("tiny:bert", "masked-lm")
    attach(base, LORA, 0)
    with pytest.raises(ModelError, match="Llama"):
        keep(base, make_objective("masked-lm", 24), tmp_path)


def test_texts_cannot_be_shown_to_a_model_that_begins_at_kept_states(tmp_path):
    bench, _ = prepared(tmp_path)
    with pytest.raises(ModelError, match="kept states"):
        features(bench.base, ["some text"])


def test_blocks_are_counted_from_the_last(tmp_path):
    bench, _ = prepared()
    blocks = {name.split(".")[4] for name in bench.start() if "lora" in name}
    assert blocks == {"1"}


def test_a_frozen_base_may_begin_where_another_is_trained_and_so_share_its_states(tmp_path):
    names = []
    for adapter in (LORA, Frozen()):
        base = load_base("tiny:llama")
        attach(base, adapter, 0)
        keep(base, make_objective("causal-lm", 24), tmp_path, last=1)
        names.append(sorted(folder.name for folder in tmp_path.iterdir()))
    assert names[0] == names[1] and len(names[0]) == 1
