"""Networks that are not ours: what a user may name as a target, and what must be refused."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


class Depthwise(nn.Module):
    """Grouped and depthwise convolutions, a bias, a linear layer; defined in another order than used."""

    def __init__(self, channels: int):
        super().__init__()
        self.head = nn.Linear(24, 10)
        self.point = nn.Conv2d(8, 24, 1)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.stem = nn.Conv2d(channels, 8, (3, 5), stride=2, padding=(1, 2), bias=False)
        self.grouped = nn.Conv2d(24, 24, 3, padding=1, groups=4, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(d) for d in (8, 8, 24))
        self.register_buffer("mask", torch.rand(24) + 0.5)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.norms[0](self.stem(images)).relu()
        maps = self.norms[1](self.depth(maps)).relu()
        maps = self.norms[2](self.grouped(self.point(maps))).relu()
        return self.head(maps.mean((2, 3)) * self.mask)


class Viewing(nn.Module):
    """Takes a `view` of its maps, as tutorials do, which only contiguous ones allow."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, stride=2, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.conv(self.norm(self.stem(images)).relu())
        return maps.view(maps.size(0), -1)


class Branching(nn.Module):
    """Does other things for other images, which no call for several groups at once can."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.conv(images)
        return maps if maps.sum() > 0 else -maps


class Wrapped(nn.Module):
    """One layer that a test chooses, and a convolution."""

    def __init__(self, layer: nn.Module, use: bool = True):
        super().__init__()
        self.stem, self.layer, self.use = nn.Conv2d(3, 4, 3), layer, use

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stem(images)
        return self.layer(maps) if self.use else maps


def named(name: str) -> nn.Module:
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    network.register_parameter(name, nn.Parameter(torch.zeros(4)))
    return network


narrow = functools.partial(Depthwise, channels=3)
partial_of_another_file = functools.partial(nn.Conv2d, 3, 4, 3)


def tied() -> nn.Module:
    """Two layers with one weight."""
    network = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3))
    network[1].weight = network[0].weight
    return network


class Pair(nn.Module):
    """Gives more than features."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, self.conv(images)


class Awkward(nn.Module):
    """Does one thing that cannot be handled."""

    def __init__(self, what: str):
        super().__init__()
        self.conv, self.norm, self.what = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), what
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("cache", None)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        maps = self.norm(self.conv(images))
        if self.what == "norm" or (self.what == "norm in training" and self.training):
            return self.norm(maps)
        if self.what == "cache" and self.training:
            self.cache = maps
        if self.what == "count" and self.training:
            self.count += 1
        if self.what == "function":
            return F.conv2d(maps, torch.ones(3, 3, 1, 1))
        return (maps, maps) if self.what == "pair" and self.training else maps


class Lossy(nn.Module):
    """Is not the same once its state dict was written to a file and read into a new one."""

    def __init__(self, what: str):
        super().__init__()
        self.conv, self.what = nn.Conv2d(3, 3, 3), what
        if what == "renamed":
            self.register_state_dict_post_hook(lambda module, state, prefix, _: state.update(extra=torch.zeros(1)))
        self.register_buffer("drawn", torch.rand(1) if what == "drawn" else torch.ones(1), persistent=False)

    def get_extra_state(self) -> dict | Tensor:
        return {"step": 3} if self.what == "extra" else torch.zeros(1)

    def set_extra_state(self, state: dict | Tensor) -> None:
        pass

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images[:2] if self.what == "two" else images) * self.drawn


def drawn() -> nn.Module:
    """Other features each time it is made."""
    return Lossy("drawn")


def broken() -> nn.Module:
    """Cannot be built."""
    raise ValueError("no\nsuch\nluck")


def number() -> int:
    """Not a network."""
    return 3


def with_parameter(name: str, value: Tensor) -> nn.Module:
    """A network with a parameter of its own."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    network.register_parameter(name, nn.Parameter(value))
    return network


REFUSED: dict[str, nn.Module | str] = {
    "five has five dimensions": with_parameter("five", torch.zeros(1, 1, 1, 1, 8)),
    "layer .*ConvTranspose2d": Wrapped(nn.ConvTranspose2d(4, 4, 3)),
    "layer layer is a Conv1d": Wrapped(nn.Conv1d(4, 4, 3), use=False),
    "layer layer is a LazyConv2d": Wrapped(nn.LazyConv2d(4, 3)),
    "layer layer .*InstanceNorm2d.* running statistics": Wrapped(nn.InstanceNorm2d(4, track_running_stats=True)),
    "layer layer .*BatchNorm2d.* no running statistics": Wrapped(nn.BatchNorm2d(4, track_running_stats=False)),
    "weight of layer layer is parametrized": Wrapped(weight_norm(nn.Conv2d(4, 4, 3))),
    "layer layer takes no part": Wrapped(nn.Conv2d(4, 4, 3), use=False),
    "0.weight and 1.weight are one tensor": tied(),
    "head_bias is what a file calls a tensor of the classifier": named("head_bias"),
    "layer norm is used twice": Awkward("norm"),
    "layer norm is used twice: the": Awkward("norm in training"),
    "cache changes in training": Awkward("cache"),
    "count changes in training": Awkward("count"),
    "in training mode it does not": Awkward("pair"),
    "convolution function outside": Awkward("function"),
    "no Conv2d": nn.Sequential(nn.Flatten(), nn.Linear(3, 3)),
    "in evaluation mode it does not": Pair(),
    "_extra_state in its state dict is no tensor": Lossy("extra"),
    "cannot load its own state dict .*extra": Lossy("renamed"),
    "with the same state dict loaded, it gives other features": "tests.nets:drawn",
    "must return one tensor": Lossy("two"),
    "cannot take images of 16 px with 3 channel": nn.Sequential(nn.Conv2d(5, 4, 3)),
}


def features_of(network: nn.Module, images: Tensor) -> Tensor:
    """A plain network's features, flat."""
    with torch.no_grad():
        return network(images).flatten(1)
