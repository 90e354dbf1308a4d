"""What a private training step costs beside one without privacy: `python -m benchmarks.private_step`.

    python -m benchmarks.private_step [--steps 20] [--rows 16] [--length 128] [--threads 2] [--case NAME ...] [--tiny]

A step is the whole of it: forward, backward, clipping, optimizer. Without privacy the batch's gradient is clipped to
norm 1; with it each row's is, and Gaussian noise from the operating system's randomness is added to their sum. The two
train in turn (A B A B …) on the same batches from the same adapter, so a busy machine slows both, and ratios are of
medians. Opacus' hooks train beside them, and so does what these hooks are attached to: the same model and loss in
plain fp32 PyTorch; its cost is relative to that, which is slower than ours.

Operations are those of the matrix products, as PyTorch counts them, and 2 for each number of each row's gradient, which
are the norms. Peaks are of a process of its own for each of the two. Rows are random tokens, all of the same length;
"ragged" rows have a quarter of it at least. `--tiny` tries it all on tiny models.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from foedus.lm.adapters import Full, LoRA, attach
from foedus.lm.bench import IGNORED, Bench
from foedus.lm.clipping import Clipping
from foedus.lm.load import Base, load_base
from foedus.lm.objectives import make_objective
from foedus.privacy.noise import SystemSource, gaussian

from .apart import apart, installed, peak
from .table import Row, finish, median, share

LR, NORM, NOISE = 5e-4, 1.0, 1.0
WARM = 2
"""Steps that are not timed."""


@dataclass(frozen=True)
class Case:
    """A model with what is trained of it, and the most that privacy may cost, as ratios."""

    name: str
    model: str  # "gpt2 shape" or a name of `foedus list models`
    adapter: LoRA | Full
    time: float
    operations: float | None = None
    memory: float | None = None
    ragged: bool = False
    opacus: bool = False


CASES = (
    Case("SmolLM2-135M, LoRA", "smollm2-135m-instruct", LoRA(rank=8), 1.05, 1.001, 1.02),
    Case("SmolLM2-135M, LoRA, ragged rows", "smollm2-135m-instruct", LoRA(rank=8), 1.05, ragged=True),
    Case("GPT-2 shape, LoRA", "gpt2 shape", LoRA(rank=8), 1.05, 1.001, 1.02, opacus=True),
    Case("GPT-2 shape, all parameters", "gpt2 shape", Full(), 1.25),
)


@dataclass(frozen=True)
class Size:
    """How much is measured. `tiny`: on models of two layers, to see that it runs."""

    steps: int = 20
    rows: int = 16
    length: int = 128
    threads: int = 2
    tiny: bool = False


@dataclass
class Runner:
    """One competitor: `step(number)` trains on that batch."""

    name: str
    step: Callable[[int], None]
    seconds: list[float] = field(default_factory=list)


def rows(size: Size | None = None, cases: tuple[Case, ...] = CASES) -> list[Row]:
    """The rows of the benchmark table."""
    return [row for case in cases for row in _measure(case, size or Size())]


def _measure(case: Case, size: Size) -> Iterator[Row]:
    torch.set_num_threads(size.threads)
    seconds = _times(case, size)
    name = f"private step: {case.name}"
    yield share(f"{name}, time", seconds["private"], seconds["ordinary"], "s", case.time)
    if "opacus" in seconds:
        yield share(f"{name}, time of Opacus' hooks beside plain PyTorch", seconds["opacus"], seconds["plain"], "s")
        yield share(f"{name}, time beside Opacus' hooks", seconds["private"], seconds["opacus"], "s")
    if case.operations is not None:
        counts = [_operations(case, size, private) / 1e9 for private in (True, False)]
        yield share(f"{name}, operations", *counts, "GFLOP", case.operations)
    if case.memory is not None:
        peaks = [apart(peak_of, case.name, astuple(size), private) / 2**30 for private in (True, False)]
        yield share(f"{name}, peak memory", *peaks, "GiB", case.memory)


def _times(case: Case, size: Size) -> dict[str, float]:
    """Median seconds a step, by competitor."""
    runners = [Runner("ordinary", _ours(case, size, False)), Runner("private", _ours(case, size, True))]
    if case.opacus and installed("opacus"):
        runners += [Runner("plain", _plain(case, size, False)), Runner("opacus", _plain(case, size, True))]
    for number in range(size.steps + WARM):
        for runner in runners:
            start = time.perf_counter()
            runner.step(number)
            runner.seconds.append(time.perf_counter() - start)
        if number % 5 == 0:
            shown = ", ".join(f"{r.name} {r.seconds[-1]:.2f} s" for r in runners)
            print(f"{case.name}, step {number}: {shown}", flush=True)
    return {runner.name: median(runner.seconds[WARM:]) for runner in runners}


def _operations(case: Case, size: Size, private: bool) -> float:
    """Floating-point operations of the matrix products and norms of a step."""
    base = _base(case, size)
    step = _ours(case, size, private, base)
    step(0)  # what is done once is not counted
    with FlopCounterMode(display=False) as counter:
        step(1)
    trained = sum(p.numel() for p in base.model.parameters() if p.requires_grad)
    return counter.get_total_flops() + (2.0 * size.rows * trained if private else 2.0 * trained)


def peak_of(name: str, values: tuple[Any, ...], private: bool) -> int:
    """The most memory that three steps take, in bytes, model and optimizer included. `values`: of the `Size`."""
    case, size = next(case for case in CASES if case.name == name), Size(*values)
    torch.set_num_threads(size.threads)
    step = _ours(case, size, private)
    for number in range(3):
        step(number)
    return peak()


def _ours(case: Case, size: Size, private: bool, base: Base | None = None) -> Callable[[int], None]:
    base = base or _base(case, size)
    bench = Bench(base, make_objective("causal-lm", size.length))
    leaves = bench.leaves([bench.start()])
    optimizer = torch.optim.AdamW(leaves.values(), lr=LR, weight_decay=0.0, fused=True)
    clipping, units = Clipping((NORM,)), torch.arange(size.rows)

    def ordinary(number: int) -> None:
        sums, counts = bench.losses(leaves, [_batch(case, size, number)])
        (sums / counts).sum().backward()
        nn.utils.clip_grad_norm_(leaves.values(), NORM)

    def noisy(number: int) -> None:
        sums = bench.clipped(leaves, [_batch(case, size, number)], [units], [clipping])
        generator = SystemSource().generator("benchmark", number)
        for name, x in leaves.items():
            noise = torch.from_numpy(gaussian(generator, tuple(x.shape), NOISE * NORM))
            x.grad = sums.gradients[name].add_(noise).div_(size.rows)

    def step(number: int) -> None:
        (noisy if private else ordinary)(number)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _plain(case: Case, size: Size, private: bool) -> Callable[[int], None]:
    """The same step by transformers, PEFT and PyTorch alone; `private`: with Opacus' hooks and optimizer."""
    model: Any = _base(case, size).model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)
    if private:
        from opacus.grad_sample import GradSampleModule
        from opacus.optimizers import DPOptimizer

        model = GradSampleModule(model.train())
        optimizer = DPOptimizer(optimizer, noise_multiplier=NOISE, max_grad_norm=NORM, expected_batch_size=size.rows)

    def step(number: int) -> None:
        model(**_batch(case, size, number), use_cache=False).loss.backward()
        if not private:
            nn.utils.clip_grad_norm_(trained, NORM)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _base(case: Case, size: Size) -> Base:
    torch.manual_seed(0)
    if size.tiny:
        base = load_base("tiny:gpt2" if case.model == "gpt2 shape" else "tiny:llama")
    elif case.model == "gpt2 shape":
        config = transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        model = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)
        base = Base(model, load_base("tiny:gpt2").tokenizer, case.model, "", "causal-lm", "gpt2")
    else:
        base = load_base(case.model)
    attach(base, case.adapter, seed=0)
    return base


def _batch(case: Case, size: Size, number: int) -> dict[str, Tensor]:
    """Random tokens; the same ones for every competitor."""
    draw = torch.Generator().manual_seed(number)
    ids = torch.randint(5, 290 if size.tiny else 49_000, (size.rows, size.length), generator=draw)
    mask = torch.ones_like(ids)
    if case.ragged:
        lengths = torch.randint(size.length // 4, size.length + 1, (size.rows, 1), generator=draw)
        mask = (torch.arange(size.length) < lengths).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("steps", "rows", "length", "threads"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Size, name))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument(
        "--case", nargs="*", default=[], help="parts of the names of the cases to measure; all by default"
    )
    given = parser.parse_args()
    warnings.simplefilter("ignore")  # PEFT's and Opacus' own
    cases = tuple(c for c in CASES if not given.case or any(part in c.name for part in given.case))
    table = rows(Size(given.steps, given.rows, given.length, given.threads, given.tiny), cases)
    if given.tiny or given.case:
        from .table import show

        show(table)
    else:
        finish("private_step", table)


if __name__ == "__main__":
    main()
