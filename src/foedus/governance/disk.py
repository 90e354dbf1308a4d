"""The disk as it is: full, read-only, or pulled out. Whatever it refuses becomes one clear error."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
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


def write_whole(place: Path, blob: bytes | Iterable[bytes], *, private: bool = False) -> Path:
    """Writes a file whole or not at all, durably, in one part or several as they come. `private`: for its owner only.

    Raises `RunError` when the disk does not take it.
    """
    with disk(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        beside = place.with_name(f".{place.name}.part")
        try:
            handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if private else 0o666)
            with open(handle, "wb") as file:
                if private:  # also where a crash left the draft to everybody
                    os.fchmod(handle, 0o600)
                file.writelines([blob] if isinstance(blob, bytes) else blob)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, place)
        except BaseException:
            with suppress(OSError):
                beside.unlink()
            raise
        sync_folder(place.parent)
    return place


def sync_folder(path: Path) -> None:
    """Makes renames inside a folder durable, or what is in a file."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
