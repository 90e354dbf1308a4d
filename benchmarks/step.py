"""One LoRA training step of SmolLM2-135M: ours beside `transformers.Trainer` + PEFT, in fp32 and with bf16 autocast.

    PYTHONPATH=src python benchmarks/step.py [--steps 100] [--rows 8] [--length 128] [--threads 2] [--json FILE]

The three train in turn, one step each (A B C A B C …), from the same adapter on the same batches of 20 Newsgroups,
with the same AdamW; so a busy machine slows all three, and the ratios are of medians. A step is the whole of it:
forward, backward, clipping to norm 1, optimizer. The Trainer is the real one: it runs in a thread that is let go one
step at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads make a busy machine many times slower

import torch
import transformers
from torch import Tensor, nn

from foedus.data import Columns, read
from foedus.lm.adapters import LoRA, attach
from foedus.lm.bench import Bench
from foedus.lm.load import Base, load_base
from foedus.lm.objectives import Objective, make_objective

MODEL, LR, MAX_NORM = "smollm2-135m-instruct", 5e-4, 1.0
TARGETS = {"trainer fp32": 2.5, "trainer bf16": 1.3}


@dataclass
class Runner:
    """One competitor: `step()` trains on the next batch and returns its mean loss in nats."""

    name: str
    step: Callable[[], float]
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def rows(
    steps: int = 100, rows: int = 8, length: int = 128, threads: int | None = 2, device: str | None = None
) -> list[dict[str, Any]]:
    """The rows of the benchmark table; prints it too. `steps`: per competitor, the first two are not timed."""
    if threads is not None:
        torch.set_num_threads(threads)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    objective = make_objective("causal-lm", length)
    runners = list(_runners(objective, steps, rows, length, where, threads))
    for number in range(steps):
        for runner in runners:
            start = time.perf_counter()
            runner.losses.append(runner.step())
            runner.seconds.append(time.perf_counter() - start)
        if number % 10 == 0:
            print(f"step {number}: " + ", ".join(f"{r.name} {r.seconds[-1]:.2f} s" for r in runners), flush=True)
    return _table(runners, rows * length, where)


def _runners(
    objective: Objective, steps: int, rows: int, length: int, where: torch.device, threads: int | None
) -> Iterator[Runner]:
    base = _base(where)
    batches = _batches(base, objective, steps, rows, length)
    yield Runner("ours", _ours(base, objective, batches))
    for name, bf16 in (("trainer fp32", False), ("trainer bf16", True)):
        yield Runner(name, _trainer(_base(where).model, batches, bf16, where, threads))


def _base(where: torch.device) -> Base:
    base = load_base(MODEL)
    attach(base, LoRA(rank=8), seed=0)
    base.model.to(where)
    return base


def _batches(base: Base, objective: Objective, steps: int, rows: int, length: int) -> list[dict[str, Tensor]]:
    """Windows of exactly `length` tokens, so that no one gains by padding."""
    table = read("20newsgroups", Columns(), base=Path("."))
    encoded = objective.encode(table.slice(0, 40 * steps * rows // 10 + 200), base.tokenizer)
    full = [i for i in range(len(encoded)) if len(encoded.inputs[i]) == length]
    picked = [full[i * rows : (i + 1) * rows] for i in range(len(full) // rows)]
    return [objective.collate(encoded, picked[i % len(picked)], 0) for i in range(steps)]


def _ours(base: Base, objective: Objective, batches: Sequence[dict[str, Tensor]]) -> Callable[[], float]:
    bench = Bench(base, objective)
    leaves = bench.leaves([bench.start()])
    optimizer = torch.optim.AdamW(leaves.values(), lr=LR, weight_decay=0.0, fused=True)
    pending = iter(batches)

    def step() -> float:
        sums, counts = bench.losses(leaves, [next(pending)])
        loss = (sums / counts).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(leaves.values(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


class _Rows(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """The batches' rows, one by one and in order, as the Trainer wants them."""

    def __init__(self, batches: Sequence[dict[str, Tensor]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.batches:
            for i in range(len(batch["input_ids"])):
                yield {name: x[i] for name, x in batch.items()}


class _Gate(transformers.TrainerCallback):
    """Holds the Trainer before each step until it is its turn."""

    def __init__(self) -> None:
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.started = False

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if self.started:
            self.done.release()
        self.started = True
        self.go.acquire()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.done.release()


def _trainer(
    model: nn.Module, batches: Sequence[dict[str, Tensor]], bf16: bool, where: torch.device, threads: int | None
) -> Callable[[], float]:
    gate = _Gate()
    scratch = tempfile.mkdtemp()
    options = transformers.TrainingArguments(
        output_dir=scratch, max_steps=len(batches), per_device_train_batch_size=len(batches[0]["input_ids"]),
        learning_rate=LR, lr_scheduler_type="constant", max_grad_norm=MAX_NORM, bf16=bf16, use_cpu=where.type == "cpu",
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, seed=0,
        dataloader_pin_memory=where.type == "cuda",
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=options, train_dataset=_Rows(batches), callbacks=[gate])
    trainer.remove_callback(transformers.PrinterCallback)

    def train() -> None:
        if threads is not None:
            torch.set_num_threads(threads)  # OpenMP keeps this for each thread
        trainer.train()

    threading.Thread(target=train, daemon=True).start()
    taken = 0

    def step() -> float:
        nonlocal taken
        gate.go.release()
        gate.done.acquire()
        taken += 1
        return next(log["loss"] for log in trainer.state.log_history if log["step"] == taken)

    return step


def _table(runners: Sequence[Runner], tokens: int, where: torch.device) -> list[dict[str, Any]]:
    ours, *peers = runners
    median = {r.name: statistics.median(r.seconds[2:] or r.seconds) for r in runners}
    hardware = f"{_processor(where)}, {torch.get_num_threads()} threads"
    out = []
    for peer in peers:
        ratio = median[peer.name] / median["ours"]
        out.append(
            {
                "name": f"step: against {peer.name}", "ours": median["ours"], "peer": median[peer.name], "ratio": ratio,
                "target": TARGETS[peer.name], "unit": "s", "hardware": hardware,
            }
        )  # fmt: skip
        drift = [abs(a - b) for a, b in zip(ours.losses, peer.losses, strict=True)]
        out.append(
            {
                "name": f"step: mean distance of the loss curves, {peer.name}", "ours": statistics.fmean(ours.losses),
                "peer": statistics.fmean(peer.losses), "ratio": statistics.fmean(drift), "target": None, "unit": "nats",
                "hardware": hardware,
            }
        )  # fmt: skip
    between = statistics.fmean(abs(a - b) for a, b in zip(peers[0].losses, peers[1].losses, strict=True))
    flop, peak, best = floating_point_operations(tokens), matmul_peak(where), min(ours.seconds)
    out.append(
        {
            "name": "step: the best one's rate over the matmul peak", "ours": flop / best / 1e9, "peer": peak / 1e9,
            "ratio": flop / best / peak, "target": None, "unit": "GFLOP/s", "hardware": hardware,
        }
    )  # fmt: skip
    _print(runners, median, out, between, flop)
    return out


def _print(
    runners: Sequence[Runner], median: dict[str, float], out: Sequence[dict[str, Any]], between: float, flop: float
) -> None:
    print(f"\n{'':16}{'median s':>10}{'tokens/s':>10}{'GFLOP/s':>9}   loss: first, mean of last ten")
    for r in runners:
        last = statistics.fmean(r.losses[-10:])
        rate = flop / median[r.name] / 1e9
        tokens = flop / floating_point_operations(1) / median[r.name]
        print(f"{r.name:16}{median[r.name]:10.3f}{tokens:10.0f}{rate:9.0f}   {r.losses[0]:.4f}, {last:.4f}")
    for row in out:
        target = "" if row["target"] is None else f" (target {row['target']})"
        print(f"{row['name']}: {row['ours']:.4g} / {row['peer']:.4g} {row['unit']}, ratio {row['ratio']:.3f}{target}")
    print(f"the two Trainers' loss curves are {between:.4f} nats apart in the mean")


def floating_point_operations(tokens: int) -> float:
    """Of the matrix products that a LoRA step cannot avoid: 2 forward and 2 backward for each frozen weight and token.

    SmolLM2-135M: 30 layers of 3,538,944 weights and a head of 28,311,552. Attention and LoRA's own (7 %) are left out.
    """
    return 4.0 * tokens * (30 * 3_538_944 + 49_152 * 576)


def matmul_peak(where: torch.device, size: int = 1024) -> float:
    """The best FLOP/s of a bf16 or fp32 product of the model's largest layer shape, here and now."""
    best = 0.0
    for dtype in (torch.bfloat16, torch.float32):
        x, w = torch.randn(size, 576, device=where, dtype=dtype), torch.randn(576, 3072, device=where, dtype=dtype)
        for _ in range(30):
            start = time.perf_counter()
            x @ w
            if where.type == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2 * size * 576 * 3072 / (time.perf_counter() - start))
    return best


def _processor(where: torch.device) -> str:
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    return str(torch.cpu.get_capabilities().get("cpu_name") or platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")  # the Trainer's and PEFT's own
    table = rows(given.steps, given.rows, given.length, given.threads, given.device)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
