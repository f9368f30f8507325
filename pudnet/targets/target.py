"""A target: an ordinary network, and which of its tensors are predicted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# Parameter name -> predicted weight (..., d_out, d_in, f, f). Leading dimensions are groups; shared weights have none.
Weights = Mapping[str, Tensor]


def own_weights(weights: Weights, group: int) -> dict[str, Tensor]:
    """Pick one group's weights (d_out, d_in, f, f) from those of several."""
    return {name: weight[group] if weight.ndim > 4 else weight for name, weight in weights.items()}


@dataclass(frozen=True)
class ConvShape:
    """One predicted tensor: its name in the target's state dict and its shape (d_out, d_in / groups, f, f)."""

    name: str
    shape: tuple[int, int, int, int]

    @property
    def module(self) -> str:
        """The layer's name in the target."""
        return self.name.removesuffix(".weight")

    @property
    def he_std(self) -> float:
        """The standard deviation of He initialisation: sqrt(2 / fan_in)."""
        return math.sqrt(2 / math.prod(self.shape[1:]))


@dataclass(frozen=True)
class Target:
    """A plain, He-initialised target network, and its predicted tensors in the order of the forward pass."""

    network: nn.Module
    convs: tuple[ConvShape, ...]
    channels: int
    image_size: int
    features: int  # d, the size of a feature vector

    @property
    def dense(self) -> tuple[ConvShape, ...]:
        """The convolutions whose output channels each see all input channels."""
        return tuple(conv for conv in self.convs if self.network.get_submodule(conv.module).groups == 1)

    @property
    def predicted(self) -> int:
        """How many weights are predicted."""
        return sum(math.prod(conv.shape) for conv in self.convs)


def draw_convolutions(network: nn.Module) -> None:
    """Draw the weights of all convolutions anew, normally distributed as He et al. (2015) do for ReLU."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")


def norms(network: nn.Module) -> list[_BatchNorm]:
    """The network's BatchNorm layers."""
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]


def forget_statistics(network: nn.Module) -> None:
    """Make BatchNorm use the statistics of its input, and keep no running ones."""
    for norm in norms(network):
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None


def put_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load tensors as the module's state dict. Raises as `load_state_dict`.

    They are marked with the layers' current version numbers, because some layers convert older states on load.
    """
    state = module.state_dict()  # it carries the layers' version numbers, also when it is emptied
    state.clear()
    state.update(tensors)
    module.load_state_dict(state)
