"""`python -m benchmarks [NAME ...]`: runs benchmarks, prints one table, writes rows to `benchmarks/results/`."""

from __future__ import annotations

import argparse
import sys
import time
from importlib import import_module
from typing import Any

from .table import Row, save, show

NAMES = (
    "step", "federation", "memory", "flower", "overhead", "private_step", "noise", "calibrate", "masks", "secure",
    "secure_round", "homomorphic", "flower_wire",
)  # fmt: skip
STEPS = 30  # of step, so that the whole takes some ten minutes; run alone it takes 100


def run(name: str) -> list[Row | dict[str, Any]]:
    """The rows of one benchmark."""
    module = import_module(f"{__package__}.{name}")
    return list(module.rows(steps=STEPS) if name == "step" else module.rows())


def main(names: list[str]) -> int:
    """Runs them in turn. One that fails is reported, the others go on; the exit status is then 1."""
    rows: list[Row | dict[str, Any]] = []
    failed = []
    for name in names:
        began = time.perf_counter()
        print(f"{name} …", flush=True)
        try:
            found = run(name)
        except Exception as error:
            failed.append(name)
            print(f"{name} failed: {error}", file=sys.stderr)
            continue
        save(name, found)
        rows += found
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    show(rows)
    return 1 if failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", nargs="*", help=f"which ones, of {', '.join(NAMES)}; all of them when none is named")
    given = parser.parse_args().name
    if unknown := sorted(set(given) - set(NAMES)):
        parser.error(f"expected some of {', '.join(NAMES)}; got {', '.join(unknown)}")
    sys.exit(main(given or list(NAMES)))
