"""Charters: what they do not name they do not permit, and every clause can say no."""

from __future__ import annotations

import json
import re
import tomllib
from datetime import UTC, date, datetime

import pytest

from foedus.errors import TreatyError
from foedus.secure.keys import Identity
from foedus.treaty import Mistakes, charter, parse
from foedus.treaty.charter import Charter, Cost, another_model, closed, refusals
from foedus.treaty.signed import Signed, propose

from ..deploy.parties import CHARTER as BROAD
from ..deploy.parties import NOON, TREATY

CHAIR, KEYS = Identity.fresh(), {name: Identity.fresh().public for name in ("north", "south", "west")}
PRIVATE = """
[privacy]
unit = "example"
epsilon = 4.0
rate = 0.1
"""
MASKED = """
[server]
weighting = "uniform"
[secure]
sums = "masked"
range = 8.0
corrupt = 0.0
dropout = 0.0
"""
NARROW = {
    "algorithms": '["fedavg", "scaffold"]', "columns": '["text"]', "sources": "[]", "sums": '["open", "masked"]',
    "holdings": "false",
}  # fmt: skip
CHARTER = re.sub(r"^(\w+) = (.*)$", lambda line: f"{line[1]} = {NARROW.get(line[1], line[2])}", BROAD, flags=re.M)
HOURS = '[hours]\nzone = "Europe/Berlin"\ndays = ["mon", "fri"]\nbegin = "20:00"\nend = "06:00"\n'


def signed(text: str = TREATY) -> Signed:
    return propose(parse(text), CHAIR, KEYS)


def permits(changes: tuple[tuple[str, str], ...] = ()) -> Charter:
    text = CHARTER
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return charter.parse(text)


def against(found: Charter, made: Signed, cost: Cost | None = None, now: datetime = NOON) -> list[str]:
    return [str(clause) for clause in refusals(found, made, joined=CHAIR.public, cost=cost, now=now)]


def test_a_treaty_within_a_charter_is_permitted():
    assert against(permits(), signed()) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"tiny:llama" = "any"', "", '[models] allows none; asked: "tiny:llama"'),
        ('kinds = ["lora"]', "kinds = []", '[adapters] kinds allows none; asked: "lora"'),
        ("max_rank = 8", "max_rank = 2", "[adapters] max_rank allows at most 2 rank; asked: 4"),
        ('tasks = ["causal-lm"]', 'tasks = ["seq2seq"]', '[training] tasks allows "seq2seq"; asked: "causal-lm"'),
        ('["fedavg", "scaffold"]', '["scaffold"]', '[training] algorithms allows "scaffold"; asked: "fedavg"'),
        ("max_rounds = 10", "max_rounds = 4", "[training] max_rounds allows at most 4 rounds; asked: 5"),
        ("max_steps = 5", "max_steps = 1", "[training] max_steps allows at most 1 steps a round; asked: 2"),
        ('columns = ["text"]', 'columns = ["note"]', '[data] columns allows "note"; asked: "text"'),
        (
            'unit = "none"',
            'unit = "example"',
            '[privacy] unit allows "example" or more (none < example < author < silo);',
        ),
        ('sums = ["open", "masked"]', 'sums = ["masked"]', '[secure] sums allows "masked"; asked: "open"'),
        ("others = 0", "others = 2", "[secure] others allows sums with 2 others or more; asked: with 0"),
        ("loss = true", "loss = false", "[disclosure] loss allows none; asked: that silos tell it"),
        (
            'splits = ["validation", "test"]',
            "splits = []",
            '[evaluation] splits allows none; asked: "validation", "test"',
        ),
        ('baselines = ["base"]', "baselines = []", '[evaluation] baselines allows none; asked: "base"'),
        (
            "[models]",
            f'[coordinators]\ntrusted = ["{"ab" * 32}"]\n[models]',
            "[coordinators] trusted allows the keys it",
        ),
        (
            "[models]",
            "[charter]\nexpires = 2026-11-20\n[models]",
            "[charter] expires allows work until 2026-11-20; asked",
        ),
    ],
)
def test_each_clause_refuses_what_it_does_not_name_and_says_so(old, new, said):
    (refusal,) = against(permits(((old, new),)), signed())
    assert refusal.startswith(said)


@pytest.mark.parametrize(
    ("treaty", "said"),
    [
        (TREATY.replace('source = "memory"', 'source = "20newsgroups"\ndomain = "domain"') .replace(
            "[silos]", '[silos]\nby = "domain"'), ['[data] columns allows "text"; asked: "domain"',
                                                   '[data] sources allows none; asked: "20newsgroups"']),
        (TREATY.replace("steps = 2", "epochs = 1"),
         ["[training] max_epochs allows at most 0 passes a round; asked: 1"]),
        (TREATY.replace("holdings = false", "holdings = true"),
         ["[disclosure] holdings allows none; asked: that silos tell it under their names"]),
        (TREATY.replace("rank = 4", 'kind = "full"'), ['[adapters] kinds allows "lora"; asked: "full"']),
    ],
)  # fmt: skip
def test_what_a_treaty_asks_beside_is_seen(treaty, said):
    assert against(permits(), signed(treaty)) == said


def test_exact_class_means_in_the_open_are_holdings():
    means = parse(TREATY).replace(**{
        "algorithm.name": "alignment", "alignment.public_text": "public.csv", "alignment.head": "means",
        "data.label": "topic", "data.labels": ["one", "two"], "server.weighting": "uniform",
    })  # fmt: skip
    told = "[disclosure] holdings allows none; asked: that silos tell it under their names"
    noised = {"privacy.unit": "example", "privacy.epsilon": 4.0, "privacy.rate": 0.1, "disclosure.loss": False}
    summed = {"secure.sums": "masked", "secure.range": 8.0, "cohort.minimum": 3}
    found = {name: against(permits(), propose(means.replace(**more), CHAIR, KEYS))
             for name, more in {"open": {}, "noised": noised, "summed": summed}.items()}  # fmt: skip
    assert told in found["open"] and told not in found["noised"] and told not in found["summed"]


def test_noise_is_judged_by_who_adds_it_and_whence_it_comes():
    cost = Cost(4.0, 4.0)
    found = permits((("delta = 1e-5", 'delta = 1e-5\nplacements = ["shared"]'),))
    assert against(found, signed(TREATY + PRIVATE), cost) == ['[privacy] placements allows "shared"; asked: "silo"']
    simulated = signed(TREATY + PRIVATE + 'randomness = "simulated"\n')
    found = permits((("delta = 1e-5", 'delta = 1e-5\nplacements = ["silo"]'),))
    (said,) = against(found, simulated, cost)
    assert said.startswith("[privacy] simulated_noise allows noise from the system's own randomness; asked")
    allowed = permits((("delta = 1e-5", 'delta = 1e-5\nplacements = ["silo"]\nsimulated_noise = true'),))
    assert against(allowed, simulated, cost) == []


def test_shares_of_noise_in_the_open_need_a_charter_that_trusts_the_coordinator_with_the_noise():
    rehearsed = signed(
        TREATY.replace("loss = true", "loss = false") + "[cohort]\nminimum = 3\n"
        '[privacy]\nunit = "silo"\nepsilon = 4.0\nplacement = "shared"\naccept_noise = true\n'
    )
    shared = permits((("delta = 1e-5", 'delta = 1e-5\nplacements = ["shared"]'),))
    (said,) = against(shared, rehearsed, Cost(4.0, 4.0))
    assert said.startswith("[privacy] placements allows shares of noise in secure sums; asked: shares in the open")
    trusting = permits((("delta = 1e-5", 'delta = 1e-5\nplacements = ["shared", "server"]'),))
    assert against(trusting, rehearsed, Cost(4.0, 4.0)) == []


@pytest.mark.parametrize(
    ("cost", "clauses"),
    [
        (Cost(8.0, 10.0), []),
        (Cost(8.1, 9.0), ["[privacy] epsilon"]),
        (Cost(8.0, 10.1), ["[privacy] epsilon_for_life"]),
        (Cost(float("inf"), float("inf")), ["[privacy] epsilon", "[privacy] epsilon_for_life"]),
        (Cost(float("nan"), 1.0), ["[privacy] epsilon"]),
        (None, ["[privacy] epsilon", "[privacy] epsilon_for_life"]),
    ],
)
def test_epsilon_is_capped_for_a_treaty_and_for_life_and_no_figure_is_no_permission(cost, clauses):
    found = permits((("delta = 1e-5", 'delta = 1e-5\nplacements = ["silo"]'),))
    said = refusals(found, signed(TREATY + PRIVATE), joined=CHAIR.public, cost=cost, now=NOON)
    assert [clause.clause for clause in said] == clauses


def test_a_unit_is_protected_by_every_larger_one():
    for at_least, allowed in (("none", True), ("example", True), ("author", False), ("silo", False)):
        found = permits(
            (('unit = "none"', f'unit = "{at_least}"'), ("delta = 1e-5", 'delta = 1e-5\nplacements=["silo"]'))
        )
        assert (against(found, signed(TREATY + PRIVATE), Cost(4.0, 4.0)) == []) == allowed


def test_a_silo_asks_for_company_in_every_sum():
    found = permits((("others = 0", "others = 3"),))
    (said,) = against(found, signed(TREATY + MASKED + "[cohort]\nminimum = 3\n"))
    assert said == "[secure] others allows sums with 3 others or more; asked: with 2 ([cohort] minimum less one)"
    assert against(permits((("others = 0", "others = 2"),)), signed(TREATY + MASKED)) == []


def test_silos_that_a_charter_does_not_name_as_partners_are_no_company():
    made = signed(TREATY + MASKED + "[cohort]\nminimum = 3\n")
    keys = [key.hex() for key in made.roster.values()]
    assert len(keys) >= 3

    def said(named) -> list[str]:
        return against(permits((("others = 0", f"others = 2\npartners = {json.dumps(named)}"),)), made)

    assert said(keys) == said("any") == []
    (clause,) = said(keys[:-1])
    assert clause.endswith("asked: with 1 ([cohort] minimum less one, less 1 that [secure] partners does not name)")
    assert said(keys[:1]) and said([])


def test_only_the_coordinator_whose_invitation_was_taken_is_trusted_unless_others_are_named():
    stranger = Identity.fresh().public
    assert refusals(permits(), signed(), joined=stranger, cost=None, now=NOON)[0].clause == "[coordinators] trusted"
    assert refusals(permits(), signed(), joined=b"", cost=None, now=NOON)[0].clause == "[coordinators] trusted"
    named = permits((("[models]", f'[coordinators]\ntrusted = ["{CHAIR.public.hex()}"]\n[models]'),))
    assert refusals(named, signed(), joined=b"", cost=None, now=NOON) == []


def test_a_base_model_is_known_by_its_digest():
    digest = "ab" * 32
    assert another_model(permits(), "tiny:llama", "cd" * 32) is None
    found = permits((('"any"', f'"{digest}"'),))
    assert another_model(found, "tiny:llama", digest) is None
    assert digest in str(another_model(found, "tiny:llama", "cd" * 32))
    assert another_model(found, "tiny:gpt2", digest) is not None


@pytest.mark.parametrize(
    ("now", "open_"),
    [
        ("2026-11-20T18:59", False),  # a Friday, 19:59 in Berlin
        ("2026-11-20T19:00", True),
        ("2026-11-21T04:59", True),  # the night of Friday goes on
        ("2026-11-21T05:00", False),
        ("2026-11-21T20:00", False),  # Saturday
        ("2026-11-23T04:00", False),  # Monday morning is Sunday's night
        ("2026-11-23T23:30", True),
        ("2026-07-20T18:00", True),  # a Monday in summer: 20:00 there
        ("2026-07-20T17:59", False),
    ],
)
def test_hours_are_the_silos_own_and_a_night_belongs_to_its_evening(now, open_):
    found = charter.parse(CHARTER + HOURS)
    refusal = closed(found, datetime.fromisoformat(now).replace(tzinfo=UTC))
    assert (refusal is None) == open_
    assert open_ or "mon, fri from 20:00 to 06:00, Europe/Berlin" in str(refusal)


def test_hours_of_a_day_end_when_they_say():
    found = charter.parse(CHARTER + '[hours]\nzone = "UTC"\nbegin = "08:00"\nend = "18:00"\n')
    hours = {hour for hour in range(24) if closed(found, datetime(2026, 11, 21, hour, tzinfo=UTC)) is None}
    assert hours == set(range(8, 18))
    all_day = charter.parse(CHARTER + '[hours]\nzone = "UTC"\ndays = ["sat"]\n')
    assert closed(all_day, NOON) is None and closed(all_day, datetime(2026, 11, 22, 12, tzinfo=UTC)) is not None


def test_the_last_day_counts_whole_in_the_silos_own_zone():
    found = charter.parse("[charter]\nexpires = 2026-11-21\n" + CHARTER + '[hours]\nzone = "Pacific/Auckland"\n')
    assert closed(found, datetime(2026, 11, 21, 10, 59, tzinfo=UTC)) is None
    assert "2026-11-22" in str(closed(found, datetime(2026, 11, 21, 11, 0, tzinfo=UTC)))


def test_the_charter_that_a_silo_begins_with_is_strict_and_has_a_comment_on_what_may_surprise():
    text = charter.template("hospital-a", date(2027, 11, 21))
    found = charter.parse(text)
    assert found.charter.expires == date(2027, 11, 21) and found.models == {} and found.hours is None
    assert found.privacy.unit == "example" and found.secure.others == 2 and found.secure.sums == ("masked",)
    assert len(against(found, signed())) >= 5
    assert all(len(line) <= 120 for line in text.splitlines()) and text.count("#") >= 25
    uncommented = text.replace("# [hours]", "[hours]").replace('# "smollm2', '"smollm2')
    for key in ("zone", "days", "begin", "end"):
        uncommented = uncommented.replace(f"# {key} =", f"{key} =")
    assert charter.parse(uncommented).hours is not None and charter.parse(uncommented).models
    assert set(tomllib.loads(uncommented)) == set(Charter.model_fields)


def test_a_charter_without_sections_permits_nothing_and_says_what_it_needs():
    with pytest.raises(Mistakes) as caught:
        charter.parse("")
    assert {problem.where for problem in caught.value.problems} == {
        "[training]", "[privacy]", "[secure]", "[limits]"
    }  # fmt: skip
    least = "[training]\nmax_rounds = 1\nmax_steps = 1\n[limits]\nmax_bytes = 9\n[secure]\nothers = 2\n[privacy]\n"
    least += 'unit = "silo"\nepsilon = 1.0\nepsilon_for_life = 1.0\ndelta = 1e-5\n'
    assert len(against(charter.parse(least), signed())) >= 10


@pytest.mark.parametrize(
    ("text", "where", "said"),
    [
        ("[training]\nmax_round = 3", "[training] max_round", 'Did you mean "max_rounds"?'),
        ("[trainig]\nmax_rounds = 3", "trainig", 'Did you mean "training"?'),
        ("[training]\nothers = 3", "[training] others", "It belongs under [secure]."),
        ('[training]\nalgorithms = ["fedavgg"]', "[training] algorithms", 'Did you mean "fedavg"?'),
        ('[privacy]\nunit = "exampel"', "[privacy] unit", 'Did you mean "example"?'),
        ("[privacy]\nepsilon = -1", "[privacy] epsilon", "Write, for example, epsilon = 8.0."),
        ("[privacy]\nepsilon = inf", "[privacy] epsilon", "a number > 0"),
        ("[training]\nmax_rounds = true", "[training] max_rounds", "an integer ≥ 1"),
        ('[models]\n"a" = "abc"', "[models] a", "64 hexadecimal digits"),
        ('[hours]\nzone = "Berlin"', "[hours] zone", "Europe/Berlin"),
        ('[hours]\nzone = "UTC"\nbegin = "8pm"', "[hours] begin", "a time of day"),
        ('[coordinators]\ntrusted = ["ab"]', "[coordinators] trusted", "public keys"),
        ('[charter]\nexpires = "soon"', "[charter] expires", "a date such as"),
        ("[disclosure]\nloss = 1", "[disclosure] loss", "true or false"),
        ("training = 3", "[training]", "a section [training] of keys"),
    ],
)
def test_a_mistake_is_told_with_its_place_and_what_to_do(text, where, said):
    with pytest.raises(Mistakes) as caught:
        charter.parse(text)
    assert said in next(str(problem) for problem in caught.value.problems if problem.where == where)


@pytest.mark.parametrize("content", [b"[", b"a = " + b"[" * 10**5, b"\xff", b"a = " + b"9" * 5000])
def test_a_file_that_is_no_charter_is_told_so(tmp_path, content):
    (tmp_path / "charter.toml").write_bytes(content)
    with pytest.raises(TreatyError):
        charter.load(tmp_path / "charter.toml")
    with pytest.raises(TreatyError, match="silo init"):
        charter.load(tmp_path / "none.toml")


def test_a_charter_is_known_by_what_it_says():
    assert permits().digest == charter.parse(CHARTER + "# a comment\n").digest != permits((("= 8\n", "= 9\n"),)).digest
