"""What the resident processes of both parties share: they are told to stop, they say how they are, they show a page."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from ..errors import RunError
from ..governance.disk import write_whole

Told = Callable[[str], None]
"""Gets a line for what an operator may want to see."""
Page = Callable[[Path], Any]
"""Makes the dashboard of a home."""


def stopping() -> threading.Event:
    """Set when this process is told to stop; told a second time, it ends at once."""
    stop = threading.Event()

    def tell(number: int, _: FrameType | None) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, tell)
    return stop


@contextmanager
def resident(folder: Path, file: Path, facts: dict[str, Any]) -> Iterator[Callable[..., None]]:
    """Keeps `status.json` of a home while this process is its resident one; yields what changes facts in it.

    Raises `RunError` where another process is.
    """
    lock = threading.Lock()
    with (folder / ".up").open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            do = "Stop it first, or look at its dashboard."
            raise RunError("a home that no process serves", "one that is up already", do, where=str(folder)) from None
        known = {**facts, "pid": os.getpid(), "since": datetime.now(UTC).isoformat(timespec="seconds")}

        def say(**more: Any) -> None:
            with lock:
                if {**known, **more} != known or not file.exists():
                    known.update(more)
                    write_whole(file, (json.dumps(known, indent=2) + "\n").encode())

        say()
        try:
            yield say
        finally:
            file.unlink(missing_ok=True)


@contextmanager
def shown(app: Any, address: str, status: Callable[..., None]) -> Iterator[str]:
    """Serves a dashboard at an address; yields its URL."""
    from ..dashboard import serve

    with serve(app, address) as served:
        status(dashboard={"address": address})
        yield served.url
