"""Reading files that others are writing: what is absent, cut off or no longer fits is empty, and never an error."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MOST = 64 * 2**20
"""Bytes of a file that a page reads at most."""


def table(path: Path) -> dict[str, Any]:
    """The object in a JSON or TOML file; {} where there is none, or half of one."""
    text = _text(path)
    try:
        value = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def part(found: Any, *names: str) -> dict[str, Any]:
    """The object inside an object, by names from the outside in; {} where there is none.

    >>> part({"a": {"b": {"c": 1}}}, "a", "b"), part({"a": [1]}, "a"), part(None, "a")
    ({'c': 1}, {}, {})
    """
    for name in names:
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def objects(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, in order; lines that are none, and what follows the last line break, are left
    out."""
    found = []
    for line in _text(path).split("\n")[:-1]:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        found += [value] if isinstance(value, dict) else []
    return found


def folders(path: Path) -> list[Path]:
    """The folders inside one, by name; none where there is no such folder."""
    return sorted(entry for entry in _entries(path) if entry.is_dir() and not entry.name.startswith("."))


def changed(path: Path) -> float:
    """When a file was last written, in seconds since 1970; 0 where there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def stamp(paths: Iterable[Path], *more: str) -> str:
    """A short text that differs when one of these files does (by size and time), or one of `more`."""
    mixed = hashlib.sha256("\0".join(more).encode())
    for path in paths:
        try:
            known = path.stat()
        except OSError:
            continue
        mixed.update(f"{path}\0{known.st_mtime_ns}\0{known.st_size}\0".encode())
    return mixed.hexdigest()[:32]


def _entries(path: Path) -> list[Path]:
    try:
        return list(path.iterdir())
    except OSError:
        return []


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MOST).decode("utf-8", errors="replace")
    except OSError:
        return ""
