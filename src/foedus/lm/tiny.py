"""Tiny random models of every family, for tests and for trying a treaty: `tiny:llama`, `tiny:bert`, `tiny:t5`, …

Each has two layers, a hidden size of 32 and about 300 tokens. Weights come from named generators, not from the
library's own initialisation, so they (and their digest) are the same on every machine and under every version of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, PreTrainedTokenizerFast
from transformers.configuration_utils import PretrainedConfig

from ..errors import ModelError, one_of
from ..seeds import generator

POSITIONS = 512
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", "<mask>")  # ids 0 … 4
PAD, BOS, EOS = 0, 1, 2
MERGES = """
Ġ t|h e|Ġ a|i n|r e|Ġt he|o n|e r|Ġ s|a t|Ġ o|n d|Ġ w|i s|e n|o r|Ġ c|Ġ b|e s|Ġa nd|i t|Ġo f|in g|a n|Ġ f|Ġ p|e d|
Ġt o|a l|Ġ m|a r|o u|Ġ in|l l|Ġ d
"""  # the usual first merges of English; "Ġ" is the space in byte-level spelling


@dataclass(frozen=True)
class Family:
    """How one family is built: its configuration, and how its tokenizer wraps a text."""

    template: str
    config: dict[str, Any] = field(default_factory=dict)


HIDDEN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": POSITIONS}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "<s> $A", HIDDEN | {"intermediate_size": 64, "num_key_value_heads": 2, "tie_word_embeddings": True}
    ),
    "gpt2": Family(
        "$A",
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": POSITIONS,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
    "gpt_neox": Family("$A", HIDDEN | {"intermediate_size": 64, "tie_word_embeddings": False}),
    "falcon": Family(
        "$A",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": POSITIONS},
    ),
    "bert": Family("<s> $A </s>", HIDDEN | NO_DROPOUT | {"intermediate_size": 64}),
    "roberta": Family(
        "<s> $A </s>",
        HIDDEN | NO_DROPOUT | {"intermediate_size": 64, "max_position_embeddings": POSITIONS + 2, "type_vocab_size": 1},
    ),
    "albert": Family(
        "<s> $A </s>",
        HIDDEN | NO_DROPOUT | {"intermediate_size": 64, "embedding_size": 16, "classifier_dropout_prob": 0.0},
    ),
    "t5": Family(
        "$A </s>",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "dropout_rate": 0.0,
            "decoder_start_token_id": PAD,
        },
    ),
    "bart": Family(
        "<s> $A </s>",
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "dropout": 0.0,
            "max_position_embeddings": POSITIONS,
            "decoder_start_token_id": EOS,
            "forced_eos_token_id": EOS,
        },
    ),
}


def tiny_config(family: str) -> PretrainedConfig:
    """The configuration of a tiny model; `ModelError` for a family that has none."""
    if family not in FAMILIES:
        known = one_of(f"tiny:{family}", [f"tiny:{name}" for name in FAMILIES])
        raise ModelError("a tiny model of a known family", f'"tiny:{family}"', known)
    ids = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    return AutoConfig.for_model(family, vocab_size=len(_vocabulary()), **ids, **FAMILIES[family].config)


def tiny_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 300 tokens: any text encodes, and decodes to itself."""
    merges = _merges()
    tokenizer = Tokenizer(models.BPE(vocab=_vocabulary(), merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIALS])
    used = [(word, i) for i, word in enumerate(SPECIALS) if word in FAMILIES[family].template]
    if used:
        tokenizer.post_processor = processors.TemplateProcessing(single=FAMILIES[family].template, special_tokens=used)
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token", "mask_token"), SPECIALS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=POSITIONS, **names)


@torch.no_grad()
def fill(model: torch.nn.Module, *names: str | int) -> None:
    """Every parameter from the generator of (names, its own name): matrices N(0, 1/columns), vectors N(0 or 1, 0.02²).

    Vectors are near one where they scale (norms) and near zero where they shift (biases).
    """
    for name, parameter in model.named_parameters():
        draw = generator(0, *names, name).standard_normal(tuple(parameter.shape), np.float32)
        if parameter.ndim > 1:
            draw = draw / np.float32(np.sqrt(parameter.shape[-1]))
        else:
            draw = np.float32(0.02) * draw + np.float32(name.endswith("weight"))
        parameter.copy_(torch.from_numpy(draw))


def _merges() -> list[tuple[str, str]]:
    pairs = (pair.strip().split(" ") for pair in MERGES.strip().split("|"))
    return [(left, right) for left, right in pairs]


def _vocabulary() -> dict[str, int]:
    words = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [word for word in (left + right for left, right in _merges()) if word not in words]
    return {word: i for i, word in enumerate(words)}
