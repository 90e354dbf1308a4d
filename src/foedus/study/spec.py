"""The study file: which methods, at which points, over which seeds, and what is published beside them.

    [study]        name, title, about, treaty, split, seeds, jobs       [measure]    what is measured, and how finely
    [[method]]     a row of the table: keys of the treaty that it sets  [[curve]]    methods over [[curve.point]]
    [[ablation]]   [[ablation.variant]] of one method                   [published]  rows and curves of a paper

It is as strict as a treaty: an unknown key is a mistake that names the nearest known one. `cells.py` makes runs of it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from .. import wire
from ..errors import TreatyError, one_of
from ..treaty import Mistakes
from ..treaty.mistakes import Problem, shown
from ..treaty.schema import Count, Line, Section, Str
from .metrics import BY_KEY

OURS, RIVAL, REFERENCE = "ours", "rival", "reference"
PHASES = ("federated", "pooled", "local_only", "base")

Key = Annotated[str, Field(max_length=60, pattern=r"^[a-z0-9][a-z0-9._-]*$")]


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _flat(value: Any) -> Any:
    """`{algorithm = {name = "x"}}`, as TOML reads bare dotted keys, is `{"algorithm.name": "x"}`."""
    if not isinstance(value, Mapping):
        return value
    flat: dict[str, Any] = {}
    for key, x in value.items():
        flat |= {f"{key}.{inner}": y for inner, y in x.items()} if isinstance(x, Mapping) else {key: x}
    return flat


def _dotted(value: dict[str, Any]) -> dict[str, Any]:
    odd = [key for key in value if key.count(".") != 1]
    if odd:
        raise ValueError(f'a key of a treaty as "section.key", not "{odd[0]}"')
    return value


def _known(value: tuple[str, ...]) -> tuple[str, ...]:
    for key in value:
        if key not in BY_KEY:
            raise ValueError(f'a figure that is measured, not "{key}". {one_of(key, BY_KEY)}')
    return value


def _each_once(value: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(value)) != len(value):
        raise ValueError("each of them once")
    return value


def _rising(value: tuple[Any, ...]) -> tuple[Any, ...]:
    if any(later.x <= earlier.x for earlier, later in zip(value, value[1:], strict=False)):
        raise ValueError("points whose x rises from each to the next")
    return value


Settings = Annotated[dict[str, Any], BeforeValidator(_flat), AfterValidator(_dotted)]
Texts = Annotated[tuple[Line, ...], BeforeValidator(_tuple), AfterValidator(_each_once)]
Keys = Annotated[tuple[Key, ...], Field(min_length=1), BeforeValidator(_tuple), AfterValidator(_each_once)]
Seeds = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), BeforeValidator(_tuple), AfterValidator(_each_once)
]
Figures = Annotated[
    tuple[str, ...], Field(min_length=1), BeforeValidator(_tuple), AfterValidator(_each_once), AfterValidator(_known)
]
Numbers = Annotated[tuple[float, ...], Field(min_length=2), BeforeValidator(_tuple)]
Number = Annotated[float, BeforeValidator(lambda x: float(x) if type(x) is int else x)]


class Change(Section):
    """What something changes in the base treaty: `set` dotted keys to values, and `unset` takes keys out."""

    set: Settings = Field(default_factory=dict)
    unset: Texts = ()

    def changes(self) -> dict[str, Any]:
        """As `Treaty.replace` takes them."""
        return {**dict.fromkeys(self.unset), **self.set}


class Heading(Change):
    """[study]: which study this is. `treaty`: the base treaty's path, from the study's file; what is set here holds for
    all methods, and theirs win.
    """

    name: Key
    title: Line
    about: Str = ""
    treaty: Line
    split: Literal["validation", "test"] = "validation"
    seeds: Seeds
    jobs: Count = 1


class Measure(Section):
    """[measure]: how finely. `samples`: documents a silo whose features are compared, at most. `public`: the source of
    text that sets the kernel's bandwidths. `far`: the source of the text that shift goes towards; of it the domains
    `far_keep` are taken, where there are any.
    """

    samples: Count = 1000
    permutations: Count = 500
    public: Line = "friends"
    far: Line | None = None
    far_keep: Texts = ()
    seed: Annotated[int, Field(ge=0)] = 0


class Method(Change):
    """[[method]]: a way to train. `phase`: which trajectory of its run counts. `table`: whether it has a row there."""

    key: Key
    title: Line
    role: Literal["ours", "rival", "reference"]
    phase: Literal["federated", "pooled", "local_only", "base"] = "federated"
    table: bool = True
    note: Str = ""


class Point(Change):
    """[[curve.point]]: where on the axis, and what that means for the treaty."""

    label: Line
    x: Number


class Curve(Section):
    """[[curve]]: figures of some methods along an axis. `source`: "shift" takes the points from how the table's cells
    do on text further and further away, and trains nothing. `direction`: where the figures are said to go.
    """

    key: Key
    title: Line
    x: Line
    methods: Keys
    seeds: Seeds | None = None
    figures: Figures = ("perplexity",)
    direction: Literal["rises", "falls", ""] = ""
    source: Literal["cells", "shift"] = "cells"
    log: bool = False
    note: Str = ""
    point: Annotated[tuple[Point, ...], Field(min_length=2), BeforeValidator(_tuple), AfterValidator(_rising)]


class Variant(Change):
    """[[ablation.variant]]: the method with something changed."""

    key: Key
    title: Line
    note: Str = ""


class Ablation(Section):
    """[[ablation]]: a method, whole, beside variants of it."""

    key: Key
    title: Line
    of: Key
    seeds: Seeds | None = None
    figures: Figures = ("perplexity", "accuracy", "mmd")
    variant: Annotated[tuple[Variant, ...], Field(min_length=1), BeforeValidator(_tuple)]


class PublishedRow(Section):
    """[[published.row]]: what a paper reports for a method of this study."""

    method: Key
    perplexity: Number
    accuracy: Number = Field(description="a share, 0 to 1", ge=0, le=1)
    mmd: Number


class PublishedCurve(Section):
    """[[published.curve]]: what a paper reports along an axis of this study."""

    curve: Key
    figure: Key
    x: Numbers
    y: Numbers
    note: Str = ""


class Published(Section):
    """[published]: figures of other data and another model, to compare order and ratios with."""

    source: Line = "the paper"
    note: Str = ""
    row: Annotated[tuple[PublishedRow, ...], BeforeValidator(_tuple)] = ()
    curve: Annotated[tuple[PublishedCurve, ...], BeforeValidator(_tuple)] = ()


class Study(Section):
    """A study file, checked. Make one with `load`."""

    study: Heading
    measure: Measure = Measure()
    method: Annotated[tuple[Method, ...], Field(min_length=1), BeforeValidator(_tuple)]
    curve: Annotated[tuple[Curve, ...], BeforeValidator(_tuple)] = ()
    ablation: Annotated[tuple[Ablation, ...], BeforeValidator(_tuple)] = ()
    published: Published = Published()

    @property
    def name(self) -> str:
        """What the study is called."""
        return self.study.name

    def methods(self) -> dict[str, Method]:
        """Every method by its key, in the file's order."""
        return {method.key: method for method in self.method}

    def digest(self) -> str:
        """SHA-256 of everything in the file but the number of jobs."""
        values = self.model_dump(mode="json")
        values["study"].pop("jobs")
        return wire.digest(wire.canonical(values))


def load(path: str | Path) -> Study:
    """The study in a TOML file. Raises `Mistakes` (a `TreatyError`) with everything that is wrong, and where."""
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        near = [other.name for other in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        raise TreatyError(
            "a study's file", error.strerror or str(error), one_of(path.name, near), where=str(path)
        ) from None
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError are ones
        do = "Write key = value lines under [section] and [[list]] headers; texts in quotes."
        raise TreatyError("TOML", str(error), do, where=str(path)) from None
    return from_dict(raw, str(path))


def from_dict(raw: Mapping[str, Any], where: str = "") -> Study:
    """A study from plain values. Raises as `load` does; `where`: what an error calls the file."""
    try:
        study = Study.model_validate(dict(raw))
    except ValidationError as error:
        raise Mistakes([_mistake(fault, raw, where) for fault in error.errors(include_url=False)]) from None
    if problems := list(_contradictions(study, where)):
        raise Mistakes(problems)
    return study


def _contradictions(study: Study, where: str) -> Iterator[Problem]:
    """Keys that are not unique, or that name nothing."""
    methods, curves = study.methods(), {curve.key for curve in study.curve}
    for kind, things in (("method", study.method), ("curve", study.curve), ("ablation", study.ablation)):
        yield from _unique(kind, [thing.key for thing in things], where)
    for ablation in study.ablation:
        keys = [ablation.of, *(variant.key for variant in ablation.variant)]
        yield from _unique(f"ablation {ablation.key} variant", keys, where)
    named = [(f'[[curve]] "{c.key}": methods', key, methods) for c in study.curve for key in c.methods]
    named += [(f'[[ablation]] "{a.key}": of', a.of, methods) for a in study.ablation]
    named += [("[[published.row]] method", row.method, methods) for row in study.published.row]
    named += [("[[published.curve]] curve", curve.curve, curves) for curve in study.published.curve]
    named += [("[[published.curve]] figure", curve.figure, BY_KEY) for curve in study.published.curve]
    for place, key, known in named:
        if key not in known:
            yield Problem("a key of this study", f'"{key}"', one_of(key, known), _at(where, place))
    for curve in study.published.curve:
        if len(curve.x) != len(curve.y):
            came, do = f"{len(curve.x)} and {len(curve.y)}", "Give both for every point."
            yield Problem("as many x as y", came, do, _at(where, f'[[published.curve]] "{curve.curve}"'))
    if not any(method.role == OURS for method in study.method):
        yield Problem(
            "a method whose role is ours", "none", 'Set role = "ours" for one.', _at(where, "[[method]] role")
        )


def _unique(kind: str, keys: Iterable[str], where: str) -> Iterator[Problem]:
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            yield Problem("each key once", f'"{key}" twice', "Rename one.", _at(where, f"[[{kind}]] key"))
        seen.add(key)


def _mistake(fault: Mapping[str, Any], raw: Mapping[str, Any], where: str) -> Problem:
    *above, name = fault["loc"] or ("",)
    place = _at(where, _place(fault["loc"], raw))
    if fault["type"] == "extra_forbidden":
        return Problem(f"a key that {_section(above)} has", f'"{name}"', one_of(str(name), _fields(above)), place)
    if fault["type"] == "missing":
        return Problem(f"{name}", "none", f"Add {name} under {_section(above)}.", place)
    said = str(fault["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    return Problem(said, shown(fault["input"]), f"Mend {name} under {_section(above)}.", place)


def _place(loc: tuple[str | int, ...], raw: Any) -> str:
    """`("method", 1, "role")` as a reader finds it: `[[method]] "alignment": role`."""
    words: list[str] = []
    for at, step in enumerate(loc):
        raw = _inside(raw, step)
        if isinstance(step, int):
            words[-1] = f"[[{words[-1].strip('[]')}]] {_name_of(raw, step)}"
        else:
            words.append(f"[{step}]" if at == 0 and len(loc) > 1 else step)
    return ": ".join(words)


def _inside(raw: Any, step: str | int) -> Any:
    """What lies there; None for nothing."""
    if isinstance(raw, list) and isinstance(step, int):
        return raw[step]
    return raw.get(step) if isinstance(raw, Mapping) else None


def _name_of(item: Any, at: int) -> str:
    names = [item[key] for key in ("key", "label", "method", "curve") if key in item] if isinstance(item, dict) else []
    return f'"{names[0]}"' if names else f"number {at + 1}"


def _section(above: list[str | int]) -> str:
    names = [str(step) for step in above if isinstance(step, str)]
    return f"[[{'.'.join(names)}]]" if any(isinstance(step, int) for step in above) else f"[{'.'.join(names)}]"


_SECTIONS: dict[tuple[str, ...], type[Section]] = {
    (): Study, ("study",): Heading, ("measure",): Measure, ("method",): Method, ("curve",): Curve,
    ("curve", "point"): Point, ("ablation",): Ablation, ("ablation", "variant"): Variant, ("published",): Published,
    ("published", "row"): PublishedRow, ("published", "curve"): PublishedCurve,
}  # fmt: skip


def _fields(above: list[str | int]) -> list[str]:
    found = _SECTIONS.get(tuple(step for step in above if isinstance(step, str)))
    return list(found.model_fields) if found else []


def _at(where: str, place: str) -> str:
    return ": ".join(word for word in (where, place) if word)
