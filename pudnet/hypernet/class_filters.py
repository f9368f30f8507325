"""Class filters: kernels that tell a group's classes apart, solved in closed form from its labelled images.

The paper's sketch averages over images and ignores their labels, and its generators can only combine a few fixed
maps. A class filter uses the labels, and is itself a kernel: ridge regression gives one for each class, without any
gradient at test time. Training only learns the kernels that the filters are added to, how strongly, and a penalty.
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
    """Average the patches that a convolution sees in its input maps (..., d_in, H, W) over each region: (..., R, p).

    In fp32; p = d_in f f, ordered as the convolution's weights. `regions` divides the convolution's output.
    """
    before, after = _padding(conv)
    maps = at_least_fp32(maps)
    if conv.padding_mode != "zeros":
        padding = (before[1], after[1], before[0], after[0])  # F.pad takes (N, d_in, H, W), so groups are flattened
        maps = F.pad(maps.flatten(0, -4), padding, conv.padding_mode).unflatten(0, maps.shape[:-3])
        before = after = [0, 0]
    sides = zip(maps.shape[-2:], before, after, conv.kernel_size, conv.dilation, conv.stride, strict=True)
    weights = _patch_weights(tuple(Side(*side) for side in sides), grid, maps.device).to(maps.dtype)
    patches = maps.flatten(-2) @ weights  # (..., d_in, R f f)
    return patches.unflatten(-1, (-1, math.prod(conv.kernel_size))).transpose(-3, -2).flatten(-2)


class Side(NamedTuple):
    """A convolution along one axis of its input maps: pixels, padding, taps, their distance and the stride."""

    size: int
    before: int
    after: int
    kernel: int
    dilation: int
    stride: int

    @property
    def positions(self) -> int:
        """Number of output positions."""
        return (self.size + self.before + self.after - self.dilation * (self.kernel - 1) - 1) // self.stride + 1

    def taps(self, positions: range) -> Tensor:
        """The weight of each pixel in each tap's mean over the given positions: (f, size)."""
        weights = torch.zeros(self.kernel, self.size)
        for tap, position in itertools.product(range(self.kernel), positions):
            pixel = position * self.stride + tap * self.dilation - self.before
            if 0 <= pixel < self.size:  # else it is padding: zeros
                weights[tap, pixel] += 1 / len(positions)
        return weights


@cache
@torch.inference_mode(False)  # training may use the cached tensor later
def _patch_weights(sides: tuple[Side, Side], grid: int, device: torch.device) -> Tensor:
    """The weight of each pixel in each region's mean patch: (H W, R f f), on the device."""
    windows = regions(*(side.positions for side in sides), grid)
    taps = [[side.taps(part) for side, part in zip(sides, window, strict=True)] for window in windows]
    weights = torch.stack([torch.einsum("ah,bw->hwab", *window) for window in taps], 2)
    return weights.flatten(2).flatten(0, 1).to(device)


def regions(height: int, width: int, grid: int) -> list[tuple[range, range]]:
    """Rows and columns of the regions of a map: the whole map, and grid x grid windows of half its sides.

    The windows are spread evenly. If the grid is 1, or a side is less than 4, the whole map is the only region.
    """
    whole = [(range(height), range(width))]
    if grid == 1 or min(height, width) < 4:
        return whole
    starts = ([round(i * (n - n // 2) / (grid - 1)) for i in range(grid)] for n in (height, width))
    return whole + [(range(i, i + height // 2), range(j, j + width // 2)) for i, j in itertools.product(*starts)]


def _padding(conv: nn.Conv2d) -> tuple[list[int], list[int]]:
    """Padding (rows, columns) before the maps, and after them."""
    if not isinstance(conv.padding, str):
        return list(conv.padding), list(conv.padding)
    total = [d * (f - 1) if conv.padding == "same" else 0 for d, f in zip(conv.dilation, conv.kernel_size, strict=True)]
    return [t // 2 for t in total], [t - t // 2 for t in total]


def class_filters(patches: Tensor, labels: Tensor, classes: int, ridge: Tensor | float) -> Tensor:
    """Class filters from mean patches (..., N, p) and labels (N,) in 0..k-1: unit vectors (..., k, p).

    They are the weights of a ridge regression from the patches, centred and scaled to unit mean square norm, to the
    centred one-hot labels.
    """
    x = normalized_rows(patches)
    y = one_hot(labels, classes).to(x.dtype)
    y = (y - y.mean(0)).expand(*x.shape[:-1], classes)
    return F.normalize(ridge_weights(x, y, ridge), dim=-1)


class ClassFilters(nn.Module):
    r"""Adds a group's class filters to one layer's kernels: filter 0 to output channel 0, and so on, over and over.

    There is a filter for each class and each of R regions of the map, since the target's features keep their positions
    and different regions tell classes apart differently: :math:`W_o = B_o + \alpha_o\, r_{o \bmod R k}`. The strength
    :math:`\alpha` is learned; it starts at half the norm of a He-initialised kernel. If there are more filters than
    channels, each channel gets several, divided by the root of their number.
    """

    def __init__(self, conv: ConvShape, grid: int) -> None:
        super().__init__()
        self.conv, self.grid = conv, grid
        norm = conv.he_std * math.sqrt(math.prod(conv.shape[1:]))
        self.strength = nn.Parameter(torch.full((conv.shape[0], 1), norm / 2))
        self.log_ridge = nn.Parameter(torch.tensor(-1.0))  # a penalty of 0.37

    def layer(self, network: nn.Module) -> nn.Conv2d:
        """The convolution of a target network that the filters are added to."""
        return network.get_submodule(self.conv.module)

    def solve(self, maps: Tensor, conv: nn.Conv2d, labels: Tensor, classes: int) -> Tensor:
        """Input maps (..., N, d_in, H, W) of `conv` and labels (N,) in 0..k-1 -> class filters (..., R k, p).

        Leading dimensions are groups. All groups have the same labels in the same order.
        """
        patches = mean_patches(maps, conv, self.grid).transpose(-3, -2)  # (..., R, N, p)
        return class_filters(patches, labels, classes, self.log_ridge.exp()).flatten(-3, -2)

    def forward(self, filters: Tensor) -> Tensor:
        """Class filters (..., R k, p) -> the change of the kernels (..., d_out, d_in, f, f)."""
        channels, count = len(self.strength), filters.shape[-2]
        place = torch.arange(channels, device=filters.device)[:, None] - torch.arange(count, device=filters.device)
        share = (place % min(channels, count) == 0).to(filters.dtype)  # (d_out, R k)
        share = share / share.sum(1, keepdim=True).sqrt()
        added = self.strength * (share @ filters)  # (..., d_out, p)
        return added.unflatten(-1, self.conv.shape[1:])
