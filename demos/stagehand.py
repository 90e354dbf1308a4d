"""What the demos share: checks that print themselves, and files as they are while somebody writes them."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Check:
    """Something that must be true, in words, and whether it is."""

    held: bool
    words: str

    def print(self) -> bool:
        print(f"  {'held  ' if self.held else 'FAILED'}  {self.words}", flush=True)
        return self.held


def foedus() -> list[str]:
    """The command line, with the Python that runs now."""
    return [sys.executable, "-m", "foedus"]


def records(file: Path) -> list[dict]:
    """The whole lines of a file that may be written to right now."""
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]] if file.exists() else []


def read(file: Path) -> dict:
    """The object in a file of JSON; {} where there is none."""
    return json.loads(file.read_text()) if file.exists() else {}
