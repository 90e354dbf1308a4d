"""From a picture to a page: plots, figures in words, and the template that lays them out."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..report import plots
from ..report.compare import Row, figure, signed_percent
from ..report.guarantee import UNITS, epsilon_text
from ..report.svg import COLOURS, NARROW, WIDE, picture, sheet
from ..report.words import bytes_text, seconds_text, shorten, thousands
from .runs import RunView
from .spending import Spending
from .view import Federation, Silo

TEMPLATES = Path(__file__).parent / "templates"
LATEST = 12
"""Rounds that a page lists at once; older ones are folded."""

_DRAWING = threading.Lock()  # matplotlib's settings are one for all threads


def coordinator_page(found: Federation, run: RunView | None, session: Mapping[str, Any]) -> str:
    """The coordinator's page. `session`: signed_in, csrf, may_sign_in, said."""
    return _environment().get_template("coordinator.html.j2").render(
        f=found, run=run, s=session, plot=_run_plots(run) if run else {}, latest=LATEST, units=UNITS
    )  # fmt: skip


def silo_page(found: Silo) -> str:
    """A silo's page."""
    bars = _pictures(("budget", found.spent, found.promised, found.cap)) if found.cap else None
    return _environment().get_template("silo.html.j2").render(f=found, budget=bars, units=UNITS, latest=LATEST)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=StrictUndefined,
    )  # fmt: skip
    made.filters |= {
        "bytes": bytes_text, "seconds": seconds_text, "count": thousands, "figure": figure, "eps": epsilon_text,
        "percent": signed_percent, "short": lambda name: shorten(name, 34), "small": _small,
    }  # fmt: skip
    return made


def _small(value: float | None) -> str:
    """A loss, or a dash.

    >>> _small(3.14159), _small(None)
    ('3.142', '–')
    """
    return "–" if value is None else f"{value:.4g}"


def _run_plots(run: RunView) -> dict[str, Markup]:
    """Drawings by name, each only where there is something to draw."""
    asked: dict[str, tuple[Any, ...]] = {}
    losses = tuple((r.number, r.loss) for r in run.rounds if r.loss is not None)
    if len(losses) > 1:
        asked["loss"] = ("loss", losses, run.planned)
    if run.quality.get("federated"):
        asked["quality"] = ("quality", tuple((p, tuple(x), tuple(y)) for p, (x, y) in run.quality.items()))
    if run.domains:
        asked["domains"] = ("domains", tuple((name, tuple(row.items())) for name, row in run.domains.items()))
    if run.privacy is not None and run.privacy.points:
        asked["epsilon"] = ("epsilon", run.privacy)
    if run.up or run.down:
        asked["traffic"] = ("traffic", tuple(r.up for r in run.rounds), tuple(r.down for r in run.rounds))
    return {name: _pictures(what) for name, what in asked.items()}


@lru_cache(maxsize=128)
def _pictures(what: tuple[Any, ...]) -> Markup:
    """A drawing, wide and narrow, with what it says to those who do not see it; remembered while nothing changes."""
    kind, *values = what
    alt, draw = _DRAWINGS[kind](*values)
    with _DRAWING:
        return picture(f"live-{kind}", alt, draw)


def _loss(points: tuple[tuple[int, float], ...], planned: int) -> tuple[str, Any]:
    rounds, values = zip(*points, strict=True)
    alt = f"Training loss of all silos together, from {values[0]:.3g} in round {rounds[0]} to {values[-1]:.3g}."

    def draw(narrow: bool) -> Figure:
        drawn, axes = _axes(narrow, "training loss, all silos together")
        axes.plot(rounds, values, color=COLOURS["federated"], marker="o" if len(rounds) <= 60 else None, markersize=4)
        axes.set_xlim(0.5, max(planned, rounds[-1]) + 0.5)
        return drawn

    return alt, draw


def _quality(series: tuple[tuple[str, tuple[int, ...], tuple[float, ...]], ...]) -> tuple[str, Any]:
    found = {phase: (rounds, values) for phase, rounds, values in series}
    rounds, values = found["federated"]
    alt = f"Perplexity on held-out text over rounds, {figure(values[-1])} after round {rounds[-1]}."
    return alt, lambda narrow: plots.validation(found, narrow)


def _domains(rows: tuple[tuple[str, tuple[tuple[str, float], ...]], ...]) -> tuple[str, Any]:
    found = [Row(name, dict(values)) for name, values in rows]
    phases = [phase for phase in ("base", "federated") if any(phase in row.values for row in found)]
    return (
        "Perplexity by domain; the table beside has the figures.",
        lambda narrow: plots.domains(found, phases, narrow),
    )


def _epsilon(p: Spending) -> tuple[str, Any]:
    limit = f", of {p.limit:g}" if p.limit is not None else ""
    alt = f"Epsilon by round: {epsilon_text(p.spent)} spent, {epsilon_text(p.projected)} projected{limit}."

    def draw(narrow: bool) -> Figure:
        drawn, axes = _axes(narrow, f"ε at δ = {p.delta:g}")
        rounds, values = zip(*p.points, strict=True)
        axes.plot(rounds, values, color=COLOURS["federated"], marker="o", markersize=5, label="spent")
        if p.projected is not None and p.planned > rounds[-1]:
            ends = (rounds[-1], p.planned), (values[-1], p.projected)
            axes.plot(*ends, color=COLOURS["federated"], linestyle=(0, (3, 3)), label="projected")
        if p.limit is not None:
            axes.axhline(p.limit, color=COLOURS["fail"], linewidth=1.4, label="limit")
        axes.set_xlim(0.5, max(p.planned, rounds[-1]) + 0.5)
        axes.set_ylim(0, 1.15 * max(x for x in (p.limit, p.projected, values[-1]) if x is not None))
        drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=3)
        return drawn

    return alt, draw


def _traffic(up: tuple[int, ...], down: tuple[int, ...]) -> tuple[str, Any]:
    alt = f"Bytes by round: {bytes_text(sum(up))} from silos and {bytes_text(sum(down))} to them so far."
    return alt, lambda narrow: plots.traffic(up, down, narrow)


def _budget(spent: float | None, promised: float | None, cap: float) -> tuple[str, Any]:
    alt = f"Of epsilon {cap:g} for life, {epsilon_text(spent)} is spent and {epsilon_text(promised)} promised."

    def draw(narrow: bool) -> Figure:
        drawn = sheet(NARROW if narrow else WIDE, 120)
        axes = drawn.subplots()
        most = max(cap, promised or 0, spent or 0)
        bars = ((promised or 0.0, "promised", 0.35), (spent or 0.0, "spent", 1.0))
        for value, name, alpha in bars:
            axes.barh([0], [value], height=0.5, color=COLOURS["federated"], alpha=alpha, label=name)
        axes.axvline(cap, color=COLOURS["fail"], linewidth=2, label="limit")
        axes.set_xlim(0, 1.05 * most)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("ε of all treaties together")
        drawn.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=3)
        return drawn

    return alt, draw


_DRAWINGS = {
    "loss": _loss, "quality": _quality, "domains": _domains, "epsilon": _epsilon, "traffic": _traffic,
    "budget": _budget,
}  # fmt: skip


def _axes(narrow: bool, title: str) -> tuple[Figure, Any]:
    drawn = sheet(NARROW if narrow else WIDE, 240 if narrow else 270)
    axes = drawn.subplots()
    axes.set_title(title, color=COLOURS["muted"])
    axes.set_xlabel("round")
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5 if narrow else 10, integer=True, min_n_ticks=1))
    return drawn, axes
