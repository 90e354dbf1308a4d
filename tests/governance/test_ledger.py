"""The ledger: append-only, chained, and any change to it is found."""

import json

import pytest

from foedus.errors import RunError
from foedus.governance import Ledger, verify


@pytest.fixture
def path(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for i in range(5):
        ledger.append("round", {"round": i, "release": f"{i:064x}"})
    return tmp_path / "ledger.jsonl"


def test_a_ledger_that_nobody_touched_verifies(path):
    assert [r["body"]["round"] for r in verify(path)] == [0, 1, 2, 3, 4]


def test_every_changed_byte_is_found(path):
    blob = path.read_bytes()
    for position in range(0, len(blob), 7):
        changed = bytearray(blob)
        changed[position] ^= 1
        path.write_bytes(bytes(changed))
        with pytest.raises(RunError):
            verify(path)


@pytest.mark.parametrize("spoil", [
    lambda lines: lines[:2] + lines[3:],
    lambda lines: lines[1:],
    lambda lines: [lines[1], lines[0], *lines[2:]],
    lambda lines: lines[:3] + [lines[2]] + lines[3:],
])  # fmt: skip
def test_gaps_swaps_and_repetitions_are_found(path, spoil):
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join(spoil(lines)) + b"\n")
    with pytest.raises(RunError, match="fits the chain"):
        verify(path)


def test_a_line_torn_by_a_crash_is_dropped_and_the_chain_goes_on(path):
    with path.open("ab") as file:
        file.write(b'{"index":5,"prev')
    ledger = Ledger(path)
    ledger.append("closed", {})
    assert [r["kind"] for r in verify(path)] == ["round"] * 5 + ["closed"]


def test_a_round_redone_with_the_same_outcome_is_recorded_once(path):
    ledger = Ledger(path)
    ledger.once("round", {"round": 4, "release": f"{4:064x}"}, same=("round",))
    assert len(verify(path)) == 5


def test_a_round_redone_with_another_outcome_is_recorded_beside_the_first(path):
    ledger = Ledger(path)
    for _ in range(2):
        ledger.once("round", {"round": 4, "release": "f" * 64}, same=("round",))
    records = verify(path)
    assert len(records) == 6
    assert records[-1]["body"] == {"round": 4, "release": "f" * 64, "redone": True}


def test_a_round_redone_under_other_masks_with_the_same_outcome_is_recorded_once(path):
    ledger = Ledger(path)
    for reports, release in [("a", "r"), ("b", "r"), ("b", "s")]:
        ledger.once("round", {"round": 9, "reports": reports, "release": release}, same=("round",), free=("reports",))
    assert [r["body"].get("release") for r in verify(path)[5:]] == ["r", "s"]


def test_records_hold_no_clock(path):
    assert set(json.loads(path.read_text().splitlines()[0])) == {"index", "previous", "kind", "body", "hash"}
