"""From a study to its cells: one treaty for each method, point and seed, each once, however many figures it serves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import FoedusError
from ..treaty import Mistakes, Treaty, load
from ..treaty.mistakes import Problem
from .spec import Change, Study

SHORT = 16
"""Letters of a digest that name a folder."""

TABLE, CURVE, ABLATION = "table", "curve", "ablation"


@dataclass(frozen=True)
class Cell:
    """One run to be made and measured. `name`: for readers, of its first use; `digest`: of its treaty; `far`: whether a
    curve over shift shows it.
    """

    name: str
    digest: str
    treaty: Treaty
    far: bool = False

    @property
    def key(self) -> str:
        """Its folder's name: the beginning of its treaty's digest, so that equal treaties share a run."""
        return self.digest[:SHORT]

    def told(self, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """What `measure` is told for it, of what the study says."""
        return settings if self.far else {**settings, "far": None}


@dataclass(frozen=True)
class Use:
    """Where a cell's figures go. `part`: (table), (curve, its key) or (ablation, its key); `row`: the method or the
    variant; `column`: the point's index on a curve, else 0.
    """

    part: tuple[str, ...]
    row: str
    column: int
    seed: int
    cell: str


@dataclass(frozen=True)
class Plan:
    """All cells of a study, in the order in which they are made, and what each is for."""

    cells: tuple[Cell, ...]
    uses: tuple[Use, ...]

    def by_key(self) -> dict[str, Cell]:
        """The cells by the names of their folders."""
        return {cell.key: cell for cell in self.cells}


def plan(study: Study, file: Path) -> Plan:
    """The cells of the study that was read from `file`, against which the base treaty's path is read.

    Seeds are the outer loop, so that a study that is stopped has whole tables of fewer seeds. Raises `Mistakes` with
    every combination that is no treaty, before anything runs.
    """
    base = _base(study, file)
    cells: dict[str, Cell] = {}
    uses: list[Use] = []
    problems: list[Problem] = []
    for part, row, column, seed, name, changes in sorted(_wanted(study), key=lambda wanted: wanted[0] != (TABLE,)):
        try:
            treaty = base.replace(**changes, **{"treaty.seed": seed})
        except FoedusError as error:
            problems += [p for p in _said(error, f"{file}: {name}") if str(p) not in map(str, problems)]
            continue
        cell = Cell(f"{name}, seed {seed}", treaty.digest(), treaty)
        kept = cells.setdefault(cell.key, cell)
        uses.append(Use(part, row, column, seed, kept.key))
    if problems:
        raise Mistakes(problems)
    shown = {key for curve in study.curve if curve.source == "shift" for key in curve.methods}
    far = {use.cell for use in uses if use.part == (TABLE,) and use.row in shown}
    return Plan(tuple(replace(cell, far=cell.key in far) for cell in cells.values()), tuple(uses))


Wanted = tuple[tuple[str, ...], str, int, int, str, dict[str, Any]]


def _wanted(study: Study) -> Iterator[Wanted]:
    """(part, row, column, seed, name, changes) of every figure."""
    methods, common = study.methods(), study.study
    for seed in common.seeds:
        for method in study.method:
            if method.table:
                yield (TABLE,), method.key, 0, seed, method.key, _together(common, method)
    for curve in study.curve:
        if curve.source == "shift":
            continue
        for seed in curve.seeds or common.seeds:
            for key in curve.methods:
                for column, point in enumerate(curve.point):
                    name = f"{key}, {curve.key} {point.label}"
                    yield (CURVE, curve.key), key, column, seed, name, _together(common, methods[key], point)
    for ablation in study.ablation:
        whole = methods[ablation.of]
        for seed in ablation.seeds or common.seeds:
            yield (ABLATION, ablation.key), whole.key, 0, seed, whole.key, _together(common, whole)
            for variant in ablation.variant:
                name = f"{whole.key}, {variant.key}"
                yield (ABLATION, ablation.key), variant.key, 0, seed, name, _together(common, whole, variant)


def _together(*changes: Change) -> dict[str, Any]:
    """Later ones win."""
    return {key: x for change in changes for key, x in change.changes().items()}


def _base(study: Study, file: Path) -> Treaty:
    """The base treaty; while validation data decide, one that does not even name the test data."""
    base = load(file.parent / study.study.treaty)
    if study.study.split == "test" or base.data.test_source is None:
        return base
    return base.replace(**{"data.test_source": None, "split.test": 0.0})


def _said(error: FoedusError, where: str) -> Iterator[Problem]:
    for one in getattr(error, "problems", (error,)):
        yield Problem(one.expected, one.came, one.do, f"{where}: {one.where}" if one.where else where)


def settings(study: Study) -> Mapping[str, Any]:
    """What a study says to `measure`, see `Cell.told`; a cell that was measured otherwise is measured anew."""
    return {"split": study.study.split, **study.measure.model_dump(mode="json")}
