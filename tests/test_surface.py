"""What users hold on to: public names, commands in the README, its Python, and the treaties that ship."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import typer

import foedus
from foedus.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_public_names_are_these():
    assert foedus.__all__ == [
        "FederatedTrainer", "FoedusError", "Full", "Key", "Ledger", "LoRA", "Receipt", "Release", "Report", "RunFolder",
        "Stage", "State", "Task", "Total", "Treaty", "Tree", "Update", "begin", "build", "execute", "fetch", "load",
        "load_base", "parse", "run",
    ]  # fmt: skip
    for name in foedus.__all__:
        assert getattr(foedus, name).__doc__ or name in ("Key", "Tree")
    for file in ("build", "execute"):
        import_module(f"foedus.{file}")
    assert all(not isinstance(getattr(foedus, name), ModuleType) for name in foedus.__all__)
    with pytest.raises(AttributeError, match="nothing_of_ours"):
        _ = foedus.nothing_of_ours


def commands() -> list[list[str]]:
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("foedus ")]


def test_every_command_in_the_readme_exists_and_takes_these_words():
    group = typer.main.get_command(app)
    assert {words[1] for words in commands()} == set(group.commands)
    for _, name, *words in commands():
        group.commands[name].make_context(name, list(words))


def test_every_treaty_in_the_readme_and_in_the_folder_is_there():
    for words in commands():
        for word in words:
            assert not word.endswith(".toml") or (ROOT / word).exists(), word


def test_the_readmes_python_runs(tmp_path):
    (code,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "adapter/adapter_model.safetensors").exists()
    perplexity, at_a = map(float, done.stdout.split())
    assert perplexity > 1 and at_a > 1


def test_the_makefile_has_the_two_doors():
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^demo:", makefile, re.MULTILINE) and re.search(r"^test:", makefile, re.MULTILINE)
    assert "make test" in (ROOT / ".ci/run").read_text()


def test_doctests_hold():
    import doctest

    from foedus import errors, wire

    for module in (errors, wire):
        result = doctest.testmod(module)
        assert result.attempted and not result.failed
