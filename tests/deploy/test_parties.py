"""Parties of which each has its own place only come to what one process comes to, bit for bit."""

from __future__ import annotations

import json
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from foedus import loop
from foedus.build import build
from foedus.engines import Ask, Engine
from foedus.engines.frames import pack_ask, unpack_ask, unpack_report
from foedus.errors import DataError, RunError, TreatyError
from foedus.estimate import estimate
from foedus.execute import begin, execute
from foedus.governance.circle import Circle
from foedus.secure.keys import Identity
from foedus.treaty import Treaty, from_dict, obstacles
from foedus.types import Report, Tree
from foedus.worker import answer, engine_of

from ..conftest import rows

SILOS = ("north", "east", "south")
TINY = {
    "treaty.name": "three-parties", "treaty.seed": 3, "model.base": "tiny:llama", "model.max_length": 16,
    "adapter.rank": 2, "adapter.targets": ["q_proj"], "data.source": "memory", "data.domain": "domain",
    "data.keep": ["law", "medicine", "sport"], "silos.names": list(SILOS), "algorithm.rounds": 2, "local.steps": 1,
    "local.batch": 4, "local.optimizer": "sgd", "local.lr": 0.5, "server.weighting": "uniform",
    "evaluation.every": 2, "disclosure.holdings": False,
}  # fmt: skip
PUBLIC = "public.csv"
TOPICS = {"data.label": "domain", "data.labels": ["law", "medicine", "sport"], "topics.weight": 0.1}
METHODS = {
    "fedavg": {"local.optimizer": "adamw", "local.keep_optimizer": True, "server.weighting": "examples",
               "server.max_weight": 100.0},
    "fedprox": {"algorithm.mu": 0.1},
    "scaffold": {},
    "alignment": {**TOPICS, "alignment.public_text": PUBLIC, "alignment.features": 10, "alignment.project": 4,
                  "alignment.attention": "error"},
    "reversal": {},
    "udalm": TOPICS,
    "knn-adapter": {"knn.public_text": PUBLIC, "knn.neighbours": 4, "knn.width": 8},
    "fedlap": {"fedlap.samples": 2, "fedlap.length": 4, "fedlap.vocabulary": 8, "fedlap.boost": 1, "fedlap.passes": 2},
    "alone": {},
}  # fmt: skip
OPEN: Mapping[str, object] = {}
MASKED = {"secure.sums": "masked", "secure.range": 8.0, "secure.corrupt": 0.0, "secure.dropout": 0.0,
          "cohort.minimum": 3}  # fmt: skip
ENCRYPTED = {**MASKED, "secure.sums": "encrypted"}
EXAMPLE = {"privacy.unit": "example", "privacy.noise_multiplier": 1.0, "privacy.rate": 0.3, "disclosure.loss": False,
           "privacy.randomness": "simulated", "local.keep_optimizer": None, "server.weighting": "uniform",
           "server.max_weight": None}  # fmt: skip
SILO = {"privacy.unit": "silo", "privacy.noise_multiplier": 0.5, "privacy.accept_noise": True,
        "disclosure.loss": False, "privacy.randomness": "simulated", "server.weighting": "uniform",
        "server.max_weight": None}  # fmt: skip
SHARED = {"privacy.placement": "shared", "privacy.noise": "discrete-gaussian"}


def treaty(folder: Path, *changes: Mapping[str, object]) -> Treaty:
    """A small treaty between three silos; later changes win."""
    lines = [f"line {i} of what {'everybody' if i % 3 else 'nobody'} may read, number {i * i}" for i in range(40)]
    (folder / PUBLIC).write_text("text\n" + "\n".join(f'"{line}"' for line in lines))
    tables: dict[str, dict[str, object]] = {}
    for dotted, value in ChainMap(*map(dict, reversed(changes)), TINY).items():
        section, _, key = dotted.partition(".")
        tables.setdefault(section, {})[key] = value
    return from_dict(tables, folder=folder)


def files(folder: Path) -> dict[str, Path]:
    """Each silo's own file, of its own size, with columns that are nobody else's business."""
    found = {}
    for i, name in enumerate(SILOS):
        mine = [{**row, "record": 7} for row in rows(8 + 2 * i, seed=i)]
        found[name] = folder / f"{name}.jsonl"
        found[name].write_text("".join(json.dumps(row) + "\n" for row in mine))
    return found


class Parties:
    """Silos of which each has its own place, reached by bytes alone."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self.engines, self.memory = engines, dict[str, Tree]()

    def ask(self, asks: Sequence[Ask]) -> Iterator[Report]:
        for frame in map(pack_ask, asks):
            asked = unpack_ask(frame)
            yield unpack_report(answer(self.engines[asked.silo], asked.silo, asked))


def circles() -> tuple[Circle, dict[str, Circle]]:
    """The coordinator's and each silo's: all public keys, and one's own identity."""
    identities, chair = {name: Identity.fresh() for name in SILOS}, Identity.fresh()
    roster = {name: one.public for name, one in identities.items()}
    return Circle(roster, {}, chair), {
        name: Circle(roster, {name: one}, chair.public) for name, one in identities.items()
    }


def parties(by: Treaty, folder: Path):
    """The coordinator's place, and an engine of silos with a place each."""
    chair, own = circles()
    engines = {
        name: engine_of(by, name, folder / name, 1, examples=path, circle=own[name])
        for name, path in files(folder).items()
    }
    return build(by, {}, circle=chair), Parties(engines)


def last(place, engine):
    *_, (state, _) = loop.run(place.federation, engine, loop.start(place.federation, place.bench.start()))
    return state


def same(a, b) -> bool:
    return (
        all(np.array_equal(a.params[name], b.params[name]) for name in a.params) and a.params.keys() == b.params.keys()
    )


@pytest.mark.parametrize("more", [OPEN, {**EXAMPLE, **MASKED}], ids=["open", "private and masked"])
@pytest.mark.parametrize("method", METHODS)
def test_each_party_with_its_own_place_gives_the_adapter_of_one_process(tmp_path, method, more):
    hidden = more if method != "fedlap" or not more else EXAMPLE  # no mask hides a slot of one's own
    by = treaty(tmp_path, {"algorithm.name": method, **METHODS[method]}, hidden)
    place, engine = parties(by, tmp_path)
    together = build(by, files(tmp_path))
    assert not place.silos and together.whole and place.agreed() == together.agreed()
    assert same(last(place, engine), last(together, together.engine()))


@pytest.mark.parametrize(
    "more", [ENCRYPTED, SILO, {**MASKED, **SILO, **SHARED}], ids=["encrypted", "noise at the server", "shares of noise"]
)
def test_so_do_other_sums_and_other_places_of_the_noise(tmp_path, more):
    by = treaty(tmp_path, more, {"algorithm.rounds": 1})
    place, engine = parties(by, tmp_path)
    together = build(by, files(tmp_path))
    assert place.agreed() == together.agreed()
    assert same(last(place, engine), last(together, together.engine()))


def test_a_whole_run_of_parties_measures_what_one_process_measures(tmp_path):
    by = treaty(tmp_path, {"split.test": 0.2})
    place, engine = parties(by, tmp_path)
    *_, apart = execute(begin(by, tmp_path / "apart"), place, engine=engine)
    *_, together = execute(begin(by, tmp_path / "together"), build(by, files(tmp_path)))
    for name in ("adapter", "evaluation", "bytes", "silos", "rounds"):
        assert apart.row[name] == together.row[name]


def test_a_silo_reads_what_the_treaty_names_of_its_own_file_and_keeps_what_it_keeps(tmp_path):
    by = treaty(tmp_path, {"data.keep": ["law", "sport"]})
    own = build(by, {"east": files(tmp_path)["east"]}).splits["east"]
    for table in (own.train, own.validation, own.test):
        assert table.column_names == ["text", "domain"] and set(table["domain"].to_pylist()) <= {"law", "sport"}
    short = treaty(tmp_path, {"silos.min_examples": 1000})
    with pytest.raises(DataError, match="silo 'east': expected at least 1000 examples in law, medicine, sport"):
        build(short, {"east": files(tmp_path)["east"]})
    few = treaty(tmp_path, {"data.max_examples": 7})
    assert sum(map(len, vars(build(few, {"east": files(tmp_path)["east"]}).splits["east"]).values())) == 7


def test_a_party_without_all_data_runs_nothing_in_its_own_process(tmp_path):
    by = treaty(tmp_path)
    place = build(by)
    assert not place.silos and place.federation.silos == SILOS and place.final_split == "test"
    with pytest.raises(RunError, match="none of north, east, south"):
        list(execute(begin(by, tmp_path / "run"), place))
    with pytest.raises(DataError, match='Did you mean "north"'):
        build(by, {"nort": files(tmp_path)["north"]})


def test_what_a_treaty_costs_is_estimated_without_any_silos_data(tmp_path):
    for more in ({}, EXAMPLE):
        found, whole = (estimate(build(treaty(tmp_path, more), data)) for data in ({}, files(tmp_path)))
        assert (found.bytes_up, found.bytes_down, found.steps) == (whole.bytes_up, whole.bytes_down, whole.steps)


@pytest.mark.parametrize(
    "more, key",
    [
        ({"silos.names": None}, "[silos] names"),
        ({"evaluation.baselines": ["pooled"]}, "[evaluation] baselines"),
        ({**TOPICS, "data.labels": None}, "[data] labels"),
        ({**MASKED, "data.keep": None}, "[data] keep"),
    ],
)
def test_what_only_all_data_together_could_tell_is_asked_of_the_treaty(tmp_path, more, key):
    assert [found.where for found in obstacles(treaty(tmp_path, more))] == [key]
    assert obstacles(treaty(tmp_path)) == []
    if "silos.names" not in more:
        with pytest.raises(TreatyError, match=key.partition(" ")[2]):
            build(treaty(tmp_path, more), {})


def test_a_label_that_the_treaty_does_not_declare_is_refused_by_its_silo(tmp_path):
    by = treaty(tmp_path, {**TOPICS, "data.labels": ["law", "sport"]})
    with pytest.raises(DataError, match='"medicine"'):
        build(by, {"east": files(tmp_path)["east"]})
