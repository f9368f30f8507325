"""What a device can do."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch


def wants_bf16(precision: str, device: torch.device) -> bool:
    """Resolve `auto`: bf16 where the processor has instructions for it, else fp32."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()  # no public name in torch 2.15


@contextlib.contextmanager
def flushing_denormals(device: torch.device) -> Iterator[None]:
    """Take denormal numbers for zero on a CPU, meanwhile, which is several times slower with them.

    Gradients are denormal where a group is solved. The process's other arithmetic is left as it is.
    """
    if device.type != "cpu":
        yield
        return
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def clock(device: torch.device) -> float:
    """Milliseconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * time.perf_counter()
