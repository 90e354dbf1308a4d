"""What an operator should know at once, and what to do about it. Every alarm is in `ALARMS`; `/metrics` has all of
them, firing or not, and docs/deploy.md says the same in more words.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from . import files
from .runs import RunView

if TYPE_CHECKING:
    from .view import Federation, Silo

Severity = Literal["critical", "warning", "notice"]

DAYS = 30  # before a certificate or a charter expires
ROOM = 10**9  # bytes that should be free
RECENT = 5  # rounds
NEAR = 0.9  # of a budget
MANY = 100  # refused messages


@dataclass(frozen=True)
class Kind:
    """`severity`: critical asks for somebody now, a warning for somebody today. `do`: in the imperative."""

    severity: Severity
    title: str
    do: str


@dataclass(frozen=True)
class Alarm:
    """One that fires. `name`: in `ALARMS`; `about`: which run or silo; `said`: what was seen."""

    name: str
    about: str
    said: str

    @property
    def kind(self) -> Kind:
        """What alarms of this name are."""
        return ALARMS[self.name]


ALARMS: dict[str, Kind] = {
    "ledger-broken": Kind("critical", "A ledger does not verify",
        "Stop, and keep the folder as it is. Compare it with another party's by `foedus ledger verify A B`; restore it"
        " from a backup only after you know who changed it."),
    "run-damaged": Kind("critical", "A run's folder cannot be read",
        "Restore the file that is named, or resume the run, which writes it again."),
    "epsilon-over": Kind("critical", "The privacy budget is spent",
        "Stop the run: what is spent stays spent. Release no further version; agree on a new treaty or end here."),
    "stalled": Kind("critical", "The run does not advance",
        "Look at which silos are reachable and at the coordinator's log; start it again with `foedus coordinator up`"
        " and the run goes on where it was."),
    "superlink-down": Kind("critical", "The transport is down",
        "Start the coordinator again with `foedus coordinator up`; silos come back by themselves."),
    "waiting": Kind("warning", "The run waits",
        "Bring back the silos, or the signatures, that it names: it goes on by itself. When the federation's patience"
        " ends, it stops, and `foedus resume` goes on with it."),
    "epsilon-projected": Kind("warning", "The treaty will pass its privacy budget",
        "Stop before the limit, or propose a new treaty with fewer rounds or more noise. Redone rounds cost again."),
    "cohort-small": Kind("warning", "Few silos are left",
        "Bring back the silos that are missing: one less and the run stops, since a smaller sum shows too much."),
    "silo-missing": Kind("warning", "A silo does not take part",
        "Ask its operator; the reason it gave is beside its name. The round goes on without it."),
    "silo-refuses": Kind("warning", "A silo refuses",
        "Its charter does not permit what was asked, and its ledger names the clause. Propose a treaty within it, or go"
        " on without that silo. Do not ask again unchanged."),
    "straggler": Kind("notice", "A silo is slow",
        "Raise deadline_s, or ask its operator about load and network."),
    "loss-rises": Kind("warning", "The model gets worse",
        "Stop and roll back: `foedus rollback MODEL@VERSION`. Then look at the learning rate and at the last silo that"
        " joined."),
    "certificate-expires": Kind("warning", "The server's certificate expires soon",
        "Rotate it with `foedus coordinator rotate`; silos need nothing new while the authority stays."),
    "disk-low": Kind("warning", "The disk is nearly full", "Make room: a run that cannot write stops."),
    "budget-near": Kind("warning", "The budget for life is nearly promised",
        "Sign no further treaty that costs more than is left; `foedus silo budget` has the figures."),
    "budget-over": Kind("critical", "The budget for life is passed",
        "Withdraw from running treaties with `foedus silo leave`. Find out which treaty was charged more than it"
        " promised."),
    "charter-expires": Kind("warning", "The charter expires soon", "Renew charter.toml, or let it end: nothing is"
        " answered afterwards."),
    "refuses-much": Kind("warning", "Many messages were refused",
        "Read the reasons in the ledger. Forged or replayed messages: tell the coordinator, and rotate keys if it did"
        " not send them."),
    "paused": Kind("notice", "This silo gives nothing", "Go on with `foedus silo resume` when you are ready."),
    "disconnected": Kind("warning", "The coordinator cannot be reached",
        "Check network, name and certificate; the silo tries again by itself."),
    "keys-plain": Kind("notice", "Keys lie unencrypted on disk",
        "Give a key by file, by FOEDUS_KEY or by the system's keyring; see the hardening checklist."),
}  # fmt: skip


def of_federation(found: Federation, now: float | None = None) -> tuple[Alarm, ...]:
    """All that fire at the coordinator, the worst first."""
    now = time.time() if now is None else now
    alarms = [alarm for run in found.runs for alarm in _of_run(run, now, found.deadline)]
    if not found.ledger_fits:
        alarms.append(Alarm("ledger-broken", "coordinator", found.ledger_said))
    if found.superlink is False:
        alarms.append(Alarm("superlink-down", found.name, "The SuperLink does not run."))
    if found.running.get("state") == "waiting":
        alarms.append(Alarm("waiting", str(found.running.get("name")), str(found.running.get("why"))))
    alarms += [*_certificate(found.home, now), *_room(found.home)]
    return _sorted(alarms)


def of_silo(found: Silo, now: float | None = None) -> tuple[Alarm, ...]:
    """All that fire at a silo, the worst first."""
    now = time.time() if now is None else now
    alarms = [] if found.ledger_fits else [Alarm("ledger-broken", found.name, found.ledger_said)]
    if found.paused or found.left:
        said = "It left the federation." if found.left else "It is paused: every ask is refused."
        alarms.append(Alarm("paused", found.name, said))
    if found.connected is False and not found.left:
        alarms.append(Alarm("disconnected", found.name, f"No connection to {found.coordinator or 'the coordinator'}."))
    if found.keys == "plain":
        alarms.append(Alarm("keys-plain", found.name, "No key was given for the vault."))
    refused = sum(refusal.count for refusal in found.refusals)
    if refused >= MANY:
        alarms.append(Alarm("refuses-much", found.name, f"{refused} messages were refused so far."))
    alarms += [*_life(found), *_charter(found, now), *_room(found.home)]
    return _sorted(alarms)


def _of_run(run: RunView, now: float, deadline: float) -> Iterator[Alarm]:
    if run.damaged:
        yield Alarm("run-damaged", run.name, run.damaged)
        return
    if run.ledger.broken_at is not None:
        yield Alarm("ledger-broken", run.name, f"Line {run.ledger.broken_at + 1} does not fit: {run.ledger.why}.")
    yield from _privacy(run)
    if run.ended:
        return
    quiet, patience = now - run.changed, max(3 * (run.pace or 0.0), deadline, 300.0)
    if run.rounds and quiet > patience:
        yield Alarm("stalled", run.name, f"Nothing was written for {quiet / 60:.0f} minutes after round {run.done}.")
    yield from _silos(run)
    yield from _loss(run)


def _privacy(run: RunView) -> Iterator[Alarm]:
    p = run.privacy
    if p is None or p.limit is None:
        return
    at = f"of {p.limit:g} at δ = {p.delta:g}"
    if p.over:
        yield Alarm("epsilon-over", run.name, f"ε = {_figure(p.spent)} is spent {at}.")
    elif p.will_be_over:
        yield Alarm("epsilon-projected", run.name, f"After {p.planned} rounds ε would be {_figure(p.projected)} {at}.")


def _silos(run: RunView) -> Iterator[Alarm]:
    last = run.rounds[-1] if run.rounds else None
    if last is not None and last.came and len(last.came) <= run.minimum and last.failures:
        said = f"Round {last.number} had {len(last.came)} of at least {run.minimum}."
        yield Alarm("cohort-small", run.name, said)
    for member in run.silos:
        recent = [r for r in run.rounds[-RECENT:] if member.name in r.failures]
        if recent:
            refused = member.refused and member.why and not member.failed
            said = f"{member.name}, in {len(recent)} of the last {min(RECENT, len(run.rounds))} rounds: {member.why}"
            yield Alarm("silo-refuses" if refused else "silo-missing", run.name, said)
        if member.slow:
            yield Alarm("straggler", run.name, f"{member.name} takes {member.seconds:.0f} s a round.")


def _loss(run: RunView) -> Iterator[Alarm]:
    values = run.quality.get("federated", ((), ()))[1]
    if len(values) >= 2 and values[-1] > 1.1 * min(values):
        said = f"Perplexity is {values[-1]:.4g}, after {min(values):.4g} at best."
        yield Alarm("loss-rises", run.name, said)
        return
    losses = [r.loss for r in run.rounds if r.loss is not None]
    if len(losses) > RECENT and min(losses[-3:]) > 1.2 * losses[0]:
        yield Alarm("loss-rises", run.name, f"The training loss is {losses[-1]:.3g}, and was {losses[0]:.3g} at first.")


def _life(found: Silo) -> Iterator[Alarm]:
    if found.cap is None:
        return
    most = max(found.promised or 0.0, found.spent or 0.0)
    said = f"ε = {most:.3g} is spent or promised, of {found.cap:g} for life."
    if most > found.cap * (1 + 1e-6):
        yield Alarm("budget-over", found.name, said)
    elif most >= NEAR * found.cap:
        yield Alarm("budget-near", found.name, said)


def _charter(found: Silo, now: float) -> Iterator[Alarm]:
    last = files.part(found.charter, "charter").get("expires")
    if isinstance(last, date):
        days = (last - datetime.fromtimestamp(now, UTC).date()).days
        if days <= DAYS:
            yield Alarm("charter-expires", found.name, f"On {last}." if days >= 0 else f"It expired on {last}.")


def _certificate(home: Path, now: float) -> Iterator[Alarm]:
    place = home / "tls" / "server.crt"
    if not place.is_file():
        return
    from cryptography import x509  # takes long to load

    try:
        ends = x509.load_pem_x509_certificate(place.read_bytes()).not_valid_after_utc
    except (OSError, ValueError):
        return
    days = (ends.timestamp() - now) / 86400
    if days <= DAYS:
        when = f"In {days:.0f} days" if days >= 0 else "It has expired"
        yield Alarm("certificate-expires", "tls/server.crt", f"{when} ({ends:%Y-%m-%d}).")


def _room(home: Path) -> Iterator[Alarm]:
    try:
        free = shutil.disk_usage(home).free
    except OSError:
        return
    if free < ROOM:
        yield Alarm("disk-low", "disk", f"{free / 1e6:.0f} MB are free.")


def _figure(epsilon: float | None) -> str:
    return "without bound" if epsilon is None else f"{epsilon:.3f}"


def _sorted(alarms: list[Alarm]) -> tuple[Alarm, ...]:
    order: tuple[Severity, ...] = ("critical", "warning", "notice")
    return tuple(sorted(alarms, key=lambda alarm: order.index(alarm.kind.severity)))
