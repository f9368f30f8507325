"""Peak memory, each measured in a process of its own: a process's peak never falls."""

from __future__ import annotations

import resource
import subprocess
import sys

import torch


def peak_of(benchmark: str, target: str, *options: str) -> float:
    """Peak memory (MB) of `python -m BENCHMARK --memory TARGET OPTIONS`, which prints it last."""
    command = [sys.executable, "-m", benchmark, "--memory", target, *options]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def peak_so_far(device: torch.device) -> float:
    """Peak memory (MB) of this process: the GPU's where there is one, else what was resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux: kB
