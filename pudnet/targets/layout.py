"""Makes networks that fail on channels_last maps, for instance because of a `view`, work on contiguous ones."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


@torch.no_grad()
def wants_contiguous_maps(network: nn.Module, images: Tensor) -> bool:
    """Whether a network that works on contiguous images fails on channels_last ones (for instance by a `view`)."""
    try:
        copy.deepcopy(network).to(memory_format=torch.channels_last)(images)
    except RuntimeError:  # "view size is not compatible with input tensor's size and stride"
        return True
    return False


def give_contiguous_maps(network: nn.Module) -> None:
    """Make a network's input images and its convolutions' outputs contiguous, in place."""
    network.register_forward_pre_hook(_contiguous_images)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(_contiguous_output)


def _contiguous_images(network: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].contiguous(),)


def _contiguous_output(conv: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return output.contiguous()
