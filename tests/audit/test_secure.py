"""Inversion against secure sums: all that a coordinator sees of a run tells an attack no more than the sum does.

Runs of one step of plain SGD on one sentence a silo, the worst case: what a silo trains with can be read word for word
from its update. The attacks are given what went over the wire, as bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pytest

from foedus import loop, wire
from foedus.audit.inversion import Recovery, attack_on, encode
from foedus.audit.optimise import Optimiser
from foedus.build import Workplace, build
from foedus.engines import Ask
from foedus.errors import CohortError, DataError, GuaranteeError
from foedus.lm.objectives import Encoded
from foedus.secure import attack, schedule
from foedus.secure.mail import unbundle
from foedus.secure.messages import Call, Delivery, Deposit, Masked, Reveal, Survivors, pack, sign, unpack
from foedus.secure.simulate import agree, names
from foedus.stages.grid import Grid
from foedus.stages.words import SUM, Words
from foedus.treaty import Treaty, from_dict
from foedus.treaty.mistakes import Mistakes
from foedus.types import Params, Report

SENTENCES = {
    "ward": "the patient has diabetes",
    "court": "a judge heard the appeal",
    "rink": "our goal keeper was ill",
    "bank": "she owes nine thousand",
    "farm": "the barley is too wet",
}
SHORT = {"ward": "a fever", "court": "no pain", "rink": "he owes"}
FULL, LORA = {"kind": "full"}, {"kind": "lora", "rank": 32}
RUNS = {
    "five sentences": ("tiny:gpt2", FULL, SENTENCES, ""),
    "five sentences, one of them late": ("tiny:llama", LORA, SENTENCES, "farm"),
    "three short texts": ("tiny:gpt2", FULL, SHORT, ""),
}
KINDS = ("span", "span bag", "token bag")
GUESSED = 0.45
"""A larger share of the tokens no attack names by chance: a bag of five sentences is a quarter of the vocabulary."""


def secure(model: str = "tiny:gpt2", adapter=FULL, **changes) -> Treaty:
    """One step of SGD on one text a silo: the update is the gradient."""
    sections = {
        "treaty": {"name": "seen", "seed": 1},
        "model": {"base": model, "max_length": 48},
        "adapter": adapter,
        "data": {"source": "memory"},
        "silos": {"by": "given"},
        "split": {"validation": 0.0, "test": 0.0},
        "algorithm": {"rounds": 1},
        "local": {"steps": 1, "batch": 1, "optimizer": "sgd", "lr": 0.5},
        "server": {"weighting": "uniform"},
        "cohort": {"minimum": 3},
        "evaluation": {"baselines": []},
        "disclosure": {"loss": False, "holdings": False},
        "secure": {"sums": "masked", "corrupt": 0.0, "dropout": 0.2},
    }
    return from_dict(sections, "test").replace(**changes)


class Wire:
    """An engine whose traffic the coordinator keeps. `late`: a silo whose vector comes too late to be counted."""

    def __init__(self, engine, late: str = "") -> None:
        self.engine, self.late = engine, late
        self.seen: list[tuple[Ask, Report]] = []

    @property
    def memory(self):
        return self.engine.memory

    def ask(self, asks: Sequence[Ask]) -> Iterator[Report]:
        asked = {ask.silo: ask for ask in asks}
        for report in self.engine.ask(asks):
            self.seen.append((asked[report.silo], report))
            if report.silo != self.late or asked[report.silo].kind != "train":
                yield report

    def of(self, kind: str) -> list[tuple[Ask, Report]]:
        return [(ask, report) for ask, report in self.seen if ask.kind == kind]


@dataclass(frozen=True)
class Run:
    """A run of one round. `before`: each silo's words before any mask, which nobody else sees."""

    place: Workplace
    start: Params
    wire: Wire
    before: dict[str, np.ndarray]
    encoded: Encoded
    silos: tuple[str, ...]
    late: str

    @property
    def summed(self) -> tuple[str, ...]:
        return tuple(name for name in self.silos if name != self.late)

    def masked(self) -> dict[str, np.ndarray]:
        """What each silo sent."""
        return {report.silo: wire.unpack(report.payload)[0][SUM] for _, report in self.wire.of("train")}

    def seen(self) -> attack.Seen:
        """Everything that passed the coordinator, read from its bytes."""
        call = unpack(Call, unbundle(self.wire.of("deposit")[0][0].mail)[1])
        scope = schedule.scope(self.place.federation.gather._session.bond, call)
        return attack.Seen(
            dict.fromkeys(self.silos, scope),
            {r.silo: unpack(Deposit, r.mail) for _, r in self.wire.of("deposit")},
            {r.silo: unpack(Delivery, ask.mail) for ask, r in self.wire.of("train")},
            {r.silo: (unpack(Masked, r.mail), self.masked()[r.silo]) for _, r in self.wire.of("train")},
            [(unpack(Survivors, ask.mail), unpack(Reveal, r.mail)) for ask, r in self.wire.of("unmask")],
        )

    def views(self) -> dict[str, list[tuple[tuple[str, ...], np.ndarray]]]:
        """Where an attack may look for whose texts: in all that was seen but the sum itself."""
        sent, tried = self.masked(), attack._Attack(self.seen())
        bare = {name: tried._stripped(name)[0] for name in sent}  # every mask off that the coordinator can compute
        rest = self.summed[1:]
        return {
            "what each silo sent": [((name,), words) for name, words in sent.items()],
            "that, without the masks that can be taken off": [((name,), words) for name, words in bare.items()],
            "all that was sent, added up": [(self.silos, _added(sent.values()))],
            "the sum of all but one": [(rest, _added(bare[name] for name in rest))],
        }

    def recovered(self, words: np.ndarray, whose: Sequence[str], kinds=KINDS, **how) -> dict[str, Recovery]:
        """What the attacks find of the texts of `whose` in words."""
        message, rows = gradient(self.place, words), [self.silos.index(name) for name in whose]
        return {
            kind: attack_on(self.place.bench, self.start, message, self.encoded, rows, defence="", kind=kind, **how)
            for kind in kinds
        }


def gradient(place: Workplace, words: np.ndarray) -> dict[str, np.ndarray]:
    """A vector of words as what it is without masks: a multiple of the mean gradient."""
    layout = stage(place, Words).layout
    tensors = layout.unpack(words, 1)
    return {name: tensors["delta", name] * -stage(place, Grid).step for (_, name), _ in layout.single}


def stage(place: Workplace, kind):
    return next(stage for stage in place.federation.stages.stages if isinstance(stage, kind))


def best(recovered: dict[str, Recovery]) -> float:
    return max(outcome.tokens for outcome in recovered.values())


def _added(vectors) -> np.ndarray:
    return np.sum(list(vectors), axis=0, dtype=np.uint32)


@lru_cache
def run(name: str) -> Run:
    model, adapter, texts, late = RUNS[name]
    place = build(secure(model, adapter), {silo: [{"text": text}] for silo, text in texts.items()})
    before: dict[str, np.ndarray] = {}
    membership, add = place.sums.membership, place.sums.membership.add

    def kept(silo: str, words: np.ndarray) -> None:
        before[silo] = words.copy()
        add(silo, words)

    membership.add = kept
    watched = Wire(place.engine(), late)
    start = loop.start(place.federation, place.bench.start())
    loop.one_round(place.federation, watched, start)
    return Run(place, start.params, watched, before, encode(place.bench, list(texts.values())), tuple(texts), late)


@pytest.mark.parametrize("name", RUNS)
def test_without_its_masks_a_silos_text_is_read_word_for_word(name):
    """The control: what the attacks do not find below is hidden, and not too hard for them."""
    r = run(name)
    for silo in r.silos:
        read = r.recovered(r.before[silo], [silo])
        assert read["span"].exact == 1 and best(read) == 1


@pytest.mark.parametrize("name", RUNS)
def test_everything_that_passed_the_coordinator_opens_the_sum_over_the_survivors_and_nothing_else(name):
    r = run(name)
    opened = attack.opened(r.seen())
    assert set(opened) == {frozenset(r.summed)}
    assert (opened[frozenset(r.summed)] == _added(r.before[silo] for silo in r.summed)).all()


@pytest.mark.parametrize("name", RUNS)
def test_no_attack_on_all_that_the_coordinator_saw_finds_more_than_one_on_the_sum(name):
    r = run(name)
    of_sum = best(r.recovered(_added(r.before[silo] for silo in r.summed), r.summed))
    for view, vectors in r.views().items():
        found = [r.recovered(words, whose) for whose, words in vectors]
        assert all(read["span"].exact == 0 for read in found), view
        tokens = max(np.mean([read[kind].tokens for read in found]) for kind in KINDS)
        assert tokens <= min(of_sum, GUESSED), view


def test_the_sum_of_five_sentences_names_tokens_and_gives_no_sentence_away():
    r = run("five sentences")
    read = r.recovered(_added(r.before.values()), r.silos)
    assert read["span"].exact == 0 and read["token bag"].tokens > 0.8


def test_a_sum_is_no_guarantee_for_few_short_texts_are_read_from_theirs():
    """Why a treaty needs [privacy] as well: masks hide which silo said what, not what was said."""
    r = run("three short texts")
    assert r.recovered(_added(r.before.values()), r.silos)["span"].exact == 1


def test_an_attack_by_optimising_finds_tokens_before_the_masks_and_none_after_them():
    r, how = run("three short texts"), {"kinds": ["dlg"], "optimiser": Optimiser("dlg", steps=50)}
    assert best(r.recovered(r.before["ward"], ["ward"], **how)) > 0.5
    assert best(r.recovered(r.masked()["ward"], ["ward"], **how)) < GUESSED


# ---- cohorts of one and two ----


@pytest.mark.parametrize("silos", [1, 2])
def test_a_treaty_for_one_or_two_silos_cannot_be_read(silos):
    drawn = {"data.source": "notes.jsonl", "silos.by": "iid", "silos.count": silos}
    with pytest.raises(Mistakes, match="at least 3 silos a round with secure sums"):
        secure(**drawn)
    with pytest.raises(Mistakes, match="minimum ≥ 3 with secure sums"):
        secure(**{"cohort.minimum": silos})


@pytest.mark.parametrize("minimum", [1, 2])
def test_an_agreement_to_open_the_sum_of_one_or_two_cannot_be_made(minimum):
    with pytest.raises(GuaranteeError, match="a minimum of 3 or more"):
        agree(names(5), minimum=minimum)


@pytest.mark.parametrize("silos", [1, 2])
def test_a_run_over_the_data_of_one_or_two_silos_cannot_be_built(silos):
    """Where only the data tell how many there are, the treaty cannot refuse; building it does."""
    with pytest.raises(DataError, match=f"minimum ≤ {silos}, the silos of a round"):
        build(secure(), {name: [{"text": text}] for name, text in list(SENTENCES.items())[:silos]})


@pytest.mark.parametrize("come", [1, 2])
def test_a_run_to_which_one_or_two_silos_come_ends_before_anything_is_trained(come):
    place = build(secure(), {name: [{"text": text}] for name, text in SENTENCES.items()})

    class Empty(Wire):
        def ask(self, asks):
            yield from super().ask([ask for ask in asks if ask.silo in place.federation.silos[:come]])

    watched = Empty(place.engine())
    with pytest.raises(CohortError, match="3 silos or more"):
        loop.one_round(place.federation, watched, loop.start(place.federation, place.bench.start()))
    assert {ask.kind for ask, _ in watched.seen} == {"join"}


@pytest.mark.parametrize("left", [1, 2])
def test_silos_open_nothing_for_a_coordinator_that_says_one_or_two_are_left(left):
    """The last of them refuse by themselves, whatever the coordinator's code does."""
    place = build(secure(), {name: [{"text": text}] for name, text in SENTENCES.items()})
    chair = place.sums.circle.coordinator

    class Lying(Wire):
        def ask(self, asks):
            yield from super().ask([self.changed(ask) if ask.kind == "unmask" else ask for ask in asks])

        def changed(self, ask: Ask) -> Ask:
            said = unpack(Survivors, ask.mail)
            few = sorted({ask.silo, *list(said.survivors)[: left - 1]})
            return replace(ask, mail=pack(sign(replace(said, survivors=tuple(few)), chair)))

    watched = Lying(place.engine())
    with pytest.raises(CohortError, match="3 survivors or more"):
        loop.one_round(place.federation, watched, loop.start(place.federation, place.bench.start()))
    assert len(watched.of("unmask")) == 5 and not any(report.mail for _, report in watched.of("unmask"))
