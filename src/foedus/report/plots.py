"""The plots of the report, each a function from plain figures to a drawing. Colours mean the same in all of them.

Every function takes `narrow` last and draws for a page of 860 or of 350 pixels. Up to `FEW` silos each have a panel or
a line of their own; beyond that a median and the band around it stay readable, and the tables hold the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from .compare import PHASES, TITLES, Row, figure, signed_percent
from .svg import COLOURS, NARROW, WIDE, sheet, tip
from .words import bytes_text, seconds_text, shorten, thousands

FEW, MANY = 12, 40
MOST_ROWS = 30
MARKERS = {"base": "o", "local_only": "D", "federated": "o", "pooled": "s"}
SIZES = {"base": 70, "local_only": 52, "federated": 110, "pooled": 60}  # square pixels

Points = tuple[Sequence[int], Sequence[float]]


def domains(rows: Sequence[Row], phases: Sequence[str], narrow: bool) -> Figure:
    """Perplexity by domain: a line from the base model to the federated one, the other phases as marks."""
    if len(rows) > MOST_ROWS:
        return _before_after(rows, narrow)
    rows = sorted(rows, key=lambda row: row.values.get("base", row.values.get("federated", 0.0)))
    drawn = sheet(NARROW if narrow else WIDE, 74 + (26 if narrow else 30) * len(rows) + (20 if narrow else 0))
    axes = drawn.subplots()
    for height, row in enumerate(rows):
        _dumbbell(axes, height, row, phases)
    for phase in phases:
        axes.scatter([], [], **_mark(phase), label=TITLES[phase])
    axes.set_yticks(range(len(rows)), [shorten(row.name, 14 if narrow else 28) for row in rows])
    axes.tick_params(axis="y", labelcolor=COLOURS["ink"])
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.spines[["left"]].set_visible(False)
    axes.grid(axis="x")
    axes.set_xlabel("perplexity (further left is better)")
    _scale(axes, [value for row in rows for value in row.values.values()], "x")
    _legend(drawn, axes, 2 if narrow else 4)
    return drawn


def _dumbbell(axes: Axes, height: int, row: Row, phases: Sequence[str]) -> None:
    start, end = row.values.get("base"), row.values.get("federated")
    if start is not None and end is not None:
        axes.plot([start, end], [height] * 2, color=COLOURS["federated"], alpha=0.35, linewidth=4, zorder=2)
    for phase in phases:
        if math.isfinite(value := row.values.get(phase, math.nan)):
            mark = axes.scatter([value], [height], **_mark(phase), zorder=3 + PHASES.index(phase))
            mark.set_gid(tip(f"{row.name}: {TITLES[phase].lower()} {figure(value)}"))


def _before_after(rows: Sequence[Row], narrow: bool) -> Figure:
    rows = [row for row in rows if row.change() is not None]
    drawn = sheet(NARROW if narrow else WIDE, 340 if narrow else 460)
    axes = drawn.subplots()
    for row in rows:
        mark = axes.scatter([row.values["base"]], [row.values["federated"]], **_mark("federated") | {"alpha": 0.75})
        mark.set_gid(tip(f"{row.name}: {signed_percent(row.change())}"))
    values = [value for row in rows for value in (row.values["base"], row.values["federated"])] or [1.0]
    ends = [min(values) * 0.95, max(values) * 1.05]
    axes.plot(ends, ends, color=COLOURS["base"], linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        "no change", (ends[1], ends[1]), (-6, -2), textcoords="offset points", ha="right", va="bottom",
        color=COLOURS["muted"],
    )  # fmt: skip
    _scale(axes, values, "x")
    _scale(axes, values, "y")
    axes.set(xlabel="perplexity of the base model", xlim=ends, ylim=ends)
    axes.set_title(f"federated, by domain ({len(rows)}); below the line is better", color=COLOURS["muted"])
    axes.grid()
    return drawn


def losses(federated: Mapping[str, Points], alone: Mapping[str, Points], narrow: bool) -> Figure:
    """Training loss by silo over rounds: a panel a silo, or beyond `FEW` the median and the bands around it."""
    names = sorted({*federated, *alone})
    return _panels(names, federated, alone, narrow) if len(names) <= FEW else _bands(federated, alone, narrow)


def shares(alpha: Mapping[str, Points], narrow: bool) -> Figure:
    """What share each silo has in the mean of a round, drawn as losses are, but from nothing."""
    drawn = losses(alpha, {}, narrow)
    drawn.axes[0].set_ylim(0, 1.1 * max(x for _, values in alpha.values() for x in values))
    return drawn


def _panels(names: Sequence[str], federated: Mapping[str, Points], alone: Mapping[str, Points], narrow: bool) -> Figure:
    columns = min(len(names), 2 if narrow else 5 if len(names) in (5, 9, 10) else 4)
    rows = math.ceil(len(names) / columns)
    drawn = sheet(NARROW if narrow else WIDE, 70 + rows * (130 if narrow else 172), between=0.06)
    grid = drawn.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for place, axes in enumerate(grid.flat):
        if place >= len(names):
            axes.set_visible(False)
            continue
        name = names[place]
        for other in names:
            axes.plot(*federated.get(other, ((), ())), color=COLOURS["rule"], linewidth=1)
        _series(axes, alone, name, "local_only", linestyle=(0, (4, 2)))
        _series(axes, federated, name, "federated")
        axes.set_title(shorten(name, 18 if narrow else 22), fontweight="bold")
        axes.grid(axis="y")
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.tick_params(labelbottom=place + columns >= len(names))
    drawn.supxlabel("round", color=COLOURS["muted"], fontsize=12.5)
    if alone:
        _legend(drawn, grid.flat[0], 2)
    return drawn


def _series(axes: Axes, series: Mapping[str, Points], name: str, phase: str, **line: Any) -> None:
    rounds, values = series.get(name, ((), ()))
    if not rounds:
        return
    axes.plot(rounds, values, color=COLOURS[phase], label=TITLES[phase], **line)
    if phase == "federated" and len(rounds) <= 40:
        for at, value in zip(rounds, values, strict=True):
            dot = axes.scatter([at], [value], s=12, color=COLOURS[phase], zorder=4)
            dot.set_gid(tip(f"{name}, round {at}: {value:.3f}"))


def _bands(federated: Mapping[str, Points], alone: Mapping[str, Points], narrow: bool) -> Figure:
    drawn = sheet(NARROW if narrow else WIDE, 260 if narrow else 320)
    axes = drawn.subplots()
    for phase, series in (("federated", federated), ("local_only", alone)):
        by_round: dict[int, list[float]] = {}
        for rounds, values in series.values():
            for at, value in zip(rounds, values, strict=True):
                by_round.setdefault(at, []).append(value)
        if by_round:
            _band(axes, by_round, phase)
    axes.set(xlabel="round")
    axes.set_title("median, half and 90 % of the silos", color=COLOURS["muted"])
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    if alone:
        _legend(drawn, axes, 2)
    return drawn


def _band(axes: Axes, by_round: Mapping[int, Sequence[float]], phase: str) -> None:
    rounds = sorted(by_round)
    q05, q25, q50, q75, q95 = np.array([np.quantile(by_round[at], (0.05, 0.25, 0.5, 0.75, 0.95)) for at in rounds]).T
    if phase == "local_only":
        axes.plot(rounds, q50, color=COLOURS[phase], label=f"{TITLES[phase]} (median)", linestyle=(0, (4, 2)))
        return
    axes.fill_between(rounds, q05, q95, color=COLOURS[phase], alpha=0.12, linewidth=0)
    axes.fill_between(rounds, q25, q75, color=COLOURS[phase], alpha=0.22, linewidth=0)
    axes.plot(rounds, q50, color=COLOURS[phase], label=TITLES[phase])


def validation(series: Mapping[str, Points], narrow: bool) -> Figure:
    """Perplexity on held-out text over rounds, a line for each phase; a phase with one value is a level."""
    drawn = sheet(NARROW if narrow else WIDE, 260 if narrow else 320)
    axes = drawn.subplots()
    last = max((rounds[-1] for rounds, _ in series.values()), default=0)
    for phase, (rounds, values) in series.items():
        if len(rounds) == 1 and phase != "federated":
            axes.axhline(values[0], color=COLOURS[phase], linewidth=1.4, linestyle=(0, (2, 3)), label=TITLES[phase])
            continue
        style: Any = (0, (5, 2)) if phase == "pooled" else "solid"
        axes.plot(rounds, values, color=COLOURS[phase], label=TITLES[phase], linestyle=style)
        for at, value in zip(rounds, values, strict=True):
            if len(rounds) <= 60:
                mark = axes.scatter([at], [value], **_mark(phase) | {"s": 22}, zorder=4)
                mark.set_gid(tip(f"{TITLES[phase]}, round {at}: {figure(value)}"))
    axes.set(xlabel="round", xlim=(-0.15, last + 0.15 if last else 1))
    axes.set_title("perplexity (lower is better)", color=COLOURS["muted"])
    _scale(axes, [value for _, values in series.values() for value in values], "y")
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5 if narrow else 10, integer=True))
    _legend(drawn, axes, 2 if narrow else 4)
    return drawn


def holdings(counts: Mapping[str, Mapping[str, int]], sizes: Mapping[str, int], narrow: bool) -> Figure:
    """Who holds what: a silo a line in the order given, a kind of text a column, stronger for more; right, sizes."""
    names, kinds = list(counts), _kinds(counts, 10 if narrow else MANY)
    line = 26 if len(names) <= FEW else 16 if len(names) <= MANY else 7
    height = 150 + line * len(names)
    drawn = sheet(NARROW if narrow else WIDE, height)
    widths = [max(1.0, min(4.0, len(kinds) / 3)) * (1 if narrow else 1.4), 1.0 if narrow else 1.6]
    matrix, bars = drawn.subplots(1, 2, sharey=True, width_ratios=widths)
    _cells(matrix, counts, kinds, numbers=len(names) <= FEW and len(kinds) <= (3 if narrow else 10))
    matrix.set_xticks(range(len(kinds)), [shorten(kind or "all others", 14 if narrow else 24) for kind in kinds])
    matrix.xaxis.tick_top()
    size = 12.5 if len(kinds) <= 20 else 10
    for label in matrix.get_xticklabels():
        label.set(rotation=40, ha="left", rotation_mode="anchor", color=COLOURS["ink"], fontsize=size)
    shown = len(names) <= MANY
    matrix.set_yticks(range(len(names)), [shorten(name, 11 if narrow else 24) if shown else "" for name in names])
    matrix.tick_params(axis="y", labelcolor=COLOURS["ink"], labelsize=12.5 if len(names) <= FEW else 10)
    matrix.set_ylim(len(names) - 0.5, -0.5)
    matrix.set_xlim(-0.5, len(kinds) - 0.5)
    if not shown:
        matrix.set_ylabel(f"{len(names)} silos")
    matrix.spines[:].set_visible(False)
    _size_bars(bars, [sizes.get(name, 0) for name in names], names, 1 if narrow else 3)
    return drawn


def _kinds(counts: Mapping[str, Mapping[str, int]], most: int) -> list[str | None]:
    """The kinds to show, sorted; with more than `most`, the commonest, and None for all the others."""
    totals: dict[str, int] = {}
    for held in counts.values():
        for kind, count in held.items():
            totals[kind] = totals.get(kind, 0) + count
    if len(totals) <= most:
        return [*sorted(totals)]
    return [*sorted(sorted(totals, key=lambda kind: (-totals[kind], kind))[: most - 1]), None]


def _cells(axes: Axes, counts: Mapping[str, Mapping[str, int]], kinds: Sequence[str | None], numbers: bool) -> None:
    most = max((count for held in counts.values() for count in held.values()), default=1) or 1
    gap = 0.06 if len(counts) <= FEW else 0.02
    empty = Rectangle((-0.5, -0.5), len(kinds), len(counts), facecolor=COLOURS["base"], alpha=0.06, linewidth=0)
    axes.add_artist(empty)
    for row, (name, held) in enumerate(counts.items()):
        rest = sum(count for kind, count in held.items() if kind not in kinds)
        for column, kind in enumerate(kinds):
            count = rest if kind is None else held.get(kind, 0)
            if not count:
                continue
            place, side = (column - 0.5 + gap, row - 0.5 + gap), 1 - 2 * gap
            shade = 0.12 + 0.43 * math.sqrt(count / most)
            cell = Rectangle(place, side, side, facecolor=COLOURS["federated"], alpha=shade, linewidth=0)
            axes.add_artist(cell)
            if len(counts) <= MANY:
                cell.set_gid(tip(f"{name} holds {thousands(count)} of {kind or 'others'}"))
            if numbers:
                axes.text(column, row, thousands(count), ha="center", va="center_baseline", fontsize=11.5)


def _size_bars(axes: Axes, sizes: Sequence[int], names: Sequence[str], ticks: int) -> None:
    values = len(names) <= FEW
    for height, (size, name) in enumerate(zip(sizes, names, strict=True)):
        bar = axes.barh([height], [size], height=0.62 if len(sizes) <= FEW else 0.9, color=COLOURS["base"])[0]
        bar.set_gid(tip(f"{name}: {thousands(size)} examples"))
        if values:
            axes.annotate(
                thousands(size), (size, height), (4, 0), textcoords="offset points", va="center_baseline", fontsize=11.5
            )
    axes.set_xlim(0, max([*sizes, 1]) * (1.35 if values else 1.05))
    axes.tick_params(labelleft=False)
    axes.spines[:].set_visible(False)
    axes.set_xticks([])
    axes.set_xlabel("examples", labelpad=6)
    if not values:
        axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: thousands(int(value))))


def traffic(up: Sequence[float], down: Sequence[float], narrow: bool) -> Figure:
    """Bytes over all silos: from the silos above the line and to them below it, by round; then added up."""
    drawn = sheet(NARROW if narrow else WIDE, 430 if narrow else 270)
    by_round, added = drawn.subplots(2, 1) if narrow else drawn.subplots(1, 2)
    edges = np.arange(len(up) + 1) + 0.5
    for values, name, sign in ((up, "up", 1), (down, "down", -1)):
        heights = sign * np.asarray(values, float)
        label = "from silos to server" if name == "up" else "from server to silos"
        if len(up) <= 60:
            by_round.bar(edges[:-1] + 0.5, heights, width=0.8, color=COLOURS[name], label=label)
        else:
            by_round.stairs(heights, edges, fill=True, color=COLOURS[name], label=label, linewidth=0)
        total = np.concatenate([[0.0], np.cumsum(np.asarray(values, float))])
        added.plot(range(len(total)), total, color=COLOURS[name], linestyle="solid" if name == "up" else (0, (4, 2)))
    _end_labels(added, len(up), sum(up), sum(down))
    by_round.axhline(0, color=COLOURS["muted"], linewidth=0.8)
    by_round.set_title("by round", color=COLOURS["muted"])
    added.set_title("added up", color=COLOURS["muted"])
    for axes in (by_round, added):
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: bytes_text(abs(value))))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(axis="y")
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("round")
        axes.margins(x=0.01, y=0.14)
    _legend(drawn, by_round, 1 if narrow else 2)
    return drawn


def _end_labels(axes: Axes, rounds: int, up: float, down: float) -> None:
    """The sums at the end of their lines; one for both when they would cover each other."""
    sent, received = bytes_text(up), bytes_text(down)
    ends = [(up, f"{sent} up"), (down, f"{received} down")]
    if abs(up - down) < 0.09 * max(up, down, 1.0):
        both = f"{sent}\neach way" if sent == received else f"{sent} up\n{received} down"
        ends = [((up + down) / 2, both)]
    for height, text in ends:
        axes.annotate(text, (rounds, height), (8, 0), textcoords="offset points", va="center", fontsize=11.5)


def times(seconds: Mapping[str, float], narrow: bool) -> Figure:
    """Where the time went: a bar for each phase, with its seconds and its share."""
    drawn = sheet(NARROW if narrow else WIDE, 34 + 27 * len(seconds))
    axes = drawn.subplots()
    total = sum(seconds.values()) or 1.0
    for height, (name, value) in enumerate(seconds.items()):
        colour = COLOURS.get(name, COLOURS["federated" if name in ("train", "federation") else "base"])
        bar = axes.barh([height], [value], height=0.62, color=colour)[0]
        bar.set_gid(tip(f"{name}: {seconds_text(value)}"))
        share = f"{seconds_text(value)}, {100 * value / total:.1f} %"
        axes.annotate(share, (value, height), (6, 0), textcoords="offset points", va="center_baseline")
    axes.set_yticks(range(len(seconds)), [TIMES.get(name, name) for name in seconds])
    axes.tick_params(axis="y", labelcolor=COLOURS["ink"])
    axes.set_ylim(len(seconds) - 0.5, -0.5)
    axes.set_xlim(0, max([*seconds.values(), 1e-9]) * (1.75 if narrow else 1.22))
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    axes.axvline(0, color=COLOURS["rule"])
    return drawn


TIMES = {
    "load": "loading",
    "train": "training",
    "federation": "the federation",
    "evaluate": "evaluation",
    "checkpoint": "checkpoints",
    "local_only": "silos alone",
    "pooled": "pooled",
    "other": "everything else",
}


def attendance(took_part: Mapping[str, set[int]], failed: Mapping[str, set[int]], rounds: int, narrow: bool) -> Figure:
    """Who took part in which round, a silo a line; a cross where one failed."""
    names = sorted({*took_part, *failed})
    if len(names) > MANY:
        return _attendance_counts(took_part, failed, rounds, narrow)
    line = 22 if len(names) <= FEW else 14
    drawn = sheet(NARROW if narrow else WIDE, 70 + line * len(names))
    axes = drawn.subplots()
    size = max(4.0, min(36.0, (line * 0.42) ** 2))
    for height, name in enumerate(names):
        there = sorted(took_part.get(name, set()) - failed.get(name, set()))
        axes.scatter(there, [height] * len(there), s=size * 0.6, color=COLOURS["federated"], alpha=0.5, linewidths=0)
        for at in sorted(failed.get(name, set())):
            cross = axes.scatter([at], [height], s=size, color=COLOURS["fail"], marker="x", linewidths=2)
            cross.set_gid(tip(f"{name} failed in round {at}"))
    axes.scatter([], [], s=24, color=COLOURS["federated"], alpha=0.5, linewidths=0, label="took part")
    if any(failed.values()):
        axes.scatter([], [], s=36, color=COLOURS["fail"], marker="x", linewidths=2, label="failed")
    axes.set_yticks(range(len(names)), [shorten(name, 14 if narrow else 28) for name in names])
    axes.tick_params(axis="y", labelcolor=COLOURS["ink"], labelsize=12.5 if len(names) <= FEW else 10)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set(xlabel="round", xlim=(0.5, max(rounds, 1) + 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(6 if narrow else 12, integer=True))
    axes.spines[:].set_visible(False)
    _legend(drawn, axes, 2)
    return drawn


def _attendance_counts(
    took_part: Mapping[str, set[int]], failed: Mapping[str, set[int]], rounds: int, narrow: bool
) -> Figure:
    drawn = sheet(NARROW if narrow else WIDE, 230)
    axes = drawn.subplots()
    edges = np.arange(rounds + 1) + 0.5
    crossed = np.array([sum(at in when for when in failed.values()) for at in range(1, rounds + 1)])
    there = np.array([sum(at in when for when in took_part.values()) for at in range(1, rounds + 1)])
    axes.stairs(there, edges, fill=True, color=COLOURS["federated"], alpha=0.5, linewidth=0, label="took part")
    if crossed.any():
        axes.stairs(
            there + crossed, edges, baseline=there, fill=True, color=COLOURS["fail"], linewidth=0, label="failed"
        )
    axes.set(xlabel="round")
    axes.set_title("silos", color=COLOURS["muted"])
    axes.xaxis.set_major_locator(MaxNLocator(6 if narrow else 12, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)
    _legend(drawn, axes, 2)
    return drawn


def _mark(phase: str) -> dict[str, Any]:
    hollow = phase == "base"
    return {
        "marker": MARKERS[phase],
        "s": SIZES[phase],
        "facecolor": COLOURS["paper"] if hollow else COLOURS[phase],
        "edgecolor": COLOURS[phase] if hollow else COLOURS["paper"],
        "linewidth": 2 if hollow else 1,
    }


def _legend(drawn: Figure, axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        drawn.legend(handles, labels, loc="outside upper left", ncols=columns)


def _scale(axes: Axes, values: Sequence[float], axis: str) -> None:
    """Logarithmic when the largest value is more than five times the smallest; plain numbers at the ticks."""
    values = [value for value in values if math.isfinite(value) and value > 0]
    ruler = axes.xaxis if axis == "x" else axes.yaxis
    if values and max(values) > 5 * min(values):
        (axes.set_xscale if axis == "x" else axes.set_yscale)("log")
        ruler.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ruler.set_minor_formatter(NullFormatter())
    else:
        ruler.set_major_locator(MaxNLocator(6))
    ruler.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
