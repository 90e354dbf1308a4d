"""From a file, or its text, to a treaty; what is not TOML is told so."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from ..errors import TreatyError, one_of
from .core import Treaty, from_dict
from .mistakes import Mistakes, Problem

_MOST_BYTES = 1_000_000
_YAML = re.compile(r"^\s*(?:---|[A-Za-z_]\w*\s*:(?:\s|$))")
_PLACE = re.compile(r"\(at (?:line (\d+), column (\d+)|end of document)\)$")


def load(path: str | Path) -> Treaty:
    """The treaty in a file (UTF-8 TOML, at most 1 MB); its `folder` is the file's.

    Raises `TreatyError` for a file that cannot be read or is not a treaty, with every mistake in it.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            blob = file.read(_MOST_BYTES + 1)
        if len(blob) > _MOST_BYTES:
            do = "Name the treaty, not the data it speaks of."
            raise _unreadable(path, f"more than {_MOST_BYTES:,} bytes", do)
        text = blob.decode("utf-8-sig")
    except FileNotFoundError:
        raise _unreadable(path, "no such file", _neighbours(path)) from None
    except UnicodeDecodeError as error:
        raise _unreadable(path, f"a byte at {error.start} that is not UTF-8", "Save it as UTF-8 text.") from None
    except (OSError, ValueError) as error:
        came = "a folder" if isinstance(error, IsADirectoryError) else str(error)
        raise _unreadable(path, came, _neighbours(path)) from None
    return parse(text, str(path), folder=path.resolve().parent)


def parse(text: str, where: str = "", *, folder: Path | None = None) -> Treaty:
    """The treaty in a text. `where`: what an error calls it; `folder`: against which relative paths are read.

    Raises `TreatyError` with line, column and the line itself where it is not TOML, and otherwise as `from_dict`.
    """
    return from_dict(_toml(text.removeprefix("\ufeff"), where), where, folder=folder)


def _toml(text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise Mistakes(
            [Problem("plain sections and keys", "brackets nested too deep", "Flatten it.", "")], where
        ) from None
    except ValueError as error:  # TOMLDecodeError is one; so is Python's limit on the digits of a number
        raise Mistakes([_syntax(text, error)], where) from None


def _syntax(text: str, error: ValueError) -> TreatyError:
    if _is_json(text):
        return Problem("TOML", "JSON", 'Write {"model": {"base": "x"}} as two lines: [model] and base = "x".', "")
    first = next((line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")), "")
    if _YAML.match(first):
        return Problem(
            "TOML", f"what looks like YAML ({_cut(first)})", "Write key: value as key = value under a [section].", ""
        )
    found = _PLACE.search(str(error))
    lines = text.split("\n")
    line = int(found[1]) if found and found[1] else len(lines)
    at = f"line {line}, column {found[2]}" if found and found[1] else "at its end" if found else ""
    reason = _PLACE.sub("", str(error)).strip()
    shown = f"{reason}: {_cut(lines[line - 1])}" if found else reason
    do = "Write key = value lines under [section] headers; texts in quotes; each key and section once."
    return Problem("TOML", shown, do, at)


def _is_json(text: str) -> bool:
    try:
        return text.lstrip()[:1] in ("{", "[") and isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def _cut(line: str) -> str:
    line = line.strip()
    return f"`{line if len(line) <= 80 else line[:77] + '...'}`"


def _unreadable(path: Path, came: str, do: str) -> Mistakes:
    return Mistakes([Problem("a treaty's file", came, do, "")], str(path))


def _neighbours(path: Path) -> str:
    try:
        names = [other.name for other in path.parent.iterdir() if other.suffix == ".toml"]
    except (OSError, ValueError):
        return f"There is no folder {path.parent} to read; check the path."
    return one_of(path.name, names)
