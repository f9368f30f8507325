"""Target networks: the networks whose convolution weights are predicted.

A target is an ordinary `nn.Module` that maps images to feature vectors. Its convolution weights are
predicted; everything else (BatchNorm's affine parameters) is shared by all groups and learned.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pudnet.errors import UserError

Weights = Mapping[str, Tensor]  # one group's predicted weights: parameter name -> (d_out, d_in, f, f)


class ConvNet3(nn.Sequential):
    """The paper's ConvNet-3 (Fig. 5): three blocks of 3x3 convolution, BatchNorm, ReLU, 2x2 max-pooling.

    Images (N, channels, S, S) -> features (N, width * (S // 8) ** 2). The figure gives no width; 64 is that of
    the metric-learning literature it builds on.
    """

    def __init__(self, channels: int, width: int = 64) -> None:
        blocks = [self._block(d_in, width) for d_in in (channels, width, width)]
        super().__init__(OrderedDict(block1=blocks[0], block2=blocks[1], block3=blocks[2], flat=nn.Flatten()))

    @staticmethod
    def _block(d_in: int, d_out: int) -> nn.Sequential:
        layers = OrderedDict(
            conv=nn.Conv2d(d_in, d_out, 3, padding=1, bias=False),
            norm=nn.BatchNorm2d(d_out),
            pool=nn.MaxPool2d(2),  # before the ReLU: the same values, on a quarter of the pixels
            relu=nn.ReLU(),
        )
        return nn.Sequential(layers)


TARGETS = {"convnet3": ConvNet3}
SMALLEST_IMAGE = {"convnet3": 8}


def build_target(name: str, channels: int, image_size: int) -> nn.Module:
    """Build the plain target network, He-initialised.

    Raises:
        UserError: for an unknown name, or images too small for the network's pooling.
    """
    if name not in TARGETS:
        raise UserError(f"target: unknown name {name!r}; known: {', '.join(TARGETS)}")
    if image_size < SMALLEST_IMAGE[name]:
        raise UserError(f"target {name}: images of {image_size} px are too small, it needs {SMALLEST_IMAGE[name]}")
    network = TARGETS[name](channels)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return network


@dataclass(frozen=True)
class ConvShape:
    """One predicted tensor: its name in the target's state dict and its shape (d_out, d_in, f, f)."""

    name: str
    shape: tuple[int, int, int, int]

    @property
    def he_std(self) -> float:
        """The standard deviation that He initialisation gives it: sqrt(2 / fan_in)."""
        return math.sqrt(2 / math.prod(self.shape[1:]))


def predicted_convs(target: nn.Module) -> list[ConvShape]:
    """The target's convolution weights, in the order in which an image passes them."""
    return [
        ConvShape(f"{name}.weight", tuple(module.weight.shape))
        for name, module in target.named_modules()
        if isinstance(module, nn.Conv2d)
    ]


class SharedTarget(nn.Module):
    """What all groups share of a target: its structure and BatchNorm's affine parameters.

    The convolutions hold no weights of their own, and BatchNorm uses the statistics of the images it is
    given: in training that is the group, and nothing of one group leaks into the next.
    """

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.convs = predicted_convs(plain)
        self.body = copy.deepcopy(plain)
        for module in self.body.modules():
            if isinstance(module, nn.Conv2d):
                module.weight = None
            if isinstance(module, nn.BatchNorm2d):
                module.track_running_stats = False
                module.running_mean = module.running_var = module.num_batches_tracked = None

    def forward(self, images: Tensor, weights: Weights) -> Tensor:
        """Features (N, d) of images (N, C, H, W) under one group's weights and the images' own statistics."""
        return functional_call(self.body, dict(weights), (images,))


@torch.no_grad()
def calibrated_network(
    plain: nn.Module, shared: SharedTarget, weights: Weights, images: Tensor, batch: int = 1000
) -> nn.Module:
    """The plain target with predicted weights, in eval mode, its BatchNorm calibrated on `images`.

    Running statistics are the average over batches of the images (N, C, H, W) that the weights were predicted
    from, each batch a comb over all of them, since they often come sorted by class; images classified later
    never change them.
    """
    network = copy.deepcopy(plain)
    network.load_state_dict({**shared.body.state_dict(), **weights}, strict=False)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
    network.train()
    combs = math.ceil(len(images) / batch)
    for first in range(combs):
        network(images[first::combs])
    return network.eval()
