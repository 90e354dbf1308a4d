"""`foedus dashboard`: the page of a coordinator's or a silo's home, until it is stopped."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import err, out
from .errors import RunError

TOKEN_FILE, VARIABLE = "dashboard.token", "FOEDUS_DASHBOARD_TOKEN"
ADDRESS = "127.0.0.1:8800"
HERE = Path()


def dashboard(
    home: Annotated[Path, typer.Option(metavar="DIR", help="A federation's, a silo's, or a folder with runs.")] = HERE,
    address: Annotated[str, typer.Option(metavar="HOST:PORT", help="Port 0 takes any that is free.")] = "",
    token_file: Annotated[Path | None, typer.Option(metavar="FILE", help="What allows a rollback.")] = None,
    new_token: Annotated[bool, typer.Option("--new-token", help="Write a token into the home, and print it.")] = False,
    certificate: Annotated[Path | None, typer.Option(metavar="FILE", help="PEM, to serve over TLS.")] = None,
    key: Annotated[Path | None, typer.Option(metavar="FILE", help="The certificate's key, in PEM.")] = None,
) -> None:
    """Serve the dashboard of this home: rounds, quality, privacy, bytes, alarms, versions. Stop it with Ctrl-C."""
    if new_token:
        out.print(make_token(home), markup=False)
        return
    from .dashboard import serve

    app, asked = app_of(home, token_file), address or _configured(home)
    with serve(app, asked, certificate=certificate, key=key) as served:
        err.print(f"Dashboard: {served.url} (stop it with Ctrl-C)", markup=False)
        try:
            served.wait()
        except KeyboardInterrupt:
            err.print("Stopped.")


def app_of(home: Path, token_file: Path | None = None) -> Any:
    """The app that fits a home. Raises `RunError` for a folder that is none."""
    from .dashboard import coordinator_app, silo_app

    hosts = [_configured(home).rpartition(":")[0]]
    if (home / "silo.toml").is_file():
        return silo_app(home, hosts=hosts)
    if not _has_runs(home):
        do = "Name a federation's home, a silo's, or a folder with runs by --home."
        raise RunError("a home with federation.toml or silo.toml, or runs", "neither", do, where=str(home))
    return coordinator_app(home, token=token_of(home, token_file), rollback=rollback_of(home), hosts=hosts)


def token_of(home: Path, file: Path | None = None) -> str:
    """The token: of the file that is named, else of the environment, else of the home; "" where there is none."""
    if file is None and (said := os.environ.get(VARIABLE)):
        return said.strip()
    place = file or home / TOKEN_FILE
    try:
        return place.read_text().strip()
    except FileNotFoundError:
        if file is None:
            return ""
        do = "Make one with `foedus dashboard --new-token`."
        raise RunError("a file with a token", "no such file", do, where=str(place)) from None


def make_token(home: Path) -> str:
    """A new token, in a file that its owner alone can read; the old one is void once the dashboard starts again."""
    place, token = home / TOKEN_FILE, secrets.token_urlsafe(32)
    place.unlink(missing_ok=True)
    with os.fdopen(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(token + "\n")
    return token


def rollback_of(home: Path) -> Callable[[str], str] | None:
    """What the page's button does; None for a folder that is no federation's home."""
    if not (home / "federation.toml").is_file():
        return None
    from .dashboard.released import roll_back

    return lambda version: roll_back(home, version, _of(home, "federation.toml", "federation", "registry"))


def _configured(home: Path) -> str:
    """The address that the home's own file says."""
    said = _of(home, "federation.toml", "federation", "dashboard") or _of(home, "silo.toml", "silo", "dashboard")
    return said or ADDRESS


def _of(home: Path, name: str, section: str, key: str) -> str:
    """A setting of a home's file, at its top or in its section; "" where there is none."""
    from .dashboard import files

    table = files.table(home / name)
    said = table.get(key) or files.part(table, section).get(key)
    return said if isinstance(said, str) else ""


def _has_runs(home: Path) -> bool:
    if (home / "federation.toml").is_file() or (home / "treaty.toml").is_file():
        return True
    return home.is_dir() and any((entry / "treaty.toml").is_file() for entry in home.iterdir())
