"""`foedus treaty …`: propose one, read it in plain words, sign it or be told why not, and collect signatures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import AsJson, TreatyFile, err, out, print_json

if TYPE_CHECKING:
    from .treaty.signed import Signed

app = typer.Typer(no_args_is_help=True, help="Treaties between organisations: propose, read, sign, verify, collect.")

Home = Annotated[Path, typer.Option(metavar="DIR", help="The home of the coordinator, or of the silo.")]
SignedFile = Annotated[Path, typer.Argument(metavar="FILE", help="A signed treaty, NAME.treaty.json.")]
HERE = Path()


@app.command()
def propose(treaty: TreatyFile, home: Home = HERE, as_json: AsJson = False) -> None:
    """Sign a treaty as its coordinator, for the silos that it names. Send the file to each of them."""
    from .deploy import signing
    from .treaty import load

    made, path = signing.propose(signing.FederationHome.at(home), load(treaty))
    _told(made, path, as_json)


@app.command()
def show(file: SignedFile, home: Home = HERE, as_json: AsJson = False) -> None:
    """A treaty in plain words: what is trained, what leaves a silo, the guarantee, who is in; and what this silo's
    charter says of it.
    """
    from .treaty.signed import load

    found = load(file)
    said, clauses = _in_words(found), _verdict(home, found)
    if as_json:
        print_json({**_facts(found), "words": said, "charter": clauses, "treaty": found.treaty.tables()})
        return
    for title, lines in said.items():
        out.print(f"[bold]{title}[/]")
        for line in lines:
            out.print(f"  • {line}", markup=False)
    if clauses is None:
        return
    out.print("[bold]The charter of this silo[/]")
    for line in clauses or ["permits it"]:
        out.print(f"  • {line}", markup=False)
    if clauses:
        out.print("This silo would not sign it.")


@app.command()
def sign(file: SignedFile, home: Home = HERE, as_json: AsJson = False) -> None:
    """Sign a treaty as a silo, if its charter permits it. Send the file back to the coordinator."""
    from .deploy import signing
    from .treaty.signed import load, save

    made, path = signing.sign(signing.SiloHome.at(home), load(file))
    if file.name == path.name:
        save(made, file.parent)
    _told(made, path, as_json)


@app.command()
def verify(file: SignedFile, as_json: AsJson = False) -> None:
    """Check every signature of a treaty, and say whose are missing; exits with 1 until all have signed."""
    from .treaty.signed import load

    found = load(file)
    _told(found, file, as_json)
    if not found.binding:
        raise typer.Exit(1)


@app.command()
def collect(
    files: Annotated[list[Path], typer.Argument(metavar="FILE ...", help="Copies that came back.")],
    home: Home = HERE,
    as_json: AsJson = False,
) -> None:
    """Bring the signatures of these copies into this home's own."""
    from .deploy import signing
    from .treaty.signed import load

    found = signing.collect(signing.home_at(home), map(load, files))
    if as_json:
        print_json([_facts(one) for one in found])
        return
    for one in found:
        _said(one)


def _told(made: Signed, path: Path, as_json: bool) -> None:
    if as_json:
        print_json({**_facts(made), "file": str(path)})
        return
    _said(made)
    out.print(f"File: {path}", markup=False)


def _said(made: Signed) -> None:
    out.print(f"Treaty {made.name}, digest {made.digest}", markup=False)
    absent = [*([] if made.proposed else ["the coordinator"]), *made.missing]
    out.print(f"Not signed yet: {', '.join(absent)}." if absent else "All parties signed.", markup=False)


def _facts(made: Signed) -> dict[str, Any]:
    return {
        "name": made.name, "digest": made.digest, "binding": made.binding, "signed": sorted(made.signatures),
        "missing": list(made.missing), "proposed": bool(made.proposed),
    }  # fmt: skip


def _verdict(home: Path, found: Signed) -> list[str] | None:
    """The clauses of this silo's charter that forbid the treaty; None where this is no silo's home."""
    if not (home / "silo.toml").is_file():
        err.print("The charter of a silo is shown in its home (--home DIR).")
        return None
    from .deploy import signing

    return [str(clause) for clause in signing.judged(signing.SiloHome.at(home), found)]


def _in_words(found: Signed) -> dict[str, list[str]]:
    """What a treaty says, by heading."""
    from .governance.identity import fingerprint
    from .treaty import describe, statement

    t = found.treaty
    parties = [f"coordinator, key {fingerprint(found.coordinator)}: {_has_signed(found.proposed)}"]
    parties += [
        f"{name}, key {fingerprint(key)}: {_has_signed(found.signatures.get(name))}"
        for name, key in found.roster.items()
    ]
    parties += ["compare each silo's key with that silo itself: a coordinator could name silos of its own"]
    return {
        f"Treaty {found.name}": [f"digest {found.digest}", *([t.treaty.purpose] if t.treaty.purpose else [])],
        "What is trained": _trained(t),
        "What leaves a silo": describe(t),
        "Guarantee": [statement(t, _plan(t))],
        "Who is in": parties,
    }


def _trained(t: Any) -> list[str]:
    from .treaty.charter import columns_of, sources_of

    kind = f"a LoRA adapter of rank {t.adapter.rank}" if t.adapter.kind == "lora" else "every parameter"
    work = f"{t.local.steps} steps" if t.local.steps else f"{t.local.epochs} passes over its text"
    return [
        f"{kind} of {t.model.base}, for {t.model.task}",
        f"by {t.algorithm.name}: {t.algorithm.rounds} rounds, each of {work} at a silo, {t.local.batch} rows a step",
        f"from these columns of a silo's data: {', '.join(columns_of(t))}",
        f"and from these sources beside it: {', '.join(sources_of(t)) or 'none'}",
    ]


def _plan(t: Any) -> dict[str, Any] | None:
    """The facts of the treaty's plan; None where it protects nobody."""
    if t.privacy.unit == "none":
        return None
    from .build import privacy_plan
    from .privacy.plan import facts
    from .treaty import roster

    plan = privacy_plan(t, len(roster(t)))
    return facts(plan) if plan else None


def _has_signed(signature: bytes | None) -> str:
    return "signed" if signature else "not signed yet"
