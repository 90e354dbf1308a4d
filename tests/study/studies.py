"""Studies for tests, over the tiny treaty, and runners that invent figures instead of training."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from foedus.study.cells import Cell, settings
from foedus.study.conduct import Conduct, Progress
from foedus.study.running import keep

from ..conftest import write_treaty

STUDY = """
[study]
name = "invented"
title = "A study of invented figures"
treaty = "treaty.toml"
seeds = [1, 2, 3]

[[method]]
key = "new"
title = "The method"
role = "ours"
set = { "algorithm.name" = "fedprox", "algorithm.mu" = 0.5 }

[[method]]
key = "prox"
title = "FedProx"
role = "rival"
set = { "algorithm.name" = "fedprox" }

[[method]]
key = "plain"
title = "FedAvg"
role = "rival"

[[method]]
key = "pooled"
title = "Pooled"
role = "reference"
phase = "pooled"

[[curve]]
key = "pace"
title = "Pace"
x = "learning rate"
methods = ["new", "plain"]
figures = ["perplexity", "mmd"]
[[curve.point]]
label = "0.01"
x = 0.01
set = { "local.lr" = 0.01 }
[[curve.point]]
label = "0.02"
x = 0.02
set = { "local.lr" = 0.02 }
[[curve.point]]
label = "0.04"
x = 0.04
set = { "local.lr" = 0.04 }

[[curve]]
key = "shift"
title = "Shift"
x = "share of far text"
source = "shift"
methods = ["new", "prox"]
[[curve.point]]
label = "Low"
x = 0
[[curve.point]]
label = "Extreme"
x = 1

[[ablation]]
key = "parts"
title = "Without each part"
of = "new"
seeds = [1, 2]
[[ablation.variant]]
key = "no-pull"
title = "no pull"
set = { "algorithm.mu" = 0.0 }

[published]
note = "Two of two."
[[published.row]]
method = "new"
perplexity = 20.0
accuracy = 0.9
mmd = 0.05
[[published.row]]
method = "prox"
perplexity = 25.0
accuracy = 0.8
mmd = 0.1
[[published.curve]]
curve = "pace"
figure = "perplexity"
x = [0.01, 0.04]
y = [20.0, 30.0]
"""


TABLE_ONLY = STUDY[: STUDY.index("[[curve]]")]


def write_study(folder: Path, text: str = STUDY) -> Path:
    """A study file beside the tiny treaty."""
    write_treaty(folder)
    (folder / "study.toml").write_text(text)
    return folder / "study.toml"


def made(folder: Path, text: str = STUDY, **how: Any) -> Conduct:
    return Conduct.of(write_study(folder, text), folder / "out", command="foedus study study.toml", **how)


def invented(cell: Cell) -> dict[str, Any]:
    """Figures by the treaty: a stronger pull is better, a faster pace worse, and seeds move everything a little."""
    t = cell.treaty
    pull = t.algorithm.mu if t.algorithm.name == "fedprox" else 0.0
    level = 30 - 8 * pull + 100 * t.local.lr + 0.1 * t.seed + 0.01 * t.seed**2 * (1 + pull)
    phase = {
        "perplexity": {"micro": level, "target": level + 2},
        "d1": {"all": 0.7 + 0.2 * pull - 0.003 * t.seed * (1 + pull)},
        "mmd": {"pairs": {"mmd2": 0.1 - 0.05 * pull + 0.001 * math.sin(7 * t.seed + pull), "p": 0.01}},
        "d2": {"accuracy": 0.5},
        "spread": {"variance": 0.4, "effective_rank": 12.0, "own_scale": 0.1},
    }
    return {
        "phases": {"federated": phase, "pooled": {"perplexity": {"micro": 20.0 + 0.1 * t.seed}}},
        "shift": {"low": {"perplexity": {"federated": level}, "jsd": 0.0},
                  "extreme": {"perplexity": {"federated": level * 1.4}, "jsd": 0.3}},
        "run": {"unit": "example", "epsilon": 7.99, "delta": 1e-5, "neighbours": "add or remove one",
                "simulated_noise": True, "bytes_up": 1_000_000, "seconds": 3.0},
        "versions": {"foedus": "0"}, "hardware": {"cpu": "invented", "cores": 2}, "wall": 2.0,
    }  # fmt: skip


class Stub:
    """A runner that keeps invented figures and remembers whom it served. `breaks`: for which cells it raises."""

    def __init__(self, told: Conduct | Mapping[str, Any], breaks: Callable[[Cell], bool] = lambda cell: False) -> None:
        self.settings, self.breaks = settings(told.study) if isinstance(told, Conduct) else told, breaks
        self.served: list[str] = []
        self.lock = threading.Lock()

    def __call__(self, cell: Cell, place: Path) -> None:
        with self.lock:
            self.served.append(cell.name)
        if self.breaks(cell):
            raise RuntimeError(f"{cell.name} broke")
        keep(place, self.settings, invented(cell))


def carried_out(study: Conduct, runner: Stub | None = None) -> Sequence[Progress]:
    return list(study.run(runner or Stub(study)))


def by(rows: Sequence[Mapping[str, Any]], key: str, name: str) -> Mapping[str, Any]:
    (found,) = [row for row in rows if row[key] == name]
    return found
