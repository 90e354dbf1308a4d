"""Each unit's gradient is that of a pass over it alone, its clip is exact, and what has no rule is refused."""

from __future__ import annotations

import math
from functools import partial

import peft
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from foedus.errors import GuaranteeError, ModelError
from foedus.lm.adapters import Full, LoRA
from foedus.lm.clipping import Clipping
from foedus.lm.per_example import Choices, Owners, collect
from foedus.lm.tiny import fill, tiny_config

from .test_bench import ADAPTERS, CASES, batches_of, make_batch, make_bench, scattered
from .test_stacked import LAYERS

WIDTH = 6
UNITS = torch.tensor([0, 0, 1, -1, 2])
NOTHING = Clipping((math.inf,))


def close(ours, wanted, tolerance=1e-5):
    """Equal up to a share of the largest gradient in the model."""
    scale = max(float(x.norm()) for x in wanted.values())
    for name, x in wanted.items():
        assert float((ours[name] - x).norm()) <= tolerance * max(float(x.norm()), 0.01 * scale), name


def alone(model, params, units, row_losses):
    """By autograd, one pass a unit: n gradients by name. `row_losses(rows)`: the losses of these rows."""
    found = []
    for unit in range(int(units.max()) + 1):
        leaves = {name: x.detach().clone().requires_grad_() for name, x in params.items()}
        rows = (units == unit).nonzero()[:, 0]
        loss = functional_call(
            Holder(model), {f"model.{n}": x for n, x in leaves.items()}, (lambda r=rows: row_losses(r).sum(),)
        )
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        found.append(
            {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), grads, strict=True)}
        )
    return found


class Holder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, work):
        return work()


def agree(model, row_losses, units=UNITS, tolerance=1e-5, only=None):
    """Every trainable parameter of a model, both ways; `only`: among these."""
    params = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad and (only is None or n in only)}
    owned = (units >= 0).nonzero()[:, 0]
    uses = collect(model, params, units, lambda: row_losses(torch.arange(len(units)))[owned].sum())
    wanted = alone(model, params, units, row_losses)
    for u, one in enumerate(wanted):
        close({name: uses.each(name)[u] for name in params}, one, tolerance)
    assert uses.touched == params.keys()
    clipping = Clipping((0.5, 2.0), {name: i % 2 for i, name in enumerate(params)})
    squares = torch.zeros(len(wanted), 2, dtype=torch.float64)
    for name in params:
        squares[:, clipping.part(name)] += torch.stack([one[name].double().square().sum() for one in wanted])
    torch.testing.assert_close(uses.squares(clipping), squares, rtol=3 * tolerance, atol=1e-12)
    factors, (sums, _) = clipping.factors(squares), uses.clipped(clipping)
    clipped = {
        n: sum(float(f[clipping.part(n)]) * one[n] for f, one in zip(factors, wanted, strict=True)) for n in params
    }
    close(sums, clipped, tolerance)


# ---- one layer ----


class Prompt(nn.Module):
    """Vectors that every row begins with."""

    def __init__(self, how):
        super().__init__()
        self.how, self.weight = how, nn.Parameter(torch.randn(4, WIDTH))

    def forward(self, x):
        prompts = {
            "expand": lambda: self.weight.unsqueeze(0).expand(len(x), -1, -1),
            "expand to new": lambda: self.weight.expand(len(x), 4, WIDTH),
            "repeat": lambda: self.weight.repeat(len(x), 1, 1),
            "embedding": lambda: F.embedding(torch.arange(4)[None], self.weight).expand(len(x), -1, -1),
        }[self.how]()
        return torch.cat([prompts * x.mean((1, 2), keepdim=True), x], 1)


class Scale(nn.Module):
    """As in (IA)³, with a constant on the way."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(WIDTH, 1)), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        return x * (2.0 * self.scale.flatten()).to(x.dtype) - self.shift.view(1, 1, WIDTH)[:, :, :].contiguous()


class Shifts(nn.Module):
    """A shift used twice, behind a layer whose gradient it must not touch."""

    def __init__(self):
        super().__init__()
        self.layer, self.shift = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        return self.layer(x) + self.shift + self.shift


class Twice(nn.Module):
    """One matrix as a table and as a head."""

    def __init__(self, words):
        super().__init__()
        self.table = nn.Parameter(torch.randn(words, WIDTH))

    def forward(self, ids):
        return torch.tanh(F.embedding(ids, self.table)) @ self.table.T


class Positions(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.shape, self.table = shape, nn.Embedding(9, WIDTH)

    def forward(self, x):
        return x * (x + self.table(torch.arange(x.shape[1]).view(self.shape)))


HOW = ("expand", "expand to new", "repeat", "embedding")
SHAPED = {
    **{name: (make, (7, WIDTH)) for name, make in LAYERS.items()},
    "vectors": (lambda: nn.Linear(WIDTH, 4), (WIDTH,)),
    "heads": (lambda: nn.Linear(WIDTH, 4), (2, 3, WIDTH)),
    "wide": (lambda: nn.Linear(WIDTH, 40), (2, WIDTH)),
    **{f"prompt by {how}": (partial(Prompt, how), (3, WIDTH)) for how in HOW},
    "scale": (Scale, (3, WIDTH)),
    "a shift used twice": (Shifts, (WIDTH,)),
    "positions": (lambda: Positions((1, -1)), (7, WIDTH)),
    "positions without rows": (lambda: Positions((-1,)), (7, WIDTH)),
    "llama's norm": (lambda: LlamaRMSNorm(WIDTH), (7, WIDTH)),
}  # fmt: skip


@pytest.mark.parametrize(
    "units", [UNITS, torch.arange(5), torch.tensor([0, 0, 1, 1])], ids=["ragged", "single", "pairs"]
)
@pytest.mark.parametrize("kind", SHAPED)
def test_a_layer_gives_each_unit_its_gradient(kind, units):
    make, shape = SHAPED[kind]
    torch.manual_seed(3)
    layer, x, weights = make(), torch.randn(len(units), *shape), torch.randn(60)
    agree(layer, lambda rows: (layer(x[rows]).square().flatten(1) * weights[0]).sum(1), units)


@pytest.mark.parametrize("only", ["weight", "bias"])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "layer norm"])
def test_weight_or_bias_may_be_frozen(kind, only):
    layer, x = LAYERS[kind](), torch.randn(5, 3, WIDTH)
    agree(layer, lambda rows: layer(x[rows]).square().sum((1, 2)), only=(only,))


@pytest.mark.parametrize("words", [9, 400])
def test_a_matrix_used_as_table_and_as_head_counts_both_uses_together(words):
    torch.manual_seed(0)
    model, ids = Twice(words), torch.randint(0, 9, (5, 4))
    agree(model, lambda rows: F.cross_entropy(model(ids[rows]).transpose(1, 2), ids[rows], reduction="none").sum(1))


@pytest.mark.parametrize("padding", [None, 0, -1])
def test_the_padding_word_of_a_table_learns_nothing(padding):
    table, ids = nn.Embedding(5, WIDTH, padding_idx=padding), torch.randint(0, 5, (5, 4))
    agree(table, lambda rows: table(ids[rows]).square().sum((1, 2)))


# ---- whole models ----


def tiny(family, **changes):
    config = tiny_config(family)
    config.update(changes)
    model = AutoModelForCausalLM.from_config(config).eval()
    fill(model, family)
    return model


def causal(model, rows=5, length=9, seed=0):
    """Losses by row of a causal model on a fixed batch, each the mean over the row's own targets."""
    batch = make_batch("causal-lm", rows, length, seed)

    def losses(chosen):
        part = {name: x[chosen] for name, x in batch.items()}
        logits = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"]).logits
        logits, labels = logits[:, -length:][:, :-1], part["labels"][:, 1:]
        nll = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
        return nll.sum(1) / (labels != -100).sum(1)

    return losses


def perturb(model, size=0.1):
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data += size * torch.randn_like(p)
    return model.eval()


def lora(**options):
    return lambda family: peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", fan_in_fan_out=family == "gpt2", **options
    )


PEFT = {
    "prompt tuning": lambda family: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prompt tuning of five": lambda family: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "prefix tuning": lambda family: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "lora of rank 1": lora(r=1),
    "lora of rank 5 with a head": lora(r=5, modules_to_save=["lm_head"]),
    "rslora of rank 17": lora(r=17, use_rslora=True),
}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", PEFT)
def test_an_adapter_of_peft_gives_each_unit_its_gradient(kind, family):
    changes = {"tie_word_embeddings": False} if "head" in kind else {}
    model = perturb(peft.get_peft_model(tiny(family, **changes), PEFT[kind](family)))
    agree(model, causal(model))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_ia3_gives_each_unit_its_gradient(family):
    last = ["mlp.c_proj"] if family == "gpt2" else ["down_proj"]
    targets = ["c_attn", *last] if family == "gpt2" else ["k_proj", "v_proj", *last]
    config = peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=last, fan_in_fan_out=family == "gpt2"
    )
    model = perturb(peft.get_peft_model(tiny(family), config))
    agree(model, causal(model))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_dora_is_refused_by_name(family):
    model = peft.get_peft_model(tiny(family), lora(r=2, use_dora=True)(family))
    with pytest.raises(ModelError, match=r"lora_(A|B|magnitude)"):
        agree(model, causal(model))


class Bottleneck(nn.Module):
    """An adapter behind a layer (Houlsby et al. 2019)."""

    def __init__(self, layer, width):
        super().__init__()
        self.layer, self.norm = layer.requires_grad_(False), nn.LayerNorm(width)
        self.down, self.up = nn.Linear(width, 4), nn.Linear(4, width)

    def forward(self, *args, **kwargs):
        y = self.layer(*args, **kwargs)
        return y + self.up(F.gelu(self.down(self.norm(y))))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_bottlenecks_give_each_unit_its_gradient(family):
    model = tiny(family).requires_grad_(False)
    for layer in model.transformer.h if family == "gpt2" else model.model.layers:
        layer.mlp = Bottleneck(layer.mlp, 32)
    agree(perturb(model), causal(model))


@pytest.mark.parametrize("kind", ["bias", "norm", "ln_"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_biases_and_norms_alone_give_each_unit_its_gradient(kind, family):
    model = tiny(family, attention_bias=True, mlp_bias=True) if family == "llama" else tiny(family)
    names = [n for n, p in model.named_parameters() if kind in n]
    if names:
        model.requires_grad_(False)
        for name in names:
            model.get_parameter(name).requires_grad_()
        agree(model, causal(model))


def test_gradient_checkpointing_changes_nothing():
    model = tiny("gpt2")
    units, params = torch.tensor([0, 1, 1, 2, 2]), dict(model.named_parameters())
    losses = causal(model)
    plain = collect(model, params, units, lambda: losses(torch.arange(5)).sum())
    calls = []
    model.transformer.h[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()  # or transformers would not checkpoint; the tiny models have no dropout
    again = collect(model, params, units, lambda: losses(torch.arange(5)).sum())
    assert len(calls) == 2  # once forward, once more on the way back
    assert all(torch.equal(plain.each(name), again.each(name)) for name in params)


# ---- the bench ----


def unit_gradients(bench, leaves, k, batch, units):
    """What each unit's rows give alone, through `losses`."""
    silo = {name: x.detach()[k : k + 1] for name, x in leaves.items()}
    batches = [{n: x[units == u] for n, x in batch.items()} for u in range(int(units.max()) + 1)]
    found = []
    for part in batches:
        inputs = {name: x.clone().requires_grad_() for name, x in silo.items()}
        sums, counts = bench.losses(inputs, [part])
        (sums / counts.clamp(min=1)).sum().backward()
        found.append({n: torch.zeros_like(x[0]) if x.grad is None else x.grad[0] for n, x in inputs.items()})
    return found


def clipped_by_hand(found, clipping):
    """(sum of the clipped gradients, norms) of explicit gradients."""
    squares = torch.zeros(len(found), len(clipping.norms), dtype=torch.float64)
    for u, one in enumerate(found):
        for name, x in one.items():
            squares[u, clipping.part(name)] += x.double().square().sum()
    factors = clipping.factors(squares)
    sums = {n: sum(f[clipping.part(n)] * one[n] for f, one in zip(factors, found, strict=True)) for n in found[0]}
    return sums, squares.sqrt().float()


OWNERS = [torch.tensor([0, 1, 1]), torch.tensor([0, 1]), torch.tensor([0, 0, 1, 2])]


@pytest.mark.parametrize("adapter", ADAPTERS, ids=["lora", "lora-embeddings", "full"])
@pytest.mark.parametrize(("task", "family"), CASES)
def test_three_silos_get_the_sums_of_their_units_clipped_gradients(task, family, adapter):
    bench = make_bench(task, family, adapter)
    leaves, batches = bench.leaves(scattered(bench, 3)), batches_of(task)
    parts = {name: i % 2 for i, name in enumerate(leaves)}
    clippings = [Clipping((0.7, 0.3), parts), Clipping((0.01, 5.0), parts), Clipping((math.inf, 0.2), parts)]
    result = bench.clipped(leaves, batches, OWNERS, clippings)
    for k, (batch, units, clipping) in enumerate(zip(batches, OWNERS, clippings, strict=True)):
        wanted, norms = clipped_by_hand(unit_gradients(bench, leaves, k, batch, units), clipping)
        close({name: x[k] for name, x in result.gradients.items()}, wanted)
        torch.testing.assert_close(result.norms[k], norms, rtol=1e-5, atol=1e-6)
    sums, counts = bench.losses(leaves, batches)
    torch.testing.assert_close(result.losses, sums.detach(), rtol=1e-5, atol=1e-5)
    assert result.targets.tolist() == counts.tolist()
    assert not any(x.requires_grad for x in (*result.gradients.values(), *result.norms, result.losses))


@pytest.mark.parametrize(
    ("family", "adapter"),
    [
        ("gpt2", LoRA(rank=3)),
        ("gpt2", Full()),
        ("bert", LoRA(rank=3)),
        ("llama", LoRA(rank=2, targets="attention", embeddings=True)),
    ],
)
def test_bf16_is_within_its_rounding(family, adapter):
    task = "masked-lm" if family == "bert" else "causal-lm"
    exact, half = (make_bench(task, family, adapter, precision) for precision in ("fp32", "bf16"))
    (params,), batch, units = scattered(exact, 1), batches_of(task)[0], OWNERS[0]
    ours, wanted = (b.clipped(b.leaves([params]), [batch], [units], [Clipping((0.1,))]) for b in (half, exact))
    close({n: x[0] for n, x in ours.gradients.items()}, {n: x[0] for n, x in wanted.gradients.items()}, 0.05)
    torch.testing.assert_close(ours.norms, wanted.norms, rtol=0.02, atol=0)
    apart = unit_gradients(half, half.leaves([params]), 0, batch, units)
    close({n: x[0] for n, x in ours.gradients.items()}, clipped_by_hand(apart, Clipping((0.1,)))[0], 0.05)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_in_bf16_a_unit_is_clipped_to_so_much_less_that_the_rounding_of_others_has_room(family):
    for precision, share in (("fp32", 1.0), ("bf16", 0.99)):
        bench = make_bench("causal-lm", family, LoRA(rank=3), precision)
        assert bench.precision == precision
        (params,), batch = scattered(bench, 1), batches_of("causal-lm")[0]
        nobody_else = torch.where(OWNERS[0] == 0, batch["labels"].T, -100).T
        found, _ = sums_of(bench, params, {**batch, "labels": nobody_else}, OWNERS[0], Clipping((0.01,)))
        norm = math.sqrt(sum(float(x.double().square().sum()) for x in found.values()))
        assert norm == pytest.approx(0.01 * share, rel=1e-3)


BENCHES = {
    "lora": ("gpt2", LoRA(rank=3)),
    "embeddings": ("gpt2", LoRA(rank=2, embeddings=True)),
    "full": ("gpt2", Full()),
    "fast": ("llama", LoRA(rank=3)),
}


def sums_of(bench, params, batch, units, clipping):
    result = bench.clipped(bench.leaves([params]), [batch], [units], [clipping])
    return {name: x[0] for name, x in result.gradients.items()}, result.norms[0]


@pytest.mark.parametrize(("rows", "length"), [(5, 5), (1, 5), (4, 4), (8, 4), (1, 3)])
@pytest.mark.parametrize(
    ("task", "family"),
    [("causal-lm", "gpt2"), ("masked-lm", "bert"), ("masked-lm", "roberta"), ("seq2seq", "t5"), ("seq2seq", "bart")],
)
def test_as_many_rows_as_tokens_or_heads_mislead_nobody(task, family, rows, length):
    bench = make_bench(task, family, Full())
    (params,), batch, units = scattered(bench, 1), make_batch(task, rows, length, 0), torch.arange(rows)
    sums, norms = sums_of(bench, params, batch, units, Clipping((0.3,)))
    wanted, found = clipped_by_hand(unit_gradients(bench, bench.leaves([params]), 0, batch, units), Clipping((0.3,)))
    close(sums, wanted)
    torch.testing.assert_close(norms, found, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("task", "family"), CASES)
def test_rows_without_padding_are_no_others(task, family):
    bench = make_bench(task, family, Full())
    (params,), batch, units = scattered(bench, 1), make_batch(task, 4, 4, 0), torch.tensor([0, 1, 1, 2])
    ends = torch.full_like(batch["input_ids"][:, :1], 2)
    batch["input_ids"] = torch.cat([batch["input_ids"][:, :3].clamp(min=5), ends], 1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    sums, norms = sums_of(bench, params, batch, units, Clipping((0.3,)))
    wanted, found = clipped_by_hand(unit_gradients(bench, bench.leaves([params]), 0, batch, units), Clipping((0.3,)))
    close(sums, wanted)
    torch.testing.assert_close(norms, found, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", BENCHES)
def test_split_into_small_batches_the_sums_add_up(kind):
    bench = make_bench("causal-lm", *BENCHES[kind])
    (params,), batch = scattered(bench, 1), make_batch("causal-lm", 7, 9, 0)
    units, clipping = torch.tensor([0, 1, 1, 2, 3, 4, 4]), Clipping((0.3,))
    whole, norms = sums_of(bench, params, batch, units, clipping)
    parts = []
    for chosen in (units < 2, units == 2, units > 2):
        small = {name: x[chosen] for name, x in batch.items()}
        parts.append(sums_of(bench, params, small, units[chosen] - units[chosen][0], clipping))
    close({name: sum(part[name] for part, _ in parts) for name in whole}, whole)
    torch.testing.assert_close(torch.cat([x for _, x in parts]), norms, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", BENCHES)
def test_rows_of_nobody_and_units_without_targets_add_nothing(kind):
    bench = make_bench("causal-lm", *BENCHES[kind])
    (params,), batch, clipping = scattered(bench, 1), make_batch("causal-lm", 4, 9, 0), Clipping((0.3,))
    batch["labels"][1:3] = -100
    first = {name: x[[0, 3]] for name, x in batch.items()}
    wanted, norms = sums_of(bench, params, first, torch.tensor([0, 1]), clipping)
    sums, found = sums_of(bench, params, batch, torch.tensor([0, -1, 1, 2]), clipping)
    close(sums, wanted)
    torch.testing.assert_close(found, norms[[0, 0, 1]] * torch.tensor([[1.0], [0.0], [1.0]]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", BENCHES)
def test_a_batch_of_nobody_gives_zeros(kind):
    bench = make_bench("causal-lm", *BENCHES[kind])
    batch = make_batch("causal-lm", 1, 9, 0)
    batch["labels"][:] = -100
    result = bench.clipped(bench.leaves(scattered(bench, 1)), [batch], [torch.tensor([-1])], [Clipping((1.0, 2.0))])
    assert all(not x.any() for x in result.gradients.values())
    assert (result.norms[0].shape, result.losses.tolist(), result.targets.tolist()) == ((0, 2), [0.0], [0])


def test_targets_of_nobody_are_refused():
    bench = make_bench("causal-lm", "gpt2", LoRA(rank=3))
    with pytest.raises(ValueError, match="nobody"):
        sums_of(bench, bench.start(), make_batch("causal-lm", 2, 9, 0), torch.tensor([0, -1]), NOTHING)


@pytest.mark.parametrize("units", [[1, 0], [0, 2], [0, 1, 0], [1, 1], [0, -2]])
def test_units_out_of_order_are_refused(units):
    with pytest.raises(ValueError, match="ascending"):
        Owners(torch.tensor(units))


# ---- what the guarantee stands on ----


def leave_out(batch, units, unit):
    """The same batch without one unit."""
    keep = units != unit
    rest = units[keep]
    return {name: x[keep] for name, x in batch.items()}, torch.where(rest > unit, rest - 1, rest)


def distance(one, other):
    return math.sqrt(sum(float((one[name] - other[name]).double().square().sum()) for name in one))


@pytest.mark.parametrize("size", [0.05, 30.0, 1e-6], ids=["usual", "huge", "tiny"])
@pytest.mark.parametrize("kind", BENCHES)
def test_one_unit_more_or_less_moves_the_sum_by_at_most_the_bound(kind, size):
    bench = make_bench("causal-lm", *BENCHES[kind])
    (params,), units = scattered(bench, 1, size), torch.tensor([0, 1, 1, 2, 3])
    batch = make_batch("causal-lm", 5, 12, 3)
    batch["input_ids"][3] = 7  # one word over and over: all its tokens pull the same way
    clipping = Clipping((0.01, 0.02), {name: i % 2 for i, name in enumerate(params)})
    whole, norms = sums_of(bench, params, batch, units, clipping)
    for unit in range(4):
        less, rest = leave_out(batch, units, unit)
        sums, left = sums_of(bench, params, less, rest, clipping)
        assert distance(whole, sums) <= clipping.bound * (1 + 1e-4)
        torch.testing.assert_close(
            left, torch.cat([norms[:unit], norms[unit + 1 :]]), rtol=1e-3, atol=1e-7, equal_nan=True
        )


@pytest.mark.parametrize("kind", ["lora", "embeddings", "full"])
def test_a_unit_that_is_not_finite_adds_zero_and_spoils_nobody(kind):
    bench = make_bench("causal-lm", *BENCHES[kind])
    bench.prove()  # before the poison
    (params,), units, batch = scattered(bench, 1), torch.tensor([0, 1, 2]), make_batch("causal-lm", 3, 9, 0)
    less, rest = leave_out(batch, units, 1)
    wanted, _ = sums_of(bench, params, less, rest, Clipping((0.3,)))

    def poison(module, args, output):
        return output * torch.tensor([1.0, math.nan, 1.0]).view(3, 1, 1)

    hook = bench._core.transformer.ln_f.register_forward_hook(poison)
    sums, norms = sums_of(bench, params, batch, units, Clipping((0.3,)))
    hook.remove()
    close(sums, wanted)
    assert torch.isfinite(norms[:, 0]).tolist() == [True, False, True]


def test_a_gradient_whose_tokens_cancel_is_not_taken_for_none():
    """The terms of its square are 10¹⁰, the square itself 256: float32 cannot tell it from zero."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False)
    x = 1000.0 * torch.randn(1, 1, 64).expand(1, 2, 64) + torch.tensor([[[0.0], [0.25]]])
    weights = torch.tensor([1.0, -1.0]).view(1, 2, 1)
    uses = collect(layer, dict(layer.named_parameters()), torch.tensor([0]), lambda: (layer(x) * weights).sum())
    assert not uses.each("weight").eq(0).all()
    wanted = float(uses.each("weight").norm())
    assert float(uses.squares(NOTHING).sqrt()) == pytest.approx(wanted, rel=0.05)


def test_the_rounding_of_a_sum_is_within_the_bound():
    """Sixty-four tokens that cancel up to the last bit: what is left of them in float32 is rounding."""
    torch.manual_seed(0)
    layer, x, weights = nn.Linear(400, 400, bias=False), torch.randn(1, 64, 400), torch.randn(1, 64, 400)
    weights[:] = weights[:, :1] * torch.randn(1, 64, 1)
    scales = (weights[0, :, 0] / weights[0, -1, 0]).double()
    x[0, -1] = -(scales[:-1, None] * x[0, :-1].double()).sum(0).float()
    uses = collect(layer, dict(layer.named_parameters()), torch.tensor([0]), lambda: (layer(x) * weights).sum())
    sums, norms = uses.clipped(Clipping((1e-6,)))
    assert 1e-6 < float(norms) < 1
    assert float(sums["weight"].norm()) <= 1e-6 * 1.01


def test_dropout_falls_as_it_does_in_losses():
    bench = make_bench("causal-lm", "gpt2", LoRA(rank=3, dropout=0.5))
    (params,), batch = scattered(bench, 1, 0.5), make_batch("causal-lm", 3, 9, 0)
    bench.prove()
    units, leaves = torch.tensor([0, 0, 0]), bench.leaves([params])
    torch.manual_seed(1)
    sums, counts = bench.losses(leaves, [batch])
    (sums / counts).sum().backward()
    torch.manual_seed(1)
    ours, _ = sums_of(bench, params, batch, units, NOTHING)
    close(ours, {name: x.grad[0] for name, x in leaves.items()})
    again, _ = sums_of(bench, params, batch, units, NOTHING)
    assert distance(ours, again) > 0
    assert not any(module.training for module in bench.model.modules())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_model_is_left_as_it_was_and_still_generates(family):
    bench = make_bench("causal-lm", family, LoRA(rank=3), "bf16")
    before = {name: x.clone() for name, x in bench.model.state_dict().items()}
    sums_of(bench, bench.start(), make_batch("causal-lm", 3, 9, 0), torch.arange(3), NOTHING)
    assert all(torch.equal(x, before[name]) for name, x in bench.model.state_dict().items())
    assert all(type(p) is nn.Parameter and p.grad is None for p in bench.model.parameters())
    ids = torch.tensor([[5, 6, 7]])
    assert bench.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3).shape[1] > 3


# ---- refusals ----


@pytest.mark.parametrize(
    ("use", "named"),
    [
        (lambda w, x: w.sum() + x.sum(), "sum"),
        (lambda w, x: torch.einsum("bi,oi->bo", x, w), "einsum"),
        (lambda w, x: F.linear(x, w * w), "mul|two parameters"),
        (lambda w, x: F.linear(x.repeat(2, 1)[:7], w), "rows"),
        (lambda w, x: F.linear(x[0], w), "rows"),
        (lambda w, x: x.add_(w[0]), "add_"),
        (lambda w, x: F.embedding(torch.zeros(5, 2, dtype=torch.long), w, max_norm=1.0), "max_norm"),
        (lambda w, x: w.softmax(-1) @ x.t(), "softmax"),
        (lambda w, x: F.linear(w, x), "parameter times"),
        (lambda w, x: w.detach() + x.sum(), "detach"),
    ],
)  # fmt: skip
def test_what_has_no_rule_is_refused_by_function_and_parameter(use, named):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.strange = nn.Parameter(torch.randn(4, WIDTH))

    model, x = Odd(), torch.randn(5, WIDTH)
    with pytest.raises(ModelError, match=named) as error:
        collect(model, dict(model.named_parameters()), torch.arange(5), lambda: use(model.strange, x).sum())
    assert "strange" in str(error.value)


def test_sizes_that_agree_by_chance_are_decided_as_before():
    """As many positions as rows: what had no rows in a batch of other sizes has none here."""

    class Relative(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 1)

        def forward(self, x):
            places = torch.arange(x.shape[1])
            return torch.softmax(x + self.table((places[:, None] - places).abs())[..., 0], -1)

    model, choices = Relative(), Choices()
    params = dict(model.named_parameters())
    collect(model, params, torch.arange(3), lambda: model(torch.randn(3, 5, 5)).sum(), choices=choices)
    choices.learned = True
    x, weights = torch.randn(4, 4, 4), torch.arange(1.0, 5.0)
    uses = collect(
        model, params, torch.arange(4), lambda: (model(x).square().sum((1, 2)) * weights).sum(), choices=choices
    )
    for row in range(4):
        wanted = torch.autograd.grad(model(x[row : row + 1]).square().sum() * weights[row], list(params.values()))
        torch.testing.assert_close(uses.each("table.weight")[row], wanted[0])


class Mixing(nn.Module):
    """A layer in which examples influence one another."""

    def __init__(self, layer, how):
        super().__init__()
        self.layer, self.how = layer, how
        self.norm = nn.BatchNorm1d(32)

    def forward(self, x):
        y = self.layer(x)
        if self.how == "batch norm":
            return self.norm.train()(y.transpose(1, 2)).transpose(1, 2)
        if self.how == "mean of the batch":
            return y - 0.1 * y.mean(0, keepdim=True)
        if self.how == "places that run out":  # as in a mixture of experts with a capacity
            return y * (torch.arange(y.numel() // 32).view(*y.shape[:2], 1) < 9)
        return y.transpose(0, 1).reshape(y.shape) if self.how == "another's tokens" else y


MIXED = ["batch norm", "mean of the batch", "places that run out", "another's tokens"]


@pytest.mark.parametrize("adapter", [LoRA(rank=3), Full()], ids=["lora", "full"])
@pytest.mark.parametrize("how", MIXED)
def test_models_in_which_examples_meet_are_refused(how, adapter):
    bench = make_bench("causal-lm", "gpt2", adapter)
    core = bench._core.transformer
    core.h[0].mlp = Mixing(core.h[0].mlp, how).eval()
    core.h[0].mlp.norm.requires_grad_(False)
    names = {p: n for n, p in bench.model.named_parameters()}
    bench._trainable = {names[p]: p for p in bench._trainable.values()}
    with pytest.raises(GuaranteeError, match="together"):
        bench.clipped(bench.leaves([bench.start()]), [make_batch("causal-lm", 2, 9, 0)], [torch.arange(2)], [NOTHING])


def test_a_parameter_that_nothing_uses_is_refused_by_name():
    bench = make_bench("causal-lm", "gpt2", LoRA(rank=3))
    bench.model.register_parameter("spare", nn.Parameter(torch.ones(3)))
    bench._trainable["spare"] = bench.model.spare
    with pytest.raises(ModelError, match="spare"):
        bench.prove()


def test_the_proof_is_run_once_and_before_the_first_sum(monkeypatch):
    bench, seen = make_bench("causal-lm", "gpt2", LoRA(rank=3)), []
    predict = bench._predict
    monkeypatch.setattr(bench, "_predict", lambda *args, **kwargs: (seen.append(1), predict(*args, **kwargs))[1])
    for _ in range(2):
        sums_of(bench, bench.start(), make_batch("causal-lm", 2, 9, 0), torch.arange(2), NOTHING)
    assert len(seen) == 3 + 2  # two units alone, both together; then two batches
