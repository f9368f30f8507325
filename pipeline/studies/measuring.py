"""Measures the cells of a study, as Ray tasks: accuracies, times, and whether the dataset matters."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from pipeline.digests import digest
from pipeline.params import Params
from pipeline.runs import cluster
from pipeline.runs.measurement import open_in_task
from pipeline.runs.measuring import measure_missing, task
from pipeline.studies.tasks.cell import StudyCell, measure_cell, open_cell, time_in_turns
from pudnet.diagnosis import movement, probe
from pudnet.evaluation import FROM, group_sketches

MOVED_GROUPS = 50  # groups whose weights are compared


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """How far weights move between groups (percent, mean over layers), and the AUC of a probe of sketches."""

    movement: float
    probe: float


def measure_cells(params: Params, cells: Sequence[StudyCell]) -> list[pd.DataFrame]:
    """Measure the cells: each one's rows, as `Bench.accuracies` gives them. Kept results are not measured again."""
    keys = {cell: cell.key(params) for cell in cells}
    tables = measure_missing(
        params, measure_cell, keys, lambda cell, table: f"{cell.spec.name}: {len(table)} test groups done"
    )
    return [tables[cell] for cell in cells]


def time_cells(params: Params, cells: Mapping[str, StudyCell]) -> dict[str, float]:
    """Median milliseconds of adapting each cell to a group of the first split, in turns, with nothing else running.

    A cell has `resources.cpus` threads.
    """
    keys = [[name, cell.key(params, params.evaluate.timing_groups)] for name, cell in cells.items()]
    on = [cluster.share(params), _processor(), torch.__version__]
    items, key = tuple(cells.items()), f"time-{digest([keys, on], [])}"
    tables = measure_missing(params, time_in_turns, {items: key}, lambda *_: "times are measured")
    return dict(zip(tables[items].row, tables[items].milliseconds, strict=True))


def _processor() -> str:
    """The name of this machine's GPU, or else of its CPU, so that no times of another machine are kept."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name"))
    return platform.processor()


def diagnose_cells(params: Params, cells: Sequence[StudyCell]) -> list[Diagnosis]:
    """How far each hypernetwork's weights move, and what its sketches say, on the test groups of its split."""
    diagnose = task(params, _diagnose)
    tasks = [diagnose(cell) for cell in cells]
    return [cluster.result(cluster.first_of([one], params)) for one in tasks]


def _diagnose(folder: str, params: Params, cell: StudyCell) -> Diagnosis:
    bench = open_in_task(folder, params, cell.spec.split_seed, None)
    predictor, groups = open_cell(cell, bench, params), bench.tables["test"][:, FROM]
    sketches = group_sketches(predictor, bench.images, groups, bench.bf16)
    with torch.no_grad():
        moved = movement([predictor.model.generate(sketch) for sketch in sketches[:MOVED_GROUPS]])
    share = 100 * float(np.mean([layer.mean() for layer in moved.values()]))
    model = predictor.model
    if model.filters is not None or not model.config.change:  # sketches with parts of classes differ in length
        return Diagnosis(share, float("nan"))
    return Diagnosis(share, probe(sketches, [bench.images.block_classes(group).tolist() for group in groups]))
