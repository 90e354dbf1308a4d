"""The pages of a study: `study.html`, which needs nothing but itself, and `study.md` with plots as files, for docs.

`write_study` reads `results.json` in the study's folder and nothing else: whoever has that can make the same pages.
`study_plots.py` draws, the templates lay out, and what is said is said here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..errors import RunError
from . import study_plots as plots
from .compare import signed_percent
from .folder import write_page
from .guarantee import epsilon_text
from .svg import picture, standalone
from .words import bytes_text, seconds_text, thousands

TEMPLATES = Path(__file__).parent / "templates"
NONE = "–"
MAIN = ("mmd_p", "epsilon", "bytes_up", "seconds")
"""What stands in the table itself, beside what methods are judged by; the rest has one of its own."""
MARKED = "Published, other data and model: compare order and ratios only"
DO = "Make room or mend the permissions, and start the study again: what is done is kept."

Results = Mapping[str, Any]


def write_study(folder: Path) -> Path:
    """Writes `study.html`, `study.md` and `plots/` beside `results.json`; returns the page's path.

    Raises `RunError` when `results.json` is missing, or the disk does not take the pages.
    """
    results = read_results(folder)
    (folder / "plots").mkdir(exist_ok=True)
    for name, drawing in _drawings(results).items():
        (folder / "plots" / f"{name}.svg").write_bytes(standalone(lambda drawing=drawing: drawing["draw"](False)))
    write_page(folder / "study.md", render(results, "study.md.j2"), DO)
    return write_page(folder / "study.html", render(results), DO)


def read_results(folder: Path) -> dict[str, Any]:
    """What a study found. Raises `RunError` when it is not there or not whole."""
    place = folder / "results.json"
    try:
        found: dict[str, Any] = json.loads(place.read_text("utf-8"))
        if found["format"] != 1:
            raise ValueError("another format")
    except (OSError, ValueError, KeyError, TypeError) as error:
        do = "Start the study again: it writes them anew from its cells."
        raise RunError("the results of a study, of format 1", str(error), do, where=str(place)) from error
    return found


def render(results: Results, template: str = "study.html.j2") -> str:
    """A page, as text."""
    html = template.endswith(".html.j2")
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=html, trim_blocks=True, lstrip_blocks=True,
        undefined=StrictUndefined, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"count": thousands, "seconds": seconds_text, "cell": _no_pipe}
    environment.globals |= {"include_raw": lambda name: Markup((TEMPLATES / name).read_text(encoding="utf-8"))}
    return environment.get_template(template).render(_page(results, html))


def spell(metric: Results, value: float | None) -> str:
    """One figure as it is printed: 22.73, 86.8 %, 0.0580, 7.99, 1.2 MB, 3 min."""
    if value is None or not math.isfinite(value):
        return NONE
    kind = metric["kind"]
    if kind == "share":
        return f"{100 * value:.1f}\u00a0%"
    if kind == "small":
        return f"{value:.4f}".replace("-", "−")
    if kind == "p":
        return f"{value:.3f}"
    if kind == "epsilon":
        return epsilon_text(value)
    if kind in ("bytes", "seconds"):
        return bytes_text(value) if kind == "bytes" else seconds_text(value)
    return f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.0f}"


def spelled(metric: Results, summary: Results | None) -> str:
    """Mean ± standard deviation over seeds; the mean alone where there is one seed or nothing varies."""
    if not summary:
        return NONE
    mean = spell(metric, summary["mean"])
    if summary["sd"] is None or metric["kind"] in ("p", "epsilon", "bytes", "seconds"):
        return mean
    return f"{mean.removesuffix(chr(160) + '%')} ± {spell(metric, summary['sd'])}"


def p_text(test: Results | None) -> str:
    """The p of a paired test: "p = 0.012"; why there is none, where there is none."""
    if test is None:
        return "not tested"
    if test["p"] is None:
        return "one seed, no test" if test["n"] < 2 else "no spread, no test"
    return "p < 0.001" if test["p"] < 0.001 else f"p = {test['p']:.3f}"


def verdict(results: Results) -> list[str]:
    """What the table says of our method, a sentence a figure; never more than the paired test allows."""
    titles, metrics = _titles(results), {m["key"]: m for m in results["metrics"]}
    said = []
    for margin in results["table"]["margins"]:
        best = results["table"]["best"][margin["figure"]]
        name = metrics[margin["figure"]]["title"]
        if margin["measured"] is None or best is None:
            said.append(f"{name}: nothing to compare yet.")
            continue
        if margin["measured"] == 0:
            said.append(f"{name}: {titles[margin['ours']]} is level with the best rival, {titles[margin['rival']]}.")
            continue
        first = "first" if best["method"] == margin["ours"] else f"not first ({titles[best['method']]} is)"
        sure = p_text(margin["test"]) if margin["significant"] else f"not significant ({p_text(margin['test'])})"
        gap = f"{margin_text(margin, margin['measured'])} against the best rival, {titles[margin['rival']]}"
        said.append(f"{name}: {titles[margin['ours']]} is {first}, {gap}; {sure}.")
    return said


def margin_text(margin: Results, value: float | None) -> str:
    """A gap: −9.2 %, or +2.9 points of a share."""
    if value is None:
        return NONE
    if margin["kind"] == "relative":
        return signed_percent(value)
    return f"{100 * value:+.1f}\u00a0points".replace("-", "−")


# What the templates need


def _page(results: Results, html: bool) -> dict[str, Any]:
    metrics = {m["key"]: m for m in results["metrics"]}
    shown = [m for m in metrics.values() if m["judged"] or _measured(results, m)]
    drawings = _drawings(results)
    figures = {
        name: picture(name, d["alt"], d["draw"]) if html else f"![{d['alt']}](plots/{name}.svg)"
        for name, d in drawings.items()
    }
    return {
        "r": results, "about": _about(results), "warnings": _warnings(results), "verdict": verdict(results),
        "marked": MARKED, "judged": [m for m in metrics.values() if m["judged"]],
        "tables": _tables(results, shown), "tests": _tests(results), "margins": _margins(results),
        "published": _published(results), "curves": [_curve(results, c, figures) for c in results["curves"]],
        "ablations": [_ablation(results, a, figures) for a in results["ablations"]],
        "methods_plot": figures.get("methods"), "cells": _cells(results), "facts": _facts(results),
    }  # fmt: skip


def _about(results: Results) -> list[str]:
    cells = results["cells"]
    done = sum(cell["status"] == "done" for cell in cells)
    seeds = results["seeds"]
    return [
        f"{len(results['table']['rows'])} methods",
        f"{len(seeds)} seed{'s' * (len(seeds) != 1)}",
        f"{done} of {len(cells)} runs done" if done < len(cells) else f"{done} runs",
        f"{results['split']} split",
    ]


def _warnings(results: Results) -> list[tuple[str, str]]:
    """What a reader must know before any figure: (head, text)."""
    said = []
    failed = [cell for cell in results["cells"] if cell["status"] == "failed"]
    undone = [cell for cell in results["cells"] if cell["status"] == "not done"]
    if failed:
        said.append(("Failed runs.", f"{len(failed)} of {len(results['cells'])} runs failed: their errors are below, "
                     "and figures over seeds leave them out."))  # fmt: skip
    if undone:
        said.append(("Not finished.", f"{len(undone)} of {len(results['cells'])} runs are not done yet."))
    if results["simulated_noise"]:
        said.append(
            (
                "Simulated noise.",
                "The noise of these runs came from a seed, so that they can be repeated. "
                "Whoever knows the seed can take it away: ε is what real noise of that size would give.",
            )
        )
    if not results["table"]["same_guarantee"]:
        said.append(("Not the same guarantee.", "The methods that are compared differ in unit, δ or ε: see the table."))
    said.append(_split_said(results))
    return said


def _split_said(results: Results) -> tuple[str, str]:
    if results["split"] == "validation":
        return "Validation split.", "These are figures for tuning; the test data were not read."
    reads = results["test_reads"]
    if len(reads) <= 1:
        when = f", on {reads[0]['when']}" if reads else ""
        return "Test split.", f"This study has read the test data once{when}."
    last = ", ".join(read["when"] for read in reads)
    return "Test split, not once.", f"The study was changed and the test data read {len(reads)} times ({last})."


def _measured(results: Results, metric: Results) -> bool:
    return any(row["figures"][metric["key"]] for row in results["table"]["rows"])


def _tables(results: Results, shown: Sequence[Results]) -> list[dict[str, Any]]:
    """What methods are judged by and what they cost; then everything else that was measured."""
    main = [m for m in shown if m["judged"] or m["key"] in MAIN]
    more = [m for m in shown if m not in main]
    titles = ("Mean ± standard deviation over seeds. Bold: best, and the paired t-test against the next says p < 0.05",
              "What else was measured: on the unlabelled target, and whether features collapsed")  # fmt: skip
    return [{"title": title, "metrics": metrics, "groups": _groups(results, metrics)}
            for title, metrics in zip(titles, (main, more), strict=True) if metrics]  # fmt: skip


def _groups(results: Results, metrics: Sequence[Results]) -> list[dict[str, Any]]:
    """The table in parts: what is compared, what cannot give the guarantee, and what only marks a level."""
    rows = results["table"]["rows"]
    parts = (
        ("Same guarantee", [row for row in rows if row["role"] != "reference" and row["guarantee"]]),
        ("No guarantee", [row for row in rows if row["role"] != "reference" and not row["guarantee"] and _any(row)]),
        ("For reference", [row for row in rows if row["role"] == "reference"]),
        ("Nothing done yet", [row for row in rows if row["role"] != "reference" and not _any(row)]),
    )
    return [{"title": title, "rows": [_row(results, row, metrics) for row in some]} for title, some in parts if some]


def _row(results: Results, row: Results, metrics: Sequence[Results]) -> dict[str, Any]:
    bests, seeds = results["table"]["best"], len(results["seeds"])
    cells = []
    for metric in metrics:
        found, best = row["figures"][metric["key"]], bests.get(metric["key"])
        is_best = bool(best) and best["method"] == row["method"]
        few = [f"{found['n']} of {seeds} seeds"] if found and found["n"] < seeds else []
        cells.append({
            "text": spelled(metric, found), "value": found["mean"] if found else None,
            "bold": is_best and best["significant"],
            "note": "; ".join(["not significant"] * (is_best and not best["significant"]) + few),
        })  # fmt: skip
    missing = f"seeds without a figure: {', '.join(map(str, row['missing']))}" if row["missing"] else ""
    notes = [row["note"], "no guarantee" if _any(row) and not row["guarantee"] else "", missing]
    return {"title": row["title"], "role": row["role"], "note": "; ".join(n for n in notes if n), "cells": cells}


def _any(row: Results) -> bool:
    return any(row["figures"].values())


def _tests(results: Results) -> list[dict[str, str]]:
    titles, said = _titles(results), []
    for metric in results["metrics"]:
        best = results["table"]["best"].get(metric["key"])
        test = best and best["test"]
        if not test:
            continue
        better = test["below"] if metric["lower"] else test["above"]
        said.append({
            "figure": metric["title"], "best": titles[best["method"]], "against": titles[best["against"]],
            "mean": spell(metric, test["mean"]).replace("-", "−"),
            "range": f"{spell(metric, test['low'])} to {spell(metric, test['high'])}".replace("-", "−"),
            "sign": f"{better} of {test['n']}", "p": p_text(test),
            "verdict": "significant" if best["significant"] else "not significant",
        })  # fmt: skip
    return said


def _margins(results: Results) -> list[dict[str, str]]:
    titles, metrics = _titles(results), {m["key"]: m for m in results["metrics"]}
    return [
        {
            "figure": metrics[m["figure"]]["title"], "rival": titles.get(m["rival"], NONE),
            "measured": margin_text(m, m["measured"]), "published": margin_text(m, m["published"]),
            "p": p_text(m["test"]) if m["test"] else NONE, "kept": _kept(m, metrics[m["figure"]]),
        }
        for m in results["table"]["margins"]
    ]  # fmt: skip


def _kept(margin: Results, metric: Results) -> str:
    """Whether the margin is at least the published one."""
    if margin["measured"] is None or margin["published"] is None:
        return NONE
    ahead = margin["measured"] <= margin["published"] if metric["lower"] else margin["measured"] >= margin["published"]
    return ("yes" if margin["significant"] else "yes, not significant") if ahead else "no"


def _published(results: Results) -> list[dict[str, Any]]:
    """The published rows, each with its ratio to the method's, and the same ratio here."""
    judged = [m for m in results["metrics"] if m["judged"]]
    rows, titles = results["published"]["rows"], _titles(results)
    own = {row["method"]: row for row in results["table"]["rows"]}
    ours = next((row for row in rows if own.get(row["method"], {}).get("role") == "ours"), None)
    here = {m["key"]: ours and _mean(own[ours["method"]], m) for m in judged}
    return [
        {
            "title": titles[row["method"]], "ours": row is ours,
            "cells": [{"text": spell(m, row[m["key"]]), "value": row[m["key"]],
                       "ratio": _times(row[m["key"]], ours and ours[m["key"]]),
                       "here": _times(_mean(own.get(row["method"]), m), here[m["key"]])} for m in judged],
        }
        for row in rows
    ]  # fmt: skip


def _mean(row: Results | None, metric: Results) -> float | None:
    found = row["figures"][metric["key"]] if row else None
    return found["mean"] if found else None


def _times(value: float | None, of: float | None) -> str:
    return f"{value / of:.2f}" if value is not None and of is not None and value > 0 and of > 0 else NONE


def _curve(results: Results, curve: Results, figures: Mapping[str, Any]) -> dict[str, Any]:
    metrics = {m["key"]: m for m in results["metrics"]}
    panels = []
    for key in curve["figures"]:
        metric = metrics[key]
        panels.append({
            "title": metric["title"], "plot": figures.get(f"curve-{curve['key']}-{key}"),
            "criteria": [_criteria(line, line["figures"][key]) for line in curve["lines"]],
            "rows": [
                {"title": line["title"], "cells": [spelled(metric, p) for p in line["figures"][key]["points"]]}
                for line in curve["lines"]
            ],
            "published": [
                {"cells": [spell(metric, dict(zip(p["x"], p["y"], strict=True)).get(x)) for x in curve["xs"]],
                 "note": p["note"]}
                for p in curve["published"] if p["figure"] == key
            ],
        })  # fmt: skip
    return {**curve, "panels": panels, "epsilons": _epsilons(curve), "shifts": _shifts(curve)}


def _criteria(line: Results, figure: Results) -> dict[str, str]:
    shape, beside = figure["shape"], figure["beside"]
    return {
        "title": line["title"], "rho": _number(shape["rho"]), "monotone": _yes(shape["monotone"]),
        "ratio": _ratio(shape["ends"]), "beyond": _yes(shape["beyond"]),
        "slopes": f"{_number(shape['first'])}, then {_number(shape['second'])}", "steeper": _yes(shape["steeper"]),
        "published": f"{beside['published_ratio']:.2f}" if beside else NONE,
        "inside": _ratio(beside["shape"]["ends"]) if beside else NONE,
        "milder": _yes(beside["milder"]) if beside else NONE,
    }  # fmt: skip


def _ratio(ends: Results | None) -> str:
    if ends is None:
        return NONE
    between = f" ({ends['low']:.2f} to {ends['high']:.2f})" if ends["low"] is not None else " (one seed)"
    return f"{ends['ratio']:.2f}{between}"


def _epsilons(curve: Results) -> list[dict[str, Any]]:
    """The ε of each point, where it is not one for all."""
    lines = [line for line in curve["lines"] if len({e and round(e, 2) for e in line["epsilon"]}) > 1]
    return [{"title": line["title"], "cells": [epsilon_text(e) for e in line["epsilon"]]} for line in lines]


def _shifts(curve: Results) -> list[dict[str, Any]]:
    lines = [line for line in curve["lines"] if any(x is not None for x in line["shift_bits"])][:1]
    return [{"cells": [_number(x) for x in line["shift_bits"]]} for line in lines]


def _ablation(results: Results, ablation: Results, figures: Mapping[str, Any]) -> dict[str, Any]:
    metrics = {m["key"]: m for m in results["metrics"]}
    shown = [metrics[key] for key in ablation["figures"]]
    rows = []
    for row in ablation["rows"]:
        cells = [
            {"text": spelled(m, row["figures"][m["key"]]),
             "note": "" if row["beside_whole"][m["key"]] is None else p_text(row["beside_whole"][m["key"]])}
            for m in shown
        ]  # fmt: skip
        missing = f"seeds without a figure: {', '.join(map(str, row['missing']))}" if row["missing"] else ""
        rows.append({"title": row["title"], "note": "; ".join(n for n in (row["note"], missing) if n), "cells": cells})
    return {**ablation, "shown": shown, "rows": rows, "plot": figures.get(f"ablation-{ablation['key']}")}


def _cells(results: Results) -> list[dict[str, Any]]:
    perplexity = next(m for m in results["metrics"] if m["key"] == "perplexity")
    return [
        {**cell, "epsilon": epsilon_text(cell["epsilon"]) if cell["epsilon"] is not None else NONE,
         "took": seconds_text(cell["seconds"]) if cell["seconds"] is not None else NONE,
         "up": bytes_text(cell["bytes_up"]) if cell["bytes_up"] is not None else NONE,
         "perplexity_text": spell(perplexity, cell["perplexity"])}
        for cell in results["cells"]
    ]  # fmt: skip


def _facts(results: Results) -> list[tuple[str, str]]:
    changed = ", with changes that are not committed" if results["changed"] else ""
    measure = results["measure"]
    facts = [
        ("command", results["command"]),
        ("commit", f"{results['commit']}{changed}" if results["commit"] else ""),
        ("study digest", results["digest"]),
        ("seeds", ", ".join(map(str, results["seeds"]))),
        ("split", results["split"]),
        ("measured", f"at most {measure['samples']} documents a silo, {measure['permutations']} permutations, "
                     f"bandwidths from {measure['public']}"),
        ("written", results["written"]),
    ]  # fmt: skip
    facts += [("hardware", _joined(hardware)) for hardware in results["hardware"]]
    facts += [("versions", _joined(versions)) for versions in results["versions"]]
    return [(name, text) for name, text in facts if text]


def _joined(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())


def _drawings(results: Results) -> dict[str, dict[str, Any]]:
    """Every plot by the name of its file: what it says in words, and how it is drawn."""
    metrics = {m["key"]: m for m in results["metrics"]}
    judged = [m for m in metrics.values() if m["judged"]]
    rows = [row for row in results["table"]["rows"] if any(row["figures"][m["key"]] for m in judged)]
    drawings: dict[str, dict[str, Any]] = {}
    if rows:
        alt = "Every method over its seeds: " + ", ".join(m["title"] for m in judged) + ". The table has the figures."
        drawings["methods"] = {"alt": alt, "draw": lambda narrow: plots.methods(rows, judged, spell, narrow)}
    for curve in results["curves"]:
        for key in curve["figures"]:
            if any(p for line in curve["lines"] for p in line["figures"][key]["points"]):
                drawings[f"curve-{curve['key']}-{key}"] = _curve_drawing(curve, metrics[key])
    for ablation in results["ablations"]:
        if any(x for row in ablation["rows"] for x in row["figures"].values()):
            drawings[f"ablation-{ablation['key']}"] = _ablation_drawing(ablation, metrics)
    return drawings


def _curve_drawing(curve: Results, metric: Results) -> dict[str, Any]:
    alt = f"{metric['title']} against {curve['x']}, {len(curve['lines'])} methods. The table has the figures."
    return {"alt": alt, "draw": lambda narrow: plots.curve(curve, metric, spell, narrow)}


def _ablation_drawing(ablation: Results, metrics: Mapping[str, Results]) -> dict[str, Any]:
    shown = [metrics[key] for key in ablation["figures"]]
    alt = f"{ablation['title']}: {len(ablation['rows'])} variants. The table has the figures."
    return {"alt": alt, "draw": lambda narrow: plots.ablation(ablation, shown, spell, narrow)}


def _titles(results: Results) -> dict[str, str]:
    lines = [line for curve in results["curves"] for line in curve["lines"]]
    return {x["method"]: x["title"] for x in (*lines, *results["table"]["rows"])}


def _yes(value: bool | None) -> str:
    return NONE if value is None else "yes" if value else "no"


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.3g}".replace("-", "−")


def _no_pipe(text: str) -> str:
    """A text fit for a cell of a Markdown table."""
    return " ".join(str(text).replace("|", "\\|").split())
