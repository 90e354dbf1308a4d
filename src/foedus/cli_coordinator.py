"""`foedus coordinator …`, `foedus init` and `foedus status`: what a federation's coordinator does."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .console import AsJson, err, out, print_json

app = typer.Typer(no_args_is_help=True, help="The coordinator: admit and invite silos, and serve them.")

HERE = Path()
Home = Annotated[Path, typer.Option(metavar="DIR", help="The federation's home.")]


def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder; its name is the federation's.")],
    address: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="By which silos reach the coordinator.")
    ] = "127.0.0.1:9443",
    name: Annotated[str, typer.Option(help="Of the federation, if not the folder's.")] = "",
    key: Annotated[str, typer.Option(metavar="SOURCE", help="Encrypt keys: env, file:PATH, keyring.")] = "",
    as_json: AsJson = False,
) -> None:
    """Make a federation's home: the coordinator's keys, its certificates, its ledger."""
    from .deploy.home import FederationHome, Settings

    made = FederationHome.create(folder, Settings(name or folder.resolve().name, address, key=key))
    fingerprint = made.invitation().fingerprint
    if as_json:
        print_json({"home": str(folder), "name": made.settings.name, "address": address, "fingerprint": fingerprint})
        return
    out.print(f"Home: {folder}\nFingerprint: {fingerprint} (silos compare it when they join)", markup=False)
    out.print("Next: foedus coordinator admit card.json, then foedus coordinator invite > invitation.json")


@app.command()
def admit(
    cards: Annotated[list[Path], typer.Argument(metavar="CARD ...", help="card.json of each silo.")],
    home: Home = HERE,
    as_json: AsJson = False,
) -> None:
    """Let silos in, by the cards that they handed over."""
    from .deploy.home import FederationHome, read_card

    found, federation = [read_card(path) for path in cards], FederationHome.at(home)
    for card in found:
        federation.admit(card)
    if as_json:
        print_json({card.name: card.fingerprint for card in found})
        return
    for card in found:
        out.print(f"{card.name}: {card.fingerprint} (compare it with what its operator reads out)", markup=False)


@app.command()
def invite(home: Home = HERE) -> None:
    """Print the invitation that silos join with; it holds no secret."""
    from .deploy.home import FederationHome, invitation_bytes

    print(invitation_bytes(FederationHome.at(home).invitation()).decode(), end="")


@app.command()
def revoke(name: Annotated[str, typer.Argument(metavar="SILO")], home: Home = HERE) -> None:
    """Put a silo out: its node is let in no more, from now on and for good."""
    from .deploy.home import FederationHome

    FederationHome.at(home).revoke(name)
    out.print(f"{name} is out. Treaties that name it go on without it, if enough silos are left.", markup=False)


@app.command()
def rotate(
    host: Annotated[list[str] | None, typer.Option(help="Under which silos reach the server, if others.")] = None,
    home: Home = HERE,
) -> None:
    """Make the server a new key and certificate. Silos need nothing new, and a coordinator that is up takes it."""
    from .deploy import certificates
    from .deploy.home import FederationHome

    found = FederationHome.at(home)
    certificates.rotate(found.tls, host, found.vault())
    out.print(f"The server's certificate is new; it expires on {certificates.expiry(found.tls)['server']:%Y-%m-%d}.")


@app.command()
def up(home: Home = HERE) -> None:
    """Serve the federation: the SuperLink that silos connect to, and the dashboard. Stop it with Ctrl-C."""
    from .cli_dashboard import app_of
    from .deploy import coordinator
    from .deploy.home import FederationHome

    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    coordinator.up(FederationHome.at(home), told=lambda line: err.print(line, markup=False), page=app_of)


def status(home: Home = HERE, as_json: AsJson = False) -> None:
    """How the federation is: who is connected, missing signatures, runs, ε, alarms, certificates about to expire."""
    from .deploy import coordinator
    from .deploy.home import FederationHome

    facts = coordinator.status(FederationHome.at(home))
    if as_json:
        print_json(facts)
        return
    out.print(f"{facts['federation']}: {'up' if facts['up'] else 'not up'}", markup=False)
    _print_silos(facts)
    for treaty in facts["treaties"]:
        out.print(f"Treaty {treaty['name']} ({treaty['digest'][:12]}): {_signed(treaty)}", markup=False)
    now = facts["run"]
    if now is not None:
        why = f": {now['why']}" if now["why"] else ""
        out.print(f"Run {now['name']}: {now['state']}, round {now['round']} of {now['rounds']}{why}", markup=False)
    for run in facts["runs"]:
        epsilon = f", ε = {run['epsilon']:.3f}" if run["epsilon"] is not None else ""
        out.print(f"  {run['name']}: {run['round']} of {run['rounds']} rounds{epsilon}", markup=False)
    for alarm in facts["alarms"]:
        out.print(f"Alarm {alarm['name']} ({alarm['about']}): {alarm['said']}", markup=False, style="red")
    for warning in facts["certificates"]["warnings"]:
        out.print(warning, markup=False, style="red")


def _signed(treaty: dict[str, Any]) -> str:
    if treaty["binding"]:
        return "all signed"
    here = f"{treaty['signatures']} of {treaty['silos']} signatures are here"
    return f"{here}; a run asks for those of {', '.join(treaty['missing'])}"


def _print_silos(facts: dict[str, Any]) -> None:
    if not facts["silos"]:
        out.print("No silo is admitted yet: foedus coordinator admit card.json")
        return
    table = Table("silo", "connected", "since", "fingerprint")
    for name, silo in facts["silos"].items():
        table.add_row(name, "yes" if silo["connected"] else "no", silo["since"] or "", silo["fingerprint"])
    out.print(table)
