"""Progress of a run: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .execute import Event

NAMES = {"federated": "federated", "pooled": "pooled", "base": "base model"}


def shown(events: Iterable[Event], show: bool = True, *, console: Console | None = None) -> Iterator[Event]:
    """The same events, shown as they pass: rounds, silos, loss, perplexity and remaining time."""
    console = console or Console(stderr=True)
    if not show:
        yield from events
    elif console.is_terminal:
        yield from _live(events, console)
    else:
        yield from _plain(events, console)


def _live(events: Iterable[Event], console: Console) -> Iterator[Event]:
    columns = (
        TextColumn("{task.description:>16}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[said]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, TaskID] = {}  # the silos that train alone take turns on one bar
        for event in events:
            kind = event.phase.split(":")[0]
            if event.kind == "silo":
                progress.console.print(_ready(event), style="dim", highlight=False)
            elif event.kind == "waiting":
                progress.console.print(f"waiting: {event.phase}", style="dim", highlight=False, markup=False)
            elif event.kind == "begin":
                if kind in tasks:
                    progress.remove_task(tasks[kind])
                tasks[kind] = progress.add_task(_name(event.phase), total=event.rounds, completed=event.round, said="")
            elif event.kind == "round":
                progress.update(tasks[kind], completed=event.round, said=_said(event))
            elif event.kind == "evaluation":
                progress.console.print(_evaluation(event), style="dim", highlight=False)
            yield event


def _plain(events: Iterable[Event], console: Console) -> Iterator[Event]:
    began, first = time.monotonic(), 0
    for event in events:
        if event.kind == "silo":
            console.print(_ready(event), highlight=False, soft_wrap=True)
        elif event.kind == "waiting":
            console.print(f"waiting: {event.phase}", highlight=False, soft_wrap=True, markup=False)
        elif event.kind == "begin":
            began, first = time.monotonic(), event.round
            if event.round:
                console.print(f"{_name(event.phase)}: goes on after round {event.round}", highlight=False)
        elif event.kind == "round":
            left = (time.monotonic() - began) / (event.round - first) * (event.rounds - event.round)
            console.print(
                f"{_name(event.phase)}: round {event.round}/{event.rounds}, {_said(event)}, about {left:.0f} s left",
                highlight=False, soft_wrap=True,
            )  # fmt: skip
        elif event.kind == "evaluation":
            console.print(_evaluation(event), highlight=False, soft_wrap=True)
        yield event


def _name(phase: str) -> str:
    return f"{phase.removeprefix('local:')} alone" if phase.startswith("local:") else NAMES.get(phase, phase)


def _ready(event: Event) -> str:
    return f"silo {event.round}/{event.rounds} is ready: {event.phase}"


def _said(event: Event) -> str:
    loss = event.row["loss"]
    silos, failures = event.row["silos"], event.row["failures"]
    words = [f"{len(silos)} silo{'s' * (len(silos) != 1)}", f"loss {loss:.3f}" if loss is not None else "no loss"]
    return ", ".join(words + [f"failed: {', '.join(failures)}"] * bool(failures))


def _evaluation(event: Event) -> str:
    figures = [f"perplexity {event.row['perplexity']['micro']:.2f}"]
    if "accuracy" in event.row:
        figures.append(f"accuracy {event.row['accuracy']['micro']:.1%}")
    return f"{_name(event.phase)}: {event.row['split']} after round {event.round}: {', '.join(figures)}"
