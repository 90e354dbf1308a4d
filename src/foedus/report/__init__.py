"""The report of a run, its model card, and its summary on a terminal; all from the run's folder and nothing else."""

from __future__ import annotations

from pathlib import Path

from .card import model_card
from .console import summary_lines
from .folder import Run, read_run

__all__ = ["Run", "model_card", "read_run", "summary_lines", "write_report", "write_study"]


def write_report(run: Path) -> Path:
    """Writes `report.html` into a run's folder and returns its path; see `html.write_report`."""
    from .html import write_report  # brings matplotlib, which `foedus --help` does without

    return write_report(run)


def write_study(folder: Path) -> Path:
    """Writes the pages of a study into its folder and returns the main one's path; see `study.write_study`."""
    from .study import write_study

    return write_study(folder)
