"""What the sections of a treaty must agree on: which keys apply when, which are needed when, and what contradicts what.

Each rule names the dotted keys it reads, so that a treaty with a mistake elsewhere still hears about all the others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import TreatyError
from . import text
from .mistakes import problem, setting
from .schema import GIVEN, MEMORY, Section

COUNTED = ("dirichlet", "quantity", "iid")
LOCAL_UNITS = ("example", "author")
_ADAPTIVE = ("adagrad", "adam", "yogi")
_FOLDER_NAME = re.compile(r"\w(?:[\w.-]{0,78}[\w-])?")

APPLIES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "adapter.rank": ("adapter.kind", ("lora",)),
    "adapter.alpha": ("adapter.kind", ("lora",)),
    "adapter.dropout": ("adapter.kind", ("lora",)),
    "adapter.targets": ("adapter.kind", ("lora",)),
    "adapter.embeddings": ("adapter.kind", ("lora",)),
    "adapter.freeze_a": ("adapter.kind", ("lora",)),
    "data.target": ("model.task", ("seq2seq",)),
    "silos.count": ("silos.by", COUNTED),
    "silos.alpha": ("silos.by", ("dirichlet", "quantity")),
    "algorithm.mu": ("algorithm.name", ("fedprox",)),
    "local.momentum": ("local.optimizer", ("sgd",)),
    "server.momentum": ("server.optimizer", ("momentum",)),
    "server.beta1": ("server.optimizer", _ADAPTIVE),
    "server.beta2": ("server.optimizer", ("adam", "yogi")),
    "server.tau": ("server.optimizer", _ADAPTIVE),
    "server.max_weight": ("server.weighting", ("examples",)),
    **dict.fromkeys(
        (
            "privacy.epsilon",
            "privacy.delta",
            "privacy.noise_multiplier",
            "privacy.noise_std",
            "privacy.max_norm",
            "privacy.quantile",
            "privacy.noise_ratio",
            "privacy.bands",
            "privacy.randomness",
            "privacy.public_text",
            "privacy.keep_modules",
        ),
        ("privacy.unit", ("example", "author", "silo")),
    ),
    **dict.fromkeys(
        ("privacy.rate", "privacy.rows", "privacy.clipping", "privacy.shares", "performance.microbatch"),
        ("privacy.unit", ("example", "author")),
    ),
    **dict.fromkeys(("privacy.author_examples", "privacy.sampling"), ("privacy.unit", ("author",))),
    **dict.fromkeys(
        ("privacy.noise", "privacy.placement", "privacy.hide_cohort", "privacy.accept_noise"),
        ("privacy.unit", ("silo",)),
    ),
    "cohort.size": ("cohort.sampling", ("fixed",)),
    "cohort.rate": ("cohort.sampling", ("poisson",)),
}
"""A key on the left means something only where the key on the right has one of these values."""

NEEDED = ("data.target", "silos.count", "cohort.size", "cohort.rate", "privacy.rate")
"""Keys without a default that must be given wherever they apply."""

COLUMNS = (
    ("silos.by", "domain", "data.domain"),
    ("silos.by", "author", "data.author"),
    ("silos.by", "label", "data.label"),
    ("split.by", "time", "data.timestamp"),
    ("model.task", "sequence-classification", "data.label"),
    ("privacy.unit", "author", "data.author"),
)
"""(key, value, the column that this value needs)."""


@dataclass(frozen=True)
class Facts:
    """A treaty's values by dotted key."""

    sections: Mapping[str, Section]

    def __getitem__(self, key: str) -> Any:
        section, _, name = key.partition(".")
        return getattr(self.sections[section], name)

    def given(self, key: str) -> bool:
        """Whether somebody wrote this key, rather than left it to its default."""
        section, _, name = key.partition(".")
        return name in self.sections[section].model_fields_set and self.has(key)

    def has(self, key: str) -> bool:
        """Whether this key has a value: a list that is empty by default has none while it is empty."""
        section, _, name = key.partition(".")
        return self[key] is not None and (
            self[key] != () or type(self.sections[section]).model_fields[name].default != ()
        )

    def applies(self, key: str) -> bool:
        """Whether this key means anything under the others."""
        return key not in APPLIES or self[APPLIES[key][0]] in APPLIES[key][1]

    def line(self, key: str) -> str:
        """A key and its value as the treaty spells them."""
        return f"{key.partition('.')[2]} = {text.value(self[key])}"


Rule = Callable[[Facts], Iterator[TreatyError]]
_RULES: list[tuple[tuple[str, ...], Rule]] = []


def contradictions(sections: Mapping[str, Section], broken: frozenset[str] = frozenset()) -> list[TreatyError]:
    """Every rule that the sections break, leaving out the rules that read a `broken` key or section."""
    facts = Facts(sections)
    sound = [rule for keys, rule in _RULES if not any(k in broken or k.partition(".")[0] in broken for k in keys)]
    return [mistake for rule in sound for mistake in rule(facts)]


def _reads(*keys: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        _RULES.append((keys, rule))
        return rule

    return register


def _only_where_it_applies(key: str, decider: str, values: tuple[str, ...]) -> Rule:
    def rule(t: Facts) -> Iterator[TreatyError]:
        name = key.partition(".")[2]
        asked = " or ".join(f'"{value}"' for value in values)
        if t.given(key) and not t.applies(key):
            do = f"Remove {name}, or set {decider.partition('.')[2]} = {asked} in [{decider.partition('.')[0]}]."
            yield problem(
                key, f"{name} only with {_named(decider)} {asked}", f"{t.line(key)} with {t.line(decider)}", do
            )
        elif key in NEEDED and t.applies(key) and not t.given(key):
            yield _absent(t, key, decider)

    return rule


def _column(decider: str, value: str, column: str) -> Rule:
    def rule(t: Facts) -> Iterator[TreatyError]:
        if t[decider] == value and not t.given(column):
            yield _absent(t, column, decider)

    return rule


def _named(key: str) -> str:
    section, _, name = key.partition(".")
    return f"[{section}] {name}"


def _absent(t: Facts, key: str, decider: str) -> TreatyError:
    section, _, name = key.partition(".")
    what = f"{name}, which {_named(decider)} = {text.value(t[decider])} needs"
    return problem(key, what, "none", f"Add {setting(key)} (for example) under [{section}].")


for _key, (_decider, _values) in APPLIES.items():
    _reads(_key, _decider)(_only_where_it_applies(_key, _decider, _values))
for _decider, _value, _needed in COLUMNS:
    _reads(_decider, _needed)(_column(_decider, _value, _needed))


@_reads("data.keep", "data.domain")
def _keep_needs_a_domain(t: Facts) -> Iterator[TreatyError]:
    if t.given("data.keep") and not t.given("data.domain"):
        do = f"Add {setting('data.domain')} (for example) under [data]."
        yield problem("data.domain", "domain, the column in which keep looks", "none", do)


@_reads("data.source", "silos.by")
def _memory_is_given(t: Facts) -> Iterator[TreatyError]:
    source, by = t["data.source"], t["silos.by"]
    if source == MEMORY and by != GIVEN:
        do = f'Name a [data] source, or leave by out and hand the silos over in Python, as source = "{MEMORY}" means.'
        yield problem("silos.by", f'by = "{GIVEN}" where there is no data source', text.value(by), do)
    if source != MEMORY and by == GIVEN:
        do = 'Choose another by, such as "domain", or leave [data] out and hand the silos over in Python.'
        yield problem(
            "silos.by", "a partition of the data source", f"{t.line('silos.by')} with {t.line('data.source')}", do
        )


@_reads("data.source", "data.test_source")
def _memory_has_no_test_source(t: Facts) -> Iterator[TreatyError]:
    if t["data.source"] == MEMORY and t.given("data.test_source"):
        do = "Remove test_source, and hand the test examples over in Python."
        yield problem("data.test_source", f'no test_source with source = "{MEMORY}"', t.line("data.test_source"), do)


@_reads("data.test_source", "split.test")
def _one_test_set(t: Facts) -> Iterator[TreatyError]:
    if t.given("data.test_source") and t["split.test"] > 0:
        do = "Set test = 0 in [split] (or leave it out), or remove test_source from [data]."
        yield problem(
            "split.test", "test = 0 where [data] test_source brings the test examples", t.line("split.test"), do
        )


@_reads("split.validation", "split.test")
def _something_to_train_on(t: Facts) -> Iterator[TreatyError]:
    held_out = t["split.validation"] + t["split.test"]
    if not held_out < 1:
        do = "Lower one of them, for example validation = 0.1 and test = 0.1."
        yield problem("split.validation", "validation + test < 1", f"{held_out:g}", do)


@_reads("split.validation", "evaluation.every", "algorithm.rounds", "data.source")
def _something_to_validate_on(t: Facts) -> Iterator[TreatyError]:
    every, rounds = t["evaluation.every"], t["algorithm.rounds"]
    if t["split.validation"] == 0 and every <= rounds and t["data.source"] != MEMORY:  # those may come split already
        came = f"validation = 0 with [evaluation] every = {every}"
        do = f"Set validation = 0.1, or every above rounds = {rounds} to evaluate at the end only."
        yield problem("split.validation", "validation > 0 for the evaluation every k rounds", came, do)


@_reads("local.steps", "local.epochs")
def _steps_or_epochs(t: Facts) -> Iterator[TreatyError]:
    if t.given("local.steps") == t.given("local.epochs"):
        came = "both" if t.given("local.steps") else "neither"
        do = "Remove one of them." if came == "both" else "Add steps = 20 (for example) under [local]."
        yield problem("local.steps", "exactly one of steps and epochs", came, do)


@_reads("local.warmup", "algorithm.rounds")
def _warmup_ends(t: Facts) -> Iterator[TreatyError]:
    if t["local.warmup"] >= t["algorithm.rounds"]:
        came = f"warmup = {t['local.warmup']} with rounds = {t['algorithm.rounds']}"
        do = f"Set warmup to {t['algorithm.rounds'] - 1} at most, or raise [algorithm] rounds."
        yield problem("local.warmup", "fewer rounds of warmup than there are rounds", came, do)


@_reads("silos.by", "data.label", "data.domain")
def _skew_of_something(t: Facts) -> Iterator[TreatyError]:
    if t["silos.by"] == "dirichlet" and not (t.given("data.label") or t.given("data.domain")):
        yield _absent(t, "data.label", "silos.by")


@_reads("silos.by", "silos.names")
def _given_silos_have_names(t: Facts) -> Iterator[TreatyError]:
    if t["silos.by"] == GIVEN and t.given("silos.names"):
        do = "Remove names: silos handed over in Python come with theirs."
        yield problem("silos.names", f'no names with by = "{GIVEN}"', t.line("silos.names"), do)


@_reads("silos.by", "silos.names", "silos.count")
def _a_name_for_every_drawn_silo(t: Facts) -> Iterator[TreatyError]:
    names, count = t["silos.names"], t["silos.count"]
    if t["silos.by"] not in COUNTED or not t.given("silos.names"):
        return
    if t.given("silos.count") and len(names) != count:
        do = f"Set count = {len(names)}, or give {count} names."
        yield problem("silos.names", f"as many names as silos, {count}", f"{len(names)}", do)
    for odd in (name for name in names if not _FOLDER_NAME.fullmatch(name)):
        do = 'Use letters, digits, "_", "-" and ".", the last two not at the start, 80 at most.'
        yield problem("silos.names", "names of drawn silos that are fit for folders", text.value(odd), do)
        return
    if len({name.casefold() for name in names}) < len(names):
        do = "Rename one: some file systems do not tell upper case from lower case."
        yield problem("silos.names", "names that differ in lower case too", text.value(names), do)


@_reads("silos.min_examples", "data.max_examples")
def _silos_large_enough(t: Facts) -> Iterator[TreatyError]:
    least, most = t["silos.min_examples"], t["data.max_examples"]
    if most is not None and most < least:
        came = f"max_examples = {most} with [silos] min_examples = {least}"
        yield problem("data.max_examples", "max_examples ≥ min_examples", came, "Lower the one or raise the other.")


@_reads("cohort.size", "cohort.minimum", "cohort.sampling", "silos.count", "silos.by", "silos.names", "data.keep")
def _a_cohort_that_can_be(t: Facts) -> Iterator[TreatyError]:
    silos, fixed = _most_silos(t), t.applies("cohort.size") and t.given("cohort.size")
    size, minimum = t["cohort.size"], t["cohort.minimum"]
    if fixed and silos is not None and size > silos:
        yield problem("cohort.size", f"size ≤ {silos}, the number of silos", f"{size}", f"Set size = {silos} or less.")
    most = min(x for x in (size if fixed else None, silos, minimum) if x is not None)
    if minimum > most:
        do = f"Set minimum = {most} or less."
        yield problem("cohort.minimum", f"minimum ≤ {most}, the most silos that a round can have", f"{minimum}", do)


@_reads("privacy.unit", "privacy.epsilon", "privacy.noise_multiplier", "privacy.noise_std")
def _one_measure_of_privacy(t: Facts) -> Iterator[TreatyError]:
    given = [name for name in ("epsilon", "noise_multiplier", "noise_std") if t.given(f"privacy.{name}")]
    if t["privacy.unit"] != "none" and len(given) != 1:
        do = "Remove all but one." if given else "Add epsilon = 8.0 (for example) under [privacy]."
        expected = "exactly one of epsilon, noise_multiplier and noise_std"
        yield problem("privacy.epsilon", expected, " and ".join(given) or "none", do)


@_reads("privacy.unit", "privacy.max_norm", "privacy.noise_std")
def _noise_needs_a_clip(t: Facts) -> Iterator[TreatyError]:
    if t["privacy.unit"] != "none" and t["privacy.max_norm"] == "none" and not t.given("privacy.noise_std"):
        do = "Set max_norm = 1.0 (for example), or ask for bare noise with noise_std, which guarantees nothing."
        yield problem("privacy.max_norm", "a clip, without which no noise is enough", 'max_norm = "none"', do)


@_reads("privacy.unit", "local.epochs")
def _public_steps(t: Facts) -> Iterator[TreatyError]:
    if t["privacy.unit"] in LOCAL_UNITS and t.given("local.epochs"):
        do = "Set steps instead: how many examples a silo has is private, and must not decide how long it trains."
        yield problem("local.epochs", "a public number of steps with [privacy]", t.line("local.epochs"), do)


@_reads("privacy.unit", "data.max_examples", "split.by")
def _units_prepared_one_by_one(t: Facts) -> Iterator[TreatyError]:
    if t["privacy.unit"] not in LOCAL_UNITS:
        return
    expected = "data prepared so that one example more changes no other, with [privacy]"
    if t.given("data.max_examples"):
        do = "Remove max_examples: it lets one example put another out. A lower rate makes steps small."
        yield problem("data.max_examples", expected, t.line("data.max_examples"), do)
    if t["split.by"] == "time":
        do = 'Set by = "hash" in [split]: a border in time moves when an example comes or goes.'
        yield problem("split.by", expected, t.line("split.by"), do)


@_reads("privacy.unit", "local.max_grad_norm")
def _one_clip(t: Facts) -> Iterator[TreatyError]:
    if t["privacy.unit"] in LOCAL_UNITS and t.given("local.max_grad_norm"):
        do = (
            "Remove max_grad_norm: [privacy] max_norm clips each unit, and nothing needs to be clipped after the noise."
        )
        yield problem("local.max_grad_norm", "one clip, that of [privacy]", t.line("local.max_grad_norm"), do)


@_reads("privacy.unit", "server.weighting")
def _uniform_weights(t: Facts) -> Iterator[TreatyError]:
    if t["privacy.unit"] != "none" and t["server.weighting"] != "uniform":
        do = 'Set weighting = "uniform" in [server], or leave it out: how many examples a silo has is private.'
        yield problem("server.weighting", 'weighting = "uniform" with [privacy]', t.line("server.weighting"), do)


@_reads("privacy.unit", "disclosure.loss")
def _no_bare_loss(t: Facts) -> Iterator[TreatyError]:
    if t["privacy.unit"] == "silo" and t["disclosure.loss"]:
        do = "Set loss = false in [disclosure], or leave it out: it would be a release of its own that nobody charges."
        yield problem("disclosure.loss", "loss = false where whole silos are protected", "loss = true", do)


@_reads("privacy.unit", "privacy.sampling", "privacy.author_examples")
def _authors_as_groups(t: Facts) -> Iterator[TreatyError]:
    if t["privacy.unit"] == "author" and t["privacy.sampling"] == "examples" and not t.given("privacy.author_examples"):
        do = "Add author_examples = 8 (for example) under [privacy]."
        expected = 'author_examples, the size of a group, with sampling = "examples"'
        yield problem("privacy.author_examples", expected, "none", do)


@_reads("privacy.unit", "cohort.sampling", "cohort.minimum", "privacy.hide_cohort")
def _sampled_silos(t: Facts) -> Iterator[TreatyError]:
    if t["privacy.unit"] != "silo":
        return
    if t["privacy.hide_cohort"] and t["cohort.sampling"] != "poisson":
        do = 'Set sampling = "poisson" in [cohort], or leave hide_cohort out.'
        yield problem("privacy.hide_cohort", "silos drawn by independent coins", t.line("cohort.sampling"), do)
    if t["cohort.sampling"] == "poisson" and t["cohort.minimum"] > 1:
        do = "Set minimum = 1: a round that depends on how many silos the coins chose is not Poisson sampling."
        yield problem("cohort.minimum", "minimum = 1 with sampled silos under [privacy]", t.line("cohort.minimum"), do)


def _most_silos(t: Facts) -> int | None:
    """How many silos there can be at most; None where only the data will tell."""
    if t.applies("silos.count"):
        count: int | None = t["silos.count"]
        return count
    if t.given("silos.names"):
        return len(t["silos.names"])
    return len(t["data.keep"]) if t["silos.by"] == "domain" and t.given("data.keep") else None
