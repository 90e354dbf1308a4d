"""What a run ran on: versions and hardware, for the summary. No host name, no user name, no path."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

PACKAGES = ("foedus", "torch", "transformers", "peft", "datasets", "numpy", "safetensors")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide about results."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def hardware() -> dict[str, str | int | float]:
    """Processor, cores, threads in use, memory in GiB, and the accelerator if there is one."""
    facts: dict[str, str | int | float] = {
        "cpu": _cpu(),
        "cores": len(psutil.Process().cpu_affinity()),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        facts["accelerator"] = torch.cuda.get_device_name()
    return facts


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
