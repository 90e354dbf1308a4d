"""Writing TOML: one value, and a whole treaty with a comment on every key that has one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .schema import SECTIONS

_COMMENT_COLUMN = 40


def value(x: Any) -> str:
    """A TOML spelling of a text, boolean, integer, float, or list of them; reads back as the same value.

    >>> value(["a", 1e-3, True])
    '["a", 0.001, true]'
    """
    if isinstance(x, bool):
        return "true" if x else "false"
    if isinstance(x, list | tuple):
        return f"[{', '.join(map(value, x))}]"
    if isinstance(x, str):
        return json.dumps(x, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(x)


def document(tables: Mapping[str, Mapping[str, Any]], head: str) -> str:
    """All sections in the schema's order, under a comment `head`."""
    blocks = [_block(section, tables[section]) for section in SECTIONS if section in tables]
    return "\n\n".join([f"# {head}", *blocks]) + "\n"


def _block(section: str, table: Mapping[str, Any]) -> str:
    fields = SECTIONS[section].model_fields
    lines = [_line(f"{key} = {value(table[key])}", fields[key].description) for key in fields if key in table]
    return "\n".join([f"[{section}]", *lines])


def _line(setting: str, comment: str | None) -> str:
    return f"{setting:<{_COMMENT_COLUMN}} # {comment}" if comment else setting
