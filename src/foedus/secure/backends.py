"""Homomorphic encryption behind a narrow interface: rings, keys, and vectors of ciphertexts that add up unread.

    Ring ──SecretKey.fresh──▶ PublicKey.encrypt ──vectors──▶ Adder ──vector of the sum──▶ SecretKey.decrypt

`bfv.py` puts integers into the vectors, `ckks.py` real numbers. Microsoft SEAL encrypts and decrypts (package
seal-python, extra `foedus[he]`); whether it is there is found out by importing it, and without it there is an error,
never a sum in the clear. On the wire are parameters as numbers, keys in SEAL's form, and ciphertexts as the
coefficients that SEAL gives, at 60 bits each. Each side rebuilds the context from its own numbers and lets SEAL check
that they give 128 bits of security.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib import import_module
from typing import Any, NoReturn

import numpy as np

from .. import wire
from ..errors import CohortError, GuaranteeError, WireError
from ..types import Key
from .keys import Secretive

FORMAT = 1
CIPHERTEXTS: Key = ("sum", "ciphertexts")
_NIBBLES = np.arange(0, 60, 4, dtype=np.uint64)
FAULTS = (RuntimeError, ValueError, IndexError, OverflowError, TypeError, MemoryError)  # what SEAL raises on bad bytes


def seal() -> Any:
    """The library, imported. Raises `GuaranteeError` where that fails, whatever is installed."""
    try:
        return import_module("seal")
    except Exception as error:
        raise GuaranteeError(
            "a library for encrypted sums that can be imported",
            f"{type(error).__name__}: {error}",
            'Install it with `pip install "foedus[he]"`, or take sums = "masked"; nothing is sent in the clear.',
        ) from error


def check(scheme: str) -> None:
    """Whether a treaty may sum under `scheme` here. Raises `GuaranteeError` with the nearest sound choice."""
    if scheme == "ckks":
        raise GuaranteeError(
            "an exact scheme, since the sum goes back to the coordinator once it is decrypted",
            'scheme = "ckks", whose decrypted values give its secret key away (Li and Micciancio 2021)',
            'Take scheme = "bfv": it is exact, and needs an eighth to a half of the bytes.',
        )
    if scheme != "bfv":
        raise GuaranteeError("the scheme bfv", f"{scheme!r}", 'Take scheme = "bfv".')
    seal()


def threshold_keys() -> NoReturn:
    """Refuses a secret key in parts, of which several are needed to decrypt, and says why."""
    try:
        import_module("openfhe")
        reason = "OpenFHE imports here, but Foedus has no threshold decryption with it yet"
    except Exception as error:
        reason = f"the only library that has them, OpenFHE, does not import here ({type(error).__name__}: {error})"
    raise GuaranteeError(
        "one secret key, held whole by each key holder",
        f"a request for threshold keys; {reason}",
        'Take sums = "masked", where no silo can read another\'s update alone, or state who holds the key.',
    )


def trust(holders: int) -> str:
    """What a secret key that is held by `holders` silos means, in words for the treaty's statement.

    >>> "do not collude" in trust(1)
    True
    """
    who = "One silo holds" if holders == 1 else f"{holders} silos each hold"
    one = "it" if holders == 1 else "any of them"
    part = "" if holders == 1 else " of some of the sums"
    return (
        f"{who} the secret key{part} and can decrypt whatever reaches {one}. Single updates are hidden as long as the "
        f"coordinator and {'that silo' if holders == 1 else 'those silos'} do not collude, and the coordinator adds up "
        "what it says it adds: one that lies can have a single update decrypted as if it were a sum, and with many "
        "decryptions of sums that were tampered with can find the key. That each sum carries a count, and is opened "
        "once, stops mistakes, not such a coordinator. Whoever decrypts learns the sum, and from its noise could "
        "confirm a guess of somebody's whole update."
    )


@dataclass(frozen=True)
class Ring:
    """What fixes all arithmetic. `scheme`: "bfv" or "ckks"; `degree`: of the polynomials, a power of 2; `bits`: of the
    primes, 60 of the modulus of ciphertexts, and where there is a second, it makes fresh ones less noisy; `plain`: for
    BFV the prime modulus of its slots, for CKKS what a 1 is encoded as.
    """

    scheme: str
    degree: int
    bits: tuple[int, ...]
    plain: int

    @property
    def slots(self) -> int:
        """Numbers in one ciphertext."""
        return self.degree if self.scheme == "bfv" else self.degree // 2

    @property
    def context(self) -> Any:
        """SEAL's context. Raises `GuaranteeError` unless SEAL finds 128 bits of security in it."""
        return _context(self)

    def facts(self) -> dict[str, Any]:
        """For the wire, complete: both sides' must be equal."""
        primes = [prime.value() for prime in self.context.key_context_data().parms().coeff_modulus()]
        return {"format": FORMAT, "scheme": self.scheme, "degree": self.degree, "primes": primes, "plain": self.plain}

    @property
    def modulus(self) -> int:
        """The prime modulo which the coefficients of ciphertexts are."""
        return int(self.context.key_context_data().parms().coeff_modulus()[0].value())

    def encode(self, numbers: np.ndarray) -> Iterator[Any]:
        """SEAL's plaintexts of uint64 below `plain` (BFV), or of float64 (CKKS); the last is filled up with zeros."""
        encoder, extra = self._encoder, () if self.scheme == "bfv" else (float(self.plain),)
        return (encoder.encode(numbers[i : i + self.slots], *extra) for i in range(0, len(numbers), self.slots))

    def decode(self, plaintexts: Iterable[Any], count: int) -> np.ndarray:
        """The inverse: the first `count` numbers."""
        decode = self._encoder.decode_uint64 if self.scheme == "bfv" else self._encoder.decode
        return np.concatenate([decode(plaintext) for plaintext in plaintexts])[:count]

    def ciphertexts(self, count: int) -> int:
        """Ciphertexts that `count` numbers take."""
        return -(-count // self.slots)

    @property
    def _encoder(self) -> Any:
        return getattr(seal(), "BatchEncoder" if self.scheme == "bfv" else "CKKSEncoder")(self.context)


@dataclass(frozen=True)
class PublicKey:
    """Encrypts; `blob` is SEAL's form of it. Whoever can exchange it can read what is encrypted under it: take one from
    `public_key`, out of a message that a key holder has signed.
    """

    ring: Ring
    blob: bytes = field(repr=False)

    def pack(self) -> bytes:
        """Canonical bytes, to be signed and sent; `public_key` reads them."""
        return wire.pack({("key", "public"): np.frombuffer(self.blob, np.uint8)}, self.ring.facts())

    @cached_property
    def digest(self) -> str:
        """SHA-256 of `pack`; every vector under this key carries it."""
        return wire.digest(self.pack())

    def encrypt(self, numbers: np.ndarray) -> bytes:
        """A vector, as bytes: of uint64 (BFV) or float64 (CKKS)."""
        table = np.empty((self.ring.ciphertexts(len(numbers)), 2 * self.ring.degree), np.uint64)
        for row, plaintext in zip(table, self.ring.encode(numbers), strict=True):
            row[:] = np.frombuffer(self._encryptor.encrypt(plaintext).to_string()[len(self._head) :], np.uint64)
        return self.pack_vector(table)

    def pack_vector(self, table: np.ndarray) -> bytes:
        """A vector as canonical bytes, 60 bits for each coefficient; `table`: those of each ciphertext in a row."""
        return wire.pack({CIPHERTEXTS: _dense(table)}, {"format": FORMAT, "key": self.digest})

    def unpack_vector(self, blob: bytes, count: int) -> np.ndarray:
        """The inverse, (ciphertexts, 2 · degree), of a vector of `count` numbers. Raises `WireError` for anything else
        than ciphertexts of this ring, said to be under this key.
        """
        tree, facts = wire.unpack(blob)
        if tree.keys() != {CIPHERTEXTS} or facts != {"format": FORMAT, "key": self.digest}:
            raise _bad("a vector of ciphertexts under this session's key", "another message, or another key's")
        dense, rows = tree[CIPHERTEXTS], self.ring.ciphertexts(count)
        if dense.dtype != np.uint64 or dense.shape != (rows * self.ring.degree * 15 // 8,):
            raise _bad(f"{rows} ciphertexts of degree {self.ring.degree}", f"{dense.dtype} of shape {dense.shape}")
        table = _loose(dense).reshape(rows, -1)
        if table.max() >= self.ring.modulus:
            raise _bad("coefficients below the ring's modulus", "larger ones")
        return table

    def load(self, row: np.ndarray) -> Any:
        """SEAL's ciphertext from its coefficients."""
        return self.ring.context.from_cipher_str(self._head + row.tobytes())

    @cached_property
    def _head(self) -> bytes:
        """What every ciphertext of SEAL's begins with here: version, parameters and sizes."""
        zeros = np.zeros(1, np.uint64 if self.ring.scheme == "bfv" else np.float64)
        own: bytes = self._encryptor.encrypt(next(self.ring.encode(zeros))).to_string()
        return own[: len(own) - 2 * 8 * self.ring.degree]

    @cached_property
    def _encryptor(self) -> Any:
        return seal().Encryptor(self.ring.context, _public(self.ring, self.blob))


def public_key(blob: bytes, ring: Ring) -> PublicKey:
    """The key in `PublicKey.pack`'s bytes; a WireError unless it is for exactly this side's own parameters."""
    tree, facts = wire.unpack(blob)
    own = ring.facts()
    if facts != own:
        odd = sorted(name for name in {*facts, *own} if facts.get(name) != own.get(name))
        raise _bad("a public key with the parameters that follow from the treaty", f"other {', '.join(odd)}")
    key = tree.get(("key", "public"))
    if len(tree) != 1 or key is None or key.dtype != np.uint8 or key.ndim != 1:
        raise _bad("one public key", f"{len(tree)} arrays")
    _public(ring, key.tobytes())
    return PublicKey(ring, key.tobytes())


class SecretKey(Secretive):
    """Decrypts. Lives in the memory of the silo that drew it for one session; it is never printed, pickled, written or
    sent.
    """

    def __init__(self, public: PublicKey, secret: Any) -> None:
        self.public, self._secret = public, secret
        self._decryptor = seal().Decryptor(public.ring.context, secret)

    @classmethod
    def fresh(cls, ring: Ring) -> SecretKey:
        """A new pair, drawn by SEAL from the operating system's entropy."""
        library = seal()
        pair = library.KeyGenerator(ring.context)
        return cls(PublicKey(ring, pair.create_public_key().to_string()), pair.secret_key())

    def decrypt(self, blob: bytes, count: int) -> np.ndarray:
        """The `count` numbers of a vector."""
        table = self.public.unpack_vector(blob, count)
        return self.public.ring.decode((self._decryptor.decrypt(self.public.load(row)) for row in table), count)


class Adder:
    """Adds silos' vectors without being able to read them: sums of ciphertexts are those of their coefficients, modulo
    the ring's prime. In memory are the sum and the vector that comes in.

    `count`: numbers of a vector. `parties`: vectors at most, since room and noise are reckoned for so many.
    """

    def __init__(self, key: PublicKey, count: int, parties: int) -> None:
        self.key, self.count, self.parties, self.added = key, count, parties, 0
        self._sum = np.zeros(0, np.uint64)

    def add(self, blob: bytes) -> None:
        """Adds a silo's vector. A WireError for one that is none, which leaves the sum as it was."""
        if self.added == self.parties:
            raise CohortError(f"at most {self.parties} vectors", "one more", "Sum each silo's vector once.")
        table = self.key.unpack_vector(blob, self.count)
        if self.added:
            table += self._sum
            np.minimum(table, table - np.uint64(self.key.ring.modulus), out=table)  # below the modulus, that wraps
        self._sum = table
        self.added += 1

    def total(self) -> bytes:
        """The sum so far as a vector, for a key holder."""
        if not self.added:
            raise CohortError("vectors to add up", "none", "Ask the silos again, in a new round.")
        return self.key.pack_vector(self._sum)


@lru_cache(maxsize=16)
def _context(ring: Ring) -> Any:
    library = seal()
    parameters = library.EncryptionParameters(getattr(library.scheme_type, ring.scheme))
    parameters.set_poly_modulus_degree(ring.degree)
    parameters.set_coeff_modulus(library.CoeffModulus.Create(ring.degree, list(ring.bits)))
    if ring.scheme == "bfv":
        parameters.set_plain_modulus(ring.plain)
    context = library.SEALContext(parameters, True, library.sec_level_type.tc128)
    if not context.parameters_set():
        raise GuaranteeError(
            "parameters with 128 bits of security",
            f"{ring}: {context.parameter_error_message()}",
            "Take a larger degree, or a modulus of fewer bits.",
        )
    return context


def _dense(coefficients: np.ndarray) -> np.ndarray:
    """16 n numbers of 60 bits → (15 n,) words: the last of every sixteen goes into the free bits of the others."""
    table = coefficients.reshape(-1, 16)
    dense: np.ndarray = table[:, 15:] >> _NIBBLES
    dense <<= np.uint64(60)
    dense |= table[:, :15]
    return dense.reshape(-1)


def _loose(dense: np.ndarray) -> np.ndarray:
    """The inverse of `_dense`, (16 n,)."""
    table = dense.reshape(-1, 15)
    out = np.empty((len(table), 16), np.uint64)
    np.bitwise_and(table, np.uint64((1 << 60) - 1), out=out[:, :15])
    np.bitwise_or.reduce(table >> np.uint64(60) << _NIBBLES, axis=1, out=out[:, 15])
    return out.reshape(-1)


def _public(ring: Ring, blob: bytes) -> Any:
    try:
        key = ring.context.from_public_str(blob)
    except FAULTS as error:
        raise _bad("a public key of this ring", f"{len(blob)} bytes that are none ({error})") from error
    if key.to_string() != blob:
        raise _bad("a public key in canonical form", "one with other bytes beside it")
    return key


def _bad(expected: str, came: str) -> WireError:
    return WireError(expected, came, "Silos and coordinator must run one treaty, with one version of the library.")
