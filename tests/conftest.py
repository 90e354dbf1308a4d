"""What many tests share: a small text data set of several domains, and treaties over tiny models."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

WORDS = {
    "medicine": "patient doctor fever dose clinic heart blood nurse pain cough".split(),
    "law": "court judge contract clause appeal party claim statute oath verdict".split(),
    "sport": "goal team coach match season league player score puck ice".split(),
}


@pytest.fixture(autouse=True)
def two_threads():
    """As many threads as the machines that this project is built on have, whatever test ran before."""
    torch.set_num_threads(2)


def sentences(domain: str, count: int, seed: int = 0) -> list[str]:
    """Random sentences from a domain's own words: easy to learn, and different from domain to domain."""
    rng = np.random.default_rng([seed, sorted(WORDS).index(domain)])
    return [" ".join(rng.choice(WORDS[domain], 12)) for _ in range(count)]


def rows(count: int = 60, seed: int = 0) -> list[dict[str, str]]:
    return [{"text": text, "domain": domain} for domain in WORDS for text in sentences(domain, count, seed)]


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    """A file of 180 examples in three domains."""
    import json

    path = tmp_path / "notes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return path


TREATY = """
[treaty]
name = "tiny"
seed = 1
[model]
base = "tiny:llama"
max_length = 24
[adapter]
rank = 4
[data]
source = "notes.jsonl"
domain = "domain"
[silos]
by = "domain"
[algorithm]
rounds = 3
[local]
steps = 2
lr = 0.01
[evaluation]
baselines = ["base", "local", "pooled"]
[performance]
cohort_batch = 1
"""


@pytest.fixture
def treaty(jsonl: Path):
    """A treaty over that file and a tiny Llama."""
    from foedus.treaty import load

    path = jsonl.with_name("treaty.toml")
    path.write_text(TREATY)
    return load(path)
