"""Mistakes in a treaty, each in three parts: pydantic finds them, and here they are said so that one can mend them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

from pydantic import ValidationError

from ..errors import TreatyError, one_of
from . import text
from .combinations import advice
from .schema import MOST, SECTIONS

_KINDS = {str: "text", bool: "boolean", int: "integer", float: "float", list: "list", tuple: "list", dict: "table"}
_NO_SECTION = {
    "charter": "What a silo permits stands in its own charter.toml, never in a treaty. Remove the section.",
}


class Mistakes(TreatyError):
    """One treaty's mistakes. `problems`: each by itself, its `where` as "[section] key".

    With one mistake the three parts are its own; with several the advice lists them all.
    """

    def __init__(self, problems: Iterable[TreatyError], file: str = "") -> None:
        self.problems, self.file = tuple(problems), file
        if len(self.problems) == 1:
            (one,) = self.problems
            where = ": ".join(word for word in (file, one.where) if word)
            super().__init__(one.expected, one.came, one.do, where=where)
        else:
            listed = "\n".join(f"  {i}. {problem}" for i, problem in enumerate(self.problems, 1))
            advice = f"Mend each of them:\n{listed}"
            super().__init__("a sound treaty", f"one with {len(self.problems)} mistakes", advice, where=file)

    def __reduce__(self) -> tuple[Any, ...]:
        return Mistakes, (self.problems, self.file)


class Problem(TreatyError):
    """One mistake; `where` is "[section] key", "[section]", or a line."""

    def __init__(self, expected: str, came: str, do: str, where: str) -> None:
        super().__init__(expected, came, do, where=where)


def problem(key: str, expected: str, came: str, do: str) -> TreatyError:
    """The mistake at a dotted key: `problem("local.lr", "a number > 0", "-1", "Write lr = 0.001.")`."""
    return Problem(expected, came, do, place(key))


def place(key: str) -> str:
    """`"local.lr"` as a reader finds it: `"[local] lr"`; a section alone in its brackets."""
    section, _, name = key.partition(".")
    return f"[{section}] {name}".rstrip()


def shown(x: Any) -> str:
    """A value as the treaty spells it, with its kind: `"8" (text)`. Long ones are cut."""
    kind = _KINDS.get(type(x), type(x).__name__)
    try:
        spelled = "{...}" if isinstance(x, Mapping) else text.value(x)
    except ValueError:  # Python spells no integer of more than 4,300 digits
        spelled = "one of thousands of digits"
    return f"{spelled if len(spelled) <= 60 else spelled[:57] + '...'} ({kind})"


def setting(key: str) -> str:
    """A good line for a dotted key: its example, or its default."""
    section, _, name = key.partition(".")
    field = SECTIONS[section].model_fields[name]
    good = field.examples[0] if field.examples else field.default
    return f"{name} = {text.value(good[0] if isinstance(good, tuple) and len(good) == 1 else good)}"


def unknown_section(name: str, came: Any) -> TreatyError:
    """A section, or a key outside any, that treaties do not have."""
    if name in _NO_SECTION:
        return Problem("only sections that this version honours", f"[{name}]", _NO_SECTION[name], f"[{name}]")
    if isinstance(came, Mapping):
        do = _of_the_matrix(name, came) or one_of(name, SECTIONS)
        return Problem("a section that treaties have", f"[{name}]", do, f"[{name}]")
    homes = _homes(name)
    do = f"Move it under {homes}." if homes else f"Remove it, or name its section. {one_of(name, SECTIONS)}"
    return Problem("every key inside a section", f"{name} = {shown(came)} outside any", do, name)


def of_section(section: str, table: Any, error: ValidationError, written: bool) -> Iterator[tuple[str, TreatyError]]:
    """The mistakes in one section by dotted key; a union repeats its own. `written`: whether the section is there."""
    for fault in error.errors(include_url=False, include_context=False):
        name = str(fault["loc"][0]) if fault["loc"] else ""
        key = f"{section}.{name}" if fault["loc"] else section
        if not fault["loc"]:
            came = f"{section} = {shown(table)}"
            yield key, problem(key, f"a section [{section}] of keys", came, f"Open it with a line [{section}].")
        elif fault["type"] == "extra_forbidden":
            yield key, _unknown_key(section, name, table[name])
        elif fault["type"] == "missing":
            came = "nothing" if written else f"no section [{section}]"
            do = f"Add {setting(key)} (for example) under [{section}]."
            yield key, problem(key, expectation(key), came, do)
        else:
            yield key, problem(key, expectation(key), shown(table[name]), _advice(key, table[name]))


@cache
def expectation(key: str) -> str:
    """What a dotted key wants, in words: "an integer ≥ 1"."""
    schema = _schema(key)
    if "expected" in schema:
        return str(schema["expected"])
    if "enum" in schema:
        return "one of " + ", ".join(map(text.value, schema["enum"]))
    kind = {"integer": "an integer", "number": "a number", "boolean": "true or false"}.get(schema["type"])
    return f"{kind} {_range(schema)}".rstrip() if kind else "a text in quotes, on one line"


def _advice(key: str, came: Any) -> str:
    schema = _schema(key)
    known = [x for x in schema.get("enum") or schema.get("known") or () if isinstance(x, str)]
    if isinstance(came, list | tuple) and known:
        odd = next((x for x in came if x not in known), None)
        return "Name each once." if odd is None else one_of(str(odd), known)
    if isinstance(came, str) and known:
        return _of_the_matrix(came) or one_of(came, known)
    name = key.partition(".")[2]
    if isinstance(came, str) and schema.get("type") in ("integer", "number", "boolean"):
        return f"Write it without quotes, for example {setting(key)}."
    return f"Write, for example, {setting(key)}{_or_leave_out(key, name)}."


def _of_the_matrix(*came: Any) -> str:
    """Why treaties do not have what was written, where it is a feature that the validity matrix knows; else ""."""
    return next((said for x in came for word in _texts(x) if (said := advice(word))), "")


def _texts(x: Any) -> Iterator[str]:
    if isinstance(x, str):
        yield x
    elif isinstance(x, Mapping | list | tuple):
        for inner in (*x, *x.values()) if isinstance(x, Mapping) else x:
            yield from _texts(inner)


def _or_leave_out(key: str, name: str) -> str:
    return "" if SECTIONS[key.partition(".")[0]].model_fields[name].is_required() else ", or leave it out"


def _unknown_key(section: str, name: str, came: Any) -> TreatyError:
    homes = _homes(name)
    known = SECTIONS[section].model_fields
    do = f"It belongs under {homes}." if homes else _of_the_matrix(name, came) or one_of(name, known)
    return problem(f"{section}.{name}", f"a key that [{section}] has", f'"{name}"', do)


def _homes(name: str) -> str:
    return " or ".join(f"[{section}]" for section, cls in SECTIONS.items() if name in cls.model_fields)


def _range(schema: Mapping[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and low == high:
        return str(low)
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[name]:g}" for name, sign in signs.items() if name in schema and schema[name] != MOST]
    return " and ".join(bounds)


@cache
def _schema(key: str) -> dict[str, Any]:
    section, _, name = key.partition(".")
    schema: dict[str, Any] = SECTIONS[section].model_json_schema()["properties"][name]
    return schema | schema["anyOf"][0] if "anyOf" in schema else schema
