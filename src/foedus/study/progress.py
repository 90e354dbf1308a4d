"""Progress of a study: one bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from .conduct import Progress


def shown(steps: Iterable[Progress], console: Console) -> Iterator[Progress]:
    """The same steps, shown as they pass: cells done, running and failed, and the time that is left, about."""
    if not console.is_terminal:
        for step in steps:
            if said := _line(step):
                console.print(said, highlight=False, markup=False, soft_wrap=True)
            yield step
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[said]}"), TimeElapsedColumn())
    with Bar(*columns, console=console) as bar:
        task = bar.add_task("cells", total=None, said="")
        for step in steps:
            bar.update(task, total=step.total, completed=step.done + step.failed, said=_counts(step))
            if step.event is not None and step.event.kind in ("done", "failed"):
                bar.console.print(_line(step), style="dim", highlight=False, markup=False)
            yield step


def _line(step: Progress) -> str:
    event = step.event
    if event is None or event.kind == "kept":
        return ""
    said = {"begin": "begins", "done": f"done in {_time(event.seconds)}", "failed": f"FAILED: {event.error}"}
    return f"{step.done + step.failed}/{step.total} cells, {_counts(step)}: {event.cell.name} {said[event.kind]}"


def _counts(step: Progress) -> str:
    words = [f"{step.running} running"] + [f"{step.failed} failed"] * bool(step.failed)
    return ", ".join([*words, *([f"about {_time(step.left)} left"] if step.left else [])])


def _time(seconds: float) -> str:
    from ..report.words import seconds_text

    return seconds_text(seconds)
