"""Pages of tables in the house's look, for records that people read and programs take as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..governance.disk import write_whole

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Table:
    """`rows`: cells as text, the first of each row its heading."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A heading, what is said under it, and tables."""

    title: str
    about: str = ""
    tables: Sequence[Table] = ()

    @property
    def key(self) -> str:
        """Its anchor on the page."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.title.lower())


def page(kind: str, title: str, about: str, sections: Sequence[Section], status: str = "") -> str:
    """One HTML page that needs nothing but itself. `status`: a warning at the top, "" for none."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=StrictUndefined, keep_trailing_newline=True,
    )  # fmt: skip
    environment.globals["include_raw"] = lambda name: Markup((TEMPLATES / name).read_text(encoding="utf-8"))
    return environment.get_template("record.html.j2").render(
        kind=kind, title=title, about=about, sections=sections, status=status
    )


def write_json(path: Path, value: Mapping[str, Any]) -> Path:
    """Writes a record for programs, whole or not at all; equal values give equal bytes."""
    return write_whole(path, (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode())
