"""The accuracy of a study of one large labelled set: a cell's prediction from one folder, measured on another."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import torch

from pipeline.params import Params
from pipeline.runs.measurement import open_in_task
from pipeline.studies.definition import WholeSet
from pipeline.studies.tasks.cell import StudyCell, open_cell
from pudnet.data.user_images import labelled_set
from pudnet.device import clock
from pudnet.errors import UserError


def accuracy_of(folder: str, params: Params, one: tuple[StudyCell, WholeSet]) -> pd.DataFrame:
    """In a Ray task: a cell's top-k accuracy, and the seconds from the folder to the predicted network."""
    cell, plan = one
    bench = open_in_task(folder, params, cell.spec.split_seed, None)
    predictor = open_cell(replace(cell, images=None), bench, params)  # it is not for a test group
    predictor.sketch_images, predictor.bf16 = cell.images or predictor.sketch_images, bench.bf16
    start = clock(bench.images.device)
    network = predictor.predict(plan.images)
    seconds = (clock(bench.images.device) - start) / 1000
    images, columns, names = labelled_set(plan.test_images, None, network.card)
    if unknown := set(names) - set(network.classes):
        raise UserError(f"{plan.test_images}: class {min(unknown)!r} is not in {plan.images}")
    truth = torch.tensor([network.classes.index(name) for name in names])[columns]
    with torch.autocast(bench.images.device.type, torch.bfloat16, enabled=bench.bf16):
        best = network(images).topk(min(plan.top, len(network.classes)), dim=1).indices.cpu()
    accuracy = 100 * (best == truth[:, None]).any(1).float().mean().item()
    return pd.DataFrame([{"accuracy": accuracy, "images": images.count, "classes": len(names), "seconds": seconds}])
