"""GC: gradient centralization (Yong et al., 2020), for any torch optimizer."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

Where = Literal["gradient", "update"]


def centralized(optimizer: Optimizer, where: Where = "update") -> Optimizer:
    r"""Make an optimizer centralise its gradients or updates, in place; returns the optimizer.

    .. math:: g \leftarrow g - \mathrm{mean}(g)\ \text{over all axes but the first}

    g is either the `gradient` before a step (but not one that a closure given to `step` computes) or the `update` that
    the step makes. For Adam the method's authors
    recommend the update, because Adam's division would undo the centralising of the gradient. Weight decay that an
    optimizer adds to the gradient is added after a gradient was centralised, but is part of a centralised update.
    Parameters of one dimension (biases and BatchNorm's) are not centralised.
    """
    if where == "gradient":
        optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: _subtract_means(optimizer))
        return optimizer
    before: list[Tensor] = []

    def keep(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        before[:] = [weight.detach().clone() for weight in _weights(optimizer)]

    @torch.no_grad()
    def centralize(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for weight, old in zip(_weights(optimizer), before, strict=True):
            weight.sub_(_means(weight - old))

    optimizer.register_step_pre_hook(keep)
    optimizer.register_step_post_hook(centralize)
    return optimizer


@torch.no_grad()
def _subtract_means(optimizer: Optimizer) -> None:
    for weight in _weights(optimizer):
        if weight.grad is not None:
            weight.grad.sub_(_means(weight.grad))


def _weights(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.ndim > 1]


def _means(values: Tensor) -> Tensor:
    return values.mean(tuple(range(1, values.ndim)), keepdim=True)
