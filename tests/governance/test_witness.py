"""Two ledgers side by side: they prove that their keepers saw the same rounds, or say exactly where they part."""

import json

import pytest

from foedus.governance import Ledger
from foedus.governance.ledger import verify
from foedus.governance.witness import compare, compare_all
from foedus.secure.keys import Identity

TREATY = "ab" * 32
KEYS = {name: Identity(name.encode().ljust(32, b".")) for name in ("coordinator", "a", "b")}


def sha(*words) -> str:
    import hashlib

    return hashlib.sha256(repr(words).encode()).hexdigest()


def coordinators(path, rounds=4, silos=("a", "b"), changed=None, key="coordinator"):
    ledger = Ledger(path, KEYS[key], key)
    ledger.append("opened", {"treaty": TREATY, "model": sha("model"), "silos": list(silos)})
    for r in range(1, rounds + 1):
        body = {
            "round": r, "task": sha("task", r), "release": sha("release", r), "params": sha("params", r),
            "reports": {silo: {"payload": sha("payload", silo, r), "bytes": 9} for silo in silos}, "failures": {},
        }  # fmt: skip
        ledger.append("round", (changed or (lambda body: body))(body))
    return ledger


def silos(path, name, rounds=4, skip=(), changed=None):
    ledger = Ledger(path, KEYS[name], name)
    for r in range(1, rounds + 1):
        if r not in skip:
            body = {
                "treaty": TREATY, "ask": "train", "round": r, "task": sha("task", r),
                "params": sha("params", r - 1), "payload": sha("payload", name, r), "failure": "",
            }  # fmt: skip
            ledger.append("answered", (changed or (lambda body: body))(body))
    return ledger


def found(left: Ledger, right: Ledger):
    return compare(verify(left.path), verify(right.path))


def at(round, **facts):
    return lambda body: {**body, **facts} if body["round"] == round else body


def test_a_coordinator_and_its_silos_saw_the_same_rounds(tmp_path):
    ledgers = {
        "coordinator": coordinators(tmp_path / "c"),
        "a": silos(tmp_path / "a", "a"),
        "b": silos(tmp_path / "b", "b"),
    }
    pairs = compare_all({name: verify(ledger.path) for name, ledger in ledgers.items()})
    assert len(pairs) == 3 and all(pair.same and not pair.notes for pair in pairs)
    assert all(pair.agreed == tuple((TREATY, r) for r in (1, 2, 3, 4)) for pair in pairs)


@pytest.mark.parametrize(("facts", "what"), [
    ({"task": sha("other")}, "the task"),
    ({"params": sha("other")}, "the parameters in the task"),
    ({"payload": sha("other")}, "the payload of a"),
])  # fmt: skip
def test_where_a_silo_saw_something_else_is_said_exactly(tmp_path, facts, what):
    result = found(coordinators(tmp_path / "c"), silos(tmp_path / "a", "a", changed=at(3, **facts)))
    assert [(p.what, p.round) for p in result.parted] == [(what, 3)]
    assert result.agreed == ((TREATY, 1), (TREATY, 2), (TREATY, 4)) and f"round 3: {what}" in str(result.parted[0])


def test_two_silos_that_were_given_different_tasks_find_out(tmp_path):
    result = found(silos(tmp_path / "a", "a"), silos(tmp_path / "b", "b", changed=at(2, task=sha("another"))))
    assert [(p.what, p.round) for p in result.parted] == [("the task", 2)]


def test_a_payload_that_the_silo_never_gave_is_found(tmp_path):
    result = found(coordinators(tmp_path / "c"), silos(tmp_path / "a", "a", skip=(2,)))
    assert [(p.round, "a payload of a" in p.what) for p in result.parted] == [(2, True)]


def test_a_round_that_the_coordinator_hides_is_found(tmp_path):
    coordinator = Ledger(tmp_path / "c", KEYS["coordinator"])
    for record in coordinators(tmp_path / "whole").records[1:]:
        if record["body"].get("round") != 2:
            coordinator.append(record["kind"], record["body"])
    assert [p.round for p in found(coordinator, silos(tmp_path / "a", "a")).parted if "skips" in p.what] == [2]


def test_a_round_still_under_way_and_a_late_answer_are_no_contradiction(tmp_path):
    def late(body):
        reports = {silo: given for silo, given in body["reports"].items() if silo != "a" or body["round"] != 2}
        return {**body, "reports": reports}

    result = found(coordinators(tmp_path / "c", rounds=3, changed=late), silos(tmp_path / "a", "a"))
    assert result.same and len(result.agreed) == 3
    assert ["round 4" in note for note in result.notes] == [True]


def test_rounds_whose_cohort_is_hidden_are_compared_by_task_and_parameters(tmp_path):
    hidden = coordinators(tmp_path / "c", changed=lambda body: {**body, "reports": {}})
    assert found(hidden, silos(tmp_path / "a", "a", skip=(3,))).same
    assert not found(hidden, silos(tmp_path / "b", "b", changed=at(4, task=sha("x")))).same


def test_a_round_redone_under_other_masks_still_agrees(tmp_path):
    ledger = silos(tmp_path / "a", "a")
    body = {**ledger.records[-1]["body"], "payload": sha("the same words under other masks")}
    ledger.append("answered", body)
    assert found(coordinators(tmp_path / "c"), ledger).same


def test_an_end_that_was_cut_off_after_others_saw_it_is_found(tmp_path):
    coordinator, silo = coordinators(tmp_path / "c"), silos(tmp_path / "a", "a")
    told = {"key": coordinator.key, "count": coordinator.head.count, "hash": coordinator.head.hash}
    silo.append("greeted", {"seen": told})
    assert found(coordinator, silo).same
    lines = coordinator.path.read_bytes().splitlines(keepends=True)
    coordinator.path.write_bytes(b"".join(lines[:-1]))
    result = found(coordinator, silo)
    assert not result.same and "its end was cut off" in result.parted[0].what


def test_a_ledger_that_its_own_keeper_wrote_anew_is_found_by_whoever_saw_the_first(tmp_path):
    first, silo = coordinators(tmp_path / "c"), silos(tmp_path / "a", "a")
    silo.append("greeted", {"seen": {"key": first.key, "count": first.head.count, "hash": first.head.hash}})
    anew = coordinators(tmp_path / "anew", changed=at(4, release=sha("other")))
    assert "two histories" in found(silo, anew).parted[0].what


def test_two_signed_histories_of_one_keeper_are_a_fork_and_a_copy_is_not(tmp_path):
    whole = coordinators(tmp_path / "c")
    older = tmp_path / "older"
    older.write_bytes(b"".join(whole.path.read_bytes().splitlines(keepends=True)[:4]))
    copy = compare(verify(whole.path), verify(older), ("whole", "older"))
    assert copy.same and copy.notes == ("older is the older copy: 2 records fewer",) and len(copy.agreed) == 2
    fork = found(whole, coordinators(tmp_path / "fork", changed=at(3, release=sha("other"))))
    assert "two histories of one keeper, from record 4 on" in fork.parted[0].what


def test_a_keepers_other_book_is_no_fork_of_this_one_and_neither_is_a_namesakes(tmp_path):
    run, home = coordinators(tmp_path / "run"), Ledger(tmp_path / "home", KEYS["coordinator"], "federation")
    home.append("founded", {"federation": "federation"})
    assert found(run, home).same and found(home, run).same
    one, namesake = silos(tmp_path / "one", "a"), Ledger(tmp_path / "namesake", KEYS["b"], "a")
    for record in one.records[1:]:
        namesake.append(record["kind"], record["body"])
    assert all(pair.same and len(pair.agreed) == 4 for pair in (found(one, namesake), found(namesake, one)))


def test_a_pruned_ledger_is_compared_as_far_as_it_goes(tmp_path):
    coordinator, silo = coordinators(tmp_path / "c"), silos(tmp_path / "a", "a")
    assert silo.prune(keep=2) == 2
    result = found(coordinator, silo)
    assert result.same and [number for _, number in result.agreed] == [3, 4] and "pruned" in result.notes[0]
    assert found(silo, silos(tmp_path / "copy", "a")).same


def test_a_comparison_prints_as_json(tmp_path):
    from dataclasses import asdict

    assert json.dumps(asdict(found(coordinators(tmp_path / "c"), silos(tmp_path / "a", "a"))))
