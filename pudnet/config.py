"""Every knob of the method, as frozen dataclasses that are checked once, where they enter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from pudnet.errors import UserError

# Strict: `eta: "0.2"` or `depth: true` is a mistake to point out, not one to guess about.
STRICT = ConfigDict(extra="forbid", strict=True)

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]

Config = TypeVar("Config")


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """The hypernetwork (sections 3.3 and 3.4, appendix A.1).

    The sketch is l x m: l = `depth` recurrent layers, m = `hidden` values for each.
    """

    extractor: Annotated[str, Field(pattern=r"^[1-9]conv(-1linear)?$")] = "1conv-1linear"  # table 12's names
    extractor_channels: Positive = 32
    normalization: Literal["batch", "group", "layer"] = "group"
    pooling: Literal["mean", "sum", "geometric_mean", "mean_var"] = "mean"  # table 9
    sketch: Literal["images", "constant"] = "images"  # constant: a control, the weights ignore the group
    context: Literal["gru", "ahru", "none"] = "gru"
    initial_state: Literal["sketch", "random"] = "sketch"
    depth: Annotated[int, Field(ge=1, le=8)] = 2
    hidden: Positive = 128
    eta: Fraction = 0.2
    generator_hidden: Positive = 16
    base: bool = False  # a learned kernel a layer, which what is predicted changes, from no change on
    change: bool = True  # whether sketch, context and generators predict anything (without: class filters alone)
    class_filters: bool = False  # whether the last convolution gets filters solved for the group's classes
    filter_grid: Positive = 2  # class filters of the whole map and of grid x grid windows of it; 1: the whole alone
    classifier: Literal["centroids", "ridge"] = "centroids"  # ridge: solved for, of the filters' images; no temperature
    ridge: PositiveFloat = 3.0  # that classifier's penalty where training begins, which hardly moves it
    ridge_scale: PositiveFloat = 5.0  # likewise the scale of its logits
    sketch_images: Positive = 50  # of a group, spread over its classes, when it is predicted for

    def __post_init__(self) -> None:
        if not self.base and (self.class_filters or not self.change):
            raise ValueError("class_filters: true and change: false need base: true")
        if self.classifier == "ridge" and not self.class_filters:
            raise ValueError("classifier: ridge needs class_filters: true; without them it is the baseline r2d2")

    def labelled(self, k: int, images: int) -> int:
        """Of so many `images` of each of k classes, those whose labels enter a sketch: half at most, as those cannot be
        classified by it any more."""
        return min(math.ceil(self.sketch_images / k), images // 2)


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    """Meta-training (section 3.5, appendix A.2): one update of Adam a step."""

    groups_per_step: Positive = 1  # Algorithm 1 has one; several share the hypernetwork's cost
    learning_rate: PositiveFloat = 1e-3
    schedule: Literal["constant", "cosine", "one_cycle"] = "constant"
    clip_norm: PositiveFloat = 10.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: Literal["none", "kernels", "graphs"] = "none"  # what is done with small operators on a GPU: pudnet/gpu.py
    temperature: PositiveFloat = 10.0  # tau of Eq. 6: fixed in A.2, learnable in 3.5
    learn_temperature: bool = False
    full_weight: Weight = 1.0  # of L2, Eq. 8
    kl_weight: Weight = 1.0  # of L3, Eq. 9
    kl_teaches: Literal["full", "metric", "both"] = "full"  # which classifier L3's gradient reaches
    pretraining_share: Fraction = 0.0  # of the groups, the first: their images mixed, all training classes told apart
    support_per_class: Positive = 10
    report_every: Positive = 100  # groups between two reports, checkpoints and NaN checks


# The method as the paper has it, ours, table 4's ablations and a control, each as what it changes.
VARIANTS: dict[str, dict[str, Any]] = {
    "pudnet": {},
    "pudnet_plus": {
        "base": True,
        "change": False,
        "eta": 0.0,  # without a change there is no residual
        "depth": 1,
        "class_filters": True,
        "classifier": "ridge",
        "sketch_images": 90,  # in about 1.4 times the time of a prediction by `pudnet`
        "full_weight": 0.0,
        "kl_weight": 0.0,
        "learning_rate": 6e-3,
        "schedule": "one_cycle",
        "clip_norm": 1.0,
    },
    "without_context": {"context": "none"},
    "random_hidden": {"initial_state": "random"},
    "without_initial_residual": {"eta": 0.0},
    "metric_only": {"full_weight": 0.0, "kl_weight": 0.0},
    "without_kl": {"kl_weight": 0.0},
    "constant_sketch": {"sketch": "constant"},
}


def default_extractor(target: str) -> str:
    """Section 4.1: one block and a linear layer for ConvNet-3, five blocks for ResNets (and other networks)."""
    return "1conv-1linear" if target == "convnet3" else "5conv"


def apply_variant(name: str, model: ModelConfig, train: TrainConfig) -> tuple[ModelConfig, TrainConfig]:
    """Change the two configurations as the named ablation or control says; `UserError` for an unknown name."""
    if name not in VARIANTS:
        raise UserError(f"unknown variant {name!r}; known: {', '.join(VARIANTS)}")
    changes = VARIANTS[name]
    of_model = {k: v for k, v in changes.items() if k in ModelConfig.__dataclass_fields__}
    of_train = {k: v for k, v in changes.items() if k in TrainConfig.__dataclass_fields__}
    return replace(model, **of_model), replace(train, **of_train)


def parse(kind: type[Config], values: Mapping[str, Any], where: str) -> Config:
    """Build one configuration from plain values.

    Raises `UserError` with one line that names the key (below `where`), what is wrong and what was given.
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
    if error["type"] == "value_error":  # of a check of ours, which says it all
        return str(error["ctx"]["error"])
    return f"{error['msg'].lower()}, got {error['input']!r}"
