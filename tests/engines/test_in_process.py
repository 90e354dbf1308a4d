"""The in-process engine: failures are named, the others go on, and training side by side gives the same updates."""

from __future__ import annotations

import numpy as np
import pytest

from foedus import gather, loop, wire
from foedus.build import build
from foedus.errors import CohortError
from foedus.types import Task


@pytest.fixture
def place(treaty):
    return build(treaty.replace(**{"performance.precision": "fp32"}))


def ask(place, kind="train", split=""):
    task = Task(0, place.base.digest, place.bench.start(), tuple(place.silos), 1)
    return gather.ask(place.engine(), kind, task, split=split)


def test_bytes_are_counted_on_the_payloads_that_were_sent(place):
    for report in ask(place):
        assert report.receipt.bytes_up == len(report.payload) > 0
        assert report.receipt.payload == wire.digest(report.payload)
        assert report.receipt.bytes_down > 0


def test_a_silo_with_bad_data_is_named_and_the_others_go_on(place):
    place.silos["law"].splits["train"].inputs.values[...] = 10**6  # tokens that the model does not have
    reports = {r.silo: r for r in ask(place)}
    assert reports["law"].receipt.failure and reports["law"].payload == b""
    assert not reports["sport"].receipt.failure and not reports["medicine"].receipt.failure


def test_a_failure_says_nothing_about_the_data(place):
    place.silos["law"].splits["train"].inputs.values[...] = 10**6
    why = next(r.receipt.failure for r in ask(place) if r.silo == "law")
    assert "1000000" not in why and "Error" in why


def test_a_run_stops_when_too_few_silos_are_left(place):
    from dataclasses import replace

    for name in ("law", "sport"):
        place.silos[name].splits["train"].inputs.values[...] = 10**6
    with pytest.raises(CohortError, match="law"):
        loop.one_round(
            replace(place.federation, minimum=2), place.engine(), loop.start(place.federation, place.bench.start())
        )


def test_a_task_for_another_model_is_refused_by_the_silo(place):
    task = Task(0, "another", place.bench.start(), tuple(place.silos), 1)
    assert all("same base model" in r.receipt.failure for r in gather.ask(place.engine(), "train", task))


def test_disclosure_decides_what_a_receipt_says(treaty):
    quiet = build(treaty.replace(**{"disclosure.loss": False, "disclosure.holdings": False}))
    assert all(r.receipt.disclosed == {} for r in ask(quiet))
    assert all(set(r.receipt.disclosed) == {"loss", "examples"} for r in ask(build(treaty)))


def test_silos_side_by_side_give_the_same_updates(place):
    alone = {r.silo: wire.unpack(r.payload)[0] for r in ask(place)}
    engine = place.engine()
    engine.together = 3
    task = Task(0, place.base.digest, place.bench.start(), tuple(place.silos), 1)
    for report in gather.ask(engine, "train", task):
        for key, x in wire.unpack(report.payload)[0].items():
            np.testing.assert_allclose(x, alone[report.silo][key], rtol=2e-3, atol=2e-5)


def test_one_bad_silo_among_those_side_by_side_is_found_and_the_others_kept(place):
    place.silos["law"].splits["train"].inputs.values[...] = 10**6
    engine = place.engine()
    engine.together = 3
    task = Task(0, place.base.digest, place.bench.start(), tuple(place.silos), 1)
    failed = {r.silo for r in gather.ask(engine, "train", task) if r.receipt.failure}
    assert failed == {"law"}


def test_evaluation_gives_sums_by_domain(place):
    for report in ask(place, "evaluate", "validation"):
        tensors, _ = wire.unpack(report.payload)
        assert {domain for _, domain in tensors} == {report.silo}
        assert tensors["targets", report.silo][0] == place.silos[report.silo].splits["validation"].tokens


def test_no_sums_are_given_of_text_that_was_trained_on(place):
    for split in ("train", ""):
        for report in ask(place, "evaluate", split):
            assert "held-out split" in report.receipt.failure and not report.payload


def test_silos_that_keep_their_optimizers_train_together_only_when_in_step(place):
    """A silo that missed a round has taken fewer steps, and AdamW corrects its moments by their number."""
    from dataclasses import replace

    engine = place.engine(plan=replace(place.plan, keep=True))
    engine.together = 3
    first = Task(0, place.base.digest, place.bench.start(), ("law", "sport"), 1)
    then = Task(1, place.base.digest, place.bench.start(), ("law", "medicine", "sport"), 1)
    gather.ask(engine, "train", first)
    together = {r.silo: wire.unpack(r.payload)[0] for r in gather.ask(engine, "train", then)}

    alone = place.engine(plan=replace(place.plan, keep=True))
    gather.ask(alone, "train", first)
    for report in gather.ask(alone, "train", then):
        for key, x in wire.unpack(report.payload)[0].items():
            np.testing.assert_allclose(x, together[report.silo][key], rtol=5e-3, atol=2e-3)


def test_a_loss_that_is_not_disclosed_is_no_part_of_the_payload_either(treaty):
    """A receipt without it would be no secret if the sums stood in the update, which the server can read."""
    for disclosed in (True, False):
        for report in ask(build(treaty.replace(**{"disclosure.loss": disclosed}))):
            parts = {part for part, _ in wire.unpack(report.payload)[0]}
            assert parts == {"delta", "weight"} | ({"metric"} if disclosed else set())
