"""The plots of a study's page, each a function from `results.json` to a drawing; see `plots.py` for a run's report.

Every function takes `narrow` last and draws for a page of 860 or of 350 pixels. The method is blue and solid in all of
them, what is published is grey and dashed, and no colour says what no mark or dash says too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from .svg import COLOURS, NARROW, WIDE, sheet, tip
from .words import shorten

Row = Mapping[str, Any]
Spell = Any

RIVALS = ("local_only", "pooled", "up", "down", "fail", "ink", "base")
MARKERS = ("s", "D", "^", "v", "P", "X", "h")
DASHES = ((0, (5, 2)), (0, (2, 2)), (0, (7, 2, 2, 2)))


def methods(rows: Sequence[Row], metrics: Sequence[Row], spell: Spell, narrow: bool) -> Figure:
    """Every method a line, every judged figure a panel: the seeds as dots, their mean as a stroke."""
    height = 60 + 24 * len(rows)
    drawn = sheet(NARROW if narrow else WIDE, (height + 20) * len(metrics) if narrow else height + 30)
    panels = drawn.subplots(*((len(metrics), 1) if narrow else (1, len(metrics))), squeeze=False, sharey=not narrow)
    for metric, axes in zip(metrics, panels.flat, strict=True):
        for place, row in enumerate(rows):
            _seeds(axes, place, row, metric, spell)
        axes.set_yticks(range(len(rows)), [shorten(row["title"], 16 if narrow else 26) for row in rows])
        axes.tick_params(axis="y", labelcolor=COLOURS["ink"])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        better = {True: ", left is better", False: ", right is better"}.get(metric["lower"], "")
        axes.set_title(f"{metric['title']}{better}", color=COLOURS["muted"])
        _ticks(axes.xaxis, metric, spell, 4)
    return drawn


def _seeds(axes: Axes, place: int, row: Row, metric: Row, spell: Spell) -> None:
    found = row["figures"][metric["key"]]
    if not found:
        return
    colour = COLOURS["federated" if row["role"] == "ours" else "local_only" if row["role"] == "rival" else "base"]
    values = list(found["values"].values())
    axes.plot([found["low"], found["high"]], [place] * 2, color=colour, linewidth=5, alpha=0.25, zorder=2)
    axes.scatter(values, [place] * len(values), s=26, color=colour, alpha=0.8, linewidths=0, zorder=3)
    mean = axes.scatter([found["mean"]], [place], s=190, marker="|", color=colour, linewidths=2.4, zorder=4)
    mean.set_gid(tip(f"{row['title']}: {spell(metric, found['mean'])}"))


def curve(found: Row, metric: Row, spell: Spell, narrow: bool) -> Figure:
    """A figure along an axis, a line a method with a band of one standard deviation; where something is published,
    beside it the same relative to its start.
    """
    published = [p for p in found["published"] if p["figure"] == metric["key"]]
    panels = 2 if published else 1
    rows = len(found["lines"]) + len(published)
    legend = 22 * (rows if narrow else -(-rows // 3))
    size = (NARROW, 40 + 240 * panels + legend) if narrow else (WIDE, 300 + legend)
    drawn = sheet(*size, between=0.06)
    grid = drawn.subplots(*((panels, 1) if narrow else (1, panels)), squeeze=False)
    plain = grid.flat[0]
    _lines(plain, found, metric, spell)
    _dress(plain, found, metric["title"], narrow)
    _ticks(plain.yaxis, metric, spell, 5)
    if published:
        _relative(grid.flat[1], found, metric, published[0])
        _dress(grid.flat[1], found, "relative to the start", narrow)
        grid.flat[1].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"× {value:.3g}"))
    handles, labels = grid.flat[-1].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside upper left", ncols=1 if narrow else 3)
    return drawn


def _lines(axes: Axes, found: Row, metric: Row, spell: Spell) -> None:
    for place, line in enumerate(found["lines"]):
        points = line["figures"][metric["key"]]["points"]
        known = [(x, p) for x, p in zip(found["xs"], points, strict=True) if p]
        xs, means = [x for x, _ in known], [p["mean"] for _, p in known]
        look = _look(found["lines"], place)
        axes.plot(xs, means, label=shorten(line["title"], 34), **look, zorder=3)
        spreads = [p["sd"] or 0.0 for _, p in known]
        low, high = ([m + s * sd for m, sd in zip(means, spreads, strict=True)] for s in (-1, 1))
        axes.fill_between(xs, low, high, color=look["color"], alpha=0.14, linewidth=0, zorder=2)
        for x, p in known:
            dot = axes.scatter([x], [p["mean"]], s=30, alpha=0)
            dot.set_gid(tip(f"{line['title']}, {x:g}: {spell(metric, p['mean'])}"))


def _relative(axes: Axes, found: Row, metric: Row, published: Row) -> None:
    """Only where the paper measured: each line divided by its value at the first of those points."""
    low, high = min(published["x"]), max(published["x"])
    for place, line in enumerate(found["lines"]):
        points = line["figures"][metric["key"]]["points"]
        known = [(x, p["mean"]) for x, p in zip(found["xs"], points, strict=True) if p and low <= x <= high]
        if known and known[0][1] > 0:
            look = _look(found["lines"], place)
            ys = [y / known[0][1] for _, y in known]
            axes.plot([x for x, _ in known], ys, label=shorten(line["title"], 34), **look)
    start = published["y"][0]
    axes.plot(published["x"], [y / start for y in published["y"]], color=COLOURS["muted"], linestyle=(0, (2, 3)),
              marker="o", markersize=4, label="published (other data and model)")  # fmt: skip


def _dress(axes: Axes, found: Row, title: str, narrow: bool) -> None:
    if found["log"]:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.margins(x=0.03)
    shown = found["xs"] if len(found["xs"]) <= (5 if narrow else 8) else found["xs"][::2]
    labels = dict(zip(found["xs"], found["labels"], strict=True))
    axes.set_xticks(shown, [shorten(labels[x], 10) for x in shown])
    axes.set_xlabel(found["x"])
    axes.set_title(title, color=COLOURS["muted"])
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)


def ablation(found: Row, metrics: Sequence[Row], spell: Spell, narrow: bool) -> Figure:
    """A variant a bar, a figure a panel; the line is the whole method, the whiskers one standard deviation."""
    rows = found["rows"]
    height = 66 + 26 * len(rows)
    drawn = sheet(NARROW if narrow else WIDE, height * len(metrics) if narrow else height + 10)
    panels = drawn.subplots(*((len(metrics), 1) if narrow else (1, len(metrics))), squeeze=False, sharey=not narrow)
    for metric, axes in zip(metrics, panels.flat, strict=True):
        for place, row in enumerate(rows):
            _bar(axes, place, row, metric, spell, whole=row["key"] == found["of"])
        whole = rows[0]["figures"][metric["key"]]
        if whole:
            axes.axvline(whole["mean"], color=COLOURS["federated"], linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_yticks(range(len(rows)), [shorten(row["title"], 18 if narrow else 28) for row in rows])
        axes.tick_params(axis="y", labelcolor=COLOURS["ink"])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.set_title(metric["title"], color=COLOURS["muted"])
        _ticks(axes.xaxis, metric, spell, 4)
        _from_near(axes, [row["figures"][metric["key"]] for row in rows])
    return drawn


def _bar(axes: Axes, place: int, row: Row, metric: Row, spell: Spell, whole: bool) -> None:
    value = row["figures"][metric["key"]]
    if not value:
        return
    colour = COLOURS["federated" if whole else "base"]
    bar = axes.barh([place], [value["mean"]], height=0.6, color=colour, alpha=1.0 if whole else 0.6)[0]
    bar.set_gid(tip(f"{row['title']}: {spell(metric, value['mean'])}"))
    if value["sd"]:
        axes.errorbar([value["mean"]], [place], xerr=[value["sd"]], color=COLOURS["ink"], linewidth=1.4, capsize=3)


def _from_near(axes: Axes, values: Sequence[Row | None]) -> None:
    """Bars begin near the least where all are positive and alike, so that differences can be seen; the axis says so."""
    known = [(v["mean"] - (v["sd"] or 0), v["mean"] + (v["sd"] or 0)) for v in values if v]
    if known and min(low for low, _ in known) > 0.5 * max(high for _, high in known):
        low, high = min(low for low, _ in known), max(high for _, high in known)
        room = (high - low) or 0.1 * high
        axes.set_xlim(low - 0.5 * room, high + 0.1 * room)
        axes.set_xlabel("the axis does not begin at zero")


def _look(lines: Sequence[Row], place: int) -> dict[str, Any]:
    if lines[place]["role"] == "ours" and not any(line["role"] == "ours" for line in lines[:place]):
        return {"color": COLOURS["federated"], "linestyle": "solid", "marker": "o", "markersize": 5, "linewidth": 2.6}
    other = sum(1 for i, line in enumerate(lines[:place]) if _look(lines, i)["color"] != COLOURS["federated"])
    return {"color": COLOURS[RIVALS[other % len(RIVALS)]], "linestyle": DASHES[other // len(RIVALS) % len(DASHES)],
            "marker": MARKERS[other % len(MARKERS)], "markersize": 4.5, "linewidth": 1.7}  # fmt: skip


def _ticks(ruler: Any, metric: Row, spell: Spell, most: int) -> None:
    ruler.set_major_locator(MaxNLocator(most))
    ruler.set_major_formatter(FuncFormatter(lambda value, _: spell(metric, value)))
