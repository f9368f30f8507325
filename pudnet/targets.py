"""Target networks: the networks whose convolution weights are predicted.

A target is an ordinary `nn.Module` that maps images to feature vectors: ConvNet-3, ResNet-18, ResNet-34, or
any module of your own. Its convolution weights are predicted; everything else (BatchNorm's affine parameters,
biases, linear layers) is shared by all groups and learned.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from pudnet.device import wants_bf16
from pudnet.errors import UserError

# Predicted weights: parameter name -> (..., d_out, d_in, f, f). Leading are groups; what all groups share has none.
Weights = Mapping[str, Tensor]
Work = Callable[[Tensor, Weights], Tensor]  # of one group's images (N, C, H, W), under its weights


def own_weights(weights: Weights, group: int) -> dict[str, Tensor]:
    """One group's weights (d_out, d_in, f, f) of those of several."""
    return {name: weight[group] if weight.ndim > 4 else weight for name, weight in weights.items()}


class Block(nn.Sequential):
    """Convolution, BatchNorm, ReLU and 2x2 max-pooling; pooling stands first: the same values, on fewer pixels."""

    def __init__(self, d_in: int, d_out: int) -> None:
        layers = OrderedDict(
            conv=nn.Conv2d(d_in, d_out, 3, padding=1, bias=False),
            norm=nn.BatchNorm2d(d_out),
            pool=nn.MaxPool2d(2),
            relu=nn.ReLU(),
        )
        super().__init__(layers)


class ConvNet3(nn.Sequential):
    """The paper's ConvNet-3 (Fig. 5): three blocks of 3x3 convolution, BatchNorm, ReLU, 2x2 max-pooling.

    Images (N, channels, S, S) -> features (N, width * (S // 8) ** 2). The figure gives no width; 64 is that of
    the metric-learning literature it builds on.
    """

    def __init__(self, channels: int, width: int = 64) -> None:
        blocks = [Block(d_in, width) for d_in in (channels, width, width)]
        super().__init__(OrderedDict(block1=blocks[0], block2=blocks[1], block3=blocks[2], flat=nn.Flatten()))


def _resnet(name: str, channels: int) -> nn.Module:
    """torchvision's class, stem included, with its `fc` left aside: images -> features (N, 512)."""
    from torchvision import models  # here: slow to import, and needed for these targets alone

    network = getattr(models, name)()
    network.fc = nn.Identity()
    if channels != network.conv1.in_channels:
        network.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    return network


TARGETS: dict[str, Callable[[int], nn.Module]] = {
    "convnet3": ConvNet3,
    "resnet18": lambda channels: _resnet("resnet18", channels),
    "resnet34": lambda channels: _resnet("resnet34", channels),
}
SMALLEST_IMAGE = 8  # px; ConvNet-3 halves it three times


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
        """The standard deviation that He initialisation gives it: sqrt(2 / fan_in)."""
        return math.sqrt(2 / math.prod(self.shape[1:]))


@dataclass(frozen=True)
class Target:
    """A plain target network, He-initialised, and what of it is predicted, in the order of its forward pass."""

    network: nn.Module
    convs: tuple[ConvShape, ...]
    channels: int
    image_size: int
    features: int  # d, values of an image's feature vector

    @property
    def dense(self) -> tuple[ConvShape, ...]:
        """The convolutions whose output channels each see all input channels."""
        return tuple(conv for conv in self.convs if self.network.get_submodule(conv.module).groups == 1)

    @property
    def predicted(self) -> int:
        """How many weights are predicted."""
        return sum(math.prod(conv.shape) for conv in self.convs)


def is_import_path(name: str) -> bool:
    """Whether a target's name is that of a class or function of the user's own, `package.module:Name`."""
    return ":" in name


def check_target_name(name: str) -> None:
    """Raise `UserError` for what is neither a target of ours nor an import path."""
    if name not in TARGETS and not is_import_path(name):
        own = "or your own as package.module:Name"
        raise UserError(f"target: unknown name {name!r}; known: {', '.join(TARGETS)}, {own}")


def target_name(target: str | nn.Module) -> str:
    """The name by which a card knows a target: a module given as an object goes by its class.

    Raises `UserError` for what is neither a name nor a module.
    """
    if not isinstance(target, str | nn.Module):
        raise UserError(f"target: must be a name or a torch.nn.Module (not its class), got {target!r}")
    return target if isinstance(target, str) else f"{type(target).__module__}:{type(target).__qualname__}"


def target_code(name: str) -> list[Path]:
    """The files that an import path's network is made by: where it is defined, and all of its package's folder."""
    module, _, attribute = name.partition(":")
    defined = inspect.getsourcefile(inspect.unwrap(getattr(importlib.import_module(module), attribute)))
    folder, files = Path(defined).parent, {Path(defined)}
    if "." in module or Path(defined).name == "__init__.py":
        files |= set(folder.glob("*.py"))
    return sorted(files)


def build_target(target: str | nn.Module, channels: int, image_size: int) -> Target:
    """Build a target by name, by import path (`package.module:Name`), or from a module, which is copied.

    What an import path names is called with the number of image channels where it has a parameter `channels`,
    else with nothing.

    Raises:
        UserError: for an unknown name, images that the network cannot take, or a network that cannot be
            predicted; the message names the layer.
    """
    name = target_name(target)
    if image_size < SMALLEST_IMAGE:
        raise UserError(f"target {name}: images of {image_size} px are too small, it needs {SMALLEST_IMAGE}")
    network = _made(target, name, channels)
    _refuse_unfit_layers(network, name)
    images = torch.randn(2, channels, image_size, image_size, generator=torch.Generator().manual_seed(0))
    convs, features = _forward_order(network.eval(), name, images)
    images = images.contiguous(memory_format=torch.channels_last)  # as they come in training
    if _wants_contiguous_maps(network, images):
        _give_contiguous_maps(network)
    _refuse_what_only_training_does(network.train(), name, images)
    _refuse_what_cannot_be_trained(network, name, torch.cat([images, images[:1]]))  # another number of them
    if name not in TARGETS:
        _refuse_what_a_file_loses(network, _made(target, name, channels), name, images)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return Target(network, convs, channels, image_size, features)


def _made(target: str | nn.Module, name: str, channels: int) -> nn.Module:
    return _copy_of(target, name) if isinstance(target, nn.Module) else _construct(target, channels)


def _copy_of(target: nn.Module, name: str) -> nn.Module:
    try:
        return copy.deepcopy(target).cpu()
    except Exception as error:  # a module may hold anything
        raise UserError(f"target {name}: cannot be copied ({_one_line(error)})") from None


def _construct(name: str, channels: int) -> nn.Module:
    check_target_name(name)
    if name in TARGETS:
        return TARGETS[name](channels)
    module, _, attribute = name.partition(":")
    try:
        build = getattr(importlib.import_module(module), attribute)
        takes_channels = "channels" in inspect.signature(build).parameters
        network = build(channels=channels) if takes_channels else build()
    except (Exception, SystemExit) as error:  # whatever the user's own code may raise
        raise UserError(f"target {name}: cannot be built ({_one_line(error)})") from None
    if not isinstance(network, nn.Module):
        raise UserError(f"target {name}: gives a {type(network).__name__}, not a torch.nn.Module")
    return network


UNFIT = (
    nn.Conv1d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.LazyConv2d,
    nn.SyncBatchNorm,
)


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _refuse_unfit_layers(network: nn.Module, name: str) -> None:
    """Refuse, by name, layers that would be left unpredicted, or that carry one group's state to the next."""
    owners: dict[int, str] = {}
    tensors = [*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)]
    for path, tensor in tensors:
        if owners.setdefault(id(tensor), path) != path:
            raise UserError(f"target {name}: {owners[id(tensor)]} and {path} are one tensor; untie them")
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
    """Counts calls of convolution functions, by whatever layer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.calls += getattr(function, "__name__", "").startswith("conv")
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def _forward_order(network: nn.Module, name: str, images: Tensor) -> tuple[tuple[ConvShape, ...], int]:
    """The convolutions in the order in which `images` pass them, each at its first use; values of a feature vector."""
    paths = {m: path for path, m in network.named_modules() if isinstance(m, nn.Conv2d | _BatchNorm)}
    calls: dict[nn.Module, int] = {}

    def note(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        calls[module] = calls.get(module, 0) + 1

    hooks = [module.register_forward_hook(note) for module in paths]
    try:
        with _Convolutions() as convolutions:
            features = _features(network, name, images)
    finally:
        for hook in hooks:
            hook.remove()
    order = [module for module in calls if isinstance(module, nn.Conv2d)]
    for module, path in paths.items():
        if isinstance(module, nn.Conv2d) and module not in calls:
            raise UserError(f"target {name}: layer {path} takes no part in the forward pass; remove it")
        if isinstance(module, _BatchNorm) and calls.get(module, 0) > 1:
            raise UserError(f"target {name}: layer {path} is used twice, on other maps: its statistics would be mixed")
    if convolutions.calls != sum(calls[module] for module in order):
        raise UserError(f"target {name}: calls a convolution function outside a Conv2d layer; make it a layer")
    convs = tuple(ConvShape(f"{paths[conv]}.weight", tuple(conv.weight.shape)) for conv in order)
    return convs, features.flatten(1).shape[1]


@torch.no_grad()
def _refuse_what_only_training_does(network: nn.Module, name: str, images: Tensor) -> None:
    """Refuse buffers that a training pass changes (BatchNorm's aside), and whatever else it does otherwise."""
    trained = copy.deepcopy(network).train()
    _forget_statistics(trained)
    before = {path: buffer.clone() for path, buffer in trained.named_buffers()}
    _forward_order(trained, name, images)
    for path, buffer in trained.named_buffers():
        if path not in before or not torch.allclose(before[path], buffer, rtol=0, atol=0, equal_nan=True):
            raise UserError(f"target {name}: {path} changes in training: it would carry one group into the next")


@torch.no_grad()
def _wants_contiguous_maps(network: nn.Module, images: Tensor) -> bool:
    """Whether the network, which takes contiguous images, fails on channels_last ones, as a `view` of its maps does."""
    try:
        copy.deepcopy(network).to(memory_format=torch.channels_last)(images)
    except RuntimeError:  # "view size is not compatible with input tensor's size and stride"
        return True
    return False


def _give_contiguous_maps(network: nn.Module) -> None:
    """Make a network's images and the output of its convolutions contiguous, in whatever layout they are computed."""
    network.register_forward_pre_hook(_contiguous_images)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(_contiguous_output)


def _contiguous_images(network: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].contiguous(),)


def _contiguous_output(conv: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return output.contiguous()


def _refuse_what_cannot_be_trained(network: nn.Module, name: str, images: Tensor) -> None:
    """Run a step as training does: its layout, its precision, and a gradient."""
    trained = copy.deepcopy(network).to(memory_format=torch.channels_last).train()
    _forget_statistics(trained)
    with torch.enable_grad():
        with torch.autocast("cpu", torch.bfloat16, enabled=wants_bf16("auto", images.device)):
            features = _features(trained, name, images)
        try:
            features.float().sum().backward()
        except RuntimeError as error:
            raise UserError(f"target {name}: has no gradient ({_one_line(error)})") from None


@torch.no_grad()
def _refuse_what_a_file_loses(network: nn.Module, again: nn.Module, name: str, images: Tensor) -> None:
    """Refuse a network that is not the same once its tensors are put into `again`, made anew, as loading does."""
    for path, value in network.state_dict().items():
        if not isinstance(value, Tensor):
            raise UserError(f"target {name}: {path} is state that is no tensor, and a file of weights holds only those")
    try:
        put_tensors(again, network.state_dict())
    except (RuntimeError, ValueError) as error:
        raise UserError(f"target {name}: cannot load its own state dict ({_one_line(error)})") from None
    features = [_features(copy.deepcopy(one).eval(), name, images.contiguous()) for one in (network, again)]
    if not torch.equal(*features):
        raise UserError(
            f"target {name}: with the same state dict it gives other features when it is made anew; "
            "what its features depend on has to be in the state dict"
        )


def put_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load tensors as a state dict of the module, whatever versions its layers have. Raises as `load_state_dict`."""
    state = module.state_dict()  # it carries the versions that some layers look at as they load
    state.clear()
    state.update(tensors)
    module.load_state_dict(state)


def _features(network: nn.Module, name: str, images: Tensor) -> Tensor:
    """The network's output, which has to be one tensor (N, ...)."""
    try:
        features = network(images)
    except Exception as error:  # whatever the user's own code may raise
        what = f"{images.shape[2]} px with {images.shape[1]} channel(s)"
        raise UserError(f"target {name}: cannot take images of {what} ({_one_line(error)})") from None
    if not isinstance(features, Tensor) or features.ndim < 2 or len(features) != len(images):
        mode = "training" if network.training else "evaluation"
        raise UserError(f"target {name}: must give one feature tensor an image, (N, d), and in {mode} does not")
    return features


def norms(network: nn.Module) -> list[_BatchNorm]:
    """The network's BatchNorm layers."""
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]


def _forget_statistics(network: nn.Module) -> None:
    """Let BatchNorm use the statistics of the images it is given, and keep none."""
    for norm in norms(network):
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None


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
        raise UserError(f"train.groups_per_step: this target takes 1 only on a GPU ({_one_line(error)})") from None


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
        _forget_statistics(self.body)

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


class Calibrator:
    """Turns predicted weights into plain target networks in eval mode.

    BatchNorm's running statistics become those of the images that the weights were predicted from, all in one
    batch; images classified later never change them. Its variance is the batch's own (biased), as in training,
    so that what the calibrating pass gives is what the network gives for those images afterwards.
    """

    def __init__(self, target: Target, shared: SharedTarget) -> None:
        self.empty = copy.deepcopy(target.network).eval()  # all but the convolutions' weights
        for module in self.empty.modules():
            if isinstance(module, nn.Conv2d):
                module.weight = None
        for name, tensor in [*shared.body.named_parameters(), *shared.body.named_buffers()]:
            _put(self.empty, name, tensor)  # the very same, so that they stay as the model has them

    @torch.no_grad()
    def __call__(
        self, weights: Weights, images: Tensor, writes: Mapping[str, Callable[[Tensor], Tensor]] | None = None
    ) -> tuple[nn.Module, Tensor]:
        """One group's weights and images (N, C, H, W) -> its network, and the images' features (N, d).

        What `writes` names is made in passing, from what its convolution is given: (N, d_in, H', W') -> its weight.
        """
        network = _copied(self.empty)
        for name, weight in weights.items():
            _put(network, name, nn.Parameter(weight, requires_grad=False))
        hooks = [_write_in_passing(network, name, write) for name, write in (writes or {}).items()]
        features = calibrate(network, images)
        for hook in hooks:
            hook.remove()
        return network, features


@torch.no_grad()
def calibrate(network: nn.Module, images: Tensor) -> Tensor:
    """Make BatchNorm's running statistics those of the images (N, C, H, W), in place; their features (N, d)."""
    calibrated = [(norm, norm.momentum, norm.register_forward_hook(_make_biased)) for norm in norms(network)]
    for norm, _, _ in calibrated:
        norm.train()
        norm.momentum = 1.0  # the statistics of this batch alone
    features = network(images).flatten(1)
    for norm, momentum, hook in calibrated:
        hook.remove()
        norm.eval()
        norm.momentum = momentum
    return features


def _copied(network: nn.Module) -> nn.Module:
    """`copy.deepcopy`, several times faster: every module has a dozen empty dictionaries (hooks), made here anew."""
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
