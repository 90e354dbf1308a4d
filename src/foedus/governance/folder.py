"""A run's folder: what is in it, and how it survives a crash at any moment.

    treaty.toml        resolved treaty              metrics.jsonl   one JSON object for each round and evaluation
    ledger.jsonl       hash-chained records         checkpoints/    states, and index.json that says which are whole
    adapter/           the result                   summary.json, report.html

Every file but the two `.jsonl` is written beside its place and moved in. A checkpoint counts once `index.json` names it
with the SHA-256 of its content; the one before is kept, so a failure while writing loses nothing that was there. With
a vault, checkpoints are sealed, for they hold what silos of a simulation keep to themselves.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .. import wire
from ..errors import RunError, WireError
from ..types import State, Tree
from .disk import disk, write_whole
from .vault import Vault, keep, kept

KEEP = 2  # checkpoints of a phase: the last, and the one before

Memories = Mapping[str, Tree]


class RunFolder:
    """One run's folder on disk. Use `create` or `open`, and hold `lock()` while the run goes on."""

    def __init__(self, path: Path, vault: Vault | None = None) -> None:
        self.path, self.vault, self._locked = path, vault, False

    @classmethod
    def create(cls, path: Path, treaty: str, origin: Path | None = None, vault: Vault | None = None) -> RunFolder:
        """A new folder with the resolved treaty in it. Raises `RunError` as `check_free` does.

        `origin`: where the treaty lay, since a relative data source starts there. The treaty is written last: a folder
        that has one is a run. `vault`: seals its checkpoints.
        """
        cls.check_free(path)
        folder = cls(path, vault)
        folder.write_json("origin.json", {"folder": os.path.relpath(origin or Path(), path)})
        folder.write("treaty.toml", treaty.encode())
        return folder

    @classmethod
    def check_free(cls, path: Path) -> None:
        """Raises `RunError` unless a new run may be made at `path`."""
        unfinished = {"engine.json", ".engine.json.part", "origin.json", ".origin.json.part", ".treaty.toml.part"}
        if path.exists() and (not path.is_dir() or {x.name for x in path.iterdir()} - unfinished):
            raise RunError(
                f"no folder, or an empty one, at {path}",
                "a run that is already there" if (path / "treaty.toml").exists() else "something else",
                f"Resume it with `foedus resume {path}`, or name another folder with --out.",
            )

    @classmethod
    def open(cls, path: Path, vault: Vault | None = None) -> RunFolder:
        """A folder that `create` made. Raises `RunError` when there is none."""
        if not (path / "treaty.toml").is_file():
            raise RunError(
                f"a run's folder with a treaty.toml at {path}",
                "a folder without one" if path.is_dir() else "nothing there",
                "Name the folder that was given to `foedus run --out`.",
            )
        return cls(path, vault)

    @property
    def origin(self) -> Path:
        """Where the run's treaty lay."""
        return self.path / (self.read_json("origin.json") or {"folder": "."})["folder"]

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other processes from running this folder; released by the system when the process dies. Who has it
        may take it again.
        """
        if self._locked:
            yield
            return
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunError(
                    "nobody else to be running this folder",
                    "another process that holds its lock",
                    "Wait until it ends, or stop it, and resume then.",
                    where=str(self.path),
                ) from None
            self._locked = True
            try:
                yield
            finally:
                self._locked = False

    def write(self, name: str, blob: bytes) -> Path:
        """Writes a file whole or not at all, durably. Raises `RunError` when the disk does not take it."""
        return write_whole(self.path / name, blob)

    def write_json(self, name: str, value: Any) -> Path:
        """Writes a value as indented JSON; NaN and infinity become null."""
        return self.write(name, (json.dumps(_plain(value), indent=2, ensure_ascii=False) + "\n").encode())

    def read_json(self, name: str) -> Any:
        """The value of a JSON file, or None when there is no such file."""
        path = self.path / name
        return json.loads(path.read_text()) if path.exists() else None

    # Checkpoints

    def checkpoint(self, phase: str, state: State, memories: Memories) -> None:
        """Keeps a state, and what silos of a simulation keep to themselves, as the newest of its phase."""
        blob = wire.pack(_flat(state, memories), {"round": state.round, "settings": dict(state.settings)})
        name = f"checkpoints/{phase}-{state.round:05d}.safetensors"
        keep(self.path / name, blob, self.vault)
        index = self._index()
        entries = [entry for entry in index.get(phase, []) if entry["round"] < state.round]
        entry = {"round": state.round, "file": name, "sha256": wire.digest(blob)}
        index[phase] = [*entries, entry][-KEEP:]
        self.write_json("checkpoints/index.json", index)
        for old in entries[: max(0, len(entries) + 1 - KEEP)]:
            (self.path / old["file"]).unlink(missing_ok=True)

    def restore(self, phase: str, round: int | None = None) -> tuple[State, dict[str, Tree]] | None:
        """The newest checkpoint of a phase (or that of `round`); None when the phase has none.

        Raises `RunError` when it is damaged, and says which earlier one is whole.
        """
        entries = self._index().get(phase, [])
        if not entries:
            return None
        chosen = next((e for e in entries if e["round"] == round), None) if round is not None else entries[-1]
        if chosen is None:
            known = ", ".join(str(e["round"]) for e in entries)
            raise RunError(f"a checkpoint of round {known}", f"round {round}", "Choose one of those with --round.")
        try:
            blob = kept(self.path / chosen["file"], self.vault)
            if wire.digest(blob) != chosen["sha256"]:
                raise WireError(f"content {chosen['sha256'][:12]}", wire.digest(blob)[:12], "")
            return _nested(blob)
        except (OSError, WireError) as error:
            raise self._damaged(chosen, entries) from error

    def _damaged(self, chosen: dict, entries: list[dict]) -> RunError:
        file = self.path / chosen["file"]
        came = f"{file.stat().st_size} bytes that differ" if file.exists() else "no such file"
        whole = [e["round"] for e in entries if e is not chosen and self._is_whole(e)]
        do = (
            f"The checkpoint of round {whole[-1]} is whole: resume with `--round {whole[-1]}`."
            if whole
            else "No earlier checkpoint of this phase is whole: start a new run."
        )
        expected = f"the checkpoint of round {chosen['round']} as it was written ({chosen['sha256'][:12]}…)"
        return RunError(expected, came, do, where=str(file))

    def _is_whole(self, entry: dict) -> bool:
        try:
            return wire.digest(kept(self.path / entry["file"], self.vault)) == entry["sha256"]
        except (OSError, WireError):
            return False

    def _index(self) -> dict[str, list[dict]]:
        try:
            return self.read_json("checkpoints/index.json") or {}
        except ValueError as error:
            raise RunError(
                "checkpoints/index.json as it was written", f"something else ({error})",
                "Restore the file, or start a new run.", where=str(self.path),
            ) from error  # fmt: skip

    # Metrics

    def metric(self, row: Mapping[str, Any]) -> None:
        """Adds a line to metrics.jsonl."""
        with disk(self.path / "metrics.jsonl"), (self.path / "metrics.jsonl").open("ab") as file:
            file.write(wire.canonical(_plain(row)) + b"\n")

    def metrics(self) -> list[dict]:
        """The lines of metrics.jsonl; a last line torn by a crash is left out."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        lines = path.read_bytes().split(b"\n")
        return [json.loads(line) for line in lines[:-1]]

    def keep_metrics(self, rows: list[dict]) -> None:
        """Replaces metrics.jsonl by these lines: what a resumed run does to rounds it will redo."""
        self.write("metrics.jsonl", b"".join(wire.canonical(row) + b"\n" for row in rows))


def _flat(state: State, memories: Memories) -> dict[tuple[str, ...], np.ndarray]:
    out: dict[tuple[str, ...], np.ndarray] = {("params", name): x for name, x in state.params.items()}
    for kind in ("optimizer", "mechanism", "extra"):
        out |= {(kind, *key): x for key, x in getattr(state, kind).items()}
    return out | {("memory", silo, *key): x for silo, tree in memories.items() for key, x in tree.items()}


def _nested(blob: bytes) -> tuple[State, dict[str, Tree]]:
    flat, facts = wire.unpack(blob)
    kinds: dict[str, dict] = {kind: {} for kind in ("params", "optimizer", "mechanism", "extra")}
    memories: dict[str, dict] = {}
    for key, x in flat.items():
        if key[0] == "memory":
            memories.setdefault(key[1], {})[key[2:]] = x
        else:
            kinds[key[0]][key[1] if key[0] == "params" else key[1:]] = x
    return State(round=facts["round"], settings=facts["settings"], **kinds), memories


def _plain(value: Any) -> Any:
    """JSON without NaN: they become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value
