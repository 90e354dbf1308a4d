"""A ledger for people who were not there: one HTML page that needs nothing but itself, and the same as JSON.

Both are made from the ledger alone, after it was verified: whoever has the file can make them again, byte for byte.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..governance.ledger import KEEPER, PRUNED, head_of, keepers, verify
from ..governance.witness import Comparison
from .folder import write_page
from .words import thousands

TEMPLATES = Path(__file__).parent / "templates"
FORMAT = 1
KINDS = {
    "keeper": "who keeps this ledger from here on",
    "pruned": "records that were dropped by the keeper, as its retention asks",
    "opened": "a run began: its treaty, model, silos and guarantee",
    "charge": "the cost of a round, written before anything of it was released",
    "round": "a round: who sent what, what was released, at what cost",
    "closed": "a run ended with this adapter",
    "survivors": "for whom a secure sum was opened",
    "asked": "a message that was accepted, written before anything was done",
    "answered": "what was given to a task",
    "refused": "a message that was refused, and why",
    "registry": "a version that was registered, promoted, rolled back or retired",
    "cap": "what a silo's operator allows for life",
    "treaty": "what a treaty may cost a silo at most",
    "released": "a release that was kept",
}
SHOWN = 2_000  # records on a page; the JSON holds all


def document(path: Path, *, key: str = "", comparisons: Sequence[Comparison] = ()) -> dict[str, Any]:
    """A verified ledger as one JSON value. Raises `RunError` when it does not verify."""
    records = verify(path, key=key)
    return {
        "format": FORMAT,
        "name": path.name,
        "verified": True,
        "signed": bool(keepers(records)),
        "keepers": [record["body"] for record in records if record["kind"] == KEEPER],
        "head": str(head_of(records)),
        "count": head_of(records).count,
        "pruned": sum(sum(record["body"]["kinds"].values()) for record in records if record["kind"] == PRUNED),
        "kinds": dict(Counter(record["kind"] for record in records)),
        "comparisons": [{**asdict(one), "same": one.same} for one in comparisons],
        "records": records,
    }


def write_json(document: Mapping[str, Any], place: Path) -> Path:
    """Writes the document as indented JSON, whole or not at all."""
    text = json.dumps(document, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    return write_page(place, text, "Make room or mend the permissions.")


def write_ledger_page(document: Mapping[str, Any], place: Path) -> Path:
    """Writes the page, whole or not at all."""
    return write_page(place, render(document), "Make room or mend the permissions.")


def render(document: Mapping[str, Any]) -> str:
    """The page, as text."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=StrictUndefined, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"count": thousands}
    environment.globals |= {"include_raw": lambda name: Markup((TEMPLATES / name).read_text(encoding="utf-8"))}
    records = document["records"]
    return environment.get_template("ledger.html.j2").render(
        ledger=document,
        explained=KINDS,
        rows=[_row(record) for record in records[-SHOWN:]],
        left_out=max(0, len(records) - SHOWN),
    )


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record in words: what is one word first, what has parts below it."""
    body = record["body"]
    plain = [(name, _word(value)) for name, value in body.items() if not isinstance(value, dict | list)]
    parts = {name: value for name, value in body.items() if isinstance(value, dict | list) and value}
    return {
        "index": record["index"],
        "kind": record["kind"],
        "hash": record["hash"],
        "signed": "signature" in record,
        "plain": [(name, value) for name, value in plain if value],
        "parts": json.dumps(parts, indent=1, ensure_ascii=False, sort_keys=True) if parts else "",
    }


def _word(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    return f"{value:,}".replace(",", "\u2009") if isinstance(value, int) else str(value)
