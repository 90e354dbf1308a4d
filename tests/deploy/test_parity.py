"""Resident processes over TLS, started once: under treaty after treaty they give what one process gives, to the bit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from foedus.build import build
from foedus.deploy.run import begin_run, carry_out
from foedus.execute import begin, execute

from .federation import Federation, all_connected, free_port, process, soon
from .parties import NOISY
from .test_parties import ENCRYPTED, EXAMPLE, MASKED, METHODS, OPEN, PUBLIC, SHARED, SILO, treaty

ALIKE = {"cohort.minimum": 3, "split.test": 0.0, "evaluation.baselines": []}
MEANS = {"topics.weight": 0.0, "alignment.attention": "entropy", "alignment.head": "means"}
TOKENS = {"alignment.tokens": 60}
ALGORITHMS = {
    **{name: {"algorithm.name": name, **more} for name, more in METHODS.items()},
    "alignment with class means": {"algorithm.name": "alignment", **METHODS["alignment"], **MEANS},
}
STAGES = {
    "masks": MASKED,
    "encryption": ENCRYPTED,
    "noise in silos": EXAMPLE,
    "noise at the server": SILO,
    "a clip norm that follows behind masks": {**MASKED, **SILO, "privacy.quantile": 0.5},
    "shares of noise behind masks": {**MASKED, **SILO, **SHARED},
    "shares of a step's noise behind masks": {**MASKED, **EXAMPLE, **SHARED},
    "a bias of tokens behind masks": {**ALGORITHMS["alignment with class means"], **EXAMPLE, **MASKED, **TOKENS},
}


@pytest.fixture(scope="module")
def parties(tmp_path_factory) -> Iterator[Federation]:
    """A coordinator and three silos, each its resident process, connected, and with what is public in its home."""
    pytest.importorskip("flwr")
    folder = tmp_path_factory.mktemp("parties")
    found = Federation(folder, settings={"address": f"127.0.0.1:{free_port()}"}, charter=NOISY)
    treaty(folder)
    with ExitStack() as ends:
        ends.enter_context(pytest.MonkeyPatch.context()).setattr("foedus.report.write_report", lambda _: None)
        ends.enter_context(process(found.home.path, "cli_coordinator"))
        for name, silo in found.silos.items():
            ends.enter_context(process(silo.path, "cli_silo", "--data", str(found.files[name])))
        for home in (found.home, *found.silos.values()):
            shutil.copy(folder / PUBLIC, home.path)
        assert soon(lambda: all_connected(found), 120)
        yield found


def check(parties: Federation, folder: Path, *changes: Mapping[str, object]) -> None:
    """A treaty, signed and carried out by the processes, ends as it does in this process: the adapter's digest, and
    what is measured of it and of whatever silos keep to themselves.
    """
    by = treaty(folder, ALIKE, {"treaty.name": folder.name}, *changes)
    parties.propose(by)
    *_, apart = carry_out(parties.home, begin_run(parties.home, by))
    *_, together = execute(begin(by, folder / "run"), build(by, parties.files))
    assert not apart.row["failures"]
    for name in ("adapter", "evaluation"):
        assert apart.row[name] == together.row[name]


@pytest.mark.parametrize("more", [OPEN, {**EXAMPLE, **MASKED}], ids=["open", "private and masked"])
@pytest.mark.parametrize("method", ALGORITHMS)
def test_every_algorithm_over_tls_gives_the_adapter_of_one_process(parties, tmp_path, method, more):
    hidden = more if method != "fedlap" or not more else EXAMPLE  # no mask hides a slot of one's own
    check(parties, tmp_path, ALGORITHMS[method], hidden)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_over_tls_gives_the_adapter_of_one_process(parties, tmp_path, stage):
    check(parties, tmp_path, STAGES[stage])
