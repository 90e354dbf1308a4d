"""The charter: what a silo permits, in a file of its own that only its own process reads.

What a charter does not name it does not permit. `refusals` sets a signed treaty beside it, clause by clause, before the
silo signs and again whenever it is asked; `closed` is for the clauses that depend on the clock. `template` is the
charter that a silo begins with.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, tzinfo
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError

from .. import wire
from ..errors import TreatyError, one_of
from .core import Treaty
from .mistakes import Mistakes, Problem, shown
from .schema import MEMORY, Count, Line, Model, Positive, Section, Whole
from .schema import Adapter as TreatyAdapter
from .schema import Algorithm as TreatyAlgorithm
from .signed import Signed

FORMAT = 1
UNITS = ("none", "example", "author", "silo")
"""Whom a guarantee may protect, from nobody to a whole silo: who protects one of these protects all before it."""
DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
ANY = "any"
JOINED = "joined"
_MOST_BYTES = 1_000_000
_DIGITS = re.compile(r"[0-9a-f]{64}")


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _distinct(value: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(value)) != len(value):
        raise ValueError("the same name twice")
    return value


def _key(value: str) -> str:
    if not _DIGITS.fullmatch(value):
        raise ValueError("not a key")
    return value


def _digest_or_any(value: str) -> str:
    if value != ANY and not _DIGITS.fullmatch(value):
        raise ValueError("not a digest")
    return value


def _zone(value: str) -> str:
    try:
        ZoneInfo(value)
    except (OSError, ValueError, KeyError) as error:  # ZoneInfoNotFoundError is a KeyError
        raise ValueError("not a time zone") from error
    return value


def _clock(value: Any) -> Any:
    return time.fromisoformat(value) if isinstance(value, str) and re.fullmatch(r"\d\d:\d\d", value) else value


def _only(*names: str) -> Any:
    """A list of some of these names, each once; [] permits none."""
    kind = Annotated[tuple[Literal[names], ...], BeforeValidator(_tuple), AfterValidator(_distinct)]  # type: ignore[valid-type]
    listed = ", ".join(f'"{name}"' for name in names)
    return Annotated[kind, Field(json_schema_extra={"expected": f"a list, without repetition, of {listed}"})]


def _says(expected: str) -> Any:
    return {"expected": expected}


def _names_in(cls: type[BaseModel], key: str) -> tuple[str, ...]:
    return tuple(cls.model_json_schema()["properties"][key]["enum"])


Lines = Annotated[
    tuple[Line, ...],
    BeforeValidator(_tuple),
    AfterValidator(_distinct),
    Field(json_schema_extra=_says("a list of texts in quotes, without repetition")),
]
Keys = Annotated[tuple[Annotated[str, AfterValidator(_key)], ...], BeforeValidator(_tuple), AfterValidator(_distinct)]
Clock = Annotated[time, BeforeValidator(_clock)]


class General(Section):
    """[charter]"""

    format: Annotated[int, Field(ge=FORMAT, le=FORMAT)] = FORMAT
    expires: date | None = Field(default=None, json_schema_extra=_says("a date such as 2027-12-31, without quotes"))


class Coordinators(Section):
    """[coordinators]"""

    trusted: Literal["joined"] | Keys = Field(
        default="joined", json_schema_extra=_says('"joined", or a list of public keys of 64 hexadecimal digits')
    )


class Adapters(Section):
    """[adapters]"""

    kinds: _only(*_names_in(TreatyAdapter, "kind")) = ()  # type: ignore[valid-type]
    max_rank: Whole = 0


class Training(Section):
    """[training]"""

    tasks: _only(*_names_in(Model, "task")) = ()  # type: ignore[valid-type]
    algorithms: _only(*_names_in(TreatyAlgorithm, "name")) = ()  # type: ignore[valid-type]
    max_rounds: Count
    max_steps: Count
    max_epochs: Whole = 0


class Columns(Section):
    """[data]"""

    columns: Lines = ()
    sources: Lines = ()


class Protection(Section):
    """[privacy]"""

    unit: Literal["none", "example", "author", "silo"]
    epsilon: Positive
    epsilon_for_life: Positive
    delta: Annotated[float, Field(gt=0, lt=1)]
    placements: _only("silo", "shared", "server") = ()  # type: ignore[valid-type]
    simulated_noise: bool = False


class Sums(Section):
    """[secure]"""

    sums: _only("masked", "encrypted", "open") = ()  # type: ignore[valid-type]
    others: Whole
    partners: Literal["any"] | Keys = Field(
        default=ANY, json_schema_extra=_says('"any", or a list of public keys of 64 hexadecimal digits')
    )


class Facts(Section):
    """[disclosure]"""

    loss: bool = False
    holdings: bool = False
    attention: bool = False


class Evaluations(Section):
    """[evaluation]"""

    splits: _only("validation", "test") = ()  # type: ignore[valid-type]
    baselines: _only("base", "local", "pooled") = ()  # type: ignore[valid-type]


class Hours(Section):
    """[hours]"""

    zone: Annotated[Line, AfterValidator(_zone)] = Field(
        json_schema_extra=_says('the name of a time zone, such as "Europe/Berlin" or "UTC"')
    )
    days: _only(*DAYS) = DAYS  # type: ignore[valid-type]
    begin: Clock = Field(time(0), json_schema_extra=_says('a time of day such as "20:00"'))
    end: Clock = Field(time(0), json_schema_extra=_says('a time of day such as "06:00"'))

    def hold(self, now: datetime) -> bool:
        """Whether it is time. A night belongs to the day on which it begins; from a time to itself is all day."""
        here = now.astimezone(ZoneInfo(self.zone))
        at, today = here.time(), DAYS[here.weekday()]
        yesterday = DAYS[here.weekday() - 1]
        if self.begin < self.end:
            return today in self.days and self.begin <= at < self.end
        return (today in self.days and at >= self.begin) or (yesterday in self.days and at < self.end)

    def __str__(self) -> str:
        return f"{', '.join(self.days)} from {self.begin:%H:%M} to {self.end:%H:%M}, {self.zone}"


class Limits(Section):
    """[limits]"""

    max_bytes: Count


class Charter(Section):
    """A charter, checked. Make one with `load` or `parse`. Sections that are left out permit nothing."""

    charter: General = General()
    coordinators: Coordinators = Coordinators()
    models: dict[Line, Annotated[str, AfterValidator(_digest_or_any)]] = Field(default_factory=dict)
    adapters: Adapters = Adapters()
    training: Training
    data: Columns = Columns()
    privacy: Protection
    secure: Sums
    disclosure: Facts = Facts()
    evaluation: Evaluations = Evaluations()
    hours: Hours | None = None
    limits: Limits

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what it says, however it is spelled."""
        return wire.digest(wire.canonical(self.model_dump(mode="json")))

    def trusts(self, coordinator: bytes, joined: bytes) -> bool:
        """Whether this coordinator may ask. `joined`: the one whose invitation the silo took, b"" for none."""
        trusted = self.coordinators.trusted
        return coordinator == joined if trusted == JOINED else coordinator.hex() in trusted


@dataclass(frozen=True)
class Refusal:
    """One clause that says no: what it allows, and what was asked."""

    clause: str
    allows: str
    asked: str

    def __str__(self) -> str:
        return f"{self.clause} allows {self.allows}; asked: {self.asked}"


@dataclass(frozen=True)
class Cost:
    """What a treaty costs one unit at the charter's δ: ε of its own, and over the silo's life, this treaty included."""

    epsilon: float
    for_life: float


# Reading


def load(path: str | Path) -> Charter:
    """The charter in a file (UTF-8 TOML). Raises `Mistakes` (a `TreatyError`) with everything that is wrong."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            blob = file.read(_MOST_BYTES + 1)
        if len(blob) > _MOST_BYTES:
            raise OSError(0, f"more than {_MOST_BYTES:,} bytes")
        text = blob.decode("utf-8-sig")
    except OSError as error:
        do = "Write one with `foedus silo init`, and adapt it."
        raise TreatyError("a charter's file", error.strerror or str(error), do, where=str(path)) from None
    except UnicodeDecodeError as error:
        came = f"a byte at {error.start} that is not"
        raise TreatyError("UTF-8 text", came, "Save it as UTF-8.", where=str(path)) from None
    return parse(text, str(path))


def parse(text: str, where: str = "") -> Charter:
    """The charter in a text. Raises as `load` does; `where`: what an error calls it."""
    try:
        raw = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        do = "Write key = value lines under [section] headers; texts in quotes; each key and section once."
        raise Mistakes([Problem("TOML", str(error), do, "")], where) from None
    try:
        return Charter.model_validate(raw)
    except ValidationError as error:
        faults = {fault["loc"][:2]: fault for fault in error.errors(include_url=False, include_context=False)}
        raise Mistakes([_mistake(loc, fault["type"], raw) for loc, fault in faults.items()], where) from None


def _mistake(loc: tuple[int | str, ...], kind: str, raw: Mapping[str, Any]) -> Problem:
    section, key = str(loc[0]), str(loc[1]) if len(loc) > 1 else ""
    if not key:
        return _wrong_section(section, kind, raw)
    place, table = f"[{section}] {key}", raw[section]
    if section == "models":
        expected = f'the SHA-256 of a base model, 64 hexadecimal digits, or "{ANY}"'
        return Problem(expected, shown(table[key]), f'Write, for example, "{key}" = "{ANY}".', place)
    known = _section(section).model_fields
    if kind == "extra_forbidden":
        homes = " or ".join(f"[{name}]" for name in Charter.model_fields if key in _fields(name))
        do = f"It belongs under {homes}." if homes else one_of(key, known)
        return Problem(f"a key that [{section}] has", f'"{key}"', do, place)
    if kind == "missing":
        return Problem(_expectation(section, key), "nothing", f"Add {_example(section, key)} under [{section}].", place)
    return Problem(_expectation(section, key), shown(table[key]), _advice(section, key, table[key]), place)


def _wrong_section(section: str, kind: str, raw: Mapping[str, Any]) -> Problem:
    if kind == "extra_forbidden":
        return Problem("a section that charters have", f"[{section}]", one_of(section, Charter.model_fields), section)
    if kind == "missing":
        do = f"Add it, with {_example(section, next(iter(_fields(section))))} for a start."
        return Problem(f"a section [{section}]", "none", do, f"[{section}]")
    came = f"{section} = {shown(raw[section])}"
    return Problem(f"a section [{section}] of keys", came, f"Open it with a line [{section}].", f"[{section}]")


def _advice(section: str, key: str, came: Any) -> str:
    known = _choices(section, key)
    odd = [x for x in (came if isinstance(came, list) else [came]) if isinstance(x, str) and x not in known]
    return one_of(odd[0], known) if known and odd else f"Write, for example, {_example(section, key)}."


def _expectation(section: str, key: str) -> str:
    schema = _schema(section, key)
    if "expected" in schema:
        return str(schema["expected"])
    if known := _choices(section, key):
        return "one of " + ", ".join(f'"{name}"' for name in known)
    if schema.get("type") == "boolean":
        return "true or false"
    least = schema.get("minimum", schema.get("exclusiveMinimum"))
    sign = "≥" if "minimum" in schema else ">"
    kind = "an integer" if schema.get("type") == "integer" else "a number"
    return f"{kind} {sign} {least:g}" + (" and < 1" if "exclusiveMaximum" in schema else "")


def _choices(section: str, key: str) -> tuple[str, ...]:
    schema = _schema(section, key)
    return tuple(schema.get("enum") or schema.get("items", {}).get("enum", ()))


def _example(section: str, key: str) -> str:
    """The line of the template."""
    lines = template("", date(2030, 1, 1)).partition(f"[{section}]")[2].splitlines()
    found = next((line for line in lines if re.match(rf"#? ?{key} = ", line)), f"{key} = …")
    return found.removeprefix("# ").partition("#")[0].strip()


def _section(name: str) -> type[BaseModel]:
    kinds = {field: info.annotation for field, info in Charter.model_fields.items()}
    kinds["hours"] = Hours
    found = kinds[name]
    assert isinstance(found, type) and issubclass(found, BaseModel)
    return found


def _fields(name: str) -> Collection[str]:
    return _section(name).model_fields if name != "models" else ()


def _schema(section: str, key: str) -> dict[str, Any]:
    found: dict[str, Any] = _section(section).model_json_schema()["properties"][key]
    return found


# Deciding


def refusals(charter: Charter, signed: Signed, *, joined: bytes, cost: Cost | None, now: datetime) -> list[Refusal]:
    """Every clause of a charter that forbids a treaty; [] when the silo may sign it, and go on with it.

    `joined`: as in `Charter.trusts`. `cost`: None where it could not be computed, which a treaty that protects somebody
    does not survive. The clauses about hours are `closed`'s: a treaty may be signed at any time.
    """
    return [*_parties(charter, signed, joined, now), *_work(charter, signed.treaty), *_privacy(charter, signed, cost)]


def closed(charter: Charter, now: datetime) -> Refusal | None:
    """The clause about time that forbids any work now; None when none does."""
    if (expired := _expired(charter, now)) is not None:
        return expired
    if charter.hours is None or charter.hours.hold(now):
        return None
    here = now.astimezone(ZoneInfo(charter.hours.zone))
    return Refusal("[hours]", f"work on {charter.hours}", f"{DAYS[here.weekday()]} {here:%H:%M}")


def another_model(charter: Charter, name: str, digest: str) -> Refusal | None:
    """The clause that forbids this base model, whose content is known by now; None when none does."""
    allowed = charter.models.get(name)
    if allowed in (ANY, digest):
        return None
    allows = f'"{name}" with the digest {allowed}' if allowed else f'no base model "{name}"'
    return Refusal("[models]", allows, f'"{name}" with the digest {digest}')


def _expired(charter: Charter, now: datetime) -> Refusal | None:
    """The last day counts whole, in the zone of the hours."""
    last = charter.charter.expires
    zone: tzinfo = ZoneInfo(charter.hours.zone) if charter.hours else UTC
    today = now.astimezone(zone).date()
    return Refusal("[charter] expires", f"work until {last}", str(today)) if last and today > last else None


def _parties(charter: Charter, signed: Signed, joined: bytes, now: datetime) -> Iterator[Refusal]:
    if (expired := _expired(charter, now)) is not None:
        yield expired
    if not charter.trusts(signed.coordinator, joined):
        trusted = charter.coordinators.trusted
        allows = "the coordinator whose invitation was taken" if trusted == JOINED else "the keys it lists"
        yield Refusal("[coordinators] trusted", allows, f"the key {signed.coordinator.hex()}")


def _work(charter: Charter, t: Treaty) -> Iterator[Refusal]:
    """What is trained, on what, for how long."""
    if t.model.base not in charter.models:
        yield Refusal("[models]", _listed(charter.models), f'"{t.model.base}"')
    yield from _among("[adapters] kinds", charter.adapters.kinds, [t.adapter.kind])
    if t.adapter.kind == "lora":
        yield from _most("[adapters] max_rank", charter.adapters.max_rank, t.adapter.rank, "rank")
    yield from _among("[training] tasks", charter.training.tasks, [t.model.task])
    yield from _among("[training] algorithms", charter.training.algorithms, [t.algorithm.name])
    yield from _most("[training] max_rounds", charter.training.max_rounds, t.algorithm.rounds, "rounds")
    yield from _most("[training] max_steps", charter.training.max_steps, t.local.steps or 0, "steps a round")
    yield from _most("[training] max_epochs", charter.training.max_epochs, t.local.epochs or 0, "passes a round")
    yield from _among("[data] columns", charter.data.columns, columns_of(t))
    yield from _among("[data] sources", charter.data.sources, sources_of(t))
    for name in ("loss", "holdings", "attention"):
        if _tells(t, name) and not getattr(charter.disclosure, name):
            yield Refusal(f"[disclosure] {name}", "none", "that silos tell it under their names")
    yield from _among("[evaluation] splits", charter.evaluation.splits, _splits(t))
    yield from _among("[evaluation] baselines", charter.evaluation.baselines, t.evaluation.baselines)


def _company(charter: Charter, signed: Signed) -> Iterator[Refusal]:
    """Whether enough others are in every sum: of those that this silo's operator knows, whoever else stays away."""
    s, least = charter.secure, signed.treaty.cohort.minimum - 1
    strangers = 0 if s.partners == ANY else sum(key.hex() not in s.partners for key in signed.roster.values())
    if least - strangers < s.others:
        less = f", less {strangers} that [secure] partners does not name" if strangers else ""
        asked = f"with {max(0, least - strangers)} ([cohort] minimum less one{less})"
        yield Refusal("[secure] others", f"sums with {s.others} others or more", asked)


def _privacy(charter: Charter, signed: Signed, cost: Cost | None) -> Iterator[Refusal]:
    """Who sees what of an update, and what it may tell of whom."""
    t, p, s = signed.treaty, charter.privacy, charter.secure
    yield from _among("[secure] sums", s.sums, [t.secure.sums])
    yield from _company(charter, signed)
    if UNITS.index(t.privacy.unit) < UNITS.index(p.unit):
        allows = f'"{p.unit}" or more ({" < ".join(UNITS)})'
        yield Refusal("[privacy] unit", allows, f'"{t.privacy.unit}"')
    if t.privacy.unit == "none":
        return
    yield from _among("[privacy] placements", p.placements, [t.privacy.placement])
    if t.privacy.placement == "shared" and t.secure.sums == "open" and "server" not in p.placements:
        asked = "shares in the open, where the coordinator sees each update with its share alone"
        yield Refusal("[privacy] placements", "shares of noise in secure sums", asked)
    if t.privacy.randomness == "simulated" and not p.simulated_noise:
        yield Refusal("[privacy] simulated_noise", "noise from the system's own randomness", '"simulated"')
    yield from _costs("[privacy] epsilon", p.epsilon, cost.epsilon if cost else None, p.delta)
    yield from _costs("[privacy] epsilon_for_life", p.epsilon_for_life, cost.for_life if cost else None, p.delta)


def _costs(clause: str, most: float, epsilon: float | None, delta: float) -> Iterator[Refusal]:
    at = f"at δ = {delta:g}"
    if epsilon is None or not epsilon <= most * (1 + 1e-9):
        asked = "one that could not be computed" if epsilon is None else f"{_above(epsilon)} {at}"
        yield Refusal(clause, f"ε of at most {most:g} {at}", asked)


def _above(epsilon: float) -> str:
    """Four digits, and no fewer than there are."""
    return f"{epsilon:.4g}" if epsilon < float("inf") else "without any bound"


def _among(clause: str, allowed: Collection[str], asked: Collection[str]) -> Iterator[Refusal]:
    odd = [name for name in asked if name not in allowed]
    if odd:
        yield Refusal(clause, _listed(allowed), _listed(odd))


def _most(clause: str, most: int, asked: int, what: str) -> Iterator[Refusal]:
    if asked > most:
        yield Refusal(clause, f"at most {most:,} {what}", f"{asked:,}")


def _listed(names: Collection[str]) -> str:
    return ", ".join(f'"{name}"' for name in names) or "none"


def columns_of(t: Treaty) -> list[str]:
    """The columns that are read of a silo's data."""
    d = t.data
    own = [t.silos.by.removeprefix("column:")] if t.silos.by.startswith("column:") else []
    found = [*d.text, *(name for name in (d.target, d.label, d.domain, d.author, d.timestamp) if name), *own]
    return list(dict.fromkeys(found))


def sources_of(t: Treaty) -> list[str]:
    """What is read beside the silo's own data, where the treaty says from where."""
    named = [
        t.data.source, t.data.test_source, t.privacy.public_text, t.alignment.public_text, t.knn.public_text,
    ]  # fmt: skip
    return list(dict.fromkeys(name for name in named if name and name != MEMORY))


def _splits(t: Treaty) -> list[str]:
    """The held-out splits that sums are asked of."""
    held = {"validation": t.split.validation > 0, "test": t.split.test > 0 or t.data.test_source is not None}
    return [split for split, there in held.items() if there]


def _tells(t: Treaty, name: str) -> bool:
    """Whether silos tell a fact; exact class means in the open are holdings, by topic."""
    aligned = t.algorithm.name == "alignment"
    if name == "holdings" and aligned and t.alignment.head == "means":
        return t.disclosure.holdings or (t.privacy.unit == "none" and t.secure.sums == "open")
    return getattr(t.disclosure, name) and (name != "attention" or (aligned and t.alignment.attention != "none"))


# The charter that a silo begins with

_TEMPLATE = """\
# What {silo} permits. Only this silo's own process reads this file; the next message is judged by it as it then is.
# What is not named is not permitted. A treaty that asks for more is refused with the clause that says no, and the
# ledger keeps the attempt: `foedus treaty show FILE` tells before anything is signed.

[charter]
expires = {expires}              # the last day; afterwards nothing is answered

[coordinators]
trusted = "joined"               # whose invitation was taken; or a list of public keys

[models]                         # base models: name = its SHA-256, or "any" for whatever goes by that name
# "smollm2-135m-instruct" = "any"

[adapters]
kinds = ["lora"]                 # "full" would train, and send, every parameter
max_rank = 16

[training]
tasks = ["causal-lm"]            # masked-lm, sequence-classification, seq2seq
algorithms = ["fedavg", "fedprox"]
max_rounds = 100
max_steps = 200                  # optimizer steps a round
max_epochs = 0                   # passes over the data a round, where a treaty counts so

[data]
columns = ["text"]               # of this silo's data; no other is read
sources = []                     # public text that a treaty may read here, by its name in `foedus list datasets`

[privacy]
unit = "example"                 # protect at least: none < example < author < silo
epsilon = 8.0                    # of one treaty, at most
epsilon_for_life = 16.0          # of all treaties ever, at most; what is spent is never given back
delta = 1e-5                     # for both; well below 1 / the number of units
placements = ["silo", "shared"]  # who adds the noise: this silo, all silos in shares; not the coordinator ("server")
simulated_noise = false          # noise from a seed protects nobody

[secure]
sums = ["masked"]                # "open" would show the coordinator every single update; "encrypted" as well, if it
                                 # and the silo with the key (the first by name) are in league
others = 2                       # silos beside this one in every sum, at least
partners = "any"                 # whose keys count as others: a list of the silos' public keys, this one's among them,
                                 # is what keeps a coordinator from bringing silos of its own

[disclosure]                     # what goes out under this silo's name, beside its update
loss = false
holdings = false
attention = false

[evaluation]
splits = ["validation", "test"]  # held-out text that sums may be asked of
baselines = ["base"]             # "local" and "pooled" show more than the federation does

# [hours]                        # left out: at any time
# zone = "Europe/Berlin"
# days = ["mon", "tue", "wed", "thu", "fri"]
# begin = "20:00"
# end = "06:00"                  # of the next day

[limits]
max_bytes = 1_000_000_000        # of one message, either way
"""


def template(silo: str, expires: date) -> str:
    """A strict charter with a comment on every clause; it parses, and permits no base model yet."""
    return _TEMPLATE.format(silo=silo or "this silo", expires=expires)
