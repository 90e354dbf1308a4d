"""A matplotlib figure as a piece of a page: inline SVG whose text is text and whose colours follow the page.

Figures are drawn in stand-in colours, which become CSS variables here, so one drawing serves light, dark and print.
One unit of the drawing is one CSS pixel. The same figure gives the same bytes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from html import escape
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from .words import printable

VARIABLES = ("ink", "muted", "rule", "paper", "base", "local_only", "federated", "pooled", "up", "down", "fail")
COLOURS = {name: f"#{index:02x}fe{index:02x}" for index, name in enumerate(VARIABLES, 1)}

LIGHT = {"ink": "#1c2024", "muted": "#5c6168", "rule": "#ddd8cd", "paper": "#fdfcf9", "base": "#6d7278",
         "local_only": "#b3590a", "federated": "#0b5cad", "pooled": "#0a7a5a",
         "up": "#7a4b9d", "down": "#3c7d8f", "fail": "#a8323e"}  # fmt: skip
"""The colours of `report.css` on a light page, for a file that has no page around it."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "foedus",
    "text.parse_math": False,  # a name may hold dollars
    "font.family": "DejaVu Sans",  # to measure with: wider than system fonts, so nothing overlaps where they are used
    "font.size": 12.5,
    "axes.titlesize": 12.5,
    "axes.labelsize": 12.5,
    "xtick.labelsize": 12.5,
    "ytick.labelsize": 12.5,
    "legend.fontsize": 12.5,
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.titlecolor": COLOURS["ink"],
    "axes.edgecolor": COLOURS["rule"],
    "xtick.color": COLOURS["rule"],
    "ytick.color": COLOURS["rule"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "grid.color": COLOURS["rule"],
    "grid.linewidth": 0.8,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": False,
    "legend.frameon": False,
    "legend.borderpad": 0.2,
    "legend.borderaxespad": 0.0,
    "legend.handletextpad": 0.5,
    "legend.columnspacing": 1.6,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "axes.titlelocation": "left",
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "xtick.major.pad": 6,
    "ytick.major.pad": 6,
}

WIDE, NARROW = 860, 350
TIP = "tip "


def sheet(width: float, height: float, between: float = 0.02) -> Figure:
    """An empty figure, sizes in pixels; `between`: the room between its panels, as a share of one."""
    layout = ConstrainedLayoutEngine(h_pad=10 / 72, wspace=between, hspace=between)
    return Figure(figsize=(width / 72, height / 72), layout=layout)


def picture(key: str, alt: str, draw: Callable[[bool], Figure]) -> Markup:
    """Both drawings of a figure, for wide and for narrow pages; the style sheet shows one of them.

    `key`: prefix of the ids inside, unique on the page. `alt`: what one reads who does not see it.
    `draw(narrow)`: makes the figure.
    """
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # only the measuring font lacks it
        drawings = [_inline(draw(narrow), f"{key}-{'n' if narrow else 'w'}", alt, narrow) for narrow in (False, True)]
    return Markup("\n".join(drawings))


def standalone(figure: Callable[[], Figure]) -> bytes:
    """A figure as an SVG file of its own, in the colours of a light page."""
    with matplotlib.rc_context({**STYLE, "figure.facecolor": LIGHT["paper"]}):
        buffer = io.StringIO()
        FigureCanvasSVG(figure()).print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    for name, colour in LIGHT.items():
        text = text.replace(COLOURS[name], colour)
    return text.encode()


def tip(text: str) -> str:
    """The gid of an artist whose hover text is `text`."""
    return TIP + printable(text)


def _inline(figure: Figure, prefix: str, alt: str, narrow: bool) -> str:
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)
    text = buffer.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", body, flags=re.S)
    used = set(re.findall(r"url\(#([^)]+)\)", body)) | set(re.findall(r'xlink:href="#([^"]+)"', body))
    # Names of silos stand in the text between tags, where nothing may be replaced.
    body = re.sub(r"<[^<>]*>", lambda found: _tag(found[0], prefix, used), body)
    width, height = (round(inches * 72) for inches in figure.get_size_inches())
    shown = "narrow" if narrow else "wide"
    head = f'<svg class="{shown}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(alt)}">'
    return head + re.sub(r">\s+<", "><", body).strip()


def _tag(tag: str, prefix: str, used: set[str]) -> str:
    if hover := re.fullmatch(rf"""<g id=(["']){TIP}(.*)\1>""", tag, flags=re.S):
        return f'<g class="tip"><title>{hover[2]}</title>'
    tag = re.sub(r' id="([^"]*)"', lambda found: f' id="{prefix}-{found[1]}"' if found[1] in used else "", tag)
    tag = tag.replace('xlink:href="#', f'href="#{prefix}-').replace("url(#", f"url(#{prefix}-")
    tag = re.sub(r' transform="rotate\(-?0 [^)]*\)"', "", tag)
    tag = re.sub(r"font-family: [^;\"]*;? ?|(?<=px) '[^;\"]*", "", tag).replace("font: ", "font-size: ")
    tag = re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", tag)
    for name, colour in COLOURS.items():
        tag = tag.replace(colour, f"var(--{name.replace('_', '-')})")
    return re.sub(r"\s+", " ", tag)
