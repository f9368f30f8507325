"""The named protocols (section 4.1 of the paper): where groups come from, their k and n, eta and depth."""

from __future__ import annotations

from dataclasses import dataclass, field

from pudnet.errors import UserError


@dataclass(frozen=True)
class Setting:
    """One protocol. Counts are the paper's own; `images_per_group` None: all images of a class, halved."""

    source: str
    image_size: int
    channels: int
    train_classes: int
    classes_per_group: int
    images_per_group: int | None
    train_groups: int
    test_groups: int
    test_source: str | None = None  # inter-dataset: the whole other set, halved
    eta: dict[str, float] = field(default_factory=lambda: {"convnet3": 0.2, "resnet18": 0.2, "resnet34": 0.2})
    depth: dict[str, int] = field(default_factory=lambda: {"convnet3": 2, "resnet18": 2, "resnet34": 2})


def _cifar100(test_source: str | None = None, classes_per_group: int = 5) -> Setting:
    return Setting(
        source="torchvision:CIFAR100",
        image_size=32,
        channels=3,
        train_classes=80,
        classes_per_group=classes_per_group,
        images_per_group=500,
        train_groups=100_000,
        test_groups=500 if test_source is None else 1,
        test_source=test_source,
        eta={"convnet3": 0.1, "resnet18": 0.5, "resnet34": 0.5},
    )


def _imagenet(test_source: str | None = None, classes_per_group: int = 5) -> Setting:
    return Setting(
        source="folder:data/raw/mini-imagenet",
        image_size=84,
        channels=3,
        train_classes=80,
        classes_per_group=classes_per_group,
        images_per_group=500,
        train_groups=50_000,
        test_groups=500 if test_source is None else 1,
        test_source=test_source,
        eta={"convnet3": 0.3, "resnet18": 0.5, "resnet34": 0.5},
        depth={"convnet3": 2, "resnet18": 4, "resnet34": 4},
    )


ANIMALS10 = "folder:data/raw/animals10"

SETTINGS: dict[str, Setting] = {
    "digits": Setting(
        source="sklearn:digits",
        image_size=8,
        channels=1,
        train_classes=6,
        classes_per_group=2,
        images_per_group=None,
        train_groups=400,
        test_groups=100,
    ),
    "fashion": Setting(
        source="torchvision:FashionMNIST",
        image_size=28,
        channels=1,
        train_classes=6,
        classes_per_group=2,
        images_per_group=600,
        train_groups=2_000,
        test_groups=500,
    ),
    "cifar100": _cifar100(),
    "imagenet": _imagenet(),
    "cifar100-animals10": _cifar100(ANIMALS10, classes_per_group=10),
    "cifar100-cifar10": _cifar100("torchvision:CIFAR10", classes_per_group=10),
    "imagenet-animals10": _imagenet(ANIMALS10, classes_per_group=10),
    "imagenet-cifar10": _imagenet("torchvision:CIFAR10", classes_per_group=10),
}


def get_setting(name: str) -> Setting:
    """Look a setting up; `UserError` with the known names for another."""
    if name not in SETTINGS:
        raise UserError(f"setting: unknown name {name!r}; known: {', '.join(SETTINGS)}")
    return SETTINGS[name]
