"""From a study to the params of its columns and the trials of its rows, and which columns are to run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pipeline.check import check_size
from pipeline.params import PARAMS, Params, changed, own_keys, resolve
from pipeline.runs.trial import TrialSpec, make_spec
from pipeline.studies.definition import Row, Study, slug
from pipeline.yaml_file import read_yaml
from pudnet.baselines import LEARNED, SCRATCH, check_method
from pudnet.config import VARIANTS, ModelConfig, TrainConfig, apply_variant, paper_target
from pudnet.errors import UserError
from pudnet.settings import SETTINGS, get_setting
from pudnet.targets import Target, build_target, check_target_name

GROUPS_KEY = "groups.train_groups"
ANY = 1_000_000  # images of a class, when rows are checked before groups are made: enough for every row


def column_params(study: Study, column: str) -> Params:
    """params.yaml with the changes of the study and of the column, and with the block `study` applied.

    A column may set its own number of training groups. Otherwise that is the budget if there is one, or 1 if it is
    below 1 (`wanted` then leaves the column out).
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
            if key == "study.hours":
                raise UserError(f"{where}: {key}: is for a command, not for a study; set it in {PARAMS}")
            if not block and isinstance(value, dict):
                first = f"{key}.{next(iter(value), 'key')}"
                raise UserError(f"{where}: {key}: write each of its keys with a dot, as `{first}`")
            if not isinstance(place, dict) or name not in place:
                raise UserError(f"{where}: {key}: no such key in {PARAMS}")
            place[name] = value
    return raw


def _sized(study: Study, params: Params, column: Mapping[str, Any]) -> Params:
    """With the numbers of groups that the block `study` asks for; of training groups the column's own comes first."""
    groups = {}
    if params.study.budget is not None and GROUPS_KEY not in column:
        groups["train_groups"] = max(1, budget(study, params))
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
    trial = f"{slug(name)}-split{seed}"
    if baseline:
        params.baseline(kind, row.changes, where)  # for its errors
    spec = make_spec(params, trial, kind, seed, row.changes if baseline else {}, "train", 0)
    parts = {"model": ModelConfig, "train": TrainConfig}
    known = own_keys(kind) if baseline else [*spec.model, *spec.train] if row.trained else []
    for key in row.changes:
        if key not in known:
            raise UserError(f"{where}.{key}: unknown key; known: {', '.join(known) or 'none'}")
    if baseline:
        return spec
    model, train = (changed(kind(**getattr(spec, part)), row.changes, where) for part, kind in parts.items())
    if not spec.model:
        return dataclasses.replace(spec, train=asdict(train))
    if "pretraining_share" not in (row.changes | VARIANTS[row.variant]):  # it may depend on a change
        train = dataclasses.replace(train, pretraining_share=params.train.pretraining_share)
    if params.resources.workers > 1 and model.normalization == "batch":
        raise UserError(f"rows.{name}: with model.normalization batch, set resources.workers to 1")
    return dataclasses.replace(spec, model=asdict(model), train=asdict(params.with_pretraining(train, model)))


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
    if groups > limit and (asked.budget is not None or GROUPS_KEY in study.over):
        part = min(1.0, groups / paper)
        return f"{groups:,} training groups are over the budget of {limit:,}; study.budget: {part:g} runs it"
    plan, half = study.correlation, min(study.correlation.groups, groups) // 2
    if study.measure == "correlation" and 2 * plan.components >= half - 1:
        return f"half of {groups:,} training groups is too few for {plan.components} components a side; have more"
    return None


def check_labels(study: Study, params: Params, tested: int) -> None:
    """Raise `UserError` if rows have as many labels in training groups, but not in test groups of `tested` classes.

    What PudNet+ looks at is a number of images in all, and what other methods are given is one of each class. Also if a
    row's number of labels is not as many of each class.
    """
    trained = params.groups.classes_per_group
    for name, row in study.rows.items():
        if row.images is not None and row.images % tested:
            fewer = row.images // tested * tested
            raise UserError(
                f"rows.{name}: images: {row.images} labels are not as many of each of a test group's {tested} classes; "
                f"give {f'{fewer} or ' * (fewer > 0)}{fewer + tested}"
            )
        if row.images is None and tested != trained and row.method not in SCRATCH and _counts_images(params, name, row):
            raise UserError(
                f"rows.{name}: images: missing; test groups have {tested} classes and training groups {trained}, "
                "so say how many labels"
            )


def _counts_images(params: Params, name: str, row: Row) -> bool:
    """Whether a row, or the variant that it is trained like, has a number of labelled images, not one of each class."""
    model, _ = apply_variant(row.variant, params.model, params.train)
    changes = row.changes if row.method == "pudnet" else {}
    return changed(model, changes, f"rows.{name}.changes").reads_labels


def check_rows(study: Study, params: Params) -> None:
    """Raise `UserError` if a row has wrong keys or values in this column, or a hypernetwork that is too large.

    Also if it would have more labels than another row, or fewer, only because test groups have other classes.
    """
    _check_test_groups(study, params)
    specs = {name: row_spec(params, name, row, params.seed, ANY) for name, row in study.rows.items()}
    _check_distinct(study, specs)
    for name, row in study.rows.items():
        if row.sketch != "own" and not ModelConfig(**specs[name].model).makes_weights:
            raise UserError(
                f"rows.{name}: sketch: {row.sketch} changes nothing: this model makes no weights for a group"
            )
    _check_sizes(specs, params)


def _check_test_groups(study: Study, params: Params) -> None:
    """Check that rows of a study of accuracies fit the number and the classes of test groups."""
    if study.measure == "accuracy" and params.groups.test_groups == 1:
        for name in (name for name, row in study.rows.items() if row.sketch == "shuffled"):
            raise UserError(f"rows.{name}: sketch: shuffled needs another test group, and there is one")
    if study.measure == "accuracy" and not params.groups.test_whole:
        check_labels(study, params, params.groups.test_classes_per_group or params.groups.classes_per_group)


def _check_distinct(study: Study, specs: Mapping[str, TrialSpec]) -> None:
    """Check that no two rows mean the same."""
    seen: dict[str, list] = {}
    for name, row in study.rows.items():
        same = [dataclasses.replace(specs[name], name=""), row.sketch, row.images, row.head, row.finetune]
        if other := next((row for row, content in seen.items() if content == same), ""):
            raise UserError(f"rows.{name}: means the same as row {other}")
        seen[name] = same


def _check_sizes(specs: Mapping[str, TrialSpec], params: Params) -> None:
    """Check that each hypernetwork can be built, and that a target has what its method needs."""
    targets: dict[str, Target] = {}
    sound: set[tuple] = set()
    for name, spec in specs.items():
        model = spec.model | {"eta": 0.0}  # eta has no size: rows that differ in it alone are checked once
        content = (spec.target, spec.kind, *model.items())
        if content in sound:
            continue
        try:
            if spec.target not in targets:
                targets[spec.target] = build_target(spec.target, params.prepare.channels, params.prepare.image_size)
            if spec.kind == "pudnet":
                check_size(ModelConfig(**model), targets[spec.target])
            elif spec.kind in LEARNED:
                check_method(spec.kind, spec.model, targets[spec.target])
        except UserError as error:
            raise UserError(f"rows.{name}: {error}") from None
        sound.add(content)
