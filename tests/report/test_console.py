from __future__ import annotations

import io

import pytest
from rich.console import Console

from foedus.report import summary_lines

from .conftest import STATEMENT, write_run


def printed(summary, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(summary_lines(summary))
    return console.file.getvalue()


def test_the_terminal_shows_every_domain_in_every_phase(tmp_path):
    summary = write_run(tmp_path / "run", labels=True)
    text = printed(summary)
    for phase in ("base", "local_only", "federated", "pooled"):
        for domain, value in summary["evaluation"][phase]["perplexity"]["by_domain"].items():
            assert any(line.strip().startswith(domain) and f"{value:.2f}" in line for line in text.splitlines())
    assert "Federated training lowered perplexity on 5 of 5" in text and "Accuracy" in text
    assert STATEMENT[:38] in text


def test_names_are_not_taken_for_markup(tmp_path):
    assert "[bold]x[/bold]" in printed(write_run(tmp_path / "run", names=["[bold]x[/bold]", "[/red]"]))


@pytest.mark.parametrize("width", [40, 80])
def test_a_narrow_terminal_gets_whole_numbers(tmp_path, width):
    summary = write_run(tmp_path / "run", alone=False)
    micro = summary["evaluation"]["federated"]["perplexity"]["micro"]
    assert f"{micro:.2f}" in printed(summary, width)


def test_many_domains_are_cut_with_a_word_where_the_rest_is(tmp_path):
    assert "20 more in the report" in printed(write_run(tmp_path / "run", silos=60, rounds=1, alone=False))


def test_a_summary_without_evaluation_prints_a_sentence():
    assert "No evaluation" in printed({})
