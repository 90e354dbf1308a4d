"""Keys: who one is (Ed25519), what two share (X25519), what follows from it (HKDF), and what that locks (AES-GCM).

    Identity.sign ──▶ verify            Pair.agree ──▶ hkdf(secret, salt, *words) ──▶ seal ──▶ unseal

Whatever is drawn comes from `entropy`, a function of a number of bytes; only a simulator passes its own. Whatever holds
a secret is `Secretive`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ..errors import GuaranteeError, WireError

Entropy = Callable[[int], bytes]
"""A number of bytes → so many uniform ones."""

Word = str | int | bytes
SIZE = 32  # bytes of every key, public or secret
_CONTEXT = "foedus secure 1"  # a change of any message or derivation takes another number
_NONCE = bytes(12)


class Secretive:
    """What values with secrets have in common: they print their kind only, and refuse to be pickled or copied."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: secret>"

    def __reduce__(self) -> NoReturn:
        raise GuaranteeError(
            "secrets to stay in the memory of the process that drew them",
            f"a request to pickle or copy a {type(self).__name__}",
            "Send what its methods return, never the value; after a restart begin a new session.",
        )


@dataclass(frozen=True, repr=False)
class Identity(Secretive):
    """Who one is, for as long as the roster says so: an Ed25519 key (RFC 8032); `secret` is its seed of 32 bytes."""

    secret: bytes

    @classmethod
    def fresh(cls, entropy: Entropy = secrets.token_bytes) -> Identity:
        return cls(entropy(SIZE))

    @cached_property
    def _key(self) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(self.secret)

    @cached_property
    def public(self) -> bytes:
        """The 32 bytes by which others know it."""
        return self._key.public_key().public_bytes_raw()

    def sign(self, blob: bytes) -> bytes:
        """64 bytes. What is signed should say what it is for: see `spell`."""
        return self._key.sign(blob)


def verify(public: bytes, signature: bytes, blob: bytes) -> bool:
    """Whether the owner of `public` signed `blob`. False for whatever is no key or no signature."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, blob)
    except (InvalidSignature, ValueError):
        return False
    return True


@dataclass(frozen=True, repr=False)
class Pair(Secretive):
    """An X25519 key pair (RFC 7748); `secret`: 32 bytes, clamped, and so below `shamir.PRIME`."""

    secret: bytes

    @classmethod
    def fresh(cls, entropy: Entropy = secrets.token_bytes) -> Pair:
        low, *middle, high = entropy(SIZE)
        return cls(bytes([low & 248, *middle, high & 127 | 64]))

    @cached_property
    def _key(self) -> X25519PrivateKey:
        return X25519PrivateKey.from_private_bytes(self.secret)

    @cached_property
    def public(self) -> bytes:
        """The 32 bytes that others agree with."""
        return self._key.public_key().public_bytes_raw()

    def agree(self, public: bytes) -> bytes:
        """The 32 bytes that both owners can compute, to be put through `hkdf`.

        A WireError for a public key of low order, all zeros among them: everybody knows what such a key agrees on.
        """
        try:
            return self._key.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError:
            raise WireError(
                "an X25519 public key, 32 bytes and not of low order",
                f"{len(public)} bytes, {public[:SIZE].hex() or 'none'}",
                "Leave out whoever published it; if the coordinator did, do not go on with it.",
            ) from None


_PROBE = Pair(bytes([64] * SIZE))  # no secret: any clamped scalar takes a point of low order to zero


def usable(public: bytes) -> bool:
    """Whether `public` is an X25519 key that `Pair.agree` accepts: 32 bytes, and not of low order."""
    try:
        _PROBE.agree(public)
    except WireError:
        return False
    return True


def spell(*words: Word) -> bytes:
    """Words as bytes, no two lists of words alike: each with a letter for its kind and its length in eight bytes.

    >>> spell("ab", "c") == spell("a", "bc")
    False
    """
    spelled = b""
    for word in words:
        if isinstance(word, bytes):
            kind, blob = b"b", word
        elif isinstance(word, str):
            kind, blob = b"s", word.encode()
        else:
            kind, blob = b"i", str(word).encode()
        spelled += kind + len(blob).to_bytes(8, "big") + blob
    return spelled


def hkdf(secret: bytes, salt: bytes, *words: Word) -> bytes:
    """32 bytes that follow from `secret` for one use, which `words` name: HKDF-SHA256 (RFC 5869), info = their `spell`.

    Different words give unrelated keys. `salt`: public and bound in as well, such as a transcript's digest.
    """
    return HKDF(SHA256(), SIZE, salt, spell(_CONTEXT, *words)).derive(secret)


def seal(key: bytes, blob: bytes, associated: bytes = b"") -> bytes:
    """A box that only `key` opens, 16 bytes longer than `blob` (AES-256-GCM); `associated` must be the same to open it.

    The nonce is zero, so a key seals one blob in its life: derive it for this very box.
    """
    return AESGCM(key).encrypt(_NONCE, blob, associated)


def unseal(key: bytes, box: bytes, associated: bytes = b"") -> bytes:
    """What `seal` was given. A WireError when box, key or `associated` is another."""
    try:
        return AESGCM(key).decrypt(_NONCE, box, associated)
    except (InvalidTag, ValueError):
        raise WireError(
            "a box sealed under this key, with this associated data",
            f"{len(box)} bytes that it does not open",
            "Leave out whoever sealed it: it was changed on the way, or sealed for something else.",
        ) from None
