"""A charter in words, a clause a line, from its tables as they stand in the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from . import files

Clause = tuple[str, str]

_UNITS = {
    "none": "nobody has to be protected",
    "example": "at least every single example is protected",
    "author": "at least everything that one author wrote is protected",
    "silo": "this whole silo is protected",
}


def charter_words(charter: Mapping[str, Any]) -> list[Clause]:
    """(what it is about, what is permitted); [] where there is no charter that can be read."""
    if not charter:
        return []
    return [(about, said) for about, said in _all(charter) if said]


def _all(c: Mapping[str, Any]) -> Iterator[Clause]:
    part = {name: files.part(c, name) for name in _SECTIONS}
    yield "Expires", str(part["charter"].get("expires") or "never")
    yield "Coordinator", _trusted(part["coordinators"].get("trusted", "joined"))
    yield "Base models", "; ".join(_model(name, digest) for name, digest in part["models"].items()) or "none"
    yield "Adapters", _adapters(part["adapters"])
    yield "Tasks", _listed(part["training"].get("tasks"))
    yield "Algorithms", _listed(part["training"].get("algorithms"))
    yield "Work", _work(part["training"])
    yield "Columns", _listed(part["data"].get("columns"))
    yield "Other text", _listed(part["data"].get("sources"))
    yield "Protection", _protection(part["privacy"])
    yield "Budget", _budget(part["privacy"])
    yield "Sums", _sums(part["secure"])
    yield "Under its own name", _listed([name for name, told in part["disclosure"].items() if told is True])
    yield "Evaluation", _listed([*part["evaluation"].get("splits", ()), *part["evaluation"].get("baselines", ())])
    yield "Hours", _hours(part["hours"])
    yield "A message", f"of at most {part['limits'].get('max_bytes'):,} bytes" if part["limits"] else ""


_SECTIONS = ("charter", "coordinators", "models", "adapters", "training", "data", "privacy", "secure", "disclosure",
             "evaluation", "hours", "limits")  # fmt: skip


def _trusted(who: Any) -> str:
    if who == "joined":
        return "the one whose invitation was taken"
    return f"one of {len(who)} keys that the charter lists" if isinstance(who, list) and who else "none"


def _model(name: str, digest: Any) -> str:
    return f"{name}, whatever its content" if digest == "any" else f"{name} ({str(digest)[:12]}…)"


def _adapters(a: Mapping[str, Any]) -> str:
    most = f", of rank {a['max_rank']} at most" if "lora" in a.get("kinds", ()) and a.get("max_rank") else ""
    return _listed(a.get("kinds")) + most


def _work(t: Mapping[str, Any]) -> str:
    most = [(t.get("max_rounds"), "rounds"), (t.get("max_steps"), "steps a round"), (t.get("max_epochs"), "passes")]
    said = [f"{count:,} {what}" for count, what in most if isinstance(count, int) and count]
    return f"at most {', '.join(said)}" if said else ""


def _protection(p: Mapping[str, Any]) -> str:
    where = _listed(p.get("placements"))
    return f"{_UNITS.get(str(p.get('unit')), p.get('unit', ''))}; noise added by: {where}" if p else ""


def _budget(p: Mapping[str, Any]) -> str:
    if "epsilon" not in p:
        return ""
    life, delta = p.get("epsilon_for_life", 0), p.get("delta", 0)
    return f"ε of at most {p['epsilon']:g} a treaty and {life:g} for life, at δ = {delta:g}"


def _sums(s: Mapping[str, Any]) -> str:
    named = s.get("partners", "any")
    known = f", of {len(named)} that it knows by their keys" if isinstance(named, list) else ""
    return f"{_listed(s.get('sums'))}; with {s.get('others', 0)} other silos at least{known}" if s else ""


def _hours(h: Mapping[str, Any]) -> str:
    if not h:
        return "at any time"
    return f"{h.get('begin', '00:00')}–{h.get('end', '24:00')} {h.get('zone', '')}, {_listed(h.get('days')) or 'daily'}"


def _listed(names: Any) -> str:
    return ", ".join(map(str, names)) if names else "none"
