"""The disk as it is: full, read-only, or pulled out. Whatever it refuses becomes one clear error."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
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


def sync_folder(path: Path) -> None:
    """Makes renames inside a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
