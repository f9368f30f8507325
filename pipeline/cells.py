"""What a study's cell is once it is trained: its accuracies and its time, measured as Ray tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import ray
import torch

from pipeline.bench import Bench
from pipeline.dependencies import CODE, TRAINING_CODE, VALIDATION_CODE, code_files, digest, method_files, trial_key
from pipeline.measure import constant_sketches, in_turns, measure_missing, open_worker, shuffled_sketches, task
from pipeline.params import Params
from pipeline.stage import STORE, TEST_STORE, group_folder
from pipeline.trial import TrialSpec, card_of, load_state, untrained
from pudnet.baselines import LEARNED, Adapter
from pudnet.data.store import open_store
from pudnet.diagnosis import movement, probe
from pudnet.evaluation import FROM, Adapts, group_sketches
from pudnet.predictor import Predictor

MOVED_GROUPS = 50  # whose weights are compared
SKETCHES = {"constant": constant_sketches, "shuffled": shuffled_sketches}


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Percent that weights move between groups (mean over layers), and the AUC of a probe of the sketch for classes."""

    movement: float
    probe: float


@dataclasses.dataclass(frozen=True)
class Cell:
    """A trained model (`checkpoint`; None: as it is initialised) and how it is to be measured."""

    spec: TrialSpec = dataclasses.field(hash=False)
    checkpoint: Path | None
    sketch: str = "own"  # or constant, shuffled
    sketch_images: int | None = None  # at prediction; None: the model's own
    support_per_class: int | None = None  # at prediction; None: as in training

    def key(self, params: Params) -> str:
        """A hash of all that the cell's accuracies depend on."""
        told = [self.sketch, self.sketch_images, self.support_per_class, self.checkpoint is None]
        plain = [*told, trial_key(self.spec), params.evaluate.precision, params.baselines.sketch_groups]
        data = [STORE / "meta.json", TEST_STORE / "meta.json", *group_folder(self.spec.split_seed).iterdir()]
        code = code_files(TRAINING_CODE + VALIDATION_CODE) + method_files(self.spec.kind, params.target)
        code += [CODE / "pipeline" / name for name in ("bench.py", "cells.py", "measure.py")]
        return f"cell-{digest(plain, [*data, *code])}"


def measure_cells(params: Params, cells: Sequence[Cell]) -> list[pd.DataFrame]:
    """Each cell's rows, as `Bench.accuracies` gives them. What is kept is not run again."""
    keys = {cell: cell.key(params) for cell in cells}
    tables = measure_missing(params, _measure, keys, lambda cell: cell.spec.name)
    return [tables[cell] for cell in cells]


def time_cells(params: Params, cells: Mapping[str, Cell]) -> dict[str, float]:
    """Median milliseconds that each takes for a group of the first split: in turns, with nothing beside."""
    return ray.get(task(params, _time)(cells))


def diagnose_cells(params: Params, cells: Sequence[Cell]) -> list[Diagnosis]:
    """What each hypernetwork's sketches and weights say of the test groups of its split."""
    diagnose = task(params, _diagnose)
    return ray.get([diagnose(cell) for cell in cells])


def _measure(folder: str, params: Params, cell: Cell) -> pd.DataFrame:
    bench = open_worker(folder, params, cell.spec.split_seed, None)
    adapts = _open(cell, bench)
    sketches = SKETCHES[cell.sketch](bench, adapts, params) if cell.sketch != "own" else None
    return bench.accuracies(cell.spec.name, adapts, sketches=sketches)


def _diagnose(folder: str, params: Params, cell: Cell) -> Diagnosis:
    bench = open_worker(folder, params, cell.spec.split_seed, None)
    predictor, groups = _open(cell, bench), bench.tables["test"][:, FROM]
    sketches = group_sketches(predictor, bench.images, groups, bench.bf16)
    with torch.no_grad():
        moved = movement([predictor.model.generate(sketch) for sketch in sketches[:MOVED_GROUPS]])
    share = 100 * float(np.mean([layer.mean() for layer in moved.values()]))
    if predictor.class_aware:  # its sketch has the classes in the order of the group
        return Diagnosis(share, float("nan"))
    return Diagnosis(share, probe(sketches, [bench.images.block_classes(group).tolist() for group in groups]))


def _time(folder: str, params: Params, cells: Mapping[str, Cell]) -> dict[str, float]:
    bench = open_worker(folder, params, params.seed, params.evaluate.timing_groups)
    opened = {name: _open(cell, bench) for name, cell in cells.items()}
    return in_turns(opened, bench, bench.tables["test"][:, FROM])


def _open(cell: Cell, bench: Bench) -> Adapts:
    """The cell's model, ready to adapt to groups."""
    card = card_of(cell.spec, open_store(Path(cell.spec.store), verify=False))
    if cell.support_per_class is not None:
        card = dataclasses.replace(card, support_per_class=cell.support_per_class)
    torch.manual_seed(cell.spec.split_seed)  # of what is measured as it is initialised
    model, target = untrained(cell.spec, card)
    if cell.checkpoint is not None:
        model.load_state_dict(load_state(cell.checkpoint)["model"])
    model.to(bench.images.device)
    if cell.spec.kind in LEARNED:
        return Adapter(model, card, target)
    return Predictor(model, card, target, sketch_images=cell.sketch_images)
