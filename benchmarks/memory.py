"""Peak resident memory with 100 silos, beside one: `python -m benchmarks.memory`.

Every silo holds the same amount of text and trains LoRA on SmolLM2-135M. The run goes through `execute`, into a
folder, each in a process of its own. Rounds, steps and batch are small because peaks do not grow with them: what
would grow with the silos are their updates, their text and their memories.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from foedus.build import build
from foedus.execute import begin, execute
from foedus.treaty import parse

from .apart import apart, peak
from .table import Row, finish, share

SILOS, TARGET = 100, 1.15
EXAMPLES = 20

TREATY = """
[treaty]
name = "memory"
[model]
base = "smollm2-135m-instruct"
max_length = 32
[data]
source = "20newsgroups"
max_examples = {examples}
[silos]
by = "iid"
count = {silos}
[split]
validation = 0.1
test = 0.0
[algorithm]
name = "fedavg"
rounds = 2
[local]
steps = 1
batch = 4
[evaluation]
every = 2
baselines = []
max_windows = 1
[performance]
cohort_batch = 1
"""


def measure(silos: int, examples: int) -> tuple[int, int]:
    """The peak before the first round and after the run, in bytes."""
    place = build(parse(TREATY.format(silos=silos, examples=examples)))
    ready = peak()
    with tempfile.TemporaryDirectory() as folder:
        for _ in execute(begin(place.treaty, Path(folder) / "run"), place):
            pass
    return ready, peak()


def rows(silos: int = SILOS, examples: int = EXAMPLES) -> list[Row]:
    """The peak with many silos beside the peak with one; and likewise before training begins."""
    (ready_many, many), (ready_one, one) = apart(measure, silos, examples), apart(measure, 1, examples)
    gib = 2.0**30
    return [
        share(f"memory: peak with {silos} silos, beside one", many / gib, one / gib, "GiB", TARGET),
        share(f"memory: model and text of {silos} silos loaded, beside one", ready_many / gib, ready_one / gib, "GiB"),
    ]


if __name__ == "__main__":
    finish("memory", rows())
