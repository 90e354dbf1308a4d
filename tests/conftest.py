"""What many tests share: a small text data set of several domains, and treaties over tiny models."""

from __future__ import annotations

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded: waiting threads sleep

from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

WORDS = {
    "medicine": "patient doctor fever dose clinic heart blood nurse pain cough".split(),
    "law": "court judge contract clause appeal party claim statute oath verdict".split(),
    "sport": "goal team coach match season league player score puck ice".split(),
}


LONG = (
    "test_parity.py", "test_methods_run.py", "test_private_run.py", "test_secure_run.py", "test_crash.py",
    "test_chaos.py", "test_deployment.py", "test_secure_processes.py", "test_execute.py", "test_cli.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """The longest files first: whole files are dealt to processes, and the last one keeps the others waiting."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models are quickest on one thread, and their results then do not depend on the machine's cores."""
    torch.set_num_threads(1)


def sentences(domain: str, count: int, seed: int = 0) -> list[str]:
    """Random sentences from a domain's own words: easy to learn, and different from domain to domain."""
    rng = np.random.default_rng([seed, sorted(WORDS).index(domain)])
    return [" ".join(rng.choice(WORDS[domain], 12)) for _ in range(count)]


def rows(count: int = 60, seed: int = 0) -> list[dict[str, str]]:
    return [{"text": text, "domain": domain} for domain in WORDS for text in sentences(domain, count, seed)]


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


"""


def write_treaty(folder: Path) -> Path:
    """A treaty over a tiny Llama and 180 examples in three domains, in files."""
    (folder / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    (folder / "treaty.toml").write_text(TREATY)
    return folder / "treaty.toml"


@pytest.fixture
def treaty(tmp_path: Path):
    from foedus.treaty import load

    return load(write_treaty(tmp_path))
