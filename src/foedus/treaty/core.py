"""`Treaty`: the sections together, checked; its canonical form and its digest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .. import wire
from ..errors import TreatyError
from . import mistakes, schema, text
from .features import features
from .mistakes import Mistakes
from .rules import LOCAL_UNITS, Facts, contradictions
from .schema import GIVEN, LEAST_SECRET, MEMORY, SECTIONS, Section

Tables = dict[str, dict[str, Any]]

_SAFE = (("disclosure", "loss", False), ("disclosure", "holdings", False), ("server", "weighting", "uniform"))
_HIDDEN = (("disclosure", "holdings", False), ("cohort", "minimum", LEAST_SECRET))
_IN_SILOS = (("privacy", "placement", "silo"),)
_WEIGHTLESS = (("disclosure", "attention", False),)


@dataclass(frozen=True)
class Treaty:
    """A treaty: one frozen value per section. Make one with `load`, `parse` or `from_dict`.

    It compares, hashes and pickles by its sections. `folder`: where its file lies, against which a relative
    `data.source` is read; no part of equality or digest. Raises `Mistakes` if the sections contradict one another.
    """

    treaty: schema.Heading
    model: schema.Model
    adapter: schema.Adapter
    data: schema.Data
    silos: schema.Silos
    split: schema.Split
    algorithm: schema.Algorithm
    topics: schema.Topics
    alignment: schema.Alignment
    scaffold: schema.Scaffold
    reversal: schema.Reversal
    udalm: schema.Udalm
    knn: schema.Knn
    fedlap: schema.Fedlap
    local: schema.Local
    server: schema.Server
    cohort: schema.Cohort
    evaluation: schema.Evaluation
    disclosure: schema.Disclosure
    privacy: schema.Privacy
    secure: schema.Secure
    performance: schema.Performance
    folder: Path | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        problems = contradictions(self._sections())
        if problems:
            raise Mistakes(problems)

    @property
    def name(self) -> str:
        """What the run is called."""
        return self.treaty.name

    @property
    def seed(self) -> int:
        """Of every draw that the treaty fixes."""
        return self.treaty.seed

    @property
    def headed(self) -> bool:
        """Whether the model has a topic head."""
        return self.topics.weight > 0 or (self.algorithm.name == "alignment" and self.alignment.head == "means")

    @property
    def marginal(self) -> bool:
        """Whether each token's logit has a bias."""
        return self.algorithm.name == "alignment" and self.alignment.tokens > 0

    def tables(self) -> Tables:
        """Every key that applies and has a value, defaults included: plain TOML values by section and key."""
        facts = Facts(self._sections())
        tables = {
            section: {
                key: _plain(key, facts[f"{section}.{key}"])
                for key in cls.model_fields
                if facts.applies(f"{section}.{key}") and facts.has(f"{section}.{key}")
            }
            for section, cls in SECTIONS.items()
        }
        return {section: table for section, table in tables.items() if table}

    def resolved(self) -> str:
        """The complete treaty as TOML, every default written out and commented; parses back to an equal treaty."""
        head = f"Resolved by foedus, every default written out.\n# SHA-256 without [performance]: {self.digest()}"
        return text.document(self.tables(), head)

    def digest(self) -> str:
        """SHA-256 of the canonical JSON of `tables()` without [performance]: what the parties agree on.

        Two spellings of one treaty have one digest; a change to any other value that applies changes it.
        """
        return wire.digest(wire.canonical({k: v for k, v in self.tables().items() if k != "performance"}))

    def replace(self, **changes: Any) -> Treaty:
        """This treaty with some dotted keys, or whole sections, changed: `replace(**{"algorithm.rounds": 3})`.

        None takes a key out. A key that applied before and no longer does (mu, once the name is fedavg) goes too,
        unless it is among the changes. Raises as `from_dict` does.
        """
        tables: Tables = self.tables()
        for dotted, new in changes.items():
            section, dot, key = dotted.partition(".")
            if dot:
                tables.setdefault(section, {})[key] = new
            else:
                tables[section] = new
        return from_dict(_without_outdated(tables, changes), folder=self.folder)

    def features(self) -> frozenset[str]:
        """What it asks for, in the words of the validity matrix (`combinations.py`)."""
        return features(Facts(self._sections()))

    def _sections(self) -> dict[str, Section]:
        return {name: getattr(self, name) for name in SECTIONS}


def from_dict(tables: Mapping[str, Any], where: str = "", *, folder: Path | None = None) -> Treaty:
    """A treaty from plain values by section and key, as TOML would give them; None counts as not written.

    `where`: what an error calls this treaty. Without [data] the silos are handed over in Python. Raises `Mistakes`
    (a `TreatyError`) with everything that is wrong.
    """
    raw = {str(name): _table(value) for name, value in tables.items()}
    sections, problems, broken = _validate(_with_consequences(raw))
    problems += contradictions(sections, broken)
    if problems:
        raise Mistakes(problems, where)
    return Treaty(**sections, folder=folder)  # type: ignore[arg-type]


def _validate(raw: Mapping[str, Any]) -> tuple[dict[str, Section], list[TreatyError], frozenset[str]]:
    """The sections, their mistakes, and the dotted keys that have one; examples stand in for those keys."""
    problems = [mistakes.unknown_section(name, raw[name]) for name in raw if name not in SECTIONS]
    sections: dict[str, Section] = {}
    broken: dict[str, TreatyError] = {}
    for name, cls in SECTIONS.items():
        table = raw.get(name, {})
        try:
            sections[name] = cls.model_validate(table)
        except ValidationError as error:
            found = dict(mistakes.of_section(name, table, error, name in raw))
            sections[name] = _mended(cls, table, {key.partition(".")[2] for key in found})
            broken |= found
    return sections, problems + list(broken.values()), frozenset(broken)


def _mended(cls: type[Section], table: Any, wrong: set[str]) -> Section:
    sound = {key: x for key, x in table.items() if key not in wrong} if isinstance(table, dict) else {}
    examples = {key: f.examples[0] for key, f in cls.model_fields.items() if f.is_required() and f.examples}
    return cls.model_validate(examples | sound)


def _with_consequences(raw: dict[str, Any]) -> dict[str, Any]:
    """Defaults that follow from other keys: data in memory are given by silo; a test source leaves no test share; where
    somebody is protected, silos let out neither losses nor counts unless the treaty says so, nor what they weigh where
    that is a whole silo, and noise for units inside silos is added there; a secure sum is of three silos at least, and
    no silo's counts stand beside it."""
    raw.setdefault("data", {"source": MEMORY})
    data = raw["data"] if isinstance(raw["data"], dict) else {}
    if data.get("source") == MEMORY:
        _default(raw, ("silos", "by", GIVEN))
    if "test_source" in data:
        _default(raw, ("split", "test", 0.0))
    unit, sums = (_word(raw, *key) for key in (("privacy", "unit", "none"), ("secure", "sums", "open")))
    _default(raw, *(_SAFE if unit != "none" else ()), *(_IN_SILOS if unit in LOCAL_UNITS else ()))
    _default(raw, *(_HIDDEN if sums != "open" else ()))
    name, phi = (_word(raw, *key) for key in (("algorithm", "name", ""), ("alignment", "attention", "none")))
    _default(raw, *(_WEIGHTLESS if unit == "silo" and name == "alignment" and phi != "none" else ()))
    return raw


def _word(raw: dict[str, Any], section: str, key: str, default: str) -> Any:
    table = raw.get(section)
    return table.get(key, default) if isinstance(table, dict) else default


def _default(raw: dict[str, Any], *values: tuple[str, str, Any]) -> None:
    for section, key, value in values:
        if isinstance(raw.setdefault(section, {}), dict):
            raw[section].setdefault(key, value)


def _without_outdated(tables: Tables, changes: Mapping[str, Any]) -> Tables:
    sections, _, broken = _validate({name: _table(table) for name, table in tables.items()})
    facts = Facts(sections)

    def outdated(section: str, key: str) -> bool:
        dotted = f"{section}.{key}"
        return dotted not in changes and dotted not in broken and not facts.applies(dotted)

    kept = {name for name in tables if name in changes or name not in SECTIONS}
    return {
        name: table if name in kept else {key: x for key, x in table.items() if not outdated(name, key)}
        for name, table in tables.items()
    }


def _table(value: Any) -> Any:
    if isinstance(value, Section):
        value = value.model_dump(exclude_unset=True)
    return {str(k): x for k, x in value.items() if x is not None} if isinstance(value, Mapping) else value


def _plain(key: str, value: Any) -> Any:
    if key in ("text", "targets") and len(value) == 1:
        return value[0]
    return [_plain("", x) for x in value] if isinstance(value, tuple) else value
