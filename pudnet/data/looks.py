"""Looks of images: how a set of images differs from another that shows the same things.

A look is a pure function of images (N, C, H, W) in 0..1, which gives images of the same shape. The result may leave
0..1 and is then clipped. Tables of groups name an image and its look by one index: look x images of the store + row,
where the look is a position in `LOOKS`. So an index without a look is one of the plain image.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NOISES = 65_536  # how many different noises there are; an image's own depends on its pixels
NOISE, CONTRAST, DARKER = 0.2, 0.2, 3.0  # standard deviation, factor, power


def blurred(images: Tensor) -> Tensor:
    """The mean of each pixel's 5 x 5 neighbours; the border is repeated outwards."""
    return F.avg_pool2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), 5, stride=1)


def noisy(images: Tensor) -> Tensor:
    """Add Gaussian noise, always the same for the same image."""
    levels = (images.flatten(1) * 255).round().long()
    start = (levels * torch.arange(1, levels.shape[1] + 1, device=images.device)).sum(1) % NOISES
    noise = _noise(levels.shape[1]).to(images.device)
    return images + noise[start[:, None] + torch.arange(levels.shape[1], device=images.device)].view_as(images)


@cache
def _noise(values: int) -> Tensor:
    """Noise for images of so many values: a part from each of NOISES starts."""
    return torch.from_numpy(np.random.default_rng(0).normal(0, NOISE, NOISES + values).astype(np.float32))


def on_colour(images: Tensor, colour: tuple[float, float, float]) -> Tensor:
    """Give what is dark a colour, most of all a black background. (An image of one channel gets the first value.)"""
    paint = torch.tensor(colour[: images.shape[1]], device=images.device)[:, None, None]
    return images + (1 - images.amax(1, keepdim=True)) * paint


def edges(images: Tensor) -> Tensor:
    """How much each channel changes from a pixel to the next, to the right and downwards."""
    right, down = _differences(images)
    return right.abs() + down.abs()


def embossed(images: Tensor) -> Tensor:
    """As if lit from a corner: grey where nothing changes."""
    right, down = _differences(images)
    return 0.5 + right + down


def _differences(images: Tensor) -> tuple[Tensor, Tensor]:
    beyond = F.pad(images, (0, 1, 0, 1), mode="replicate")
    return beyond[..., :-1, 1:] - images, beyond[..., 1:, :-1] - images


def coarse(images: Tensor) -> Tensor:
    """Squares of one colour, 8 on a side."""
    return F.interpolate(F.adaptive_avg_pool2d(images, 8), size=images.shape[-2:])


def small(images: Tensor) -> Tensor:
    """Half as high and wide, in the middle of a grey frame."""
    size = images.shape[-1]
    before, after = size // 4, size - size // 2 - size // 4
    return F.pad(F.adaptive_avg_pool2d(images, size // 2), (before, after, before, after), value=0.5)


def barred(images: Tensor) -> Tensor:
    """Two of every eight columns of pixels are grey."""
    hidden = torch.arange(images.shape[-1], device=images.device) % 8 >= 6
    return images.masked_fill(hidden, 0.5)


def turned(images: Tensor, quarters: int) -> Tensor:
    """Turn to the left by so many quarters."""
    return images.rot90(quarters, (2, 3))


# New ones at the end, since the groups of a table have their positions.
LOOKS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda images: images,
    "grey": lambda images: images.mean(1, keepdim=True).expand_as(images),
    "inverted": lambda images: 1 - images,
    "exchanged": lambda images: images.flip(1),  # red and blue
    "turned_90": partial(turned, quarters=1),
    "turned_180": partial(turned, quarters=2),
    "turned_270": partial(turned, quarters=3),
    "blurred": blurred,
    "noisy": noisy,
    "low_contrast": lambda images: 0.5 + CONTRAST * (images - 0.5),
    "dark": lambda images: images**DARKER,
    "small": small,
    "on_red": partial(on_colour, colour=(0.8, 0.2, 0.1)),
    "on_blue": partial(on_colour, colour=(0.1, 0.3, 0.9)),
    "edges": edges,
    "embossed": embossed,
    "solarized": lambda images: torch.minimum(images, 1 - images) * 2,
    "coarse": coarse,
    "barred": barred,
}


def with_looks(images: Tensor, looks: Tensor) -> Tensor:
    """Give images, uint8 (..., H, W, C), each the look of this number (...), which `looks` has on the same device."""
    changed, functions = images.clone(), list(LOOKS.values())
    for number in looks.unique().tolist():
        own = looks == number
        pixels = functions[number](images[own].movedim(-1, 1).float() / 255)
        changed[own] = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).movedim(1, -1)
    return changed
