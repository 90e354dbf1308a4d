"""From the measures of cells to `results.json`: everything that the page, the table and `study.md` show.

Nothing here runs anything, so what a study says can be worked out again from its cells at any time.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import statistics
from .cells import ABLATION, CURVE, TABLE, Plan, Use
from .metrics import BY_KEY, FEDERATED, METRICS, Metric, value
from .spec import OURS, REFERENCE, RIVAL, Curve, Method, Study
from .statistics import BySeed

FORMAT = 1
JUDGED = tuple(metric for metric in METRICS if metric.judged)

Json = dict[str, Any]
Measures = Mapping[str, Any]


def results(study: Study, plan: Plan, done: Mapping[str, Measures], failed: Mapping[str, str], about: Measures) -> Json:
    """The study's results. `done`: measures by a cell's key; `failed`: errors by a cell's key; `about`: how it was made
    (command, commit, reads of the test split), taken over as it is.
    """
    found = _Found(study, plan, done)
    rows = [found.row(method) for method in study.method if method.table]
    return {
        "format": FORMAT, "name": study.name, "title": study.study.title, "about": study.study.about, **about,
        "digest": study.digest(), "split": study.study.split, "seeds": list(study.study.seeds),
        "measure": study.measure.model_dump(mode="json"),
        "simulated_noise": any(m["run"]["simulated_noise"] for m in done.values()),
        "hardware": _distinct(m["hardware"] for m in done.values()),
        "versions": _distinct(m["versions"] for m in done.values()),
        "metrics": [{"key": m.key, "title": m.title, "lower": m.lower, "kind": m.kind, "judged": m.judged}
                    for m in METRICS],
        "table": {"rows": rows, "best": {m.key: _best(rows, m) for m in JUDGED},
                  "margins": [_margin(rows, study, m) for m in JUDGED], "same_guarantee": _same_guarantee(rows)},
        "curves": [_curve(found, study, curve) for curve in study.curve],
        "ablations": [found.ablation(ablation) for ablation in study.ablation],
        "published": {"source": study.published.source, "note": study.published.note,
                      "rows": [row.model_dump() for row in study.published.row]},
        "cells": [_cell(cell, done.get(cell.key), failed.get(cell.key)) for cell in plan.cells],
    }  # fmt: skip


def commit(where: Path) -> Json:
    """The commit of the code at `where`, and whether it was changed since; both None outside a repository."""

    def git(*words: str) -> str | None:
        said = subprocess.run(["git", "-C", str(where), *words], capture_output=True, text=True, check=False)
        return said.stdout.strip() if said.returncode == 0 else None

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD"), "changed": None if changed is None else bool(changed)}
    except FileNotFoundError:
        return {"commit": None, "changed": None}


class _Found:
    """The measures, by what they are for."""

    def __init__(self, study: Study, plan: Plan, done: Mapping[str, Measures]) -> None:
        self.study, self.uses, self.done = study, plan.uses, done

    def of(self, part: tuple[str, ...], row: str, column: int = 0) -> dict[int, Measures]:
        """Seed → measures."""
        return {use.seed: self.done[use.cell] for use in self._used(part, row, column) if use.cell in self.done}

    def missing(self, part: tuple[str, ...], row: str, column: int = 0) -> list[int]:
        """Seeds whose cell is not done, or failed."""
        return [use.seed for use in self._used(part, row, column) if use.cell not in self.done]

    def row(self, method: Method) -> Json:
        """A line of the table."""
        cells = self.of((TABLE,), method.key)
        return {
            "method": method.key, "title": method.title, "role": method.role, "phase": method.phase,
            "note": method.note, "guarantee": _guarantee(cells.values(), method.phase),
            "missing": self.missing((TABLE,), method.key),
            "figures": {m.key: statistics.summary(by_seed(cells, m, method.phase)) for m in METRICS},
        }  # fmt: skip

    def ablation(self, ablation: Any) -> Json:
        """A method beside its variants, each with the paired test of variant − whole."""
        part, whole = (ABLATION, ablation.key), self.study.methods()[ablation.of]
        variants = [(whole.key, whole.title, "")] + [(v.key, v.title, v.note) for v in ablation.variant]
        own = self.of(part, whole.key)
        return {
            "key": ablation.key, "title": ablation.title, "of": whole.key, "figures": list(ablation.figures),
            "rows": [
                {"key": key, "title": title, "note": note, "missing": self.missing(part, key),
                 "guarantee": _guarantee(self.of(part, key).values(), FEDERATED),
                 "figures": {m: statistics.summary(by_seed(self.of(part, key), BY_KEY[m])) for m in ablation.figures},
                 "beside_whole": {m: None if key == whole.key else statistics.paired(
                     by_seed(self.of(part, key), BY_KEY[m]), by_seed(own, BY_KEY[m])) for m in ablation.figures}}
                for key, title, note in variants
            ],
        }  # fmt: skip

    def _used(self, part: tuple[str, ...], row: str, column: int) -> Iterator[Use]:
        return (use for use in self.uses if (use.part, use.row, use.column) == (part, row, column))


def by_seed(cells: Mapping[int, Measures], metric: Metric, phase: str = FEDERATED) -> dict[int, float]:
    """Seed → a figure, where it was measured."""
    known = {seed: value(measures, metric, phase) for seed, measures in cells.items()}
    return {seed: x for seed, x in known.items() if x is not None}


# The table


def _guarantee(cells: Any, phase: str) -> Json | None:
    """Unit, neighbours, δ and the largest ε of the cells; None where one of them has none, or none is done."""
    runs = [m["run"] for m in cells]
    if phase != FEDERATED or not runs or any(run["epsilon"] is None or run["unit"] == "none" for run in runs):
        return None
    return {"epsilon": max(run["epsilon"] for run in runs), "delta": max(run["delta"] for run in runs),
            "unit": runs[0]["unit"], "neighbours": runs[0]["neighbours"]}  # fmt: skip


def _same_guarantee(rows: Sequence[Json]) -> bool:
    """Whether all that are compared promise the same: one unit, one kind of neighbours, one δ, and ε within 1 %."""
    given = [row["guarantee"] for row in _ranked(rows)]
    epsilons = [g["epsilon"] for g in given]
    same = len({(g["unit"], g["neighbours"], g["delta"]) for g in given}) <= 1
    return same and (not epsilons or max(epsilons) <= 1.01 * min(epsilons))


def _ranked(rows: Sequence[Json]) -> list[Json]:
    """The rows that may win: ours and the rivals', with a guarantee."""
    return [row for row in rows if row["role"] in (OURS, RIVAL) and row["guarantee"]]


def _best(rows: Sequence[Json], metric: Metric) -> Json | None:
    """Who is best by the mean, whom that is tested against (the best of the others; where ours is best, the best
    rival), and whether the paired test says p < 0.05.
    """
    ranked = _ordered(_ranked(rows), metric)
    if not ranked:
        return None
    first = ranked[0]
    others = [row for row in ranked[1:] if first["role"] != OURS or row["role"] == RIVAL]
    if not others:
        return {"method": first["method"], "against": None, "test": None, "significant": False}
    test = statistics.paired(_values(first, metric), _values(others[0], metric))
    return {"method": first["method"], "against": others[0]["method"], "test": test,
            "significant": statistics.significant(test)}  # fmt: skip


def _margin(rows: Sequence[Json], study: Study, metric: Metric) -> Json:
    """Ours against the best rival, as measured and as published: a difference in points for shares, else relative."""
    ranked = _ordered(_ranked(rows), metric)
    ours = next((row for row in ranked if row["role"] == OURS), None)
    rival = next((row for row in ranked if row["role"] == RIVAL), None)
    measured = test = None
    if ours and rival:
        measured = _gap(ours["figures"][metric.key]["mean"], rival["figures"][metric.key]["mean"], metric)
        test = statistics.paired(_values(ours, metric), _values(rival, metric))
    return {
        "figure": metric.key, "kind": "points" if metric.kind == "share" else "relative",
        "ours": ours and ours["method"], "rival": rival and rival["method"], "measured": measured, "test": test,
        "significant": statistics.significant(test), **_published_margin(study, metric),
    }  # fmt: skip


def _published_margin(study: Study, metric: Metric) -> Json:
    methods = study.methods()
    by_role: dict[str, list[tuple[float, str]]] = {OURS: [], RIVAL: [], REFERENCE: []}
    for row in study.published.row:
        by_role[methods[row.method].role].append((getattr(row, metric.key), row.method))
    if not by_role[OURS] or not by_role[RIVAL]:
        return {"published": None, "published_rival": None}
    pick = min if metric.lower else max
    (ours, _), (rival, name) = pick(by_role[OURS]), pick(by_role[RIVAL])
    return {"published": _gap(ours, rival, metric), "published_rival": name}


def _gap(ours: float, rival: float, metric: Metric) -> float | None:
    """None where a relative gap means nothing: an unbiased MMD² may be zero or less."""
    if metric.kind == "share":
        return ours - rival
    return ours / rival - 1 if rival > 0 else None


def _ordered(rows: Sequence[Json], metric: Metric) -> list[Json]:
    known = [row for row in rows if row["figures"][metric.key]]
    return sorted(known, key=lambda row: row["figures"][metric.key]["mean"], reverse=not metric.lower)


def _values(row: Json, metric: Metric) -> dict[int, float]:
    return {int(seed): x for seed, x in row["figures"][metric.key]["values"].items()}


# Curves


def _curve(found: _Found, study: Study, curve: Curve) -> Json:
    methods, xs = study.methods(), [point.x for point in curve.point]
    published = [p.model_dump() for p in study.published.curve if p.curve == curve.key]
    return {
        "key": curve.key, "title": curve.title, "x": curve.x, "log": curve.log, "note": curve.note,
        "direction": curve.direction, "source": curve.source, "figures": list(curve.figures), "xs": xs,
        "labels": [point.label for point in curve.point], "published": published,
        "lines": [_line(found, curve, methods[key], xs, published) for key in curve.methods],
    }  # fmt: skip


def _line(found: _Found, curve: Curve, method: Method, xs: Sequence[float], published: Sequence[Json]) -> Json:
    """One method along the axis."""
    cells = [_at(found, curve, method, column) for column in range(len(xs))]
    points = {m: [by_seed(at, BY_KEY[m], method.phase) for at in cells] for m in curve.figures}
    guarantees = [_guarantee(at.values(), method.phase) for at in cells]
    return {
        "method": method.key, "title": method.title, "role": method.role,
        "epsilon": [g and g["epsilon"] for g in guarantees],
        "shift_bits": [_mean([m.get("shift_bits") for m in at.values()]) for at in cells],
        "missing": [[seed for seed in _seeds(curve, found.study) if seed not in at] for at in cells],
        "figures": {m: {"points": [statistics.summary(p) for p in points[m]],
                        **_shapes(xs, points[m], curve, [p for p in published if p["figure"] == m])}
                    for m in curve.figures},
    }  # fmt: skip


def _at(found: _Found, curve: Curve, method: Method, column: int) -> dict[int, Measures]:
    if curve.source == "cells":
        return found.of((CURVE, curve.key), method.key, column)
    label = curve.point[column].label.lower()
    table = found.of((TABLE,), method.key)
    levels = {seed: _level(measures, label) for seed, measures in table.items()}
    return {seed: level for seed, level in levels.items() if level is not None}


def _level(measures: Measures, label: str) -> Measures | None:
    """One level of shift, as if it were a cell's measures of its own."""
    level = (measures.get("shift") or {}).get(label)
    if level is None:
        return None
    phases = {phase: {"perplexity": {"micro": x}} for phase, x in level["perplexity"].items()}
    return {"phases": phases, "run": measures["run"], "shift_bits": level["jsd"]}


def _shapes(xs: Sequence[float], points: Sequence[BySeed], curve: Curve, published: Sequence[Json]) -> Json:
    """The shape over all points; and beside a published curve, over the points that lie in its range."""
    shapes: Json = {"shape": statistics.shape(xs, points, curve.direction), "beside": None}
    if published:
        theirs = published[0]
        low, high = min(theirs["x"]), max(theirs["x"])
        inside = [i for i, x in enumerate(xs) if low <= x <= high]
        ours = statistics.shape([xs[i] for i in inside], [points[i] for i in inside], curve.direction)
        ratio = theirs["y"][-1] / theirs["y"][0]
        ends = ours["ends"]
        milder = None if ends is None else abs(math.log(ends["ratio"])) < abs(math.log(ratio))
        shapes["beside"] = {"low": low, "high": high, "shape": ours, "published_ratio": ratio, "milder": milder}
    return shapes


def _seeds(curve: Curve, study: Study) -> Sequence[int]:
    return curve.seeds or study.study.seeds


# Facts


def _cell(cell: Any, measures: Measures | None, error: str | None) -> Json:
    run = measures["run"] if measures else {}
    return {"name": cell.name, "key": cell.key, "digest": cell.digest,
            "status": "done" if measures else "failed" if error else "not done", "error": error or "",
            "epsilon": run.get("epsilon"), "seconds": run.get("seconds"), "bytes_up": run.get("bytes_up"),
            "perplexity": value(measures, BY_KEY["perplexity"]) if measures else None}  # fmt: skip


def _distinct(values: Any) -> list[Any]:
    found: list[Any] = []
    for x in values:
        if x not in found:
            found.append(x)
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [x for x in values if x is not None]
    return sum(known) / len(known) if known else None
