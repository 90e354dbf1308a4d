"""Every rule gives what K plain calls give, values and gradients; what has no rule says so."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from foedus.lm.stacked import NoRule, halve, stack

K, ROWS, LENGTH, WIDTH = 3, 2, 5, 6


class Transposed(nn.Module):
    """A product written by hand, as in Falcon."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, WIDTH)), nn.Parameter(torch.randn(4))

    def forward(self, x):
        return x @ self.weight.T + self.bias


class Rms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        return torch.nn.functional.rms_norm(x, (WIDTH,), self.weight, 1e-5)


LAYERS = {
    "linear": lambda: nn.Linear(WIDTH, 4),
    "linear without bias": lambda: nn.Linear(WIDTH, 4, bias=False),
    "conv1d": lambda: Conv1D(4, WIDTH),
    "product by hand": Transposed,
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "rms norm": Rms,
    "rms norm of Llama": lambda: LlamaRMSNorm(WIDTH),
}


def versions(layer, only=None):
    """K sets of parameters for a layer, as leaves."""
    names = [name for name, _ in layer.named_parameters() if only is None or name in only]
    return {name: torch.randn(K, *layer.get_parameter(name).shape, requires_grad=True) for name in names}


def agree(layer, leaves, x, tolerance=1e-5):
    x = x.clone().requires_grad_() if x.is_floating_point() else x
    stacked = functional_call(layer, {name: stack(w, ROWS) for name, w in leaves.items()}, (x,))
    parts = [functional_call(layer, {name: w[k] for name, w in leaves.items()}, (x[k * ROWS : (k + 1) * ROWS],))
             for k in range(K)]  # fmt: skip
    plain = torch.cat(parts)
    assert type(stacked) is torch.Tensor
    torch.testing.assert_close(stacked, plain, rtol=tolerance, atol=tolerance)
    inputs = [*leaves.values(), *([x] if x.is_floating_point() else [])]
    out = torch.randn_like(plain)
    ours, theirs = torch.autograd.grad(stacked, inputs, out), torch.autograd.grad(plain, inputs, out)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("shape", [(), (LENGTH,), (2, LENGTH)], ids=["vectors", "sequences", "heads"])
def test_a_layer_with_k_versions_is_k_layers(kind, shape):
    layer = LAYERS[kind]()
    agree(layer, versions(layer), torch.randn(K * ROWS, *shape, WIDTH))


@pytest.mark.parametrize("only", ["weight", "bias"])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "layer norm"])
def test_weight_or_bias_may_be_frozen(kind, only):
    layer = LAYERS[kind]()
    agree(layer, versions(layer, (only,)), torch.randn(K * ROWS, LENGTH, WIDTH))


@pytest.mark.parametrize("padding", [None, 0])
def test_an_embedding_with_k_versions_is_k_embeddings(padding):
    layer = nn.Embedding(11, WIDTH, padding_idx=padding)
    agree(layer, versions(layer), torch.randint(0, 11, (K * ROWS, LENGTH)))


@pytest.mark.parametrize("shape", [(LENGTH,), (1, LENGTH)])
def test_ids_that_all_rows_share_are_looked_up_for_each(shape):
    layer = nn.Embedding(11, WIDTH)
    leaves = versions(layer)
    ids = torch.arange(LENGTH).view(shape)
    out = functional_call(layer, {"weight": stack(leaves["weight"], ROWS)}, (ids,))
    plain = torch.stack([leaves["weight"][k, :LENGTH] for k in range(K) for _ in range(ROWS)])
    assert torch.equal(out, plain)


def test_a_stacked_parameter_says_the_shape_of_one():
    w = stack(torch.randn(K, 4, WIDTH), ROWS)
    assert (tuple(w.shape), w.dim(), w.size(0), w.dtype, tuple(w.T.shape)) == ((4, 6), 2, 4, torch.float32, (6, 4))


@pytest.mark.parametrize(
    "use",
    [
        lambda w: w.sum(),
        lambda w: torch.nn.functional.linear(torch.randn(5, WIDTH), w),
        lambda w: w * w,
        lambda w: torch.einsum("bi,oi->bo", torch.randn(6, WIDTH), w),
        lambda w: torch.nn.functional.embedding(torch.zeros(5, 5, dtype=torch.long), w),
    ],
    ids=["sum", "rows of nobody", "two parameters", "einsum", "ids of nobody"],
)
def test_what_has_no_rule_is_refused(use):
    with pytest.raises(NoRule):
        use(stack(torch.randn(K, 4, WIDTH), ROWS))


@pytest.mark.parametrize("kind", ["linear", "linear without bias", "conv1d", "product by hand"])
def test_a_half_matrix_gives_the_product_within_its_rounding_and_no_weight_gradient(kind):
    layer = LAYERS[kind]().requires_grad_(False)
    x = torch.randn(7, WIDTH, requires_grad=True)
    half = functional_call(layer, {"weight": halve(layer.weight)}, (x,))
    plain = layer(x)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, plain, rtol=0.02, atol=0.05)
    (ours,), (theirs,) = torch.autograd.grad(half.sum(), x), torch.autograd.grad(plain.sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.05)


def test_a_half_matrix_is_two_bytes_a_number_and_says_four():
    half = halve(torch.randn(4, WIDTH))
    assert half.dtype == torch.float32
    with torch._C.DisableTorchFunctionSubclass():
        assert half.untyped_storage().nbytes() == 2 * 4 * WIDTH
