"""What passes between silos and coordinator: frozen values, their bytes, and nothing else.

    set-up  Invitation ──▶ Advert ··· Adverts ──▶ Opening ··· Openings + Call ──▶ Deposit
    a sum   Delivery ──▶ Masked (beside the words) ··· Survivors (+ next Call) ──▶ Reveal (+ next Deposit)
    or, under encryption:  Invitation ──▶ SumKey ──▶ (the words, encrypted) ··· Decrypt ──▶ Decrypted

The coordinator sends what stands on the left, silos answer with what stands on the right. `pack` and `unpack` are exact
inverses: one message has one spelling, and whatever else comes is a `WireError`. Everything here may be read by
everybody: secrets are sealed before they get into a message.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from fractions import Fraction
from functools import cached_property
from itertools import accumulate, pairwise
from math import floor
from operator import attrgetter
from typing import Any, Protocol, TypeVar

import numpy as np

from .. import wire
from ..errors import GuaranteeError, WireError
from .keys import Identity, verify

KEY, SIGNATURE, CHECK = 32, 64, 16  # bytes of keys, digests and secrets; of signatures; of what recognises a pad
TAG = 16  # bytes that sealing adds
UNSIGNED = bytes(SIGNATURE)
WORDS = {16: np.uint16, 32: np.uint32, 64: np.uint64}
"""The kinds of words that a sum may be over, by their bits."""


@dataclass(frozen=True)
class Agreement:
    """What every party knows beforehand; its digest is in every session, and so in every key.

    `treaty`, `model`: digests, in hexadecimal. `roster`: the silos, with their Ed25519 public keys. `corrupt`: the
    share of the roster that may collude with the coordinator. `dropout`: the share of a cohort that may vanish in a
    round. `minimum`: the fewest silos whose sum may become known. `neighbours`, `threshold`: of the graph; None: as
    `parameters.choose` finds them.
    """

    treaty: str
    model: str
    roster: Mapping[str, bytes]
    coordinator: bytes
    word: int
    corrupt: Fraction
    dropout: Fraction
    minimum: int
    neighbours: int | None = None
    threshold: int | None = None
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.word not in WORDS:
            raise _refused("words of 16, 32 or 64 bits", f"word={self.word}", "Choose one of them.")
        if len({self.coordinator, *self.roster.values()}) <= len(self.roster):
            raise _refused("an identity of its own for every party", "one that two share", "Make each its own key.")
        least = max(3, self.colluders + 2)
        if self.minimum < least:
            came = f"minimum={self.minimum} with {self.colluders} of {len(self.roster)} silos corrupt"
            raise _refused(
                f"a minimum of {least} or more, so that two honest silos are in every sum", came, "Raise it."
            )

    @cached_property
    def colluders(self) -> int:
        """How many silos may collude, wherever they are: no choice of sessions or cohorts makes them more."""
        return floor(self.corrupt * len(self.roster))

    @cached_property
    def digest(self) -> bytes:
        names = [f.name for f in fields(self) if f.name not in ("roster", "coordinator", "corrupt", "dropout")]
        facts = {name: getattr(self, name) for name in names} | {
            "roster": {name: public.hex() for name, public in self.roster.items()},
            "coordinator": self.coordinator.hex(),
            "corrupt": str(Fraction(self.corrupt)),
            "dropout": str(Fraction(self.dropout)),
        }
        return digest(wire.canonical(facts))


class _Spelling(Protocol):
    """How one kind of field is written: as a fact (JSON), as bytes, or both. `read` refuses with a ValueError."""

    def fact(self, value: Any) -> Any: ...

    def octets(self, value: Any) -> bytes | None: ...

    def read(self, fact: Any, octets: bytes) -> Any: ...


@dataclass(frozen=True)
class _Text:
    """A text that is not empty."""

    def fact(self, value: str) -> str:
        return value

    def octets(self, value: str) -> None:
        return None

    def read(self, fact: Any, octets: bytes) -> str:
        _must(isinstance(fact, str) and fact != "")
        return str(fact)


@dataclass(frozen=True)
class _Names:
    """Texts that are not empty, sorted, each once."""

    def fact(self, value: Sequence[str]) -> list[str]:
        return list(value)

    def octets(self, value: Sequence[str]) -> None:
        return None

    def read(self, fact: Any, octets: bytes) -> tuple[str, ...]:
        _must(isinstance(fact, list) and all(isinstance(name, str) and name for name in fact))
        _must(fact == sorted(set(fact)))
        return tuple(fact)


@dataclass(frozen=True)
class _Octets:
    """`size` bytes; any number when None."""

    size: int | None

    def fact(self, value: bytes) -> None:
        return None

    def octets(self, value: bytes) -> bytes:
        _must(self.size in (None, len(value)))
        return value

    def read(self, fact: Any, octets: bytes) -> bytes:
        return self.octets(octets)


@dataclass(frozen=True)
class _Table:
    """A row of fixed width for each of some names."""

    row: type[Any]

    @cached_property
    def _columns(self) -> tuple[Callable[[Any], tuple[bytes, ...]], tuple[int, ...]]:
        """What takes the cells of a row, and how wide each is."""
        columns = fields(self.row)
        return attrgetter(*(f.name for f in columns)), tuple(_spelling(f).size for f in columns)

    def fact(self, value: Mapping[str, Any]) -> list[str]:
        return sorted(value)

    def octets(self, value: Mapping[str, Any]) -> bytes:
        cells, widths = self._columns
        rows = [cells(value[name]) for name in sorted(value)]
        _must(all(tuple(map(len, row)) == widths for row in rows))
        return b"".join(cell for row in rows for cell in row)

    def read(self, fact: Any, octets: bytes) -> dict[str, Any]:
        names, ends = _Names().read(fact, b""), list(accumulate(self._columns[1], initial=0))
        _must(len(octets) == len(names) * ends[-1])
        rows = (octets[i * ends[-1] : (i + 1) * ends[-1]] for i in range(len(names)))
        return {name: self.row(*(row[a:b] for a, b in pairwise(ends))) for name, row in zip(names, rows, strict=True)}


@dataclass(frozen=True)
class _Inner:
    """Another message, or None."""

    kind: str

    def fact(self, value: Any) -> None:
        return None

    def octets(self, value: Any) -> bytes:
        return b"" if value is None else pack(value)

    def read(self, fact: Any, octets: bytes) -> Any:
        return unpack(globals()[self.kind], octets) if octets else None


@dataclass(frozen=True)
class _Many:
    """Any number of messages of one kind."""

    kind: str

    def fact(self, value: Sequence[Any]) -> list[int]:
        return [len(pack(message)) for message in value]

    def octets(self, value: Sequence[Any]) -> bytes:
        return b"".join(pack(message) for message in value)

    def read(self, fact: Any, octets: bytes) -> tuple[Any, ...]:
        _must(isinstance(fact, list) and all(type(size) is int and size > 0 for size in fact))
        _must(sum(fact) == len(octets))
        out, end = [], 0
        for size in fact:
            out.append(unpack(globals()[self.kind], octets[end : end + size]))
            end += size
        return tuple(out)


def _as(spelling: _Spelling) -> dict[str, _Spelling]:
    return {"spelling": spelling}


@dataclass(frozen=True)
class Invitation:
    """The coordinator opens a session. Its `digest` names the session in every later message."""

    agreement: bytes = field(metadata=_as(_Octets(KEY)))
    nonce: bytes = field(metadata=_as(_Octets(KEY)))
    signature: bytes = field(default=UNSIGNED, metadata=_as(_Octets(SIGNATURE)))


@dataclass(frozen=True)
class Advert:
    """A silo takes part: the X25519 key of its channels to others, and SHA-256 of the nonce it will open."""

    session: bytes = field(metadata=_as(_Octets(KEY)))
    name: str = field(metadata=_as(_Text()))
    channel: bytes = field(metadata=_as(_Octets(KEY)))
    commitment: bytes = field(metadata=_as(_Octets(KEY)))
    signature: bytes = field(default=UNSIGNED, metadata=_as(_Octets(SIGNATURE)))


@dataclass(frozen=True)
class Adverts:
    """Everybody's adverts, sorted by name: the members of the session, if all open."""

    adverts: tuple[Advert, ...] = field(metadata=_as(_Many("Advert")))


@dataclass(frozen=True)
class Opening:
    """A silo's part of the joint randomness, which no party could have known when it committed to its own."""

    session: bytes = field(metadata=_as(_Octets(KEY)))
    name: str = field(metadata=_as(_Text()))
    nonce: bytes = field(metadata=_as(_Octets(KEY)))


@dataclass(frozen=True)
class Openings:
    """Everybody's openings, sorted by name."""

    openings: tuple[Opening, ...] = field(metadata=_as(_Many("Opening")))


@dataclass(frozen=True)
class Call:
    """A sum is to be taken over these members, under a label that the session has not seen, such as "train 3"."""

    session: bytes = field(metadata=_as(_Octets(KEY)))
    label: str = field(metadata=_as(_Text()))
    cohort: tuple[str, ...] = field(metadata=_as(_Names()))


@dataclass(frozen=True)
class Box:
    """For one neighbour: its shares of the dealer's two secrets, sealed for it, and their SHA-256 for everybody."""

    of_self: bytes = field(metadata=_as(_Octets(KEY)))
    of_pair: bytes = field(metadata=_as(_Octets(KEY)))
    sealed: bytes = field(metadata=_as(_Octets(2 * KEY + TAG)))


@dataclass(frozen=True)
class Deposit:
    """A silo's keys for one sum: `public` of its pair masks, SHA-256 of the secret of its self mask, a box for each
    neighbour. `call`: digest of the call that it answers.
    """

    session: bytes = field(metadata=_as(_Octets(KEY)))
    name: str = field(metadata=_as(_Text()))
    label: str = field(metadata=_as(_Text()))
    call: bytes = field(metadata=_as(_Octets(KEY)))
    public: bytes = field(metadata=_as(_Octets(KEY)))
    commitment: bytes = field(metadata=_as(_Octets(KEY)))
    boxes: Mapping[str, Box] = field(metadata=_as(_Table(Box)))
    signature: bytes = field(default=UNSIGNED, metadata=_as(_Octets(SIGNATURE)))


@dataclass(frozen=True)
class Parcel:
    """What one neighbour's deposit holds for one silo."""

    public: bytes = field(metadata=_as(_Octets(KEY)))
    commitment: bytes = field(metadata=_as(_Octets(KEY)))
    of_self: bytes = field(metadata=_as(_Octets(KEY)))
    of_pair: bytes = field(metadata=_as(_Octets(KEY)))
    sealed: bytes = field(metadata=_as(_Octets(2 * KEY + TAG)))


@dataclass(frozen=True)
class Delivery:
    """To one silo: a parcel from each of its neighbours whose deposit came."""

    session: bytes = field(metadata=_as(_Octets(KEY)))
    label: str = field(metadata=_as(_Text()))
    parcels: Mapping[str, Parcel] = field(metadata=_as(_Table(Parcel)))


@dataclass(frozen=True)
class Masked:
    """Beside a masked vector: for which task (a digest) it was masked, and SHA-256 of its words."""

    session: bytes = field(metadata=_as(_Octets(KEY)))
    name: str = field(metadata=_as(_Text()))
    label: str = field(metadata=_as(_Text()))
    task: str = field(metadata=_as(_Text()))
    words: bytes = field(metadata=_as(_Octets(KEY)))
    signature: bytes = field(default=UNSIGNED, metadata=_as(_Octets(SIGNATURE)))


@dataclass(frozen=True)
class Survivors:
    """The coordinator's statement: whose deposits were delivered, and whose vectors are in the sum."""

    session: bytes = field(metadata=_as(_Octets(KEY)))
    label: str = field(metadata=_as(_Text()))
    call: bytes = field(metadata=_as(_Octets(KEY)))
    task: str = field(metadata=_as(_Text()))
    participants: tuple[str, ...] = field(metadata=_as(_Names()))
    survivors: tuple[str, ...] = field(metadata=_as(_Names()))
    next: Call | None = field(default=None, metadata=_as(_Inner("Call")))
    signature: bytes = field(default=UNSIGNED, metadata=_as(_Octets(SIGNATURE)))


@dataclass(frozen=True)
class Key:
    """Towards one surviving neighbour: `lock` is its share of the key of one's values, padded; `key` opens the lock
    that it made for oneself; `check` recognises the pad of `lock`.
    """

    lock: bytes = field(metadata=_as(_Octets(KEY)))
    key: bytes = field(metadata=_as(_Octets(KEY)))
    check: bytes = field(metadata=_as(_Octets(CHECK)))


@dataclass(frozen=True)
class Reveal:
    """A silo's answer to a statement: sealed, *one* value for each participating neighbour, sorted by name. It is a
    share of the self secret of those who survived and of the pair secret of those who did not: no room for both.
    """

    session: bytes = field(metadata=_as(_Octets(KEY)))
    name: str = field(metadata=_as(_Text()))
    label: str = field(metadata=_as(_Text()))
    statement: bytes = field(metadata=_as(_Octets(KEY)))
    sealed: bytes = field(metadata=_as(_Octets(None)))
    keys: Mapping[str, Key] = field(metadata=_as(_Table(Key)))
    next: Deposit | None = field(default=None, metadata=_as(_Inner("Deposit")))
    signature: bytes = field(default=UNSIGNED, metadata=_as(_Octets(SIGNATURE)))


@dataclass(frozen=True)
class SumKey:
    """A silo has drawn the key of a session: what is encrypted under this public half, it can read. See `holder.py`."""

    invitation: Invitation | None = field(metadata=_as(_Inner("Invitation")))
    name: str = field(metadata=_as(_Text()))
    key: bytes = field(metadata=_as(_Octets(None)))
    signature: bytes = field(default=UNSIGNED, metadata=_as(_Octets(SIGNATURE)))


@dataclass(frozen=True)
class Decrypt:
    """The coordinator asks the holder of the session's key for a sum: what for, such as "train 3", over whom, and the
    sum's ciphertexts.
    """

    session: bytes = field(metadata=_as(_Octets(KEY)))
    purpose: str = field(metadata=_as(_Text()))
    survivors: tuple[str, ...] = field(metadata=_as(_Names()))
    total: bytes = field(metadata=_as(_Octets(None)))
    signature: bytes = field(default=UNSIGNED, metadata=_as(_Octets(SIGNATURE)))


@dataclass(frozen=True)
class Decrypted:
    """The holder's answer to a request, named by its digest: the sum's integers, little-endian, in words."""

    request: bytes = field(metadata=_as(_Octets(KEY)))
    name: str = field(metadata=_as(_Text()))
    words: bytes = field(metadata=_as(_Octets(None)))
    signature: bytes = field(default=UNSIGNED, metadata=_as(_Octets(SIGNATURE)))


Message = (
    Invitation | Advert | Adverts | Opening | Openings | Call | Deposit | Delivery | Masked | Survivors | Reveal
    | SumKey | Decrypt | Decrypted
)  # fmt: skip
Signed = Invitation | Advert | Deposit | Masked | Survivors | Reveal | SumKey | Decrypt | Decrypted
M = TypeVar("M", bound=Message)
S = TypeVar("S", bound=Signed)


def pack(message: Message) -> bytes:
    """A message as bytes: texts and names as facts, everything else as one array of bytes for each field."""
    kept = vars(message)  # beside its fields, since messages never change and are asked for their bytes often
    if "packed" not in kept:
        kept["packed"] = _pack(message)
    return bytes(kept["packed"])


def unpack(kind: type[M], blob: bytes) -> M:
    """The inverse of `pack`. A WireError for anything that `pack` would not have written."""
    tree, facts = wire.unpack(blob)
    try:
        message = kind(**{f.name: _spelling(f).read(facts.get(f.name), _octets(tree, f.name)) for f in fields(kind)})
        _must(pack(message) == blob)
    except (ValueError, KeyError, TypeError) as error:
        raise _malformed(kind) from error
    return message


def digest(blob: bytes | memoryview) -> bytes:
    """SHA-256."""
    return hashlib.sha256(blob).digest()


def name_of(message: Message) -> bytes:
    """SHA-256 of a message without its signature, by which others refer to it."""
    return digest(_body(message))


def sign(message: S, identity: Identity) -> S:
    """The message with the signature of `identity` over all else in it, its kind included."""
    return replace(message, signature=identity.sign(_body(message)))


def genuine(message: Signed, public: bytes) -> bool:
    """Whether the owner of `public` signed this message."""
    return verify(public, message.signature, _body(message))


def _pack(message: Message) -> bytes:
    facts: dict[str, Any] = {"kind": type(message).__name__}
    tree: dict[wire.Words, np.ndarray] = {}
    try:
        for f in fields(message):
            spelling, value = _spelling(f), getattr(message, f.name)
            if (octets := spelling.octets(value)) is not None:
                tree[f.name,] = np.frombuffer(octets, np.uint8)
            if (fact := spelling.fact(value)) is not None:
                facts[f.name] = fact
        return wire.pack(tree, facts)
    except (ValueError, TypeError, AttributeError) as error:
        raise _malformed(type(message)) from error


def _body(message: Message) -> bytes:
    """What is signed: the message with an empty signature."""
    if not isinstance(message, Signed) or message.signature == UNSIGNED:
        return pack(message)
    kept = vars(message)
    if "body" not in kept:
        kept["body"] = _pack(replace(message, signature=UNSIGNED))
    return bytes(kept["body"])


def _octets(tree: Mapping[wire.Words, np.ndarray], name: str) -> bytes:
    return tree[name,].tobytes() if (name,) in tree else b""


def _spelling(f: Field[Any]) -> Any:
    return f.metadata["spelling"]


def _must(condition: bool) -> None:
    if not condition:
        raise ValueError


def _malformed(kind: type[Any]) -> WireError:
    return WireError(
        f"{kind.__name__} as `pack` writes it", "something else",
        "The sender and this side must run versions of foedus that speak the same format.",
    )  # fmt: skip


def _refused(expected: str, came: str, do: str) -> GuaranteeError:
    return GuaranteeError(expected, came, do, where="[secure]")
