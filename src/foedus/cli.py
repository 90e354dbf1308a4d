"""The command line. It adds no option that a treaty does not have; everything that prints figures also takes --json."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .cli_advise import advise, compliance, threats
from .cli_coordinator import app as coordinator_app
from .cli_coordinator import init, status
from .cli_dashboard import dashboard
from .cli_ledger import app as ledger_app
from .cli_privacy import app as privacy_app
from .cli_registry import app as registry_app
from .cli_registry import rollback
from .cli_silo import app as silo_app
from .cli_study import study
from .cli_treaty import app as treaty_app
from .console import AsJson, RunPath, TreatyFile, err, out, print_json
from .errors import FoedusError, GuaranteeError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Federated fine-tuning of language models that organisations can actually trust.",
)  # fmt: skip
GROUPS = {
    "privacy": privacy_app, "coordinator": coordinator_app, "silo": silo_app, "treaty": treaty_app,
    "ledger": ledger_app, "registry": registry_app,
}  # fmt: skip
for name, group in GROUPS.items():
    app.add_typer(group, name=name)
for command in (study, init, status, rollback, dashboard, compliance, threats, advise):
    app.command()(command)


class What(StrEnum):
    """What `foedus list` lists."""

    models = "models"
    datasets = "datasets"
    algorithms = "algorithms"
    optimizers = "optimizers"
    stages = "stages"
    mechanisms = "mechanisms"
    combinations = "combinations"


class Where(StrEnum):
    """Where silos run."""

    in_process = "in-process"
    processes = "processes"
    flower = "flower"


Engine = Annotated[
    Where | None,
    typer.Option(
        help="Where silos run: all in this process, each in one of its own, or with whoever they belong to. A run keeps"
        " what it began with."
    ),
]


@app.command()
def check(
    treaty: TreatyFile,
    more: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="FEATURE", help="Ask about the treaty with this beside it, such as krum."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Resolve a treaty: what goes together, what leaves a silo, bytes and time, and the guarantee. Trains nothing."""
    from .treaty import beside, describe, load, statement

    resolved = load(treaty)
    verdicts = _decided(beside(resolved.features(), more or ()), as_json)

    from .estimate import estimate

    place = _built(resolved)
    cost, guarantee, scrubbed = estimate(place), _guarantee(place), _scrubbed(place)
    if as_json:
        print_json({
            "treaty": resolved.tables(), "digest": resolved.digest(), "leaves": describe(resolved, cost.parameters),
            "combinations": verdicts, "estimate": vars(cost), "statement": statement(resolved, guarantee),
            "privacy": guarantee, "scrubbed": scrubbed,
        })  # fmt: skip
        return
    out.print(resolved.resolved(), markup=False)
    _print_verdicts(verdicts)
    out.print("[bold]What leaves a silo[/]")
    for line in describe(resolved, cost.parameters):
        out.print(f"  • {line}", markup=False)
    if scrubbed:
        out.print("\n[bold]What was scrubbed[/]")
    for silo, found in scrubbed.items():
        out.print(f"  • {silo}: {', '.join(f'{count:,} {kind}' for kind, count in found.items())}", markup=False)
    out.print("\n[bold]What it costs[/]")
    for line in _costs(cost, resolved.algorithm.rounds):
        out.print(f"  • {line}", markup=False)
    out.print("\n[bold]Guarantee[/]")
    out.print(statement(resolved, guarantee), markup=False)


@app.command()
def run(
    treaty: TreatyFile,
    out_folder: Annotated[Path | None, typer.Option("--out", metavar="RUN", help="A new folder for the run.")] = None,
    engine: Engine = None,
    home: Annotated[Path, typer.Option(metavar="DIR", help="The federation's home, with --engine flower.")] = Path(),
    as_json: AsJson = False,
) -> None:
    """Carry out a treaty, into a new folder: on this machine, or with the silos that signed it."""
    if engine is Where.flower:
        from .deploy.home import FederationHome
        from .deploy.run import begun

        folder, events = begun(FederationHome.at(home), treaty, out_folder)
        _shown(folder, events, as_json)
        return
    if out_folder is None:
        raise typer.BadParameter("Name a new folder with --out.")
    from .execute import begin
    from .governance import RunFolder
    from .treaty import load

    RunFolder.check_free(out_folder)
    place = _built(load(treaty))  # whatever is wrong with model or data shows before there is a folder
    _carry_out(begin(place.treaty, out_folder), place, engine, None, as_json)


@app.command()
def resume(
    run: RunPath,
    round: Annotated[int | None, typer.Option(metavar="N", help="Go back to the checkpoint of this round.")] = None,
    engine: Engine = None,
    as_json: AsJson = False,
) -> None:
    """Go on with a run after a crash; it ends as it would have without one."""
    from .execute import treaty_of
    from .governance import RunFolder

    folder = RunFolder.open(run)
    if (folder.read_json("engine.json") or {}).get("engine") == Where.flower:
        from .deploy.run import resumed

        _shown(folder, resumed(folder, round), as_json)
        return
    _carry_out(folder, _built(treaty_of(folder)), engine, round, as_json)


@app.command()
def report(run: RunPath, as_json: AsJson = False) -> None:
    """Write the report of a run anew, from what is in its folder, and print the result."""
    from .governance import RunFolder
    from .report import write_report
    from .report.console import summary_lines

    folder = RunFolder.open(run)
    page = write_report(folder.path)
    summary = folder.read_json("summary.json")
    if as_json:
        print_json({"report": str(page), "summary": summary})
        return
    if summary is not None:
        out.print(summary_lines(summary))
    out.print(f"Report: {page}", markup=False)


@app.command()
def audit(run: RunPath, as_json: AsJson = False) -> None:
    """Attack a finished run as an adversary would, and set what was found beside what it states."""
    from .auditing import audit as attack
    from .auditing import page_of, verdict_of
    from .execute import treaty_of
    from .governance import RunFolder

    folder = RunFolder.open(run)
    place = _built(treaty_of(folder))
    with err.status("Auditing …") if err.is_terminal else nullcontext() as status:
        found = attack(folder, place, lambda words: status.update(f"{words} …") if status else err.print(words))
    kind, said = verdict_of(found)
    if as_json:
        print_json({"verdict": kind, "said": said, "audit": found})
        return
    out.print(f"[bold]{kind.capitalize()}.[/]", end=" ")
    out.print(said, markup=False)
    out.print(f"Audit: {page_of(folder)}", markup=False)


@app.command("list")
def list_(what: Annotated[What, typer.Argument()], as_json: AsJson = False) -> None:
    """List what a treaty can name (models, datasets, algorithms, optimizers, ...), and what goes together."""
    from .listing import LISTINGS

    rows = LISTINGS[what.value]()
    if as_json:
        print_json(rows)
        return
    table = Table(*rows[0], box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(str, row.values()))
    out.print(table)


@app.command()
def fetch(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME ...]", help="By default, the demo's.")] = None,
    as_json: AsJson = False,
) -> None:
    """Bring models and data sets into the cache, verified; they work offline afterwards."""
    from .assets import fetch as bring

    fetched = {}
    for name in names or ["smollm2-135m-instruct", "20newsgroups"]:
        with _downloads(name) as progress:
            fetched[name] = str(bring(name, progress=progress))
    if as_json:
        print_json(fetched)
    else:
        for name, folder in fetched.items():
            out.print(f"{name}: {folder}", markup=False)


def main() -> None:
    """The entry point: prints errors of ours in their three parts, and exits with 2."""
    try:
        app()
    except FoedusError as error:
        for problem in getattr(error, "problems", (error,)):
            _explain(problem)
        raise SystemExit(2) from None


def _built(treaty: Any) -> Any:
    """The treaty's workplace; says what is going on, since a first time fetches and converts the model."""
    words = "Loading the model and the data"
    with err.status(f"{words} …") if err.is_terminal else nullcontext():
        from .build import build

        if not err.is_terminal:
            err.print(f"{words}; the first time takes longer")
        return build(treaty)


def _decided(features: Any, as_json: bool) -> list[dict[str, Any]]:
    """What the validity matrix says of these features together; raises `GuaranteeError` where it refuses."""
    from .treaty import decide

    rows = decide(features)
    verdicts = [
        {"number": row.number, "name": row.met(features), "verdict": row.verdict, "said": row.said,
         "reason": row.reason, "instead": row.instead} for row in rows
    ]  # fmt: skip
    refused = [row for row in rows if row.verdict == "refuse"]
    if refused:
        print_json({"combinations": verdicts}) if as_json else _print_verdicts(verdicts)
        raise GuaranteeError(
            "features that go together",
            "; ".join(row.met(features) for row in refused),
            " ".join(f"{row.reason} Instead: {row.instead}" for row in refused),
        )
    return verdicts


def _print_verdicts(verdicts: list[dict[str, Any]]) -> None:
    if not verdicts:
        return
    out.print("[bold]What goes together[/]")
    for row in verdicts:
        out.print(f"  • {row['name']}: {row['said']}", markup=False)
    out.print()


def _guarantee(place: Any) -> dict[str, Any] | None:
    from .privacy.plan import facts

    return facts(place.privacy) if place.privacy else None


def _scrubbed(place: Any) -> dict[str, dict[str, int]]:
    """Silo → kind of mark → how many its texts were given, and how many texts had nothing left ("dropped")."""
    from .data import holdings

    return {silo: held["scrubbed"] for silo, held in holdings(place.splits).items() if "scrubbed" in held}


def _carry_out(folder: Any, place: Any, engine: Where | None, round: int | None, as_json: bool) -> None:
    from .launch import carry_out

    _shown(folder, carry_out(folder, place, engine.value if engine else None, round=round), as_json)


def _shown(folder: Any, events: Any, as_json: bool) -> None:
    """A run's progress, and then its result."""
    from .progress import shown
    from .report.console import summary_lines

    summary: dict[str, Any] = {}
    try:
        with closing(events) as events:
            for event in shown(events, console=err):
                summary = dict(event.row) if event.kind == "done" else summary
    except KeyboardInterrupt:
        err.print(f"Stopped. The run goes on with `foedus resume {folder.path}`.", markup=False)
        raise typer.Exit(130) from None
    if as_json:
        print_json(summary)
        return
    out.print(summary_lines(summary))
    out.print(f"Adapter: {folder.path / 'adapter'}\nReport:  {folder.path / 'report.html'}", markup=False)


def _costs(cost: Any, rounds: int) -> list[str]:
    return [
        f"{cost.parameters:,} trained parameters",
        f"bytes of one silo in one round: {cost.bytes_down:,} down, {cost.bytes_up:,} up (exact)",
        f"bytes of the whole run: {cost.bytes_total / 1e6:,.1f} MB over {rounds} rounds",
        f"one local step takes {cost.step_seconds:.2f} s here; {cost.steps} of them a silo and round",
        f"about {cost.seconds / 60:.1f} minutes on this machine, with baselines and evaluations (give or take a third)",
    ]


def _explain(error: FoedusError) -> None:
    err.print(f"[bold red]{type(error).__name__}[/]", end="")
    err.print(f" {error.where}" if error.where else "", markup=False)
    for word, said in (("expected", error.expected), ("got", error.came), ("do", error.do)):
        err.print(f"  {word:>8}  {said}", markup=False)


@contextmanager
def _downloads(name: str) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for one asset; silent where there is no terminal."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal) as bar:
        task = bar.add_task(name, total=None)

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=f"{name}: {what}", completed=done, total=total)

        yield progress
