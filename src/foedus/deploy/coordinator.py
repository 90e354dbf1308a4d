"""`foedus coordinator up` and `foedus status`: the process that keeps a federation reachable, and how things stand.

It holds no model and no data. Runs are processes of their own (`run.py`), which reach silos through its SuperLink, and
neither depends on the other's life.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from ..errors import FoedusError
from . import certificates
from .home import FederationHome, Settings
from .resident import Page, Told, resident, shown, stopping

log = logging.getLogger("foedus.coordinator")
LOOK_S = 1.0
"""How often it looks after the SuperLink."""
LONGEST_PAUSE_S = 60.0
RUN = "run.json"
"""What the run that goes on, or went on last, says of itself."""


# ---- the resident process ----


def up(home: FederationHome, told: Told = log.info, page: Page | None = None) -> None:
    """Keeps a federation reachable until it is told to stop. `told`: gets a line for what an operator may want to see;
    `page`: makes the dashboard of a home, if it shall have one.

    Raises `RunError` where it is up already, and where the SuperLink cannot start.
    """
    stop, settings = stopping(), home.settings
    with ExitStack() as ends:
        status = ends.enter_context(resident(home.path, home.status, {"role": "coordinator", "name": settings.name}))
        watch = ends.enter_context(_Watch(home, settings, status, told))
        if page is not None and settings.dashboard:
            told(f"Dashboard: {ends.enter_context(shown(page(home.path), settings.dashboard, status))}")
        for warning in certificates.warnings(home.tls):
            told(warning)
        while not stop.wait(LOOK_S):
            watch.look()


@dataclass
class _Watch:
    """The SuperLink, started, started again when it dies or its certificate is another, with the members of now."""

    home: FederationHome
    settings: Settings
    status: Callable[..., None]
    told: Told
    link: Any = None
    restarts: int = -1
    certificate: float = 0.0
    members: Mapping[str, str] = field(default_factory=dict)
    pause: float = LOOK_S
    due: float = 0.0

    def __enter__(self) -> _Watch:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.link is not None:
            self.link.stop()

    def look(self) -> None:
        """One look: mends what is not as it should be, and says how things are. Never raises for the SuperLink."""
        try:
            if not self.link.alive or self._changed() != self.certificate:
                self._again()
            self._admit()
            self._say()
        except FoedusError as error:
            log.error("%s", error)

    def _again(self) -> None:
        if time.monotonic() < self.due:
            return
        why = "its certificate is another" if self.link.alive else "it ended"
        self.told(f"The SuperLink is started again: {why}.")
        self.due, self.pause = time.monotonic() + self.pause, min(2 * self.pause, LONGEST_PAUSE_S)
        self.link.stop()
        self._start()
        self.pause = LOOK_S

    def _start(self) -> None:
        from ..engines import flower  # a library that only deployments have

        self.certificate, self.members = self._changed(), {}
        tls = self.home.tls
        self.link = flower.SuperLink(
            self.home.flower, self.settings.listen, certificate=tls / "server.crt", key=tls / "server.key"
        )
        self.restarts += 1
        self._admit()
        self._say()
        self.told(f"The SuperLink listens at {self.settings.listen}; silos reach it at {self.settings.address}.")

    def _admit(self) -> None:
        """Lets in the nodes of the members, and nobody else's."""
        from ..engines import flower

        members = {name: card.node for name, card in self.home.cards().items()}
        if members != self.members:
            flower.admit(self.link.socket, members)
            self.members = members

    def _say(self) -> None:
        from ..engines import flower

        nodes = flower.nodes(self.link.socket)
        self.status(
            superlink={
                "pid": self.link.pid, "address": self.settings.listen, "alive": self.link.alive,
                "restarts": self.restarts,
            },
            silos={
                name: {"connected": name in nodes and nodes[name].online,
                       "since": (nodes[name].since or None) if name in nodes else None}
                for name in self.members
            },
            run=running(self.home),
        )  # fmt: skip

    def _changed(self) -> float:
        return (self.home.tls / "server.crt").stat().st_mtime


def running(home: FederationHome) -> dict[str, Any] | None:
    """What the last run says of itself; one whose process is gone has stopped. None where there was none."""
    try:
        known = json.loads((home.path / RUN).read_bytes())
        if known["state"] in ("running", "waiting"):
            os.kill(known["pid"], 0)
    except ProcessLookupError:
        known |= {"state": "stopped", "why": "its process ended"}
    except PermissionError:
        pass
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return {name: known[name] for name in ("name", "state", "round", "rounds", "why")}


# ---- status ----


def status(home: FederationHome, now: datetime | None = None) -> dict[str, Any]:
    """Everything that an operator asks about a federation: who is connected, which treaties wait for whose signatures,
    how runs stand and what they cost, what alarms fire, and which certificates are about to expire.
    """
    from ..dashboard import CoordinatorView

    resident, look = home.read_status(), CoordinatorView(home.path).look()
    silos = resident.get("silos", {})
    return {
        "federation": home.settings.name,
        "up": bool(resident),
        "superlink": resident.get("superlink"),
        "silos": {
            name: {"connected": bool(silos.get(name, {}).get("connected")), "since": silos.get(name, {}).get("since"),
                   "fingerprint": card.fingerprint}
            for name, card in home.cards().items()
        },
        "revoked": sorted(home.cards(revoked=True)),
        "treaties": [
            {"name": one.name, "digest": one.digest, "binding": one.binding, "silos": len(one.roster),
             "signatures": len(one.signatures), "missing": list(one.missing)}
            for one in home.signed()
        ],
        "run": running(home),
        "runs": [_run(run) for run in look.runs],
        "alarms": [{"name": alarm.name, "about": alarm.about, "said": alarm.said} for alarm in look.alarms],
        "certificates": {
            "expire": {kind: f"{end:%Y-%m-%d}" for kind, end in certificates.expiry(home.tls).items()},
            "warnings": certificates.warnings(home.tls, now or datetime.now(UTC)),
        },
        "ledger": {"records": look.ledger_records, "verified": look.ledger_fits, "said": look.ledger_said},
    }  # fmt: skip


def _run(run: Any) -> dict[str, Any]:
    epsilon = run.privacy.spent if run.privacy is not None else None
    return {"name": run.name, "round": run.done, "rounds": run.planned, "ended": run.ended, "epsilon": epsilon}
