"""What a device can do."""

from __future__ import annotations

import torch


def wants_bf16(precision: str, device: torch.device) -> bool:
    """Resolve `auto`: bf16 where the processor has instructions for it, else fp32."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()  # no public name in torch 2.15
