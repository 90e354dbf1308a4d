"""The plots of the audit's page, each a function from plain figures to a drawing; see `plots.py` for the report's.

Every function takes `narrow` last and draws for a page of 860 or of 350 pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from .svg import COLOURS, NARROW, WIDE, sheet, tip
from .words import shorten

LINES = ("federated", "local_only", "pooled", "up", "down", "fail")
DASHES: tuple[str | tuple[int, tuple[int, ...]], ...] = ("solid", (0, (5, 2)), (0, (2, 2)), (0, (7, 2, 2, 2)))
LEAST = 1e-4  # the smallest rate on a logarithmic axis

Curve = Sequence[Sequence[float]]


def curves(attacks: Mapping[str, Curve], allowed: Curve, narrow: bool) -> Figure:
    """Members found against false alarms, both logarithmic; above `allowed` no attack should come."""
    drawn = sheet(NARROW if narrow else WIDE, (330 if narrow else 400) + 20 * len(attacks) * narrow)
    axes = drawn.subplots()
    for place, (name, curve) in enumerate(attacks.items()):
        points = [(max(fpr, LEAST), max(tpr, LEAST)) for fpr, tpr in curve]
        axes.plot(*zip(*points, strict=True), label=shorten(name, 40), **_line(place))
    axes.plot([LEAST, 1], [LEAST, 1], color=COLOURS["base"], linewidth=1, linestyle=(0, (2, 3)), label="guessing")
    if allowed:
        rates, most = zip(*[(max(fpr, LEAST), max(tpr, LEAST)) for fpr, tpr in allowed], strict=True)
        axes.plot(rates, most, color=COLOURS["ink"], linewidth=1.4, linestyle=(0, (4, 3)), label="the most ε allows")
        axes.fill_between(rates, most, 1, color=COLOURS["fail"], alpha=0.08, linewidth=0)
    for set_scale, ruler in ((axes.set_xscale, axes.xaxis), (axes.set_yscale, axes.yaxis)):
        set_scale("log")
        ruler.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        ruler.set_minor_formatter(NullFormatter())
    axes.set(xlabel="false alarms among non-members", xlim=(LEAST, 1), ylim=(LEAST, 1))
    axes.set_title("members found", color=COLOURS["muted"])
    axes.grid()
    _legend(drawn, axes, 1 if narrow else 3)
    return drawn


def bounds(rows: Sequence[tuple[str, float, float | None, bool]], stated: float | None, narrow: bool) -> Figure:
    """Lower bounds on ε: a line a method with (name, bound, what ideal canaries reach, whether it is an estimate)."""
    drawn = sheet(NARROW if narrow else WIDE, 90 + 34 * len(rows) + 40 * narrow)
    axes = drawn.subplots()
    for height, (name, bound, ceiling, estimate) in enumerate(rows):
        axes.plot([0, bound], [height] * 2, color=COLOURS["federated"], alpha=0.3 if estimate else 0.75, linewidth=9)
        axes.scatter([bound], [height], s=0, alpha=0).set_gid(tip(f"{name}: {bound:.3g}"))
        if ceiling is not None:
            axes.scatter([ceiling], [height], s=90, marker="|", color=COLOURS["ink"], linewidths=2)
    _only_label(axes, "a lower bound", "federated", 0.75)
    if any(estimate for *_, estimate in rows):
        _only_label(axes, "an estimate, no bound", "federated", 0.3)
    if any(ceiling is not None for _, _, ceiling, _ in rows):
        axes.scatter([], [], s=90, marker="|", color=COLOURS["ink"], linewidths=2, label="ideal canaries")
    if stated is not None:
        axes.axvline(stated, color=COLOURS["fail"], linewidth=1.6, linestyle=(0, (4, 3)), label="stated ε")
    axes.set_yticks(range(len(rows)), [shorten(name, 20 if narrow else 36) for name, *_ in rows])
    axes.tick_params(axis="y", labelcolor=COLOURS["ink"])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("ε")
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    _legend(drawn, axes, 2 if narrow else 4)
    return drawn


def recovery(series: Mapping[str, Sequence[tuple[int, float]]], narrow: bool) -> Figure:
    """The share of tokens recovered by batch size, a line for each attack and defence."""
    drawn = sheet(NARROW if narrow else WIDE, 300 + (20 if narrow else 8) * len(series))
    axes = drawn.subplots()
    for place, (name, points) in enumerate(series.items()):
        axes.plot(*zip(*points, strict=True), label=shorten(name, 44), **_line(place))
        for batch, tokens in points:
            mark = axes.scatter([batch], [tokens], s=18, color=COLOURS[LINES[place % len(LINES)]], zorder=4)
            mark.set_gid(tip(f"{name}, batch {batch}: {100 * tokens:.3g} %"))
    batches = sorted({batch for points in series.values() for batch, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes.set(xlabel="rows in the batch", ylim=(-0.03, 1.03))
    axes.set_title("tokens recovered", color=COLOURS["muted"])
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)
    _legend(drawn, axes, 1 if narrow else 2)
    return drawn


def _line(place: int) -> dict[str, object]:
    """A colour and a dash that together are a line's own, for up to 24 lines."""
    return {"color": COLOURS[LINES[place % len(LINES)]], "linestyle": DASHES[(place // len(LINES)) % len(DASHES)]}


def _only_label(axes: Axes, label: str, colour: str, alpha: float) -> None:
    axes.plot([], [], color=COLOURS[colour], alpha=alpha, linewidth=9, label=label)


def _legend(drawn: Figure, axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        drawn.legend(handles, labels, loc="outside upper left", ncols=columns)
