"""What a guarantee costs in perplexity: `python -m benchmarks.private_utility [--seeds 1 2 3] [--epsilons 8 4 2 1]`.

The treaty of `make demo-private` under several ε and seeds, beside ordinary LoRA (rank 8, all linear layers, AdamW,
many small steps) on equally many tokens of the same silos. Noise is simulated, one seed each, so that a figure can be
had again. A study, not a part of `python -m benchmarks`: some four minutes a run on two cores. Held-out test posts.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from foedus import Treaty, begin, build, execute, load

from .table import Row, finish, median, share

TREATY = Path(__file__).parent.parent / "treaties/newsgroups-private.toml"
ORDINARY = {
    "privacy": {}, "server.optimizer": "sgd", "server.lr": 1.0, "server.weighting": "uniform", "adapter.rank": 8,
    "adapter.alpha": 16.0, "adapter.targets": "all-linear", "adapter.freeze_a": False, "local.optimizer": "adamw",
    "local.lr": 5e-3, "local.schedule": "cosine", "local.steps": 6, "local.batch": 8,
}  # fmt: skip
"""As many tokens in a round: 6 steps of 8 rows for one of 48."""


def perplexity(treaty: Treaty) -> tuple[float, float]:
    """(base, federated) perplexity over all held-out text."""
    with tempfile.TemporaryDirectory() as folder:
        *_, last = execute(begin(treaty, Path(folder) / "run"), build(treaty))
    found = last.row["evaluation"]
    return found["base"]["perplexity"]["micro"], found["federated"]["perplexity"]["micro"]


def rows(seeds: Sequence[int] = (1,), epsilons: Sequence[float] = (8.0,)) -> list[Row]:
    """For every ε the median over seeds beside ordinary training, with every seed's figure printed."""
    whole = load(TREATY)
    plain: list[float] = []
    private: dict[float, list[float]] = {epsilon: [] for epsilon in epsilons}
    for seed in seeds:
        base, found = perplexity(whole.replace(**{**ORDINARY, "treaty.seed": seed}))
        plain.append(found)
        print(f"seed {seed}: base {base:.2f}, without privacy {found:.2f}", flush=True)
        for epsilon in epsilons:
            changes = {"treaty.seed": seed, "privacy.epsilon": epsilon, "privacy.randomness": "simulated"}
            _, found = perplexity(whole.replace(**changes))
            private[epsilon].append(found)
            print(f"seed {seed}: epsilon {epsilon:g} {found:.2f}", flush=True)
    return [
        share(f"held-out perplexity, epsilon = {epsilon:g}, {len(seeds)} seeds, over ordinary LoRA", median(found),
              median(plain), "", 1.05 if epsilon == 8 else None)
        for epsilon, found in private.items()
    ]  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--epsilons", type=float, nargs="+", default=[8.0])
    given = parser.parse_args()
    finish("private_utility", rows(given.seeds, given.epsilons))
