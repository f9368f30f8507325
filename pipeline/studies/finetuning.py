"""A study of weights as an initialisation (Table 5): trains each row's weights further, with a new linear head."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

from pipeline.params import Params
from pipeline.reporting.numbers import plus_minus
from pipeline.runs.class_split import Bench
from pipeline.runs.keys import code_files
from pipeline.runs.measurement import open_worker
from pipeline.runs.measuring import measure_missing
from pipeline.studies.cell import StudyCell, open_cell
from pipeline.studies.definition import FineTuning, Study, reported
from pipeline.studies.figures import lines_figure
from pipeline.studies.page import number, table_of, trained_on
from pipeline.studies.trained import TrainedColumn
from pudnet.baselines import ScratchConfig
from pudnet.evaluation import mean_half_width
from pudnet.finetune import Parts, train_on
from pudnet.scratch import with_head

SHOWN = (1, 5, 10, 20, 30, 50)  # epochs that the table shows, besides the last
IMAGES_STREAM = 5  # a stream of random numbers that the group tables do not use


def measure(trained: TrainedColumn) -> pd.DataFrame:
    """Measure a column: for each row and epoch, the mean accuracy over splits, and its interval over test images."""
    plan, rows = trained.study.finetune, []
    code = [Path(__file__), *code_files(["finetune", "scratch"])]
    keys = {(cell, plan): cell.key(trained.params, asdict(plan), code=code) for cell in trained.cells.values()}
    tables = measure_missing(
        trained.params, _finetune, keys, lambda one, table: f"{one[0].spec.name}: {table.epoch.max()} epochs done"
    )
    for row, own in trained.study.rows.items():
        curves = [tables[trained.cells[row, seed], plan] for seed in trained.params.split_seeds]
        for seed, curve in zip(trained.params.split_seeds, curves, strict=True):
            points = {"test_accuracy": dict(zip(curve.epoch, curve.accuracy, strict=True))}
            trained.log(row, seed, {}, points, key=keys[trained.cells[row, seed], plan])
        figure = reported(trained.definition, own)
        for points in zip(*(curve.itertuples() for curve in curves), strict=True):
            last = points[0].epoch == plan.epochs
            rows.append(
                {
                    "row": row,
                    "column": trained.column,
                    "splits": trained.params.splits,
                    **trained.length(row),
                    "epoch": points[0].epoch,
                    "accuracy": np.mean([point.accuracy for point in points]),
                    "ci95": mean_half_width([(point.accuracy, point.test_images) for point in points]),
                    "seconds": np.median([point.seconds for point in points]),
                    "images": points[0].images,
                    "test_images": points[0].test_images,
                    "paper": figure.accuracy if figure and last else None,
                    "paper_ci95": figure.ci95 if figure and last else None,
                }
            )
    return pd.DataFrame(rows)


def _finetune(folder: str, params: Params, one: tuple[StudyCell, FineTuning]) -> pd.DataFrame:
    """In a Ray task: a cell's curve."""
    cell, plan = one
    bench = open_worker(folder, params, cell.spec.split_seed, None)
    parts = _parts(bench, plan)
    adapts, classes = open_cell(cell, bench, params), bench.split.test_classes
    rows = adapts.rows(parts.columns)
    with torch.autocast(bench.images.device.type, torch.bfloat16, enabled=bench.bf16):
        adapted = adapts.adapt(parts.images[rows], parts.columns[rows], classes)
    torch.manual_seed(cell.spec.split_seed)  # the same head and batches for each row
    model = _with_linear_head(adapted.body, len(classes), parts)
    config = ScratchConfig(epochs=plan.epochs, learning_rate=plan.learning_rate)
    curve = pd.DataFrame([asdict(point) for point in train_on(model, cell.spec.name, parts, config)])
    return curve.assign(images=len(parts.images), test_images=len(parts.test_images))


def _parts(bench: Bench, plan: FineTuning) -> Parts:
    """Draw images of all test classes at random: `test_images` to test on and `images` others to train on.

    They have no looks, since they are of no group.
    """
    labels, classes = bench.images.labels, bench.split.test_classes
    rows = np.flatnonzero(np.isin(labels, classes))
    rows = np.random.default_rng([bench.seed, IMAGES_STREAM]).permutation(rows)
    test_count = min(plan.test_images, len(rows) // 2)
    tested, kept = rows[:test_count], rows[test_count : test_count + plan.images]
    device = bench.images.device
    columns = [torch.as_tensor(np.searchsorted(classes, labels[part]), device=device) for part in (kept, tested)]
    return Parts(bench.images(kept), columns[0], bench.images(tested), columns[1])


def _with_linear_head(body: nn.Module, classes: int, parts: Parts) -> nn.Sequential:
    """A trainable copy of a network, with a new linear layer on its features."""
    with torch.no_grad():
        features = body(parts.images[:1]).flatten(1).shape[1]
    return with_head(copy.deepcopy(body), nn.Linear(features, classes, device=parts.images.device))


def figure(study: Study, table: pd.DataFrame) -> Figure:
    """Draw one panel for each column, with one line for each row."""
    points = table[table.epoch > 0].rename(columns={"column": "panel", "row": "line", "epoch": "x", "accuracy": "y"})
    return lines_figure(points, "epochs", "accuracy, %")


def tables(study: Study, table: pd.DataFrame) -> str:
    """One table for each column, of rows by some epochs."""
    page = ""
    for column, part in table.groupby("column", sort=False):
        last, first = part.epoch.max(), part.iloc[0]
        shown = sorted({epoch for epoch in SHOWN if epoch < last} | {last})
        columns = {"start": part.row.unique().tolist()}
        for epoch in shown:
            at = part[part.epoch == epoch].itertuples()
            columns["1 epoch" if epoch == 1 else f"{epoch} epochs"] = [
                plus_minus(line.accuracy, line.ci95) for line in at
            ]
        at_end = part[part.epoch == last]
        columns["the paper's"] = [plus_minus(line.paper, line.paper_ci95) for line in at_end.itertuples()]
        columns["less the paper's"] = [
            number(line.accuracy - line.paper if line.paper else None, "{:+.2f}") for line in at_end.itertuples()
        ]
        caption = (
            f"{trained_on(part)}, for methods that are trained on groups; fine-tuned on "
            f"{first.images:,} images, measured on {first.test_images:,}, {first.splits} class split(s)."
        )
        page += f"\n## {column}\n\n{caption}\n\n{table_of(columns)}"
    return page
