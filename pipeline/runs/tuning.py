"""Tunes the baselines, as PudNet's search does: trains each cell of a small grid, and picks by validation accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import pandas as pd

from pipeline.params import PLUS, STATIC, Params
from pipeline.runs.executor import Experiment, run_missing
from pipeline.runs.final_training import read_best
from pipeline.runs.parents import close_tuning, closed_if_failed
from pipeline.runs.trial import Cell, Choices, TrialSpec, make_spec
from pipeline.runs.trial_folder import Finished
from pipeline.tracking.runs import Tracking
from pudnet.baselines import SCRATCH
from pudnet.config import TrainConfig
from pudnet.errors import RunFailed

COLUMNS = ["method", "split_seed", "epochs", "cell", "groups", "accuracy", "ci95", "chosen"]
RUN = "tune-baselines"
TRAINING = {field.name for field in fields(TrainConfig)}


def tune(
    params: Params, methods: Sequence[str], tracking: Tracking, fresh: bool = False
) -> tuple[pd.DataFrame, Choices]:
    """Run every cell of every method's grid on every split: a row for each trial (`COLUMNS`), and the chosen cells.

    A grid of one cell is not run, unless `train.patience` asks how long it is to be trained (`TrialSpec.patience`). The
    static trunk's cell is what the search chose for PudNet. Raises `RunFailed` if no trial finished to choose from.
    """
    grids = {(m, seed): grid(params, m) for m in methods for seed in params.split_seeds}
    if STATIC in methods:
        best = read_best(params)
        grids |= {(STATIC, seed): [_static_cell(params, seed, best[seed].cell)] for seed in params.split_seeds}
    trials = {of: [_spec(params, *of, cell) for cell in cells] for of, cells in grids.items()}
    specs = [
        spec
        for (method, _), own in trials.items()
        if len(params.baseline_grid(method)) > 1 or any(spec.patience for spec in own)
        for spec in own
    ]
    if not specs:
        return pd.DataFrame(columns=COLUMNS), grids
    print(f"baselines: {len(specs)} trials, each method's grid on each of {params.splits} class splits")
    experiment = Experiment("baselines-tuning", specs, keep_going=True)
    with closed_if_failed(tracking, experiment, RUN):
        finished = run_missing(experiment, params, tracking, RUN, fresh)
        rows = pd.DataFrame([_row(trial) for trial in finished], columns=COLUMNS)
        highest = rows.groupby(["method", "split_seed", "epochs"], sort=False, dropna=False)["accuracy"].idxmax()
        choices = _choices(params, specs, [finished[row] for row in highest])
    tracking.submit(partial(close_tuning, tracking, experiment, params, RUN))
    rows["chosen"] = rows.index.isin(highest)  # among equals, the first in the grid
    return rows, grids | choices


def _choices(params: Params, specs: Sequence[TrialSpec], best: Sequence[Finished]) -> Choices:
    """The chosen cells of every method and split that was tuned."""
    choices: Choices = {}
    for spec in specs:
        of = _method(spec), spec.split_seed
        same = (trial for trial in best if (_method(trial.spec), trial.spec.split_seed) == of)
        own = [trial.spec.cell | trial.passes(params.groups.search_groups) for trial in same]
        if not any(cell.get("epochs") == spec.cell.get("epochs") for cell in own):
            raise RunFailed(f"baselines: no trial like {spec.name} ended well; change baselines.space or train")
        choices[of] = own
    return choices


def _static_cell(params: Params, seed: int, cell: Cell) -> Cell:
    """The keys of `train` in a cell that the search chose; without `passes`, if the trunk's own patience finds them."""
    own = {key: value for key, value in cell.items() if key in TRAINING}
    finds = {key: value for key, value in own.items() if key != "passes"}
    return finds if _spec(params, STATIC, seed, finds).patience else own


def grid(params: Params, method: str) -> list[Cell]:
    """A method's cells; for training from scratch, all of them for each number of epochs that it is tuned for."""
    cells = params.baseline_grid(method)
    if method not in SCRATCH:
        return cells
    return [{"epochs": epochs, **cell} for epochs in params.baselines.scratch_search_epochs for cell in cells]


def _spec(params: Params, method: str, seed: int, cell: Cell) -> TrialSpec:
    """A trial on the search's training groups, which reports after each pass; with `patience`, as often as a search."""
    name = "-".join([f"{method}-split{seed}", *(f"{key}{value}" for key, value in cell.items())])
    validate = params.baselines.scratch_search_groups if method in SCRATCH else params.groups.validation_groups
    spec = make_spec(params, name, method, seed, cell, "search_train", validate)
    if method in SCRATCH:  # each of its reports has more groups
        spec = replace(spec, train={**spec.train, "patience": None})
    every = params.search.report_every if spec.patience else params.groups.search_groups
    return replace(spec, train={**spec.train, "report_every": every})


def _row(trial: Finished) -> dict[str, Any]:
    cell = dict(trial.spec.cell)
    return {
        "method": _method(trial.spec),
        "split_seed": trial.spec.split_seed,
        "epochs": cell.pop("epochs", None),
        "cell": named(cell),
        "groups": trial.metrics["groups"],
        "accuracy": trial.metrics["validation_accuracy"],
        "ci95": trial.metrics["validation_ci95"],
    }


def _method(spec: TrialSpec) -> str:
    """The method of a trial: PudNet itself is not tuned here."""
    return PLUS if spec.kind == "pudnet" else spec.kind


def named(cell: Mapping[str, Any]) -> str:
    """A cell as text, for tables."""
    return ", ".join(f"{key} {value}" for key, value in cell.items())
