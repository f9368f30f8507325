"""Differences between devices: precision, denormal numbers, timing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch


def wants_bf16(precision: str, device: torch.device) -> bool:
    """Whether to compute in bf16. `auto`: if the processor has instructions for it."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()  # torch 2.15 has no public name for it


def full_precision(device: torch.device) -> torch.autocast:
    """A block in which autocast is off: products of closed forms, and losses, are as precise as their inputs."""
    return torch.autocast(device.type, enabled=False)


@contextlib.contextmanager
def flushing_denormals(device: torch.device) -> Iterator[None]:
    """Treat denormal numbers as zero inside the block, since a CPU is several times slower with them.

    They occur as gradients when a group's loss is close to zero. Only the calling thread is switched, and threads that
    torch starts meanwhile, which stay so. So with several threads some denormal numbers may remain.
    """
    if device.type != "cpu":
        yield
        return
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def seed_random(seed: int, device: torch.device) -> None:
    """Seed the random numbers of the CPU and of this device. (`torch.manual_seed` seeds all GPUs.)"""
    torch.default_generator.manual_seed(int(seed))
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(int(seed))


def clock(device: torch.device) -> float:
    """The time in milliseconds, read after the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * time.perf_counter()
