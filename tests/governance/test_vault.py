"""The vault: what it sealed, only its key opens, only in its place, and only whole."""

import itertools
import os
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus.errors import GuaranteeError, RunError, WireError
from foedus.governance import RunFolder, Tray, vault
from foedus.governance.vault import (
    CHUNK,
    HEADER,
    TAG,
    FromEnvironment,
    FromFile,
    FromKeyring,
    FromPassphrase,
    Key,
    Vault,
    fresh_key_file,
    is_sealed,
    source_of,
)
from foedus.types import Receipt, Report, State


@pytest.fixture
def source(tmp_path):
    return FromFile(fresh_key_file(tmp_path / "outside" / "vault.key"))


@pytest.fixture
def home(tmp_path, source):
    return Vault.open(tmp_path / "home", source)


@pytest.fixture
def cheap_scrypt(monkeypatch):
    monkeypatch.setattr(vault, "SCRYPT", {"n": 1 << 4, "r": 8, "p": 1})


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 77])
def test_what_was_sealed_is_opened(home, size):
    data = os.urandom(size)
    blob = home.seal(data, "a purpose")
    assert home.unseal(blob, "a purpose") == data
    path = home.write(home.folder / "deep" / "file", data)
    assert home.read(path) == data and path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_size == HEADER + size + TAG * max(1, -(-size // CHUNK))


def test_equal_data_sealed_twice_looks_different_and_shows_nothing(home):
    data = b"patient 17 has a fever" * 100
    one, other = home.seal(data, "p"), home.seal(data, "p")
    assert one != other and b"fever" not in one + other
    assert one[HEADER : HEADER + 64] != other[HEADER : HEADER + 64]


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_blob_that_was_changed_anywhere_is_refused(at, flip):
    mine = Vault(folder=None, own=Key(bytes(32)))
    blob = bytearray(mine.seal(bytes(200), "p"))
    blob[at % len(blob)] ^= flip
    with pytest.raises((WireError, GuaranteeError)):
        mine.unseal(bytes(blob), "p")


def test_chunks_cannot_be_cut_off_swapped_repeated_or_added(home):
    blob = home.seal(os.urandom(3 * CHUNK), "p")
    header, step = blob[:HEADER], CHUNK + TAG
    chunks = [blob[HEADER + i * step : HEADER + (i + 1) * step] for i in range(3)]
    for order in [*itertools.permutations(range(3)), (0, 1), (0, 2), (0,), (), (0, 1, 2, 2), (0, 0, 1, 2)]:
        if order != (0, 1, 2):
            with pytest.raises(WireError):
                home.unseal(header + b"".join(chunks[i] for i in order), "p")


def test_a_file_opens_only_under_its_own_name(home):
    one, other = home.write(home.folder / "one", b"1"), home.write(home.folder / "other", b"2")
    one.rename(home.folder / "kept")
    other.rename(one)
    with pytest.raises(WireError, match="sealed for 'one'.*belong to another name"):
        home.read(one)
    with pytest.raises(WireError):
        home.unseal(home.seal(b"x", "identity"), "checkpoint")


def test_a_folder_may_be_moved_as_a_whole(home, source, tmp_path):
    home.write(home.folder / "runs" / "one", b"1")
    home.folder.rename(tmp_path / "elsewhere")
    assert Vault.open(tmp_path / "elsewhere", source).read(tmp_path / "elsewhere" / "runs" / "one") == b"1"


def test_a_file_outside_the_folder_is_refused(home, tmp_path):
    with pytest.raises(GuaranteeError, match="inside the vault's folder"):
        home.write(tmp_path / "file", b"")


def test_a_wrong_key_is_refused_by_name_before_anything_is_touched(home, tmp_path):
    home.write(home.folder / "file", b"data")
    before = {path: path.read_bytes() for path in home.folder.rglob("*") if path.is_file()}
    other = FromFile(fresh_key_file(tmp_path / "other.key"))
    with pytest.raises(GuaranteeError, match=f"the key {home.own.id}, which sealed .*got the key"):
        Vault.open(home.folder, other)
    with pytest.raises(GuaranteeError, match=f"the key {home.own.id}"):
        Vault(home.folder, other.key(home.folder)).read(home.folder / "file")
    assert before == {path: path.read_bytes() for path in home.folder.rglob("*") if path.is_file()}


def test_a_plain_file_is_not_taken_for_a_sealed_one(home):
    (home.folder / "file").write_bytes(b"planted")
    with pytest.raises(WireError, match="no vault sealed"):
        home.read(home.folder / "file")
    home.take_in(home.folder / "file")
    assert home.read(home.folder / "file") == b"planted" and is_sealed(home.folder / "file")
    assert home.take_in(home.folder / "file").read_bytes() == (home.folder / "file").read_bytes()


def test_a_key_comes_from_a_file_the_environment_or_a_passphrase(tmp_path, monkeypatch, cheap_scrypt):
    text = "ab" * 32
    (tmp_path / "key").write_text(text + "\n")
    (tmp_path / "key").chmod(0o600)
    monkeypatch.setenv("FOEDUS_KEY", text)
    here = tmp_path / "v"
    assert FromFile(tmp_path / "key").key(here).id == FromEnvironment().key(here).id == Key(b"\xab" * 32).id
    first = FromPassphrase(lambda: "five words nobody says together").key(here)
    assert first.id == FromPassphrase(lambda: "five words nobody says together").key(here).id
    assert first.id != FromPassphrase(lambda: "five words nobody says together").key(tmp_path / "w").id
    Vault.open(here, FromPassphrase(lambda: "five words nobody says together"))
    with pytest.raises(GuaranteeError, match="which sealed"):
        Vault.open(here, FromPassphrase(lambda: "another"))


def test_a_key_comes_from_the_systems_keyring_and_is_drawn_there_once(tmp_path):
    keyring = pytest.importorskip("keyring")
    from keyring.backend import KeyringBackend

    class InMemory(KeyringBackend):
        priority = 1

        def __init__(self):
            self.held = {}

        def get_password(self, service, username):
            return self.held.get((service, username))

        def set_password(self, service, username, password):
            self.held[service, username] = password

    before = keyring.get_keyring()
    keyring.set_keyring(InMemory())
    try:
        source = FromKeyring("foedus", "hospital-a")
        sealed = Vault.open(tmp_path / "v", source).seal(b"x", "p")
        assert Vault.open(tmp_path / "v", source).unseal(sealed, "p") == b"x"
        keyring.set_keyring(InMemory())  # another account
        with pytest.raises(GuaranteeError, match="in the keyring"):
            Vault.open(tmp_path / "v", source)
    finally:
        keyring.set_keyring(before)


@pytest.mark.parametrize(("text", "mode", "why"), [
    ("ab" * 32, 0o644, "others may use"),
    ("not hexadecimal", 0o600, "64 hexadecimal digits"),
    ("ab" * 16, 0o600, "64 hexadecimal digits"),
    (None, 0o600, "a key in"),
])  # fmt: skip
def test_a_key_file_that_is_none_is_refused_without_being_shown(tmp_path, text, mode, why):
    if text is not None:
        (tmp_path / "key").write_text(text)
        (tmp_path / "key").chmod(mode)
    with pytest.raises(GuaranteeError, match=why) as error:
        FromFile(tmp_path / "key").key(tmp_path)
    assert text is None or text not in str(error.value)


def test_a_source_is_named_by_a_word_in_a_setting(tmp_path, monkeypatch):
    monkeypatch.delenv("FOEDUS_KEY", raising=False)
    assert source_of("env") == FromEnvironment() and source_of("env:MINE") == FromEnvironment("MINE")
    assert source_of(f"file:{tmp_path}/k") == FromFile(tmp_path / "k")
    assert source_of("keyring:foedus/a") == FromKeyring("foedus", "a")
    assert source_of("passphrase", lambda: "x").key(tmp_path)
    for bad in ("passphrase", "file:", "ab" * 32, "vault"):
        with pytest.raises(GuaranteeError, match="a source of a key"):
            source_of(bad)
    with pytest.raises(GuaranteeError, match="FOEDUS_KEY"):
        source_of("env").key(tmp_path)


def test_a_key_is_never_written_over_printed_or_pickled(source, home):
    import pickle

    with pytest.raises(GuaranteeError, match="no file at"):
        fresh_key_file(source.path)
    secret = source.path.read_text().strip()
    assert secret not in repr(home) + repr(home.own) + repr(source) + (home.folder / "vault.json").read_text()
    for value in (home, home.own):
        with pytest.raises(GuaranteeError):
            pickle.dumps(value)


def test_rotation_reseals_everything_and_the_older_key_opens_nothing_more(home, source, tmp_path):
    for name in ("a", "deep/b", "deep/c"):
        home.write(home.folder / name, name.encode())
    (home.folder / "plain.txt").write_text("stays as it is")
    fresh = FromFile(fresh_key_file(tmp_path / "fresh.key"))
    with pytest.raises(GuaranteeError, match="which sealed"):
        Vault.open(home.folder, fresh)
    both = Vault.open(home.folder, fresh, source)
    assert both.rotate() == 3 and both.rotate() == 0
    after = Vault.open(home.folder, fresh)
    assert [after.read(home.folder / name) for name in ("a", "deep/b")] == [b"a", b"deep/b"]
    with pytest.raises(GuaranteeError, match="which sealed"):
        Vault.open(home.folder, source)
    assert (home.folder / "plain.txt").read_text() == "stays as it is"


def test_a_rotation_that_was_cut_off_goes_on(home, source, tmp_path, monkeypatch):
    for name in "abc":
        home.write(home.folder / name, name.encode())
    fresh = FromFile(fresh_key_file(tmp_path / "fresh.key"))
    real, calls = vault.write_whole, []

    def dies(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(vault, "write_whole", dies)
        Vault.open(home.folder, fresh, source).rotate()
    both = Vault.open(home.folder, fresh, source)
    assert [both.read(home.folder / name) for name in "abc"] == [b"a", b"b", b"c"]
    assert both.rotate() == 2
    assert Vault.open(home.folder, fresh).read(home.folder / "c") == b"c"


def test_a_large_file_is_sealed_and_streamed_a_chunk_at_a_time(home):
    data = bytes(16 * CHUNK)
    tracemalloc.start()
    path = home.write(home.folder / "large", data)
    size = sum(len(chunk) for chunk in home.stream(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size == len(data) and peak < 8 * CHUNK


def test_checkpoints_of_a_run_are_sealed_and_restored(tmp_path, source):
    home = Vault.open(tmp_path, source)
    folder = RunFolder.create(tmp_path / "run", "[treaty]\n", vault=home)
    for round in (1, 2):
        folder.checkpoint(
            "federated", State(round, {"w": np.full(4, round, np.float32)}), {"a": {("m", "w"): np.ones(3)}}
        )
    file = folder.path / "checkpoints/federated-00002.safetensors"
    assert is_sealed(file)
    again = RunFolder.open(folder.path, Vault.open(tmp_path, source))
    assert again.restore("federated")[0].round == 2
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(RunError, match="round 1 is whole"):
        again.restore("federated")
    with pytest.raises(GuaranteeError, match="the key that sealed"):
        RunFolder.open(folder.path).restore("federated", 1)


def test_the_out_tray_is_sealed_and_read_back(home):
    tray = Tray(home.folder / "out-tray", vault=home)
    report = Report("a", 2, b"payload", Receipt("a", 2, task="t"))
    tray.keep("task", report, {("m", "w"): np.ones(3)})
    assert is_sealed(tray.path("a", 2)) and tray.kept("a", "other") is None
    known, memory = tray.kept("a", "task")
    assert known == report and list(tray.memory("a")) == [("m", "w")] == list(memory)
    with pytest.raises(GuaranteeError, match="the key that sealed"):
        Tray(tray.folder).kept("a", "task")


def test_what_is_for_its_owner_alone_is_so_before_it_is_written_even_over_an_open_draft(tmp_path):
    draft = tmp_path / ".key.part"
    draft.touch(mode=0o644)
    seen = []

    def parts():
        seen.append(draft.stat().st_mode & 0o777)
        yield b"secret"

    vault.write_whole(tmp_path / "key", parts(), private=True)
    assert seen == [0o600] and (tmp_path / "key").stat().st_mode & 0o777 == 0o600
