"""Turns predicted weights into a plain network in eval mode, with BatchNorm calibrated on the group's images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from pudnet.errors import UserError, one_line
from pudnet.targets.shared import SharedTarget
from pudnet.targets.target import Target, Weights, norms


class Calibrator:
    """Turns predicted weights into plain target networks in eval mode.

    BatchNorm's running statistics are set to those of one batch of the images that the weights were predicted from;
    images that are classified later never change them. The variance is the batch's own (biased), as in training, so
    that the network later gives these images the same features as the calibration pass.
    """

    def __init__(self, target: Target, shared: SharedTarget) -> None:
        self.empty = copy.deepcopy(target.network).eval()  # the network without its convolutions' weights
        for module in self.empty.modules():
            if isinstance(module, nn.Conv2d):
                module.weight = None
        for name, tensor in [*shared.body.named_parameters(), *shared.body.named_buffers()]:
            _put(self.empty, name, tensor)  # not copies, so that they follow the model's

    @torch.no_grad()
    def __call__(
        self, weights: Weights, images: Tensor, writes: Mapping[str, Callable[[Tensor], Tensor]] | None = None
    ) -> tuple[nn.Module, Tensor]:
        """One group's weights and images (N, C, H, W) -> its network, and the images' features (N, d).

        `writes` maps names of further weights to functions. Each is called during the calibration pass, with the input
        maps (N, d_in, H', W') of its convolution, and returns that convolution's weight.
        """
        network = _copied(self.empty)
        for name, weight in weights.items():
            _put(network, name, nn.Parameter(weight.clone(), requires_grad=False))  # the model's own may be among them
        hooks = [_write_in_passing(network, name, write) for name, write in (writes or {}).items()]
        features = calibrate(network, images)
        for hook in hooks:
            hook.remove()
        return network, features


@torch.no_grad()
def calibrate(network: nn.Module, images: Tensor) -> Tensor:
    """Set BatchNorm's running statistics to those of the images (N, C, H, W), in place -> their features (N, d).

    Raises `UserError` if it is one image, of which a layer has a single value.
    """
    calibrated = [(norm, norm.momentum, norm.register_forward_hook(_make_biased)) for norm in norms(network)]
    for norm, _, _ in calibrated:
        norm.train()
        norm.momentum = 1.0  # forget earlier statistics
    try:
        features = network(images).flatten(1)
    except ValueError as error:
        if len(images) > 1:
            raise
        raise UserError(f"one image is too few for this network's BatchNorm; give more ({one_line(error)})") from None
    for norm, momentum, hook in calibrated:
        hook.remove()
        norm.eval()
        norm.momentum = momentum
    return features


def _copied(network: nn.Module) -> nn.Module:
    """A faster `copy.deepcopy`: it copies each module's dozen empty dictionaries (of hooks) itself."""
    own = [value for module in network.modules() for value in vars(module).values()]
    return copy.deepcopy(network, {id(value): value.copy() for value in own if isinstance(value, dict) and not value})


def _put(network: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    setattr(network.get_submodule(path), attribute, tensor)


def _write_in_passing(network: nn.Module, name: str, write: Callable[[Tensor], Tensor]) -> RemovableHandle:
    def before(conv: nn.Module, args: tuple[Tensor]) -> None:
        conv.weight = nn.Parameter(write(args[0]), requires_grad=False)

    return network.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(before)


def _make_biased(norm: _BatchNorm, inputs: tuple[Tensor], output: Tensor) -> None:
    count = inputs[0].numel() / norm.num_features
    norm.running_var.mul_((count - 1) / count)
