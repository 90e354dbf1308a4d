"""The process that keeps a federation reachable: it starts the SuperLink again, with the members and keys of now."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from foedus.deploy import certificates
from foedus.deploy.coordinator import _Watch
from foedus.errors import RunError

from .federation import Federation
from .test_parties import SILOS

flower = pytest.importorskip("foedus.engines.flower")


class Link:
    """A SuperLink that only says what was done to it."""

    def __init__(self, folder, address, *, certificate, key) -> None:
        self.socket, self.address, self.alive, self.pid = folder / "socket", address, True, 7

    def stop(self) -> None:
        self.alive = False


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """A watch over a federation, what it told, its status, and whom it admitted."""
    admitted, said, told = [], {}, []
    monkeypatch.setattr(flower, "SuperLink", Link)
    monkeypatch.setattr(flower, "admit", lambda _, members: admitted.append(sorted(members)))
    monkeypatch.setattr(flower, "nodes", lambda _: {"north": SimpleNamespace(online=True, since="2026-11-21")})
    home = Federation(tmp_path).home
    with _Watch(home, home.settings, lambda **facts: said.update(facts), told.append) as watch:
        yield SimpleNamespace(watch=watch, home=home, said=said, told=told, admitted=admitted)
    assert not watch.link.alive


def test_who_is_connected_stands_in_the_status(watched):
    watched.watch.look()
    assert {name: silo["connected"] for name, silo in watched.said["silos"].items()} == {
        name: name == "north" for name in SILOS
    }
    assert watched.said["superlink"]["alive"] and watched.said["superlink"]["restarts"] == 0


def test_a_superlink_that_died_is_started_again_with_its_members(watched):
    first = watched.watch.link
    first.alive = False
    watched.watch.look()
    assert watched.watch.link is not first and watched.said["superlink"]["restarts"] == 1
    assert watched.admitted == [sorted(SILOS)] * 2 and any("it ended" in line for line in watched.told)


def test_one_that_cannot_be_started_is_tried_again_later_and_ends_nothing(watched, monkeypatch):
    def fails(*_, **__):
        raise RunError("a SuperLink", "none", "")

    watched.watch.link.alive = False
    monkeypatch.setattr(flower, "SuperLink", fails)
    watched.watch.look()
    tried = len(watched.told)
    watched.watch.look()  # at once: it pauses
    assert len(watched.told) == tried and watched.watch.due > 0
    watched.watch.due = 0.0
    monkeypatch.setattr(flower, "SuperLink", Link)
    watched.watch.look()
    assert watched.watch.link.alive


def test_a_revoked_silo_and_a_rotated_certificate_are_taken_without_a_restart_of_the_process(watched):
    watched.home.revoke("east")
    watched.watch.look()
    assert watched.admitted[-1] == ["north", "south"] and "east" not in watched.said["silos"]
    certificates.rotate(watched.home.tls)
    os.utime(watched.home.tls / "server.crt", (1, 1))
    watched.watch.look()
    assert watched.said["superlink"]["restarts"] == 1 and any("certificate" in line for line in watched.told)
