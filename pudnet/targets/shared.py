"""The functional forward: a target under predicted weights, for one group or several at once."""

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

from pudnet.errors import UserError
from pudnet.targets.target import Target, Weights, forget_statistics, one_line, own_weights

Work = Callable[[Tensor, Weights], Tensor]  # of one group's images (N, C, H, W), under its weights


class _Reached(Exception):
    """Ends a pass at the layer whose input is wanted: what comes after it is work for nothing."""

    def __init__(self, maps: Tensor) -> None:
        super().__init__()
        self.maps = maps


def one_by_one(work: Work, images: Tensor, weights: Weights) -> Tensor:
    """`work` on several groups (G, N, C, H, W), one after the other."""
    return torch.stack([work(group, own_weights(weights, g)) for g, group in enumerate(images)])


class _Vectorisable(TorchFunctionMode):
    """The same values of two functions that vmap cannot take as they are on a GPU, with channels_last maps."""

    def __torch_function__(self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is F.batch_norm:
            return _norm_then_scale(*args, **kwargs)
        if function is F.adaptive_avg_pool2d and args[1:] in ((1,), ((1, 1),)):  # torch's looks at the layout
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
    """`F.batch_norm`, which is called as this is: first without scale and shift, and then those.

    With them it may be cuDNN's, which asks for the layout, or vmap's own, which makes maps of bf16 fp32.
    """
    maps = F.batch_norm(input, running_mean, running_var, None, None, *how, **named)
    if weight is None:
        return maps
    scale, shift = (each.to(maps.dtype).view(-1, *[1] * (maps.ndim - 2)) for each in (weight, bias))
    return torch.addcmul(shift, maps, scale)


def together(work: Work, images: Tensor, weights: Weights) -> Tensor:
    """`work` on several groups (G, N, C, H, W) as one vectorised call. Weights that they share are not repeated."""
    own = {name: 0 if weight.ndim > 4 else None for name, weight in weights.items()}
    try:
        with _Vectorisable():
            return vmap(work, (0, own), randomness="different")(images, dict(weights))
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        raise UserError(f"train.groups_per_step: this target takes 1 only on a GPU ({one_line(error)})") from None


def check_together(target: Target) -> None:
    """Raise `UserError` where several groups a step cannot pass in one vectorised call, as they do on a GPU."""
    weights = {conv.name: torch.zeros(2, *conv.shape) for conv in target.convs}
    images = torch.zeros(2, 3, target.channels, target.image_size, target.image_size)
    together(SharedTarget(target).one, images, weights)


class SharedTarget(nn.Module):
    """What all groups share of a target: its structure, BatchNorm's affine parameters, biases.

    The convolutions hold no weights of their own, and BatchNorm uses the statistics of the images it is
    given: in training that is the group, and nothing of one group leaks into the next.
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

        Leading dimensions are groups, each under its own weights and its own images' statistics: one after the
        other on a CPU, which one group keeps busy, in one call on a GPU, which it does not.
        """
        return self._of_groups(self.one, images, weights)

    def input_of(self, conv: nn.Conv2d, images: Tensor, weights: Weights) -> Tensor:
        """What a convolution of the body is given when images (..., N, C, H, W) pass: (..., N, d_in, H', W')."""
        return self._of_groups(partial(self._input_of, conv), images, weights)

    def _of_groups(self, work: Work, images: Tensor, weights: Weights) -> Tensor:
        """`work` for however many groups the images (..., N, C, H, W) are of."""
        if images.ndim == 4:
            return work(images, weights)
        if len(images) == 1:
            alone = {name: weight.squeeze(0) if weight.ndim > 4 else weight for name, weight in weights.items()}
            return work(images.squeeze(0), alone).unsqueeze(0)
        return (one_by_one if images.device.type == "cpu" else together)(work, images, weights)

    def _input_of(self, conv: nn.Conv2d, images: Tensor, weights: Weights) -> Tensor:
        def stop(module: nn.Module, args: tuple[Tensor]) -> None:
            raise _Reached(args[0])

        hook = conv.register_forward_pre_hook(stop)
        try:
            self.one(images, weights)
        except _Reached as reached:
            return reached.maps
        finally:
            hook.remove()
        raise AssertionError("a target's convolutions all take part in its forward pass")

    def one(self, images: Tensor, weights: Weights) -> Tensor:
        """`forward` of one group's images (N, C, H, W)."""
        return functional_call(self.body, dict(weights), (images,)).flatten(1)
