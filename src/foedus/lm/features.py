"""Texts as vectors: the mean of a base's last hidden states, and sentence embeddings by all-MiniLM-L6-v2.

For comparing silos or examples by content. A vector says much about its text, and is as private.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from peft import PeftModel
from torch import nn

from ..errors import ModelError
from .load import Base, load_base

SENTENCE_ENCODER = "all-minilm-l6-v2"


def load_encoder(name: str = SENTENCE_ENCODER) -> Base:
    """A base without a head, for `features`; by default the sentence encoder."""
    return load_base(name, "features")


@torch.no_grad()
def features(base: Base, texts: Sequence[str], batch: int = 32, max_length: int = 256) -> np.ndarray:
    """The mean of the last hidden states over each text's tokens, special ones included: (n, d), float32.

    Of an encoder-decoder, the encoder's. A text is cut after `max_length` tokens; one without any token is all zeros.
    With an adapter attached, the adapter takes part.
    """
    if base.kept:
        raise ModelError("a model that is shown tokens", "one that begins at kept states", "Load the base again.")
    backbone = _backbone(base.model)
    limit = min(max_length, base.tokenizer.model_max_length)
    tokens = _tokens(base, texts, limit)
    out = np.zeros((len(tokens), backbone.config.hidden_size), np.float32)
    by_length = sorted((i for i, ids in enumerate(tokens) if ids), key=lambda i: len(tokens[i]))
    for start in range(0, len(by_length), batch):
        chosen = by_length[start : start + batch]
        out[chosen] = _means(backbone, [tokens[i] for i in chosen], base.tokenizer.pad_token_id or 0)
    return out


def sentence_embeddings(encoder: Base, texts: Sequence[str], batch: int = 32) -> np.ndarray:
    """`features` scaled to length one, as sentence-transformers does for this encoder; a dot product is a cosine."""
    vectors = features(encoder, texts, batch)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _backbone(model: nn.Module) -> nn.Module:
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    return plain.get_encoder() if plain.config.is_encoder_decoder else plain.base_model


def _tokens(base: Base, texts: Sequence[str], limit: int) -> list[list[int]]:
    return base.tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"] if texts else []


def _means(backbone: nn.Module, rows: Sequence[Sequence[int]], pad: int) -> np.ndarray:
    ids = torch.full((len(rows), max(map(len, rows))), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    states = backbone(input_ids=ids, attention_mask=mask).last_hidden_state  # (32, 57, 384)
    weights = mask.unsqueeze(-1).float()
    return ((states * weights).sum(1) / weights.sum(1)).numpy()
