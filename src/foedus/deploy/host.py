"""`foedus silo up`: a silo's resident process.

    Flower's node ─bytes─▶ Guard ─Ask─▶ engine of that treaty: model, data and keys, loaded once, at the first ask

It holds one engine for each treaty that it works under, and writes into its own home only. Everything that must outlive
it lies there (counters, out-trays, journals, budgets, ledger), so it may be killed at any moment: started again, it
goes on where it was. It ends when it is told to (SIGTERM, Ctrl-C) and its answer at work is sent; told twice, at once.
"""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import FoedusError, RunError, SiloError
from ..governance.circle import Circle
from ..governance.identity import sealed
from ..governance.ledger import Ledger
from ..secure.keys import Identity
from ..treaty import charter
from ..treaty.signed import Signed
from ..worker import engine_at, place_of
from .guard import Guard, Work, work_of
from .home import SiloHome
from .resident import Page, Told, resident, shown, stopping

log = logging.getLogger("foedus.host")
SIGNED, LOADING, READY, FAILED = "signed", "loading", "ready", "failed"
MOST_LOADED = 2
"""Treaties whose models are held; one that is asked for again after two others is loaded anew."""
FLUSH_S = 60.0
"""How often counts of refusals are brought up to date in the ledger."""


@dataclass
class Host:
    """A silo at work. `examples`: its own, as `build` takes them; None where each treaty's source has its share.

    Raises `RunError` for a home that has not joined a federation, and what opening its ledger and identity raises.
    """

    home: SiloHome
    examples: Any = None
    status: Callable[[dict[str, Any]], None] = lambda _: None
    name: str = field(init=False)
    identity: Identity = field(init=False, repr=False)
    ledger: Ledger = field(init=False, repr=False)
    guard: Guard = field(init=False, repr=False)
    _works: dict[str, Work] = field(default_factory=dict, init=False, repr=False)
    _states: dict[str, dict[str, str]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.home.joined:
            do = "Ask the coordinator for its invitation, and take it with `foedus silo join invitation.json`."
            raise RunError("a silo that joined a federation", "one that has not", do, where=str(self.home.path))
        self.name, self.identity, self.ledger = self.home.name, self.home.identity(), self.home.open_ledger()
        charter.load(self.home.charter)  # so that a mistake in it is heard of now
        self.guard = Guard(self.name, self.identity, self.home, self.home.joined, self.ledger, self.work)
        self._say()

    def work(self, signed: Signed) -> Work:
        """What works under this treaty; the first time, it is loaded. Of what went wrong then the coordinator learns
        nothing but that it did.
        """
        if signed.digest not in self._works:
            self._say(signed, LOADING)
            try:
                self._works[signed.digest] = self._loaded(signed)
            except Exception as error:
                why = str(error) if isinstance(error, FoedusError) else type(error).__name__
                log.error("%s: %s\n%s", signed.name, why, "".join(traceback.format_tb(error.__traceback__)).rstrip())
                self._say(signed, FAILED, why)
                do = "Its operator's log says why; it tries again when it is asked again."
                raise SiloError("a silo with the model and the data of the treaty", "one without", do) from error
            self._say(signed, READY)
        work = self._works[signed.digest] = self._works.pop(signed.digest)  # the latest last
        for other in list(self._works)[:-MOST_LOADED]:
            del self._works[other]
        return work

    def _loaded(self, signed: Signed) -> Work:
        folder = self.home.work(signed.digest)
        folder.mkdir(parents=True, exist_ok=True)
        treaty = replace(signed.treaty, folder=self.home.path)
        circle = Circle(signed.roster, {self.name: self.identity}, signed.coordinator)
        place = place_of(treaty, self.name, self.home.settings.threads, examples=self.examples, circle=circle)
        engine = engine_at(place, self.name, folder, budgets=self.home.budgets, vault=self.home.vault())
        return work_of(engine, place.agreed())

    def _say(self, signed: Signed | None = None, state: str = SIGNED, why: str = "") -> None:
        if signed is not None:
            self._states[signed.digest[:12]] = {"name": signed.name, "state": state, "why": why}
        known = {
            one.digest[:12]: {"name": one.name, "state": SIGNED, "why": ""}
            for one in self.home.signed() if self.name in one.signatures
        }  # fmt: skip
        self.status({"treaties": {**known, **self._states}})


def up(home: SiloHome, examples: Any = None, told: Told = log.info, page: Page | None = None) -> None:
    """Serves a silo until it is told to stop. `told`: gets a line for whatever an operator may want to see; `page`:
    makes the dashboard of a home, if it shall have one.

    Raises what `Host` raises, and `RunError` where this silo is up already.
    """
    from ..engines import flower  # a library that only deployments have

    stop = stopping()
    invitation = home.invitation
    with ExitStack() as ends:
        status = ends.enter_context(resident(home.path, home.status, {"role": "silo", "name": home.name}))
        settings = home.settings
        status(coordinator=settings.coordinator, connected=False,
               keys="vault" if sealed(home.keys, home.OWNER) else "plain")  # fmt: skip
        host = Host(home, examples, lambda facts: status(**facts))
        assert invitation is not None
        if page is not None and settings.dashboard:
            told(f"Dashboard: {ends.enter_context(shown(page(home.path), settings.dashboard, status))}")
        ends.callback(host.guard.close)
        flushing = threading.Thread(target=_flush, args=(host.guard, stop), daemon=True)
        flushing.start()

        last = ""

        def heard(state: str) -> None:
            nonlocal last
            if state != last:
                last = state
                status(connected=state == "connected")
                told(f"{invitation.federation} at {settings.coordinator}: {state}")

        flower.serve(settings.coordinator, invitation.authority.encode(), home.node, host.guard,
                     memory=home.flower, stop=stop, told=heard)  # fmt: skip


def _flush(guard: Guard, stop: threading.Event) -> None:
    while not stop.wait(FLUSH_S):
        try:
            guard.flush()
        except FoedusError as error:
            log.error("%s", error)
