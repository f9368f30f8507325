"""Reads and checks params.yaml, all of it in every stage, and fills its null values from the setting."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, field, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from pipeline.yaml_file import check_block, read_yaml
from pudnet.baselines import LEARNED, SCRATCH, config_type
from pudnet.config import (
    STRICT,
    VARIANTS,
    ModelConfig,
    Positive,
    TrainConfig,
    apply_variant,
    default_extractor,
    default_pretraining,
    paper_target,
    parse,
)
from pudnet.data.groups import GroupSizes
from pudnet.data.looks import LOOKS
from pudnet.data.sources import check_source
from pudnet.errors import UserError
from pudnet.settings import Setting, get_setting
from pudnet.targets import check_target_name

PARAMS = Path("params.yaml")
MOST_CELLS = 10_000  # in a grid
MOST_SPLITS = 1000
STATIC = "static_trunk"
UNTRAINED = ("constant_sketch", "shuffled_sketch", "random_weights")
CONTROLS = (STATIC, *UNTRAINED)
PLUS = "pudnet_plus"  # our variant, which is a method of the bench too, so that it is measured whatever `variant` is
METHODS = (*LEARNED, *SCRATCH, PLUS, *CONTROLS)
# Keys that must not differ between methods.
THE_SAME_FOR_ALL = ("support_per_class", "report_every", "epochs", "groups_per_step", "patience")
OF_PUDNET = (
    "full_weight",
    "kl_weight",
    "kl_teaches",
    "temperature",
    "learn_temperature",
)  # keys that only PudNet's objective has
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Look = Literal[tuple(LOOKS)]
Grid = dict[str, Annotated[list[Any], Field(min_length=1)]]  # values to try for each key


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


@dataclass(frozen=True, config=STRICT)
class PrepareParams:
    """The sources of the images (in params.yaml, one need not be a list), and the size that they are converted to."""

    source: Annotated[list[str], Field(min_length=1), BeforeValidator(_as_list)]
    image_size: Annotated[int, Field(ge=8, le=512)]
    channels: Literal[1, 3]
    test_source: str | None = None


@dataclass(frozen=True, config=STRICT)
class GroupsParams:
    """The numbers of groups, and of classes and images in a group."""

    train_classes: Annotated[list[Positive], BeforeValidator(_as_list)]  # of each source
    classes_per_group: Annotated[int, Field(ge=2)]
    train_groups: Positive
    test_groups: Positive
    search_groups: Positive
    validation_groups: Annotated[int, Field(ge=2)]
    images_per_group: Positive | None = None
    test_classes: Positive | None = None  # None: all classes that are not trained on
    test_whole: bool = False
    test_classes_per_group: Annotated[int, Field(ge=2)] | None = None  # None: as in training groups
    test_images_per_group: Positive | None = None
    looks: Annotated[list[Look], Field(min_length=1)] = field(default_factory=lambda: ["plain"])
    test_looks: Annotated[list[Look], Field(min_length=1)] | None = None  # None: those of the training groups


@dataclass(frozen=True, config=STRICT)
class SearchParams:
    """The search: its grid has lists of values for keys of `model` and `train`."""

    space: Grid
    asha: bool
    report_every: Positive


@dataclass(frozen=True, config=STRICT)
class EvaluateParams:
    """What the evaluation saves and times."""

    keep_weights: Annotated[int, Field(ge=0)]
    timing_groups: Positive
    precision: Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True, config=STRICT)
class BaselinesParams:
    """Which methods PudNet is compared with, and the grid that each is tuned over."""

    methods: Annotated[list[Literal[METHODS]], Field(min_length=1)]
    space: dict[Literal[(*LEARNED, *SCRATCH)], Grid]
    sketch_groups: Positive
    scratch_groups: Positive  # how many test groups of each split are trained on from scratch
    scratch_epochs: Annotated[list[Positive], Field(min_length=1)]
    scratch_search_groups: Annotated[int, Field(ge=2)]  # validation groups that it is tuned on
    scratch_search_epochs: Annotated[list[Positive], Field(min_length=1)]  # epochs that it is tuned for
    test_groups: Positive | None = None  # in each split; None: all


@dataclass(frozen=True, config=STRICT)
class StudyParams:
    """Overrides for every study (studies/*.yaml)."""

    sources: dict[str, str]  # where your copy of a source is: torchvision:CIFAR100 -> npz:data/raw/cifar100.npz
    budget: Annotated[float, Field(gt=0, le=1)] | None = None  # training groups, as a fraction of the paper's number
    hours: Annotated[float, Field(gt=0, le=8760)] | None = None  # then the command ends; the same command continues
    test_groups: Annotated[int, Field(ge=2)] | None = None
    trainings: Annotated[int, Field(ge=2)] | None = None  # seeds for each row and class split, in studies of accuracies
    settings: Annotated[list[str], Field(min_length=1)] | None = None  # columns of other settings are left out
    targets: Annotated[list[str], Field(min_length=1)] | None = None  # columns of other targets are left out


@dataclass(frozen=True, config=STRICT)
class ResourcesParams:
    """Resources of one trial, and of each of the `workers` of a final training. `gpus` is ignored without GPUs."""

    cpus: Positive
    gpus: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    workers: Positive


@dataclass(frozen=True, config=STRICT)
class Params:
    """All of params.yaml, checked and without null values."""

    setting: str
    target: str
    variant: str
    seed: Seed
    splits: Annotated[int, Field(ge=1, le=MOST_SPLITS)]
    prepare: PrepareParams
    groups: GroupsParams
    model: ModelConfig
    train: TrainConfig
    search: SearchParams
    evaluate: EvaluateParams
    baselines: BaselinesParams
    study: StudyParams
    resources: ResourcesParams

    @property
    def split_seeds(self) -> tuple[int, ...]:
        """The seeds of the class splits."""
        return tuple(range(self.seed, self.seed + self.splits))

    @property
    def sizes(self) -> GroupSizes:
        """The sizes of the group tables."""
        others = ("train_classes", "test_classes", "looks", "test_looks")
        return GroupSizes(**{key: value for key, value in asdict(self.groups).items() if key not in others})

    @property
    def trained_test_groups(self) -> int:
        """On how many test groups of a split the bench trains from scratch."""
        return min(self.baselines.scratch_groups, self.baselines.test_groups or self.groups.test_groups)

    @property
    def methods_beside(self) -> list[str]:
        """The methods of the bench, without PudNet+ if it is in PudNet's place."""
        return [method for method in self.baselines.methods if (method, self.variant) != (PLUS, PLUS)]

    def grid(self) -> list[dict[str, Any]]:
        """Every combination of the search space, as changes to `model` and `train`."""
        fixed = VARIANTS[self.variant]  # keys that the variant sets are not searched
        return combinations({name: values for name, values in self.search.space.items() if name not in fixed})

    def overridden(self) -> list[str]:
        """The keys of `model` and `train` that the variant sets, though params.yaml has another value than usual."""
        setting, paper = get_setting(self.setting), paper_target(self.target)
        usual = {
            "model": asdict(ModelConfig()) | {"eta": setting.eta[paper], "depth": setting.depth[paper]},
            "train": asdict(TrainConfig()),
        }
        return [
            f"{block}.{key}"
            for block, values in usual.items()
            for key, value in VARIANTS[self.variant].items()
            if key in values and getattr(getattr(self, block), key) not in (value, values[key])
        ]

    def configured(self, changes: Mapping[str, Any]) -> tuple[ModelConfig, TrainConfig]:
        """The model and training configurations with a grid cell's changes, and then the variant's, applied."""
        own = (changed(base, changes, "search.space") for base in (self.model, self.train))
        model, train = apply_variant(self.variant, *own)
        return model, self.with_pretraining(train, model)

    def for_baselines(self, images: int) -> Params:
        """Params by which baselines are trained like the variant, with as many labels of each class as it uses.

        Except for the variant's share of pretraining: a baseline that learns from groups must see some. `images`: how
        many images of each class a training group has.
        """
        model, train = apply_variant(self.variant, self.model, self.train)
        train = replace(train, pretraining_share=self.train.pretraining_share)
        labelled = model.labelled(self.groups.classes_per_group, images) if model.reads_labels else 0
        return replace(self, train=replace(train, support_per_class=max(train.support_per_class, labelled)))

    def labels(self, classes: int) -> int:
        """How many images of each of a test group's classes the variant uses with their labels, and all methods get."""
        model, train = apply_variant(self.variant, self.model, self.train)
        spread = math.ceil(model.sketch_images / classes) if model.reads_labels else 0
        return max(train.support_per_class, spread)

    def baseline_grid(self, method: str) -> list[dict[str, Any]]:
        """Every combination of a baseline's space; one cell without changes, if it has no space."""
        return combinations(self.baselines.space.get(method, {}))

    def baseline(self, method: str, changes: Mapping[str, Any], where: str | None = None) -> tuple[Any, TrainConfig]:
        """A baseline's own and training configurations, with a grid cell's changes applied.

        `where` they are from, for errors; None: from `baselines.space`.
        """
        where = where or f"baselines.space.{method}"
        own, train = (changed(base, changes, where) for base in (config_type(method)(), self.train))
        model, _ = apply_variant(self.variant, self.model, self.train)
        return own, self.with_pretraining(train, model)

    def with_pretraining(self, train: TrainConfig, model: ModelConfig) -> TrainConfig:
        """The same training, with the share of pretraining that the target and PudNet's model need if none is given."""
        if train.pretraining_share is not None:
            return train
        return replace(train, pretraining_share=default_pretraining(self.target, model.base))


def combinations(space: Grid) -> list[dict[str, Any]]:
    """Every cell of a grid."""
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]


def changed(base: Any, changes: Mapping[str, Any], where: str) -> Any:
    """Apply those changes whose keys a configuration has. Raises `UserError` for a wrong value."""
    own = {key: value for key, value in changes.items() if key in asdict(base)}
    return parse(type(base), {**asdict(base), **own}, where)


TYPES = get_type_hints(Params)
BLOCKS = {name: kind for name, kind in TYPES.items() if is_dataclass(kind)}
SCALARS = {name: kind for name, kind in TYPES.items() if name not in BLOCKS}


def load_params(path: Path = PARAMS) -> Params:
    """Read and check params.yaml. Raises `UserError`, in one line, if something in it is wrong."""
    return resolve(read_yaml(path))


def resolve(raw: Mapping[str, Any]) -> Params:
    """Check the values of a params.yaml, and fill null values from the setting."""
    _check_keys(raw)
    params = _filled(raw)
    for check in (_check_spaces, _check_whole, _check_workers, _check_lists, _check_sets, _check_copies):
        check(params)
    return _of_whole(params) if params.groups.test_whole else params


def _filled(raw: Mapping[str, Any]) -> Params:
    """The blocks of a params.yaml, each checked by itself, with the setting's values for null ones."""
    setting = get_setting(raw["setting"])
    check_target_name(raw["target"])
    if raw["variant"] not in VARIANTS:
        raise UserError(f"variant: unknown name {raw['variant']!r}; known: {', '.join(VARIANTS)}")
    own = _of_setting(setting, raw["target"])
    own["groups"]["test_whole"] = (raw["prepare"].get("test_source") or setting.test_source) is not None
    values: dict[str, Any] = {key: raw[key] for key in SCALARS}
    for name, kind in BLOCKS.items():
        given = {key: value for key, value in raw[name].items() if value is not None}
        values[name] = parse(kind, {**own.get(name, {}), **given}, name)
    return parse(Params, values, "")


def _check_whole(params: Params) -> None:
    """Check that a test set that is one group as a whole is given no other size."""
    for name in ("test_classes_per_group", "test_images_per_group"):
        if params.groups.test_whole and getattr(params.groups, name) is not None:
            raise UserError(
                f"groups.{name}: with groups.test_whole (null means true if there is a prepare.test_source), all test "
                "images are one group; set groups.test_whole to false, or leave this null"
            )


def _check_workers(params: Params) -> None:
    """Check that each worker has a group of a step and a GPU, and that they keep no statistics of their own groups."""
    workers, gpus = params.resources.workers, params.resources.gpus
    if workers > params.train.groups_per_step:
        raise UserError(
            f"resources.workers: {workers} workers cannot split the {params.train.groups_per_step} "
            "group(s) of a step; raise train.groups_per_step"
        )
    if workers > 1 and 0 < gpus < 1:
        raise UserError(
            f"resources.workers: {workers} workers cannot share a GPU; set resources.gpus to 1, or to 0 for CPUs"
        )
    if workers > 1 and any(params.configured(cell)[0].normalization == "batch" for cell in params.grid()):
        raise UserError(
            "resources.workers: with model.normalization batch, each worker would keep statistics of its own groups; "
            "take group or layer, or one worker"
        )


def _check_lists(params: Params) -> None:
    """Check that lists name nothing twice, and that numbers of epochs rise."""
    for where in ("baselines.methods", "prepare.source", "groups.looks", "groups.test_looks"):
        block, _, key = where.partition(".")
        names = getattr(getattr(params, block), key) or []
        if len(set(names)) < len(names):
            raise UserError(f"{where}: one is listed twice in {names!r}")
    for name in ("scratch_epochs", "scratch_search_epochs"):
        epochs = getattr(params.baselines, name)
        if sorted(set(epochs)) != epochs:
            raise UserError(f"baselines.{name}: must be in rising order, got {epochs!r}")


def _of_whole(params: Params) -> Params:
    """With `groups.test_whole` there is one test group for each look, whatever number was asked for."""
    looks = params.groups.test_looks or params.groups.looks
    return replace(params, groups=replace(params.groups, test_groups=len(looks)))


def _check_sets(params: Params) -> None:
    """Check that the numbers of classes fit the sources, and that the test set is another one."""
    sources, counts = params.prepare.source, params.groups.train_classes
    if params.prepare.test_source in sources:
        raise UserError(f"prepare.test_source: {params.prepare.test_source} is a training source too; leave it null")
    if len(counts) != len(sources):
        raise UserError(
            f"groups.train_classes: {counts!r} has {len(counts)} number(s), but prepare.source has {len(sources)} "
            "source(s); give one for each"
        )
    if params.groups.test_whole and len(sources) > 1 and params.prepare.test_source is None:
        raise UserError("groups.test_whole: a group is of one set, but prepare.source has several; set it to false")


def _check_copies(params: Params) -> None:
    """Check that `study.sources` maps sources to sources."""
    for spec in itertools.chain.from_iterable(params.study.sources.items()):
        try:
            check_source(spec)
        except UserError as error:
            raise UserError(f"study.sources: {error}") from None


def _check_keys(raw: Mapping[str, Any]) -> None:
    known = [*SCALARS, *BLOCKS]
    for key in raw:
        if key not in known:
            raise UserError(f"{key}: unknown key in params.yaml; known: {', '.join(known)}")
    for key in known:
        if key not in raw:
            raise UserError(f"{key}: missing in params.yaml")
    for name in BLOCKS:
        check_block(name, raw[name], "a block of keys in params.yaml")
    for name, kind in SCALARS.items():
        if type(raw[name]) is not kind:
            raise UserError(f"{name}: must be of type {kind.__name__}, got {raw[name]!r}")


def _of_setting(setting: Setting, target: str) -> dict[str, dict[str, Any]]:
    return {
        "prepare": {
            "source": setting.source,
            "test_source": setting.test_source,
            "image_size": setting.image_size,
            "channels": setting.channels,
        },
        "groups": {
            "train_classes": setting.train_classes,
            "classes_per_group": setting.classes_per_group,
            "images_per_group": setting.images_per_group,
            "train_groups": setting.train_groups,
            "test_groups": setting.test_groups,
            "looks": list(setting.looks),
        },
        "model": {
            "extractor": default_extractor(target),
            "eta": setting.eta[paper_target(target)],
            "depth": setting.depth[paper_target(target)],
        },
    }


def _check_spaces(params: Params) -> None:
    """Check every cell of every grid, so that a wrong value is found now and not in the tenth trial."""
    wanted, there = params.baselines.scratch_search_groups, params.groups.validation_groups
    if wanted > there:
        raise UserError(f"baselines.scratch_search_groups: {wanted}, but groups.validation_groups is {there}")
    known = {**asdict(params.model), **asdict(params.train)}
    _check_space("search.space", params.search.space, [key for key in known if key != "report_every"])  # search has it
    for cell in params.grid():
        params.configured(cell)
    for method, space in params.baselines.space.items():
        _check_space(
            f"baselines.space.{method}", space, [key for key in own_keys(method) if key not in THE_SAME_FOR_ALL]
        )
        for cell in params.baseline_grid(method):
            params.baseline(method, cell)


def own_keys(method: str) -> list[str]:
    """The keys that mean something to a baseline: its own options, and those of `train` that its training reads."""
    own = list(asdict(config_type(method)()))
    if method in SCRATCH:
        return own
    unread = (*OF_PUDNET, *([] if LEARNED[method].takes_pretraining_share else ["pretraining_share"]))
    return [*own, *(key for key in asdict(TrainConfig()) if key not in unread)]


def _check_space(where: str, space: Grid, known: Collection[str]) -> None:
    if (cells := math.prod(map(len, space.values()))) > MOST_CELLS:
        raise UserError(f"{where}: {cells:,} combinations, more than {MOST_CELLS:,}; leave values out")
    for key, values in space.items():
        if key not in known:
            raise UserError(f"{where}.{key}: unknown key; known: {', '.join(known)}")
        if len(set(map(repr, values))) < len(values):
            raise UserError(f"{where}.{key}: a value is listed twice in {values!r}")
