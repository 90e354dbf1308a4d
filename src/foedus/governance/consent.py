"""What a silo's operator decided beside the charter: paused, left, and treaties whose consent was withdrawn.

`state.json` is written by commands and read by the resident process at every message, so that a decision holds from the
next one on. A file that cannot be read counts as paused: when in doubt, nothing leaves.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..errors import RunError
from .disk import write_whole
from .envelope import Reason, Refused


@dataclass(frozen=True)
class Consent:
    """`withdrawn`: digests of signed treaties. `doubt`: why the file counts as paused, "" when it was read."""

    paused: bool = False
    left: bool = False
    withdrawn: tuple[str, ...] = ()
    doubt: str = ""

    def check(self, treaty: str) -> None:
        """Raises `Refused` where the silo does not take part in this treaty now."""
        if self.left:
            raise Refused(Reason.LEFT, "a silo that takes part", "one that left the federation")
        if treaty in self.withdrawn:
            raise Refused(Reason.WITHDRAWN, "consent to this treaty", "consent that was withdrawn")
        if self.paused or self.doubt:
            raise Refused(Reason.PAUSED, "a silo that is at work", self.doubt or "one that its operator paused")

    def without(self, treaty: str) -> Consent:
        """With consent to this treaty withdrawn, for good."""
        return replace(self, withdrawn=tuple(sorted({*self.withdrawn, treaty})))


def read(path: Path) -> Consent:
    """The decisions in a file; consent without reserve where there is no file."""
    try:
        found = json.loads(path.read_bytes())
        paused, left, withdrawn = found["paused"], found["left"], found["withdrawn"]
        if type(paused) is bool and type(left) is bool and all(type(x) is str for x in withdrawn):
            return Consent(paused, left, tuple(withdrawn))
    except FileNotFoundError:
        return Consent()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return Consent(paused=True, doubt=f"{path.name} that cannot be read")


def write(path: Path, consent: Consent) -> None:
    """Writes the decisions, durably. Raises `RunError` where they were made upon a file that could not be read: what it
    said of consent that was withdrawn would be lost.
    """
    if consent.doubt:
        do = "Restore it, or remove it and leave once more whatever was left. Until then nothing leaves this silo."
        raise RunError("decisions as they were written", consent.doubt, do, where=str(path))
    kept = {key: value for key, value in asdict(consent).items() if key != "doubt"}
    write_whole(path, (json.dumps(kept, indent=2) + "\n").encode())
