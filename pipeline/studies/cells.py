"""Measures the cells of a study, as Ray tasks: accuracies, times, and whether the dataset matters."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch

from pipeline.digests import digest
from pipeline.params import Params
from pipeline.runs import cluster
from pipeline.runs.keys import code_files
from pipeline.runs.measuring import measure_missing
from pipeline.studies.tasks import diagnosis as tasks
from pipeline.studies.tasks.cell import StudyCell, measure_cell, time_in_turns


def measure_cells(params: Params, cells: Sequence[StudyCell]) -> list[pd.DataFrame]:
    """Measure the cells: each one's rows, as `Bench.accuracies` gives them. Kept results are not measured again."""
    keys = {cell: cell.key(params) for cell in cells}
    tables = measure_missing(
        params, measure_cell, keys, lambda cell, table: f"{cell.spec.name}: {len(table)} test groups done"
    )
    return [tables[cell] for cell in cells]


def time_cells(params: Params, cells: Mapping[str, StudyCell]) -> dict[str, float]:
    """Median milliseconds of adapting each cell to a group of the first split, in turns, with nothing else running.

    A cell has `resources.cpus` threads. On a cluster times are measured anew, since any machine may have measured them.
    """
    keys = [[name, cell.key(params, params.evaluate.timing_groups)] for name, cell in cells.items()]
    share = cluster.share(params)
    on = [share, _processor(bool(share["gpu"])), torch.__version__]
    items, key = tuple(cells.items()), f"time-{digest([keys, on], [])}"
    fresh = "RAY_ADDRESS" in os.environ
    tables = measure_missing(params, time_in_turns, {items: key}, lambda *_: "times are measured", fresh)
    return dict(zip(tables[items].row, tables[items].milliseconds, strict=True))


def _processor(gpu: bool) -> str:
    """The name of this machine's GPU, if it is used, or else of its CPU: times of another machine are not kept."""
    if gpu and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name"))
    return platform.processor()


def diagnose_cells(params: Params, cells: Sequence[StudyCell]) -> list[pd.DataFrame]:
    """How far each hypernetwork's weights move, and what its sketches say (`diagnose`), kept as accuracies are."""
    code = [Path(tasks.__file__), *code_files(["diagnosis"])]
    keys = {cell: cell.key(params, "diagnosis", code=code) for cell in cells}
    tables = measure_missing(params, tasks.diagnose, keys, lambda cell, _: f"{cell.spec.name}: diagnosed")
    return [tables[cell] for cell in cells]
