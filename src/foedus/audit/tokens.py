"""Token bags: which tokens a batch held, without their order, read off the gradient of a table of tokens.

The gradient of an embedding has a row for each token that was looked up, and zeros elsewhere. The gradient of an output
head has a large row for each token that was a target (Zhao et al. 2020, "iDLG", for one label; many here). Where both
are one table, or the head's softmax fills every row, the larger rows are still the tokens that occurred.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from ..lm.bench import Bench
from ..types import Params


def token_bag(bench: Bench, sent: Params, most: int) -> list[int]:
    """At most `most` tokens, the likeliest first; empty when no table of tokens was trained or nothing came of it."""
    tables = token_tables(bench, sent)
    return ranked(np.stack(list(tables.values())).max(0), most) if tables else []


def token_tables(bench: Bench, sent: Params) -> dict[str, np.ndarray]:
    """For each trained table of tokens, how strongly each token shows in its gradient: parameter → (V,), in [0, 1].

    Tables are the rows of an embedding or of an output head, and the columns of LoRA's A on an embedding. That A shows
    nothing while B is zero.
    """
    size = _vocabulary(bench)
    tables = {name: np.linalg.norm(sent[name], axis=0) for name in sent if _is_lora_table(name, sent[name], size)}
    owned = {id(p) for p in _token_parameters(bench)}
    named = dict(bench.model.named_parameters())
    tables |= {name: np.linalg.norm(x, axis=1) for name, x in sent.items() if id(named[name]) in owned}
    return {name: norms / norms.max() for name, norms in tables.items() if norms.max(initial=0.0) > 0}


def ranked(strength: np.ndarray, most: int) -> list[int]:
    """The tokens that show at all, strongest first, at most `most` of them."""
    order = np.argsort(-strength, kind="stable")[:most]
    return [int(token) for token in order if strength[token] > 0]


def bag_recall(truth: Sequence[Sequence[int]], found: Sequence[int], others: Sequence[Sequence[int]] = ()) -> float:
    """The share of the different tokens of `truth` that are among the first of `found`; 0 without any.

    As many count as there are different tokens in `truth` and `others` together: a bag that names the whole vocabulary
    is no better than guessing.
    """
    held = {token for row in truth for token in row}
    first = len(held | {token for row in others for token in row})
    return len(held & set(found[:first])) / len(held) if held else 0.0


def _vocabulary(bench: Bench) -> int:
    return int(bench.model.get_input_embeddings().weight.shape[0])


def _is_lora_table(name: str, gradient: np.ndarray, size: int) -> bool:
    return "lora_embedding_A" in name and gradient.shape[-1] == size


def _token_parameters(bench: Bench) -> list[Tensor]:
    modules: list[nn.Module | None] = [bench.model.get_input_embeddings(), bench.model.get_output_embeddings()]
    return [module.weight for module in modules if module is not None and isinstance(module.weight, Tensor)]
