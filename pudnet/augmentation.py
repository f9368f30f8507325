"""Augmentation: random changes of training images that leave their classes as they are."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

# Nothing, random shifts by up to an eighth of the image (reflected at its border), or shifts and mirror images.
Augmentation = Literal["none", "shift", "shift_mirror"]
AUGMENTATIONS = get_args(Augmentation)


def augmented(images: Tensor, how: Augmentation, generator: torch.Generator | None = None) -> Tensor:
    """Change each of the images (N, C, H, W) by itself. `generator` is on their device; None: torch's own."""
    if how == "none":
        return images
    n, _, height, width = images.shape
    reach = max(1, height // 8)
    rows, columns = (_shifted(n, size, reach, images.device, generator) for size in (height, width))  # (N, H), (N, W)
    if how == "shift_mirror":
        mirrored = torch.rand(n, 1, device=images.device, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    index = torch.arange(n, device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _shifted(n: int, size: int, reach: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """The pixel indices (N, size) along an axis after random shifts, reflected at both ends."""
    shift = torch.randint(-reach, reach + 1, (n, 1), device=device, generator=generator)
    pixels = (torch.arange(size, device=device) + shift).abs()
    return torch.where(pixels < size, pixels, 2 * (size - 1) - pixels)
