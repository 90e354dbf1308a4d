"""`foedus study`: many runs, compared."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .console import AsJson, err, out, print_json


def study(
    file: Annotated[Path, typer.Argument(metavar="STUDY", help="A study, in TOML.")],
    folder: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Its folder; by default runs/studies/NAME.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time, which share the cores; by default the file's.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="PART", help="table, or the key of a curve, an ablation or a method.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Carry out a study, or go on with it: methods, curves and ablations over seeds, and pages that compare them.

    Exits with 1 when a run failed; the others went on, and the pages say so.
    """
    from .study.conduct import Conduct, read_results
    from .study.progress import shown

    command = shlex.join(["foedus", *sys.argv[1:]])
    made = Conduct.of(file, folder, jobs, only or (), command)
    try:
        for _ in shown(made.run(), err):
            pass
    except KeyboardInterrupt:
        err.print(f"Stopped. What is done is kept: the same command goes on. So far: {made.out / 'study.html'}")
        raise typer.Exit(130) from None
    results = read_results(made.out)
    failed = [cell for cell in results["cells"] if cell["status"] == "failed"]
    if as_json:
        print_json(results)
    else:
        _say(results, made.out)
    for cell in failed:
        err.print(f"[bold red]failed[/] {cell['name']}: ", end="")
        err.print(cell["error"], markup=False)
    if failed:
        raise typer.Exit(1)


def _say(results: Mapping[str, Any], folder: Path) -> None:
    from rich import box

    from .report.study import spelled, verdict

    metrics = [m for m in results["metrics"] if m["judged"] or m["key"] in ("epsilon", "bytes_up", "seconds")]
    table = Table("Method", *(m["title"] for m in metrics), box=box.SIMPLE_HEAD, pad_edge=False)
    for row in results["table"]["rows"]:
        bare = any(row["figures"].values()) and not row["guarantee"]
        name = f"{row['title']} (no guarantee)" if bare else row["title"]
        table.add_row(name, *(_styled(results, row, m, spelled(m, row["figures"][m["key"]])) for m in metrics))
    out.print(table)
    for sentence in verdict(results):
        out.print(sentence, markup=False)
    if results["simulated_noise"]:
        out.print("SIMULATED NOISE: nobody is protected by these runs.", markup=False)
    out.print(f"Study:   {folder / 'study.html'}\nResults: {folder / 'results.json'}", markup=False)


def _styled(results: Mapping[str, Any], row: Mapping[str, Any], metric: Mapping[str, Any], text: str) -> str:
    best = results["table"]["best"].get(metric["key"])
    bold = best and best["method"] == row["method"] and best["significant"]
    return f"[bold]{text}[/]" if bold else text
