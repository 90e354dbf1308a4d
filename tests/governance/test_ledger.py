"""The ledger: append-only, chained, and any change to it is found."""

import json
import math
import subprocess
import sys
import time

import numpy as np
import pytest

from foedus.errors import RunError
from foedus.governance import Ledger, verify
from foedus.governance.ledger import ORIGIN, Head, _content, _stub, departs, head_of, keepers, read
from foedus.secure.keys import Identity
from foedus.wire import canonical, digest

from ..conftest import write_treaty

KEEPER, OTHER = Identity(bytes(32)), Identity(bytes([1] * 32))


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


# Signed


@pytest.fixture
def signed(tmp_path):
    ledger = Ledger(tmp_path / "signed.jsonl", KEEPER, "hospital-a")
    for i in range(5):
        ledger.append("round", {"round": i, "release": f"{i:064x}"})
    return ledger


def lines_of(ledger):
    return [json.loads(line) for line in ledger.path.read_bytes().splitlines()]


def chained(records, sign=None):
    """Records as a forger would chain them anew; `sign`: with a key of his own."""
    previous = ORIGIN
    for index, record in enumerate(records):
        record |= {"index": index, "previous": previous}
        del record["hash"]
        if sign:
            record["signature"] = sign.sign(_content(record)).hex()
        record["hash"] = previous = digest(canonical(record))
    return b"".join(canonical(record) + b"\n" for record in records)


def test_a_signed_ledger_names_its_keeper_and_verifies_by_its_key(signed):
    records = verify(signed.path, key=KEEPER.public.hex())
    assert records[0]["body"] == {"key": KEEPER.public.hex(), "name": "hospital-a"}
    assert keepers(records) == (KEEPER.public.hex(),) == (signed.key,)
    assert all(len(record["signature"]) == 128 for record in records)
    with pytest.raises(RunError, match="signed by"):
        verify(signed.path, key=OTHER.public.hex())


def test_every_changed_byte_of_a_signed_ledger_is_found(signed):
    blob = signed.path.read_bytes()
    for position in range(0, len(blob), 11):
        changed = bytearray(blob)
        changed[position] ^= 1
        signed.path.write_bytes(bytes(changed))
        with pytest.raises(RunError):
            verify(signed.path)


def test_whoever_chains_a_signed_ledger_anew_without_its_key_is_found(signed):
    for at in range(1, 6):
        records = lines_of(signed)
        records[at]["body"]["release"] = "f" * 64
        signed.path.write_bytes(chained(records))
        with pytest.raises(RunError, match="signature"):
            verify(signed.path)


def test_a_ledger_written_anew_under_another_key_is_not_its_keepers(signed):
    records = lines_of(signed)
    records[0]["body"]["key"] = OTHER.public.hex()
    signed.path.write_bytes(chained(records, sign=OTHER))
    assert verify(signed.path, key=OTHER.public.hex())
    with pytest.raises(RunError, match="signed by"):
        verify(signed.path, key=KEEPER.public.hex())


def test_a_forged_hand_over_is_found_even_when_it_names_the_true_key(signed):
    records = lines_of(signed)[:1]
    records[0]["body"]["key"] = OTHER.public.hex()
    records.append({**records[0], "body": {"key": KEEPER.public.hex()}})
    signed.path.write_bytes(chained(records, sign=OTHER))
    with pytest.raises(RunError, match="signed by"):
        verify(signed.path, key=KEEPER.public.hex())


def test_only_its_keeper_adds_to_a_signed_ledger(signed):
    for other in (None, OTHER):
        stranger = Ledger(signed.path, other)
        with pytest.raises(RunError, match="the key that keeps"):
            stranger.append("round", {})
    assert len(Ledger(signed.path, KEEPER).records) == 6


def test_a_keeper_hands_over_to_a_new_key(signed):
    signed.hand_over(OTHER)
    signed.append("round", {"round": 5})
    with pytest.raises(RunError, match="the key that keeps"):
        Ledger(signed.path, KEEPER).append("round", {})
    records = verify(signed.path, key=OTHER.public.hex())
    assert verify(signed.path, key=KEEPER.public.hex()) == records and len(keepers(records)) == 2


def test_an_unsigned_ledger_is_signed_from_some_record_on(path):
    Ledger(path, KEEPER).append("round", {"round": 5})
    records = verify(path, key=KEEPER.public.hex())
    assert ["signature" in record for record in records] == [False] * 5 + [True] * 2
    changed = lines_of(Ledger(path))
    changed[2]["body"]["release"] = "f" * 64
    path.write_bytes(chained(changed))
    with pytest.raises(RunError, match="signature"):
        verify(path)


def test_an_unsigned_record_in_a_signed_ledger_is_found(signed):
    records = lines_of(signed)
    del records[-1]["signature"]
    signed.path.write_bytes(chained(records))
    with pytest.raises(RunError, match="not signed"):
        verify(signed.path)


# Heads


def test_a_cut_and_another_history_are_found_by_a_head_that_was_known(signed, path):
    head = signed.head
    assert Head.parse(str(head)) == head == head_of(verify(signed.path)) and not departs(signed.records, head)
    assert "cut off" in departs(signed.records[:-1], head)
    assert "two histories" in departs(signed.records, Head(head.count, "f" * 64))
    assert not departs([], Head(0, ORIGIN))
    for bad in ("", "5", "-1:" + "0" * 64, "5:xyz"):
        with pytest.raises(RunError, match="a head"):
            Head.parse(bad)


def test_a_ledger_that_is_cut_while_it_is_open_is_found_at_the_next_record(signed):
    lines = signed.path.read_bytes().splitlines(keepends=True)
    signed.path.write_bytes(b"".join(lines[:-2]))
    with pytest.raises(RunError, match="cut off"):
        signed.append("round", {"round": 6})


def test_a_last_record_that_was_replaced_while_it_is_open_is_found_at_the_next_record(path):
    ledger = Ledger(path)
    lines = path.read_bytes().splitlines(keepends=True)
    last = json.loads(lines[-1])
    del last["hash"]
    last["body"]["release"] = "f" * 64
    last["hash"] = digest(canonical(last))
    path.write_bytes(b"".join(lines[:-1]) + canonical(last) + b"\n")
    with pytest.raises(RunError, match="two histories"):
        ledger.append("round", {"round": 6})


# Several processes


def test_two_holders_of_one_ledger_add_to_one_chain(signed):
    other = Ledger(signed.path, KEEPER)
    for i in range(4):
        (signed, other)[i % 2].append("round", {"round": 10 + i})
    other.once("round", {"round": 12}, same=("round",))
    assert [r["body"].get("round") for r in verify(signed.path)][-4:] == [10, 11, 12, 13]


def test_processes_that_add_at_once_make_one_chain(tmp_path):
    code = (
        "import sys, pathlib\n"
        "from foedus.governance.ledger import Ledger\n"
        "from foedus.secure.keys import Identity\n"
        "ledger = Ledger(pathlib.Path(sys.argv[1]), Identity(bytes(32)))\n"
        "for i in range(25):\n"
        "    ledger.append('asked', {'by': sys.argv[2], 'number': i})\n"
    )
    path = tmp_path / "ledger.jsonl"
    running = [subprocess.Popen([sys.executable, "-c", code, str(path), str(i)]) for i in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    records = verify(path, key=KEEPER.public.hex())
    assert len(records) == 76 and len(keepers(records)) == 1
    for by in "012":
        assert [r["body"]["number"] for r in records if r["body"].get("by") == by] == list(range(25))


def test_a_line_that_is_being_written_is_left_out_by_a_reader_and_found_by_verify(signed):
    with signed.path.open("ab") as file:
        file.write(b'{"body":{},"ha')
    assert len(read(signed.path)) == 6
    with pytest.raises(RunError, match="whole"):
        verify(signed.path)
    assert b'"ha' in signed.path.read_bytes()[-5:]


# Retention


def test_a_pruned_ledger_still_verifies_and_stands_at_the_same_head(signed):
    head = signed.head
    assert signed.prune(keep=2) == 3
    records = verify(signed.path, key=KEEPER.public.hex())
    assert [r["kind"] for r in records] == ["keeper", "pruned", "round", "round"]
    assert records[1]["body"]["kinds"] == {"round": 3} and head_of(records) == head and not departs(records, head)
    signed.append("round", {"round": 5})
    assert Ledger(signed.path, KEEPER).prune(keep=1) == 2
    records = verify(signed.path)
    assert [r["kind"] for r in records] == ["keeper", "pruned", "round"] and records[1]["body"]["kinds"] == {"round": 5}
    assert signed.append("round", {"round": 6})["index"] == 7  # by one who had it open all the while


def test_what_was_spent_and_opened_is_never_pruned(tmp_path):
    ledger = Ledger(tmp_path / "l", KEEPER)
    for r in range(3):
        for kind in ("charge", "asked", "survivors", "answered"):
            ledger.append(kind, {"round": r})
    assert ledger.prune(keep=0) == 6 and ledger.prune(keep=0) == 0
    assert [r["kind"] for r in verify(ledger.path) if r["kind"] != "pruned"] == ["keeper", *("charge", "survivors") * 3]


def test_who_took_part_and_what_was_in_use_is_never_pruned(tmp_path):
    ledger = Ledger(tmp_path / "l", KEEPER)
    kinds = ["founded", "admitted", "proposed", "joined", "signed", "registry", "revoked"]
    for kind in kinds:
        ledger.append(kind, {"name": "a"})
    assert ledger.prune(keep=0) == 0 and [r["kind"] for r in verify(ledger.path)] == ["keeper", *kinds]


def test_a_pruned_stretch_can_be_neither_forged_nor_widened(signed):
    signed.prune(keep=1)
    whole = signed.path.read_bytes()
    for spoil in (lambda b: b["kinds"].update(round=9), lambda b: b.update(head="f" * 64), lambda b: b.update(first=2)):
        records = [json.loads(line) for line in whole.splitlines()]
        spoil(records[1]["body"])
        del records[1]["hash"]
        records[1]["hash"] = digest(canonical(records[1]))
        signed.path.write_bytes(b"".join(canonical(record) + b"\n" for record in records))
        with pytest.raises(RunError):
            verify(signed.path)


def test_a_stretch_pruned_by_somebody_else_is_found(signed):
    records = [*signed.records[:1], *_stub(signed.records[1:3], OTHER), *signed.records[3:]]
    signed.path.write_bytes(b"".join(canonical(record) + b"\n" for record in records))
    with pytest.raises(RunError, match="never kept it"):
        verify(signed.path)


def test_a_ledger_that_nobody_signs_is_not_pruned(path):
    with pytest.raises(RunError, match="no keeper"):
        Ledger(path).prune(keep=1)
    assert len(verify(path)) == 5


# What may stand in it


@pytest.mark.parametrize("value", [b"bytes", np.zeros(2), object(), math.nan, math.inf, {"deep": [b"x"]}])
def test_only_numbers_digests_words_and_names_enter_a_ledger(path, value):
    ledger, before = Ledger(path), path.read_bytes()
    with pytest.raises(RunError, match="numbers, digests, words"):
        ledger.append("round", {"x": value})
    assert path.read_bytes() == before


def test_no_text_hides_in_a_word(path):
    text = "The patient said:\n" + "it hurts here " * 100
    word = Ledger(path).append("refused", {"reason": text})["body"]["reason"]
    assert len(word) == 500 and "\n" not in word


def test_callers_cannot_name_a_keeper_or_prune_by_hand(path):
    for kind in ("keeper", "pruned"):
        with pytest.raises(RunError, match="callers may add"):
            Ledger(path).append(kind, {})


def test_the_ledger_of_a_real_run_holds_digests_names_of_silos_and_words_of_ours(tmp_path):
    from foedus.build import build
    from foedus.execute import begin, execute
    from foedus.treaty import load

    file = write_treaty(tmp_path)
    short = file.read_text().replace("rounds = 3", "rounds = 1").replace('["base", "local", "pooled"]', "[]")
    file.write_text(short)
    treaty = load(file)
    place = build(treaty)
    for _ in execute(begin(treaty, tmp_path / "run"), place):
        pass
    known = {*place.silos, "round", "none", "mechanism"}

    def strings(value):
        if isinstance(value, dict):
            for name, item in value.items():
                yield from strings(item)
                yield name
        elif isinstance(value, list):
            for item in value:
                yield from strings(item)
        elif isinstance(value, str):
            yield value

    fields = {"treaty", "model", "silos", "task", "reports", "payload", "bytes", "failures", "release", "params",
              "event", "adapter", "rounds"}  # fmt: skip
    for record in verify(tmp_path / "run/ledger.jsonl"):
        for string in strings(record["body"]):
            assert string in known | fields or (len(string) == 64 and set(string) <= set("0123456789abcdef")), string


# Size


def test_many_records_open_quickly(tmp_path):
    """20,000 of one kilobyte here. Read and verified at the pace of JSON: 100,000 take about two seconds of CPU."""
    reports = {f"silo-{i}": {"payload": "b" * 64, "bytes": 9} for i in range(4)}
    body = {"task": "a" * 64, "release": "c" * 64, "params": "d" * 64, "reports": reports, "failures": {}}
    ledger = Ledger(tmp_path / "ledger.jsonl", KEEPER)
    records = [ledger.append("round", body) and ledger.records[0]]
    for i in range(1, 20_000):
        record = {"index": i, "previous": records[-1]["hash"], "kind": "round", "body": body, "signature": "0" * 128}
        if i == 19_999:
            record["signature"] = KEEPER.sign(_content(record)).hex()
        records.append({**record, "hash": digest(canonical(record))})
    ledger.path.write_bytes(b"".join(canonical(record) + b"\n" for record in records))
    began = time.process_time()
    assert len(Ledger(ledger.path).records) == 20_000
    assert time.process_time() - began < 3  # 0.4 s, on a machine of which we have a share only
