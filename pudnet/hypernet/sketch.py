"""Dataset compression (section 3.3, appendix A.1): a group of images becomes a sketch of fixed size."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pudnet.config import ModelConfig
from pudnet.ridge import at_least_fp32

STRIDE = 2
GROUPS = 8


class Normalize(nn.Sequential):
    """LeakyReLU and a normalisation: `batch` is the paper's; `group` and `layer` see one image at a time.

    BatchNorm fixes every channel's mean over the group, which is most of what a mean sketch can say, and
    its running statistics are not those that it was trained with; the other two have neither trouble, as long
    as more than one value is normalised together (more than 8 channels, or more than one position left).
    """

    def __init__(self, name: str, channels: int) -> None:
        if name == "batch":
            norm = nn.BatchNorm2d(channels)
        else:
            norm = nn.GroupNorm(1 if name == "layer" else math.gcd(GROUPS, channels), channels)
        super().__init__(nn.LeakyReLU(), norm)


def pool(features: Tensor, how: str) -> Tensor:
    """Pool image features (..., N, d) over the group to (..., d), or (..., 2d) for `mean_var` (table 9).

    The geometric mean is of the softplus of the features, since it is defined for positive values only.
    """
    if how == "mean":
        return features.mean(-2)
    if how == "sum":
        return features.sum(-2)
    if how == "geometric_mean":
        return F.softplus(features).clamp_min(1e-6).log().mean(-2).exp()
    return torch.cat([features.mean(-2), features.var(-2, unbiased=False)], -1)


class Sketch(nn.Module):
    r"""Eq. 3: :math:`s = pool_{x \in D} T_\phi(x)`, reshaped to one slice a recurrent layer.

    :math:`T_\phi` is a stack of blocks (5x5 convolution of stride 2, LeakyReLU, normalisation). With
    `-1linear` the last block's map is flattened into a linear layer; without, it is averaged over positions.
    """

    def __init__(self, config: ModelConfig, channels: int, image_size: int) -> None:
        super().__init__()
        self.pooling = config.pooling
        self.alone = config.normalization != "batch"  # whether each image is normalised by itself
        self.shape = (config.depth, config.hidden)
        size = config.depth * config.hidden
        out = math.ceil(size / 2) if config.pooling == "mean_var" else size
        blocks, linear = int(config.extractor[0]), config.extractor.endswith("linear")
        widths = [channels] + [config.extractor_channels] * blocks
        if not linear:
            widths[-1] = out
        self.blocks = nn.Sequential()
        side = image_size
        for d_in, d_out in zip(widths[:-1], widths[1:], strict=True):
            self.blocks.append(nn.Conv2d(d_in, d_out, 5, stride=STRIDE, padding=2))
            self.blocks.append(Normalize(config.normalization, d_out))
            side = math.ceil(side / STRIDE)
        self.linear = nn.Linear(widths[-1] * side * side, out) if linear else None

    def forward(self, images: Tensor) -> Tensor:
        """Images (..., N, C, H, W) -> sketch (..., l, m), in fp32. Leading dimensions are groups."""
        if images.ndim > 4 and not self.alone:  # BatchNorm takes one group's statistics at a time
            return torch.stack([self(group) for group in images])
        groups = images.shape[:-3]
        maps = self.blocks(images.flatten(0, -4))  # (B, c, h, w)
        features = maps.mean((2, 3)) if self.linear is None else self.linear(maps.flatten(1))  # (B, d)
        pooled = pool(at_least_fp32(features).view(*groups, -1), self.pooling)
        return pooled[..., : math.prod(self.shape)].unflatten(-1, self.shape)
