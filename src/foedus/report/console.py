"""The comparison on a terminal: what `foedus run` ends with and `foedus report` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .compare import TITLES, Comparison, Row, compare, figure, signed_percent, verdict
from .guarantee import guarantee_of

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

STYLES = {"base": "", "local_only": "", "federated": "bold", "pooled": ""}
MOST_DOMAINS = 40


def summary_lines(summary: Mapping[str, Any]) -> Group:
    """Perplexity (and accuracy where labelled) by domain as a table, then what it says in words; for a rich `Console`.

    `summary`: as in summary.json. Names are printed as they are; nothing in them is taken for markup.
    """
    from rich.console import Group
    from rich.text import Text

    evaluation = summary.get("evaluation") or {}
    found = [c for metric in ("perplexity", "accuracy") if (c := compare(evaluation, metric))]
    words = Text(" ".join(verdict(evaluation)))
    privacy = _privacy(summary.get("privacy") or {})
    return Group(*(_table(c) for c in found), words, *([Text(f"\nPrivacy: {privacy}")] if privacy else []))


def _privacy(recorded: Mapping[str, Any]) -> str:
    """One line for a guarantee; where nobody has one, everything that is recorded about it."""
    given = guarantee_of(recorded)
    if not given.stated:
        return str(recorded.get("statement") or "")
    if given.simulated:
        return f"SIMULATED NOISE, nobody is protected; with real noise, {given.short}."
    return f"{given.short}."


def _table(c: Comparison) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=c.title, title_justify="left", title_style="bold")
    table.add_column("Domain", overflow="fold")
    for phase in c.phases:
        table.add_column(TITLES[phase], justify="right", style=STYLES[phase])
    table.add_column("Change", justify="right", no_wrap=True)
    for row in c.domains[:MOST_DOMAINS]:
        table.add_row(*(Text(word) for word in _words(c, row)))
    if len(c.domains) > MOST_DOMAINS:
        table.add_row(Text(f"… {len(c.domains) - MOST_DOMAINS} more in the report"))
    if c.domains:
        table.add_section()
    for row in c.means:
        table.add_row(*(Text(word) for word in _words(c, row)))
    return table


def _words(c: Comparison, row: Row) -> list[str]:
    return [row.name, *(figure(row.values.get(phase), c.metric) for phase in c.phases), signed_percent(row.change())]
