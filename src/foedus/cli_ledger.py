"""`foedus ledger …`: verify ledgers and set them beside each other, read them, hand them to auditors, prune them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import AsJson, err, out, print_json

if TYPE_CHECKING:
    from .governance.witness import Comparison

app = typer.Typer(no_args_is_help=True, help="Ledgers: verify, compare, read, export for auditors, prune.")

Ledgers = Annotated[list[Path], typer.Argument(metavar="LEDGER ...", help="Ledger files, or folders that hold one.")]
One = Annotated[Path, typer.Argument(metavar="LEDGER", help="A ledger file, or a folder that holds one.")]
Key = Annotated[str, typer.Option(metavar="HEX", help="The keeper's public key; it must have signed.")]


@app.command()
def verify(
    ledgers: Ledgers,
    head: Annotated[str, typer.Option(metavar="HEAD", help="Where the first ledger stood before, NUMBER:HASH.")] = "",
    key: Annotated[str, typer.Option(metavar="HEX", help="The public key of the first ledger's keeper.")] = "",
    as_json: AsJson = False,
) -> None:
    """Find any change, gap, cut or fork; of several, prove that they saw the same rounds or say where they part.

    Exits with 1 when something does not fit.
    """
    from .errors import RunError
    from .governance.ledger import Head, departs
    from .governance.ledger import verify as checked
    from .governance.witness import compare_all

    names, faults = _named(ledgers), []
    whole: dict[str, list[dict[str, Any]]] = {}
    before = Head.parse(head) if head else None
    for name, path in names.items():
        first = path is next(iter(names.values()))
        try:
            whole[name] = checked(path, key=key if first else "")
            if before is not None and first and (why := departs(whole[name], before)):
                raise RunError(f"a ledger that stood at {str(before)[:20]}…", why, "Find out who cut or rewrote it.")
        except RunError as error:
            faults.append((name, error))
    pairs = compare_all(whole)
    if as_json:
        print_json({
            "ledgers": {name: _facts(records) for name, records in whole.items()},
            "faults": [{"ledger": name, "expected": e.expected, "came": e.came, "at": e.where} for name, e in faults],
            "comparisons": [_pair(pair) for pair in pairs],
        })  # fmt: skip
    else:
        _print(whole, faults, pairs)
    if faults or not all(pair.same for pair in pairs):
        raise typer.Exit(1)


@app.command()
def show(
    ledger: One,
    last: Annotated[int, typer.Option(metavar="N", help="How many records, from the end; 0 for all.")] = 20,
    kind: Annotated[str, typer.Option(metavar="KIND", help="Only records of this kind.")] = "",
    as_json: AsJson = False,
) -> None:
    """Read a ledger: its head, its keeper, and its last records."""
    from .governance.ledger import read

    records = read(_file(ledger))
    chosen = [record for record in records if kind in ("", record["kind"])][-last:]
    if as_json:
        print_json({**_facts(records), "records": chosen})
        return
    for record in chosen:
        said = ", ".join(
            f"{name} {_short(value)}" for name, value in record["body"].items() if value not in ("", {}, [])
        )
        out.print(f"{record['index']:>6}  {record['kind']:<10}  {said}", markup=False)
    out.print(f"Head: {_facts(records)['head']}", markup=False)


@app.command()
def export(
    ledger: One,
    to: Annotated[Path, typer.Argument(metavar="FILE", help="A new file, .json or .html.")],
    beside: Annotated[
        list[Path] | None, typer.Option("--beside", metavar="LEDGER", help="Compare it with this one on the page.")
    ] = None,
    key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Hand a ledger to auditors: all of it as JSON, or one readable page that needs nothing but itself."""
    from .errors import RunError
    from .governance.ledger import verify as checked
    from .governance.witness import compare
    from .report.ledger_page import document, write_json, write_ledger_page

    if to.suffix not in (".json", ".html"):
        raise RunError("a file that ends in .json or .html", to.name, "Choose by the ending.")
    path = _file(ledger)
    own = checked(path, key=key)
    others = {name: checked(other) for name, other in _named([ledger, *(beside or ())]).items() if other != path}
    pairs = [compare(own, records, (path.name, name)) for name, records in others.items()]
    made = document(path, key=key, comparisons=pairs)
    (write_json if to.suffix == ".json" else write_ledger_page)(made, to)
    if as_json:
        print_json({"file": str(to), "head": made["head"], "records": len(made["records"])})
    else:
        out.print(f"{to}: {len(made['records'])} records, head {made['head']}", markup=False)


@app.command()
def prune(
    keep: Annotated[int, typer.Option(metavar="N", min=0, help="How many of the last records stay whole.")],
    home: Annotated[Path, typer.Option(metavar="DIR", help="The home whose ledger it is.")] = Path(),
    as_json: AsJson = False,
) -> None:
    """Drop older records of a home's own ledger; what was spent and opened stays, and the chain stays verifiable."""
    from .deploy.home import FederationHome, SiloHome

    found = FederationHome if (home / FederationHome.FILE).exists() else SiloHome
    ledger = found.at(home).open_ledger()
    dropped = ledger.prune(keep)
    if as_json:
        print_json({"dropped": dropped, "head": str(ledger.head)})
    else:
        out.print(f"{dropped} records dropped. Head: {ledger.head}", markup=False)


def _file(path: Path) -> Path:
    return path / "ledger.jsonl" if path.is_dir() else path


def _named(paths: Sequence[Path]) -> dict[str, Path]:
    """Files by what one calls them: their names, or their paths where those are alike."""
    from .errors import RunError

    files = [_file(path) for path in paths]
    for file in files:
        if not file.is_file():
            raise RunError("a ledger, or a folder that holds one", f"none at {file}", "Name it.")
    alike = len({file.name for file in files}) < len(files)
    return {str(file) if alike else file.name: file for file in files}


def _facts(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    from .governance.ledger import head_of, keepers

    return {"count": head_of(records).count, "head": str(head_of(records)), "keepers": list(keepers(records))}


def _pair(pair: Comparison) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(pair), "same": pair.same}


def _print(whole: dict[str, list[dict[str, Any]]], faults: list[tuple[str, Any]], pairs: list[Comparison]) -> None:
    for name, records in whole.items():
        facts = _facts(records)
        by = f"signed by {facts['keepers'][-1][:16]}…" if facts["keepers"] else "not signed"
        if name not in dict(faults):
            out.print(f"{name}: whole, {facts['count']} records, {by}\n  head {facts['head']}", markup=False)
    for name, error in faults:
        err.print(f"{name}: {error}", markup=False)
    for pair in pairs:
        verdict = "nothing contradicts" if pair.same else "they contradict each other"
        out.print(f"{pair.names[0]} and {pair.names[1]}: {len(pair.agreed)} rounds agree; {verdict}", markup=False)
        for line in (*map(str, pair.parted), *pair.notes):
            out.print(f"  • {line}", markup=False)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return f"({len(value)})" if len(value) > 3 else ", ".join(f"{k}: {_short(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(_short, value[:5])) + (f" and {len(value) - 5} more" if len(value) > 5 else "")
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 and not set(text) - set("0123456789abcdef") else text
