"""The report of a run, its model card, and its summary on a terminal; all from the run's folder and nothing else."""

from __future__ import annotations

from pathlib import Path

from .card import model_card
from .console import summary_lines
from .folder import Run, read_run

__all__ = ["Run", "model_card", "read_run", "summary_lines", "write_report"]


def write_report(run: Path) -> Path:
    """Writes `report.html` into a run's folder and returns its path; see `html.write_report`."""
    from .html import write_report  # brings matplotlib, which `foedus --help` does without

    return write_report(run)
