"""The paper's ConvNet-3, and the same with the features of all its blocks."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn


class Block(nn.Sequential):
    """Convolution, BatchNorm, ReLU and 2x2 max-pooling. Pooling before ReLU gives the same values with less work."""

    def __init__(self, d_in: int, d_out: int) -> None:
        layers = OrderedDict(
            conv=nn.Conv2d(d_in, d_out, 3, padding=1, bias=False),
            norm=nn.BatchNorm2d(d_out),
            pool=nn.MaxPool2d(2),
            relu=nn.ReLU(),
        )
        super().__init__(layers)


WIDTH = 64  # the paper gives none; this is usual in the metric-learning literature that it builds on


class ConvNet3(nn.Sequential):
    """The paper's ConvNet-3 (Fig. 5): three blocks of 3x3 convolution, BatchNorm, ReLU, 2x2 max-pooling.

    Images (N, channels, S, S) -> features (N, width * (S // 8) ** 2).
    """

    def __init__(self, channels: int, width: int = WIDTH) -> None:
        blocks = [Block(d_in, width) for d_in in (channels, width, width)]
        super().__init__(OrderedDict(block1=blocks[0], block2=blocks[1], block3=blocks[2], flat=nn.Flatten()))


class MultilevelConvNet3(nn.Module):
    """ConvNet-3 whose features are those of all three blocks, not of the last alone.

    Earlier blocks may serve images of a kind that the last was not trained on. Their maps are averaged down to the size
    of the last block's, and normalised, since averaging makes values smaller. (R2-D2's own network likewise joins its
    last two blocks; Bertinetto et al., 2019.) Images (N, channels, S, S) -> features (N, 3 width (S // 8) ** 2).
    """

    def __init__(self, channels: int, width: int = WIDTH) -> None:
        super().__init__()
        self.block1, self.block2, self.block3 = (Block(d_in, width) for d_in in (channels, width, width))
        self.level1 = Level(width, 4)
        self.level2 = Level(width, 2)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, channels, S, S) -> features (N, 3 width (S // 8) ** 2)."""
        first = self.block1(images)
        second = self.block2(first)
        maps = [self.block3(second), self.level2(second), self.level1(first)]
        return torch.cat([each.flatten(1) for each in maps], 1)


def last_block_alone(network: MultilevelConvNet3) -> ConvNet3:
    """The ConvNet-3 whose blocks those of `network` are: the same modules, not copies."""
    with torch.device("meta"):  # all that it makes itself is replaced
        plain = ConvNet3(network.block1.conv.in_channels, network.block1.conv.out_channels)
    plain.block1, plain.block2, plain.block3 = network.block1, network.block2, network.block3
    return plain.train(network.training)


class Level(nn.Sequential):
    """Maps (N, width, H, W) of an early block -> normalised averages (N, width, H // size, W // size)."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__(OrderedDict(pool=nn.AvgPool2d(size), norm=nn.BatchNorm2d(width)))
