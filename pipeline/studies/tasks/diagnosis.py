"""Whether the dataset matters to a cell: how far its weights move, and what its sketches say."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from pipeline.params import Params
from pipeline.runs.measurement import open_in_task
from pipeline.studies.tasks.cell import StudyCell, open_cell
from pudnet.diagnosis import movement, probe
from pudnet.evaluation import FROM, group_sketches

MOVED_GROUPS = 50  # groups whose weights are compared


def diagnose(folder: str, params: Params, cell: StudyCell) -> pd.DataFrame:
    """In a Ray task: one row of one cell, on the test groups of its split.

    It has the `movement` of weights between groups (percent, mean over layers), and the AUC of a `probe` of sketches.
    """
    bench = open_in_task(folder, params, cell.spec.split_seed, None)
    predictor, groups = open_cell(cell, bench, params), bench.tables["test"][:, FROM]
    sketches = group_sketches(predictor, bench.images, groups, bench.bf16)
    with torch.no_grad():
        moved = movement([predictor.model.generate(sketch) for sketch in sketches[:MOVED_GROUPS]])
    share = 100 * float(np.mean([layer.mean() for layer in moved.values()]))
    model = predictor.model
    if model.filters is not None or not model.config.change:  # sketches with parts of classes differ in length
        return pd.DataFrame({"movement": [share], "probe": [float("nan")]})
    classes = [bench.images.block_classes(group).tolist() for group in groups]
    return pd.DataFrame({"movement": [share], "probe": [probe(sketches, classes)]})
