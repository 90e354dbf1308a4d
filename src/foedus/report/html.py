"""The report of a run: one HTML page that needs nothing but itself.

`write_report` reads the run's folder and nothing else, so anybody who has the folder can make the same page, byte for
byte. `folder.py` reads, `compare.py` and `words.py` say, `plots.py` draws, `templates/` lays out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from ..errors import RunError
from . import plots, privacy
from .audit import verdict as audited
from .card import adapter_text, loading_code
from .compare import EXPLAINED, PHASES, TITLES, Comparison, compare_all, figure, signed_percent, verdict
from .folder import Record, Run, read_run, write_page
from .guarantee import Guarantee, epsilon_text, guarantee_of, sections
from .svg import picture
from .words import ALGORITHMS, bytes_text, parameters_text, seconds_text, thousands

TEMPLATES = Path(__file__).parent / "templates"
REPORTED = {
    "effective silos": "how many silos with equal shares would be as even",
    "shift": "the mean squared MMD of two silos under the global model, less what the noise adds to it",
    "moved": "how far the server stepped",
}
TIME_PHASES = ("load", "train", "federation", "evaluate", "checkpoint", "local_only", "pooled")
NOT_STATED = (
    "The privacy statement is written when a run ends, and this one has not. Until then, assume no guarantee: "
    "model updates may reveal what is in the text they were computed from."
)


def write_report(run: Path) -> Path:
    """Writes `report.html` into a run's folder, whole or not at all, and returns its path.

    Works for a run that has ended, is under way or was stopped. Raises `RunError` when the folder is no run's, or a
    file in it is damaged.
    """
    place = Path(run) / "report.html"
    page = render(read_run(Path(run)))
    return write_page(place, page, "Make room or mend the permissions, and write it again with `foedus report`.")


def render(run: Run) -> str:
    """The page, as text."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "bytes": bytes_text, "seconds": seconds_text, "count": thousands, "change": signed_percent, "figure": figure,
        "change_size": lambda row: abs(row.change() or 0.0), "breakable": _breakable,
    }  # fmt: skip
    environment.globals |= {"include_raw": lambda name: Markup((TEMPLATES / name).read_text(encoding="utf-8"))}
    return environment.get_template("report.html.j2").render(_page(run))


def _page(run: Run) -> dict[str, Any]:
    """Everything the template needs, already worked out."""
    evaluation, basis = _evaluation(run)
    comparisons = compare_all(evaluation)
    return {
        "run": run,
        "about": _about(run),
        "status": _status(run),
        "basis": basis,
        "verdict": verdict(evaluation),
        "comparisons": comparisons,
        "titles": TITLES,
        "explained": EXPLAINED,
        "privacy": _privacy(run),
        "domains_plot": _domains_plot(comparisons),
        "losses": _losses(run),
        "validation": _validation(run),
        "method": _method(run),
        "holdings": _holdings(run),
        "traffic": _traffic(run),
        "times": _times(run),
        "attendance": _attendance(run),
        "facts": _facts(run),
        "ledger": run.ledger,
        "code": loading_code(run.summary, run.treaty) if run.ended else "",
        "adapter": run.summary.get("adapter") or {},
    }


# What it is and how far it got


def _about(run: Run) -> list[str]:
    silos, rounds = run.summary.get("silos") or len(_silos(run)), _rounds_planned(run)
    algorithm = (run.summary.get("algorithm") or run.treaty.get("algorithm") or {}).get("name")
    model = (run.summary.get("model") or {}).get("name") or (run.treaty.get("model") or {}).get("base")
    adapter = run.summary.get("adapter") or run.treaty.get("adapter") or {}
    words = [
        f"{silos} silo{'s' if silos != 1 else ''}" if silos else "",
        f"{rounds} round{'s' if rounds != 1 else ''}" if rounds else "",
        ALGORITHMS.get(str(algorithm), algorithm),
        model,
        adapter_text(adapter, run.summary.get("model") or {}),
    ]
    return [str(word) for word in words if word]


def _status(run: Run) -> str:
    if run.ended:
        return ""
    done = max((record.get("round", 0) for record in run.phase("federated")), default=0)
    planned = _rounds_planned(run)
    far = f"{done} of {planned} rounds are" if planned else f"{done} round{'s are' if done != 1 else ' is'}"
    return f"This run has not ended: {far} recorded so far. What follows is what its folder holds up to here."


def _rounds_planned(run: Run) -> int:
    return int(run.summary.get("rounds") or (run.treaty.get("algorithm") or {}).get("rounds") or 0)


def _silos(run: Run) -> list[str]:
    named = set(run.summary.get("holdings") or {}) | set((run.summary.get("bytes") or {}).get("up") or {})
    for record in run.phase("federated"):
        named |= {*(record.get("silos") or {}), *(record.get("failures") or {})}
    return sorted(named)


# What it promises


def _privacy(run: Run) -> dict[str, Any]:
    """The guarantee of a run that has ended; of one that has not, if it has one, what its rounds cost so far."""
    recorded = run.summary.get("privacy") or ({} if run.ended else _so_far(run))
    given = guarantee_of(recorded)
    return {
        "given": given,
        "statement": recorded.get("statement") or " ".join(given.sentences) or NOT_STATED,
        "sections": sections(given.sentences),
        "epsilon": epsilon_text(given.epsilon),
        "delta": "none" if given.delta is None else _by_power(given.delta),
        "rdp": epsilon_text(given.rdp),
        "costs": _costs(run, given) if given.sentences and given.stated else None,
        "audit": _audit(run),
        "hidden": _hidden(run),
        "caveat": (run.summary.get("algorithm") or {}).get("caveat", ""),
    }


def _hidden(run: Run) -> bool:
    """Whether no record names who took part."""
    return bool((run.treaty.get("privacy") or {}).get("hide_cohort"))


def _so_far(run: Run) -> Record:
    """The facts that the ledger opens with, and ε of the rounds that were begun; {} where there is no guarantee."""
    if run.ledger.broken_at is not None:
        return {}
    facts = next((r["body"].get("privacy") for r in run.ledger.records if r["kind"] == "opened"), None)
    if not facts or facts["epsilon"] is None:
        return facts or {}
    charged = privacy.events_by_round(run.ledger.records)
    begun = f"This is what {len(charged)} round{'s' * (len(charged) != 1)} cost, those begun so far."
    planned = f" All {_rounds_planned(run)} may cost {epsilon_text(facts['epsilon'])}."
    spent = privacy.spent(charged.values(), facts["delta"])
    return {**facts, "epsilon": spent, "epsilon_rdp": None, "statement": begun + planned}


def _costs(run: Run, given: Guarantee) -> dict[str, Any] | None:
    """ε by round, from the ledger's events; that of the whole run as it is recorded."""
    if run.ledger.broken_at is not None or (delta := given.delta) is None:
        return None
    charged = privacy.events_by_round(run.ledger.records)
    epsilon, rdp = given.epsilon, given.rdp
    whole = {"epsilon": epsilon, "rdp": rdp} if epsilon is not None and rdp is not None else {}
    points = privacy.points(charged, delta, whole)
    if len(points) < 2:
        return None
    said = ", ".join(f"{epsilon_text(p['epsilon'])} after round {p['round']}" for p in points)
    return {
        "plot": picture("epsilon", f"Epsilon by round: {said}.", lambda narrow: privacy.plot(points, delta, narrow)),
        "points": [{**p, "text": epsilon_text(p["epsilon"]), "rdp_text": epsilon_text(p["rdp"])} for p in points],
        "first": points[0]["epsilon"] == points[-1]["epsilon"],
    }


def _audit(run: Run) -> str:
    """What an audit of this run found, in words, where its page stands beside this one; else ""."""
    if not run.audit:
        return ""
    try:
        return audited(run.audit)[1]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        came = f"one whose parts do not fit ({type(error).__name__}: {error})"
        do = "Audit the run again with `foedus audit`, or remove audit.json and audit.html."
        raise RunError("an audit.json as an audit writes it", came, do) from error


# The comparison


def _evaluation(run: Run) -> tuple[Mapping[str, Any], str]:
    """What to compare, and in words what it was measured on: the summary's figures, or else the latest there are."""
    federated = [record for record in run.evaluations if record.get("phase") == "federated"]
    split = "test" if any(record.get("split") == "test" for record in federated) else "validation"
    on = f"Measured on held-out {split} text that no training has seen"
    if run.summary.get("evaluation"):
        return run.summary["evaluation"], f"{on}." if federated else "Measured on held-out text."
    if not federated:
        return {}, ""
    at = next(record.get("round", 0) for record in reversed(federated) if record.get("split") == split)
    same = [record for record in run.evaluations if record.get("split") == split]
    alike = {str(r.get("phase")): r for r in same if r.get("round", 0) == (0 if r.get("phase") == "base" else at)}
    return alike, f"{on}; every model as it was after round {at}."


def _domains_plot(comparisons: Sequence[Comparison]) -> Markup | None:
    perplexity = next((c for c in comparisons if c.metric == "perplexity"), None)
    rows = perplexity.domains if perplexity else ()
    if perplexity is None or not any(math.isfinite(value) for row in rows for value in row.values.values()):
        return None
    alt = "Perplexity by domain. " + "; ".join(
        f"{row.name}: " + ", ".join(f"{TITLES[phase].lower()} {figure(value)}" for phase, value in row.values.items())
        for row in rows[:8]
    )
    alt += ". The table above has all of it."
    return picture("domains", alt, lambda narrow: plots.domains(rows, perplexity.phases, narrow))


# Over the rounds


def _losses(run: Run) -> dict[str, Any] | None:
    federated = _loss_series(run.phase("federated"))
    alone = _loss_series([record for record in run.rounds if str(record.get("phase")).startswith("local:")])
    together = not federated and not alone
    if together and not (federated := _mean_loss(run.phase("federated"))):
        return None
    names = sorted({*federated, *alone})
    rows = [{"name": name, "federated": _ends(federated.get(name)), "alone": _ends(alone.get(name))} for name in names]
    alt = f"Training loss over rounds of {len(names)} silos, federated" + (" and each silo alone." if alone else ".")
    if together:
        alt = "Training loss over rounds, all silos together."
    return {
        "plot": picture("loss", alt, lambda narrow: plots.losses(federated, alone, narrow)),
        "rows": rows,
        "alone": bool(alone),
        "together": together,
        "many": len(names) > plots.FEW,
    }


def _mean_loss(records: Sequence[Record]) -> Mapping[str, plots.Points]:
    kept = [record for record in records if _finite(record.get("loss"))]
    points = [int(record["round"]) for record in kept], [float(record["loss"]) for record in kept]
    return {"all silos together": points} if kept else {}


def _loss_series(records: Sequence[Record]) -> Mapping[str, plots.Points]:
    series: dict[str, tuple[list[int], list[float]]] = {}
    for record in records:
        for name, facts in (record.get("silos") or {}).items():
            if _finite(loss := (facts or {}).get("loss")):
                rounds, values = series.setdefault(name, ([], []))
                rounds.append(int(record["round"]))
                values.append(float(loss))
    return series


def _ends(points: plots.Points | None) -> tuple[float, float] | None:
    return (points[1][0], points[1][-1]) if points and points[0] else None


def _method(run: Run) -> dict[str, Any] | None:
    """What the algorithm reports of its rounds, and each silo's share of the mean where silos say what they weigh."""
    records = run.phase("federated")
    reported, alpha = (_by_round(records, kind) for kind in ("reported", "shares"))
    if not reported and not alpha:
        return None
    even = reported.get("effective silos")
    said = f" As even as {even[1][-1]:.2f} silos with equal shares in the last round." if even else ""
    alt = f"Shares of {len(alpha)} silos in the mean of each round.{said}"
    drawn = picture("shares", alt, lambda narrow: plots.shares(alpha, narrow)) if alpha else None
    tables = [("What it reports", reported, ".4g"), ("Shares of the silos", alpha, ".3f")]
    return {
        "plot": drawn,
        "said": said,
        "many": len(alpha) > plots.FEW,
        "explained": [(name, REPORTED[name]) for name in reported if name in REPORTED],
        "tables": [_round_table(title, series, form) for title, series, form in tables if series],
    }


def _by_round(records: Sequence[Record], kind: str) -> Mapping[str, plots.Points]:
    series: dict[str, tuple[list[int], list[float]]] = {}
    for record in records:
        for name, value in (record.get(kind) or {}).items():
            if _finite(value):
                rounds, values = series.setdefault(name, ([], []))
                rounds.append(int(record["round"]))
                values.append(float(value))
    return dict(sorted(series.items()))


def _round_table(title: str, series: Mapping[str, plots.Points], form: str) -> dict[str, Any]:
    """A line for each round; each cell (value, text), or None where there is none."""
    known = {name: dict(zip(*points, strict=True)) for name, points in series.items()}
    every = sorted({at for values in known.values() for at in values})
    cells = [[(x, format(x, form)) if (x := values.get(at)) is not None else None for values in known.values()]
             for at in every]  # fmt: skip
    return {"title": title, "names": list(known), "rows": list(zip(every, cells, strict=True))}


def _validation(run: Run) -> dict[str, Any] | None:
    series: dict[str, tuple[list[int], list[float]]] = {}
    for record in run.evaluations:
        value = (record.get("perplexity") or {}).get("micro")
        if record.get("split", "validation") == "validation" and record.get("phase") in PHASES and _finite(value):
            rounds, values = series.setdefault(record["phase"], ([], []))
            rounds.append(int(record.get("round", 0)))
            values.append(float(value))
    series = {phase: series[phase] for phase in PHASES if phase in series}
    drawn = {phase: _from_base(phase, series) for phase in series}
    if not any(len(rounds) > 1 for rounds, _ in drawn.values()):
        return None
    alt = "Perplexity on validation text over rounds. " + " ".join(
        f"{TITLES[phase]}: from {figure(values[0])} to {figure(values[-1])}." for phase, (_, values) in drawn.items()
    )
    every = sorted({at for rounds, _ in series.values() for at in rounds})
    table = {phase: dict(zip(*points, strict=True)) for phase, points in series.items()}
    return {
        "plot": picture("validation", alt, lambda narrow: plots.validation(drawn, narrow)),
        "phases": list(series),
        "rows": [{"round": at, "values": {phase: table[phase].get(at) for phase in series}} for at in every],
    }


def _from_base(phase: str, series: Mapping[str, plots.Points]) -> plots.Points:
    """A phase's points, beginning with the base model, which is what every phase starts from."""
    (rounds, values), (at, start) = series[phase], series.get("base", ((), ()))
    if phase == "base" or list(at[:1]) != [0] or rounds[0] == 0:
        return rounds, values
    return [0, *rounds], [start[0], *values]


# Who holds what


def _holdings(run: Run) -> dict[str, Any] | None:
    held = run.summary.get("holdings") or {}
    if not held:
        return None
    parts = ("train", "validation", "test")
    sizes = {name: sum(int(facts.get(part) or 0) for part in parts) for name, facts in held.items()}
    matrices = [_matrix(held, sizes, key) for key in ("domains", "labels")]
    known = [matrix for matrix in matrices if matrix]
    if len(known) == 2 and known[0]["counts"] == known[1]["counts"]:
        known.pop()
    columns = [c for c in ("train", "validation", "test", "tokens") if any(c in facts for facts in held.values())]
    scrubbed = {name: facts["scrubbed"] for name, facts in held.items() if facts.get("scrubbed")}
    return {
        "silos": held, "sizes": sizes, "columns": columns, "matrices": known, "total": sum(sizes.values()),
        "scrubbed": scrubbed, "marks": sorted({mark for found in scrubbed.values() for mark in found}),
    }  # fmt: skip


def _matrix(held: Mapping[str, Any], sizes: Mapping[str, int], key: str) -> dict[str, Any] | None:
    counts = {name: dict(facts.get(key) or {}) for name, facts in held.items()}
    kinds = sorted({kind for silo in counts.values() for kind in silo})
    if not kinds:
        return None
    by_kind = all(len(silo) <= 1 for silo in counts.values())
    by_size = not by_kind and len(counts) > plots.FEW
    if by_kind:
        counts = dict(sorted(counts.items(), key=lambda item: (list(item[1]), item[0])))
    if by_size:
        counts = dict(sorted(counts.items(), key=lambda item: (-sizes[item[0]], item[0])))
    alt = f"Examples by silo and {key[:-1]}: {len(counts)} silos, {len(kinds)} {key}. The table has the counts."
    return {
        "key": key,
        "by_size": by_size,
        "counts": counts,
        "kinds": kinds,
        "plot": picture(f"holds-{key}", alt, lambda narrow: plots.holdings(counts, sizes, narrow)),
    }


# What it cost


def _traffic(run: Run) -> dict[str, Any] | None:
    up, down = _bytes(run, "up"), _bytes(run, "down")
    rounds = max((len(values) for values in [*up.values(), *down.values()]), default=0)
    if not any(any(values) for values in [*up.values(), *down.values()]):
        return None
    all_up, all_down = _added(up, rounds), _added(down, rounds)
    alt = (
        f"Bytes by round, and added up. From silos to the server {bytes_text(sum(all_up))} in all, "
        f"from the server to silos {bytes_text(sum(all_down))}."
    )
    return {
        "plot": picture("traffic", alt, lambda narrow: plots.traffic(all_up, all_down, narrow)),
        "up": sum(all_up),
        "down": sum(all_down),
        "rounds": rounds,
        "by_round": list(zip(range(1, rounds + 1), all_up, all_down, strict=True)),
        "by_silo": [(name, sum(up.get(name, [])), sum(down.get(name, []))) for name in sorted({*up, *down})],
    }


def _added(by_silo: Mapping[str, Sequence[float]], rounds: int) -> list[float]:
    return [sum(series[at] for series in by_silo.values() if at < len(series)) for at in range(rounds)]


def _bytes(run: Run, way: str) -> dict[str, list[float]]:
    """Silo → bytes in each round: the summary's, or else from the rounds recorded so far."""
    if known := (run.summary.get("bytes") or {}).get(way):
        return {name: [float(value or 0) for value in values] for name, values in known.items()}
    records = run.phase("federated")
    names = sorted({name for record in records for name in record.get("silos") or {}})
    return {
        name: [float(((record.get("silos") or {}).get(name) or {}).get(f"bytes_{way}") or 0) for record in records]
        for name in names
    }


def _times(run: Run) -> dict[str, Any] | None:
    known = dict(run.summary.get("seconds") or {})
    if not known:
        known = _seconds_so_far(run)
    known = {phase: float(value) for phase, value in known.items() if _finite(value)}
    total = known.pop("total", sum(known.values()))
    parts = {phase: known[phase] for phase in (*TIME_PHASES, *sorted(set(known) - {*TIME_PHASES})) if phase in known}
    if not parts or total <= 0:
        return None
    if total - sum(parts.values()) > 0.005 * total:
        parts["other"] = total - sum(parts.values())
    alt = "Time by phase: " + ", ".join(f"{plots.TIMES.get(p, p)} {seconds_text(v)}" for p, v in parts.items()) + "."
    return {
        "plot": picture("times", alt, lambda narrow: plots.times(parts, narrow)),
        "total": total,
        "rows": [(plots.TIMES.get(phase, phase), value, value / sum(parts.values())) for phase, value in parts.items()],
        "federation": parts["federation"] / total if "federation" in parts else None,
    }


def _seconds_so_far(run: Run) -> dict[str, float]:
    """As the summary counts: baselines under their own names, evaluations under "evaluate"."""
    known: dict[str, float] = {}
    for record in (*run.rounds, *run.evaluations):
        phase = str(record.get("phase"))
        phase = "local_only" if phase.startswith("local:") else phase
        for name, value in (record.get("seconds") or {}).items():
            name = name if name == "evaluate" or phase == "federated" else phase
            known[name] = known.get(name, 0.0) + float(value or 0)
    return known


def _attendance(run: Run) -> dict[str, Any]:
    records = run.phase("federated")
    took_part: dict[str, set[int]] = {name: set() for name in _silos(run)}
    failed: dict[str, set[int]] = {}
    for record in records:
        for name in record.get("silos") or {}:
            took_part.setdefault(name, set()).add(int(record["round"]))
    failures = _failures(run)
    for failure in failures:
        failed.setdefault(str(failure["silo"]), set()).add(int(failure["round"]))
    rounds = max([int(record["round"]) for record in records] + [int(f["round"]) for f in failures], default=0)
    everybody = all(len(took_part[name] | failed.get(name, set())) == len(records) for name in took_part)
    shown = bool(records) and not _hidden(run) and (bool(failures) or not everybody)
    alt = f"Who took part in each of {rounds} rounds; {len(failures)} failure{'s' if len(failures) != 1 else ''}."
    plot = None
    if shown:
        plot = picture("attendance", alt, lambda narrow: plots.attendance(took_part, failed, rounds, narrow))
    return {
        "plot": plot,
        "failures": failures,
        "everybody": everybody,
        "many": len(took_part) > plots.MANY,
        "rounds": len(records),
    }


def _failures(run: Run) -> list[dict[str, Any]]:
    if "failures" in run.summary:
        return [dict(failure) for failure in run.summary["failures"] or []]
    return [
        {"round": record.get("round", 0), "silo": silo, "why": why}
        for record in run.phase("federated")
        for silo, why in (record.get("failures") or {}).items()
    ]


# Facts


def _facts(run: Run) -> list[tuple[str, list[tuple[str, str, bool]]]]:
    """Groups of (name, value, whether it is a hash or a version, to be set in a fixed-width face)."""
    s = run.summary
    model, adapter, versions, hardware = (s.get(key) or {} for key in ("model", "adapter", "versions", "hardware"))
    seed = s.get("seed", (run.treaty.get("treaty") or {}).get("seed"))
    groups = [
        ("Identity", [
            ("treaty digest", (s.get("treaty") or {}).get("digest"), True),
            ("base model", model.get("name") or (run.treaty.get("model") or {}).get("base"), False),
            ("base model digest", model.get("digest"), True),
            ("adapter SHA-256", adapter.get("sha256"), True),
            ("seed", seed, True),
        ]),
        ("Parameters", [
            ("base model", _parameters(model.get("parameters")), False),
            ("trained", _parameters(adapter.get("parameters")), False),
            ("adapter", adapter_text(adapter, {}), False),
        ]),
        ("Versions", [(name, version, True) for name, version in versions.items()]),
        ("Hardware", [(_spoken(name), _plain(value), False) for name, value in hardware.items()]),
    ]  # fmt: skip
    shown = [(title, [(n, str(v), code) for n, v, code in facts if v not in (None, "")]) for title, facts in groups]
    return [(title, facts) for title, facts in shown if facts]


def _parameters(count: Any) -> str:
    return parameters_text(count) if _finite(count) else ""


def _spoken(name: str) -> str:
    words = {"cpu": "processor", "memory_gib": "memory (GiB)", "gflops_bf16": "bf16 (GFLOP/s)"}
    return words.get(name, name.replace("_", " "))


def _by_power(x: float) -> Markup | str:
    """A small number by its power of ten, 1e-5 as ten to the minus fifth."""
    if not 0 < x < 0.01:
        return f"{x:g}"
    digits, power = f"{x:.2e}".split("e")
    times = "" if float(digits) == 1 else f"{float(digits):g}\u00a0×\u00a0"
    return Markup(f"{times}10<sup>{int(power)}</sup>".replace("-", "\u2212"))


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _breakable(name: str) -> Markup:
    """A name that may be broken after its dots, slashes, underscores and hyphens."""
    return Markup(re.sub(r"([./_-])(?=.)", r"\1<wbr>", str(escape(name))))


def _finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
