"""`foedus privacy …`: choose a plan, see what it costs by round, read what a run promised, keep a silo's budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .console import AsJson, RunPath, TreatyFile, err, out, print_json

app = typer.Typer(no_args_is_help=True, help="Plans, costs, statements and budgets of differential privacy.")


@app.command()
def plan(
    unit: Annotated[str, typer.Option(help='"example", "author" or "silo".')] = "example",
    epsilon: Annotated[float | None, typer.Option(help="ε of the whole run; the noise is found for it.")] = None,
    noise_multiplier: Annotated[float | None, typer.Option(help="Instead of ε: the ε of this noise is found.")] = None,
    delta: Annotated[float, typer.Option(help="δ, well below 1 / the number of units.")] = 1e-5,
    examples: Annotated[int | None, typer.Option(help="Units a silo has, about (a public figure).")] = None,
    batch: Annotated[int, typer.Option(help="Units in a step, on average.")] = 64,
    steps: Annotated[int | None, typer.Option(help="Local steps a round; by default as many as see all units.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds.")] = 20,
    silos: Annotated[int, typer.Option(help='Silos, for unit "silo".')] = 8,
    as_json: AsJson = False,
) -> None:
    """Find the noise for an ε (or the ε of some noise), and what else would give it."""
    from .privacy.curve import alternatives
    from .privacy.noise import SystemSource
    from .privacy.plan import facts, make_plan

    terms = _terms(unit, epsilon, noise_multiplier, delta, examples, batch, steps, rounds, silos)
    if examples is not None and delta * examples >= 1:
        err.print(f"delta = {delta:g} is no less than 1 / {examples}: with it, giving one unit away whole is allowed.")
    made = make_plan(terms, SystemSource())
    others = alternatives(terms) if epsilon is not None else []
    if as_json:
        print_json({**facts(made, lower=True), "alternatives": [vars(other) for other in others]})
        return
    for line in [*_said(facts(made)), *_cost(made)]:
        out.print(line, markup=False)
    if others:
        table = Table("the same epsilon with", "noise multiplier", "rate", "steps", "noise / batch", box=None)
        for o in others:
            table.add_row(o.change, f"{o.multiplier:.3f}", f"{o.rate:.4g}", f"{o.steps:,}", f"{o.noise:.4f}")
        out.print(table)


@app.command()
def curve(
    treaty: TreatyFile,
    picture: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where to draw it.")] = Path("privacy.svg"),
    as_json: AsJson = False,
) -> None:
    """ε round by round and by how many units come together, by PLD and by RDP; and a plot."""
    from .build import planned
    from .privacy.curve import by_group, by_round
    from .report.privacy import draw
    from .treaty import load

    made = planned(load(treaty))
    points, groups = by_round(made), by_group(made)
    draw([vars(p) for p in points], made.terms.delta, picture)
    if as_json:
        print_json({"unit": made.terms.unit, "delta": made.terms.delta, "plot": str(picture),
                    "rounds": [vars(p) for p in points], "groups": [vars(g) for g in groups]})  # fmt: skip
        return
    table = Table("after round", "epsilon (PLD)", "epsilon (RDP)", box=None)
    for p in points:
        table.add_row(str(p.round), f"{p.epsilon:.3f}", f"{p.rdp:.3f}")
    out.print(table)
    together = Table(f"{made.terms.unit}s that come together", "epsilon", box=None)
    for g in groups:
        together.add_row(str(g.size), f"{g.epsilon:.2f}")
    out.print(together)
    out.print(f"Plot: {picture}", markup=False)


@app.command()
def statement(run: RunPath, as_json: AsJson = False) -> None:
    """What a run promises, in plain words, from its ledger: unit, neighbours, adversary, ε, δ, and what is not
    covered.
    """
    from .governance import RunFolder
    from .report.privacy import stated

    found = stated(RunFolder.open(run).path)
    if as_json:
        print_json(found)
        return
    for sentence in found["sentences"]:
        out.print(f"  {sentence}", markup=False)
    if found["not_covered"]:
        out.print("Not covered by the guarantee:")
    for what in found["not_covered"]:
        out.print(f"  • {what}", markup=False)


@app.command()
def budget(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where silos keep their budgets (FOEDUS_BUDGETS).")],
    silo: Annotated[str, typer.Option(help="Whose.")],
    epsilon: Annotated[float | None, typer.Option(help="Allow so much for life, at --delta.")] = None,
    delta: Annotated[float, typer.Option(help="δ of the cap, and of what is shown.")] = 1e-5,
    as_json: AsJson = False,
) -> None:
    """Show what a silo has spent over all treaties, or set the most it may ever spend."""
    from .governance import Budget, Cap
    from .privacy import accountant

    kept = Budget(folder, silo)
    if epsilon is not None:
        kept.allow(Cap(epsilon, delta))
    cap = kept.cap
    at = cap.delta if cap else delta
    spent = accountant.upper(kept.spent(), at)
    if as_json:
        print_json({"silo": silo, "spent": spent, "delta": at, "cap": cap.epsilon if cap else None})
        return
    limit = f"of at most {cap.epsilon:g}" if cap else "and there is no cap"
    out.print(f"{silo}: epsilon = {spent:.3f} spent at delta = {at:g}, {limit}", markup=False)


def _terms(unit, epsilon, noise_multiplier, delta, examples, batch, steps, rounds, silos) -> Any:
    from .errors import GuaranteeError
    from .privacy.plan import Terms

    common = {"unit": unit, "epsilon": epsilon, "noise_multiplier": noise_multiplier, "delta": delta, "rounds": rounds}
    if unit == "silo":
        return Terms(**common, silos=silos, expected=float(silos))
    if unit not in ("example", "author"):
        raise GuaranteeError("a unit: example, author or silo", unit, "Name one with --unit.")
    if examples is None:
        raise GuaranteeError(f"how many {unit}s a silo has, about", "none", "Add --examples 1000 (a public figure).")
    rate = min(1.0, batch / examples)
    return Terms(**common, rate=rate, divisor=float(batch), steps=steps or max(1, round(1 / rate)))


def _cost(made: Any) -> list[str]:
    """What a guarantee on whole silos means for learning."""
    if made.terms.local:
        return []
    ratios = ", ".join(f"{made.noise_ratio(n):,.0f} times for {n:,}" for n in (10_000, 1_000_000))
    return [
        f"noise             in a round's mean, over the longest update it can hold: {ratios} trained numbers",
        "                  Few silos cannot afford that: protect examples or authors instead (--unit example, author).",
    ]


def _said(f: dict[str, Any]) -> list[str]:
    rdp = f", {f['epsilon_rdp']:.3f} by RDP" if f["epsilon_rdp"] is not None else ""
    return [
        f"unit              {f['unit']} ({f['neighbours']})",
        f"epsilon           {f['epsilon']:.4f} at delta {f['delta']:g} (PLD, from above{rdp})",
        f"noise multiplier  {f['noise_multiplier']:.4f} (standard deviation over clip norm)",
        f"sampling rate     {f['sampling_rate']:g}",
        f"steps             {f['steps']:,}",
    ]
