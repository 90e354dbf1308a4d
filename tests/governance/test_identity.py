"""Identities on disk: drawn once, read by their owner alone, sealed where there is a vault."""

from __future__ import annotations

import os

import pytest

from foedus.errors import GuaranteeError, RunError
from foedus.governance import identity
from foedus.governance.vault import FromFile, Vault, fresh_key_file
from foedus.secure.keys import verify


def test_an_identity_signs_as_before_after_a_restart(tmp_path):
    made = identity.create(tmp_path, "silo")
    again = identity.load(tmp_path, "silo")
    assert again.public == made.public == identity.public_of(tmp_path, "silo")
    assert verify(made.public, again.sign(b"x"), b"x")
    assert (tmp_path / "silo.key").stat().st_mode & 0o777 == 0o600


def test_an_identity_is_never_drawn_over_another(tmp_path):
    made = identity.create(tmp_path, "silo")
    with pytest.raises(RunError, match="already there"):
        identity.create(tmp_path, "silo")
    assert identity.load(tmp_path, "silo").public == made.public


def test_a_key_that_others_may_read_is_not_used(tmp_path):
    identity.create(tmp_path, "silo")
    (tmp_path / "silo.key").chmod(0o640)
    with pytest.raises(GuaranteeError, match="chmod 600"):
        identity.load(tmp_path, "silo")


def test_a_key_whose_public_half_was_replaced_is_not_used(tmp_path):
    identity.create(tmp_path, "silo")
    identity.create(tmp_path, "other")
    os.replace(tmp_path / "other.pub", tmp_path / "silo.pub")
    with pytest.raises(GuaranteeError, match="public half"):
        identity.load(tmp_path, "silo")


def test_a_sealed_key_shows_nothing_of_itself_and_opens_with_its_vault_alone(tmp_path):
    vault = Vault.open(tmp_path / "home", FromFile(fresh_key_file(tmp_path / "key")))
    made = identity.create(tmp_path / "home", "silo", vault)
    assert made.secret not in (tmp_path / "home/silo.key").read_bytes() and identity.sealed(tmp_path / "home", "silo")
    assert identity.load(tmp_path / "home", "silo", vault).public == made.public
    with pytest.raises(GuaranteeError, match="FOEDUS_KEY"):
        identity.load(tmp_path / "home", "silo")
    os.rename(tmp_path / "home/silo.key", tmp_path / "home/coordinator.key")
    os.rename(tmp_path / "home/silo.pub", tmp_path / "home/coordinator.pub")
    with pytest.raises(Exception, match="(?i)another|name|seal"):
        identity.load(tmp_path / "home", "coordinator", vault)


@pytest.mark.parametrize("content", [b"", b"foedus key 1 plain\n", b"x" * 60, b"foedus key 1 plain\n" + b"x" * 33])
def test_a_damaged_key_is_no_key(tmp_path, content):
    identity.create(tmp_path, "silo")
    (tmp_path / "silo.key").write_bytes(content)
    with pytest.raises(GuaranteeError, match="as it was written"):
        identity.load(tmp_path, "silo")


@pytest.mark.parametrize("words", ["", "ab", "AB" * 32, "zz" * 32, "ab" * 33, " " + "ab" * 32])
def test_a_public_key_has_one_spelling(words):
    with pytest.raises(GuaranteeError, match="64 hexadecimal digits"):
        identity.key_from(words)
    assert identity.key_from("ab" * 32) == bytes.fromhex("ab" * 32)


def test_a_fingerprint_is_short_and_of_the_key():
    assert identity.fingerprint(bytes(32)) == "6668 7aad f862 bd77 6c8f"
    assert identity.fingerprint(bytes(31) + b"\x01") != identity.fingerprint(bytes(32))
