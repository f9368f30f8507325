"""Reads studies/NAME.yaml: rows (methods, variants, ingredients) by columns (settings, budgets, class counts)."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from pipeline.params import PARAMS, Params, baseline_keys, changed, check_block, outline, read_yaml, resolve
from pipeline.reporting.paper import Reported, paper_figure
from pipeline.runs.trial import TrialSpec, make_spec
from pudnet.baselines import HEADS, LEARNED, SCRATCH, check_method
from pudnet.config import STRICT, VARIANTS, ModelConfig, Positive, TrainConfig, apply_variant, paper_target, parse
from pudnet.errors import UserError
from pudnet.scratch import ScratchConfig
from pudnet.settings import SETTINGS, get_setting
from pudnet.targets import Target, build_target, check_target_name

STUDIES = Path("studies")
GROUPS_KEY = "groups.train_groups"
OTHERS_SKETCHES = ("constant", "shuffled")
ANY = 1_000_000  # images of a class, when rows are checked before groups are made: enough for every row
IN_PREDICTIONS = {"penalty": "learned", "blocks": "last"}  # options that change no training, with their defaults


@dataclass(frozen=True, config=STRICT)
class Row:
    """One line of the table: a method, and its changes to `params.yaml` and the study's `over`."""

    method: Literal[("pudnet", *LEARNED, *SCRATCH, "static_trunk", "random_weights")] = "pudnet"
    variant: Literal[tuple(VARIANTS)] = "pudnet"
    target: str | None = None  # the network that is predicted; null: the column's
    changes: dict[str, Any] = field(default_factory=dict)  # keys of `model` and `train`, or a baseline's own
    sketch: Literal[("own", *OTHERS_SKETCHES)] = "own"
    images: Positive | None = None  # how many of a test group's labelled images are used; null: as in training
    head: Literal[HEADS] | None = None  # fitted to a baseline's features; replaces its own rule
    finetune: ScratchConfig | None = None  # trains the predicted network further, on all labelled images of the group
    paper: str | None = None  # the row's name in the paper's table

    @property
    def trained(self) -> bool:
        """Whether the method is trained on task groups."""
        return self.method not in (*SCRATCH, "random_weights")


@dataclass(frozen=True, config=STRICT)
class Column:
    """A column: its changes to params.yaml, and its path in paper.yaml (`{row}` stands for a row's name)."""

    changes: dict[str, Any]
    paper: str | None = None


@dataclass(frozen=True, config=STRICT)
class FineTuning:
    """Options of `measure: finetune`, which trains each row's weights further, with a head on all test classes."""

    images: Positive = 10_000
    test_images: Positive = 2_000
    epochs: Positive = 50
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3


@dataclass(frozen=True, config=STRICT)
class Correlation:
    """Options of `measure: correlation`."""

    groups: Annotated[int, Field(ge=20)] = 200  # training groups
    components: Positive = 10  # principal components that each side is reduced to
    pairings: Annotated[int, Field(ge=20)] = 200  # shuffled pairings of groups and weights


@dataclass(frozen=True, config=STRICT)
class WholeSet:
    """Options of `measure: whole`, a prediction for one labelled set with far more classes than a group."""

    images: str  # folder with one subfolder for each class, from which the network is predicted
    test_images: str
    top: Positive = 5
    classes: Positive = 1000  # number of classes in the folders, for the message that they are missing


@dataclass(frozen=True, config=STRICT)
class Study:
    """The content of studies/NAME.yaml. `over` and each column change keys of params.yaml, written with dots."""

    title: str
    columns: Annotated[dict[str, Column], Field(min_length=1)]
    rows: Annotated[dict[str, Row], Field(min_length=1)]
    # The row that all others are compared with, paired over test groups; of several, the one of as many images.
    reference: str | list[str] | None = None
    over: dict[str, Any] = field(default_factory=dict)
    text: str = ""  # what a reader should know, above the table
    measure: Literal["accuracy", "losses", "finetune", "correlation", "whole"] = "accuracy"
    # What the figure has along its axis: rows or columns that are numbers (`PANEL / NUMBER`), or the time that a row
    # takes for a test group (rows `LINE / POINT`).
    axis: Literal["rows", "columns", "time"] | None = None
    axis_name: str = ""
    diagnose: bool = False  # also measure how far weights move, and what a probe reads from the sketch
    finetune: FineTuning = field(default_factory=FineTuning)
    correlation: Correlation = field(default_factory=Correlation)
    whole: WholeSet | None = None

    @property
    def references(self) -> tuple[str, ...]:
        """The rows that others are compared with."""
        return (self.reference,) if isinstance(self.reference, str) else tuple(self.reference or ())

    def reference_of(self, row: str) -> str | None:
        """The row that a row is compared with: the first reference of as many images, or else the first."""
        alike = [name for name in self.references if self.rows[name].images == self.rows[row].images]
        return next(iter([*alike, *self.references]), None)


def load_study(name: str) -> Study:
    """Read and check a study. Raises `UserError`, in one line, if something in it is wrong."""
    known = sorted(file.stem for file in STUDIES.glob("*.yaml") if file.stem != "dvc")
    if name not in known:
        raise UserError(f"study: unknown name {name!r}; known: {', '.join(known)}")
    path = STUDIES / f"{name}.yaml"
    raw = read_yaml(path)
    check_block(str(path), raw)
    for key in ("rows", "columns"):
        _check_blocks(path, key, raw.setdefault(key, {}))
    raw["rows"] = {row: _row(values, f"{path}: rows.{row}") for row, values in raw["rows"].items()}
    raw["columns"] = {
        column: parse(Column, _column(values), f"{path}: columns.{column}") for column, values in raw["columns"].items()
    }
    for key, kind in (("finetune", FineTuning), ("correlation", Correlation), ("whole", WholeSet)):
        if key in raw:
            _check_blocks(path, key, {"": raw[key]})
            raw[key] = parse(kind, raw[key], f"{path}: {key}")
    study = parse(Study, raw, f"{path}:")
    _check(path, study)
    return study


def _row(values: Mapping[str, Any], where: str) -> Row:
    """A row, from its block in the file."""
    if "finetune" not in values:
        return parse(Row, values, where)
    _check_blocks(Path(where), "finetune", {"": values["finetune"]})
    return parse(Row, {**values, "finetune": parse(ScratchConfig, values["finetune"], f"{where}.finetune")}, where)


def _column(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `Column`, from its block in the file, which mixes keys of params.yaml with `paper`."""
    changes = {key: value for key, value in values.items() if key != "paper"}
    return {"changes": changes, "paper": values.get("paper")}


def _check_blocks(path: Path, where: str, blocks: Any) -> None:
    """Raise `UserError` unless `blocks` maps names to blocks."""
    check_block(f"{path}: {where}", blocks, f"a block of named {where}")
    for name, values in blocks.items():
        check_block(f"{path}: {'.'.join(filter(None, (where, name)))}", values)


def _check(path: Path, study: Study) -> None:
    _check_references(path, study)
    if study.measure == "whole" and study.whole is None:
        raise UserError(f"{path}: whole: missing; `measure: whole` needs its images and test_images")
    for what, cells in (("rows", study.rows), ("columns", study.columns)):
        seen: list[Any] = []
        for key, cell in cells.items():
            if (plain := dataclasses.replace(cell, paper=None)) in seen:
                raise UserError(f"{path}: {what}.{key}: stands twice")
            seen.append(plain)
    _check_names(path, study)
    for name, row in study.rows.items():
        if why := _unfit(row, study.measure):
            raise UserError(f"{path}: rows.{name}: {why}")
    for column in study.columns.values():
        for row in study.rows.values():
            reported(column, row)


def _check_references(path: Path, study: Study) -> None:
    names = study.references
    for name in names:
        if name not in study.rows:
            raise UserError(f"{path}: reference: no row is called {name!r}")
    if len({study.rows[name].images for name in names}) < len(names):
        raise UserError(f"{path}: reference: of several, each must be a row of another number of images")
    if len(names) > 1 and study.axis is not None:
        raise UserError(f"{path}: reference: several are for a study without an axis; give one")


def _check_names(path: Path, study: Study) -> None:
    """Raise `UserError` if a row's name cannot be part of a trial's, or a name lacks the form that the axis needs."""
    slugs = [_slug(row) for row in study.rows]
    for row, slug in zip(study.rows, slugs, strict=True):
        if not slug or slugs.count(slug) > 1:
            raise UserError(f"{path}: rows.{row}: its letters and digits must differ from those of every other row")
    for name in {"rows": study.rows, "columns": study.columns}.get(study.axis, ()):
        try:
            point(name)
        except ValueError:
            raise UserError(f"{path}: axis: {study.axis}.{name}: must be called NUMBER or PANEL / NUMBER") from None
    for name in study.rows if study.axis == "time" else ():
        if not all(name.partition(" / ")):
            raise UserError(f"{path}: axis: rows.{name}: must be called LINE / POINT")


def _unfit(row: Row, measure: str) -> str | None:
    """The reason if a study's `measure` is not possible for a row, else None."""
    if row.sketch != "own" and (row.method != "pudnet" or measure != "accuracy"):
        return f"sketch: {row.sketch} is for `method: pudnet` and `measure: accuracy`"
    if row.images is not None and row.method in SCRATCH:
        return f"images: {row.method} trains on all labelled images of a group"
    if row.finetune is not None and (row.method != "pudnet" or measure != "accuracy"):
        return "finetune: is for `method: pudnet` and `measure: accuracy`"
    if row.head is not None and (row.method not in LEARNED or measure != "accuracy"):
        return f"head: is for `measure: accuracy` and one of {', '.join(LEARNED)}"
    if row.head is not None and (own := next((key for key in IN_PREDICTIONS if key in row.changes), None)):
        return f"head: {row.head} replaces the classifier that changes.{own} is for; leave one of the two out"
    if measure == "whole" and row.method in (*LEARNED, *SCRATCH):
        return f"method: {row.method} is not for `measure: whole`, which takes networks of predicted weights"
    if measure == "losses" and not row.trained:
        return f"method: {row.method} is not trained on groups, and has no losses"
    return None


def point(name: str) -> tuple[str, float]:
    """The panel and the place on the axis in the name of a row or column, such as `fashion / 500` or `0.2`."""
    panel, _, number = name.rpartition(" / ")
    place = float(number.replace(",", ""))
    if not math.isfinite(place):
        raise ValueError(name)
    return panel, place


def reported(column: Column, row: Row) -> Reported | None:
    """The paper's result for a cell, if its row and column have a `paper`. `UserError` if paper.yaml lacks it."""
    if column.paper is None or row.paper is None:
        return None
    return paper_figure(column.paper.replace("{row}", row.paper))


# From a study to the params and trials of its cells


def column_params(study: Study, column: str) -> Params:
    """params.yaml with the changes of the study and of the column, and with the block `study` applied.

    A column may set its own number of training groups; otherwise that is the budget, or 1 if the budget is below 1
    (`wanted` then leaves the column out).
    """
    own = study.columns[column].changes
    params = resolve(_changed(read_yaml(PARAMS), {"over": study.over, f"columns.{column}": own}))
    for name in params.study.settings or ():
        get_setting(name)
    for name in params.study.targets or ():
        check_target_name(name)
    return _relocated(_sized(study, params, own))


def _changed(raw: dict[str, Any], changes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The content of a params.yaml with changes, whose keys are written with dots, by the place that they stand in."""
    for where, values in changes.items():
        for key, value in values.items():
            block, _, name = key.rpartition(".")
            place = raw.get(block) if block else raw
            if not isinstance(place, dict) or name not in place:
                raise UserError(f"{where}: {key}: no such key in {PARAMS}")
            place[name] = value
    return raw


def _sized(study: Study, params: Params, column: Mapping[str, Any]) -> Params:
    """With the numbers of groups that the block `study` asks for, unless the column's changes have their own."""
    groups = {} if GROUPS_KEY in column else {"train_groups": max(1, budget(study, params))}
    if params.study.test_groups is not None and not params.groups.test_whole:
        groups["test_groups"] = params.study.test_groups
    return dataclasses.replace(params, groups=dataclasses.replace(params.groups, **groups))


def _relocated(params: Params) -> Params:
    """With the places of the user's own copies of sets, from `study.sources`."""
    there, own = params.study.sources, params.prepare
    source, test = [there.get(each, each) for each in own.source], there.get(own.test_source, own.test_source)
    return dataclasses.replace(params, prepare=dataclasses.replace(own, source=source, test_source=test))


def budget(study: Study, params: Params) -> int:
    """The largest number of training groups for a column."""
    paper = SETTINGS[params.setting].train_groups
    if params.study.budget is None:
        return study.over.get(GROUPS_KEY) or paper
    return round(params.study.budget * paper)


def wanted(study: Study, params: Mapping[str, Params]) -> tuple[dict[str, Params], dict[str, str]]:
    """The columns to run, and the reasons why others are left out. Raises `UserError` if there are none to run."""
    chosen, left_out = {}, {}
    for column, own in params.items():
        if why := _why_not(study, own):
            left_out[column] = why
        else:
            chosen[column] = own
    if not chosen:
        raise UserError(f"study: nothing is left to run: {next(iter(left_out.values()))}")
    return chosen, left_out


def _slug(row: str) -> str:
    """A row's name as it appears in the names of its trials and their folders."""
    return re.sub("[^a-z0-9+]+", "-", row.lower()).strip("-")


def row_spec(params: Params, name: str, row: Row, seed: int, images: int) -> TrialSpec:
    """The trial of a row on one class split. The row's own changes override its variant's.

    Other methods than PudNet are trained like the variant, with as many labels of each class as it uses. `images`: how
    many images of each class a group has.
    """
    where = f"rows.{name}.changes"
    params = dataclasses.replace(params, variant=row.variant, target=_row_target(params, name, row))
    if row.method != "pudnet":
        params = params.for_baselines(images)
    kind = "static_trunk" if row.method == "random_weights" else row.method
    baseline = kind in LEARNED or kind in SCRATCH
    trial = f"{_slug(name)}-split{seed}"
    spec = make_spec(params, trial, kind, seed, row.changes if baseline else {}, "train", 0)
    parts = {"model": ModelConfig, "train": TrainConfig}
    known = baseline_keys(kind) if baseline else [*spec.model, *spec.train]
    for key in row.changes:
        if key not in known:
            raise UserError(f"{where}.{key}: unknown key; known: {', '.join(known)}")
    if baseline:
        return spec
    own = {part: asdict(changed(kind(**getattr(spec, part)), row.changes, where)) for part, kind in parts.items()}
    return dataclasses.replace(spec, train=own["train"], model=own["model"] if spec.model else {})


def _row_target(params: Params, name: str, row: Row) -> str:
    """The target of a row. It has the extractor, eta and depth of the column's target, so the two must be alike."""
    if row.target is None:
        return params.target
    try:
        check_target_name(row.target)
    except UserError as error:
        raise UserError(f"rows.{name}.{error}") from None
    if paper_target(row.target) != paper_target(params.target):
        raise UserError(f"rows.{name}.target: {row.target} in a column of {params.target}; give it a column of its own")
    return row.target


def _why_not(study: Study, params: Params) -> str | None:
    """The reason if a column is not to be run, else None."""
    asked, limit, groups = params.study, budget(study, params), params.groups.train_groups
    setting, target, paper = params.setting, params.target, SETTINGS[params.setting].train_groups
    if setting not in (asked.settings or [setting]) or target not in (asked.targets or [target]):
        return "not among study.settings and study.targets"
    if limit < 1:
        return (
            f"study.budget: {asked.budget} of the {paper:,} groups of {setting} leaves none; "
            f"give at least {1 / paper:g}"
        )
    if groups > limit:
        part = min(1.0, groups / paper)
        return f"{groups:,} training groups are over the budget of {limit:,}; study.budget: {part:g} runs it"
    plan, half = study.correlation, min(study.correlation.groups, groups) // 2
    if study.measure == "correlation" and 2 * plan.components >= half - 1:
        return f"half of {groups:,} training groups is too few for {plan.components} components a side; have more"
    return None


def _uneven(row: Row, params: Params) -> str | None:
    """The reason if a row may have other numbers of labels than its neighbours in the column, else None.

    What PudNet+ looks at is a number of images in all, and what other methods are given is one of each class: they are
    as many in training groups, but not in test groups of more classes, or fewer.
    """
    trained, tested = params.groups.classes_per_group, params.groups.test_classes_per_group or 0
    if row.images is not None or row.method in SCRATCH or tested in (0, trained):
        return None
    if not apply_variant(row.variant, params.model, params.train)[0].class_filters:
        return None
    return f"images: missing; test groups have {tested} classes and training groups {trained}, so say how many labels"


def check_rows(study: Study, params: Params) -> None:
    """Raise `UserError` if a row has wrong keys or values in this column, or a hypernetwork that is too large.

    Also if it would have more labels than another row, or fewer, only because test groups have other classes.
    """
    targets: dict[str, Target] = {}
    sound: set[tuple] = set()
    seen: dict[str, list] = {}
    for name, row in study.rows.items():
        spec = row_spec(params, name, row, params.seed, ANY)
        same = [dataclasses.replace(spec, name=""), row.sketch, row.images, row.head, row.finetune]
        if other := next((row for row, content in seen.items() if content == same), ""):
            raise UserError(f"rows.{name}: means the same as row {other}")
        seen[name] = same
        if why := _uneven(row, params):
            raise UserError(f"rows.{name}: {why}")
        model = spec.model | {"eta": 0.0}  # eta has no size: rows that differ in it alone are checked once
        content = (spec.target, spec.kind, *model.items())
        if content in sound:
            continue
        try:
            if spec.target not in targets:
                targets[spec.target] = build_target(spec.target, params.prepare.channels, params.prepare.image_size)
            if spec.kind == "pudnet":
                outline(ModelConfig(**model), targets[spec.target])
            elif spec.kind in LEARNED:
                check_method(spec.kind, spec.model, targets[spec.target])
        except UserError as error:
            raise UserError(f"rows.{name}: {error}") from None
        sound.add(content)
