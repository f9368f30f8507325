"""Checks that a network's convolution weights can be predicted, trained and saved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from pudnet.device import wants_bf16
from pudnet.errors import UserError, one_line
from pudnet.targets.target import ConvShape, forget_statistics, put_tensors

OF_CLASSIFIERS = ("centroids", "head_weight", "head_bias")  # tensors that a file has beside the network's
UNFIT = (
    nn.Conv1d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.LazyConv2d,
    nn.SyncBatchNorm,
)


def refuse_unfit_layers(network: nn.Module, name: str) -> None:
    """Refuse layers that could not be predicted, or that would carry state from one group to the next."""
    owners: dict[int, str] = {}
    tensors = [*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)]
    for path, tensor in tensors:
        if owners.setdefault(id(tensor), path) != path:
            raise UserError(f"target {name}: {owners[id(tensor)]} and {path} are one tensor; untie them")
        if path in OF_CLASSIFIERS:
            raise UserError(f"target {name}: {path} is what a file calls a tensor of the classifier; rename it")
        if not nn.parameter.is_lazy(tensor) and tensor.ndim == 5:
            raise UserError(f"target {name}: {path} has five dimensions; at most four can be channels_last")
    for path, module in network.named_modules():
        kind = type(module).__name__
        if isinstance(module, UNFIT):
            raise UserError(f"target {name}: layer {path} is a {kind}; only Conv2d can be predicted")
        if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
            raise UserError(f"target {name}: layer {path} ({kind}) keeps running statistics; only BatchNorm may")
        if isinstance(module, _BatchNorm) and not module.track_running_stats:
            raise UserError(f"target {name}: layer {path} ({kind}) keeps no running statistics to classify with")
        if not isinstance(module, nn.Conv2d):
            continue
        if parametrize.is_parametrized(module) or not isinstance(module.weight, nn.Parameter):
            raise UserError(f"target {name}: the weight of layer {path} is parametrized; it has to be a parameter")
    if not any(isinstance(module, nn.Conv2d) for module in network.modules()):
        raise UserError(f"target {name}: has no Conv2d, so there is nothing to predict")


class _Convolutions(TorchFunctionMode):
    """Counts calls of convolution functions, whether from a layer or not."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.calls += getattr(function, "__name__", "").startswith("conv")
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def forward_order(network: nn.Module, name: str, images: Tensor) -> tuple[tuple[ConvShape, ...], int]:
    """Run `images` through the network -> its convolutions in the order of use, and the size d of a feature vector.

    Raises `UserError` if the way in which layers are used makes it impossible to predict them.
    """
    paths = {m: path for path, m in network.named_modules() if isinstance(m, nn.Conv2d | _BatchNorm)}
    calls: dict[nn.Module, int] = {}

    def note(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        calls[module] = calls.get(module, 0) + 1

    hooks = [module.register_forward_hook(note) for module in paths]
    try:
        with _Convolutions() as convolutions:
            features = features_of(network, name, images)
    finally:
        for hook in hooks:
            hook.remove()
    order = [module for module in calls if isinstance(module, nn.Conv2d)]
    for module, path in paths.items():
        if isinstance(module, nn.Conv2d) and module not in calls:
            raise UserError(f"target {name}: layer {path} takes no part in the forward pass; remove it")
        if isinstance(module, _BatchNorm) and calls.get(module, 0) > 1:
            raise UserError(f"target {name}: layer {path} is used twice: the statistics of two maps would be mixed")
    if convolutions.calls != sum(calls[module] for module in order):
        raise UserError(f"target {name}: calls a convolution function outside a Conv2d layer; make it a layer")
    convs = tuple(ConvShape(f"{paths[conv]}.weight", tuple(conv.weight.shape)) for conv in order)
    return convs, features.flatten(1).shape[1]


@torch.no_grad()
def refuse_what_only_training_does(network: nn.Module, name: str, images: Tensor) -> None:
    """Repeat the checks of `forward_order` in training mode, and refuse a network that changes buffers there.

    BatchNorm's buffers may change.
    """
    trained = copy.deepcopy(network).train()
    forget_statistics(trained)
    before = {path: buffer.clone() for path, buffer in trained.named_buffers()}
    forward_order(trained, name, images)
    for path, buffer in trained.named_buffers():
        if path not in before or not torch.allclose(before[path], buffer, rtol=0, atol=0, equal_nan=True):
            raise UserError(f"target {name}: {path} changes in training: it would carry one group into the next")


def refuse_what_cannot_be_trained(network: nn.Module, name: str, images: Tensor) -> None:
    """Run forward and backward once, with the memory layout and precision of training."""
    trained = copy.deepcopy(network).to(memory_format=torch.channels_last).train()
    forget_statistics(trained)
    with torch.enable_grad():
        with torch.autocast("cpu", torch.bfloat16, enabled=wants_bf16("auto", images.device)):
            features = features_of(trained, name, images)
        try:
            features.float().sum().backward()
        except RuntimeError as error:
            raise UserError(f"target {name}: has no gradient ({one_line(error)})") from None


@torch.no_grad()
def refuse_what_a_file_loses(network: nn.Module, again: nn.Module, name: str, images: Tensor) -> None:
    """Refuse a network that a file cannot restore.

    `again` is the same network, newly built. With the tensors of the first, it must give the same features.
    """
    for path, value in network.state_dict().items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"target {name}: {path} in its state dict is no tensor; a file of weights can only hold tensors"
            )
    try:
        put_tensors(again, network.state_dict())
    except (RuntimeError, ValueError) as error:
        raise UserError(f"target {name}: cannot load its own state dict ({one_line(error)})") from None
    features = [features_of(copy.deepcopy(one).eval(), name, images.contiguous()) for one in (network, again)]
    if not torch.equal(*features):
        raise UserError(
            f"target {name}: newly built and with the same state dict loaded, it gives other features; "
            "everything that its features depend on has to be in the state dict"
        )


def features_of(network: nn.Module, name: str, images: Tensor) -> Tensor:
    """The network's output. Raises `UserError` if that is not one tensor (N, ...)."""
    try:
        features = network(images)
    except Exception as error:  # whatever the user's own code may raise
        what = f"{images.shape[2]} px with {images.shape[1]} channel(s)"
        raise UserError(f"target {name}: cannot take images of {what} ({one_line(error)})") from None
    if not isinstance(features, Tensor) or features.ndim < 2 or len(features) != len(images):
        mode = "training" if network.training else "evaluation"
        raise UserError(f"target {name}: must return one tensor (N, d); in {mode} mode it does not")
    return features
