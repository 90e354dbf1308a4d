"""What all commands share: where they print, and how their arguments read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text


class Terminal(Console):
    """Prints text as text: what a treaty or a peer says moves no cursor, hides no line and turns none around."""

    def render_str(self, text: str, **how: Any) -> Text:
        plain = "".join(c if c.isprintable() or c in "\n\t\u00a0\u202f" else "\ufffd" for c in text)
        return super().render_str(plain, **how)


out, err = Terminal(soft_wrap=True, highlight=False), Terminal(stderr=True, soft_wrap=True, highlight=False)

TreatyFile = Annotated[Path, typer.Argument(metavar="TREATY", help="A treaty, in TOML.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def print_json(value: Any) -> None:
    """For programs: standard output, indented."""
    print(json.dumps(value, indent=2, ensure_ascii=False))
