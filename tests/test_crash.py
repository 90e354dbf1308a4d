"""`kill -9` at any moment, then resume: the adapter is the one that an uninterrupted run ends in, bit for bit."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from foedus.governance import verify

KILLS = 12


def work(treaty: Path, run: Path) -> None:
    """In a process of its own: begin the run, or go on with it, to the end."""
    import torch

    from foedus.build import build
    from foedus.execute import begin, execute, treaty_of
    from foedus.governance import RunFolder
    from foedus.treaty import load

    torch.set_num_threads(1)
    folder = RunFolder.open(run) if (run / "treaty.toml").exists() else begin(load(treaty), run)
    for _ in execute(folder, build(treaty_of(folder))):
        pass


@pytest.fixture(scope="module")
def processes():
    """Processes that start in milliseconds, from a server that has imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["foedus.execute", "tests.test_crash"])
    return context


def finish(processes, treaty: Path, run: Path) -> float:
    began = time.monotonic()
    process = processes.Process(target=work, args=(treaty, run))
    process.start()
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - began


@pytest.mark.parametrize("seed", [0])
def test_a_run_killed_at_random_moments_ends_in_the_same_adapter(treaty, tmp_path, processes, seed):
    file = treaty.folder / "treaty.toml"
    finish(processes, file, tmp_path / "whole")  # also starts the server
    seconds = finish(processes, file, tmp_path / "again")
    whole = (tmp_path / "whole/adapter/adapter_model.safetensors").read_bytes()
    assert whole == (tmp_path / "again/adapter/adapter_model.safetensors").read_bytes()

    chance, kills, runs = random.Random(seed), 0, 0
    while kills < KILLS:
        run = tmp_path / f"killed-{runs}"
        runs += 1
        while True:
            process = processes.Process(target=work, args=(file, run))
            process.start()
            process.join(chance.uniform(0.0, seconds))
            if process.exitcode is not None:
                break
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
        assert process.exitcode == 0
        assert (run / "adapter/adapter_model.safetensors").read_bytes() == whole
        rounds = [r for r in verify(run / "ledger.jsonl") if r["kind"] == "round"]
        assert [r["body"]["round"] for r in rounds] == [1, 2, 3]
    assert kills >= 10
