"""Dataset compression (section 3.3, appendix A.1): summarises a group of images in a sketch of fixed size."""

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
    """LeakyReLU and a normalisation: `batch` is the paper's; `group` and `layer` normalise each image by itself.

    BatchNorm has two problems here. It fixes each channel's mean over the group, which removes most of what a mean
    sketch could say, and its running statistics differ from the batch statistics it was trained with. GroupNorm and
    LayerNorm have neither, as long as more than one value is normalised together (more than 8 channels, or more than
    one position).
    """

    def __init__(self, name: str, channels: int) -> None:
        if name == "batch":
            norm = nn.BatchNorm2d(channels)
        else:
            norm = nn.GroupNorm(1 if name == "layer" else math.gcd(GROUPS, channels), channels)
        super().__init__(nn.LeakyReLU(), norm)


def pool(features: Tensor, how: str) -> Tensor:
    """Pool image features (..., N, d) over the group to (..., d), or (..., 2d) for `mean_var` (table 9).

    The geometric mean needs positive values, so it is taken of the features' softplus.
    """
    if how == "mean":
        return features.mean(-2)
    if how == "sum":
        return features.sum(-2)
    if how == "geometric_mean":
        return F.softplus(features).clamp_min(1e-6).log().mean(-2).exp()
    if how == "mean_var":
        return torch.cat([features.mean(-2), features.var(-2, unbiased=False)], -1)
    raise ValueError(f"no pooling is called {how}")


class Sketch(nn.Module):
    r"""Eq. 3: :math:`s = pool_{x \in D} T_\phi(x)`, reshaped to one slice for each recurrent layer.

    :math:`T_\phi` is a stack of blocks (5x5 convolution of stride 2, LeakyReLU, normalisation). The last block's map
    goes through a linear layer if the extractor's name ends in `-1linear`; else it is averaged over positions.
    """

    def __init__(self, config: ModelConfig, channels: int, image_size: int) -> None:
        super().__init__()
        self.pooling = config.pooling
        self.per_image = config.normalization != "batch"  # whether each image is normalised by itself
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
        if images.ndim > 4 and not self.per_image:  # BatchNorm's statistics are over one group
            return torch.stack([self(group) for group in images])
        groups = images.shape[:-3]
        maps = self.blocks(images.flatten(0, -4))  # (B, c, h, w)
        features = maps.mean((2, 3)) if self.linear is None else self.linear(maps.flatten(1))  # (B, d)
        pooled = pool(at_least_fp32(features).view(*groups, -1), self.pooling)
        return pooled[..., : math.prod(self.shape)].unflatten(-1, self.shape)
