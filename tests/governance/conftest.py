"""Finished runs without training, and databases to register them in: SQLite always, PostgreSQL where one can start."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from foedus.governance import Ledger
from foedus.governance.registry import Registry
from foedus.privacy import accountant, events

DELTA = 1e-5


def make_run(
    folder: Path, weights: float = 0.0, *, noise: float | None = 4.0, rounds: int = 2, silos=None, domains=None,
    name: str = "notes", keeper=None, stated: float | None = None, begun: float | None = None,
) -> Path:  # fmt: skip
    """A run's folder as a finished run leaves it, but for what no registry reads. `noise`: None for no guarantee;
    `begun`: runs that share it are one, at different rounds.
    """
    import hashlib

    adapter = folder / "adapter"
    adapter.mkdir(parents=True)
    save_file({"w": np.full(4, weights, np.float32)}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text('{"lora_alpha": 8.0}')
    sha = hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
    event = events.none() if noise is None else events.gaussian(noise)
    ledger = Ledger(folder / "ledger.jsonl", keeper, "federation")
    ledger.append("opened", {"treaty": "ab" * 32, "model": "cd" * 32, "silos": ["a", "b"]})
    for r in range(1, rounds + 1):
        body = {
            "task": f"{r:064x}",
            "release": f"{r}{weights if begun is None else begun}",
            "params": f"{r:064x}",
            "reports": {},
            "failures": {},
        }
        ledger.append("round", {"round": r, "event": event, **body})
    ledger.append("closed", {"adapter": sha, "rounds": rounds})
    epsilon = None if noise is None else accountant.upper(events.repeat(event, rounds), DELTA)
    privacy = {
        "unit": "none" if noise is None else "example", "epsilon": epsilon if stated is None else stated,
        "delta": None if noise is None else DELTA, "statement": "What it promises.",
    }  # fmt: skip
    quality = {"by_silo": silos or {"a": 1.0, "b": 1.2}, "by_domain": domains or {"law": 1.1}}
    summary = {
        "name": name, "treaty": {"digest": "ab" * 32}, "rounds": rounds, "privacy": privacy,
        "adapter": {"sha256": sha}, "model": {"name": "tiny:llama", "digest": "cd" * 32},
        "evaluation": {"federated": {"bits_per_byte": quality}},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The URL of a PostgreSQL server of our own on a socket; skips where there is no server to start."""
    pytest.importorskip("psycopg")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = shutil.which("initdb") or (str(found[-1]) if found else None)
    if initdb is None:
        pytest.skip("no PostgreSQL server is installed here (initdb)")
    home = Path(tempfile.mkdtemp(prefix="foedus-pg-"))
    account = {}
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        shutil.chown(home, "nobody")
        account = {"user": "nobody"}
    control = [str(Path(initdb).resolve().with_name("pg_ctl")), "-D", str(home / "data"), "-w", "-s"]
    form = ["-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync"]
    options = f"-k {home} -c listen_addresses='' -c fsync=off -c shared_buffers=16MB -c max_connections=40"
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "cwd": "/", **account}
    try:
        subprocess.run([initdb, "-D", home / "data", *form], **quiet)
        subprocess.run([*control, "-o", options, "-l", home / "log", "start"], **quiet)
        try:
            yield f"postgresql://postgres@/postgres?host={home}"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], **quiet)
    finally:
        shutil.rmtree(home, ignore_errors=True)


_schemas = itertools.count()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/registry.db"
    import psycopg

    url, schema = request.getfixturevalue("postgresql"), f"s{next(_schemas)}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {schema}")
    return f"{url}&options=-csearch_path%3D{schema}"


@pytest.fixture
def registry(database: str, tmp_path: Path) -> Iterator[Registry]:
    opened = Registry(database, tmp_path / "store")
    yield opened
    opened.close()
