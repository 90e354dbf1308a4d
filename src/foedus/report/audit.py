"""The page of an audit: what attacks on a run achieved, next to what the run states. One HTML page, like the report.

`write_audit` reads `audit.json` in the run's folder and nothing else. One JSON object; every section but `format` may
be missing, and the page then says that it was not measured; a figure that is not finite is null.

    format          1
    run             name, model, adapter, silos, rounds, seed
    seconds         time the audit took;  simulated_noise: true where the run's noise was seeded
    stated          epsilon (null: no guarantee), delta, unit, neighbours, statement, adversary, rdp
    membership      members, nonmembers, target, drawn, confidence,
                    attacks: name, note, auc: interval, tpr: {"0.001": interval, "0.01": interval},
                    curve: [[fpr, tpr], …], ascending
                    allowed: tpr, curve; worked out from epsilon and delta where it is missing
    canaries        count, inserted, kinds, confidence,
                    exposure: kind, canaries, mean, max, most_possible, baseline (bits)
                    extraction: kind, tried, exact, tokens, prefix, examples: prompt, truth, recovered, source
                    bounds: canaries, method, source, epsilon, estimate, ceiling, count, confidence, delta
    inversion       model, sentence, tokens,
                    rows: attack, sent, batch, defence, exact, tokens, rouge1, rouge2, rougeL, seconds, note
                    examples: attack, sent, defence, batch, truth: […], recovered: […], source
    extraction      as in canaries: probes by prompting, outside the canaries
    checks          name, passed, p, detail
    reconstruction  form, source, bounds: prior, bound

An interval is {value, low, high}. The `source` of an example is "canary" or "example"; anything else is refused, so
that no silo's text comes to a page. The verdict is worked out here, never read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError
from markupsafe import Markup

from ..errors import RunError
from . import audit_plots as plots
from .folder import write_page
from .svg import picture
from .words import printable, seconds_text, thousands

TEMPLATES = Path(__file__).parent / "templates"
SHOWN = ("canary", "example")  # whose text may be shown
FPRS = ("0.001", "0.01")
TITLES = {
    "loss": "Loss",
    "reference": "Loss against the base model's",
    "min-k%++": "Min-K%++",
    "zlib": "Loss against compressed size (zlib)",
    "lira": "LiRA with shadow adapters, offline",
}

Audit = Mapping[str, Any]


def write_audit(folder: Path) -> Path:
    """Writes `audit.html` beside `audit.json`, whole or not at all, and returns its path.

    Raises `RunError` when `audit.json` is missing, damaged, of another format, or holds text that is no example.
    """
    place = Path(folder) / "audit.html"
    page = _rendered(read_audit(Path(folder)), str(place.with_name("audit.json")))
    return write_page(place, page, "Make room or mend the permissions, and run the audit again.")


def read_audit(folder: Path) -> Audit:
    """The audit of a run's folder, checked; see the top of this file."""
    place = Path(folder) / "audit.json"
    if not place.is_file():
        raise RunError("an audit, audit.json", "none", "Make one with `foedus audit`.", where=str(folder))
    try:
        audit = json.loads(place.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged("text that is not JSON", str(place)) from error
    if not isinstance(audit, dict) or audit.get("format") != 1:
        raise _damaged("a JSON value that is not an audit of format 1", str(place))
    _only_examples(audit, str(place))
    return audit


def render(audit: Audit) -> str:
    """The page, as text."""
    _only_examples(audit, "audit")
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=StrictUndefined, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {
        "share": share, "plain": plain, "seconds": lambda x: seconds_text(x) if _finite(x) else "–", "count": thousands,
        "printable": printable,
    }  # fmt: skip
    environment.globals |= {
        "plain": plain,
        "share": share,
        "include_raw": lambda name: Markup((TEMPLATES / name).read_text(encoding="utf-8")),
    }
    return environment.get_template("audit.html.j2").render(_page(audit))


def _rendered(audit: Audit, where: str) -> str:
    try:
        return render(audit)
    except (KeyError, TypeError, ValueError, AttributeError, UndefinedError) as error:
        raise _damaged(f"one whose parts do not fit ({type(error).__name__}: {error})", where) from error


# ---- what the figures say ----


def verdict(audit: Audit) -> tuple[str, str]:
    """(one of "violated", "no guarantee", "not tested", "consistent", and what that means in a sentence or two)."""
    against = findings(audit)
    if against:
        return "violated", f"This run leaks more than it states. {' '.join(against)}"
    epsilon = _section(audit, "stated").get("epsilon")
    if epsilon is None:
        return (
            "no guarantee",
            "This run states no guarantee. What follows is what some attacks found; others find more.",
        )
    if not (_bounds(audit) or audit.get("checks") or _attacks(audit)):
        return "not tested", f"This run states ε = {plain(epsilon)}, and nothing here has tested it."
    said = f"Nothing that was tried contradicts the stated ε = {plain(epsilon)}."
    return "consistent", f"{said} An audit can find a fault; it cannot prove that there is none."


def findings(audit: Audit) -> list[str]:
    """What contradicts the stated guarantee, a sentence each: failed checks, lower bounds above ε, and attacks that do
    better, with their whole interval, than (ε, δ) allows."""
    epsilon = _section(audit, "stated").get("epsilon")
    found = [f"A check failed: {check['name']}." for check in audit.get("checks") or () if not check["passed"]]
    for bound in _bounds(audit) if _finite(epsilon) else ():
        if not bound.get("estimate") and _finite(bound.get("epsilon")) and bound["epsilon"] > epsilon:
            said = f"{bound['method']} on {bound['canaries']} canaries bounds ε from below by {plain(bound['epsilon'])}"
            found.append(f"{said}, and {plain(epsilon)} is stated.")
    allowed = allowed_tpr(audit)
    for attack in _attacks(audit):
        for fpr, most in allowed.items():
            low = (attack.get("tpr", {}).get(fpr) or {}).get("low")
            if _finite(low) and low > most:
                said = f"{_title(attack)} finds at least {share(low)} of members at {share(float(fpr))} false alarms"
                found.append(f"{said}, and {share(most)} is the most that the stated ε allows.")
    return found


def allowed_tpr(audit: Audit) -> dict[str, float]:
    """The most of all members that any attack may find at each false-positive rate, {} without a guarantee."""
    given = (_section(audit, "membership").get("allowed") or {}).get("tpr")
    stated = _section(audit, "stated")
    if given:
        return {fpr: float(most) for fpr, most in given.items()}
    if not _finite(stated.get("epsilon")):
        return {}
    return {fpr: most_found(float(fpr), stated["epsilon"], stated.get("delta") or 0.0) for fpr in FPRS}


def most_found(fpr: float, epsilon: float, delta: float) -> float:
    """The highest true-positive rate that (ε, δ) leaves at a false-positive rate (Kairouz, Oh and Viswanath 2015).

    >>> round(most_found(0.01, 1.0, 0.0), 4), most_found(0.5, 50.0, 1e-5)
    (0.0272, 1.0)
    """
    near = math.exp(min(epsilon, 700.0)) * fpr + delta
    far = 1.0 - math.exp(-epsilon) * (1.0 - delta - fpr)
    return min(1.0, near, far)


def share(value: Any) -> str:
    """A share in percent, with the digits that small ones need; a dash where there is none.

    >>> share(0.5), share(0.001), share(1), share(None)
    ('50\\xa0%', '0.1\\xa0%', '100\\xa0%', '–')
    """
    return f"{100 * value:.3g}\u00a0%" if _finite(value) else "–"


def plain(value: Any) -> str:
    """A figure with three digits; a dash where there is none."""
    return f"{value:.3g}" if _finite(value) else "–"


# ---- the page ----


def _page(audit: Audit) -> dict[str, Any]:
    """Everything the template needs, already worked out."""
    kind, said = verdict(audit)
    return {
        "name": str(_section(audit, "run").get("name") or "unnamed run"),
        "about": _about(audit),
        "kind": kind,
        "verdict": said,
        "stated": _stated(audit),
        "simulated": bool(audit.get("simulated_noise")),
        "tiles": _tiles(audit),
        "membership": _membership(audit),
        "canaries": _canaries(audit),
        "inversion": _inversion(audit),
        "extraction": audit.get("extraction") or [],
        "checks": audit.get("checks") or [],
        "reconstruction": _reconstruction(audit),
        "seconds": audit.get("seconds"),
        "fprs": FPRS,
    }


def _about(audit: Audit) -> list[str]:
    run = _section(audit, "run")
    words = [f"{run[key]} {key}" for key in ("silos", "rounds") if run.get(key)]
    return [*words, *(str(run[key]) for key in ("model", "adapter") if run.get(key))]


def _stated(audit: Audit) -> dict[str, Any]:
    stated = _section(audit, "stated")
    keys = ("epsilon", "delta", "unit", "neighbours", "adversary", "rdp", "statement")
    return {key: stated.get(key) for key in keys}


def _tiles(audit: Audit) -> list[dict[str, Any]]:
    """The figures at the top: what is stated, and the worst that was found, each with its exact value."""
    return [_stated_tile(audit), _bound_tile(audit), _members_tile(audit), _checks_tile(audit)]


def _stated_tile(audit: Audit) -> dict[str, Any]:
    stated = _section(audit, "stated")
    if not _finite(epsilon := stated.get("epsilon")):
        return _tile("Stated ε", None, "none", "no guarantee")
    return _tile("Stated ε", epsilon, plain(epsilon), f"δ = {plain(stated.get('delta'))}, unit: {stated.get('unit')}")


def _bound_tile(audit: Audit) -> dict[str, Any]:
    bounds = [bound for bound in _bounds(audit) if not bound.get("estimate") and _finite(bound.get("epsilon"))]
    if not bounds:
        return _tile("Found: ε at least", None, "–", "not measured")
    best = max(bounds, key=lambda bound: bound["epsilon"])
    note = f"{best['method']}, {best['canaries']} canaries"
    return _tile("Found: ε at least", best["epsilon"], plain(best["epsilon"]), note)


def _members_tile(audit: Audit) -> dict[str, Any]:
    found = [(_tpr(attack, "0.01").get("value"), _title(attack)) for attack in _attacks(audit)]
    found = [pair for pair in found if _finite(pair[0])]
    if not found:
        return _tile("Members found", None, "–", "not measured")
    most, title = max(found)
    return _tile("Members found", most, share(most), f"at 1 % false alarms: {title}")


def _checks_tile(audit: Audit) -> dict[str, Any]:
    checks = audit.get("checks") or []
    if not checks:
        return _tile("Checks passed", None, "–", "not measured")
    passed = sum(bool(check["passed"]) for check in checks)
    return _tile("Checks passed", passed, f"{passed} of {len(checks)}", "of the mechanism as it ran")


def _tile(title: str, value: Any, text: str, note: str) -> dict[str, Any]:
    return {"title": title, "value": value, "text": text, "note": note}


def _membership(audit: Audit) -> dict[str, Any] | None:
    attacks = _attacks(audit)
    if not attacks:
        return None
    section, stated = _section(audit, "membership"), _section(audit, "stated")
    curves = {_title(attack): attack["curve"] for attack in attacks if attack.get("curve")}
    bound = (section.get("allowed") or {}).get("curve") or _allowed_curve(stated)
    alt = "Members found against false alarms, for each attack: " + "; ".join(
        f"{_title(attack)} AUC {plain((attack.get('auc') or {}).get('value'))}" for attack in attacks
    )
    return {
        "plot": picture("roc", f"{alt}.", lambda narrow: plots.curves(curves, bound, narrow)) if curves else None,
        "rows": [{"title": _title(a), "auc": a.get("auc"), "tpr": {f: _tpr(a, f) for f in FPRS}, "note": a.get("note")}
                 for a in attacks],
        "allowed": allowed_tpr(audit),
        "members": section.get("members"),
        "nonmembers": section.get("nonmembers"),
        "drawn": section.get("drawn"),
        "target": section.get("target"),
        "confidence": section.get("confidence", 0.95),
    }  # fmt: skip


def _allowed_curve(stated: Mapping[str, Any]) -> Sequence[Sequence[float]]:
    if not _finite(stated.get("epsilon")):
        return []
    fprs = [10 ** (-4 + 4 * i / 80) for i in range(81)]
    return [[fpr, most_found(fpr, stated["epsilon"], stated.get("delta") or 0.0)] for fpr in fprs]


def _canaries(audit: Audit) -> dict[str, Any] | None:
    section = _section(audit, "canaries")
    if not section:
        return None
    epsilon = _section(audit, "stated").get("epsilon")
    bounds = _bounds(audit)
    shown = [bound for bound in bounds if _finite(bound.get("epsilon"))]
    alt = "Lower bounds on epsilon: " + "; ".join(f"{_of(bound)} {plain(bound['epsilon'])}" for bound in shown)
    rows = [(_of(bound), bound["epsilon"], bound.get("ceiling"), bool(bound.get("estimate"))) for bound in shown]
    return {
        "count": section.get("count"),
        "inserted": section.get("inserted"),
        "exposure": section.get("exposure") or [],
        "extraction": section.get("extraction") or [],
        "bounds": bounds,
        "plot": picture("bounds", f"{alt}.", lambda narrow: plots.bounds(rows, epsilon, narrow)) if rows else None,
    }


def _of(bound: Mapping[str, Any]) -> str:
    return f"{bound['method']}, {bound['canaries']}"


def _inversion(audit: Audit) -> dict[str, Any] | None:
    section = _section(audit, "inversion")
    rows = section.get("rows") or []
    if not rows:
        return None
    series = _by_batch(rows)
    alt = f"Share of tokens recovered by batch size, for {len(series)} attacks and defences. The table has them all."
    return {
        "model": section.get("model"),
        "sentence": section.get("sentence"),
        "rows": rows,
        "examples": section.get("examples") or [],
        "plot": picture("inversion", alt, lambda narrow: plots.recovery(series, narrow)) if series else None,
    }


def _by_batch(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """For each attack and defence that was tried at more than one batch size, (batch, share of tokens) ascending."""
    series: dict[str, dict[int, float]] = {}
    for row in rows:
        if _finite(row.get("tokens")):
            name = (
                f"{row['attack']}, {row['sent']}: {row['defence']}"
                if row.get("sent")
                else f"{row['attack']}: {row['defence']}"
            )
            series.setdefault(name, {})[int(row["batch"])] = float(row["tokens"])
    return {name: sorted(points.items()) for name, points in series.items() if len(points) > 1}


def _reconstruction(audit: Audit) -> dict[str, Any] | None:
    section = _section(audit, "reconstruction")
    return {key: section.get(key) for key in ("form", "source", "bounds")} if section.get("bounds") else None


# ---- reading ----


def _section(audit: Audit, name: str) -> Mapping[str, Any]:
    return audit.get(name) or {}


def _attacks(audit: Audit) -> Sequence[Mapping[str, Any]]:
    return _section(audit, "membership").get("attacks") or []


def _bounds(audit: Audit) -> Sequence[Mapping[str, Any]]:
    return _section(audit, "canaries").get("bounds") or []


def _tpr(attack: Mapping[str, Any], fpr: str) -> Mapping[str, Any]:
    return (attack.get("tpr") or {}).get(fpr) or {}


def _title(attack: Mapping[str, Any]) -> str:
    return TITLES.get(attack["name"], str(attack["name"]))


def _only_examples(audit: Audit, where: str) -> None:
    """Refuses a recovered text unless it says that it is a canary or the documented example."""
    probes = [*(audit.get("extraction") or ()), *(_section(audit, "canaries").get("extraction") or ())]
    texts = [text for probe in probes for text in probe.get("examples") or ()]
    for text in [*texts, *(_section(audit, "inversion").get("examples") or ())]:
        if text.get("source") not in SHOWN:
            do = "Leave the text out: an audit's page shows no silo's text."
            raise RunError(
                'recovered text whose source is "canary" or "example"', f"{text.get('source')!r}", do, where=where
            )


def _damaged(came: str, where: str) -> RunError:
    return RunError("an audit of format 1, one JSON object", came, "Run the audit again.", where=where)


def _finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
