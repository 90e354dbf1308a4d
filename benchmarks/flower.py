"""Client updates a second, beside Flower's simulation engine with Ray: `python -m benchmarks.flower`.

100 clients train LoRA on a Llama of two layers and width 32, 10 steps of AdamW on 4 rows of 32 tokens each, in every
round: the same model, the same adapter, the same batches in the same order, both in fp32. Ours trains many silos at
once over the shared base; Flower runs one client on each core (`peer_flower.py` says how it was written). The two take
turns, each in a process of its own. The first round is not counted, because Ray still starts and Flower's actors load
the model in it; what it takes is shown beside. That both did the same work is a row too: how far apart their losses
are.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from foedus import loop
from foedus.build import Workplace, build
from foedus.seeds import derive, generator
from foedus.treaty import parse

from .apart import apart, installed
from .table import Row, faster, finish, machine, median, more, share

CLIENTS, STEPS, BATCH, LENGTH = 100, 10, 4, 32
ROUNDS, TURNS, TOGETHER, TARGET = 3, 2, "auto", 10.0
HIDDEN, RANK, ALPHA, LR = 32, 8, 16, 1e-2

TREATY = """
[treaty]
name = "flower"
[model]
base = "{base}"
max_length = {length}
[adapter]
rank = {rank}
alpha = {alpha}
[data]
source = "memory"
[silos]
by = "given"
[split]
validation = 0.0
test = 0.0
[algorithm]
name = "fedavg"
rounds = {rounds}
[local]
steps = {steps}
batch = {batch}
lr = {lr}
[performance]
precision = "fp32"
threads = {threads}
cohort_batch = {together}
"""


def make_model(folder: Path, hidden: int = HIDDEN) -> None:
    """A Llama of two layers with random weights, and its tokenizer, as Transformers saves them."""
    from transformers import AutoModelForCausalLM

    from foedus.lm.tiny import fill, tiny_config, tiny_tokenizer

    config = tiny_config("llama")
    config.hidden_size, config.intermediate_size, config.head_dim = hidden, 2 * hidden, hidden // 4
    model = AutoModelForCausalLM.from_config(config)
    fill(model, "benchmark")
    model.save_pretrained(folder)
    tiny_tokenizer("llama").save_pretrained(folder)


def texts(client: int, count: int, length: int) -> list[dict[str, str]]:
    """`count` texts of exactly `length` tokens with the two special ones: words of capitals, ten of a client's own."""
    draw = generator(0, "benchmark text", client)
    words = ["".join(draw.choice(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), 4)) for _ in range(10)]
    wanted = length - 2  # a capital and the blank before it are a token each
    return [{"text": " ".join(draw.choice(words, length))[:wanted]} for _ in range(count)]


def workplace(folder: Path, rounds: int, clients: int, together: int | str) -> Workplace:
    """Our federation over the model in `folder`."""
    import psutil

    treaty = TREATY.format(
        base=folder.as_posix(), length=LENGTH, rank=RANK, alpha=ALPHA, rounds=rounds, steps=STEPS, batch=BATCH, lr=LR,
        threads=len(psutil.Process().cpu_affinity()), together=json.dumps(together),
    )  # fmt: skip
    return build(parse(treaty), {f"client-{i:03d}": texts(i, STEPS * BATCH, LENGTH) for i in range(clients)})


def batches(place: Workplace, rounds: int) -> np.ndarray:
    """The token ids that every client trains on, (rounds, clients, steps, rows, tokens)."""
    plan, seed = place.plan, place.federation.seed

    def ids(silo, number: int, step: int) -> np.ndarray:
        rows = silo.rows(seed, number, step, plan.batch, plan.steps, plan.epochs)
        batch = place.bench.objective.collate(silo.splits["train"], rows, derive(seed, "collate"))
        assert bool(batch["attention_mask"].all()), "Expected rows of equal length."
        return batch["input_ids"].numpy()

    return np.array([[[ids(silo, r, s) for s in range(STEPS)] for silo in place.silos.values()] for r in range(rounds)])


def ours(folder: str, rounds: int, clients: int, together: int | str) -> dict[str, Any]:
    """As `peer_flower.simulate`: seconds until the first round is done, those of every other one, and the losses."""
    tick = time.perf_counter()
    place = workplace(Path(folder) / "model", rounds, clients, together)
    state = start = loop.start(place.federation, place.bench.start())
    out: dict[str, Any] = {"rounds": [], "losses": []}
    for state, release in loop.run(place.federation, place.engine(), start):  # noqa: B007 (the last one is the result)
        now = time.perf_counter()
        out["rounds"].append(now - tick)
        out["losses"].append(float(release.tensors["metric", "loss"][0] / release.tensors["metric", "targets"][0]))
        tick = time.perf_counter()
    return {**out, "first": out["rounds"].pop(0), "arrays": {name: np.asarray(x) for name, x in state.params.items()}}


def flower(folder: str, arrays: Mapping[str, np.ndarray], rounds: int, clients: int) -> dict[str, Any]:
    """The same rounds in Flower's simulation."""
    from .peer_flower import simulate

    config = {"folder": folder, "rank": RANK, "alpha": ALPHA, "lr": LR, "examples": STEPS * BATCH}
    return simulate("learner", arrays, clients, rounds, config)


def prepare(folder: str, rounds: int, clients: int) -> dict[str, np.ndarray]:
    """Writes the model and Flower's batches; returns the adapter that both start from."""
    from .peer_flower import BATCHES, MODEL

    make_model(Path(folder) / MODEL)
    place = workplace(Path(folder) / MODEL, rounds, clients, 1)
    np.save(Path(folder) / BATCHES, batches(place, rounds))
    return place.bench.start()


def rows(clients: int = CLIENTS, rounds: int = ROUNDS, turns: int = TURNS, together: int | str = TOGETHER) -> list[Row]:
    """Updates a second of both, with and without the start, and how far apart their losses are."""
    peer = installed("flwr", "ray")
    with tempfile.TemporaryDirectory() as folder:
        if peer:
            arrays = apart(prepare, folder, rounds + 1, clients)
        else:
            apart(make_model, Path(folder) / "model")
        mine, theirs = [], []
        for _ in range(turns):
            mine.append(apart(ours, folder, rounds + 1, clients, together))
            if peer:
                theirs.append(apart(flower, folder, arrays, rounds + 1, clients))
    return table(mine, theirs, clients)


def table(mine: list[dict[str, Any]], theirs: list[dict[str, Any]], clients: int) -> list[Row]:
    """Rows of the runs of both; `theirs` is empty where Flower is not installed."""

    def rate(runs: list[dict[str, Any]], pick) -> float | None:
        seconds = [s for run in runs for s in run["rounds"]]
        return clients / pick(seconds) if seconds else None

    def whole(runs: list[dict[str, Any]]) -> float | None:
        seconds = [run["first"] + sum(run["rounds"]) for run in runs]
        return clients * (1 + len(runs[0]["rounds"])) / median(seconds) if runs else None

    what = f"flower: client updates of {STEPS} steps, {clients} clients"
    unit = "updates/s"
    out = [
        more(f"{what}, median round", rate(mine, median), rate(theirs, median), unit, TARGET),
        more(f"{what}, best round", rate(mine, min), rate(theirs, min), unit),
        more(f"{what}, start and first round counted", whole(mine), whole(theirs), unit),
        faster("flower: from the start to the end of the first round", median([run["first"] for run in mine]),
               median([run["first"] for run in theirs]) if theirs else None, "s"),
    ]  # fmt: skip
    if theirs:
        out += _same_work(mine[0], theirs[0])
    return out


def _same_work(mine: dict[str, Any], theirs: dict[str, Any]) -> list[Row]:
    """The largest distance of the losses of a round, and of the final adapters relative to their size."""
    losses = max(abs(a - b) for a, b in zip(mine["losses"], theirs["losses"], strict=True))
    last, other = mine["losses"][-1], theirs["losses"][-1]
    apart_by = np.sqrt(sum(((x - theirs["arrays"][name]) ** 2).sum() for name, x in mine["arrays"].items()))
    size = np.sqrt(sum((x**2).sum() for x in mine["arrays"].values()))
    return [
        Row("flower: mean loss of the last round; ratio: largest distance in any round", last, other, losses, 1e-3,
            "nats", machine(), at_most=True),
        share("flower: distance of the final adapters beside their norm", float(apart_by), float(size), "L2", 1e-2),
    ]  # fmt: skip


if __name__ == "__main__":
    finish("flower", rows())
