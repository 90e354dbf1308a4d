"""What all commands share: where they print, and how their arguments read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

out, err = Console(soft_wrap=True, highlight=False), Console(stderr=True, soft_wrap=True, highlight=False)

TreatyFile = Annotated[Path, typer.Argument(metavar="TREATY", help="A treaty, in TOML.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def print_json(value: Any) -> None:
    """For programs: standard output, indented."""
    print(json.dumps(value, indent=2, ensure_ascii=False))
