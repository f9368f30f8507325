"""Class filters: kernels that tell a group's classes apart, solved for in closed form from its labelled images.

The paper's sketch is a mean over images that forgets their labels, and its generators reach few directions of a
layer's weights. These filters are a sketch of the other kind, one token a class in the space of the weights
themselves: no gradient at test time, and nothing to learn but what they are added to, how strongly, and a penalty.
"""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pudnet.ridge import at_least_fp32, normalized_rows, one_hot, ridge_weights
from pudnet.targets import ConvShape


def mean_patches(maps: Tensor, conv: nn.Conv2d, grid: int = 1) -> Tensor:
    """The patch that a convolution sees of its input maps (..., d_in, H, W), averaged over each region: (..., R, p).

    In fp32; p = d_in f f, in the order of the convolution's weights. The regions are those of `regions`, of its output.
    """
    before, after = _padding(conv)
    maps = at_least_fp32(maps)
    if conv.padding_mode != "zeros":
        padding = (before[1], after[1], before[0], after[0])  # of (N, d_in, H, W) alone: groups and images as one
        maps = F.pad(maps.flatten(0, -4), padding, conv.padding_mode).unflatten(0, maps.shape[:-3])
        before = after = [0, 0]
    sides = zip(maps.shape[-2:], before, after, conv.kernel_size, conv.dilation, conv.stride, strict=True)
    weights = _patch_weights(tuple(Side(*side) for side in sides), grid, maps.device).to(maps.dtype)
    patches = maps.flatten(-2) @ weights  # (..., d_in, R f f)
    return patches.unflatten(-1, (-1, math.prod(conv.kernel_size))).transpose(-3, -2).flatten(-2)


class Side(NamedTuple):
    """A convolution along one side of its input maps: pixels, padding, taps and how far they are apart."""

    size: int
    before: int
    after: int
    kernel: int
    dilation: int
    stride: int

    @property
    def positions(self) -> int:
        """Of its output."""
        return (self.size + self.before + self.after - self.dilation * (self.kernel - 1) - 1) // self.stride + 1

    def taps(self, positions: range) -> Tensor:
        """How much each pixel counts in what each tap sees on average over positions: (f, size)."""
        weights = torch.zeros(self.kernel, self.size)
        for tap, position in itertools.product(range(self.kernel), positions):
            pixel = position * self.stride + tap * self.dilation - self.before
            if 0 <= pixel < self.size:  # padding is zeros
                weights[tap, pixel] += 1 / len(positions)
        return weights


@cache
@torch.inference_mode(False)  # it is kept: training may want it next
def _patch_weights(sides: tuple[Side, Side], grid: int, device: torch.device) -> Tensor:
    """How much each pixel counts in each region's mean patch: (H W, R f f), kept where it is used."""
    windows = regions(*(side.positions for side in sides), grid)
    taps = [[side.taps(part) for side, part in zip(sides, window, strict=True)] for window in windows]
    weights = torch.stack([torch.einsum("ah,bw->hwab", *window) for window in taps], 2)
    return weights.flatten(2).flatten(0, 1).to(device)


def regions(height: int, width: int, grid: int) -> list[tuple[range, range]]:
    """Rows and columns of the whole of a map and of grid x grid windows of half its sides, evenly spread.

    Of a map with a side of less than 4, and with a grid of 1, the whole alone.
    """
    whole = [(range(height), range(width))]
    if grid == 1 or min(height, width) < 4:
        return whole
    starts = ([round(i * (n - n // 2) / (grid - 1)) for i in range(grid)] for n in (height, width))
    return whole + [(range(i, i + height // 2), range(j, j + width // 2)) for i, j in itertools.product(*starts)]


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
    y = one_hot(labels, classes).to(x.dtype)
    y = (y - y.mean(0)).expand(*x.shape[:-1], classes)
    return F.normalize(ridge_weights(x, y, ridge), dim=-1)


class ClassFilters(nn.Module):
    r"""Adds a group's class filters to one layer's kernels, one after the other to its output channels.

    Each class has a filter for every one of R regions of the map, since what tells classes apart differs between
    them and the target's features keep their positions. :math:`W_o = B_o + \alpha_o\, r_{o \bmod R k}`, with
    :math:`\alpha` learned, from half the norm of He's kernels on. Of more filters than channels each channel gets
    several, averaged so that its share stays of one size.
    """

    def __init__(self, conv: ConvShape, grid: int) -> None:
        super().__init__()
        self.conv, self.grid = conv, grid
        norm = conv.he_std * math.sqrt(math.prod(conv.shape[1:]))
        self.strength = nn.Parameter(torch.full((conv.shape[0], 1), norm / 2))
        self.log_ridge = nn.Parameter(torch.tensor(-1.0))  # a penalty of 0.37

    def layer(self, network: nn.Module) -> nn.Conv2d:
        """The convolution of a target network that the filters are of."""
        return network.get_submodule(self.conv.module)

    def solve(self, maps: Tensor, conv: nn.Conv2d, labels: Tensor, classes: int) -> Tensor:
        """Maps (..., N, d_in, H, W) that `conv` is given, labels (N,) in 0..k-1 -> class filters (..., R k, p).

        Leading dimensions are groups, whose images have the same labels in the same order.
        """
        patches = mean_patches(maps, conv, self.grid).transpose(-3, -2)  # (..., R, N, p)
        return class_filters(patches, labels, classes, self.log_ridge.exp()).flatten(-3, -2)

    def forward(self, filters: Tensor) -> Tensor:
        """Class filters (..., R k, p) -> what they add to the kernels (..., d_out, d_in, f, f)."""
        channels, count = len(self.strength), filters.shape[-2]
        place = torch.arange(channels, device=filters.device)[:, None] - torch.arange(count, device=filters.device)
        share = (place % min(channels, count) == 0).to(filters.dtype)  # (d_out, R k)
        share = share / share.sum(1, keepdim=True).sqrt()
        added = self.strength * (share @ filters)  # (..., d_out, p)
        return added.unflatten(-1, self.conv.shape[1:])
