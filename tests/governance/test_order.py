"""Numbers and rounds: nothing old is new again, whatever restarts, and whatever is put back from yesterday."""

from __future__ import annotations

from dataclasses import replace

import pytest

from foedus.errors import RunError
from foedus.governance import consent
from foedus.governance.consent import Consent
from foedus.governance.envelope import Reason, Refused
from foedus.governance.order import BYE, Numbers, Order


def refused(act) -> Reason:
    with pytest.raises(Refused) as caught:
        act()
    return caught.value.reason


def test_no_number_is_given_twice_by_however_many_processes_and_after_however_many_restarts(tmp_path):
    path = tmp_path / "numbers.json"
    first, given = Numbers(path), []
    for _ in range(4):
        other = Numbers(path)
        given += [first.next("north"), other.next("north"), first.next("north")]
    assert given == list(range(1, 13)) and Numbers(path).next("south") == 1
    path.unlink()
    assert first.next("north") == 13


def test_a_number_that_cannot_be_written_down_is_not_given(tmp_path):
    numbers = Numbers(tmp_path / "numbers.json")
    (tmp_path / ".numbers.json.part").mkdir()  # a disk that takes nothing
    with pytest.raises(RunError):
        numbers.next("north")
    (tmp_path / ".numbers.json.part").rmdir()
    assert numbers.next("north") == 1


def test_an_older_message_is_never_new_and_the_last_one_is_the_last_one_again(tmp_path):
    order = Order(tmp_path / "counters.json")
    assert order.is_new(3, "c")
    order.take(3, "c", "train", 0, "t")
    for known in (order, Order(tmp_path / "counters.json")):
        assert not known.is_new(3, "c") and known.is_new(4, "d")
        assert refused(lambda known=known: known.is_new(3, "another")) == Reason.REPLAYED
        assert refused(lambda known=known: known.is_new(2, "b")) == Reason.REPLAYED


def test_rounds_never_go_back_and_each_has_one_task(tmp_path):
    order = Order(tmp_path / "counters.json")
    order.take(1, "a", "train", 3, "task")
    for known in (order, Order(tmp_path / "counters.json")):
        known.check("train", 3, "task")
        known.check("train", 5, "later")
        known.check("evaluate test", 3, "any")
        assert refused(lambda known=known: known.check("train", 3, "other")) == Reason.OUT_OF_ORDER
        assert refused(lambda known=known: known.check("train", 2, "task")) == Reason.OUT_OF_ORDER
        assert refused(lambda known=known: known.check("evaluate test", 2, "any")) == Reason.OUT_OF_ORDER


def test_counters_put_back_to_yesterday_are_noticed_by_the_ledger(tmp_path):
    path = tmp_path / "counters.json"
    order = Order(path)
    order.take(1, "a", "train", 0, "t0")
    yesterday = path.read_bytes()
    order.take(2, "b", "train", 1, "t1")
    path.write_bytes(yesterday)
    ledger = [{"number": 1, "ask": "a", "stream": "train", "round": 0, "task": "t0"},
              {"number": 2, "ask": "b", "stream": "train", "round": 1, "task": "t1"}]  # fmt: skip
    again = Order(path, ledger)
    assert again.taken == order.taken
    path.unlink()
    assert Order(path, ledger).taken == order.taken


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b'{"number":-1,"ask":"","rounds":{}}', b"[" * 10**5])
def test_counters_that_cannot_be_read_are_not_begun_anew(tmp_path, content):
    path = tmp_path / "counters.json"
    path.write_bytes(content)
    with pytest.raises(RunError, match="as it was"):
        Order(path)
    if content not in (b"{}",):
        with pytest.raises(RunError, match="as it was"):
            Numbers(path)


def test_what_an_operator_decides_is_read_back(tmp_path):
    path = tmp_path / "state.json"
    assert consent.read(path) == Consent()
    consent.write(path, Consent(paused=True).without("aa").without("bb").without("aa"))
    assert consent.read(path) == Consent(paused=True, withdrawn=("aa", "bb"))


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"paused":0,"left":false,"withdrawn":[]}', b"[" * 10**5])
def test_decisions_that_cannot_be_read_count_as_paused(tmp_path, content):
    (tmp_path / "state.json").write_bytes(content)
    found = consent.read(tmp_path / "state.json")
    assert found.paused and found.doubt and refused(lambda: found.check("aa")) == Reason.PAUSED


def test_no_decision_is_written_over_others_that_cannot_be_read(tmp_path):
    path = tmp_path / "state.json"
    path.write_bytes(b'{"withdrawn": ["aa"')
    with pytest.raises(RunError, match="decisions as they were written"):
        consent.write(path, replace(consent.read(path), paused=False))
    assert path.read_bytes() == b'{"withdrawn": ["aa"'


def test_after_a_good_bye_nothing_goes_on(tmp_path):
    order = Order(tmp_path / "counters.json")
    order.take(1, "a", "train", 0, "task")
    order.go_on()
    order.take(2, "b", BYE)
    again, replayed = (
        Order(tmp_path / name, [{"number": 2, "ask": "b", "stream": BYE}]) for name in ("counters.json", "x")
    )
    for one in (order, again, replayed):
        assert refused(one.go_on) == Reason.OUT_OF_ORDER


def test_each_decision_has_its_reason():
    Consent().check("aa")
    assert refused(lambda: Consent(paused=True).check("aa")) == Reason.PAUSED
    assert refused(lambda: Consent(left=True).check("aa")) == Reason.LEFT
    assert refused(lambda: Consent(withdrawn=("aa",)).check("aa")) == Reason.WITHDRAWN
    assert refused(lambda: Consent(doubt="state.json that cannot be read").check("aa")) == Reason.PAUSED
    Consent(withdrawn=("aa",)).check("bb")
