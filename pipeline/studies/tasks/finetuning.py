"""The curve of a study of weights as an initialisation: a cell's network, trained further with a new linear head."""

from __future__ import annotations

import copy
from dataclasses import asdict

import numpy as np
import pandas as pd
import torch
from torch import nn

from pipeline.params import Params
from pipeline.runs.class_split import Bench
from pipeline.runs.measurement import open_in_task
from pipeline.studies.definition import FineTuning
from pipeline.studies.tasks.cell import StudyCell, open_cell
from pudnet.baselines import ScratchConfig
from pudnet.finetune import Parts, train_on
from pudnet.scratch import with_head

IMAGES_STREAM = 5  # a stream of random numbers that the group tables do not use


def curve_of(folder: str, params: Params, one: tuple[StudyCell, FineTuning]) -> pd.DataFrame:
    """In a Ray task: a cell's curve."""
    cell, plan = one
    bench = open_in_task(folder, params, cell.spec.split_seed, None)
    parts = _parts(bench, plan)
    torch.manual_seed(cell.spec.split_seed)  # for what is trained from scratch
    adapts, classes = open_cell(cell, bench, params), bench.split.test_classes
    rows = adapts.rows(parts.columns)
    with torch.autocast(bench.images.device.type, torch.bfloat16, enabled=bench.bf16):
        adapted = adapts.adapt(parts.images[rows], parts.columns[rows], classes)
    torch.manual_seed(cell.spec.split_seed)  # the same head and batches for each row
    model = _with_linear_head(adapted.body, len(classes), parts)
    config = ScratchConfig(epochs=plan.epochs, learning_rate=plan.learning_rate)
    curve = pd.DataFrame([asdict(point) for point in train_on(model, cell.spec.name, parts, config, bench.bf16)])
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
