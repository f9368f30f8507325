"""Every option of the method, as frozen dataclasses whose values are checked once, when they are made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from pudnet.augmentation import Augmentation
from pudnet.errors import UserError

# Strict: report `eta: "0.2"` or `depth: true` as a mistake instead of converting it.
STRICT = ConfigDict(extra="forbid", strict=True)

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]

# A ridge classifier's penalty in a prediction: the learned one, or a smaller one if that is clearly better with each
# labelled image left out in turn (`pudnet.classifier.Regression.choose`).
Penalty = Literal["learned", "leave_one_out"]

# What a ridge classifier sees of a ConvNet-3 in a prediction: its last block, or all blocks if that is clearly better
# in the same way (`pudnet.classifier.Regression.choose`).
Blocks = Literal["last", "leave_one_out"]

Config = TypeVar("Config")


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """The hypernetwork (sections 3.3 and 3.4, appendix A.1).

    A sketch is l x m: m = `hidden` values for each of l = `depth` recurrent layers.
    """

    extractor: Annotated[str, Field(pattern=r"^[1-9]conv(-1linear)?$")] = "1conv-1linear"  # table 12's names
    extractor_channels: Positive = 32
    normalization: Literal["batch", "group", "layer"] = "group"
    pooling: Literal["mean", "sum", "geometric_mean", "mean_var"] = "mean"  # table 9
    sketch: Literal["images", "constant"] = "images"  # constant: a control, whose weights do not depend on the group
    context: Literal["gru", "ahru", "none"] = "gru"
    initial_state: Literal["sketch", "random"] = "sketch"
    depth: Annotated[int, Field(ge=1, le=8)] = 2
    hidden: Positive = 128
    eta: Fraction = 0.2
    generator_hidden: Positive = 16
    base: bool = False  # learn one base kernel for each layer; predictions are added to it and start at zero
    change: bool = True  # predict weights by sketch, context and generators; else at most class filters are predicted
    class_filters: bool = False  # add filters to the last convolution that are solved for the group's classes
    filter_grid: Positive = 2  # solve them for the whole map and for grid x grid windows; 1: for the whole map only
    classifier: Literal["centroids", "ridge"] = "centroids"  # ridge: fitted to all images that a prediction uses
    ridge: PositiveFloat = 3.0  # that classifier's initial penalty; training hardly moves it
    ridge_scale: PositiveFloat = 5.0  # the initial scale of its logits; training hardly moves it either
    penalty: Penalty = "learned"  # of that classifier, in a prediction; leave_one_out may choose a smaller one
    blocks: Blocks = "last"  # of ConvNet-3, for that classifier; leave_one_out: a prediction may choose all three
    sketch_images: Positive = 50  # a prediction computes the sketch from this many images, spread over the classes

    def __post_init__(self) -> None:
        if not self.base and (self.class_filters or not self.change):
            raise ValueError("class_filters: true and change: false need base: true")

    @property
    def reads_labels(self) -> bool:
        """Whether all images that are looked at count with their labels: in class filters or ridge regression."""
        return self.class_filters or self.classifier == "ridge"

    @property
    def makes_weights(self) -> bool:
        """Whether a group gets weights of its own, beside its classifier and BatchNorm's statistics."""
        return self.change or self.class_filters

    def labelled(self, k: int, images: int) -> int:
        """How many of the `images` of each of k classes a model that reads labels uses with them in training.

        At most half, since an image whose label was used cannot be a query.
        """
        return min(math.ceil(self.sketch_images / k), images // 2)


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    """Meta-training (section 3.5, appendix A.2): one Adam update for each step."""

    passes: PositiveFloat = 1.0  # how often the task groups are passed, each time in a new order
    patience: Positive | None = None  # a validating trial ends once accuracy has not risen for so many reports
    groups_per_step: Positive = 1  # Algorithm 1 has one; a step of several makes better use of a GPU
    learning_rate: PositiveFloat = 1e-3
    schedule: Literal["constant", "cosine", "one_cycle"] = "constant"
    clip_norm: PositiveFloat = 10.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: Literal["none", "kernels", "graphs"] = "none"  # on a GPU: pudnet/gpu.py
    temperature: PositiveFloat = 10.0  # tau of Eq. 6: fixed in A.2, learnable in 3.5
    learn_temperature: bool = False
    full_weight: Weight = 1.0  # weight of L2, Eq. 8
    kl_weight: Weight = 1.0  # weight of L3, Eq. 9
    kl_teaches: Literal["full", "metric", "both"] = "full"  # which classifier learns from L3
    # The share of the groups, the first ones, whose images are mixed to pretrain on all classes. None: no share, but in
    # the pipeline `default_pretraining`
    pretraining_share: Fraction | None = None
    augment: Augmentation = "none"  # shift and mirror training images at random (pudnet/augmentation.py)
    support_per_class: Positive = 10
    report_every: Positive = 100  # groups between reports, checkpoints and NaN checks, rounded up to whole steps

    def groups(self, of_a_pass: int) -> int:
        """How many groups all passes have together."""
        return max(1, round(self.passes * of_a_pass))


def passed(*times: float) -> str:
    """How often groups are passed, in words; of several numbers, the least and the most."""
    least, most = min(times), max(times)
    if least != most:
        return f"passed {least:.3g} to {most:.3g} times"
    return "passed once" if most == 1 else f"passed {most:.3g} times"


# One trunk for all groups, and a ridge classifier that is solved for each.
TRUNK_AND_RIDGE: dict[str, Any] = {
    "base": True,
    "change": False,
    "eta": 0.0,  # without a change there is no residual
    "depth": 1,
    "classifier": "ridge",
    "sketch_images": 90,  # docs/method/plus.md says what a prediction then costs
    "full_weight": 0.0,
    "kl_weight": 0.0,
    "learning_rate": 6e-3,
    "schedule": "one_cycle",
    "clip_norm": 1.0,
}

# What each variant changes: the paper's method, ours, the plainest opponent as a variant (its trunk is pretrained, and
# nothing but the classifier is made for a group), table 4's ablations and a control.
VARIANTS: dict[str, dict[str, Any]] = {
    "pudnet": {},
    "pudnet_plus": TRUNK_AND_RIDGE | {"class_filters": True},
    "pretrained_ridge": TRUNK_AND_RIDGE | {"class_filters": False, "pretraining_share": 1.0, "learning_rate": 1.2e-2},
    "without_context": {"context": "none"},
    "random_hidden": {"initial_state": "random"},
    "without_initial_residual": {"eta": 0.0},
    "metric_only": {"full_weight": 0.0, "kl_weight": 0.0},
    "without_kl": {"kl_weight": 0.0},
    "constant_sketch": {"sketch": "constant"},
}


def paper_target(target: str) -> str:
    """The paper's target whose extractor, eta and depth this one takes; a network of your own takes ResNet-18's."""
    return {"convnet3_multilevel": "convnet3", "convnet3": "convnet3", "resnet34": "resnet34"}.get(target, "resnet18")


def default_extractor(target: str) -> str:
    """Section 4.1: one block and a linear layer for ConvNet-3, five blocks for ResNets (and other networks)."""
    return "1conv-1linear" if paper_target(target) == "convnet3" else "5conv"


def default_pretraining(target: str, base: bool) -> float:
    """The share of pretraining: most of the training for a ResNet that has base weights, else none, as in the paper.

    Without it PudNet+ for ResNet-18 was 11 points worse on validation groups (`reference/README.md`).
    """
    return 0.8 if base and target.startswith("resnet") else 0.0


def apply_variant(name: str, model: ModelConfig, train: TrainConfig) -> tuple[ModelConfig, TrainConfig]:
    """Apply a named variant's changes to both configurations; `UserError` for an unknown name."""
    if name not in VARIANTS:
        raise UserError(f"unknown variant {name!r}; known: {', '.join(VARIANTS)}")
    changes = VARIANTS[name]
    of_model = {k: v for k, v in changes.items() if k in ModelConfig.__dataclass_fields__}
    of_train = {k: v for k, v in changes.items() if k in TrainConfig.__dataclass_fields__}
    return replace(model, **of_model), replace(train, **of_train)


def parse(kind: type[Config], values: Mapping[str, Any], where: str) -> Config:
    """Build one configuration from plain values.

    Raises `UserError` with one line: the key (after `where`), what is wrong with it, and its value.
    """
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join([where, *map(str, first["loc"])]).strip(".")
        raise UserError(f"{key}: {_complaint(first, kind)}") from None


def _complaint(error: Mapping[str, Any], kind: type) -> str:
    if error["type"] == "unexpected_keyword_argument":
        return f"unknown key; known: {', '.join(kind.__dataclass_fields__)}"
    if error["type"] == "missing":
        return "missing"
    if error["type"] == "value_error":  # raised by our own check, with a complete message
        return str(error["ctx"]["error"])
    return f"{error['msg'].lower()}, got {error['input']!r}"
