"""The ledger: an append-only file of JSON records, each holding the hash of the one before.

    record   {"index", "previous", "kind", "body", "hash"}; hash = SHA-256 of the canonical JSON of the rest
    signed   and "signature": the keeper's Ed25519, over the canonical JSON of index, previous, kind and body
    keeper   a record of this kind names the key that signs from it on; the next one hands over to another
    pruned   a record of this kind stands for records that were dropped: how many of each kind, and the last one's hash

A signature is part of what is hashed, and what is signed names the hash before it: so the last signature vouches for
everything above it, and opening a ledger checks that one, and the one under each change of key. A ledger without a
keeper is a chain of hashes alone: it shows damage, not forgery. It holds digests, counts, words and names of silos,
never data, and no clock of its own: redoing a round on the same machine gives the same record, which is how a resumed
run knows that it did. What two ledgers prove together is in `witness.py`.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import RunError
from ..secure.keys import Identity, spell
from ..secure.keys import verify as signed_by
from ..wire import canonical, digest
from .disk import disk, sync_folder, write_whole

ORIGIN = "0" * 64
KEEPER, PRUNED = "keeper", "pruned"
DECISIVE = frozenset({
    *(KEEPER, PRUNED, "opened", "closed", "charge", "released", "cap", "treaty", "survivors"),
    *("founded", "joined", "admitted", "revoked", "proposed", "signed", "registry"),
})  # fmt: skip
"""Kinds that are never pruned: who keeps the ledger, who took part in what, what was spent, what was opened and for
whom, and which adapters were in use."""
LONGEST = 500  # characters of a word: an error's three parts, and no more
TAIL = 512  # bytes at the end of a file that hold the last record's hash
_PURPOSE = "foedus ledger 1"

Record = dict[str, Any]


@dataclass(frozen=True)
class Head:
    """Where a ledger stands: how many records it has had, and the hash of the last.

    >>> str(Head(0, ORIGIN))[:8]
    '0:000000'
    """

    count: int
    hash: str

    def __post_init__(self) -> None:
        if self.count < 0 or len(self.hash) != 64 or set(self.hash) - set("0123456789abcdef"):
            do = "Give it as `foedus ledger show` prints it."
            raise RunError("a head: a number of records, and 64 hexadecimal digits", f"{self.count}:{self.hash}", do)

    def __str__(self) -> str:
        return f"{self.count}:{self.hash}"

    @classmethod
    def parse(cls, text: str) -> Head:
        """The inverse of `str`."""
        count, _, sha = text.partition(":")
        return cls(int(count) if count.isdecimal() else -1, sha)


@dataclass
class Chain:
    """A walk along a ledger. `key`: who signs the next record, in hexadecimal; `signers`: whose signatures it met.

    `misfit` works out a signature only where no later one vouches for the record; `unfinished` works out the last.
    """

    count: int = 0
    last: str = ORIGIN
    key: str = ""
    signers: set[str] = field(default_factory=set)
    _keys: set[str] = field(default_factory=set)
    _pruners: set[str] = field(default_factory=set)
    _open: tuple[Mapping[str, Any], bytes | None] | None = None

    def misfit(self, record: Mapping[str, Any], line: bytes | None = None) -> str:
        """Why a record does not go on here; "" when it does, and then the walk is past it. `line`: as it stands in the
        file, where there is one.
        """
        if not isinstance(record.get("body"), dict):
            return "it has no body"
        why = self._unlinked(record) or _unhashed(record, line) or self._unkept(record, line)
        if not why:
            self._follow(record, line)
        return why

    def unfinished(self) -> str:
        """Why the walk may not end here; "" when it may."""
        if self._open is not None and self.key:
            if why := self._unsigned(*self._open, self.key):
                return why
            self._open = None
        return "" if self._pruners <= self._keys else "it was pruned by somebody who never kept it"

    def _follow(self, record: Mapping[str, Any], line: bytes | None) -> None:
        kind, body = record["kind"], record["body"]
        self.count, self.last = record["index"] + 1, body["head"] if kind == PRUNED else record["hash"]
        self._open = None if kind in (KEEPER, PRUNED) else (record, line)
        if kind == KEEPER:
            self.key = body["key"]
            self._keys.add(self.key)
        if kind == PRUNED:
            self._pruners.add(body["by"])

    def _unlinked(self, record: Mapping[str, Any]) -> str:
        index = record.get("index")
        first = record["body"].get("first") if record.get("kind") == PRUNED else index
        if first != self.count or type(index) is not int or index < self.count:
            return f"its index is {index!r}"
        return "" if record.get("previous") == self.last else "it does not name the hash of the record before it"

    def _unkept(self, record: Mapping[str, Any], line: bytes | None) -> str:
        if record.get("kind") == PRUNED:
            whole = isinstance(record["body"].get("head"), str)
            return self._unsigned(record, line, record["body"].get("by")) if whole else "it names no head"
        if record.get("kind") == KEEPER:
            return self._unsigned(record, line, self.key or record["body"].get("key"))
        if "signature" in record and not self.key:
            return "it is signed, and no keeper was named before"
        return "it is not signed" if self.key and "signature" not in record else ""

    def _unsigned(self, record: Mapping[str, Any], line: bytes | None, key: Any) -> str:
        try:
            public, signature = bytes.fromhex(key), bytes.fromhex(record["signature"])
        except (ValueError, TypeError, KeyError):
            return "it has no signature"
        if not signed_by(public, signature, _content(record)) or (line is not None and line != canonical(record)):
            return "its signature is not that of its keeper"
        self.signers.add(key)
        return ""


class Ledger:
    """One ledger file. Opening it verifies it; a last line torn by a crash is dropped. Several processes may hold it
    open and append: each takes in what others wrote before it adds.

    `keeper`: who signs. Without one, only a ledger that has none can be added to. `name`: of the keeper, for readers.
    """

    def __init__(self, path: Path, keeper: Identity | None = None, name: str = "") -> None:
        self.path, self.keeper, self.name = path, keeper, name
        self._from_the_start()
        if path.exists():
            with self._held() as file:
                self._catch_up(file)

    @property
    def head(self) -> Head:
        return Head(self._chain.count, self._chain.last)

    @property
    def key(self) -> str:
        """The public key of whoever keeps it, in hexadecimal; "" for nobody."""
        return self._chain.key

    def append(self, kind: str, body: Mapping[str, Any]) -> Record:
        """Adds a record, durably; returns it. Raises `RunError` for a body that is not of digests, numbers and words,
        and for a ledger that another key keeps.
        """
        body = _plain_body(kind, body)
        with self._ready() as file:
            return self._add(file, kind, body)

    def once(self, kind: str, body: Mapping[str, Any], *, same: tuple[str, ...], free: tuple[str, ...] = ()) -> Record:
        """Adds a record unless the ledger has one of this kind that agrees on the fields `same`.

        A round that was redone after a crash must come out as it did before, but for the fields `free`; if it did not,
        the ledger keeps both, and the new one says `"redone": true`.
        """
        body = _plain_body(kind, body)

        def agrees(record: Record) -> bool:
            return record["kind"] == kind and all(record["body"].get(f) == body.get(f) for f in same)

        with self._ready() as file:
            known = next((record for record in reversed(self.records) if agrees(record)), None)
            if known is None:
                return self._add(file, kind, body)
            outcomes = [{**old_or_new, "redone": True, **dict.fromkeys(free)} for old_or_new in (known["body"], body)]
            if outcomes[0] == outcomes[1]:
                return known
            return self._add(file, kind, {**body, "redone": True})

    def hand_over(self, to: Identity) -> Record:
        """From the next record on, `to` signs; the record that says so is signed by the keeper until now."""
        with self._ready() as file:
            record = self._add(file, KEEPER, self._named(to))
            self.keeper = to
            return record

    def prune(self, keep: int) -> int:
        """Drops records before the last `keep`, but for those of a `DECISIVE` kind; returns how many. What stands for
        them is signed by the keeper, and the chain stays as verifiable as before.
        """
        with self._ready():
            if self.keeper is None:
                do = "Give the ledger a keeper first: without a signature nobody could tell pruning from damage."
                raise RunError("a ledger that somebody signs", f"{self.path.name}, which has no keeper", do)
            first = max(0, len(self.records) - max(0, keep))
            kept = [*_pruned(self.records[:first], self.keeper), *self.records[first:]]
            dropped = sum(record["kind"] not in DECISIVE for record in self.records[:first])
            if dropped:
                write_whole(self.path, (canonical(record) + b"\n" for record in kept))
        with self._held() as file:
            self._catch_up(file)
        return dropped

    # The file

    @contextmanager
    def _held(self) -> Iterator[int]:
        """The file, locked against other processes; made if there is none."""
        with disk(self.path):
            handle = _locked(self.path)
        try:
            yield handle
        finally:
            os.close(handle)

    @contextmanager
    def _ready(self) -> Iterator[int]:
        """The file at its end, with what others added taken in, and a keeper who may add to it."""
        with self._held() as file:
            self._catch_up(file)
            mine = self.keeper.public.hex() if self.keeper else ""
            if self.key not in ("", mine):
                do = "Open it with its keeper's identity, or let that one hand over to this key."
                raise RunError(f"the key that keeps {self.path.name}, {self.key[:12]}…", mine[:12] or "no key", do)
            if self.keeper and not self.key:
                self._add(file, KEEPER, self._named(self.keeper))
            yield file

    def _named(self, keeper: Identity) -> Mapping[str, Any]:
        return _plain_body("", {"key": keeper.public.hex(), **({"name": self.name} if self.name else {})})

    def _add(self, file: int, kind: str, body: Mapping[str, Any]) -> Record:
        record: Record = {"index": self._chain.count, "previous": self._chain.last, "kind": kind, "body": dict(body)}
        if self.keeper:
            record["signature"] = self.keeper.sign(_content(record)).hex()
        record["hash"] = digest(canonical(record))
        line = canonical(record) + b"\n"
        with disk(self.path):
            _write(file, line)
            if not self._at:
                sync_folder(self.path.parent)
        why = self._chain.misfit(record)
        assert not why, why
        self.records.append(record)
        self._passed(line)
        return record

    def _from_the_start(self) -> None:
        self.records: list[Record] = []
        self._chain, self._at, self._end = Chain(), 0, b""

    def _catch_up(self, file: int) -> None:
        """Takes in and verifies what the file holds beyond what is known; drops a last line that a crash tore."""
        before = self.head
        pruned = _read(file, self._at - len(self._end), self._at) != self._end
        if pruned:  # by another process; or somebody cut it off
            self._from_the_start()
        size = os.fstat(file).st_size
        if size > self._at:
            blob = _read(file, self._at, size)
            whole = blob[: blob.rfind(b"\n") + 1]
            if whole != blob:
                with disk(self.path):
                    os.ftruncate(file, self._at + len(whole))
            self.records += _walk(whole, self._chain, self.path)
            self._passed(whole)
        if pruned and (why := departs(self.records, before)):
            raise _bad("the ledger as it was a moment ago", why, self.path)

    def _passed(self, lines: bytes) -> None:
        """Remembers where the file was read to, and how it ended there."""
        self._at += len(lines)
        self._end = (self._end + lines[-TAIL:])[-TAIL:]


def verify(path: Path, *, key: str = "") -> list[Record]:
    """The records, after checking every hash, link and signature. Writes nothing. `key`: of its keeper, who must have
    signed, in hexadecimal. Raises `RunError` naming the first line that does not fit.
    """
    blob = path.read_bytes()
    if blob and not blob.endswith(b"\n"):
        raise _bad("a last line that is whole", "one that was cut off", path, len(blob.splitlines()))
    return _verified(blob, path, key)


def read(path: Path, *, key: str = "") -> list[Record]:
    """As `verify`, for a ledger that others are writing: a last line that is not whole yet is left out."""
    blob = path.read_bytes()
    return _verified(blob[: blob.rfind(b"\n") + 1], path, key)


def keepers(records: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """The keys that kept a ledger, in hexadecimal, the present one last."""
    return tuple(record["body"]["key"] for record in records if record["kind"] == KEEPER)


def head_of(records: Sequence[Mapping[str, Any]]) -> Head:
    """Where a verified ledger stands."""
    if not records:
        return Head(0, ORIGIN)
    last = records[-1]
    return Head(last["index"] + 1, last["body"]["head"] if last["kind"] == PRUNED else last["hash"])


def departs(records: Sequence[Mapping[str, Any]], head: Head) -> str:
    """Why a verified ledger is not one that stood at `head` before; "" when it is, or when nobody can tell because
    the record was pruned.
    """
    if not head.count:
        return ""
    own = head_of(records)
    if own.count < head.count:
        return f"it ends after {own.count} records, and had {head.count}: its end was cut off"
    known = next((record for record in records if record["index"] == head.count - 1), None)
    if known is None or (known["body"]["head"] if known["kind"] == PRUNED else known["hash"]) == head.hash:
        return ""
    return f"record {head.count - 1} is another than it was: there are two histories"


def _verified(blob: bytes, path: Path, key: str) -> list[Record]:
    chain = Chain()
    records = _walk(blob, chain, path)
    if key and key not in chain.signers:
        came = f"one that {chain.key[:12] + '…' if chain.key else 'nobody'} keeps"
        raise _bad(f"a ledger that was signed by {key[:12]}…", came, path)
    return records


def _walk(blob: bytes, chain: Chain, path: Path) -> list[Record]:
    """The records of whole lines, which go on from `chain`."""
    records: list[Record] = []
    before = chain.count
    for line in blob.split(b"\n")[:-1]:
        try:
            record = json.loads(line, parse_constant=_no_number)
        except (ValueError, RecursionError):
            record = None
        why = chain.misfit(record, line) if isinstance(record, dict) else "it is not a JSON object"
        if why:
            raise _bad("a record that fits the chain", why, path, before + len(records) + 1)
        records.append(record)
    if why := chain.unfinished():
        raise _bad("a record that fits the chain", why, path, before + len(records))
    return records


def _unhashed(record: Mapping[str, Any], line: bytes | None) -> str:
    """A hash is over the rest of the record, which a canonical line holds as it was hashed."""
    stated = record.get("hash")
    if not isinstance(stated, str):
        return "it has no hash"
    try:
        rest = (
            canonical({name: value for name, value in record.items() if name != "hash"})
            if line is None else line.replace(f'"hash":"{stated}",'.encode(), b"", 1)
        )  # fmt: skip
    except ValueError:  # NaN, which no ledger of ours can hold
        return "its hash is not that of its content"
    return "" if digest(rest) == stated else "its hash is not that of its content"


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no number that JSON has")


def _content(record: Mapping[str, Any]) -> bytes:
    """What a signature is over."""
    return spell(_PURPOSE, canonical({name: record[name] for name in ("index", "previous", "kind", "body")}))


def _pruned(records: Sequence[Record], keeper: Identity) -> Iterator[Record]:
    """Records with one in place of each stretch that decides nothing."""
    stretch: list[Record] = []
    for record in records:
        if record["kind"] in DECISIVE - {PRUNED}:
            yield from _stub(stretch, keeper)
            stretch = []
            yield record
        else:
            stretch.append(record)
    yield from _stub(stretch, keeper)


def _stub(stretch: Sequence[Record], keeper: Identity) -> Iterator[Record]:
    if not stretch:
        return
    kinds: Counter[str] = Counter()
    for one in stretch:
        kinds.update(one["body"]["kinds"] if one["kind"] == PRUNED else {one["kind"]: 1})
    begin, head = stretch[0], head_of(stretch)
    body = {
        "first": begin["body"]["first"] if begin["kind"] == PRUNED else begin["index"],
        "kinds": dict(kinds), "head": head.hash, "by": keeper.public.hex(),
    }  # fmt: skip
    record: Record = {"index": head.count - 1, "previous": begin["previous"], "kind": PRUNED, "body": body}
    record["signature"] = keeper.sign(_content(record)).hex()
    yield {**record, "hash": digest(canonical(record))}


def _plain_body(kind: str, body: Mapping[str, Any]) -> Record:
    if kind in (KEEPER, PRUNED):
        raise RunError("a kind of record that callers may add", repr(kind), "Use `hand_over` or `prune`.")
    return {str(name): _plain(value) for name, value in body.items()}


def _plain(value: Any) -> Any:
    """What a body may hold: numbers, digests, words and names, on one line and no longer than `LONGEST`; lists of
    those, and mappings. A longer word is cut, so that no text can hide in a reason.
    """
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, str):
        plain = value if value.isprintable() else "".join(c if c.isprintable() else " " for c in value)
        return plain if len(plain) <= LONGEST else plain[: LONGEST - 1] + "…"
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    do = "Write a count, a digest, a word or a name; data has no place in a ledger."
    raise RunError("numbers, digests, words and names in a ledger", f"a {type(value).__name__}", do)


def _locked(path: Path) -> int:
    """An open file that this process alone may write: the one that is at `path` now, not one replaced meanwhile."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            if os.fstat(handle).st_ino == path.stat().st_ino:
                return handle
        except FileNotFoundError:
            pass
        os.close(handle)


def _read(file: int, start: int, end: int) -> bytes:
    parts = []
    while start < end and (part := os.pread(file, end - start, start)):
        parts.append(part)
        start += len(part)
    return b"".join(parts)


def _write(file: int, blob: bytes) -> None:
    left = memoryview(blob)
    while left:
        left = left[os.write(file, left) :]
    os.fsync(file)


def _bad(expected: str, came: str, path: Path, line: int | None = None) -> RunError:
    do = "Somebody or something changed the ledger: keep the folder as it is and find out who."
    return RunError(expected, came, do, where=f"{path.name}, line {line}" if line else path.name)
