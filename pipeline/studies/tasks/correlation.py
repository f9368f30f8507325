"""The points of a study of correlations: a training group's mean image, and the weights of its network."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import nn

from pipeline.params import Params
from pipeline.runs.measurement import open_in_task
from pipeline.studies.tasks.cell import StudyCell, open_cell
from pudnet.data.images import StoreImages
from pudnet.evaluation import adapt_input


@dataclass(frozen=True)
class Part:
    """A part of a cell's groups."""

    cell: StudyCell
    first: int
    end: int


@torch.no_grad()
def points_of(folder: str, params: Params, part: Part) -> pd.DataFrame:
    """In a Ray task: the mean image of each group of the part, and the weights of each layer of its network."""
    seed = part.cell.spec.split_seed
    bench = open_in_task(folder, params, seed, None)
    adapts, images, rows = open_cell(part.cell, bench, params), bench.train_images, []
    for g in range(part.first, part.end):
        group = bench.tables["train"][g]
        classes = tuple(images.block_classes(group).tolist())
        torch.manual_seed(seed)  # the same initialisation and order of batches for all groups
        with torch.enable_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=bench.bf16):
            body = adapts.adapt(*adapt_input(adapts, images, group), classes).body
        rows.append({"group": g, "what": "images", "values": _mean_image(images, group)})
        convs = {name: module for name, module in body.named_modules() if isinstance(module, nn.Conv2d)}
        rows += [{"group": g, "what": name, "values": _flat(conv.weight)} for name, conv in convs.items()]
    return pd.DataFrame(rows)


def _mean_image(images: StoreImages, group: np.ndarray) -> np.ndarray:
    return _flat(images(group).mean(0))


def _flat(values: torch.Tensor) -> np.ndarray:
    return values.detach().float().flatten().cpu().numpy()
