"""The shelf: where a registry keeps its files. Each folder is named by its content and never changes.

PLACE/adapter/ ledger.jsonl summary.json        serving/MODEL ──▶ ../PLACE/adapter
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .disk import disk, sync_folder

LEDGER, ADAPTER, SUMMARY, SERVING = "ledger.jsonl", "adapter", "summary.json", "serving"


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _sha256(path) for path in paths}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def take_in(run: Path, store: Path, place: str) -> None:
    """Copies a run's adapter, ledger and summary into the store, unless they are there already."""
    with held(store), disk(store / place):
        if (store / place).exists():
            return
        beside = store / f".{place}.part"
        shutil.rmtree(beside, ignore_errors=True)  # of somebody who was cut off
        beside.mkdir()
        copy(run / ADAPTER, beside / ADAPTER)
        for name in (LEDGER, SUMMARY):
            shutil.copyfile(run / name, beside / name)
        for path in beside.rglob("*"):
            sync_folder(path)
        beside.rename(store / place)
        sync_folder(store)


def copy(source: Path, target: Path) -> None:
    """A folder's files into a new folder."""
    with disk(target):
        shutil.copytree(source, target, copy_function=shutil.copyfile)


def point(link: Path, target: Path | None) -> None:
    """Makes `link` lead to `target` and nowhere else, at one stroke."""
    with disk(link):
        if target is None:
            link.unlink(missing_ok=True)
            return
        leads = os.path.relpath(target, link.parent)
        if link.is_symlink() and os.readlink(link) == leads:
            return
        link.parent.mkdir(parents=True, exist_ok=True)
        beside = link.with_name(f".{link.name}.part")
        beside.unlink(missing_ok=True)
        beside.symlink_to(leads)
        os.replace(beside, link)
        sync_folder(link.parent)


@contextmanager
def held(store: Path) -> Iterator[None]:
    """Keeps other processes from changing what is in the store."""
    with disk(store):
        store.mkdir(parents=True, exist_ok=True)
        file = (store / ".lock").open("w")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
