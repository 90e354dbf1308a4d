"""The hand-written step clips each unit's own gradient: what one backward pass of that unit alone would give."""

from __future__ import annotations

import math

import pytest
import torch

from foedus.lm import fast
from foedus.lm.adapters import LoRA
from foedus.lm.bench import Bench
from foedus.lm.clipping import Clipping

from .test_bench import make_batch, make_bench, scattered
from .test_fast import MODELS, bench_of

NORMS = {"nothing": math.inf, "some": 1.2, "everything": 1e-3}
UNITS = {
    "a row each": [[0, 1, 2, 3], [0, 1, 2]],
    "several rows each": [[0, 0, 1, 1], [0, 1, 1]],
    "one of all rows": [[0, 0, 0, 0], [0, 0, 0]],
}


def clipped(bench, leaves, batches, units, clippings):
    tokens = bench._tokens(bench._here(bench._merged(batches)), len(batches))
    return bench._fast.clipped(leaves, tokens, [torch.tensor(silo) for silo in units], clippings)


def alone(bench, leaves, k, batch, silo):
    """Every unit's gradient {name: (n, *shape)}, by a backward pass of its own through `losses`."""
    names, found = list(leaves), []
    for unit in range(max(silo, default=-1) + 1):
        mine = {name: x[[i for i, u in enumerate(silo) if u == unit]] for name, x in batch.items()}
        own = {name: x[k : k + 1].detach().requires_grad_() for name, x in leaves.items()}
        (loss,), (targets,) = bench.losses(own, [mine])
        if targets:
            (loss / targets).backward()
        found.append([torch.zeros_like(own[name][0]) if own[name].grad is None else own[name].grad[0] for name in own])
    return {name: torch.stack([g[i] for g in found]) for i, name in enumerate(names)}


def by_hand(gradients, clipping):
    """(the clipped sum by name, norms (n, parts)) in float64, as `Clipping` says it."""
    parts = range(len(clipping.norms))
    flat = {name: g.double().flatten(1) for name, g in gradients.items()}
    of = [[g for name, g in flat.items() if clipping.part(name) == j] for j in parts]
    norms = torch.stack([torch.cat(g, 1).norm(dim=1) for g in of], 1)
    factors = (torch.tensor(clipping.norms).double() / norms.clamp(min=1e-30)).clamp(max=1.0)
    factors[~norms.isfinite().all(1)] = 0.0
    sums = {
        name: (factors[:, clipping.part(name)] @ g.nan_to_num(0.0, 0.0, 0.0)).view(gradients[name].shape[1:])
        for name, g in flat.items()
    }
    return sums, norms


def flat(gradients):
    return torch.cat([g.double().flatten() for g in gradients.values()])


def compare(bench, batches, units, clippings, tolerance=1e-5):
    leaves = {name: x.detach() for name, x in bench.leaves(scattered(bench, len(batches))).items()}
    found = clipped(bench, leaves, batches, units, clippings)
    losses, targets = bench.losses(leaves, batches)
    torch.testing.assert_close(found.losses, losses)
    assert found.targets.tolist() == targets.tolist()
    assert list(found.gradients) and all(g.dtype == torch.float32 for g in found.gradients.values())
    assert {n: g.shape for n, g in found.gradients.items()} == {n: x.shape for n, x in leaves.items()}
    for k, (batch, silo, clipping) in enumerate(zip(batches, units, clippings, strict=True)):
        sums, norms = by_hand(alone(bench, leaves, k, batch, silo), clipping) if max(silo) >= 0 else (None, None)
        ours = {name: found.gradients[name][k] for name in leaves}
        if sums is None:
            assert not flat(ours).any() and found.norms[k].shape == (0, len(clipping.norms))
            continue
        assert float((flat(ours) - flat(sums)).norm()) <= tolerance * float(flat(sums).norm())
        torch.testing.assert_close(found.norms[k].double(), norms, rtol=tolerance, atol=0)


def ragged(rows=(4, 3)):
    return [make_batch("causal-lm", count, 9 + 4 * k, k) for k, count in enumerate(rows)]


def dense(rows=(4, 3)):
    full = [make_batch("causal-lm", count, 9, k) for k, count in enumerate(rows)]
    return [b | {"attention_mask": torch.ones_like(b["input_ids"]), "labels": b["input_ids"]} for b in full]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("batches", [ragged, dense])
def test_the_sum_is_that_of_each_units_own_gradient_clipped(batches, units, norm):
    clippings = [Clipping((NORMS[norm],)), Clipping((NORMS[norm] / 3,))]
    compare(bench_of(MODELS["llama"]), batches(), UNITS[units], clippings)


@pytest.mark.parametrize("kind", MODELS)
def test_every_model_clips_the_gradients_of_its_true_leaves(kind):
    compare(bench_of(MODELS[kind]), ragged(), UNITS["a row each"], [Clipping((0.7,))] * 2)


def test_ranks_scales_and_layers_may_differ():
    bench = bench_of(MODELS["llama"], rank_pattern={"q_proj": 5, "down_proj": 1}, alpha_pattern={"v_proj": 2})
    compare(bench, ragged(), UNITS["several rows each"], [Clipping((0.7,))] * 2)
    compare(bench_of(MODELS["qwen2"], target_modules=["gate_proj", "v_proj"]), ragged(), UNITS["a row each"],
            [Clipping((0.7,))] * 2)  # fmt: skip


def test_parts_have_norms_of_their_own():
    bench = bench_of(MODELS["llama"])
    parts = {name: i % 3 for i, name in enumerate(bench.start())}
    compare(bench, ragged(), UNITS["a row each"], [Clipping((0.3, 0.02, math.inf), parts), Clipping((1, 2, 3), parts)])


def test_rows_may_belong_to_nobody_and_silos_have_no_units():
    batches = ragged((4, 3)) + ragged((2,))
    batches[0]["labels"][1] = batches[0]["labels"][3] = -100
    batches[1]["labels"][:] = -100
    compare(bench_of(MODELS["llama"]), batches, [[0, -1, 1, -1], [-1] * 3, [0, 1]], [Clipping((0.7,))] * 3)


@pytest.mark.parametrize("batches", [ragged, dense])
def test_targets_of_nobodys_row_count_among_the_losses_only(batches):
    bench, (batch,) = bench_of(MODELS["llama"]), batches((3,))
    leaves = bench.leaves(scattered(bench, 1))
    with_it = clipped(bench, leaves, [batch], [[0, -1, 1]], [Clipping((0.7,))])
    without = clipped(bench, leaves, [{name: x[[0, 2]] for name, x in batch.items()}], [[0, 1]], [Clipping((0.7,))])
    torch.testing.assert_close(flat(with_it.gradients), flat(without.gradients), rtol=1e-4, atol=1e-6)
    assert with_it.targets > without.targets


def test_a_unit_without_a_target_adds_zero_whatever_its_memory_held(monkeypatch):
    take = fast.Workspace.take_from_end
    monkeypatch.setattr(fast.Workspace, "take_from_end", lambda *x, **y: take(*x, **y).fill_(3.0))
    batches = ragged()
    batches[0]["labels"][1] = -100
    batches[1]["labels"][:2] = -100
    compare(bench_of(MODELS["llama"]), batches, [[0, 1, 2, 2], [0, 0, 1]], [Clipping((0.7,))] * 2)


def test_rows_of_a_unit_must_stand_side_by_side():
    bench, batches = bench_of(MODELS["llama"]), ragged()
    with pytest.raises(ValueError, match="side by side"):
        clipped(bench, bench.leaves(scattered(bench, 2)), batches, [[0, 1, 0, 1], [0, 1, 2]], [Clipping((1.0,))] * 2)


@pytest.mark.parametrize("batches", [ragged, dense])
@pytest.mark.parametrize("broken", [0, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_unit_that_is_not_finite_adds_zero_and_leaves_the_others_as_they_were(batches, broken, value):
    bench, batches, clippings = bench_of(MODELS["llama"]), batches(), [Clipping((0.7,))] * 2
    leaves, units = bench.leaves(scattered(bench, 2)), [[0, 1, 2, 3], [0, 1, 2]]
    batches[0]["input_ids"][broken, 1] = 207
    kept = [i for i in range(4) if i != broken]
    rest = [{name: x[kept] for name, x in batches[0].items()}, batches[1]]
    wanted = clipped(bench, leaves, rest, [[0, 1, 2], [0, 1, 2]], clippings)
    bench._fast.table.data[207, 3] = value
    found = clipped(bench, leaves, batches, units, clippings)
    torch.testing.assert_close(found.norms[0][kept], wanted.norms[0], rtol=1e-5, atol=0)
    added = flat(found.gradients) - flat(wanted.gradients)
    if value == 1e30:  # the norms of the model make that a finite gradient
        assert float(added.norm()) <= 0.7 * (1 + 1e-5)
    else:
        assert not found.norms[0][broken].isfinite()
        torch.testing.assert_close(added, torch.zeros_like(added), rtol=0, atol=1e-6)


def test_a_unit_whose_own_norm_overflows_adds_zero():
    bench, batches = bench_of(MODELS["llama"]), ragged()
    leaves = {name: x.detach() * (1e30 if "lora_B" in name else 1) for name, x in bench.leaves([bench.start()]).items()}
    ours = clipped(bench, leaves, batches[:1], [[0, 1, 2, 3]], [Clipping((1.0,))])
    assert flat(ours.gradients).isfinite().all() and float(flat(ours.gradients).norm()) <= 4.0


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_in_bf16_gradients_are_within_rounding_and_a_clipped_unit_adds_exactly_its_norm(kind):
    exact, half = bench_of(MODELS[kind]), bench_of(MODELS[kind], "bf16")
    leaves, batches = exact.leaves(scattered(exact, 2)), ragged()
    wanted, found = (clipped(b, leaves, batches, UNITS["a row each"], [Clipping((math.inf,))] * 2)
                     for b in (exact, half))  # fmt: skip
    assert float((flat(found.gradients) - flat(wanted.gradients)).norm()) < 0.02 * float(flat(wanted.gradients).norm())
    for row in range(4):
        one = {name: x[row : row + 1] for name, x in batches[0].items()}
        own = {name: x[:1] for name, x in leaves.items()}
        unit = clipped(half, own, [one], [[0]], [Clipping((1e-3,))])
        assert float(flat(unit.gradients).norm()) == pytest.approx(1e-3, rel=1e-6)


@pytest.mark.parametrize("batches", [ragged, dense])
def test_the_models_own_code_clips_to_the_same_sums(monkeypatch, batches):
    bench = make_bench("causal-lm", "llama", LoRA(rank=3))
    monkeypatch.setattr(Bench, "_find_fast", lambda self: None)
    other = make_bench("causal-lm", "llama", LoRA(rank=3))
    assert bench._fast is not None
    given = (bench.leaves(scattered(bench, 2)), batches(), list(map(torch.tensor, UNITS["several rows each"])))
    ours, theirs = (b.clipped(*given, [Clipping((0.7,))] * 2) for b in (bench, other))
    torch.testing.assert_close(flat(ours.gradients), flat(theirs.gradients), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.norms, theirs.norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.losses, theirs.losses)
    assert torch.equal(ours.targets, theirs.targets)


def test_windows_are_of_few_lengths_and_hold_their_units():
    lengths = [fast._usual(length) for length in range(1, 2000)]
    assert all(length <= usual <= max(2 * length, fast.STEP) for length, usual in enumerate(lengths, 1))
    assert len(set(lengths)) <= 13
    windows, slots = fast._windows([(0, 40), (40, 3), (43, 0), (43, 9)], 52)
    assert [(w.unit, w.token, w.length) for w in windows] == [(0, 0, 48), (1, 20, 32), (3, 20, 32)]
    assert slots == [*range(40), *range(48 + 20, 48 + 23), *range(80 + 23, 80 + 32)]


def test_a_step_without_units_is_the_same_before_and_after_one_with_them():
    bench, batches = bench_of(MODELS["llama"]), ragged()
    leaves = bench.leaves(scattered(bench, 2))
    tokens = bench._tokens(bench._merged(batches), 2)
    before = bench._fast.run(leaves, tokens, gradient=True)
    first = clipped(bench, leaves, batches, UNITS["a row each"], [Clipping((0.7,))] * 2)
    clipped(bench, leaves, dense(), UNITS["several rows each"], [Clipping((0.7,))] * 2)
    again = clipped(bench, leaves, batches, UNITS["a row each"], [Clipping((0.7,))] * 2)
    after = bench._fast.run(leaves, tokens, gradient=True)
    assert torch.equal(flat(before.gradients), flat(after.gradients))
    assert torch.equal(flat(first.gradients), flat(again.gradients))


@pytest.mark.parametrize("block", [1000, 1 << 14, fast.BLOCK])
def test_gradients_lie_where_activations_were_given_back_and_never_over_living_ones(monkeypatch, block):
    monkeypatch.setattr(fast, "BLOCK", block)
    many = [make_batch("causal-lm", 16, 4, 0)]  # short rows: the gradients take more room than the activations
    compare(bench_of(MODELS["llama"]), many, [list(range(16))], [Clipping((0.7,))])
    compare(bench_of(MODELS["llama"]), ragged(), UNITS["a row each"], [Clipping((0.7,))] * 2)


def test_gradients_lie_in_the_workspace_and_in_the_same_place_at_every_step(monkeypatch):
    bench, found, places = bench_of(MODELS["llama"]), [], []
    take = fast.Workspace.take_from_end
    monkeypatch.setattr(fast.Workspace, "take_from_end", lambda *x, **y: found.append(take(*x, **y)) or found[-1])
    for _ in range(3):
        clipped(bench, bench.leaves(scattered(bench, 2)), dense(), UNITS["a row each"], [Clipping((0.7,))] * 2)
        space = bench._fast.space
        ends = {b.data_ptr(): b.data_ptr() + n for b, n in zip(space.blocks, space.touched, strict=True)}
        below = found[2 * 4 :]  # two layers, four products, A and B; when the last began, nothing was given back
        assert len(below) == 2 * 4
        assert all(x.data_ptr() + x.nbytes <= ends[x.untyped_storage().data_ptr()] for x in below)
        places.append([x.data_ptr() for x in below])
        found.clear()
    assert places[0] == places[1] == places[2]


def test_the_end_of_the_workspace_never_meets_what_is_in_use():
    space = fast.Workspace(torch.device("cpu"))
    kept = space.take(1000, dtype=torch.float32).fill_(1.0)
    mark = space.at
    space.take(fast.BLOCK, dtype=torch.uint8)
    space.give_back(mark)
    taken = [space.take_from_end(size, dtype=torch.float32).fill_(2.0) for size in (fast.BLOCK // 16,) * 20]
    places = sorted((x.data_ptr(), x.data_ptr() + 4 * x.numel()) for x in [kept, *taken])
    assert all(stop <= start for (_, stop), (start, _) in zip(places, places[1:], strict=False))
    assert kept.eq(1.0).all()


def test_with_a_frozen_only_b_has_a_gradient_and_counts_in_the_norm():
    bench = make_bench("causal-lm", "llama", LoRA(rank=3, freeze_a=True))
    assert bench._fast is not None and all(".lora_B." in name for name in bench.start())
    batches = [make_batch("causal-lm", 4, 9, 0), make_batch("causal-lm", 3, 7, 1)]
    compare(bench, batches, UNITS["a row each"], [Clipping((0.5,))] * 2)
    slow = make_bench("causal-lm", "llama", LoRA(rank=3, freeze_a=True))
    slow._fast = None
    leaves = bench.leaves(scattered(bench, 2))
    for one, other in zip(bench.losses(leaves, batches), slow.losses(leaves, batches), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
