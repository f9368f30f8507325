"""Reads studies/NAME.yaml: rows (methods, variants, ingredients) by columns (settings, budgets, class counts)."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from pipeline.reporting.paper import Reported, paper_figure
from pipeline.yaml_file import check_block, read_yaml
from pudnet.baselines import HEADS, LEARNED, SCRATCH
from pudnet.config import STRICT, VARIANTS, Positive, PositiveFloat, parse
from pudnet.errors import UserError
from pudnet.scratch import ScratchConfig

STUDIES = Path("studies")
OTHERS_SKETCHES = ("constant", "shuffled")
IN_PREDICTIONS = {"penalty": "learned", "blocks": "last"}  # options that change no training, with their defaults


@dataclass(frozen=True, config=STRICT)
class Row:
    """One line of the table: a method, and its changes to `params.yaml` and the study's `over`."""

    method: Literal[("pudnet", *LEARNED, *SCRATCH, "static_trunk", "random_weights")] = "pudnet"
    variant: Literal[tuple(VARIANTS)] = "pudnet"
    target: str | None = None  # the network that is predicted; null: the column's
    changes: dict[str, Any] = field(default_factory=dict)  # keys of `model` and `train`, or a baseline's own
    sketch: Literal[("own", *OTHERS_SKETCHES)] = "own"
    images: Positive | None = None  # how many of a test group's labelled images are used; null: as in training.
    # With `measure: whole`, how many PudNet looks at; its classifier has at least ten of each class.
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
    learning_rate: PositiveFloat = 3e-3


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
    if not STUDIES.is_dir():
        raise UserError(f"{STUDIES}: no such folder; run from the project's root")
    known = sorted(file.stem for file in STUDIES.glob("*.yaml") if file.stem != "dvc")
    if name not in known:
        raise UserError(f"study: unknown name {name!r}; known: {', '.join(known)}")
    path = STUDIES / f"{name}.yaml"
    raw = read_yaml(path)
    check_block(str(path), raw)
    for key in ("rows", "columns"):
        _check_blocks(path, key, raw.setdefault(key, {}))
        if not raw[key]:
            example = {"rows": "PudNet+: {variant: pudnet_plus}", "columns": "digits: {setting: digits}"}[key]
            raise UserError(f"{path}: {key}: needs one at least, such as `{example}`")
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
    if study.diagnose and study.measure != "accuracy":
        raise UserError(f"{path}: diagnose: is for `measure: accuracy`, not for `measure: {study.measure}`")
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
    known = [slug(row) for row in study.rows]
    for row, own in zip(study.rows, known, strict=True):
        if not own or known.count(own) > 1:
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
    if row.images is not None and measure in ("losses", "finetune", "correlation"):
        return f"images: is not for `measure: {measure}`"
    if row.finetune is not None and (row.method != "pudnet" or measure != "accuracy"):
        return "finetune: is for `method: pudnet` and `measure: accuracy`"
    if row.head is not None and (row.method not in LEARNED or measure != "accuracy"):
        return f"head: is for `measure: accuracy` and one of {', '.join(LEARNED)}"
    if row.head is not None and (own := next((key for key in IN_PREDICTIONS if key in row.changes), None)):
        return f"head: {row.head} replaces the classifier that changes.{own} is for; leave one of the two out"
    if measure == "whole" and row.method in (*LEARNED, *SCRATCH):
        return f"method: {row.method} is not for `measure: whole`, which takes networks of predicted weights"
    if measure == "correlation" and row.method in ("static_trunk", "random_weights"):
        return f"method: {row.method} has the same weights for all groups, so there is nothing to correlate"
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


def slug(row: str) -> str:
    """A row's name as it appears in the names of its trials and their folders."""
    return re.sub("[^a-z0-9+]+", "-", row.lower()).strip("-")
