"""The paper's ConvNet-3."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


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


class ConvNet3(nn.Sequential):
    """The paper's ConvNet-3 (Fig. 5): three blocks of 3x3 convolution, BatchNorm, ReLU, 2x2 max-pooling.

    Images (N, channels, S, S) -> features (N, width * (S // 8) ** 2). The figure gives no width; 64 is usual in the
    metric-learning literature that the paper builds on.
    """

    def __init__(self, channels: int, width: int = 64) -> None:
        blocks = [Block(d_in, width) for d_in in (channels, width, width)]
        super().__init__(OrderedDict(block1=blocks[0], block2=blocks[1], block3=blocks[2], flat=nn.Flatten()))
