"""Decision help: the options are judged by rules that anybody can read, and the figures are our own arithmetic."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import typer
from typer.testing import CliRunner

from foedus.advise import OPTIONS, QUESTIONS, RULES, Answers, advise, costs, judge, load, pilot
from foedus.cli_advise import advise as command
from foedus.errors import TreatyError
from foedus.treaty import parse

CLINICS = Answers("several-organisations", 6, 20_000, "special", "no", "write", rounds=4, steps=2, unit="example")
QUESTION = {"federation": CLINICS,
            "pooling": replace(CLINICS, pooling="yes", sensitivity="internal", unit="none"),
            "retrieval": replace(CLINICS, task="answer-from-documents", changes="yes", unit="none"),
            "on-premise-inference": replace(CLINICS, quality="indicative", examples=50, task="extract", unit="none"),
            "redaction": replace(CLINICS, pooling="under-governance", sensitivity="personal", examples=100,
                                 task="answer-from-documents", hardware="none", unit="none")}  # fmt: skip


@pytest.fixture
def app():
    made = typer.Typer()
    made.command()(command)
    return made


@pytest.mark.parametrize("name", ["federation", "pooling", "retrieval", "on-premise-inference"])
def test_each_option_is_the_answer_to_some_question(name):
    assert advise(QUESTION[name])["best"] == name


def test_every_rule_speaks_of_an_option_and_gives_its_reason():
    assert {rule.option for rule in RULES} == set(OPTIONS)
    assert all(rule.because.endswith(".") for rule in RULES)


def test_every_rule_is_met_by_some_answers_and_not_by_others():
    asked = [*QUESTION.values(), replace(CLINICS, silos=1), replace(CLINICS, silos=2), replace(CLINICS, epsilon=0.05),
             replace(CLINICS, network_mbps=0.01), replace(CLINICS, quality="best", where="one-organisation"),
             replace(CLINICS, hardware="none"), replace(CLINICS, unit="silo", epsilon=1.0),
             replace(CLINICS, pooling="under-governance")]  # fmt: skip
    known = [(a, costs(a)) for a in asked]
    for rule in RULES:
        assert {rule.when(*one) for one in known} == {True, False}, rule.because


def test_what_may_not_be_pooled_is_not_advised_to_be():
    options = {option.name: option for option in judge(CLINICS, costs(CLINICS))}
    assert options["pooling"].barred and not options["federation"].barred


def test_one_silo_federates_nothing_and_has_no_pilot():
    found = advise(replace(CLINICS, silos=1))
    assert not found["federation"] and found["pilot"] is None


def test_a_guarantee_that_drowns_the_update_speaks_against_federation():
    loud = replace(CLINICS, unit="silo", epsilon=0.5)
    assert judge(loud, costs(loud))[-1].name != "federation"
    reasons = [r["because"] for o in advise(loud)["options"] if o["name"] == "federation" for r in o["reasons"]]
    assert any("noise" in reason for reason in reasons)


def test_bytes_and_parameters_are_those_that_a_treaty_sends(tmp_path):
    from foedus import wire
    from foedus.build import build
    from foedus.treaty import load as read
    from foedus.types import Task

    from .conftest import write_treaty

    params = build(read(write_treaty(tmp_path))).bench.start()
    sent = len(wire.pack_task(Task(0, "0" * 64, params, ("law", "medicine", "sport"), 1)))
    ours = costs(replace(CLINICS, base="tiny:llama", rank=4, silos=3, unit="none"))
    assert ours.parameters == sum(x.size for x in params.values())
    assert ours.bytes_down == pytest.approx(sent, rel=0.01)


def test_bytes_of_a_large_adapter_are_those_of_its_numbers_and_headers(monkeypatch):
    large = replace(CLINICS, base="smollm2-135m-instruct", rank=1, unit="none")
    exact = costs(large)
    monkeypatch.setattr("foedus.advise.cost.SMALL", 0)
    assert costs(large).bytes_down == pytest.approx(exact.bytes_down, rel=0.01)


def test_the_noise_is_the_accountants():
    from foedus.privacy.noise import SystemSource
    from foedus.privacy.plan import Terms, make_plan

    terms = Terms("example", 1e-5, 4, epsilon=8.0, rate=16 / 20_000, divisor=16.0, steps=2)
    found = costs(CLINICS)
    assert found.noise == make_plan(terms, SystemSource()).multiplier
    assert found.epsilon <= 8.0


def test_money_follows_from_the_prices_given_and_is_not_said_without():
    assert costs(CLINICS).money is None
    paid = costs(replace(CLINICS, unit="none", price_setup=100.0))
    assert paid.money == 600.0


@pytest.mark.parametrize("name", QUESTION)
@pytest.mark.parametrize("unit", ["none", "example", "author", "silo"])
def test_the_pilot_is_a_treaty_that_loads(name, unit):
    draft = pilot(replace(QUESTION[name], unit=unit))
    assert parse(draft.treaty.resolved()) == draft.treaty
    assert draft.treaty.algorithm.rounds == draft.rounds <= 10 and draft.silos <= 5


def test_the_pilots_treaty_can_be_carried_out_between_organisations():
    from foedus.treaty.deployed import obstacles

    assert obstacles(pilot(CLINICS).treaty) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [({"silos": 0}, "at least 1"), ({"pooling": "perhaps"}, "one of"), ({"base": "gpt"}, "shape"),
     ({"delta": 1.0}, "below"), ({"silos": 2.5}, "whole"), ({"epsilon": float("nan")}, "number")],
)  # fmt: skip
def test_an_answer_that_is_none_is_refused(change, said):
    with pytest.raises(TreatyError, match=said):
        replace(CLINICS, **change)


def test_answers_come_from_a_file_and_what_is_missing_or_unknown_is_named(tmp_path):
    path = tmp_path / "answers.toml"
    path.write_text("\n".join(f"{k} = {json.dumps(v)}" for k, v in CLINICS.plain().items()))
    assert load(path) == CLINICS
    for text, said in (("silos = 3", "where"), ('silo = 3\nwhere = "x"', "silos")):
        path.write_text(text)
        with pytest.raises(TreatyError, match=said):
            load(path)


def test_the_command_takes_a_file_and_writes_the_pilot(app, tmp_path):
    path, treaty = tmp_path / "answers.toml", tmp_path / "pilot.toml"
    path.write_text("\n".join(f"{k} = {json.dumps(v)}" for k, v in CLINICS.plain().items()))
    done = CliRunner().invoke(app, ["--answers", str(path), "--out", str(treaty), "--json"])
    assert json.loads(done.stdout)["best"] == "federation"
    assert parse(treaty.read_text()).privacy.epsilon == 8.0


def test_the_command_asks_and_asks_again(app):
    said = {name: CLINICS.plain()[name] for name in QUESTIONS}
    lines = [str(said[name]) for name in QUESTIONS]
    done = CliRunner().invoke(app, input="\n".join(["nowhere", *lines]) + "\n")
    assert done.exit_code == 0, done.output
    assert "Best here: federation" in done.output and "assumed:" in done.output
