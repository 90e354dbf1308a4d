"""`foedus silo …`: what a silo's operator does."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from .console import AsJson, err, out, print_json

if TYPE_CHECKING:
    from .deploy.home import SiloHome
    from .governance.consent import Consent

app = typer.Typer(no_args_is_help=True, help="A silo: its home, its federation, and what it gave.")

HERE = Path()
Home = Annotated[Path, typer.Option(metavar="DIR", help="The silo's home.")]
Treaty = Annotated[str, typer.Argument(metavar="[TREATY]", help="A treaty's name or digest.")]


@app.command()
def init(
    name: Annotated[str, typer.Option(help="By which the federation knows this silo.")],
    home: Home = HERE,
    key: Annotated[str, typer.Option(metavar="SOURCE", help="Encrypt keys: env, file:PATH, keyring.")] = "",
    as_json: AsJson = False,
) -> None:
    """Make a silo's home: its keys, a card for the coordinator, and a charter that permits nothing yet."""
    from .deploy.home import SiloHome, SiloSettings, read_card

    made = SiloHome.create(home, SiloSettings(name, key=key))
    card = read_card(made.card)
    if as_json:
        print_json({"home": str(home), "name": name, "card": str(made.card), "fingerprint": card.fingerprint})
        return
    out.print(f"Card: {made.card} (give it to the coordinator)", markup=False)
    out.print(f"Fingerprint: {card.fingerprint} (read it out to the coordinator over the telephone)", markup=False)
    out.print(f"Charter: {made.charter} (say there what this silo permits; it permits no base model yet)", markup=False)


@app.command()
def join(
    invitation: Annotated[Path, typer.Argument(metavar="INVITATION", help="invitation.json of the coordinator.")],
    home: Home = HERE,
    as_json: AsJson = False,
) -> None:
    """Take a coordinator's invitation: from now on this silo knows it by its key."""
    from .deploy.home import SiloHome, read_invitation

    taken = read_invitation(invitation)
    SiloHome.at(home).join(taken)
    if as_json:
        print_json({"federation": taken.federation, "address": taken.address, "fingerprint": taken.fingerprint})
        return
    out.print(f"Joined {taken.federation} at {taken.address}.", markup=False)
    out.print(f"Fingerprint: {taken.fingerprint} (compare it with the coordinator's over the telephone)", markup=False)


@app.command()
def up(
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="This silo's examples: parquet, jsonl, csv, or a folder.")
    ] = None,
    home: Home = HERE,
) -> None:
    """Serve this silo until it is stopped (Ctrl-C). Left out, its data are its share of each treaty's source."""
    from .cli_dashboard import app_of
    from .deploy import host
    from .deploy.home import SiloHome
    from .errors import DataError

    if data is not None and not data.exists():
        raise DataError("this silo's examples", f"nothing at {data}", "Name a file, or a folder, by --data.")
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    host.up(SiloHome.at(home), data.resolve() if data is not None else None, told=_tell, page=app_of)


@app.command()
def pause(home: Home = HERE) -> None:
    """Answer no ask from the next message on, until `resume`."""
    from dataclasses import replace

    _decide(home, lambda consent: replace(consent, paused=True), "Paused. Rounds go on without this silo.")


@app.command()
def resume(home: Home = HERE) -> None:
    """Answer asks again."""
    from dataclasses import replace

    _decide(home, lambda consent: replace(consent, paused=False), "This silo answers again.")


@app.command()
def leave(treaty: Treaty = "", home: Home = HERE) -> None:
    """Withdraw consent to a treaty, for good; left out, to all: the silo leaves the federation. What was spent stays
    spent.
    """
    from dataclasses import replace

    from .deploy.home import SiloHome

    if not treaty:
        said = "This silo has left the federation: it takes part in no round any more."
        _decide(home, lambda consent: replace(consent, left=True), said)
        return
    found = _named(SiloHome.at(home), treaty)
    said = f"Consent to {found.name} ({found.digest[:12]}) is withdrawn, from the next round on and for good."
    _decide(home, lambda consent: consent.without(found.digest), said)


@app.command()
def ledger(
    home: Home = HERE,
    last: Annotated[int, typer.Option(help="So many records, the newest last.")] = 20,
    as_json: AsJson = False,
) -> None:
    """What this silo was asked, gave and refused; the whole chain is verified first."""
    from .deploy.home import SiloHome
    from .governance import verify

    path = SiloHome.at(home).ledger
    records = verify(path) if path.exists() else []
    if as_json:
        print_json(records[-last:])
        return
    table = Table("#", "what", "treaty", "said")
    for record in records[-last:]:
        body = dict(record["body"])
        treaty = str(body.pop("treaty", ""))[:12]
        said = ", ".join(f"{name} {_short(value)}" for name, value in body.items() if value not in ("", None))
        table.add_row(str(record["index"]), record["kind"], treaty, Text(said))
    out.print(table)
    out.print(f"{len(records)} records; every hash and signature fits.")


@app.command()
def budget(home: Home = HERE, as_json: AsJson = False) -> None:
    """What this silo's people have spent of their privacy, over all treaties, and what its charter allows."""
    from .deploy.home import SiloHome
    from .governance import Budget
    from .governance.budget import UNITS
    from .privacy import accountant
    from .treaty import charter

    found = SiloHome.at(home)
    allowed = charter.load(found.charter).privacy
    kept = Budget(found.budgets, found.name)
    spent = {unit: accountant.upper(kept.spent(unit), allowed.delta) for unit in UNITS if _charged(kept, unit)}
    promised = accountant.upper(kept.promised(), allowed.delta)
    facts: dict[str, Any] = {
        "silo": found.name, "delta": allowed.delta, "spent": spent, "promised": promised,
        "allowed": allowed.epsilon_for_life,
    }  # fmt: skip
    if as_json:
        print_json(facts)
        return
    for unit, epsilon in spent.items():
        out.print(f"Spent on {unit}s: ε = {epsilon:.3f} at δ = {allowed.delta:g}", markup=False)
    out.print(f"Promised in all: ε = {promised:.3f} of {allowed.epsilon_for_life:g} for life", markup=False)


@app.command()
def status(home: Home = HERE, as_json: AsJson = False) -> None:
    """Whether this silo is up and connected, its treaties, and what its operator decided."""
    from .deploy.home import SiloHome
    from .governance import consent

    found = SiloHome.at(home)
    alive, taken, decided = found.read_status(), found.invitation, consent.read(found.state)
    facts = {
        "silo": found.name, "up": bool(alive), "connected": bool(alive.get("connected")),
        "federation": taken.federation if taken else None, "paused": decided.paused, "left": decided.left,
        "withdrawn": list(decided.withdrawn), "keys": alive.get("keys"),
        "treaties": [
            {"name": one.name, "digest": one.digest, "signed": found.name in one.signatures, "binding": one.binding,
             **{key: value for key, value in alive.get("treaties", {}).get(one.digest[:12], {}).items()
                if key in ("state", "why")}}
            for one in found.signed()
        ],
    }  # fmt: skip
    if as_json:
        print_json(facts)
        return
    how = "up, and connected" if facts["connected"] else "up, and not connected" if alive else "not up"
    out.print(f"{found.name}: {how}; federation: {facts['federation'] or 'none joined'}", markup=False)
    if decided.paused or decided.left:
        out.print("left for good" if decided.left else "paused", markup=False)
    if alive.get("keys") == "plain":
        out.print("Keys are not encrypted at rest: only file permissions protect them.", markup=False)
    for one in facts["treaties"]:
        said = "consent withdrawn" if one["digest"] in decided.withdrawn else one.get("state") or _signed(one)
        out.print(f"  {one['name']} ({one['digest'][:12]}): {said} {one.get('why') or ''}".rstrip(), markup=False)


def _signed(treaty: dict[str, Any]) -> str:
    return "all signed" if treaty["binding"] else "signed here" if treaty["signed"] else "not signed"


def _decide(home: Path, change: Any, said: str) -> None:
    """Writes a decision down; the resident process reads it before its next answer."""
    from .deploy.home import SiloHome
    from .governance import consent

    found = SiloHome.at(home)
    decided: Consent = change(consent.read(found.state))
    found.decide(decided)
    out.print(said, markup=False)


def _named(home: SiloHome, treaty: str) -> Any:
    from .errors import RunError, one_of

    known = home.signed()
    found = [one for one in known if one.name == treaty or (len(treaty) > 7 and one.digest.startswith(treaty))]
    if len(found) != 1:
        came = f'"{treaty}"' if not found else f"{len(found)} of that name: give the digest"
        raise RunError("one of this silo's treaties", came, one_of(treaty, [one.name for one in known]))
    return found[0]


def _charged(kept: Any, unit: str) -> bool:
    return any(r["kind"] == "charge" and r["body"]["unit"] == unit for r in kept.ledger.records)


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text[:100]


def _tell(line: str) -> None:
    err.print(line, markup=False)
