"""The validity matrix: one table decides, the page is made from it, and what it refuses cannot be built."""

from __future__ import annotations

import ast
import doctest
import itertools
import zlib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given

import foedus
from foedus import gather, tree, wire
from foedus.errors import GuaranteeError, SiloError, TreatyError
from foedus.privacy.noise import SimulatedSource
from foedus.privacy.plan import Terms, make_plan
from foedus.secure.keys import Identity
from foedus.secure.messages import Agreement
from foedus.server import WeightedMean
from foedus.silo.membership import Membership
from foedus.stages import Plain, Weigh, chain
from foedus.stages.grid import Grid
from foedus.stages.mask import Mask
from foedus.stages.weigh import WEIGHT
from foedus.stages.words import SUM, Words, layout_of
from foedus.treaty import COMBINATIONS, beside, combinations, decide, describe, features, parse, statement
from foedus.treaty.features import FEATURES, feature_named
from foedus.treaty.page import page
from foedus.types import Task, Total, Update

from .test_loop import SILOS, federation
from .test_treaty_errors import problems, secured, written
from .test_treaty_fuzz import QUICK, treaties

ROOT, SOURCE = Path(__file__).parent.parent, Path(foedus.__file__).parent
ROWS = {row.number: row for row in COMBINATIONS}
ACCEPTED = {1, 8, 9, 11, 34}
REFUSED = {5, 6, 7, 13, 14, 19, 24, 38, 39, 45, 47, 48, 49, 58}
TASK = Task(0, "model", {"w": np.zeros(64)}, ("a", "b", "c"), 1)
W = ("delta", "w")


def sentences(row) -> str:
    return f"{row.reason} Instead: {row.instead}"


# the table


def test_the_table_has_the_fifty_rows_of_the_study_and_eight_of_methods_with_their_verdicts():
    assert list(ROWS) == list(range(1, 59))
    assert {n for n, row in ROWS.items() if row.verdict == "accept"} == ACCEPTED
    assert {n for n, row in ROWS.items() if row.verdict == "refuse"} == REFUSED


def test_every_row_names_features_and_gives_reasons_in_sentences_and_a_condition_or_an_alternative():
    for row in COMBINATIONS:
        assert {name for names in row.of for name in names} <= set(FEATURES) and len(row.of) in (2, 3), row.number
        assert row.reason.endswith(".") and row.reason[0].isupper(), row.number
        assert bool(row.instead) == (row.verdict != "accept"), row.number
        assert not row.instead or row.instead.endswith("."), row.number
        assert row.held_by and row.tests, row.number


def test_every_feature_is_in_some_row_and_no_two_have_one_spelling():
    used = {name for row in COMBINATIONS for names in row.of for name in names}
    assert used == set(FEATURES)
    spelled = [word for feature in FEATURES.values() for word in (feature.name, *feature.also)]
    assert all(feature_named(word) in FEATURES for word in spelled) and len(set(spelled)) == len(spelled)


@cache
def names_in(file: Path) -> frozenset[str]:
    """Functions, classes and constants that a file defines."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return frozenset(defined | {node.id for node in nodes if isinstance(node, ast.Name)})


def exists(base: Path, place: str) -> bool:
    file, _, name = place.partition("::")
    return (base / file).exists() and name in names_in(base / file)


@pytest.mark.parametrize("number", ROWS)
def test_every_row_is_held_by_code_and_tests_that_exist(number):
    row = ROWS[number]
    assert not [place for place in row.held_by if not exists(SOURCE, place)]
    assert not [test for test in row.tests if not exists(ROOT, test)]


def test_the_page_is_up_to_date():
    do = "Write it again: python -m foedus.treaty.page > docs/validity.md"
    assert (ROOT / "docs" / "validity.md").read_text() == page(), do


@pytest.mark.parametrize("number", ROWS)
def test_a_row_applies_where_all_that_it_speaks_of_is_there_and_not_else(number):
    row = ROWS[number]
    for chosen in itertools.product(*row.of):
        assert row in decide(chosen)
        assert chosen[0] in row.met(chosen)
        for missing in chosen:
            assert row not in decide(set(chosen) - {missing}) or any(len(set(chosen) & set(x)) > 1 for x in row.of)


def test_what_the_table_shows_of_itself_holds():
    for module in (combinations, features):
        result = doctest.testmod(module)
        assert result.attempted and not result.failed


def test_names_are_read_however_they_are_spelled():
    assert beside(frozenset(), ["Krum", "TopK", "trimmed_mean", "FedBuff", "SecAgg+"]) == {
        "krum", "top-k", "trimmed-mean", "asynchronous", "masked-sums",
    }  # fmt: skip
    assert beside(frozenset({"open-sums", "mean"}), ["secagg"]) == {"masked-sums", "mean"}
    with pytest.raises(TreatyError, match='Did you mean "krum"'):
        beside(frozenset(), ["krun"])


# what a treaty asks for


@QUICK
@given(treaties())
def test_a_treaty_that_can_be_read_asks_for_nothing_that_is_refused(treaty):
    assert not [row.number for row in decide(treaty.features()) if row.verdict == "refuse"]


SHARED = {
    "secure__corrupt": "0.01", "privacy__unit": '"silo"', "privacy__epsilon": "8.0", "privacy__placement": '"shared"',
}  # fmt: skip


def test_a_treaty_with_a_refused_pair_is_told_the_rows_reason_and_its_alternative():
    (problem,) = problems(secured(**SHARED))
    assert problem.do == sentences(ROWS[24]) and problem.where == "[privacy] noise"
    assert 'sums = "masked"' in problem.came and 'noise = "gaussian"' in problem.came
    assert parse(secured(**SHARED, privacy__noise='"discrete-gaussian"')).features() >= {"distributed-noise"}


@pytest.mark.parametrize("sums", ["masked", "encrypted"])
@pytest.mark.parametrize("algorithm", ["fedavg", "fedprox"])
def test_secure_means_can_be_asked_for(sums, algorithm):
    treaty = parse(secured(secure__sums=f'"{sums}"', algorithm__name=f'"{algorithm}"'))
    rows = {row.number for row in decide(treaty.features())}
    assert rows >= ({1, 3, 22, 23, 50} if sums == "masked" else {34, 35, 40, 22, 23, 50})
    capped = parse(secured(server__weighting='"examples"', server__max_weight="100"))
    assert ROWS[2] in decide(capped.features()) and ROWS[1] not in decide(capped.features())


@pytest.mark.parametrize("name", [name for name, feature in FEATURES.items() if not feature.key])
def test_a_treaty_that_names_what_we_do_not_have_is_told_why_and_what_instead(name):
    wrong = (
        written(server__aggregator=f'"{name}"'), written(compression__kind=f'"{name}"'),
        written(algorithm__name=f'"{name}"'), written(**{f"server__{name}": "true"}),
    )  # fmt: skip
    rows = [row for row in COMBINATIONS if any(name in names for names in row.of)]
    for text in wrong:
        (problem,) = problems(text)
        assert f"This version has no {name}" in problem.do
        assert any(row.reason in problem.do and row.instead in problem.do for row in rows)
        assert "refused" in problem.do or all(row.verdict != "refuse" for row in rows)


def test_a_name_that_is_only_misspelled_still_hears_of_the_nearest():
    (problem,) = problems(written(algorithm__name='"fedavgg"'))
    assert 'Did you mean "fedavg"?' in problem.do


# what is said


def test_the_statement_names_the_group_in_which_a_silo_hides():
    treaty = parse(secured(secure__group_size="5"))
    assert "A silo hides in its group, of 3 at least, and not among all silos." in statement(treaty)
    assert "a random group of 5 silos or more (3 if some vanish)" in describe(treaty)[0]
    assert "group" not in statement(parse(secured()))


def test_the_statement_says_that_silos_can_spoil_a_sum():
    assert "No mask stops a silo from sending a false update." in statement(parse(secured()))


def test_the_statement_says_that_sums_can_be_subtracted():
    assert "The sums of two rounds can be subtracted" in statement(parse(secured()))


def test_the_statement_of_secure_sums_promises_no_privacy_and_names_who_sees_what():
    said = statement(parse(secured()))
    assert said.startswith(
        "No privacy guarantee: unit none, epsilon none. Secure sums: the coordinator sees only the sum"
    )
    assert "at least 3 silos, and no single one" in said and "A sum is not a guarantee" in said
    assert "up to 1% of the silos (rounded down)" in said and "it sees every update" not in said


@pytest.mark.parametrize("holders", [1, 2])
def test_the_statement_of_encrypted_sums_says_who_must_not_collude(holders):
    said = statement(parse(secured(secure__sums='"encrypted"', secure__key_holders=str(holders))))
    assert "do not collude" in said and ("One silo holds" if holders == 1 else "2 silos each hold") in said
    assert "Masks hold" not in said


def test_what_is_not_encrypted_is_said_to_be_masked():
    treaty = parse(secured(secure__sums='"encrypted"', secure__encrypted_share="0.25"))
    assert "25% of them encrypted, the rest masked" in describe(treaty)[0]
    assert "Masks hold" in statement(treaty)


def test_losses_and_measures_leave_in_a_sum_alone():
    said = describe(parse(secured()))
    assert "in the same secret sum: the sum of its training losses, and of how many targets" in said
    assert any(line.startswith("evaluation sums") and line.endswith("as the sum of all silos") for line in said)
    assert any("whether a number of its update was above 1" in line for line in said)
    assert any(line.startswith("public keys, and shares of its masks' secrets") for line in said)
    assert not any("under its name" in line for line in said)


def test_baselines_of_single_silos_are_said_to_be_outside_of_secure_sums():
    said = "\n".join(describe(parse(secured(evaluation__baselines='["local", "pooled"]'))))
    assert "under its name: no mask covers them" in said and "these baselines are for simulations" in said


def test_shared_noise_is_said_to_be_a_share():
    treaty = parse(secured(**SHARED, privacy__noise='"discrete-gaussian"'))
    assert "clipped, with a share of the noise, masked: the coordinator reads the sum" in describe(treaty)[0]


# what cannot be built


@dataclass(frozen=True)
class Hiding(Plain):
    hides: ClassVar[bool] = True


@dataclass(frozen=True)
class Codes(Plain):
    """A stand-in for a code: `encode` and `decode` of one vector."""

    additive: ClassVar[bool] = False

    def code(self, x: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def read(self, x: np.ndarray) -> np.ndarray:
        return x

    def encode(self, update: Update, task: Task) -> Update:
        return replace(update, tensors={key: self.code(x) for key, x in update.tensors.items()})

    def decode(self, total: Total, task: Task) -> Total:
        return replace(total, tensors={key: self.read(x) for key, x in total.tensors.items()})


NF4 = np.sort(np.tanh(np.linspace(-2, 2, 16)))
PUBLIC = np.random.default_rng(7)
SUPPORT, SKETCH, DIRECTIONS = PUBLIC.permutation(64)[:8], PUBLIC.normal(size=(16, 64)), PUBLIC.normal(size=(5, 64))


class Nf4(Codes):
    def code(self, x):
        return np.abs(x[:, None] / np.abs(x).max() - NF4).argmin(1)

    def read(self, x):
        return NF4[x % 16]


class BlockQuantization(Codes):
    def code(self, x):
        return np.concatenate([[np.abs(x).max() / 127], np.rint(x / np.abs(x).max() * 127)])

    def read(self, x):
        return x[0] * x[1:]


class EntropyCoding(Codes):
    def code(self, x):
        return np.frombuffer(zlib.compress(np.rint(x * 100).astype(np.int8).tobytes()), np.uint8)

    def read(self, x):
        return np.frombuffer(zlib.decompress(x.tobytes()), np.int8) / 100


class TopK(Codes):
    def code(self, x):
        largest = np.argsort(-np.abs(x))[:8]
        return np.stack([largest, x[largest]])

    def read(self, x):
        return np.bincount(x[0].astype(int), x[1], 64)


class PowerSGD(Codes):
    def code(self, x):
        u, s, v = np.linalg.svd(x.reshape(8, 8))
        return np.stack([u[:, 0] * s[0], v[0]])

    def read(self, x):
        return np.outer(x[0], x[1]).ravel()


class RandomK(Codes):
    additive: ClassVar[bool] = True

    def code(self, x):
        return x[SUPPORT]

    def read(self, x):
        return np.bincount(SUPPORT, x, 64)


class LinearSketch(RandomK):
    def code(self, x):
        return SKETCH @ x

    def read(self, x):
        return SKETCH.T @ x / len(SKETCH)


class SeedScalars(RandomK):
    def code(self, x):
        return DIRECTIONS @ x

    def read(self, x):
        return x @ DIRECTIONS


def adds_up(stage: Codes) -> bool:
    """Whether the sum of what the stage encodes decodes to the sum of what it decodes one by one."""
    updates = [{W: np.random.default_rng(seed).normal(size=64)} for seed in range(3)]
    sent = [stage.encode(Update(tensors), TASK).tensors for tensors in updates]
    if len({tensors[W].shape for tensors in sent}) > 1:
        return False
    try:
        summed = stage.decode(Total(tree.total(sent), 1.0, 3), TASK).tensors
    except (zlib.error, ValueError):
        return False
    alone = [stage.decode(Total(tensors, 1.0, 1), TASK).tensors[W] for tensors in sent]
    return summed[W].shape == alone[0].shape and np.allclose(summed[W], sum(alone))


@pytest.mark.parametrize("stage", [Nf4(), BlockQuantization(), EntropyCoding(), TopK(), PowerSGD()], ids=repr)
def test_what_does_not_add_up_cannot_be_hidden(stage):
    assert not adds_up(stage) and not stage.additive
    with pytest.raises(GuaranteeError, match="only stages whose sum can be decoded"):
        chain(Weigh(), stage, Hiding())
    with pytest.raises(GuaranteeError, match="only stages whose sum can be decoded"):
        chain(chain(Weigh(), stage), Hiding())
    assert not chain(Weigh(), stage).hides  # in the open it may be


@pytest.mark.parametrize("stage", [RandomK(), LinearSketch(), SeedScalars()], ids=repr)
def test_public_linear_maps_may_be_hidden_and_their_sum_decodes_to_the_sum(stage):
    assert adds_up(stage) and stage.additive
    assert chain(Weigh(), stage, Hiding()).hides


@pytest.mark.parametrize("after", [EntropyCoding(), RandomK(), Hiding(), Weigh()], ids=repr)
def test_nothing_comes_after_what_hides(after):
    with pytest.raises(GuaranteeError, match="nothing after a stage that hides"):
        chain(Weigh(), Hiding(), after)
    with pytest.raises(GuaranteeError, match="nothing after a stage that hides"):
        chain(chain(Weigh(), Hiding()), after)


@dataclass(frozen=True)
class Blind:
    """Stands for a way of gathering that needs only sums."""

    blind: ClassVar[bool] = True


@dataclass(frozen=True)
class LooksAtSingle(WeightedMean):
    rule: str
    linear: ClassVar[bool] = False


RULES = [name for n in (13, 14, 16, 17, 18, 19, 20, 38, 45) for names in ROWS[n].of for name in names]


@pytest.mark.parametrize("rule", sorted({name for name in RULES if not FEATURES[name].key}))
def test_a_rule_that_looks_at_single_updates_cannot_be_built_where_they_are_hidden(rule):
    with pytest.raises(GuaranteeError, match="only the sum, since a stage hides single updates"):
        federation(chain(Weigh(), Hiding()), aggregator=LooksAtSingle(rule), gather=Blind())
    assert federation(chain(Weigh()), aggregator=LooksAtSingle(rule)).aggregator.rule == rule


def test_what_hides_and_who_gathers_blindly_come_together_or_not_at_all():
    for stages, how in ((chain(Weigh(), Hiding()), None), (chain(Weigh()), Blind())):
        with pytest.raises(GuaranteeError, match="together"):
            federation(stages, gather=how)
    assert federation(chain(Weigh(), Hiding()), gather=Blind()).stages.hides


def test_a_rule_without_a_bound_gets_no_noise():
    plan = make_plan(Terms("silo", 1e-5, 2, noise_multiplier=1.0, silos=5, expected=5), SimulatedSource(0))
    mechanism = plan.mechanism()
    with pytest.raises(GuaranteeError):
        mechanism.release(Total({W: np.zeros(3)}, float("inf"), 5), mechanism.init())
    assert plan.aggregator().linear


# what masks are bound to


def agreement(silos: tuple[str, ...] = TASK.cohort) -> tuple[Agreement, dict[str, Identity]]:
    identities = {name: Identity.fresh() for name in silos}
    roster = {name: identity.public for name, identity in identities.items()}
    facts = {"treaty": "ab" * 32, "model": "cd" * 32, "word": 32, "corrupt": 0, "dropout": 0, "minimum": 3}
    return Agreement(roster=roster, coordinator=Identity.fresh().public, **facts), identities


def test_masks_need_a_roster_of_keys():
    good, identities = agreement()
    one = next(iter(identities.values())).public
    with pytest.raises(GuaranteeError, match="identity of its own"):
        replace(good, roster=dict.fromkeys(good.roster, one))
    with pytest.raises(GuaranteeError, match="identity of its own"):
        replace(good, coordinator=one)
    with pytest.raises(TypeError, match="roster"):
        Agreement("ab" * 32, "cd" * 32, coordinator=one, word=32, corrupt=0, dropout=0, minimum=3)
    assert replace(good, roster=agreement()[0].roster).digest != good.digest


def test_without_masks_nothing_leaves():
    stage = Mask(Membership(*agreement()))
    with pytest.raises(SiloError, match="a silo that is in a session"):
        stage.encode(Update({SUM: np.zeros(4, np.uint32)}, silo="a"), TASK)
    with pytest.raises(TypeError, match="masks"):
        Mask()


def test_a_weight_is_a_coordinate_of_the_sum():
    layout = layout_of({W: (64,)}, [WEIGHT], 32, 3)
    stages = chain(Weigh("examples", 100.0), Grid(2.0**-10), Words(layout))
    sent = stages.encode(Update({W: np.ones(64)}, weight=7000.0), TASK).tensors
    assert list(sent) == [SUM]
    total = stages.decode(Total(sent, 1.0, 1), TASK).tensors
    assert total[WEIGHT] == 100 and np.allclose(total[W], 100)


class Listening:
    """An engine that remembers what it was asked."""

    def ask(self, asks):
        self.asks = list(asks)
        return iter(())


def test_every_silo_of_a_cohort_is_sent_the_same_task():
    engine = Listening()
    list(gather.ask(engine, "train", replace(TASK, cohort=SILOS)))
    assert [ask.silo for ask in engine.asks] == list(SILOS)
    assert len({ask.payload for ask in engine.asks}) == 1


CHANGES = {
    "model": "other", "params": {"w": np.full(64, 1e-9)}, "cohort": ("a", "b"), "settings": {"norm": 2.0},
    "extra": {("control", "w"): np.zeros(64)}, "round": 1, "seed": 2,
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_model_cohort_and_settings_are_in_the_digest_that_masks_are_bound_to(change):
    digests = {wire.digest(wire.pack_task(task)) for task in (TASK, replace(TASK, **{change: CHANGES[change]}))}
    assert len(digests) == 2
