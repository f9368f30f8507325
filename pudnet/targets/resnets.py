"""ResNet-18 and ResNet-34 from torchvision."""

from __future__ import annotations

from torch import nn


def resnet(name: str, channels: int) -> nn.Module:
    """torchvision's ResNet, with its stem but without its last layer `fc`: images -> features (N, 512)."""
    from torchvision import models  # here: slow to import, and only these targets need it

    network = getattr(models, name)()
    network.fc = nn.Identity()
    if channels != network.conv1.in_channels:
        network.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    return network
