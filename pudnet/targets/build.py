"""Builds a target from its name, from an import path, or from a user's own module."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from pudnet.errors import UserError, one_line
from pudnet.targets.checks import (
    forward_order,
    refuse_unfit_layers,
    refuse_what_a_file_loses,
    refuse_what_cannot_be_trained,
    refuse_what_only_training_does,
)
from pudnet.targets.convnet3 import WIDTH, ConvNet3, MultilevelConvNet3
from pudnet.targets.layout import give_contiguous_maps, wants_contiguous_maps
from pudnet.targets.resnets import resnet
from pudnet.targets.target import Target, draw_convolutions

ALL_BLOCKS = "convnet3_multilevel"
TARGETS: dict[str, Callable[[int], nn.Module]] = {
    "convnet3": ConvNet3,
    ALL_BLOCKS: MultilevelConvNet3,
    "resnet18": lambda channels: resnet("resnet18", channels),
    "resnet34": lambda channels: resnet("resnet34", channels),
}
EARLIER_BLOCKS = 0.5  # the scale of their normalised features, beside the last block's
SMALLEST_IMAGE = 8  # px; ConvNet-3 halves it three times


def is_import_path(name: str) -> bool:
    """Whether a target's name is the import path of a user's own class or function, `package.module:Name`."""
    return ":" in name


def check_target_name(name: str) -> None:
    """Raise `UserError` unless the name is one of our targets or an import path."""
    if name not in TARGETS and not is_import_path(name):
        own = "or your own as package.module:Name"
        raise UserError(f"target: unknown name {name!r}; known: {', '.join(TARGETS)}, {own}")


def target_name(target: str | nn.Module) -> str:
    """The name of a target in a card. A module that is given as an object has the import path of its class.

    Raises `UserError` if `target` is neither a name nor a module.
    """
    if not isinstance(target, str | nn.Module):
        raise UserError(f"target: must be a name or a torch.nn.Module (not its class), got {target!r}")
    return target if isinstance(target, str) else f"{type(target).__module__}:{type(target).__qualname__}"


def target_code(name: str) -> list[Path]:
    """The source files of an import path's network: the file that defines it, and the other files of its package."""
    module, _, attribute = name.partition(":")
    imported = importlib.import_module(module)
    built_by = inspect.unwrap(getattr(imported, attribute))
    files = set()
    while isinstance(built_by, functools.partial):  # made in the one file, of what another may define
        files.add(Path(imported.__file__))
        built_by = inspect.unwrap(built_by.func)
    has_file = inspect.isclass(built_by) or inspect.isroutine(built_by)  # an object that can be called has none
    defined = Path(inspect.getsourcefile(built_by if has_file else imported))
    files.add(defined)
    if "." in module or defined.name == "__init__.py":
        files |= set(defined.parent.glob("*.py"))
    return sorted(files)


@torch.inference_mode(False)  # the checks need gradients, which a caller's inference mode would not record
def build_target(target: str | nn.Module, channels: int, image_size: int) -> Target:
    """Build a target from its name, an import path (`package.module:Name`), or a module, which is copied.

    The class or function of an import path is called with `channels=` (of the images) if it has that parameter, else
    without arguments.

    Raises:
        UserError: if the name is unknown, the network cannot take such images, or its weights cannot be
            predicted; the message names the layer.
    """
    name = target_name(target)
    if image_size < SMALLEST_IMAGE:
        raise UserError(f"target {name}: images of {image_size} px are too small, it needs {SMALLEST_IMAGE}")
    network = _made(target, name, channels).float()  # whatever the caller's default dtype is
    refuse_unfit_layers(network, name)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, channels, image_size, image_size, generator=generator, dtype=torch.float32)
    convs, features = forward_order(network.eval(), name, images)
    if name not in TARGETS:
        _prepare_own(network, _made(target, name, channels).float(), name, images)
    draw_convolutions(network.train())
    return Target(network, convs, channels, image_size, features)


def _prepare_own(network: nn.Module, again: nn.Module, name: str, images: Tensor) -> None:
    """Give a user's own network the maps that it needs, and refuse it if it does not fit; ours are known to.

    `again` is the same network, newly built.
    """
    maps = images.contiguous(memory_format=torch.channels_last)  # as in training
    if wants_contiguous_maps(network, maps):
        give_contiguous_maps(network)
    refuse_what_only_training_does(network.train(), name, maps)
    refuse_what_cannot_be_trained(network, name, torch.cat([maps, maps[:1]]))  # 3 images: another batch size
    refuse_what_a_file_loses(network, again, name, maps)


def has_all_blocks(target: Target) -> bool:
    """Whether the target is `convnet3` itself, not a network of your own that is derived from it."""
    return type(target.network) is ConvNet3 and target.convs[0].shape[0] == WIDTH


def all_blocks(target: Target) -> Target:
    """A ConvNet-3 as `convnet3_multilevel`, whose last block counts for more in the features than the earlier ones."""
    with torch.random.fork_rng(devices=[]):  # its kernels are replaced: the caller's random numbers stay as they were
        wide = build_target(ALL_BLOCKS, target.channels, target.image_size)
    for level in (wide.network.level1, wide.network.level2):
        nn.init.constant_(level.norm.weight, EARLIER_BLOCKS)
    return wide


def _made(target: str | nn.Module, name: str, channels: int) -> nn.Module:
    return _copy_of(target, name) if isinstance(target, nn.Module) else _construct(target, channels)


def _copy_of(target: nn.Module, name: str) -> nn.Module:
    try:
        return copy.deepcopy(target).cpu()
    except Exception as error:  # a module may hold anything
        raise UserError(f"target {name}: cannot be copied ({one_line(error)})") from None


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
        raise UserError(f"target {name}: cannot be built ({one_line(error)})") from None
    if not isinstance(network, nn.Module):
        raise UserError(f"target {name}: gives a {type(network).__name__}, not a torch.nn.Module")
    return network
