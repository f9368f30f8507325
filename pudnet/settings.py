"""The named settings (section 4.1 of the paper): the source of images, the sizes of groups, eta and depth.

Two are ours: `digits`, a small one that needs no download, and `domains`, where datasets differ as users' do.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from pudnet.errors import UserError


@dataclass(frozen=True)
class Setting:
    """One setting, with the paper's own counts unless it is `ours`.

    `images_per_group` None: half of each class's images. There may be several sources; `train_classes` then has a
    number for each.
    """

    source: str | list[str]
    image_size: int
    channels: int
    train_classes: int | list[int]
    classes_per_group: int
    images_per_group: int | None
    train_groups: int
    test_groups: int
    looks: tuple[str, ...] = ("plain",)  # of the images, one for a group (pudnet/data/looks.py)
    ours: bool = False  # not one of the paper's
    test_source: str | None = None  # test on this other set as a whole: one half is the group, the other its twin
    eta: dict[str, float] = field(default_factory=lambda: {"convnet3": 0.2, "resnet18": 0.2, "resnet34": 0.2})
    depth: dict[str, int] = field(default_factory=lambda: {"convnet3": 2, "resnet18": 2, "resnet34": 2})


CIFAR100 = Setting(
    source="torchvision:CIFAR100",
    image_size=32,
    channels=3,
    train_classes=80,
    classes_per_group=5,
    images_per_group=500,
    train_groups=100_000,
    test_groups=500,
    eta={"convnet3": 0.1, "resnet18": 0.5, "resnet34": 0.5},
)
IMAGENET = replace(
    CIFAR100,
    source="folder:data/raw/mini-imagenet",
    image_size=84,
    train_groups=50_000,
    eta={"convnet3": 0.3, "resnet18": 0.5, "resnet34": 0.5},
    depth={"convnet3": 2, "resnet18": 4, "resnet34": 4},
)


def _tested_on(setting: Setting, test_source: str) -> Setting:
    """Inter-dataset: train on the same set, with ten classes in a group; test on one group of all of another set."""
    return replace(setting, test_source=test_source, classes_per_group=10, test_groups=1)


ANIMALS10 = "folder:data/raw/animals10"
CIFAR10 = "torchvision:CIFAR10"

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
        ours=True,
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
    "cifar100": CIFAR100,
    "imagenet": IMAGENET,
    # 10 classes of digits and of Fashion-MNIST allow 3 in a group: 6 to train on, half of them to validate, 4 to test.
    # The smallest class of digits has 174 images, which is enough for twins of 80.
    "domains": Setting(
        source=["torchvision:CIFAR100", "torchvision:FashionMNIST", "sklearn:digits"],
        image_size=32,
        channels=3,
        train_classes=[80, 6, 6],
        classes_per_group=3,
        images_per_group=240,
        train_groups=10_000,
        test_groups=500,
        ours=True,
        looks=(
            "plain",
            "grey",
            "inverted",
            "exchanged",
            "turned_90",
            "turned_270",
            "blurred",
            "noisy",
            "low_contrast",
            "dark",
            "small",
            "on_red",
        ),
    ),
    "cifar100-animals10": _tested_on(CIFAR100, ANIMALS10),
    "cifar100-cifar10": _tested_on(CIFAR100, CIFAR10),
    "imagenet-animals10": _tested_on(IMAGENET, ANIMALS10),
    "imagenet-cifar10": _tested_on(IMAGENET, CIFAR10),
}


def get_setting(name: str) -> Setting:
    """Look up a setting; for an unknown name, `UserError` lists the known ones."""
    if name not in SETTINGS:
        raise UserError(f"setting: unknown name {name!r}; known: {', '.join(SETTINGS)}")
    return SETTINGS[name]
