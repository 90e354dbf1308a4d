"""Frames: what is sent is what arrives, however it is cut; whatever else comes is refused, and costs no memory."""

from __future__ import annotations

import json
import struct
import tracemalloc
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from foedus import wire
from foedus.engines.base import Ask
from foedus.engines.frames import MOST_HEADER, Inbox, pack_ask, pack_report, unpack_ask, unpack_report
from foedus.errors import WireError
from foedus.types import Receipt, Report

TEXT = some.text(some.characters(exclude_categories=["Cs"]), max_size=20)
COUNT = some.integers(0, 2**63 - 1)
NUMBER = some.floats(allow_nan=False)
ASKS = some.builds(Ask, TEXT, TEXT, some.binary(), TEXT, some.binary())
RECEIPTS = some.builds(
    Receipt, TEXT, COUNT, TEXT, TEXT, COUNT, COUNT, NUMBER, some.dictionaries(TEXT, NUMBER, max_size=3), TEXT
)
REPORTS = some.builds(lambda r, up, mail: Report(r.silo, r.round, up, r, mail), RECEIPTS, some.binary(), some.binary())

ASK = Ask("train", "law", b"task", mail=b"mail")
REPORT = Report("law", 3, b"sums", Receipt("law", 3, "t", "p", 4, 5, 0.1, {"loss": 2.5}), b"mail")


def refused(frame: bytes) -> bool:
    """Whether neither side takes these bytes for a message."""
    for unpack in (unpack_ask, unpack_report):
        with pytest.raises(WireError):
            unpack(frame)
    return True


def with_header(frame: bytes, header: bytes) -> bytes:
    """The same frame with another header."""
    _, old, payload, mail = struct.unpack_from("<4sIQQ", frame)
    return struct.pack("<4sIQQ", frame[:4], len(header), payload, mail) + header + frame[24 + old :]


def spelled(header: dict) -> bytes:
    """Canonical JSON, of whatever there is."""
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode(errors="surrogatepass")


@given(ASKS)
def test_an_ask_arrives_as_it_was_sent(ask):
    assert unpack_ask(pack_ask(ask)) == ask


@given(REPORTS)
def test_a_report_arrives_as_it_was_sent(report):
    assert unpack_report(pack_report(report)) == report


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -0.0, 5e-324])
def test_a_loss_that_json_does_not_have_arrives_too(loss):
    sent = replace(REPORT, receipt=replace(REPORT.receipt, disclosed={"loss": loss}))
    came = unpack_report(pack_report(sent)).receipt.disclosed["loss"]
    assert came.hex() == loss.hex()


@given(some.lists(some.one_of(ASKS, REPORTS), max_size=5), some.data())
def test_frames_are_found_however_the_stream_is_cut(messages, data):
    sent = [pack_ask(x) if isinstance(x, Ask) else pack_report(x) for x in messages]
    stream, inbox, came = b"".join(sent), Inbox(), []
    while stream:
        cut = data.draw(some.integers(1, len(stream)))
        came += inbox.feed(stream[:cut])
        stream = stream[cut:]
    assert came == sent


@given(some.binary(max_size=200))
def test_random_bytes_are_refused(blob):
    assert refused(blob)


@settings(max_examples=500)
@given(some.sampled_from([pack_ask(ASK), pack_report(REPORT)]), some.data())
def test_whatever_is_accepted_is_the_only_frame_of_its_message(frame, data):
    """Bytes changed, cut, repeated or inserted anywhere: refused, or another message spelled in its one way."""
    at = data.draw(some.integers(0, len(frame)))
    until = data.draw(some.integers(at, min(len(frame), at + 8)))
    changed = frame[:at] + data.draw(some.binary(max_size=8)) + frame[until:]
    for unpack, pack in ((unpack_ask, pack_ask), (unpack_report, pack_report)):
        try:
            message = unpack(changed)
        except WireError:
            continue
        assert pack(message) == changed


HEADER = json.loads(pack_report(REPORT)[24:].partition(b"}sums")[0] + b"}")


@pytest.mark.parametrize("changes", [
    {"round": -1}, {"round": True}, {"round": 1.0}, {"round": "3"}, {"round": 2**63}, {"silo": None}, {"silo": ["law"]},
    {"silo": "\ud800"}, {"seconds": 0.1}, {"seconds": "0.1"}, {"seconds": "0x1p+9999"}, {"seconds": "-nan"},
    {"disclosed": [["loss", "nan"]]}, {"disclosed": {"loss": 2.5}}, {"frame": "ask"}, {"more": 1},
], ids=str)  # fmt: skip
def test_a_header_is_taken_only_in_its_own_types_and_spelling(changes):
    frame = pack_report(REPORT)
    assert with_header(frame, spelled(HEADER)) == frame
    assert refused(with_header(frame, spelled({**HEADER, **changes})))
    assert refused(with_header(frame, spelled(HEADER) + b" "))


def test_a_header_lacks_no_field_and_repeats_none():
    for name in HEADER:
        rest = {other: x for other, x in HEADER.items() if other != name}
        assert refused(with_header(pack_report(REPORT), wire.canonical(rest)))
        twice = b'{"%s":1,' % name.encode() + wire.canonical(HEADER)[1:]
        assert refused(with_header(pack_report(REPORT), twice))
    assert refused(with_header(pack_report(REPORT), b"[" * 60_000))


def test_a_frame_of_another_version_is_refused_by_its_first_bytes():
    with pytest.raises(WireError, match="version 1"):
        list(Inbox().feed(b"FDS\x02"))


def test_a_length_beyond_the_limits_is_refused_before_anything_is_held():
    for header, payload, mail in ((MOST_HEADER + 1, 0, 0), (0, 1 << 33, 0), (0, 1 << 32, 1), (0, 2**64 - 1, 2**64 - 1)):
        with pytest.raises(WireError, match="at most"):
            list(Inbox().feed(struct.pack("<4sIQQ", b"FDS\x01", header, payload, mail)))


def test_a_length_that_only_promises_bytes_costs_no_memory():
    inbox = Inbox()
    tracemalloc.start()
    assert not list(inbox.feed(struct.pack("<4sIQQ", b"FDS\x01", 10, 1 << 32, 0) + b"few"))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_what_does_not_fit_a_frame_is_not_sent():
    with pytest.raises(WireError, match="at most"):
        pack_ask(replace(ASK, silo="x" * MOST_HEADER))
    with pytest.raises(WireError, match="own receipt"):
        pack_report(replace(REPORT, silo="sport"))
    with pytest.raises(WireError, match="text and numbers"):
        pack_report(replace(REPORT, receipt=replace(REPORT.receipt, disclosed={"loss": "much"})))
