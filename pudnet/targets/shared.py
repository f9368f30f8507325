"""Runs a target under predicted weights, for one group or several at once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.overrides import TorchFunctionMode

from pudnet.errors import UserError, one_line
from pudnet.targets.target import Target, Weights, forget_statistics, own_weights

OfOneGroup = Callable[[Tensor, Weights], Tensor]  # a function of one group's images (N, C, H, W) and weights


class _Reached(Exception):
    """Ends a forward pass at the layer whose map is wanted, since the layers after it are not needed."""

    def __init__(self, maps: Tensor) -> None:
        super().__init__()
        self.maps = maps


def map_at(layer: nn.Module, run: Callable[[], object], after: bool = False) -> Tensor:
    """Run a forward pass up to a layer -> what goes into it, or what comes `after` it.

    Raises `RuntimeError` if the layer takes no part in it.
    """

    def stop(module: nn.Module, args: tuple[Tensor], output: Tensor | None = None) -> None:
        raise _Reached(output if after else args[0])

    hook = layer.register_forward_hook(stop) if after else layer.register_forward_pre_hook(stop)
    try:
        run()
    except _Reached as reached:
        return reached.maps
    finally:
        hook.remove()
    raise RuntimeError("the layer takes no part in the forward pass")


def one_by_one(of_one: OfOneGroup, images: Tensor, weights: Weights) -> Tensor:
    """Apply `of_one` to several groups (G, N, C, H, W), one after the other."""
    return torch.stack([of_one(group, own_weights(weights, g)) for g, group in enumerate(images)])


class _Vectorisable(TorchFunctionMode):
    """Replaces two functions that fail under vmap on a GPU with channels_last maps, by others with the same values."""

    def __torch_function__(self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is F.batch_norm:
            return _norm_then_scale(*args, **kwargs)
        if function is F.adaptive_avg_pool2d and args[1:] in ((1,), ((1, 1),)):  # torch's own checks the memory layout
            return args[0].mean((-2, -1), keepdim=True)
        return function(*args, **kwargs)


def _norm_then_scale(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *how: Any,
    **named: Any,
) -> Tensor:
    """`F.batch_norm` that applies scale and shift in a second step.

    If `F.batch_norm` gets scale and shift, torch may choose cuDNN's kernel, which checks the memory layout, or vmap's
    own, which turns bf16 maps into fp32.
    """
    maps = F.batch_norm(input, running_mean, running_var, None, None, *how, **named)
    if weight is None:
        return maps
    scale, shift = (each.to(maps.dtype).view(-1, *[1] * (maps.ndim - 2)) for each in (weight, bias))
    return torch.addcmul(shift, maps, scale)


def together(of_one: OfOneGroup, images: Tensor, weights: Weights) -> Tensor:
    """Apply `of_one` to several groups (G, N, C, H, W) in one vectorised call. Common weights are not repeated."""
    own = {name: 0 if weight.ndim > 4 else None for name, weight in weights.items()}
    try:
        with _Vectorisable():
            return vmap(of_one, (0, own), randomness="different")(images, dict(weights))
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        raise UserError(f"train.groups_per_step: must be 1 for this target on a GPU ({one_line(error)})") from None


def check_together(target: Target) -> None:
    """Raise `UserError` if a target cannot run several groups in one vectorised call, as training on a GPU does."""
    weights = {conv.name: torch.zeros(2, *conv.shape) for conv in target.convs}
    images = torch.zeros(2, 3, target.channels, target.image_size, target.image_size)
    together(SharedTarget(target).one, images, weights)


class SharedTarget(nn.Module):
    """The part of a target that all groups share: its structure, BatchNorm's affine parameters, biases.

    The convolutions have no weights of their own. BatchNorm uses the statistics of its input, one group in
    training, and keeps none, so that nothing leaks from one group to the next.
    """

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.convs = target.convs
        self.body = copy.deepcopy(target.network)
        for module in self.body.modules():
            if isinstance(module, nn.Conv2d):
                module.weight = None
        forget_statistics(self.body)

    def forward(self, images: Tensor, weights: Weights) -> Tensor:
        """Features (..., N, d) of images (..., N, C, H, W) under weights (..., d_out, d_in, f, f).

        Leading dimensions are groups, each with its own weights and BatchNorm statistics. A CPU, which one group keeps
        busy, runs them one after the other; a GPU runs them in one call.
        """
        return self._of_groups(self.one, images, weights)

    def input_of(self, conv: nn.Conv2d, images: Tensor, weights: Weights) -> Tensor:
        """The input maps (..., N, d_in, H', W') of one of the body's convolutions for images (..., N, C, H, W)."""

        def of_one(group: Tensor, own: Weights) -> Tensor:
            return map_at(conv, partial(self.one, group, own))

        return self._of_groups(of_one, images, weights)

    def _of_groups(self, of_one: OfOneGroup, images: Tensor, weights: Weights) -> Tensor:
        """Apply `of_one` to images (..., N, C, H, W) of one group or several."""
        if images.ndim == 4:
            return of_one(images, weights)
        if len(images) == 1:
            single = {name: weight.squeeze(0) if weight.ndim > 4 else weight for name, weight in weights.items()}
            return of_one(images.squeeze(0), single).unsqueeze(0)
        return (one_by_one if images.device.type == "cpu" else together)(of_one, images, weights)

    def one(self, images: Tensor, weights: Weights) -> Tensor:
        """`forward` of one group's images (N, C, H, W)."""
        return functional_call(self.body, dict(weights), (images,)).flatten(1)
