"""Released versions, as the registry has them. Nothing is opened where there is no registry yet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import FoedusError, RunError
from . import files

DATABASE, STORE = "registry.db", "store"


@dataclass(frozen=True)
class Version:
    """One released adapter. `stage`: candidate, production or retired. `epsilon`: at its release, None where nobody
    is protected. `returns`: whether one can roll back to it.
    """

    model: str
    number: int
    stage: str
    digest: str
    treaty: str = ""
    rounds: int | None = None
    epsilon: float | None = None
    perplexity: float | None = None
    returns: bool = False

    @property
    def name(self) -> str:
        """As commands take it: "notes@3"."""
        return f"{self.model}@{self.number}"


def versions(home: Path, url: str = "") -> tuple[Version, ...]:
    """All of a home's registry, the newest first; () where there is none, or none that can be read now."""
    if url:
        return _versions(home, url)
    database = home / DATABASE
    changed = files.stamp([database, database.with_name(f"{DATABASE}-wal")])
    return _remembered(home, changed) if database.is_file() else ()


def roll_back(home: Path, version: str, url: str = "") -> str:
    """Puts a version into production again, and says so. Raises `FoedusError` where that cannot be."""
    from ..deploy.home import FederationHome

    with opened(home, url, FederationHome.at(home).open_ledger()) as registry:
        move = registry.rollback(version, by="dashboard", why="asked for on the dashboard")
    failed = [check for check in move.checks if check.passed is False]
    if not move.accepted:
        expected, came = "; ".join(c.expected for c in failed), "; ".join(c.came for c in failed)
        raise RunError(expected, came, "Production is as it was; choose another version.")
    return f"{version} is in production."


@contextmanager
def opened(home: Path, url: str = "", ledger: Any = None) -> Iterator[Any]:
    """A home's registry, closed afterwards."""
    from ..governance.registry import Registry  # brings SQLAlchemy

    with closing(Registry(url or f"sqlite:///{(home / DATABASE).resolve()}", home / STORE, ledger)) as registry:
        yield registry


@lru_cache(maxsize=8)
def _remembered(home: Path, stamp: str) -> tuple[Version, ...]:
    return _versions(home, "")


def _versions(home: Path, url: str) -> tuple[Version, ...]:
    try:
        with opened(home, url) as registry:
            before = {(move.model, move.version) for move in registry.moves() if move.after == "production"}
            found = [_version(row, before) for row in registry.versions()]
    except (FoedusError, ImportError):
        return ()
    return tuple(sorted(found, key=lambda v: (v.model, -v.number)))


def _version(row: Any, before: set[tuple[str, int]]) -> Version:
    measured = files.part(dict(row.evaluation), "perplexity").get("micro")
    stage = str(row.stage)
    return Version(
        model=row.model, number=row.version, stage=stage, digest=row.digest, treaty=row.treaty, rounds=row.rounds,
        epsilon=row.epsilon, perplexity=measured if isinstance(measured, int | float) else None,
        returns=stage != "production" and (row.model, row.version) in before,
    )  # fmt: skip
