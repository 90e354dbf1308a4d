"""Homes on disk: made once, for their owner's eyes only; who knows whom by which key."""

from __future__ import annotations

import json
import os
import stat

import pytest

from foedus.deploy import certificates
from foedus.deploy.home import (
    FederationHome,
    Settings,
    SiloHome,
    SiloSettings,
    invitation_bytes,
    read_card,
    read_invitation,
)
from foedus.errors import GuaranteeError, RunError
from foedus.governance import verify
from foedus.governance.vault import is_sealed
from foedus.treaty import charter


@pytest.fixture
def coordinator(tmp_path):
    return FederationHome.create(tmp_path / "federation", Settings("tests", "fed.example:9443"))


def silo(folder, name="hospital-a", **more):
    return SiloHome.create(folder / name, SiloSettings(name, **more))


def test_whatever_holds_a_secret_is_for_its_owner_only(tmp_path, coordinator):
    made = silo(tmp_path)
    for home in (coordinator, made):
        assert stat.S_IMODE(home.path.stat().st_mode) == 0o700
        for key in home.path.rglob("*.key"):
            assert stat.S_IMODE(key.stat().st_mode) == 0o600, key
    assert made.identity().public == made.public != coordinator.public


def test_a_home_is_found_again_and_says_what_it_was_told(tmp_path, coordinator):
    again = FederationHome.at(coordinator.path)
    assert again.settings == coordinator.settings == Settings("tests", "fed.example:9443")
    assert again.settings.listen == "0.0.0.0:9443" and Settings("x", "127.0.0.1:1").listen == "127.0.0.1:1"
    assert SiloHome.at(silo(tmp_path, threads=2).path).settings == SiloSettings("hospital-a", threads=2)


def test_nothing_is_written_over_and_nothing_is_found_where_nothing_is(tmp_path, coordinator):
    for make in (
        lambda: FederationHome.create(coordinator.path, coordinator.settings),
        lambda: silo(tmp_path, "federation"),
    ):
        with pytest.raises(RunError, match="already there"):
            make()
    for kind in (FederationHome, SiloHome):
        with pytest.raises(RunError, match="Make one with"):
            kind.at(tmp_path)


@pytest.mark.parametrize("line, said", [
    ("nam = 'x'", 'Did you mean "name"'), ("retries = '8'", "retries as int"), ("deadline_s = -1", "deadline_s > 0"),
    ("x =", "as TOML"),
])  # fmt: skip
def test_a_mistake_in_its_own_file_is_told_with_what_to_do(coordinator, line, said):
    kept = [old for old in coordinator.file.read_text().splitlines() if old.split()[0] != line.split()[0]]
    coordinator.file.write_text("\n".join([*kept, line]))
    with pytest.raises(RunError, match=said):
        _ = coordinator.settings


def test_keys_are_sealed_where_the_home_says_by_whose_key(tmp_path, monkeypatch):
    monkeypatch.setenv("FOEDUS_KEY", "ab" * 32)
    made = silo(tmp_path, key="env")
    public = made.identity().public
    monkeypatch.delenv("FOEDUS_KEY")
    for sealed in (made.identity, lambda: made.node):
        with pytest.raises(GuaranteeError, match="key"):
            sealed()
    assert made.public == public


def test_the_nodes_and_the_authoritys_keys_lie_sealed_and_those_from_before_the_vault_still_open(tmp_path, monkeypatch):
    monkeypatch.setenv("FOEDUS_KEY", "ab" * 32)
    home = FederationHome.create(tmp_path / "sealed", Settings("sealed", "fed.example:9443", key="env"))
    for key, sealed in (
        (silo(tmp_path, key="env").keys / "node.key", True), (home.tls / "ca.key", True),
        (home.tls / "server.key", False),
    ):  # fmt: skip
        assert is_sealed(key) == sealed == (b"PRIVATE KEY" not in key.read_bytes())
    assert SiloHome.at(tmp_path / "hospital-a").node.startswith(b"-----BEGIN PRIVATE KEY")
    certificates.rotate(home.tls, vault=home.vault())
    older = silo(tmp_path, "hospital-b")
    older.file.write_text(older.file.read_text().replace('key = ""', 'key = "env"'))
    assert older.vault() and older.node.startswith(b"-----BEGIN PRIVATE KEY")


def test_a_nodes_key_that_was_swapped_is_noticed(tmp_path):
    made = silo(tmp_path)
    (made.keys / "node.key").write_bytes(certificates.node_key()[0])
    with pytest.raises(RunError, match=r"that node\.pub belongs to"):
        made.node  # noqa: B018


def test_a_silo_joins_by_an_invitation_and_is_admitted_by_its_card(tmp_path, coordinator):
    made = silo(tmp_path)
    coordinator.admit(read_card(made.card))
    coordinator.admit(read_card(made.card))  # twice is once
    (tmp_path / "invitation.json").write_bytes(invitation_bytes(coordinator.invitation()))
    made.join(read_invitation(tmp_path / "invitation.json"))
    assert made.joined == coordinator.public and made.settings.coordinator == "fed.example:9443"
    assert SiloHome.at(made.path).name == "hospital-a" and made.invitation.authority.startswith("-----BEGIN CERT")
    assert [card.key for card in coordinator.cards().values()] == [made.public.hex()]
    assert [r["kind"] for r in verify(coordinator.ledger)][1:] == ["founded", "admitted"]
    assert charter.load(made.charter).models == {}


def test_a_card_or_an_invitation_that_was_changed_on_the_way_is_refused(tmp_path, coordinator):
    made = silo(tmp_path)
    for path, field, blob in (
        (tmp_path / "card.json", "node", made.card.read_bytes()),
        (tmp_path / "invitation.json", "address", invitation_bytes(coordinator.invitation())),
    ):
        read = read_card if path.name == "card.json" else read_invitation
        path.write_text(json.dumps({**json.loads(blob), field: "evil.example:1"}))
        with pytest.raises(RunError, match="one that it did not sign"):
            read(path)
        path.write_text(json.dumps({**json.loads(blob), "signature": ""}))
        with pytest.raises(RunError, match="one that it did not sign"):
            read(path)


def test_no_two_silos_share_a_name_or_a_key_and_a_revoked_node_stays_out(tmp_path, coordinator):
    made, other = silo(tmp_path), silo(tmp_path / "elsewhere")
    coordinator.admit(read_card(made.card))
    with pytest.raises(RunError, match="Revoke hospital-a first"):
        coordinator.admit(read_card(other.card))
    with pytest.raises(RunError, match='Did you mean "hospital-a"'):
        coordinator.revoke("hospital-b")
    coordinator.revoke("hospital-a")
    assert not coordinator.cards() and set(coordinator.cards(revoked=True)) == {"hospital-a"}
    with pytest.raises(RunError, match="was not revoked"):
        coordinator.admit(read_card(made.card))
    coordinator.admit(read_card(other.card))
    assert coordinator.cards()["hospital-a"].key == other.public.hex()


def test_a_silo_is_in_one_federation(tmp_path, coordinator):
    made = silo(tmp_path)
    made.join(coordinator.invitation())
    other = FederationHome.create(tmp_path / "other", Settings("other", "127.0.0.1:2"))
    with pytest.raises(RunError, match="an invitation to tests"):
        made.join(other.invitation())


def test_a_status_counts_only_while_its_process_lives(tmp_path, coordinator):
    assert coordinator.read_status() == {}
    for pid, alive in ((os.getpid(), True), (2**22 + 1, False)):
        coordinator.status.write_text(json.dumps({"pid": pid}))
        assert bool(coordinator.read_status()) == alive
