"""Class filters: kernels that tell a group's classes apart, solved for in closed form from its labelled images.

The paper's sketch is a mean over images that forgets their labels, and its generators reach few directions of a
layer's weights. These filters are a sketch of the other kind, one token a class in the space of the weights
themselves: no gradient at test time, and nothing to learn but what they are added to, and how strongly.
"""

from __future__ import annotations

import itertools
import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pudnet.ridge import normalized_rows, ridge_weights
from pudnet.targets import ConvShape


def mean_patches(maps: Tensor, conv: nn.Conv2d, grid: int = 1) -> Tensor:
    """The patch that a convolution sees of its input maps (N, d_in, H, W), averaged over each region: (N, R, p), fp32.

    p = d_in f f, in the order of the convolution's weights. The regions are those of `regions`, of its output.
    """
    before, after = _padding(conv)
    around = (before[1], after[1], before[0], after[0])
    weights = _patch_weights(tuple(maps.shape[2:]), around, conv.kernel_size, conv.dilation, conv.stride, grid)
    patches = maps.float().flatten(2) @ weights.to(maps.device)  # (N, d_in, R f f)
    return patches.unflatten(2, (-1, math.prod(conv.kernel_size))).transpose(1, 2).flatten(2)


@cache
def _patch_weights(
    side: tuple[int, int],
    around: tuple[int, ...],
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    stride: tuple[int, int],
    grid: int,
) -> Tensor:
    """How much each pixel counts in each region's mean patch: (H W, R f f)."""
    pixels = F.pad(torch.eye(math.prod(side)).view(-1, 1, *side), around)
    seen = F.unfold(pixels, kernel, dilation, stride=stride)  # (H W, f f, positions)
    sizes = zip(pixels.shape[2:], kernel, dilation, stride, strict=True)
    height, width = ((size - d * (f - 1) - 1) // s + 1 for size, f, d, s in sizes)
    return (regions(height, width, grid) @ seen.mT).flatten(1)


def regions(height: int, width: int, grid: int) -> Tensor:
    """Averages over the whole of a map and over grid x grid windows of half its sides, evenly spread: (R, H W).

    Of a map with a side of less than 4, and with a grid of 1, the whole alone.
    """
    whole = torch.ones(1, height, width)
    parts = [whole]
    if grid > 1 and min(height, width) >= 4:
        rows, columns = ([round(i * (n - n // 2) / (grid - 1)) for i in range(grid)] for n in (height, width))
        for i, j in itertools.product(rows, columns):
            part = torch.zeros_like(whole)
            part[:, i : i + height // 2, j : j + width // 2] = 1
            parts.append(part)
    weights = torch.cat(parts).flatten(1)
    return weights / weights.sum(1, keepdim=True)


def _padding(conv: nn.Conv2d) -> tuple[list[int], list[int]]:
    """Rows and columns of padding before the maps and after them."""
    if not isinstance(conv.padding, str):
        return list(conv.padding), list(conv.padding)
    total = [d * (f - 1) if conv.padding == "same" else 0 for d, f in zip(conv.dilation, conv.kernel_size, strict=True)]
    return [t // 2 for t in total], [t - t // 2 for t in total]


def class_filters(patches: Tensor, labels: Tensor, classes: int, ridge: Tensor | float) -> Tensor:
    """Ridge regression of the classes on mean patches (..., N, p), labels (N,) in 0..k-1: unit vectors (..., k, p).

    Of the patches about their mean, of unit mean square norm, and the one-hot labels about theirs.
    """
    x, _, _ = normalized_rows(patches)
    y = F.one_hot(labels, classes).float()
    y = (y - y.mean(0)).expand(*x.shape[:-1], classes)
    return F.normalize(ridge_weights(x, y, ridge), dim=-1)


class ClassFilters(nn.Module):
    r"""Adds a group's class filters to one layer's kernels, one after the other to its output channels.

    Each class has a filter for every one of R regions of the map, since what tells classes apart differs between
    them and the target's features keep their positions. :math:`W_o = B_o + \alpha_o\, r_{o \bmod R k}`, with
    :math:`\alpha` learned, from He's norm on. Of more filters than channels each channel gets several, averaged so
    that its share stays of one size.
    """

    def __init__(self, conv: ConvShape, grid: int) -> None:
        super().__init__()
        self.conv, self.grid = conv, grid
        norm = conv.he_std * math.sqrt(math.prod(conv.shape[1:]))
        self.strength = nn.Parameter(torch.full((conv.shape[0], 1), norm))
        self.log_ridge = nn.Parameter(torch.tensor(-1.0))

    def layer(self, network: nn.Module) -> nn.Conv2d:
        """The convolution of a target network that the filters are of."""
        return network.get_submodule(self.conv.module)

    def solve(self, maps: Tensor, conv: nn.Conv2d, labels: Tensor) -> Tensor:
        """Maps (N, d_in, H, W) that `conv` is given, and labels (N,) in 0..k-1 -> class filters (R k, p)."""
        patches = mean_patches(maps, conv, self.grid).transpose(0, 1)  # (R, N, p)
        return class_filters(patches, labels, int(labels.max()) + 1, self.log_ridge.exp()).flatten(0, 1)

    def forward(self, filters: Tensor) -> Tensor:
        """Class filters (..., R k, p) -> what they add to the kernels (..., d_out, d_in, f, f)."""
        channels, count = len(self.strength), filters.shape[-2]
        place = torch.arange(channels, device=filters.device)[:, None] - torch.arange(count, device=filters.device)
        share = (place % min(channels, count) == 0).float()  # (d_out, R k)
        share = share / share.sum(1, keepdim=True).sqrt()
        added = self.strength * (share @ filters)  # (..., d_out, p)
        return added.unflatten(-1, self.conv.shape[1:])
