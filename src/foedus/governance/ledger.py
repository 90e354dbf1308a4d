"""The ledger: an append-only file of JSON records, each holding the hash of the one before.

A record is `{"index", "previous", "kind", "body", "hash"}`; its hash is SHA-256 over the canonical JSON of the rest. It
holds digests, counts and names of silos, never data, and no clock: redoing a round on the same machine gives the same
record, which is how a resumed run knows that it did.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import RunError
from ..wire import canonical, digest
from .disk import disk

ORIGIN = "0" * 64

Record = dict[str, Any]


class Ledger:
    """One ledger file. Opening it verifies the chain; a last line torn by a crash is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[Record] = []
        if path.exists():
            self._drop_torn_line()
            self.records = verify(path)

    def append(self, kind: str, body: Mapping[str, Any]) -> Record:
        """Adds a record, durably; returns it."""
        record: Record = {
            "index": len(self.records),
            "previous": self.records[-1]["hash"] if self.records else ORIGIN,
            "kind": kind,
            "body": dict(body),
        }
        record["hash"] = _hash(record)
        with disk(self.path), self.path.open("ab") as file:
            file.write(canonical(record) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.records.append(record)
        return record

    def once(self, kind: str, body: Mapping[str, Any], *, same: tuple[str, ...], free: tuple[str, ...] = ()) -> Record:
        """Adds a record unless the ledger has one of this kind that agrees on the fields `same`.

        A round that was redone after a crash must come out as it did before, but for the fields `free`; if it did not,
        the ledger keeps both, and the new one says `"redone": true`.
        """

        def agrees(record: Record) -> bool:
            return record["kind"] == kind and all(record["body"].get(f) == body.get(f) for f in same)

        known = next((record for record in reversed(self.records) if agrees(record)), None)
        if known is None:
            return self.append(kind, body)
        outcomes = [{**old_or_new, "redone": True, **dict.fromkeys(free)} for old_or_new in (known["body"], body)]
        if outcomes[0] == outcomes[1]:
            return known
        return self.append(kind, {**body, "redone": True})

    def _drop_torn_line(self) -> None:
        blob = self.path.read_bytes()
        whole = blob[: blob.rfind(b"\n") + 1]
        if whole != blob:
            with self.path.open("r+b") as file:
                file.truncate(len(whole))


def verify(path: Path) -> list[Record]:
    """The records, after checking every hash and link. Raises `RunError` naming the first line that does not fit."""
    records: list[Record] = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        why = misfit(record, records) if isinstance(record, dict) else "it is not a JSON object"
        if why:
            do = "Somebody or something changed the ledger: keep the folder as it is and find out who."
            raise RunError("a record that fits the chain", why, do, where=f"{path.name}, line {number}")
        records.append(record)
    return records


def misfit(record: Mapping[str, Any], before: Sequence[Mapping[str, Any]]) -> str:
    """Why a record does not continue the chain of those `before` it; "" when it does.

    Record i has index i and names the hash of record i − 1 as `previous`, the first one 64 zeros; its hash is that of
    the rest of it.
    """
    if record.get("index") != len(before):
        return f"its index is {record.get('index')!r}"
    if record.get("previous") != (before[-1]["hash"] if before else ORIGIN):
        return "it does not name the hash of the record before it"
    if record.get("hash") != _hash(record):
        return "its hash is not that of its content"
    return ""


def _hash(record: Mapping[str, Any]) -> str:
    try:
        return digest(canonical({key: value for key, value in record.items() if key != "hash"}))
    except ValueError:  # NaN, which no ledger of ours can hold
        return ""
