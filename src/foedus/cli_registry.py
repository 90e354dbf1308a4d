"""`foedus registry …` and `foedus rollback`: what was released, what is in use, and how it comes into use and out."""

from __future__ import annotations

import getpass
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from .console import AsJson, RunPath, out, print_json

if TYPE_CHECKING:
    from .governance.registry import Registry
    from .governance.releases import Move, Version

app = typer.Typer(no_args_is_help=True, help="Released adapters: register, look up, promote, retire, export.")

Home = Annotated[Path, typer.Option(metavar="DIR", help="The federation's home.")]
Name = Annotated[str, typer.Argument(metavar="MODEL@VERSION")]
By = Annotated[str, typer.Option(metavar="WHO", help="Who does it; by default, the account.")]
Why = Annotated[str, typer.Option(metavar="WHY", help="Why, for those who come later.")]
HERE = Path()
OWN = "the home's"


@app.command("list")
def list_(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]")] = None, home: Home = HERE, as_json: AsJson = False
) -> None:
    """List versions: their stage, their cost, their quality."""
    with _registry(home) as registry:
        versions = registry.versions(model)
    if as_json:
        print_json([asdict(version) for version in versions])
        return
    table = Table("version", "stage", "ε", "rounds", "quality", "digest", box=None, pad_edge=False)
    for v in versions:
        table.add_row(v.name, str(v.stage), _epsilon(v.epsilon), str(v.rounds), _quality(v), v.digest[:12])
    out.print(table if versions else "No version is registered: `foedus registry register RUN`.")


@app.command()
def show(name: Name, home: Home = HERE, as_json: AsJson = False) -> None:
    """A version's lineage, its evaluation, and everything that was done with it."""
    with _registry(home) as registry:
        version = registry.version(name)
        moves = [move for move in registry.moves(version.model) if move.version == version.version]
        spent = registry.spent(version.model, version.delta or 1e-5)
        folder = registry.folder(version)
    if as_json:
        finite = {unit: epsilon if math.isfinite(epsilon) else None for unit, epsilon in spent.items()}
        print_json({**asdict(version), "moves": [asdict(move) for move in moves], "spent": finite})
        return
    bound = f"{_epsilon(version.epsilon)} at δ = {version.delta or 0:g} for each {version.unit}"
    together = ", ".join(f"{_epsilon(e)} for each {unit}" for unit, e in spent.items() if math.isfinite(e))
    lines = {
        "stage": version.stage, "digest": version.digest, "base model": f"{version.base} {version.base_digest}",
        "treaty": version.treaty, "run": f"{version.run}, {version.rounds} rounds",
        "parent": f"{version.model}@{version.parent}" if version.parent else "none",
        "guarantee": "none" if version.epsilon is None else bound, "spent by all versions": together or "no bound",
        "quality": _quality(version), "ledger's head": version.head, "files": folder,
    }  # fmt: skip
    for what, said in lines.items():
        out.print(f"{what:>22}  {said}", markup=False)
    for move in moves:
        _print_move(move)


@app.command()
def register(
    run: RunPath,
    model: Annotated[str, typer.Option(metavar="NAME", help="The model's name; by default, the treaty's.")] = "",
    by: By = "",
    home: Home = HERE,
    as_json: AsJson = False,
) -> None:
    """Take a finished run's adapter in, as a candidate."""
    with _registry(home) as registry:
        version = registry.register(run, model, by or _account())
    if as_json:
        print_json(asdict(version))
    else:
        out.print(f"{version.name}: {version.stage}, {version.digest}", markup=False)


@app.command()
def promote(
    name: Name,
    worse: Annotated[float, typer.Option(help="The most that any silo or domain may lose, 0.02 for 2 %.")] = 0.02,
    epsilon: Annotated[float | None, typer.Option(help="The most ε that all versions together may have cost.")] = None,
    delta: Annotated[float, typer.Option(help="The δ of that ε.")] = 1e-5,
    key: Annotated[
        str, typer.Option(metavar="HEX", help="The key that must have signed the run's ledger; any: none need have.")
    ] = OWN,
    by: By = "",
    why: Why = "",
    home: Home = HERE,
    as_json: AsJson = False,
) -> None:
    """Put a candidate into production, if all checks pass. Exits with 1 when one does not."""
    from .governance.registry import Rules

    with _registry(home) as registry:
        move = registry.promote(name, by or _account(), why, Rules(worse, epsilon, delta, _signer(key, home)))
    _told(move, as_json)


@app.command()
def retire(name: Name, by: By = "", why: Why = "", home: Home = HERE, as_json: AsJson = False) -> None:
    """Take a version out of use. What it cost stays spent."""
    with _registry(home) as registry:
        move = registry.retire(name, by or _account(), why)
    _told(move, as_json)


@app.command()
def export(
    name: Annotated[str, typer.Argument(metavar="MODEL[@VERSION]", help="Without a version, that in production.")],
    to: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder.")],
    home: Home = HERE,
    as_json: AsJson = False,
) -> None:
    """Copy an adapter out, verified."""
    with _registry(home) as registry:
        folder = registry.export(name, to)
    print_json({"folder": str(folder)}) if as_json else out.print(f"{name}: {folder}", markup=False)


def rollback(name: Name, by: By = "", why: Why = "", home: Home = HERE, as_json: AsJson = False) -> None:
    """Put an earlier version into production again, in one step. What the later one cost stays spent."""
    with _registry(home) as registry:
        move = registry.rollback(name, by or _account(), why)
    _told(move, as_json)


@contextmanager
def _registry(home: Path) -> Iterator[Registry]:
    from .deploy.home import FederationHome
    from .governance.registry import Registry

    found = FederationHome.at(home)
    registry = Registry(found.registry, found.store, found.open_ledger())
    try:
        yield registry
    finally:
        registry.close()


def _signer(key: str, home: Path) -> str:
    from .deploy.home import FederationHome

    return {OWN: FederationHome.at(home).public.hex(), "any": ""}.get(key, key)


def _account() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"


def _told(move: Move, as_json: bool) -> None:
    if as_json:
        print_json(asdict(move))
    else:
        _print_move(move)
    if not move.accepted:
        raise typer.Exit(1)


def _print_move(move: Move) -> None:
    done = f"{move.kind}: {move.before} → {move.after}" if move.accepted else f"{move.kind}: refused"
    rest = f", in place of {move.model}@{move.replaced}" if move.replaced else ""
    said = f" ({move.why})" if move.why else ""
    out.print(f"{move.at}  {move.model}@{move.version}  {done}{rest}, by {move.by or 'nobody'}{said}", markup=False)
    for check in move.checks:
        mark = {True: "passed", False: "FAILED", None: "not asked"}[check.passed]
        out.print(f"  {mark:>9}  {check.name}: {check.expected}; {check.came}", markup=False)


def _epsilon(epsilon: float | None) -> str:
    return "none" if epsilon is None or math.isinf(epsilon) else f"ε = {epsilon:.3g}"


def _quality(version: Version) -> str:
    """The mean over everything, by the first measure that there is."""
    from .governance.releases import QUALITY

    measure = next((measure for measure in QUALITY if measure in version.evaluation), None)
    value = version.evaluation[measure].get("micro") if measure else None
    return f"{measure.replace('_', ' ')} {value:.4g}" if measure and value is not None else "not measured"
