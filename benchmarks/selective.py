"""What encrypting only a part costs, and what the other part would tell: `python -m benchmarks.selective`.

The numbers that are encrypted are those whose gradient is largest on public text ("sensitive"), or any ("random"). What
is left is attacked as if it were sent in the clear, which Foedus never does: the rest is masked. The attacker knows the
map and tries four ways to fill the holes (zeros; only rows, or columns, without holes; the matrix of lowest rank that
fits), and with each the span check, its bag, and the token bag. The best of all counts. Tiny models, one text in a
batch, so that nothing else hides it: figures of an attack, no guarantee.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from foedus.audit.defences import gradients
from foedus.audit.inversion import encode, invert
from foedus.lm.adapters import Full, LoRA, attach
from foedus.lm.bench import Bench
from foedus.lm.load import load_base
from foedus.lm.objectives import make_objective
from foedus.secure.backends import SecretKey
from foedus.secure.selective import Selection, select, sensitivity
from foedus.stages.base import Plain
from foedus.stages.encrypt import ENCRYPTED, Encrypt, Encrypted
from foedus.stages.words import SUM, layout_of
from foedus.types import Params, Task, Update

from .table import RESULTS

SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
MAPS = ("sensitive", "random")
SEEDS = range(5)
COUNT, PARTIES = 10**6, 20
SWEEPS = 120  # of filling holes by the nearest matrix of low rank
PUBLIC = (
    "the court is in session", "a goal was scored", "rain is expected", "the train was full", "prices rose again",
    "she reads a book", "the team lost", "we met at noon",
)  # fmt: skip
PRIVATE = (
    "the patient has diabetes", "a fever", "no pain", "her heart is well", "he had a stroke", "the nurse was late",
    "his knee is swollen", "an old scar", "the rash is gone", "she takes insulin",
)  # fmt: skip
MODELS: Mapping[str, tuple[str, Full | LoRA]] = {
    "llama, LoRA rank 32": ("tiny:llama", LoRA(rank=32)),
    "gpt2, all parameters": ("tiny:gpt2", Full()),
}


@dataclass(frozen=True)
class Read:
    """What was recovered with one map: `whole`: share of texts; `tokens`: share of a text's different tokens; the mean
    over seeds, and the lowest and the highest.
    """

    model: str
    map: str
    share: float
    whole: float
    tokens: float
    lowest: float
    highest: float


class Unmasked(Plain):
    """Stands for masks where only the cost of encryption is looked at; nothing is sent."""

    hides = True


@dataclass(frozen=True)
class Cost:
    """Of one silo's vector of a million 32-bit words, `share` of them encrypted: bytes of a word, seconds."""

    share: float
    size: float
    seconds: float


def costs(shares: Sequence[float] = SHARES, count: int = COUNT, turns: int = 3) -> list[Cost]:
    """The rest takes a word each, and is left as it is: masks cost little beside (see the benchmark `secure`)."""
    layout = layout_of({("delta", "w"): (count,)}, [], 32, PARTIES)
    words = np.zeros(count, np.uint32)
    random = np.random.default_rng(0).random(count)
    return [_cost(layout, words, select(random, share), share, turns) for share in shares]


def reads(model: str, shares: Sequence[float] = SHARES, seeds: Sequence[int] = SEEDS) -> Iterator[Read]:
    """Every share with both maps; two texts a seed."""
    bench = _bench(*MODELS[model])
    for share in shares:
        for name in MAPS:
            found = np.array([_read(bench, name, share, seed) for seed in seeds])
            tokens = found[:, 1]
            yield Read(model, name, share, *found.mean(0).tolist(), float(tokens.min()), float(tokens.max()))


def main() -> None:
    """Prints both tables and writes them to `benchmarks/results/selective.json`."""
    spent = costs()
    print("encrypted  bytes/word  x fp32  seconds")
    for cost in spent:
        print(f"{cost.share:9.0%}  {cost.size:10.2f}  {cost.size / 4:6.2f}  {cost.seconds:7.3f}")
    found = []
    for model in MODELS:
        print(f"\n{model}\nencrypted  map        texts read whole  tokens read (lowest to highest seed)")
        for read in reads(model):
            found.append(read)
            spread = f"{read.lowest:.2f} to {read.highest:.2f}"
            print(f"{read.share:9.0%}  {read.map:9}  {read.whole:16.2f}  {read.tokens:.2f} ({spread})", flush=True)
    record = {"costs": [asdict(x) for x in spent], "reads": [asdict(x) for x in found], "seeds": list(SEEDS)}
    (RESULTS / "selective.json").write_text(json.dumps(record, indent=2) + "\n")


def _cost(layout, words: np.ndarray, selection: Selection, share: float, turns: int) -> Cost:
    if not selection.count:
        return Cost(share, float(words.itemsize), 0.0)
    what = Encrypted(layout, selection)
    stage = Encrypt(what, SecretKey.fresh(what.sums.ring).public, Unmasked())
    seconds, sent = [], {}
    for _ in range(turns):
        began = time.process_time()
        sent = stage.encode(Update({SUM: words}), Task(0, "", {}, (), 0)).tensors
        seconds.append(time.process_time() - began)
    return Cost(share, (sent[ENCRYPTED].nbytes + sent[SUM].nbytes) / len(words), min(seconds))


def _bench(base: str, adapter: Full | LoRA) -> Bench:
    loaded = load_base(base, "causal-lm")
    attach(loaded, adapter, 1)
    return Bench(loaded, make_objective("causal-lm", 48), precision="fp32")


def _read(bench: Bench, name: str, share: float, seed: int) -> tuple[float, float]:
    """(texts read whole, tokens read), of two private texts at parameters as after some training."""
    rng = np.random.default_rng(seed)
    params = {key: x + np.float32(0.05) * rng.standard_normal(x.shape, np.float32) for key, x in bench.start().items()}
    sizes = _flat(sensitivity(gradients(bench, params, encode(bench, PUBLIC), range(len(PUBLIC)))))
    selection = select(sizes if name == "sensitive" else rng.random(len(sizes)), share)
    texts = encode(bench, [PRIVATE[(2 * seed + i) % len(PRIVATE)] for i in range(2)])
    found = [
        _attacked(bench, params, gradient, _shaped(~selection.chosen, gradient), tuple(map(int, texts.inputs[i][:-1])))
        for i, gradient in enumerate(gradients(bench, params, texts, range(2)))
    ]
    whole, tokens = np.mean(found, axis=0)
    return float(whole), float(tokens)


def _attacked(
    bench: Bench, params: Params, gradient: Params, known: Params, truth: tuple[int, ...]
) -> tuple[bool, float]:
    special = set(bench.base.tokenizer.all_special_ids)
    spoken = set(truth) - special
    kinds = ("span", "span bag") if any("lora_" in name for name in params) else ("span", "span bag", "token bag")
    whole, tokens = False, 0.0
    for filled in _fillings(gradient, known, len(truth)):
        for kind in kinds:
            rows = invert(bench, params, filled, [len(truth)], kind=kind)
            whole |= kind == "span" and truth in rows
            named = {token for row in rows for token in row}
            tokens = max(tokens, len(spoken & named) / len(spoken))
    return whole, tokens


def _fillings(gradient: Params, known: Params, rank: int) -> Iterator[dict[str, np.ndarray]]:
    yield {name: x * known[name] for name, x in gradient.items()}
    for axis in (0, 1):
        yield {name: x * (known[name].all(axis, keepdims=True) if x.ndim == 2 else known[name])
               for name, x in gradient.items()}  # fmt: skip
    yield {name: _completed(x, known[name], rank) for name, x in gradient.items()}


def _completed(x: np.ndarray, known: np.ndarray, rank: int) -> np.ndarray:
    """Holes filled by hard imputation (Mazumder, Hastie and Tibshirani 2010): again and again by the nearest matrix of
    this rank, which a gradient of so many tokens has.
    """
    filled = x * known
    if x.ndim != 2 or known.all() or not filled.any():
        return filled
    for _ in range(SWEEPS):
        left, sizes, right = np.linalg.svd(filled, full_matrices=False)
        filled = np.where(known, x, (left[:, :rank] * sizes[:rank]) @ right[:rank])
    return filled


def _flat(params: Params) -> np.ndarray:
    return np.concatenate([params[name].ravel() for name in sorted(params)])


def _shaped(flat: np.ndarray, like: Params) -> dict[str, np.ndarray]:
    names = sorted(like)
    ends = np.cumsum([like[name].size for name in names])[:-1]
    return {name: x.reshape(like[name].shape) for name, x in zip(names, np.split(flat, ends), strict=True)}


if __name__ == "__main__":
    main()
