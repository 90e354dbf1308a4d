"""What the sections of a treaty must agree on: which keys apply when, which are needed when, and what contradicts what.

Each rule names the dotted keys it reads, so that a treaty with a mistake elsewhere still hears about all the others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ..errors import TreatyError, one_of
from ..stages.words import room
from . import text
from .combinations import decide
from .features import FEATURES, KEYS, features
from .mistakes import problem, setting
from .schema import GIVEN, LEAST_SECRET, MEMORY, SECTIONS, SILENT, Section

COUNTED = ("dirichlet", "quantity", "iid")
DRAWN = (*COUNTED, GIVEN)
LOCAL_UNITS = ("example", "author")
LANGUAGE = ("causal-lm", "masked-lm")
ATTENTIVE = ("entropy", "rank", "error", "distance")
LEAST_ROOM = 127
"""Steps either way that a coordinate of one silo needs at least: eight bits, of which rounding takes the last."""
_ADAPTIVE = ("adagrad", "adam", "yogi")
FOLDER_NAME = re.compile(r"\w(?:[\w.-]{0,78}[\w-])?")

PRESENT: tuple[str, ...] = ()
"""In place of values: whatever the deciding key is, as long as it asks for something."""

APPLIES: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    "adapter.rank": ("adapter.kind", ("lora",)),
    "adapter.alpha": ("adapter.kind", ("lora",)),
    "adapter.dropout": ("adapter.kind", ("lora",)),
    "adapter.targets": ("adapter.kind", ("lora",)),
    "adapter.embeddings": ("adapter.kind", ("lora",)),
    "adapter.blocks": ("adapter.kind", ("lora",)),
    "adapter.freeze_a": ("adapter.kind", ("lora",)),
    "data.target": ("model.task", ("seq2seq",)),
    **dict.fromkeys(("data.missing", "data.unlabelled", "topics.weight", "topics.denoise"), ("model.task", LANGUAGE)),
    "data.missing_kind": ("data.missing", PRESENT),
    "topics.smoothing": ("topics.weight", PRESENT),
    "topics.pseudo_labels": ("topics.weight", PRESENT),
    "topics.denoise_rate": ("topics.denoise", PRESENT),
    "silos.count": ("silos.by", COUNTED),
    "silos.alpha": ("silos.by", ("dirichlet", "quantity")),
    "algorithm.mu": ("algorithm.name", ("fedprox",)),
    **dict.fromkeys(("alignment.gamma", "alignment.base", "alignment.max_share"), ("alignment.attention", ATTENTIVE)),
    "alignment.largest": ("alignment.base", (1,)),
    "disclosure.attention": ("alignment.attention", ATTENTIVE),
    **dict.fromkeys(("alignment.noise_ratio", "alignment.rate"), ("privacy.unit", LOCAL_UNITS)),
    "alignment.rows": ("privacy.unit", ("none", "silo")),
    "alignment.scale": ("privacy.unit", ("silo",)),
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
            "privacy.noise",
            "privacy.placement",
        ),
        ("privacy.unit", ("example", "author", "silo")),
    ),
    **dict.fromkeys(
        (
            "alignment.tokens",
            "privacy.rate",
            "privacy.rows",
            "privacy.clipping",
            "privacy.shares",
            "performance.microbatch",
        ),
        ("privacy.unit", ("example", "author")),
    ),
    **dict.fromkeys(("privacy.author_examples", "privacy.sampling"), ("privacy.unit", ("author",))),
    **dict.fromkeys(
        ("privacy.hide_cohort", "privacy.accept_noise"),
        ("privacy.unit", ("silo",)),
    ),
    **dict.fromkeys(
        (
            "secure.word",
            "secure.range",
            "secure.corrupt",
            "secure.dropout",
            "secure.neighbours",
            "secure.threshold",
            "secure.group_size",
        ),
        ("secure.sums", ("masked", "encrypted")),
    ),
    **dict.fromkeys(("secure.scheme", "secure.encrypted_share", "secure.key_holders"), ("secure.sums", ("encrypted",))),
    "cohort.size": ("cohort.sampling", ("fixed",)),
    "cohort.rate": ("cohort.sampling", ("poisson",)),
}
"""A key on the left means something only where the key on the right has one of these values."""

OWN = {
    "alignment": "alignment", "scaffold": "scaffold", "reversal": "reversal", "udalm": "udalm", "knn": "knn-adapter",
    "fedlap": "fedlap",
}  # fmt: skip
"""Sections that mean something under one algorithm only."""
READS_FEATURES = ("alignment", "reversal", "udalm", "knn-adapter", "fedlap")
WITHOUT_SHARES = ("alignment", "scaffold", "fedlap", "alone")
"""Algorithms whose updates hold more than one step of the model, which is all that shares of noise cover."""

NEEDED = ("data.target", "silos.count", "cohort.size", "cohort.rate", "privacy.rate", "alignment.public_text")
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
        """Whether this key has a value: a list that is empty by default has none while it is empty, nor has a silent
        key that asks for nothing.
        """
        section, _, name = key.partition(".")
        default = type(self.sections[section]).model_fields[name].default
        return self[key] is not None and (self[key] != default or (default != () and key not in SILENT))

    def applies(self, key: str) -> bool:
        """Whether this key means anything under the others."""
        return self.obstacle(key) is None

    def obstacle(self, key: str) -> tuple[str, tuple[Any, ...]] | None:
        """The first deciding key, with the values it would need, for which this key means nothing."""
        for decider, values in deciders(key):
            if not self.applies(decider) or not (self[decider] in values if values else self.has(decider)):
                return decider, values
        return None

    def line(self, key: str) -> str:
        """A key and its value as the treaty spells them."""
        name = key.partition(".")[2]
        return f"{name} = {text.value(self[key])}" if self[key] is not None else f"no {name}"


def deciders(key: str) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    """The keys on which it depends whether a key means anything, each with the values under which it does."""
    own = OWN.get(key.partition(".")[0])
    section = (("algorithm.name", (own,)),) if own else ()
    return (*section, APPLIES[key]) if key in APPLIES else section


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


def _only_where_it_applies(key: str) -> Rule:
    def rule(t: Facts) -> Iterator[TreatyError]:
        name, obstacle = key.partition(".")[2], t.obstacle(key)
        if t.given(key) and obstacle is not None:
            decider, values = obstacle
            asked = "".join(f" {word}" for word in (" or ".join(map(text.value, values)),) if word)
            remedy = f"set {decider.partition('.')[2]} ={asked}" if values else f"add {setting(decider)} (for example)"
            do = f"Remove {name}, or {remedy} in [{decider.partition('.')[0]}]."
            came = f"{t.line(key)} with {t.line(decider)}"
            yield problem(key, f"{name} only with {_named(decider)}{asked}", came, do)
        elif key in NEEDED and obstacle is None and not t.given(key):
            yield _absent(t, key, deciders(key)[0][0])

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


for _key in (f"{section}.{name}" for section, cls in SECTIONS.items() for name in cls.model_fields):
    if deciders(_key):
        _reads(_key, *(decider for decider, _ in deciders(_key)))(_only_where_it_applies(_key))
for _decider, _value, _needed in COLUMNS:
    _reads(_decider, _needed)(_column(_decider, _value, _needed))


@_reads("data.keep", "data.domain")
def _keep_needs_a_domain(t: Facts) -> Iterator[TreatyError]:
    if t.given("data.keep") and not t.given("data.domain"):
        do = f"Add {setting('data.domain')} (for example) under [data]."
        yield problem("data.domain", "domain, the column in which keep looks", "none", do)


@_reads("data.labels", "data.label")
def _labels_of_a_column(t: Facts) -> Iterator[TreatyError]:
    if t.given("data.labels") and not t.given("data.label"):
        yield _absent(t, "data.label", "data.labels")


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


@_reads("silos.by", "silos.names", "silos.count")
def _a_name_for_every_silo(t: Facts) -> Iterator[TreatyError]:
    names, count = t["silos.names"], t["silos.count"]
    if t["silos.by"] not in DRAWN or not t.given("silos.names"):
        return
    if t.applies("silos.count") and t.given("silos.count") and len(names) != count:
        do = f"Set count = {len(names)}, or give {count} names."
        yield problem("silos.names", f"as many names as silos, {count}", f"{len(names)}", do)
    for odd in (name for name in names if not FOLDER_NAME.fullmatch(name)):
        do = 'Use letters, digits, "_", "-" and ".", the last two not at the start, 80 at most.'
        yield problem("silos.names", "names of silos that are fit for folders", text.value(odd), do)
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


_MANY = ("cohort.size", "cohort.sampling", "silos.count", "silos.by", "silos.names", "data.keep")


@_reads(*_MANY, "cohort.minimum", "secure.sums")
def _a_cohort_that_can_be(t: Facts) -> Iterator[TreatyError]:
    silos, fixed = _most_silos(t), t.applies("cohort.size") and t.given("cohort.size")
    size, minimum = t["cohort.size"], t["cohort.minimum"]
    if fixed and silos is not None and size > silos:
        yield problem("cohort.size", f"size ≤ {silos}, the number of silos", f"{size}", f"Set size = {silos} or less.")
    most = min(x for x in (size if fixed else None, silos, minimum) if x is not None)
    if minimum > most and not _secure(t):  # secure sums say themselves what is too few
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


@_reads("privacy.unit", "disclosure.attention", "alignment.attention", "algorithm.name")
def _no_bare_weight(t: Facts) -> Iterator[TreatyError]:
    if t["privacy.unit"] == "silo" and t.applies("disclosure.attention") and t["disclosure.attention"]:
        do = "Set attention = false in [disclosure], or leave it out: a weight follows from the silo's text, and stands"
        do += " inside the clip of its update alone."
        expected = "attention = false where whole silos are protected"
        yield problem("disclosure.attention", expected, "attention = true", do)


@_reads("privacy.unit", "privacy.sampling", "privacy.author_examples")
def _authors_as_groups(t: Facts) -> Iterator[TreatyError]:
    if t["privacy.unit"] == "author" and t["privacy.sampling"] == "examples" and not t.given("privacy.author_examples"):
        do = "Add author_examples = 8 (for example) under [privacy]."
        expected = 'author_examples, the size of a group, with sampling = "examples"'
        yield problem("privacy.author_examples", expected, "none", do)


@_reads("privacy.unit", "cohort.sampling", "cohort.minimum", "privacy.hide_cohort", "secure.sums")
def _sampled_silos(t: Facts) -> Iterator[TreatyError]:
    if t["privacy.unit"] != "silo":
        return
    if t["privacy.hide_cohort"] and t["cohort.sampling"] != "poisson":
        do = 'Set sampling = "poisson" in [cohort], or leave hide_cohort out.'
        yield problem("privacy.hide_cohort", "silos drawn by independent coins", t.line("cohort.sampling"), do)
    if t["cohort.sampling"] == "poisson" and t["cohort.minimum"] > 1 and not _secure(t):
        do = "Set minimum = 1: a round that depends on how many silos the coins chose is not Poisson sampling."
        yield problem("cohort.minimum", "minimum = 1 with sampled silos under [privacy]", t.line("cohort.minimum"), do)


@_reads("privacy.unit", "privacy.placement", "privacy.noise")
def _noise_inside_silos(t: Facts) -> Iterator[TreatyError]:
    if t["privacy.unit"] not in LOCAL_UNITS:
        return
    if t["privacy.placement"] == "server":
        do = 'Set placement = "silo", or leave it out: it is the silo that sees single units.'
        expected = 'placement "silo" or "shared" for units inside silos'
        yield problem("privacy.placement", expected, t.line("privacy.placement"), do)
    if t["privacy.placement"] == "silo" and t["privacy.noise"] != "gaussian":
        do = 'Set noise = "gaussian", or placement = "shared", whose shares of the noise are integers.'
        yield problem("privacy.noise", 'noise = "gaussian" where each silo adds all of it', t.line("privacy.noise"), do)


@_reads("privacy.unit", "privacy.placement", "secure.sums")
def _shares_of_noise(t: Facts) -> Iterator[TreatyError]:
    if t["privacy.unit"] == "none" or t["privacy.placement"] != "shared":
        return
    rehearsed = t["privacy.unit"] == "silo" and t["secure.sums"] == "open"
    if t["secure.sums"] != "masked" and not rehearsed:
        do = 'Set sums = "masked" in [secure], or placement = "silo": a share of the noise protects only the sum.'
        yield problem("secure.sums", 'sums = "masked" with placement = "shared"', t.line("secure.sums"), do)


_ONE_STEP = (
    ("local.steps", 1, "a second step would start from what the first one learned without noise"),
    ("local.optimizer", "sgd", "a step must be a multiple of the sum of clipped gradients"),
    ("local.momentum", 0.0, "a step must not carry what earlier ones learned without noise"),
    ("local.weight_decay", 0.0, "a step must be a multiple of the sum of clipped gradients"),
    ("local.schedule", "constant", "the noise is that of one learning rate"),
    ("local.warmup", 0, "the noise is that of one learning rate"),
    ("local.keep_optimizer", False, "a step must not carry what earlier ones learned without noise"),
    ("disclosure.loss", False, "a loss of the step is not covered by the noise on the update"),
    ("privacy.sampling", "units", "the sum of clipped gradients has one norm for each unit"),
    ("privacy.clipping", "whole", "the noise is that of one norm for the whole update"),
    ("privacy.bands", 1, "shares of noise are drawn anew in every round"),
)


@_reads("privacy.unit", "privacy.placement", *(key for key, _, _ in _ONE_STEP))
def _one_step_under_shared_noise(t: Facts) -> Iterator[TreatyError]:
    if t["privacy.unit"] in LOCAL_UNITS and t["privacy.placement"] == "shared":
        for key, only, why in _ONE_STEP:
            if t[key] is not None and t[key] != only:
                line = f"{key.partition('.')[2]} = {text.value(only)}"
                do = f'Set {line}: {why}. Or set placement = "silo" in [privacy], where each step has its own noise.'
                yield problem(key, f'{line} with placement = "shared"', t.line(key), do)


@_reads(*_MANY, "secure.sums", "secure.corrupt", "secure.dropout", "cohort.minimum")
def _enough_for_a_secret(t: Facts) -> Iterator[TreatyError]:
    if not _secure(t):
        return
    silos, minimum, least = _parties(t), t["cohort.minimum"], _least_secret(t)
    if minimum < least:
        do = f"Set minimum = {least} or more: two honest silos at least must be left when the corrupt take theirs off."
        yield problem("cohort.minimum", f"minimum ≥ {least} with secure sums", f"{minimum}", do)
    if silos is None:
        return
    left = silos - _part(t["secure.dropout"], silos)
    if silos < least:
        do = 'Bring more silos into a round: in the sum of two, each reads the other. Or set sums = "open".'
        yield problem("secure.sums", f"at least {least} silos a round with secure sums", f"{silos}", do)
    elif max(minimum, least) > left:
        expected = f"minimum ≤ {left}, the silos of a round that are left when dropout takes its share of {silos}"
        do = f"Lower minimum (to {least} at least) or [secure] dropout, or bring more silos into a round."
        yield problem("cohort.minimum", expected, f"{minimum}", do)


@_reads("secure.sums", "privacy.unit", "privacy.hide_cohort", "cohort.sampling")
def _a_known_cohort(t: Facts) -> Iterator[TreatyError]:
    if not _secure(t) or t["privacy.unit"] != "silo":
        return
    if t["privacy.hide_cohort"]:
        do = "Leave hide_cohort out: silos share secrets with one another, and the coordinator must know who is there."
        yield problem("privacy.hide_cohort", "no secret of who takes part with secure sums", "hide_cohort = true", do)
    if t["cohort.sampling"] == "poisson":
        do = 'Set sampling = "fixed" and a size: how many coins draw must decide nothing.'
        expected = "a public number of silos a round where secure sums protect whole silos"
        yield problem("cohort.sampling", expected, t.line("cohort.sampling"), do)


@_reads("secure.sums", "disclosure.holdings")
def _no_counts_beside_a_sum(t: Facts) -> Iterator[TreatyError]:
    if _secure(t) and t["disclosure.holdings"]:
        do = "Set holdings = false in [disclosure], or leave it out: counts are private, and no mask covers them."
        yield problem("disclosure.holdings", "holdings = false with secure sums", "holdings = true", do)


@_reads("secure.sums", "server.weighting", "server.max_weight")
def _a_weight_with_an_end(t: Facts) -> Iterator[TreatyError]:
    if _secure(t) and t["server.weighting"] == "examples" and not t.given("server.max_weight"):
        do = 'Add max_weight = 1000.0 (for example) under [server], or set weighting = "uniform".'
        expected = "max_weight, for which a secure sum of weights keeps room"
        yield problem("server.max_weight", expected, "none", do)


@_reads(*_MANY, "secure.sums", "secure.word")
def _room_in_a_word(t: Facts) -> Iterator[TreatyError]:
    silos, word = _parties(t), t["secure.word"]
    if not _secure(t) or silos is None:
        return
    if room(word, silos) < LEAST_ROOM:
        do = f"Set word = {min(64, 2 * word)}."
        expected = f"a word in which each of {silos:,} silos has {LEAST_ROOM} steps either way"
        yield problem("secure.word", expected, f"word = {word}, in which each has {room(word, silos)}", do)


@_reads("secure.sums", "secure.corrupt", "secure.dropout")
def _a_threshold_between(t: Facts) -> Iterator[TreatyError]:
    corrupt, dropout = t["secure.corrupt"], t["secure.dropout"]
    if _secure(t) and not corrupt + 2 * dropout < 1:
        do = "Lower one of them: those who are left must be able to open a mask, the corrupt with half of the rest not."
        expected = "corrupt + 2 × dropout < 1"
        yield problem("secure.corrupt", expected, f"{corrupt:g} + 2 × {dropout:g}", do)


@_reads("secure.sums", "secure.neighbours", "secure.threshold")
def _more_than_half_the_neighbours(t: Facts) -> Iterator[TreatyError]:
    k, threshold = t["secure.neighbours"], t["secure.threshold"]
    if not _secure(t):
        return
    if t.given("secure.neighbours") and k < LEAST_SECRET - 1:
        do = "Set neighbours = 2 or more, or leave it out."
        yield problem("secure.neighbours", "neighbours ≥ 2", f"{k}", do)
    elif t.given("secure.neighbours") and t.given("secure.threshold") and not k < 2 * threshold <= 2 * k:
        do = f"Set threshold between {k // 2 + 1} and {k}, or leave both out."
        expected = f"more than half of the {k} neighbours, and no more than there are"
        yield problem("secure.threshold", expected, f"{threshold}", do)


@_reads("privacy.unit", "privacy.placement", "secure.sums", "secure.neighbours")
def _noise_that_no_lie_divides(t: Facts) -> Iterator[TreatyError]:
    shared = t["privacy.unit"] != "none" and t["privacy.placement"] == "shared"
    if _secure(t) and shared and t.given("secure.neighbours"):
        do = "Leave neighbours out: with shares of noise every silo masks with every other, so that no lie about who"
        do += " survived takes a part of the noise away."
        yield problem("secure.neighbours", 'no neighbours with placement = "shared"', t.line("secure.neighbours"), do)


@_reads("secure.sums", "secure.scheme")
def _an_exact_scheme(t: Facts) -> Iterator[TreatyError]:
    if t["secure.sums"] == "encrypted" and t["secure.scheme"] == "ckks":
        do = 'Set scheme = "bfv": it is exact. What CKKS decrypts, sent to the coordinator, gives the secret key away.'
        yield problem("secure.scheme", 'scheme = "bfv" where the coordinator gets the sum', 'scheme = "ckks"', do)


@_reads(*_MANY, "secure.sums", "secure.group_size", "secure.dropout", "cohort.minimum")
def _groups_large_enough(t: Facts) -> Iterator[TreatyError]:
    size, silos = t["secure.group_size"], _parties(t)
    if not _secure(t) or not t.given("secure.group_size"):
        return
    left = size - _part(t["secure.dropout"], size)
    if silos is not None and size > silos:
        do = f"Set group_size = {silos} or less, or leave it out: all are then one group."
        yield problem("secure.group_size", f"group_size ≤ {silos}, the silos of a round", f"{size}", do)
    elif left < (least := max(t["cohort.minimum"], LEAST_SECRET)):
        expected = f"groups of which {least} are left, the least that a sum may have, when dropout takes its share"
        do = "Raise group_size, or lower [secure] dropout or [cohort] minimum, which counts in each group."
        yield problem("secure.group_size", expected, f"{left} of {size}", do)


@_reads(*_MANY, "secure.sums", "secure.key_holders")
def _holders_among_the_silos(t: Facts) -> Iterator[TreatyError]:
    silos = _most_silos(t)
    if t["secure.sums"] == "encrypted" and silos is not None and t["secure.key_holders"] > silos:
        expected = f"key_holders ≤ {silos}, the number of silos"
        yield problem(
            "secure.key_holders", expected, f"{t['secure.key_holders']}", f"Set key_holders = {silos} or less."
        )


@_reads("topics.weight", "topics.denoise", "alignment.head", "data.label", "model.task")
def _topics_have_labels(t: Facts) -> Iterator[TreatyError]:
    for key in ("topics.weight", "topics.denoise", "alignment.head"):
        if t.given(key) and t.applies(key) and not t.given("data.label"):
            yield _absent(t, "data.label", key)
            return


@_reads("algorithm.name", "alignment.head", "topics.weight")
def _one_way_to_a_head(t: Facts) -> Iterator[TreatyError]:
    if t.applies("alignment.head") and t["alignment.head"] == "means" and t.given("topics.weight"):
        do = 'Remove weight from [topics], or set head = "learned" in [alignment].'
        yield problem("alignment.head", "no topic loss beside a head of class means", t.line("topics.weight"), do)


@_reads("algorithm.name", "topics.weight", "udalm.mix", "alignment.attention", "alignment.head")
def _a_head_that_is_asked(t: Facts) -> Iterator[TreatyError]:
    for name, key, asked in (
        ("udalm", "udalm.mix", t["udalm.mix"] > 0),
        ("alignment", "alignment.attention", t["alignment.attention"] == "error" and not t.given("alignment.head")),
    ):
        if t["algorithm.name"] == name and asked and not t.given("topics.weight"):
            yield _absent(t, "topics.weight", key)


@_reads("algorithm.name", "model.task")
def _features_of_a_language_model(t: Facts) -> Iterator[TreatyError]:
    name, task = t["algorithm.name"], t["model.task"]
    tasks = ("causal-lm",) if name in ("knn-adapter", "fedlap") else LANGUAGE
    if name in READS_FEATURES and task not in tasks:
        asked = " or ".join(map(text.value, tasks))
        do = f"Set task = {asked} in [model], or take another algorithm."
        yield problem("algorithm.name", f"task = {asked} with {t.line('algorithm.name')}", t.line("model.task"), do)


@_reads("algorithm.name", "algorithm.rounds", "scaffold.warm", "udalm.pretrain")
def _first_rounds_end(t: Facts) -> Iterator[TreatyError]:
    for key in ("scaffold.warm", "udalm.pretrain"):
        if t.applies(key) and t[key] >= t["algorithm.rounds"]:
            do = f"Lower it, or raise rounds = {t['algorithm.rounds']} in [algorithm]."
            yield problem(key, "fewer first rounds than there are rounds", t.line(key), do)


_PLAIN_SGD = (("local.optimizer", "sgd"), ("local.momentum", 0.0), ("local.weight_decay", 0.0))


@_reads("algorithm.name", "local.max_grad_norm", *(key for key, _ in _PLAIN_SGD))
def _a_path_of_gradients(t: Facts) -> Iterator[TreatyError]:
    if t["algorithm.name"] != "scaffold":
        return
    wrong = [key for key, only in _PLAIN_SGD if t[key] != only]
    wrong += ["local.max_grad_norm"] if t.given("local.max_grad_norm") else []
    for key in wrong:
        do = 'Set optimizer = "sgd", without momentum, weight_decay and max_grad_norm: a control is the mean gradient.'
        yield problem(key, 'plain SGD with name = "scaffold"', t.line(key), do)


@_reads("model.layers", "adapter.kind")
def _a_cut_is_frozen(t: Facts) -> Iterator[TreatyError]:
    if t.given("model.layers") and t["adapter.kind"] == "full":
        do = "Remove layers, or train an adapter: what bridges the blocks that are left out is not a parameter."
        yield problem("model.layers", 'no layers with [adapter] kind = "full"', t.line("model.layers"), do)


@_reads("data.missing_kind", "data.missing", "data.unlabelled", "data.label", "model.task")
def _labels_to_lose(t: Facts) -> Iterator[TreatyError]:
    for key in ("data.missing_kind", "data.unlabelled"):
        asked = t[key] == "topic" if key == "data.missing_kind" else True
        if t.given(key) and t.applies(key) and asked and not t.given("data.label"):
            yield _absent(t, "data.label", key)


@_reads("data.unlabelled", "alignment.target", "algorithm.name", "silos.by", "silos.names", "data.keep")
def _silos_that_there_are(t: Facts) -> Iterator[TreatyError]:
    known = _known_names(t)
    if known is None:
        return
    asked = {"data.unlabelled": t["data.unlabelled"], "alignment.target": filter(None, [t["alignment.target"]])}
    for key, names in asked.items():
        for odd in (name for name in names if t.applies(key) and name not in known):
            yield problem(key, "the name of a silo", text.value(odd), one_of(odd, known))
    if set(known) <= set(t["data.unlabelled"]):
        do = "Leave one of them out: somebody must have labels to learn from."
        yield problem("data.unlabelled", "a silo with labels", "every silo without", do)


@_reads("silos.by", "silos.names", "silos.members")
def _members_of_named_silos(t: Facts) -> Iterator[TreatyError]:
    members, names = t["silos.members"], t["silos.names"]
    if not t.given("silos.members"):
        return
    if t["silos.by"] in DRAWN:
        do = 'Choose by = "domain" (for example), or remove members.'
        yield problem("silos.members", "members of silos by a column", t.line("silos.by"), do)
    elif len(members) != len(names):
        do = "Give names, as many as there are lists in members."
        yield problem("silos.names", f"a name for each of {len(members)} silos with members", f"{len(names)}", do)
    for odd in (name for name in names if not FOLDER_NAME.fullmatch(name)):
        do = 'Use letters, digits, "_", "-" and ".", the last two not at the start, 80 at most.'
        yield problem("silos.names", "names of silos with members that are fit for folders", text.value(odd), do)
        return


@_reads("silos.members", "data.keep", "silos.by")
def _members_are_kept(t: Facts) -> Iterator[TreatyError]:
    if not (t.given("data.keep") and t.given("silos.members")) or t["silos.by"] != "domain":
        return
    gone = [name for names in t["silos.members"] for name in names if name not in t["data.keep"]]
    if gone:
        do = f"Add {text.value(gone[0])} to keep, or remove keep: members choose by themselves."
        yield problem("data.keep", "every member of a silo", f"no {text.value(gone[0])}", do)


@_reads("algorithm.name", "alignment.base", "alignment.attention", "server.weighting")
def _examples_count_once(t: Facts) -> Iterator[TreatyError]:
    if t.applies("alignment.base") and t["alignment.base"] == 1 and t["server.weighting"] == "examples":
        do = 'Set weighting = "uniform" in [server], or base = 0 in [alignment].'
        yield problem("alignment.base", "numbers of examples in one place", 'base = 1 with weighting = "examples"', do)


@_reads("algorithm.name", "privacy.unit", "privacy.placement", "privacy.bands")
def _noise_that_covers_the_method(t: Facts) -> Iterator[TreatyError]:
    name, unit = t["algorithm.name"], t["privacy.unit"]
    if unit in LOCAL_UNITS and t["privacy.placement"] == "shared" and name in WITHOUT_SHARES:
        do = 'Set placement = "silo": shares of noise cover one step of the model, and this sends more.'
        came = f"{t.line('algorithm.name')} with {t.line('privacy.placement')}"
        yield problem("privacy.placement", 'placement = "silo" with this algorithm', came, do)
    if unit in LOCAL_UNITS and name == "alignment" and t["privacy.bands"] > 1:
        do = "Leave bands out: surveys have noise of their own, which is independent from round to round."
        yield problem("privacy.bands", "bands = 1 beside surveys", t.line("privacy.bands"), do)
    if unit == "silo" and name in ("alone", "fedlap"):
        why = "a silo that sends nothing" if name == "alone" else "synthetic texts in a slot of the silo's own"
        do = f'Protect units inside silos (unit = "example"): noise on the update says nothing about {why}.'
        expected = f'unit "example" or "author" with {t.line("algorithm.name")}'
        yield problem("privacy.unit", expected, 'unit = "silo"', do)


@_reads("algorithm.name", "alignment.every", "privacy.hide_cohort")
def _parts_that_tell_who_came(t: Facts) -> Iterator[TreatyError]:
    if t["privacy.hide_cohort"] and t["algorithm.name"] == "alignment" and t["alignment.every"] > 1:
        do = "Leave every out, or hide_cohort: a part that comes in some rounds tells when nobody was there to send it."
        yield problem("alignment.every", "every = 1 with a hidden cohort", t.line("alignment.every"), do)


@_reads("algorithm.name", "privacy.unit", "knn.public_text", "knn.answers")
def _a_store_of_public_text(t: Facts) -> Iterator[TreatyError]:
    if t["algorithm.name"] != "knn-adapter" or t.given("knn.public_text"):
        return
    if t["privacy.unit"] in LOCAL_UNITS:
        do = f"Add {setting('knn.public_text')} (for example): in a store of their own text units bear on each other."
        yield problem("knn.public_text", "public_text to tune against, with units inside silos", "none", do)
    elif t["knn.answers"] == "public":
        yield _absent(t, "knn.public_text", "knn.answers")


@_reads("algorithm.name", "alignment.target", "secure.sums", "privacy.unit")
def _a_target_that_no_sum_hides(t: Facts) -> Iterator[TreatyError]:
    noised = t["privacy.unit"] in LOCAL_UNITS
    if _secure(t) and not noised and t["algorithm.name"] == "alignment" and t.given("alignment.target"):
        do = "Leave target out: in a sum of which one silo alone fills a part, everybody reads that part. Or protect"
        do += ' units inside silos (unit = "example" in [privacy]), whose surveys have noise of their own.'
        yield problem("alignment.target", "no target in secure sums of exact parts", t.line("alignment.target"), do)


@_reads(*KEYS)
def _nothing_that_the_matrix_refuses(t: Facts) -> Iterator[TreatyError]:
    for row in decide(features(t)):
        if row.verdict == "refuse":
            key = next(key for names in reversed(row.of) for name in names if (key := FEATURES[name].key))
            came = " and ".join(t.line(FEATURES[name].key) for names in row.of for name in names if name in features(t))
            yield problem(key, "a combination that holds", came, f"{row.reason} Instead: {row.instead}")


def _known_names(t: Facts) -> tuple[str, ...] | None:
    """What the silos are called, where the treaty says so."""
    if t.given("silos.names"):
        names: tuple[str, ...] = t["silos.names"]
        return names
    return t["data.keep"] if t["silos.by"] == "domain" and t.given("data.keep") else None


def _secure(t: Facts) -> bool:
    return bool(t["secure.sums"] != "open")


def _least_secret(t: Facts) -> int:
    """The fewest silos whose sum may become known: two of them honest, and three in all."""
    return max(LEAST_SECRET, _part(t["secure.corrupt"], _most_silos(t) or 0) + 2)


def _part(share: float, silos: int) -> int:
    """A share of so many silos, rounded down; 0.29 of a hundred is 29, as it was meant."""
    return math.floor(Fraction(str(share)) * silos)


def _parties(t: Facts) -> int | None:
    """How many silos are asked in a round at most; None where only the data will tell."""
    if t.applies("cohort.size") and t.given("cohort.size"):
        size: int | None = t["cohort.size"]
        return size
    return _most_silos(t)


def _most_silos(t: Facts) -> int | None:
    """How many silos there can be at most; None where only the data will tell."""
    if t.applies("silos.count"):
        count: int | None = t["silos.count"]
        return count
    if t.given("silos.names"):
        return len(t["silos.names"])
    return len(t["data.keep"]) if t["silos.by"] == "domain" and t.given("data.keep") else None
