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

    g is either the `gradient` before a step or the `update` that the step makes. For Adam the method's authors
    recommend the update, because Adam's division would undo the centralising of the gradient. Weight decay that an
    optimizer adds to the gradient is added after a gradient was centralised, but is part of a centralised update.
    Parameters of one dimension (biases and BatchNorm's) are not centralised.
    """
    if where == "gradient":
        optimizer.register_step_pre_hook(_centralize_gradients)
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


def _centralize_gradients(optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Centralise existing gradients, and those that a closure given to `step` computes."""

    def wrapped(given: Any) -> Any:
        if given is optimizer or not callable(given):
            return given

        def closure() -> Any:
            loss = given()
            _subtract_means(optimizer)
            return loss

        return closure

    _subtract_means(optimizer)
    return tuple(map(wrapped, args)), {key: wrapped(value) for key, value in kwargs.items()}


@torch.no_grad()
def _subtract_means(optimizer: Optimizer) -> None:
    for weight in _weights(optimizer):
        if weight.grad is not None:
            weight.grad.sub_(_means(weight.grad))


def _weights(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.ndim > 1]


def _means(values: Tensor) -> Tensor:
    return values.mean(tuple(range(1, values.ndim)), keepdim=True)
