"""Class filters: kernels that tell a group's classes apart, solved for in closed form from its labelled images.

The paper's sketch is a mean over images that forgets their labels, and its generators reach few directions of a
layer's weights. These filters are a sketch of the other kind, one token a class in the space of the weights
themselves: no gradient at test time, and nothing to learn but what they are added to, and how strongly.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pudnet.targets import ConvShape


def mean_patches(maps: Tensor, conv: nn.Conv2d) -> Tensor:
    """The patch that a convolution sees of its input maps (N, d_in, H, W), averaged over positions: (N, p) in fp32.

    p = d_in f f, in the order of the convolution's weights.
    """
    side = maps.shape[2:]
    pixels = torch.eye(math.prod(side), device=maps.device).view(-1, 1, *side)
    before, after = _padding(conv)
    padded = F.pad(pixels, (before[1], after[1], before[0], after[0]))
    windows = F.unfold(padded, conv.kernel_size, conv.dilation, stride=conv.stride)  # (H W, f f, positions)
    return (maps.float().flatten(2) @ windows.mean(2)).flatten(1)


def _padding(conv: nn.Conv2d) -> tuple[list[int], list[int]]:
    """Rows and columns of padding before the maps and after them."""
    if not isinstance(conv.padding, str):
        return list(conv.padding), list(conv.padding)
    total = [d * (f - 1) if conv.padding == "same" else 0 for d, f in zip(conv.dilation, conv.kernel_size, strict=True)]
    return [t // 2 for t in total], [t - t // 2 for t in total]


def class_filters(patches: Tensor, labels: Tensor, classes: int, ridge: Tensor | float) -> Tensor:
    r"""Ridge regression of the classes on mean patches (N, p) with labels (N,) in 0..k-1: unit vectors (k, p).

    :math:`R = Y^T (X X^T + \lambda I)^{-1} X` with X the patches about their mean, of unit mean square norm, and Y
    the one-hot labels about theirs. It is an N x N system, or, where images are more than values, the equal p x p one.
    """
    x = patches - patches.mean(0)
    x = x / x.square().sum(1).mean().clamp_min(1e-12).sqrt()
    y = F.one_hot(labels, classes).float()
    y = y - y.mean(0)
    few = len(x) <= x.shape[1]
    solved = _solve(x @ x.T, ridge, y).T @ x if few else _solve(x.T @ x, ridge, x.T @ y).T
    return F.normalize(solved, dim=1)


def _solve(gram: Tensor, ridge: Tensor | float, right: Tensor) -> Tensor:
    """(gram + ridge I)^-1 right."""
    return torch.cholesky_solve(right, torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), device=gram.device)))


class ClassFilters(nn.Module):
    r"""Adds a group's class filters to one layer's kernels, those of the classes in turn to its output channels.

    :math:`W_o = B_o + \alpha_o\, r_{o \bmod k}`, with :math:`\alpha` learned, from He's norm on. Of more classes
    than channels each channel gets several, averaged so that its share stays of one size.
    """

    def __init__(self, conv: ConvShape) -> None:
        super().__init__()
        self.conv = conv
        norm = conv.he_std * math.sqrt(math.prod(conv.shape[1:]))
        self.strength = nn.Parameter(torch.full((conv.shape[0], 1), norm))
        self.log_ridge = nn.Parameter(torch.tensor(-1.0))

    def solve(self, patches: Tensor, labels: Tensor, classes: int) -> Tensor:
        """Mean patches (N, p) and labels (N,) in 0..k-1 -> class filters (k, p)."""
        return class_filters(patches, labels, classes, self.log_ridge.exp())

    def forward(self, filters: Tensor) -> Tensor:
        """Class filters (..., k, p) -> what they add to the kernels (..., d_out, d_in, f, f)."""
        channels, classes = len(self.strength), filters.shape[-2]
        place = torch.arange(channels, device=filters.device)[:, None] - torch.arange(classes, device=filters.device)
        share = (place % min(channels, classes) == 0).float()  # (d_out, k)
        share = share / share.sum(1, keepdim=True).sqrt()
        added = self.strength * (share @ filters)  # (..., d_out, p)
        return added.unflatten(-1, self.conv.shape[1:])
