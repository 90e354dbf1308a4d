"""Gradient inversion on tiny models: what is recovered from an unprotected gradient, and what stops it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foedus.audit.defences import Defence, gradients, sent
from foedus.audit.inversion import SENTENCE, attack, encode, examples, invert, survey
from foedus.audit.optimise import Optimiser, distance, dummy_gradient
from foedus.audit.rouge import Rouge, rouge
from foedus.audit.span import span_bag, span_check
from foedus.audit.tokens import bag_recall, ranked, token_bag, token_tables
from foedus.errors import ModelError
from foedus.lm.adapters import Full, LoRA, attach
from foedus.lm.bench import Bench
from foedus.lm.load import load_base
from foedus.lm.objectives import make_objective

TEXTS = [SENTENCE, "a fever", "no pain", "her heart is well", "no no no"]
PRIVATE = Defence(clip=1.0, noise=1.0)


def bench_of(name: str, adapter: Full | LoRA, task: str = "causal-lm", precision: str = "fp32") -> Bench:
    base = load_base(name, task)
    attach(base, adapter, 1)
    return Bench(base, make_objective(task, 48), precision=precision)


@pytest.fixture(scope="module")
def benches() -> dict[str, Bench]:
    return {
        "gpt2": bench_of("tiny:gpt2", Full()),
        "llama": bench_of("tiny:llama", Full()),
        "gpt2, LoRA": bench_of("tiny:gpt2", LoRA(rank=32)),
        "llama, LoRA": bench_of("tiny:llama", LoRA(rank=32)),
        "neox": bench_of("tiny:gpt_neox", Full()),
    }


def trained(bench: Bench, size: float = 0.05) -> dict[str, np.ndarray]:
    """Parameters as after some training: B is no longer zero."""
    rng = np.random.default_rng(3)
    return {name: x + np.float32(size) * rng.standard_normal(x.shape, np.float32) for name, x in bench.start().items()}


# ---- the documented example ----


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt2, LoRA", "llama, LoRA", "neox"])
def test_the_documented_sentence_is_read_off_an_unprotected_gradient_and_not_off_a_private_one(benches, name):
    bench = benches[name]
    encoded = encode(bench, TEXTS)
    bare = attack(bench, bench.start(), encoded, [0])
    assert bare.found == (SENTENCE,) and bare.exact == bare.tokens == 1 and bare.rouge == Rouge(1.0, 1.0, 1.0)
    hidden = attack(bench, bench.start(), encoded, [0], defence=PRIVATE)
    assert hidden.exact == 0 and hidden.tokens < 0.2 and hidden.rouge.two == 0


@pytest.mark.parametrize("name", ["gpt2, LoRA", "llama, LoRA"])
def test_an_adapter_that_has_been_trained_gives_the_sentence_away_too(benches, name):
    bench = benches[name]
    encoded = encode(bench, TEXTS)
    assert attack(bench, trained(bench), encoded, [0]).exact == 1
    assert attack(bench, trained(bench), encoded, [0], defence=PRIVATE).tokens < 0.2


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt2, LoRA", "llama, LoRA"])
def test_several_rows_are_recovered_whole_each_in_its_own_right(benches, name):
    bench = benches[name]
    outcome = attack(bench, bench.start(), encode(bench, TEXTS), [1, 2, 3])
    assert outcome.exact == 1 and outcome.batch == 3
    assert sorted(outcome.found) == sorted(TEXTS[1:4]) and outcome.found == outcome.truth


def test_a_text_that_repeats_its_first_word_is_still_found(benches):
    bench = benches["llama"]
    assert attack(bench, bench.start(), encode(bench, TEXTS), [4]).found == ("no no no",)


def test_two_rows_that_are_alike_leave_one_place_empty_and_one_filled(benches):
    bench = benches["gpt2"]
    outcome = attack(bench, bench.start(), encode(bench, ["a fever", "a fever"]), [0, 1])
    assert outcome.found[0] == "a fever" and outcome.exact == 0.5


# ---- what is no defence, and what is ----


@pytest.mark.parametrize("defence", [Defence(clip=0.01), Defence(bits=8), Defence(clip=0.1, bits=12)])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_clipping_and_rounding_are_no_defence(benches, name, defence):
    bench = benches[name]
    assert attack(bench, bench.start(), encode(bench, TEXTS), [0], defence=defence).exact == 1


def test_dropping_small_entries_leaves_tokens_to_be_read(benches):
    bench = benches["llama"]
    encoded = encode(bench, TEXTS)
    thinned = attack(bench, bench.start(), encoded, [0], defence=Defence(keep=0.1), kind="span bag")
    assert thinned.tokens > 0.6


def test_a_little_noise_stops_the_span_but_not_the_token_bag(benches):
    bench = benches["gpt2"]
    encoded, little = encode(bench, TEXTS), Defence(clip=1.0, noise=0.01)
    assert attack(bench, bench.start(), encoded, [0], defence=little).exact == 0
    assert attack(bench, bench.start(), encoded, [0], defence=little, kind="token bag").tokens > 0.7
    assert attack(bench, bench.start(), encoded, [0], defence=PRIVATE, kind="token bag").tokens < 0.3


@pytest.mark.parametrize("rank", [2, 4])
def test_a_rank_below_the_tokens_hides_the_order_from_the_span(rank):
    bench = bench_of("tiny:gpt2", LoRA(rank=rank))
    assert attack(bench, bench.start(), encode(bench, TEXTS), [0]).exact == 0


def test_a_trained_adapter_shows_more_tokens_than_its_rank_since_three_layers_share_an_input():
    bench = bench_of("tiny:llama", LoRA(rank=8))
    encoded = encode(bench, [SENTENCE])
    assert 8 < len(encoded.inputs[0]) - 1 <= 24
    assert attack(bench, trained(bench), encoded, [0]).exact == 1
    assert attack(bench, bench.start(), encoded, [0]).exact == 0  # while B is zero, B's own rank is the limit


def test_a_sum_over_silos_hides_rows_only_once_it_has_more_tokens_than_dimensions(benches):
    bench = benches["gpt2"]
    many = [f"{word} number {i}" for i, word in enumerate("alpha beta gamma delta".split())]
    encoded = encode(bench, ["a fever", "no pain", *many])
    two = attack(bench, bench.start(), encoded, [0], others=[1])
    assert two.exact == 1 and two.batch == 1 and "sum with 1 more" in two.defence
    crowd = attack(bench, bench.start(), encoded, [0], others=[1, 2, 3, 4, 5])
    assert sum(len(encoded.inputs[row]) - 1 for row in range(6)) > 32 and crowd.exact == 0


def test_rows_that_are_much_alike_are_found_although_they_have_more_tokens_than_dimensions(benches):
    bench = benches["gpt2"]
    encoded = encode(bench, [f"patient {i} has a fever" for i in range(8)])
    assert sum(len(encoded.inputs[row]) - 1 for row in range(8)) > 2 * 32
    assert attack(bench, bench.start(), encoded, range(8)).tokens > 0.8


def test_when_the_work_is_spent_the_rows_found_so_far_are_given(benches):
    bench = benches["llama"]
    encoded = encode(bench, [SENTENCE])
    whole = tuple(map(int, encoded.inputs[0][:-1]))
    message = sent(gradients(bench, bench.start(), encoded, [0]), Defence(), np.random.default_rng(0))
    (part,) = span_check(bench, bench.start(), message, [len(whole)], work=600)
    assert 1 < len(part) < len(whole) and part == whole[: len(part)]


def test_a_survey_has_a_row_for_every_attack_defence_and_batch_and_no_text(benches):
    bench = benches["gpt2"]
    encoded, how = encode(bench, TEXTS[1:4]), {"sent_is": "full gradient", "defences": [Defence(), PRIVATE]}
    table = survey(bench, bench.start(), encoded, batches=[1, 2, 64], **how)
    assert [(row["attack"], row["batch"]) for row in table] == [
        (k, n) for k in ("span", "span bag") for _ in "ab" for n in (1, 2)
    ]
    assert table[1] | {"seconds": 0} == attack(bench, bench.start(), encoded, [0, 1]).row() | {
        "seconds": 0,
        "sent": "full gradient",
    }
    assert all(isinstance(x, str | float | int | None) for row in table for x in row.values())
    assert "fever" not in str(table) and [row["tokens"] for row in table][:2] == [1, 1]


def test_the_documented_example_is_told_with_its_text(benches):
    bench = benches["llama"]
    bare, hidden = examples(bench, bench.start(), sent_is="full gradient", defences=[Defence(), PRIVATE])
    assert bare["recovered"] == bare["truth"] == [SENTENCE] != hidden["recovered"]
    assert bare["source"] == hidden["source"] == "example"


# ---- token bags ----


def test_a_trained_embedding_names_its_tokens_without_order(benches):
    bench = benches["neox"]
    encoded = encode(bench, TEXTS)
    outcome = attack(bench, bench.start(), encoded, [0], kind="token bag")
    assert outcome.tokens == 1 and outcome.exact is None and outcome.rouge is None


def test_an_embedding_that_is_not_the_head_has_gradients_for_its_tokens_only(benches):
    bench = benches["neox"]
    encoded = encode(bench, [SENTENCE])
    message = sent(gradients(bench, bench.start(), encoded, [0]), Defence(), np.random.default_rng(0))
    name = next(name for name in token_tables(bench, message) if "embed_in" in name)
    assert set(np.flatnonzero(token_tables(bench, message)[name])) == set(map(int, encoded.inputs[0][:-1]))


def test_lora_on_the_embedding_names_its_tokens_once_b_is_not_zero():
    bench = bench_of("tiny:gpt2", LoRA(rank=4, embeddings=True))
    encoded = encode(bench, [SENTENCE])
    assert attack(bench, bench.start(), encoded, [0], kind="token bag").tokens == 0
    assert attack(bench, trained(bench), encoded, [0], kind="token bag").tokens == 1


def test_without_a_table_of_tokens_there_is_no_token_bag_but_the_span_has_one(benches):
    bench = benches["llama, LoRA"]
    encoded = encode(bench, TEXTS)
    assert attack(bench, bench.start(), encoded, [0], kind="token bag").tokens == 0
    assert attack(bench, bench.start(), encoded, [0], kind="span bag").tokens == 1


def test_a_bag_holds_no_more_tokens_than_it_was_asked_for():
    assert ranked(np.array([0.0, 3.0, 1.0, 2.0]), 2) == [1, 3]
    assert ranked(np.array([0.0, 1.0]), 5) == [1]


def test_naming_the_whole_vocabulary_is_no_better_than_guessing():
    assert bag_recall([(1, 2), (2, 3)], [3, 9]) == pytest.approx(1 / 3) and bag_recall([], [1]) == 0
    assert bag_recall([(5, 6)], range(100)) == 0 and bag_recall([(5, 6)], [5, 6, *range(100)]) == 1
    assert bag_recall([(5, 6)], [7, 5, 8, 6], others=[(7, 8)]) == 1


# ---- optimising attacks ----


@pytest.mark.parametrize("kind", ["dlg", "tag"])
def test_optimising_finds_tokens_of_a_short_row_and_none_under_noise(benches, kind):
    bench = benches["gpt2"]
    encoded, how = encode(bench, ["a fever"]), Optimiser(kind, steps=120, lr=0.05)
    bare = attack(bench, bench.start(), encoded, [0], kind=kind, optimiser=how)
    assert bare.tokens >= 0.6
    assert attack(bench, bench.start(), encoded, [0], kind=kind, optimiser=how, defence=PRIVATE).tokens <= 0.2


def test_true_inputs_have_the_gradient_that_was_sent(benches):
    bench = benches["gpt2, LoRA"]
    params, encoded = trained(bench), encode(bench, ["a fever", "no"])
    message = sent(gradients(bench, params, encoded, [0, 1]), Defence(), np.random.default_rng(0))
    lengths = [len(encoded.inputs[row]) - 1 for row in (0, 1)]
    table = bench.model.get_input_embeddings().weight.detach()
    inputs, labels = torch.zeros(2, max(lengths), table.shape[1]), torch.zeros(2, max(lengths), table.shape[0])
    for i, length in enumerate(lengths):
        ids = torch.tensor(encoded.inputs[i].astype(np.int64))
        inputs[i, :length] = table[ids[:-1]]
        labels[i, torch.arange(length), ids[1:]] = 100.0
    leaves = {name: torch.from_numpy(x) for name, x in params.items()}
    found = dummy_gradient(bench, leaves, list(params), inputs, labels, lengths)
    for name, x in found.items():
        np.testing.assert_allclose(x.detach().numpy(), message[name], rtol=1e-3, atol=1e-6)


def test_dlg_counts_squares_and_tag_adds_sizes_the_first_layers_most():
    goal = {"first": torch.tensor([3.0]), "last": torch.tensor([4.0])}
    zero = {name: torch.zeros(1) for name in goal}
    assert float(distance(zero, goal, Optimiser("dlg"))) == pytest.approx(1.0)
    assert float(distance(zero, goal, Optimiser("tag", l1=0.5))) == pytest.approx(1 + 0.5 * 3 / 5 + 0.25 * 4 / 5)
    assert float(distance(goal, goal, Optimiser("tag"))) == 0


def test_optimising_takes_rows_of_different_lengths(benches):
    bench = benches["gpt2, LoRA"]
    encoded, how = encode(bench, ["a fever", "no"]), Optimiser("tag", steps=2)
    outcome = attack(bench, bench.start(), encoded, [0, 1], kind="tag", optimiser=how)
    assert len(outcome.found) == 2 and 0 <= outcome.tokens <= 1


@pytest.mark.parametrize("wrong", [{"kind": "newton"}, {"steps": 0}, {"lr": 0.0}, {"l1": -1.0}, {"lr": math.nan}])
def test_an_optimiser_that_cannot_run_is_refused(wrong):
    with pytest.raises(ValueError, match="Expected a kind"):
        Optimiser(**wrong)


# ---- what is sent ----


def test_what_is_sent_without_a_defence_is_the_gradient_of_the_mean_loss(benches):
    bench = benches["llama, LoRA"]
    params, encoded = trained(bench), encode(bench, TEXTS)
    message = sent(gradients(bench, params, encoded, [1, 2]), Defence(), np.random.default_rng(0))
    leaves = bench.leaves([params])
    total = 0.0
    for row in (1, 2):
        sums, counts = bench.losses(leaves, [bench.objective.collate(encoded, [row], 0)])
        total = total + (sums / counts).sum() / 2
    total.backward()
    for name, leaf in leaves.items():
        np.testing.assert_allclose(message[name], leaf.grad[0].numpy(), rtol=1e-4, atol=1e-7)


def tree(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"a": scale * rng.standard_normal((40, 50)), "b": scale * rng.standard_normal(7)}


def norm(gradient: dict[str, np.ndarray]) -> float:
    return math.sqrt(sum(float(np.square(x).sum()) for x in gradient.values()))


@given(clip=st.floats(1e-3, 1e3), scale=st.floats(1e-6, 1e6))
def test_a_clipped_row_is_never_longer_than_its_norm(clip, scale):
    out = sent([tree(0, scale)], Defence(clip=clip), np.random.default_rng(0))
    assert norm(out) <= clip * (1 + 1e-9)


def test_each_row_is_clipped_before_the_sum():
    rows = [tree(0, 1e3), tree(1, 1e-3)]
    out = sent(rows, Defence(clip=1.0), np.random.default_rng(0))
    expected = (rows[0]["a"] / norm(rows[0]) + rows[1]["a"] / max(1.0, norm(rows[1]))) / 2
    np.testing.assert_allclose(out["a"], expected)


def test_noise_has_the_stated_size_on_the_sum_and_is_added_once():
    zero = {"a": np.zeros((300, 300))}
    out = sent([zero] * 4, Defence(clip=0.5, noise=2.0), np.random.default_rng(0))
    assert np.std(4 * out["a"]) == pytest.approx(1.0, rel=0.02)


def test_the_largest_entries_of_the_whole_gradient_are_kept():
    rows = tree(0) | {"b": np.full(7, 1e-9)}
    out = sent([rows], Defence(keep=0.1), np.random.default_rng(0))
    kept = np.abs(rows["a"])[out["a"] != 0]
    assert not out["b"].any() and len(kept) == pytest.approx(0.1 * 2007, abs=1)
    assert kept.min() > np.abs(rows["a"])[out["a"] == 0].max()


def test_rounding_leaves_so_many_levels_and_errs_by_half_a_step():
    rows = tree(0) | {"b": np.zeros(7)}
    out = sent([rows], Defence(bits=4), np.random.default_rng(0))
    assert len(np.unique(out["a"])) <= 15 and not out["b"].any()
    assert np.abs(out["a"] - rows["a"]).max() <= np.abs(rows["a"]).max() / 7 / 2 * (1 + 1e-9)


@pytest.mark.parametrize(
    "wrong",
    [{"clip": 0.0}, {"clip": math.nan}, {"noise": 1.0}, {"noise": -1.0, "clip": 1.0}, {"keep": 0.0}, {"bits": 1}],
)
def test_a_defence_that_means_nothing_is_refused(wrong):
    with pytest.raises(ValueError, match="Expected"):
        Defence(**wrong)


def test_a_defence_is_named_as_the_page_shows_it():
    assert Defence().name == "none"
    assert Defence(clip=1.0, noise=0.5, keep=0.1, bits=8).name == "clip 1, noise 0.5, top 10 %, 8 bits"


# ---- edges ----


def test_a_message_of_zeros_gives_nothing(benches):
    bench = benches["gpt2, LoRA"]
    zeros = {name: np.zeros_like(x) for name, x in bench.start().items()}
    assert span_check(bench, bench.start(), zeros, [3]) == [] and span_bag(bench, bench.start(), zeros, [3]) == []
    assert token_bag(bench, zeros, 3) == [] and invert(bench, bench.start(), zeros, [3], kind="tag") == []
    encoded = encode(bench, TEXTS)
    nothing = attack(bench, bench.start(), encoded, [0], defence=Defence(clip=1e-30, bits=2, keep=1e-9))
    assert 0 <= nothing.tokens <= 1


def test_the_span_check_refuses_a_model_whose_inputs_depend_on_the_whole_row():
    bench = bench_of("tiny:bert", Full(), "masked-lm")
    with pytest.raises(ModelError, match="causal language model"):
        span_check(bench, bench.start(), {}, [3])


def test_an_attack_leaves_the_bench_as_it_was(benches):
    bench = benches["llama, LoRA"]
    before, encoded = bench.start(), encode(bench, TEXTS)
    attack(bench, trained(bench), encoded, [0])
    attack(bench, trained(bench), encoded, [1], kind="tag", optimiser=Optimiser("tag", steps=1))
    after = bench.start()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert not any(module._forward_pre_hooks for module in bench.model.modules())


def test_the_fast_path_gives_the_same_text_away():
    bench = bench_of("tiny:llama", LoRA(rank=32), precision="bf16")
    assert attack(bench, trained(bench), encode(bench, TEXTS), [1], kind="span bag").tokens > 0.5


def test_a_row_of_the_table_holds_figures_and_no_text(benches):
    bench = benches["gpt2"]
    outcome = attack(bench, bench.start(), encode(bench, TEXTS), [0])
    assert SENTENCE not in str(outcome.row()) and outcome.row()["rougeL"] == 1
    assert outcome.example()["truth"] == [SENTENCE] and outcome.example()["source"] == "example"


# ---- ROUGE ----


def test_rouge_is_what_lin_2004_says_on_known_texts():
    truth, found = "police killed the gunman", "police kill the gunman"
    assert rouge(truth, found) == Rouge(0.75, pytest.approx(1 / 3), 0.75)
    assert rouge(truth, "the gunman kill police").longest == 0.5
    assert rouge("a b", "a b c d") == Rouge(pytest.approx(2 / 3), 0.5, pytest.approx(2 / 3))
    assert rouge("", "a") == rouge("a", "") == rouge("", "") == Rouge(0.0, 0.0, 0.0)


@given(st.text("ab ", max_size=12), st.text("ab ", max_size=12))
def test_rouge_is_symmetric_between_zero_and_one_and_one_only_for_the_same_words(left, right):
    scores, back = rouge(left, right), rouge(right, left)
    assert scores == back
    assert all(0 <= x <= 1 for x in (scores.one, scores.two, scores.longest))
    assert (scores.longest == 1) == (left.split() == right.split() != [])
