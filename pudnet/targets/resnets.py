"""ResNet-18 and ResNet-34, torchvision's."""

from __future__ import annotations

from torch import nn


def resnet(name: str, channels: int) -> nn.Module:
    """torchvision's class, stem included, with its `fc` left aside: images -> features (N, 512)."""
    from torchvision import models  # here: slow to import, and needed for these targets alone

    network = getattr(models, name)()
    network.fc = nn.Identity()
    if channels != network.conv1.in_channels:
        network.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    return network
