"""`foedus run --engine flower`: a treaty carried out with the silos that signed it, from the coordinator's home.

    begin_run ─▶ runs/NAME        carry_out: collect signatures ─▶ execute over the line ─▶ register the adapter
                                                 ▲         │ no SuperLink, or too few silos
                                                 └─ wait ──┘ until they are back, as long as patience lasts

It needs a coordinator that is up (`coordinator.py`), and outlives it: while the SuperLink is started anew it waits,
and what was asked is asked again. All that a run must know afterwards lies in its folder: stopped or killed, it goes on
with `foedus resume`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from ..build import build
from ..engines.base import Ask, Engine
from ..engines.line import Away, Line
from ..engines.processes import round_of
from ..engines.remote import Remote
from ..errors import CohortError, FoedusError, RunError, SiloError
from ..execute import Event, begin, execute, treaty_of
from ..governance import RunFolder
from ..governance.circle import Circle
from ..governance.disk import write_whole
from ..launch import CHOSEN, FLOWER
from ..silo.handler import failed
from ..treaty import Treaty, load
from ..treaty import signed as treaties
from ..treaty.signed import Signed
from ..types import Receipt, Report, Tree
from .coordinator import RUN
from .forms import AGREE, BYE, HELLO
from .home import FederationHome
from .seal import MOST_WORDS, Seal

LOOK_S, LONGEST_LOOK_S = 1.0, 60.0
"""How long a run that waits pauses between two looks at who is there: at first, and at most."""
GRACE_S = 20.0
"""For so long a silo that is missed is asked all the same: it may be about to come back."""
HELLO_S = 30.0
"""For the answer to a hello or a good-bye, which nobody works for."""


class Lines(Protocol):
    """How a run gets a line to silos, given the public keys of their nodes."""

    def __call__(self, home: FederationHome, nodes: Mapping[str, str]) -> Line: ...


def over_flower(home: FederationHome, nodes: Mapping[str, str]) -> Line:
    """A line through this home's SuperLink. Raises `Away` when it is not up."""
    from ..engines import flower

    return flower.FlowerLine(home.flower / "socket", nodes, ttl_s=home.settings.deadline_s)


def begin_run(home: FederationHome, treaty: Treaty, path: Path | None = None) -> RunFolder:
    """The folder of a treaty's run, new: RUNS/NAME unless `path` is another. Raises `RunError` for a treaty that was
    not proposed, and for one that has been begun: it is resumed.
    """
    found = _agreed(home, treaty.digest())
    where, vault = path or home.runs / found.name, home.vault()
    if vault is not None and not where.resolve().is_relative_to(home.path.resolve()):
        do = "Leave --out away: what lies elsewhere, this vault does not seal."
        raise RunError("a run's folder inside the home, whose vault seals its checkpoints", str(where), do)
    RunFolder.check_free(where)
    RunFolder(where).write_json(CHOSEN, {"engine": FLOWER})  # before the treaty, with which a folder becomes a run
    return begin(replace(found.treaty, folder=home.path), where, vault)


def begun(home: FederationHome, treaty: Path, path: Path | None = None) -> tuple[RunFolder, Iterator[Event]]:
    """The run of a treaty's file (TOML, or as it was signed), begun: its folder, and what happens in it."""
    asked = treaties.load(treaty).treaty if treaty.name.endswith(treaties.SUFFIX) else load(treaty)
    folder = begin_run(home, asked, path)
    return folder, carry_out(home, folder)


def resumed(folder: RunFolder, round: int | None = None) -> Iterator[Event]:
    """What happens in a run between organisations that goes on, wherever its home is now."""
    return carry_out(FederationHome.at(folder.origin), folder, round=round)


def is_deployed(folder: RunFolder) -> bool:
    """Whether a run's silos are elsewhere."""
    return (folder.read_json(CHOSEN) or {}).get("engine") == FLOWER


def carry_out(
    home: FederationHome, folder: RunFolder, *, round: int | None = None, lines: Lines = over_flower
) -> Iterator[Event]:
    """Carries out the treaty of a run's folder with the silos that signed it, and registers the adapter. It waits for
    the SuperLink, for signatures, and for enough silos, as long as the federation's patience lasts; then it raises
    `RunError`, and the run goes on with `foedus resume`.
    """
    signed, folder = _agreed(home, treaty_of(folder).digest()), RunFolder.open(folder.path, home.vault())
    if round is not None and folder.read_json("summary.json") is not None:
        do = "Propose the treaty under another name: its silos take no more tasks under this one."
        raise RunError("a run that goes on, to go back in", "one that has ended", do, where=str(folder.path))
    events = _events(home, folder, signed, lines, round)
    with folder.lock(), _Said(home, folder, signed) as said, closing(events):
        for event in events:
            said.say(event)
            yield event


def _events(
    home: FederationHome, folder: RunFolder, signed: Signed, lines: Lines, round: int | None
) -> Generator[Event, None, None]:
    nodes = {name: card.node for name, card in home.cards().items() if name in signed.roster}
    with closing((yield from _reached(home, nodes, lines))) as line:
        yield from _over(line, home, folder, signed, round)


def _reached(home: FederationHome, nodes: Mapping[str, str], lines: Lines) -> Generator[Event, None, Line]:
    """A line to the silos, as soon as there is a SuperLink that carries it."""
    found: list[Line] = []

    def reach() -> bool:
        with suppress(Away):
            found.append(lines(home, nodes))
        return bool(found)

    try:
        return lines(home, nodes)
    except Away as error:
        yield from _Patience(home.settings.patience_s, "a SuperLink").until(reach, f"{error.came}. {error.do}")
    return found[0]


def _over(line: Line, home: FederationHome, folder: RunFolder, signed: Signed, round: int | None) -> Iterator[Event]:
    settings, chair, ledger = home.settings, home.identity(), home.open_ledger()
    signed = yield from _with_signatures(home, signed, line)
    treaty = replace(signed.treaty, folder=home.path)
    place = build(treaty, {}, circle=Circle(signed.roster, {}, chair))
    seal = Seal(chair, signed, home.numbers(signed.digest), ledger, place)
    remote = Remote(line, seal, deadline_s=settings.deadline_s, retries=settings.retries, backoff_s=settings.backoff_s)
    engine, waiting = Present(remote, line, signed), _Patience(settings.patience_s)
    while True:
        try:
            for event in execute(folder, place, round=round, engine=engine, keeper=chair):
                if event.kind == "round":
                    waiting, round = _Patience(settings.patience_s), None
                if event.kind == "done":
                    event = replace(event, row={**event.row, "version": register(home, folder)})
                    _part(home, signed, line)
                yield event
            return
        except CohortError as error:
            yield from waiting.until(lambda: len(line.silos()) >= treaty.cohort.minimum, _short(error))


def register(home: FederationHome, folder: RunFolder) -> str:
    """Takes the adapter of a finished run into the registry, as a candidate; MODEL@VERSION."""
    from ..governance.registry import Registry  # brings SQLAlchemy

    registry = Registry(home.registry, home.store, home.open_ledger())
    try:
        version = registry.register(folder.path, by="run")
        return f"{version.model}@{version.version}"
    finally:
        registry.close()


@dataclass
class Present:
    """Asks the silos that are connected, or missed since lately. Who has been gone for longer fails at once, so that
    nobody waits for it in every step of every round. Before its first ask a silo gets the treaty with all signatures,
    and says what it came to by it: whoever came to something else is asked for nothing.
    """

    engine: Engine
    line: Line
    signed: Signed
    grace_s: float = GRACE_S
    _missed: dict[str, float] = field(default_factory=dict, repr=False)
    _met: set[str] = field(default_factory=set, repr=False)
    _told: set[str] = field(default_factory=set, repr=False)

    @property
    def memory(self) -> dict[str, Tree]:
        return self.engine.memory

    def ask(self, asks: Sequence[Ask]) -> Iterator[Report]:
        now, here = time.monotonic(), self.line.silos()
        missed = {**dict.fromkeys((ask.silo for ask in asks), now), **self._missed}
        self._missed = {silo: since for silo, since in missed.items() if silo not in here}
        gone = {silo for silo, since in self._missed.items() if now - since > self.grace_s}
        asked = [ask for ask in asks if ask.silo not in gone]
        unfit = self._introduce([ask.silo for ask in asked if ask.silo not in self._told])
        yield from self.engine.ask([ask for ask in asked if ask.silo not in unfit])
        for ask in (ask for ask in asked if ask.silo in unfit):
            yield Report(ask.silo, round_of(ask), b"", Receipt(ask.silo, round_of(ask), failure=unfit[ask.silo]))
        for ask in (ask for ask in asks if ask.silo in gone):
            do = "It is asked again when it is back."
            yield failed(ask.silo, round_of(ask), SiloError("a silo that is connected", "one that is not", do))

    def _introduce(self, silos: Sequence[str]) -> dict[str, str]:
        """Why silos cannot be asked for work, of those that cannot."""
        unfit: dict[str, str] = {}
        strangers = [hello(silo, self.signed) for silo in silos if silo not in self._met]
        for asks in (strangers, [Ask(AGREE, silo, b"") for silo in silos]):
            reports = self.engine.ask([ask for ask in asks if ask.silo not in unfit])
            unfit |= {report.silo: report.receipt.failure for report in reports if report.receipt.failure}
            self._met |= {ask.silo for ask in asks} - set(unfit)
        self._told |= set(silos) - set(unfit)
        return unfit


def hello(silo: str, signed: Signed) -> Ask:
    """Brings a silo the signatures that are known, and asks for its own."""
    return Ask(HELLO, silo, b"", mail=signed.packed())


@dataclass
class _Patience:
    """How long a run waits for others, in looks that grow rarer. `what`: it waits for, in words."""

    seconds: float
    what: str = "enough silos"
    spent: float = 0.0
    pause: float = LOOK_S

    def until(self, holds: Callable[[], bool], why: str) -> Iterator[Event]:
        """Waits, at least once, and then until something holds. Raises `RunError` when patience is at its end."""
        yield Event("waiting", why)
        while True:
            if self.spent >= self.seconds:
                do = "Mend what is missing, and go on with `foedus resume`: nothing of the run is lost."
                raise RunError(f"{self.what} within {self.seconds:g} s", why, do)
            time.sleep(min(self.pause, self.seconds))
            self.spent, self.pause = self.spent + self.pause, min(2 * self.pause, LONGEST_LOOK_S)
            if holds():
                return


def _with_signatures(home: FederationHome, signed: Signed, line: Line) -> Generator[Event, None, Signed]:
    """Asks for the signatures that are missing of whoever is connected, until all are there; the treaty with them."""
    remote = _greeter(home, signed, line)
    until, told = time.monotonic() + home.settings.patience_s, ""
    total, pause = len(signed.roster), 0.1
    while not signed.binding:
        asked = [hello(silo, signed) for silo in signed.missing if silo in line.silos()]
        before, refused = set(signed.missing), {}
        for report in remote.ask(asked):
            try:
                signed = signed.merged(treaties.unpack(report.mail)) if report.mail else signed
                refused |= {report.silo: report.receipt.failure} if report.receipt.failure else {}
            except FoedusError as error:
                refused[report.silo] = str(error)
        came = sorted(before - set(signed.missing))
        if came:
            treaties.save(signed, treaties.place(home.treaties, signed.digest))
        for ready, silo in enumerate(came, start=total - len(before) + 1):
            yield Event("silo", silo, ready, total)
        if signed.binding:
            break
        why = f"no signature of {', '.join(signed.missing)} under {signed.name} yet"
        why += "".join(f"; {silo} says: {said[:MOST_WORDS]}" for silo, said in sorted(refused.items()))
        if why != told:
            yield Event("waiting", told := why)
        if time.monotonic() >= until:
            do = "Ask their operators, or collect the files with `foedus treaty collect`; then `foedus resume`."
            raise RunError("a treaty that all its parties signed", why, do)
        time.sleep(pause)
        pause = min(1.5 * pause, 10.0)
    return signed


def _part(home: FederationHome, signed: Signed, line: Line) -> None:
    """Tells the silos that are here that the run has ended: none of it will be asked again. Whoever does not hear it
    keeps its last answers; a run that has ended says so again when it is resumed.
    """
    with suppress(FoedusError):
        list(_greeter(home, signed, line).ask([Ask(BYE, silo, b"") for silo in signed.roster if silo in line.silos()]))


def _greeter(home: FederationHome, signed: Signed, line: Line) -> Remote:
    """What carries asks that nobody works for."""
    seal = Seal(home.identity(), signed, home.numbers(signed.digest), home.open_ledger())
    return Remote(line, seal, deadline_s=HELLO_S, retries=2, backoff_s=home.settings.backoff_s)


def _agreed(home: FederationHome, digest: str) -> Signed:
    """The treaty with this digest, as it was proposed."""
    found = treaties.found(home.treaties, digest)
    if found is None:
        do = "Propose it first: `foedus treaty propose TREATY`. Whatever is changed in it makes another one."
        raise RunError("a treaty that was proposed", digest[:12], do, where=str(home.path))
    return found


def _short(error: CohortError) -> str:
    return f"expected {error.expected}; got {error.came}"[:500]


@dataclass
class _Said:
    """Keeps `run.json` of the home: the state of the run, its round, and why it does not go on."""

    home: FederationHome
    folder: RunFolder
    signed: Signed
    known: dict[str, Any] = field(default_factory=dict)

    def __enter__(self) -> _Said:
        rounds = self.signed.treaty.algorithm.rounds
        self._write(name=self.folder.path.name, pid=os.getpid(), state="running", round=0, rounds=rounds, why="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self.known["state"] != "done":
            why = str(error) if isinstance(error, FoedusError) else kind.__name__ if kind else "it was stopped"
            self._write(state="stopped", why=why[:1000])

    def say(self, event: Event) -> None:
        if event.kind == "waiting":
            self._write(state="waiting", why=event.phase)
        elif event.kind in ("begin", "round") and event.phase == "federated":
            self._write(state="running", round=event.round, why="")
        elif event.kind == "done":
            self._write(state="done", why="")

    def _write(self, **facts: Any) -> None:
        self.known |= facts
        write_whole(self.home.path / RUN, (json.dumps(self.known, indent=2) + "\n").encode())
