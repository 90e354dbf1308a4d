"""The disk as it is: full, read-only, or pulled out. Whatever it refuses becomes one clear error."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import RunError


@contextmanager
def disk(place: Path) -> Iterator[None]:
    """Turns an `OSError` while writing `place` into a `RunError` that says what to do."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"to write {place}",
            f"{error.strerror or error}",
            "What was there before is untouched. Make room or mend the permissions, and resume the run.",
        ) from error


def write_whole(place: Path, blob: bytes) -> Path:
    """Writes a file whole or not at all, durably. Raises `RunError` when the disk does not take it."""
    with disk(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        beside = place.with_name(f".{place.name}.part")
        try:
            with beside.open("wb") as file:
                file.write(blob)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, place)
        except OSError:
            with suppress(OSError):
                beside.unlink()
            raise
        sync_folder(place.parent)
    return place


def sync_folder(path: Path) -> None:
    """Makes renames inside a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
