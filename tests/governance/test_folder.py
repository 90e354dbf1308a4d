"""A run's folder: what was there survives a crash, a full disk and damage; errors name what is still whole."""

import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest

from foedus.errors import RunError
from foedus.governance import RunFolder
from foedus.types import State


def state(round: int) -> State:
    return State(
        round=round,
        params={"w": np.full(4, round, np.float32)},
        optimizer={("m", "w"): np.ones(4, np.float32)},
        settings={"clip": 0.5},
        extra={("control", "w"): np.zeros(4)},
    )


MEMORY = {"silo/ö": {("exp_avg", "w"): np.arange(3.0)}}


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path / "run", "[treaty]\n")


def test_a_checkpoint_is_restored_as_it_was(folder):
    folder.checkpoint("federated", state(3), MEMORY)
    restored, memories = folder.restore("federated")
    assert (restored.round, restored.settings) == (3, {"clip": 0.5})
    np.testing.assert_array_equal(restored.params["w"], state(3).params["w"])
    assert restored.optimizer.keys() == {("m", "w")} and restored.extra.keys() == {("control", "w")}
    np.testing.assert_array_equal(memories["silo/ö"]["exp_avg", "w"], np.arange(3.0))


def test_the_last_two_checkpoints_are_kept(folder):
    for round in range(1, 6):
        folder.checkpoint("federated", state(round), {})
    assert folder.restore("federated")[0].round == 5
    assert folder.restore("federated", 4)[0].round == 4
    assert len(list((folder.path / "checkpoints").glob("*.safetensors"))) == 2
    with pytest.raises(RunError, match="round 4, 5"):
        folder.restore("federated", 1)


@pytest.mark.parametrize("damage", [lambda b: b[:-5], lambda b: b"", lambda b: bytes([b[0] ^ 1]) + b[1:], None])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_whole(folder, damage):
    folder.checkpoint("federated", state(1), {})
    folder.checkpoint("federated", state(2), {})
    file = folder.path / "checkpoints" / "federated-00002.safetensors"
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(RunError, match="round 1 is whole"):
        folder.restore("federated")
    assert folder.restore("federated", 1)[0].round == 1


def test_a_disk_that_takes_no_more_leaves_what_was_there(folder):
    """A real limit on file size, in a process of its own, stands for the full disk."""
    folder.checkpoint("federated", state(1), {})
    code = (
        "import numpy as np, sys, pathlib\n"
        "from foedus.errors import RunError\n"
        "from foedus.governance import RunFolder\n"
        "from foedus.types import State\n"
        "folder = RunFolder.open(pathlib.Path(sys.argv[1]))\n"
        "try:\n"
        "    folder.checkpoint('federated', State(2, {'w': np.zeros(100_000)}), {})\n"
        "except RunError as error:\n"
        "    print(error)\n"
    )

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    said = subprocess.run(
        [sys.executable, "-c", code, str(folder.path)], capture_output=True, text=True, preexec_fn=limit, check=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    ).stdout  # fmt: skip
    assert "What was there before is untouched" in said and "resume" in said
    assert folder.restore("federated")[0].round == 1
    assert not list((folder.path / "checkpoints").glob(".*"))


def test_a_run_is_never_started_over_another(folder):
    with pytest.raises(RunError, match="already there.*resume"):
        RunFolder.create(folder.path, "")


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="treaty.toml"):
        RunFolder.open(tmp_path)
    with pytest.raises(RunError, match="nothing there"):
        RunFolder.open(tmp_path / "nowhere")


def test_two_processes_cannot_run_one_folder(folder):
    other = RunFolder.open(folder.path)
    with folder.lock(), folder.lock():  # whoever has it may take it again
        pass
    with folder.lock():
        with folder.lock():
            pass
        with pytest.raises(RunError, match="another process"), other.lock():
            pass
    with other.lock():
        pass


def test_a_torn_line_of_metrics_is_left_out(folder):
    folder.metric({"kind": "round", "loss": float("nan")})
    with (folder.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind":"ro')
    assert folder.metrics() == [{"kind": "round", "loss": None}]
