"""GC: gradient centralization (Yong et al., 2020), for any torch optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def centralized(optimizer: Optimizer) -> Optimizer:
    r"""Make an optimizer centralise its updates, in place; returns the optimizer.

    .. math:: g \leftarrow g - \mathrm{mean}(g)\ \text{over all axes but the first}

    Here g is the update that a step makes, weight decay included. For SGD that is the same as to centralise the
    gradient. For Adam the method's authors recommend it, because Adam's division would undo the centralising of a
    gradient. Parameters of one dimension (biases and BatchNorm's) are not centralised.
    """
    before: list[Tensor] = []

    def keep(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        before[:] = [weight.detach().clone() for weight in _weights(optimizer)]

    @torch.no_grad()
    def centralize(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for weight, old in zip(_weights(optimizer), before, strict=True):
            update = weight - old
            weight.sub_(update.mean(tuple(range(1, update.ndim)), keepdim=True))

    optimizer.register_step_pre_hook(keep)
    optimizer.register_step_post_hook(centralize)
    return optimizer


def _weights(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.ndim > 1]
