"""`foedus advise`, `foedus threats`, `foedus compliance`: help before a run, and records of one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .console import AsJson, RunPath, out, print_json
from .errors import TreatyError


def advise(
    answers: Annotated[Path | None, typer.Option(metavar="FILE", help="Answers in TOML; else each is asked.")] = None,
    treaty: Annotated[Path | None, typer.Option("--out", metavar="TREATY", help="Write the pilot's treaty.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say whether federation is the right answer here, what it would cost, and what to try first."""
    from .advise import advise as judged
    from .advise import load

    found = judged(load(answers) if answers else _asked())
    if treaty is not None and found["pilot"]:
        from .governance.disk import write_whole

        write_whole(treaty, found["pilot"]["treaty"].encode())
    if as_json:
        print_json(found)
        return
    for line in _said(found):
        out.print(line, markup=False)
    if treaty is not None and found["pilot"]:
        out.print(f"\nTreaty draft: {treaty}; read it, name the silos, then `foedus check {treaty}`.", markup=False)


def threats(
    place: Annotated[Path, typer.Argument(metavar="TREATY_OR_RUN", help="A treaty in TOML, or a run's folder.")],
    folder: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where; by default beside it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write who sees what under a treaty, what defends it and what remains: threats.json and threats.html."""
    from .report.threats import threats as model
    from .report.threats import write_threats
    from .treaty import load

    treaty = load(place / "treaty.toml" if place.is_dir() else place)
    if as_json:
        print_json(model(treaty))
        return
    for path in write_threats(treaty, folder or (place if place.is_dir() else place.parent)):
        out.print(str(path), markup=False)


def compliance(run: RunPath, as_json: AsJson = False) -> None:
    """Write what a run has to show for GDPR, HIPAA, the EU AI Act and the NIST AI RMF, with gaps; no conclusions."""
    from .report.compliance import compliance as record
    from .report.compliance import write_compliance

    if as_json:
        print_json(record(run))
        return
    for path in write_compliance(run):
        out.print(str(path), markup=False)


def _asked() -> Any:
    """Every answer from the prompt; what does not fit is asked again."""
    from .advise import QUESTIONS, Answers
    from .advise.answers import check

    found: dict[str, Any] = {}
    for name, question in QUESTIONS.items():
        while name not in found:
            hint = f" ({', '.join(question.choices)})" if question.choices else ""
            said = typer.prompt(f"{question.asks}{hint}", default=question.default)
            try:
                value = _value(name, str(said))
                check(name, value)
            except TreatyError as error:
                out.print(f"  expected {error.expected}. {error.do}", markup=False)
            else:
                found[name] = value
    return Answers(**found)


def _value(name: str, said: str) -> Any:
    from .advise import QUESTIONS
    from .advise.answers import WHOLE

    if QUESTIONS[name].choices or name == "base":
        return said
    try:
        return int(said) if name in WHOLE else float(said)
    except ValueError:
        return said


def _said(found: dict[str, Any]) -> list[str]:
    best, cost = found["best"], found["costs"]
    lines = [f"Best here: {best}." if best else "Nothing here is a good answer; the reasons say what to change.", ""]
    for option in found["options"]:
        score = "ruled out" if option["barred"] else f"{option['score']:+d}"
        lines.append(f"{option['name']} ({score}): {option['about']}")
        lines += [
            f"  {'no' if r['points'] is None else format(r['points'], '+d'):>3}  {r['because']}"
            for r in option["reasons"]
        ]
    lines += ["", "What federating would cost", *(f"  • {line}" for line in _costs(cost))]
    if found["pilot"]:
        pilot = found["pilot"]
        lines += ["", f"A pilot: {pilot['silos']} silos, {pilot['rounds']} rounds. Stop when:"]
        lines += [f"  • {line}" for line in pilot["stop"]]
        lines.append(pilot["go_on"])
    return lines


def _points(points: int | None) -> str:
    return f"{'no' if points is None else format(points, '+d'):>3}"


def _costs(cost: dict[str, Any]) -> list[str]:
    from .report.words import bytes_text, parameters_text, seconds_text

    way = f"{bytes_text(cost['bytes_down'])} down, {bytes_text(cost['bytes_up'])} up"
    lines = [
        f"{parameters_text(cost['parameters'])} trained parameters",
        f"{way} a silo and round; {bytes_text(cost['bytes_total'])} in all",
        f"about {seconds_text(3600 * cost['hours'])}, of which {seconds_text(3600 * cost['hours_network'])} network",
    ]
    if cost["money"] is not None:
        lines.append(f"{cost['money']:,.2f} by the prices given")
    if cost["noise"] is not None:
        felt = f"{cost['felt']:.3g} of the clip norm in a step's mean over all silos"
        lines.append(f"ε = {cost['epsilon']:.2f} takes a noise multiplier of {cost['noise']:.3f}: {felt}")
    return [*lines, *(f"assumed: {line}" for line in cost["assumed"])]
