"""What a training uses of its machine, for MLflow's "System metrics"."""

from __future__ import annotations

import resource
import time

import torch

SYSTEM = ("system/cpu_cores_used", "system/peak_memory_megabytes", "system/gpu_peak_memory_megabytes")


class Usage:
    """Measures what this process uses. Peaks are since the process began."""

    def __init__(self) -> None:
        self.at = time.process_time(), time.monotonic()

    def since_last(self) -> dict[str, float]:
        """The numbers of `SYSTEM` since the last call; those of a GPU only if it is used."""
        before, self.at = self.at, (time.process_time(), time.monotonic())
        cores = (self.at[0] - before[0]) / max(self.at[1] - before[1], 1e-3)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux gives KiB
        gpu = [torch.cuda.max_memory_allocated() / 2**20] if torch.cuda.is_initialized() else []
        return dict(zip(SYSTEM, (cores, memory, *gpu), strict=False))
