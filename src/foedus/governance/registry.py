"""The registry: every released adapter by the digest of its content, where it came from, and which one is in use.

    register(run) ──▶ candidate ──promote, behind checks──▶ production ──a newer one, or rollback──▶ retired
                                                                ▲────────────── rollback ──────────────┘

What is registered is copied into `store`, by digest, with the ledger that bears it out: the registry needs no run
folder afterwards. The database says which version is in use; the link `store/serving/MODEL` follows it, and is mended
by whoever opens the registry next if a crash came between. At most one version of a model is in production: the
database itself sees to that. SQLite by default, PostgreSQL by URL; all that is written is written under the lock of
its model, in one transaction. What is checked is in `releases.py`, the files are in `shelf.py`.

What silos spent is spent: `spent` adds up all versions that were ever released, whatever became of them.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy.engine import Connection, Engine

from ..errors import RunError, one_of
from .disk import disk
from .ledger import Ledger
from .releases import (
    Check,
    Move,
    Rules,
    Stage,
    Version,
    check_content,
    check_ledger,
    check_quality,
    check_spending,
    now,
    read_run,
    spent_by_unit,
)
from .shelf import ADAPTER, LEDGER, SERVING, copy, held, point, take_in

FORMAT = 1
PATIENCE = 60.0  # seconds that a writer waits for its turn
_COLUMNS = ("model", "version", "stage", "digest")
_METADATA = sql.MetaData()
_FORMAT = sql.Table("registry", _METADATA, sql.Column("format", sql.Integer, primary_key=True))
_VERSIONS = sql.Table(
    "versions", _METADATA,
    sql.Column("model", sql.String(100), primary_key=True),
    sql.Column("version", sql.Integer, primary_key=True, autoincrement=False),
    sql.Column("stage", sql.String(16), nullable=False),
    sql.Column("digest", sql.String(64), nullable=False),
    sql.Column("facts", sql.JSON, nullable=False),
    sql.UniqueConstraint("model", "digest"),
    sql.CheckConstraint("stage IN ('candidate', 'production', 'retired')", name="a_known_stage"),
)  # fmt: skip
_PRODUCTION = sql.Index(
    "one_in_production", _VERSIONS.c.model, unique=True,
    sqlite_where=_VERSIONS.c.stage == "production", postgresql_where=_VERSIONS.c.stage == "production",
)  # fmt: skip
_MOVES = sql.Table(
    "moves", _METADATA,
    sql.Column("number", sql.Integer, primary_key=True),
    sql.Column("model", sql.String(100), nullable=False),
    sql.Column("version", sql.Integer, nullable=False),
    sql.Column("kind", sql.String(16), nullable=False),
    sql.Column("accepted", sql.Boolean, nullable=False),
    sql.Column("before", sql.String(16), nullable=False),
    sql.Column("after", sql.String(16), nullable=False),
    sql.Column("replaced", sql.Integer),
    sql.Column("by", sql.Text, nullable=False),
    sql.Column("why", sql.Text, nullable=False),
    sql.Column("at", sql.String(32), nullable=False),
    sql.Column("checks", sql.JSON, nullable=False),
    sql.ForeignKeyConstraint(["model", "version"], ["versions.model", "versions.version"]),
)  # fmt: skip


class Registry:
    """The registry at a database `url` ("sqlite:///…", "postgresql://…"), whose files lie in `store`. `ledger`: where
    moves are recorded, if anywhere: of which digest, never by whom.
    """

    def __init__(self, url: str, store: Path, ledger: Ledger | None = None) -> None:
        self.store, self.ledger = store, ledger
        self._engine, self._shown = _engine(url)
        try:
            with self._writing() as connection:
                _prepare(connection)
            self.mend()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._engine.dispose()

    # Reading

    def versions(self, model: str | None = None) -> list[Version]:
        """All versions, or those of a model, oldest first."""
        with self._reading() as connection:
            return _versions(connection, model)

    def version(self, name: str) -> Version:
        """The version called MODEL@VERSION. Raises `RunError` when there is none."""
        with self._reading() as connection:
            return _named(connection, name)

    def production(self, model: str) -> Version | None:
        """The version of a model that is in use."""
        return _in_use(self.versions(model))

    def moves(self, model: str | None = None) -> list[Move]:
        """What was done and what was refused, oldest first."""
        query = sql.select(_MOVES).order_by(_MOVES.c.number)
        with self._reading() as connection:
            rows = connection.execute(query if model is None else query.where(_MOVES.c.model == model)).mappings()
            return [_move(row) for row in rows]

    def spent(self, model: str, delta: float) -> dict[str, float]:
        """ε that all versions of a model cost together at `delta`, by unit; infinite where one had no guarantee."""
        return spent_by_unit(self.versions(model), delta)

    def folder(self, version: Version) -> Path:
        """Where a version's adapter lies."""
        return self.store / version.place / ADAPTER

    def serving(self, model: str) -> Path:
        """The link to the adapter in production: what a server of the model loads."""
        return self.store / SERVING / model

    # Changing

    def register(self, run: Path, model: str = "", by: str = "") -> Version:
        """Takes in a finished run as a candidate; the same adapter again is the version that it already is.

        `model`: its name here, if not the treaty's. Raises `RunError` for a run that has not ended, whose ledger does
        not bear out its adapter, or whose summary states less ε than its ledger.
        """
        found = read_run(run, model)
        take_in(run, self.store, found.place)
        with self._locked(found.model) as connection:
            known = _versions(connection, found.model)
            for version in known:
                if version.digest == found.digest:
                    return version
            parent = _in_use(known)
            number = 1 + max((version.version for version in known), default=0)
            found = replace(found, version=number, parent=parent and parent.version)
            facts = {name: value for name, value in asdict(found).items() if name not in _COLUMNS}
            row = {"model": found.model, "version": found.version, "stage": str(found.stage), "digest": found.digest}
            connection.execute(sql.insert(_VERSIONS).values(**row, facts=facts))
            _record(connection, found, "register", Stage.candidate, by, f"run {found.run}")
        self.mend()
        return found

    def promote(self, name: str, by: str = "", why: str = "", rules: Rules | None = None) -> Move:
        """Puts a candidate into production, if all checks pass; what was there is retired. Checks are kept either way,
        and `Move.accepted` says how it ended.
        """
        rules = rules or Rules()
        version = self.version(name)
        sound = self._sound(version, rules.key)
        with self._locked(version.model) as connection:
            version = _named(connection, name)
            if version.stage is not Stage.candidate:
                do = "What was in production before comes back by `foedus rollback`."
                raise RunError(f"{name} to be a candidate", f"one that is {version.stage}", do)
            known = _versions(connection, version.model)
            checks = (*sound, check_spending(known, rules), *check_quality(version, _in_use(known), rules.worse))
            move = self._into_production(connection, version, "promote", checks, by, why)
        self.mend()
        return move

    def rollback(self, name: str, by: str = "", why: str = "") -> Move:
        """Puts a version into production again that has been there before; what is there now is retired.

        Its bytes and its ledger are checked, its quality is not: it was good enough once. No ε comes back by it.
        """
        version = self.version(name)
        sound = self._sound(version, "")
        with self._locked(version.model) as connection:
            version = _named(connection, name)
            before = [row.version for row in connection.execute(_once_in_production(version.model))]
            if version.version not in before or version.stage is Stage.production:
                others = sorted({f"{version.model}@{number}" for number in before} - {name})
                came = "it is there now" if version.stage is Stage.production else "it never was"
                do = f"Known from before: {', '.join(others) or 'none'}; a candidate is promoted."
                raise RunError(f"{name} to have been in production before", came, do)
            move = self._into_production(connection, version, "rollback", sound, by, why)
        self.mend()
        return move

    def retire(self, name: str, by: str = "", why: str = "") -> Move:
        """Takes a version out of use. If it was in production, nothing is until another is put there."""
        with self._locked(_split(name)[0]) as connection:
            version = _named(connection, name)
            if version.stage is Stage.retired:
                raise RunError(f"{name} to be in use, or a candidate", "one that is retired", "There is nothing to do.")
            _stage(connection, version, Stage.retired)
            move = _record(connection, version, "retire", Stage.retired, by, why)
        self.mend()
        return move

    def export(self, name: str, out: Path) -> Path:
        """Copies a version's adapter, or that in production where `name` has no @VERSION, into a new folder `out`."""
        version = self.version(name) if "@" in name else self.production(name)
        if version is None:
            do = "Promote a version, or name one: MODEL@VERSION."
            raise RunError(f"a version of {name!r} in production", "none", do)
        if out.exists():
            raise RunError(f"no file or folder at {out}", "one", "Name another.")
        copy(self.folder(version), out)
        if (check := check_content(version, out)).passed is not True:
            shutil.rmtree(out)
            raise RunError(check.expected, check.came, "Bring the registry's files back from a copy, or register anew.")
        return out

    def mend(self) -> None:
        """Brings what follows the database up to it, which a crash may have left behind: links, and the ledger."""
        known, moves = self.versions(), self.moves()
        with held(self.store):
            for model in {version.model for version in known}:
                in_use = self.production(model)  # as it is under the lock, whoever came first
                point(self.serving(model), None if in_use is None else self.folder(in_use))
        if self.ledger is not None:
            noted = {record["body"]["move"] for record in self.ledger.records if record["kind"] == "registry"}
            digests = {version.name: version.digest for version in known}
            for move in moves:
                if move.number not in noted:
                    body = {name: getattr(move, name) for name in ("model", "version", "kind", "accepted", "replaced")}
                    body |= {"move": move.number, "digest": digests[f"{move.model}@{move.version}"]}
                    self.ledger.once("registry", body, same=("move",))

    def _sound(self, version: Version, key: str) -> tuple[Check, ...]:
        """Whether bytes and ledger are what was registered."""
        ledger = self.store / version.place / LEDGER
        return check_content(version, self.folder(version)), check_ledger(version, ledger, key)

    def _into_production(
        self, connection: Connection, version: Version, kind: str, checks: Sequence[Check], by: str, why: str
    ) -> Move:
        if any(check.passed is False for check in checks):
            return _record(connection, version, kind, version.stage, by, why, checks, accepted=False)
        replaced = _in_use(_versions(connection, version.model))
        if replaced is not None:
            _stage(connection, replaced, Stage.retired)
        _stage(connection, version, Stage.production)
        return _record(connection, version, kind, Stage.production, by, why, checks, replaced=replaced)

    # The database

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with _reached(self._shown), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        """One transaction, which is done whole or not at all."""
        with _reached(self._shown), self._engine.connect().execution_options(writes=True) as connection:
            with connection.begin():
                yield connection

    @contextmanager
    def _locked(self, model: str) -> Iterator[Connection]:
        """A transaction during which nobody else changes anything of this model."""
        with self._writing() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(sql.select(sql.func.pg_advisory_xact_lock(_number_of(model))))
            yield connection


# The database


def _engine(url: str) -> tuple[Engine, str]:
    """An engine, and how to call it: without the password."""
    try:
        parsed = sql.make_url(url)
    except sql.exc.ArgumentError as error:
        do = "For example sqlite:///registry.db, or postgresql://user@host/foedus with PGPASSWORD in the environment."
        raise RunError("a database's URL", "something else", do) from error
    shown = parsed.render_as_string(hide_password=True)
    kind = parsed.get_backend_name()
    if kind in ("postgresql", "postgres"):
        try:
            url = parsed.set(drivername="postgresql+psycopg")
            return sql.create_engine(url, pool_pre_ping=True, connect_args={"client_encoding": "utf8"}), shown
        except ImportError as error:
            raise RunError("the library psycopg", "none", "pip install 'foedus[postgresql]'") from error
    if kind != "sqlite":
        raise RunError("a database that is sqlite or postgresql", kind, one_of(kind, ("sqlite", "postgresql")))
    if parsed.database:
        with disk(Path(parsed.database)):
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = sql.create_engine(parsed, connect_args={"timeout": PATIENCE})
    sql.event.listen(engine, "connect", _settle)
    sql.event.listen(engine, "begin", _begin)
    return engine, shown


def _settle(connection: Any, _: Any) -> None:
    """SQLite as a database among processes: readers beside a writer, and what is committed survives a power cut."""
    connection.isolation_level = None  # transactions begin where `_begin` says, not where the driver guesses
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    """Who will write waits at once for its turn, for a reader that turns writer could not."""
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("writes") else "BEGIN")


@contextmanager
def _reached(shown: str) -> Iterator[None]:
    try:
        yield
    except sql.exc.OperationalError as error:
        came = str(error.orig).strip().splitlines()[0]
        do = "Start the database or mend its URL; whatever was not committed did not happen."
        raise RunError(f"a database that answers at {shown}", came, do) from error


def _prepare(connection: Connection) -> None:
    """Makes the tables of a new registry."""
    if connection.dialect.name == "postgresql":
        connection.execute(sql.select(sql.func.pg_advisory_xact_lock(_number_of(""))))
    _METADATA.create_all(connection)
    known = connection.execute(sql.select(_FORMAT.c.format)).scalars().all()
    if not known:
        connection.execute(sql.insert(_FORMAT).values(format=FORMAT))
    elif known != [FORMAT]:
        do = "Open it with the version of foedus that made it."
        raise RunError(f"a registry of format {FORMAT}", f"one of format {known[0]}", do)


def _number_of(model: str) -> int:
    """PostgreSQL's locks have numbers of 64 bits."""
    return int.from_bytes(hashlib.sha256(f"foedus {model}".encode()).digest()[:8], "big", signed=True)


def _versions(connection: Connection, model: str | None) -> list[Version]:
    query = sql.select(_VERSIONS).order_by(_VERSIONS.c.model, _VERSIONS.c.version)
    rows = connection.execute(query if model is None else query.where(_VERSIONS.c.model == model)).mappings()
    return [_version(row) for row in rows]


def _version(row: Mapping[str, Any]) -> Version:
    columns = {name: row[name] for name in _COLUMNS}
    return Version(**{**row["facts"], **columns, "stage": Stage(row["stage"])})


def _in_use(known: Sequence[Version]) -> Version | None:
    return next((version for version in known if version.stage is Stage.production), None)


def _split(name: str) -> tuple[str, int]:
    model, _, number = name.rpartition("@")
    if not model or not number.isdecimal():
        raise RunError("a version as MODEL@VERSION, such as notes@3", repr(name), "`foedus registry list` shows them.")
    return model, int(number)


def _named(connection: Connection, name: str) -> Version:
    model, number = _split(name)
    known = {version.version: version for version in _versions(connection, model)}
    if number not in known:
        names = connection.execute(sql.select(_VERSIONS.c.model, _VERSIONS.c.version)).all()
        raise RunError("a version of the registry", repr(name), one_of(name, (f"{m}@{v}" for m, v in names)))
    return known[number]


def _stage(connection: Connection, version: Version, stage: Stage) -> None:
    one = (_VERSIONS.c.model == version.model) & (_VERSIONS.c.version == version.version)
    connection.execute(sql.update(_VERSIONS).where(one).values(stage=str(stage)))


def _once_in_production(model: str) -> sql.Select:
    there = (_MOVES.c.after == Stage.production) & _MOVES.c.accepted & (_MOVES.c.model == model)
    return sql.select(_MOVES.c.version).where(there)


def _record(
    connection: Connection, version: Version, kind: str, after: Stage, by: str, why: str, checks: Sequence[Check] = (),
    *, accepted: bool = True, replaced: Version | None = None,
) -> Move:  # fmt: skip
    values = {
        "model": version.model, "version": version.version, "kind": kind, "accepted": accepted,
        "before": str(version.stage), "after": str(after), "replaced": replaced and replaced.version, "by": by,
        "why": why, "at": now(), "checks": [asdict(check) for check in checks],
    }  # fmt: skip
    number = connection.execute(sql.insert(_MOVES).values(**values)).inserted_primary_key[0]
    return _move({**values, "number": number})


def _move(row: Mapping[str, Any]) -> Move:
    return Move(**{**row, "checks": tuple(Check(**check) for check in row["checks"])})
