"""A function in a process of its own: for peaks of memory, and for peers that start processes and write logs."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, called in a fresh Python process; `function` must stand in a module of this package.

    Raises `RuntimeError` with the last lines of what that process wrote, if it fails.
    """
    module = function.__module__
    if module == "__main__":  # python -m benchmarks.NAME
        module = sys.modules["__main__"].__spec__.name
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with tempfile.TemporaryDirectory() as folder:
        ask, answer = Path(folder) / "ask", Path(folder) / "answer"
        ask.write_bytes(pickle.dumps((module, function.__qualname__, args)))
        command = [sys.executable, "-m", __name__, str(ask), str(answer)]
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            cwd=Path(__file__).parents[1],
        )  # fmt: skip
        if done.returncode or not answer.exists():
            last = "\n".join(done.stdout.splitlines()[-30:])
            raise RuntimeError(f"{module}.{function.__qualname__} ended with {done.returncode}:\n{last}")
        return pickle.loads(answer.read_bytes())


def installed(*names: str) -> bool:
    """Whether these packages can be imported."""
    return all(find_spec(name) is not None for name in names)


def peak() -> int:
    """The most memory this process has had resident, in bytes.

    VmHWM belongs to the process as it is now; `ru_maxrss` would remember its parent's size at the fork.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


def _main(ask: str, answer: str) -> None:
    module, name, args = pickle.loads(Path(ask).read_bytes())
    result = getattr(import_module(module), name)(*args)
    Path(answer).write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    _main(*sys.argv[1:])
