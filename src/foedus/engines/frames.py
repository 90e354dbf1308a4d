"""Asks and reports as frames on a local stream socket: what passes between a coordinator and a silo's own process.

    b"FDS" version | header bytes (u32) | payload bytes (u64) | mail bytes (u64) | header | payload | mail

Numbers are little-endian. The header is canonical JSON with exactly the fields of an `Ask` or of a `Receipt`, floats in
hexadecimal; payload and mail are raw. One value has one frame: whatever else comes is a `WireError`. Nothing that
executes can be inside.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from .. import wire
from ..errors import WireError
from ..types import Receipt, Report
from .base import Ask

VERSION = 1
MAGIC = b"FDS" + bytes([VERSION])
MOST_HEADER = 1 << 16
"""The most bytes of a header."""
MOST_BODY = 1 << 32
"""The most bytes of payload and mail together: eight times a model of 135 million parameters in fp32."""
LONGEST_ADDRESS = 100
"""A Unix socket's address holds 107 bytes on Linux, and 103 elsewhere."""

_PREFIX = struct.Struct("<4sIQQ")


def pack_ask(ask: Ask) -> bytes:
    """An ask as one frame. Raises `WireError` when it is too large."""
    return _frame(_header("ask", _ASK, vars(ask)), ask.payload, ask.mail)


def unpack_ask(frame: bytes) -> Ask:
    """The inverse of `pack_ask`. Raises `WireError` for anything that `pack_ask` could not have written."""
    header, payload, mail = _parts(frame)
    return Ask(**_fields("ask", _ASK, header), payload=payload, mail=mail)


def pack_report(report: Report) -> bytes:
    """A report as one frame. Raises `WireError` when it is too large, or its receipt is another's."""
    if (report.silo, report.round) != (report.receipt.silo, report.receipt.round):
        raise _bad("a report with its own receipt", "one with another silo's, or another round's")
    return _frame(_header("report", _RECEIPT, vars(report.receipt)), report.payload, report.mail)


def unpack_report(frame: bytes) -> Report:
    """The inverse of `pack_report`. Raises `WireError` for anything that `pack_report` could not have written."""
    header, payload, mail = _parts(frame)
    receipt = Receipt(**_fields("report", _RECEIPT, header))
    return Report(receipt.silo, receipt.round, payload, receipt, mail)


class Inbox:
    """Bytes in as they arrive, whole frames out. It holds what has come, never what a length only promises."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """The frames that this chunk completes. Raises `WireError` for bytes that are no frame's, or too many."""
        self._held += chunk
        while (size := _size(self._held)) is not None and len(self._held) >= size:
            with memoryview(self._held) as held:
                frame = bytes(held[:size])
            del self._held[:size]
            yield frame


def frames(connection: socket.socket) -> Iterator[bytes]:
    """The frames that come over a blocking connection, until the other side closes it. Raises as `Inbox` does."""
    inbox = Inbox()
    while chunk := connection.recv(1 << 20):
        yield from inbox.feed(chunk)


def listen(path: Path) -> socket.socket:
    """A socket that listens at `path`, for its owner only, however deep its folder lies."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    path.unlink(missing_ok=True)
    with _address(path) as address:
        listener.bind(address)
    path.chmod(0o600)
    listener.listen(1)
    return listener


def connect(path: Path) -> socket.socket:
    """A connection to whoever listens at `path`. Raises `OSError` when nobody does."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _address(path) as address:
            connection.connect(address)
    except OSError:
        connection.close()
        raise
    return connection


@contextmanager
def _address(path: Path) -> Iterator[str]:
    """A name for `path` that fits into a socket's address: where it is long, one that starts at an open folder."""
    if len(os.fsencode(path)) <= LONGEST_ADDRESS:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


# Headers


def _word(value: Any) -> str:
    if type(value) is not str:
        raise TypeError("Expected text.")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise TypeError("Expected a whole number.")
    return value


def _hex(value: Any) -> str:
    return float(value).hex()  # exact; and it has a NaN, which JSON does not


def _number(value: Any) -> float:
    return float.fromhex(_word(value))


_Codec = tuple[Callable[[Any], Any], Callable[[Any], Any]]
_CODECS: dict[str, _Codec] = {
    "str": (_word, _word),
    "int": (_count, _count),
    "float": (_hex, _number),
    "Mapping[str, float]": (
        lambda numbers: {_word(name): _hex(x) for name, x in numbers.items()},
        lambda words: {name: _number(x) for name, x in words.items()},
    ),
}
"""How a field of this type is written into a header, and how it is read. A new type needs its pair here to travel."""


def _codecs(kind: type) -> dict[str, _Codec]:
    return {field.name: _CODECS[str(field.type)] for field in fields(kind) if field.type != "bytes"}


_ASK, _RECEIPT = _codecs(Ask), _codecs(Receipt)


def _header(what: str, codecs: Mapping[str, _Codec], values: Mapping[str, Any]) -> bytes:
    try:
        return wire.canonical({"frame": what, **{name: write(values[name]) for name, (write, _) in codecs.items()}})
    except (TypeError, ValueError, AttributeError) as error:
        raise _bad(f"text and numbers in the {what}'s header", type(error).__name__) from error


def _fields(what: str, codecs: Mapping[str, _Codec], header: bytes) -> dict[str, Any]:
    """The values of a header; it must be spelled as this side would spell it, with no field more."""
    try:
        found = json.loads(header)
        values = {name: read(found[name]) for name, (_, read) in codecs.items()}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise _bad(f"the {what}'s header", f"another ({type(error).__name__})") from error
    if _header(what, codecs, values) != header:
        raise _bad(f"the {what}'s header", "one with other fields, or another spelling")
    return values


# Frames


def _frame(header: bytes, payload: bytes, mail: bytes) -> bytes:
    prefix = _PREFIX.pack(MAGIC, len(header), len(payload), len(mail))
    _size(prefix)
    return b"".join([prefix, header, payload, mail])


def _size(held: bytes | bytearray) -> int | None:
    """Bytes of the frame that begins here; None until its prefix is there."""
    start = bytes(held[: len(MAGIC)])
    if not MAGIC.startswith(start):
        raise _bad(f"a frame of version {VERSION}", f"bytes that begin with {start.hex()}")
    if len(held) < _PREFIX.size:
        return None
    _, header, payload, mail = _PREFIX.unpack_from(held)
    if header > MOST_HEADER or payload + mail > MOST_BODY:
        most = f"at most {MOST_HEADER:,} bytes of header and {MOST_BODY:,} of payload and mail"
        raise _bad(most, f"{header:,} and {payload + mail:,}")
    return int(_PREFIX.size + header + payload + mail)


def _parts(frame: bytes) -> tuple[bytes, bytes, bytes]:
    if _size(frame) != len(frame):
        raise _bad("one whole frame", f"{len(frame):,} bytes that are not")
    _, header, payload, _ = _PREFIX.unpack_from(frame)
    first, second = _PREFIX.size + header, _PREFIX.size + header + payload
    return frame[_PREFIX.size : first], frame[first:second], frame[second:]


def _bad(expected: str, came: str) -> WireError:
    return WireError(expected, came, "Coordinator and silo must run versions of foedus that speak the same format.")
