"""What is in a run's folder, read once into a frozen value. Everything in `report/` starts from here and nothing else.

A run may have ended, be under way, or have been stopped by force: then there is no `summary.json`, and the last line of
a `.jsonl` file may be cut off. A line that a resumed run wrote again replaces the earlier one.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import RunError
from ..governance.ledger import Chain

FILES = ("summary.json", "metrics.jsonl", "ledger.jsonl", "treaty.toml")

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Ledger:
    """The ledger as it was found. `broken_at`: index of the first record that does not fit the chain, or None."""

    records: tuple[Record, ...] = ()
    broken_at: int | None = None
    why: str = ""

    @property
    def closed(self) -> bool:
        """Whether the last record closes the run."""
        return bool(self.records) and self.records[-1].get("kind") == "closed"


@dataclass(frozen=True)
class Run:
    """A run's folder. `summary` is {} until the run has ended; the other files may be missing too.

    `audit`: what `foedus audit` found, where its page stands beside the report's; else {}.
    """

    summary: Record = field(default_factory=dict)
    rounds: tuple[Record, ...] = ()
    evaluations: tuple[Record, ...] = ()
    ledger: Ledger = field(default_factory=Ledger)
    treaty_text: str = ""
    treaty: Record = field(default_factory=dict)
    audit: Record = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        """Whether the run wrote its summary."""
        return bool(self.summary)

    @property
    def name(self) -> str:
        """The run's name: the summary's, else the treaty's."""
        return str(self.summary.get("name") or self.treaty.get("treaty", {}).get("name") or "unnamed run")

    def phase(self, name: str) -> tuple[Record, ...]:
        """The round records of one phase, such as "federated" or "local:sci.med", in the order of their rounds."""
        return tuple(record for record in self.rounds if record.get("phase") == name)


def read_run(folder: Path) -> Run:
    """Reads a run's folder. Raises `RunError` if it is none, or if a file in it is damaged before its last line."""
    folder = Path(folder)
    if not folder.is_dir() or not any((folder / name).is_file() for name in FILES):
        came = "a folder with none of them" if folder.is_dir() else "no such folder"
        raise RunError(
            f"the folder of a run, with {', '.join(FILES)}", came, "Give the folder named in --out.", where=str(folder)
        )
    metrics = _lines(folder / "metrics.jsonl")
    text = _text(folder / "treaty.toml")
    return Run(
        summary=_summary(folder / "summary.json"),
        rounds=_latest((m for m in metrics if m.get("kind") == "round"), "phase"),
        evaluations=_latest((m for m in metrics if m.get("kind") == "evaluation"), "phase", "split"),
        ledger=verify_chain(_lines(folder / "ledger.jsonl")),
        treaty_text=text,
        treaty=_treaty(text, folder / "treaty.toml"),
        audit=_summary(folder / "audit.json") if (folder / "audit.html").is_file() else {},
    )


def verify_chain(records: Iterable[Record]) -> Ledger:
    """The ledger, with the first record that does not continue the chain; see `governance/ledger.py`."""
    records, chain = tuple(records), Chain()
    for index, record in enumerate(records):
        if why := chain.misfit(record):
            return Ledger(records, index, why)
    why = chain.unfinished()
    return Ledger(records, len(records) - 1, why) if why else Ledger(records)


def _latest(records: Iterable[Record], *names: str) -> tuple[Record, ...]:
    """The last record for each (names…, round), ordered by round, then as they came."""
    kept = {(*(record.get(name) for name in names), record.get("round", 0)): record for record in records}
    return tuple(sorted(kept.values(), key=lambda record: record.get("round", 0)))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else ""
    except UnicodeDecodeError as error:
        raise _damaged(path, "text in UTF-8", str(error)) from error


def _summary(path: Path) -> Record:
    text = _text(path)
    if not text:
        return {}
    try:
        return _object(text)
    except ValueError as error:
        raise _damaged(path, "one JSON object", str(error)) from error


def _lines(path: Path) -> list[Record]:
    """The records of a .jsonl file; what follows the last line break was cut off, and is left out."""
    whole = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    records = []
    for number, line in enumerate(whole, 1):
        try:
            records.append(_object(line))
        except ValueError as error:
            raise _damaged(path, "one JSON object a line", f"{error} on line {number}") from error
    return records


def _object(text: str | bytes) -> Record:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("text that is not JSON") from error
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}")
    return value


def _treaty(text: str, path: Path) -> Record:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _damaged(path, "the resolved treaty, in TOML", str(error)) from error


def _damaged(path: Path, expected: str, came: str) -> RunError:
    return RunError(expected, came, "Restore the file, or resume the run, which writes it again.", where=str(path))


def write_page(place: Path, page: str, do: str) -> Path:
    """Writes a page whole or not at all. Raises `RunError`, with the advice `do`, when the disk does not take it."""
    beside = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        beside.write_text(page, encoding="utf-8", errors="replace")
        os.replace(beside, place)
    except OSError as error:
        raise RunError(f"to write {place}", error.strerror or str(error), do) from error
    finally:
        beside.unlink(missing_ok=True)
    return place
