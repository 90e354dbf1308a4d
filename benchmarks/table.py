"""The rows that benchmarks give, as a table on the screen and as JSON in `benchmarks/results/`."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One figure of ours beside one of a peer's, both in `unit`; `peer` is None when the peer is not installed.

    `ratio`: what the target is about: how many times faster we are, or a share (ours / peer) where `at_most` says that
    the target is an upper limit.
    """

    name: str
    ours: float
    peer: float | None
    ratio: float | None
    target: float | None
    unit: str
    hardware: str
    at_most: bool = False

    @property
    def kept(self) -> bool | None:
        """Whether the target is kept; None where there is none, or nothing to compare with."""
        if self.target is None or self.ratio is None or math.isnan(self.ratio):
            return None
        return self.ratio <= self.target if self.at_most else self.ratio >= self.target


def faster(name: str, ours: float, peer: float | None, unit: str, target: float | None = None) -> Row:
    """A row for times (less is better): the ratio is how many times longer the peer takes."""
    return _row(name, ours, peer, None if peer is None else peer / ours, target, unit)


def more(name: str, ours: float, peer: float | None, unit: str, target: float | None = None) -> Row:
    """A row for rates (more is better): the ratio is how many times more we do."""
    return _row(name, ours, peer, None if peer is None else ours / peer, target, unit)


def share(name: str, ours: float, whole: float, unit: str, target: float | None = None) -> Row:
    """A row for a cost beside a whole or a baseline: the ratio is ours / peer, and the target its upper limit."""
    return _row(name, ours, whole, ours / whole, target, unit, at_most=True)


def show(rows: Iterable[Row | Mapping[str, Any]]) -> None:
    """Prints the rows as one table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Benchmarks", title_justify="left")
    table.add_column("benchmark", overflow="fold")
    for column in ("ours", "peer", "unit", "ratio", "target", "kept"):
        table.add_column(column, justify="right", no_wrap=True)
    hardware = ""
    for row in map(_as_row, rows):
        table.add_row(*_cells(row))
        hardware = row.hardware
    table.caption, table.caption_justify = hardware, "left"
    console = Console()
    console = console if console.is_terminal else Console(width=150)
    console.print(table)


def save(name: str, rows: Iterable[Row | Mapping[str, Any]], folder: Path = RESULTS) -> Path:
    """Writes the rows of one benchmark as JSON; NaN becomes null."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = [{key: _finite(value) for key, value in asdict(_as_row(row)).items()} for row in rows]
    path = folder / f"{name}.json"
    path.write_text(json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def median(seconds: Sequence[float]) -> float:
    """The median, in the unit given; NaN of nothing."""
    return statistics.median(seconds) if seconds else math.nan


def machine() -> str:
    """Processor, cores, threads and memory, in words."""
    from foedus.governance.machine import hardware

    h = hardware()
    accelerator = f", {h['accelerator']}" if "accelerator" in h else ""
    return f"{h['cpu']}, {h['cores']} cores, {h['threads']} threads, {h['memory_gib']} GiB{accelerator}"


def finish(name: str, rows: Sequence[Row]) -> None:
    """What a benchmark that is run alone does in the end."""
    save(name, rows)
    show(rows)


def _row(name: str, ours: float, peer: float | None, ratio: float | None, target, unit: str, at_most=False) -> Row:
    name = name if peer is not None else f"{name} (peer not installed)"
    return Row(name, ours, peer, ratio, target, unit, machine(), at_most)


def _as_row(row: Row | Mapping[str, Any]) -> Row:
    return row if isinstance(row, Row) else Row(**row)


def _cells(row: Row) -> tuple[str, ...]:
    sign = "≤" if row.at_most else "≥"
    target = "" if row.target is None else f"{sign} {row.target:g}"
    kept = {True: "yes", False: "NO", None: ""}[row.kept]
    return row.name, _figure(row.ours), _figure(row.peer), row.unit, _figure(row.ratio), target, kept


def _figure(x: float | None) -> str:
    return "–" if x is None else f"{x:.3g}" if abs(x) < 1000 else f"{x:,.0f}"


def _finite(x: Any) -> Any:
    return None if isinstance(x, float) and not math.isfinite(x) else x
