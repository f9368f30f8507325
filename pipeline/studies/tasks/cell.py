"""A cell of a study: a model, and how Ray's tasks open it as a method, and measure or time that on test groups."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch

from pipeline.params import Params
from pipeline.runs.class_split import Bench
from pipeline.runs.keys import code_files, measurement_key, trial_key
from pipeline.runs.measurement import SKETCHES, compiles, median_times, open_in_task, trained_accuracies
from pipeline.runs.trial import TrialSpec, card_of, load_state, scratch_method, untrained
from pudnet.baselines import LEARNED, SCRATCH, Adapter, ScratchConfig
from pudnet.baselines.finetuned import FineTunedPrediction
from pudnet.card import Card
from pudnet.data.store import open_store
from pudnet.evaluation import Adapts
from pudnet.predictor import Predictor
from pudnet.targets import build_target


@dataclasses.dataclass(frozen=True)
class StudyCell:
    """A model (`checkpoint`; None: untrained) and how to measure it."""

    spec: TrialSpec = dataclasses.field(hash=False)
    checkpoint: Path | None
    sketch: str = "own"  # or "constant", "shuffled"
    images: int | None = None  # labelled images of a group that are used; None: as in training
    head: str | None = None  # replaces a baseline's own rule; None: keep the rule
    finetune: ScratchConfig | None = None  # trains the predicted network further on the group

    @property
    def slow(self) -> bool:
        """Whether a network is trained on every test group, so that fewer test groups are measured."""
        return self.spec.kind in SCRATCH or self.finetune is not None

    def key(self, params: Params, *more: object, code: Iterable[Path] = ()) -> str:
        """A hash of everything that the cell's results depend on; `more` and `code` are the kind of measurement's."""
        how = [self.sketch, self.images, self.head, self.checkpoint and self.checkpoint.parent.name]
        how += [params.baselines.scratch_groups, self.finetune and asdict(self.finetune)] if self.slow else []
        how += [params.baselines.sketch_groups] if self.sketch == "constant" else []
        plain = [*how, *more, trial_key(self.spec), params.evaluate.precision]
        code = {Path(__file__), *code}  # other files of a study act through spec and cell, or on what is measured
        code |= set(code_files(["baselines/heads"]) if self.head else [])
        code |= set(code_files(["baselines/finetuned", "finetune", "scratch"]) if self.finetune else [])
        return f"cell-{measurement_key(self.spec.kind, self.spec.target, self.spec.split_seed, plain, code)}"


def given_labels(card: Card, images: int, classes: int) -> Card:
    """A model's card, if it is given the labels of so many images of a group.

    A ridge classifier has all images that are looked at, and at least `support_per_class` of each class: of many
    classes that would be more than these.
    """
    each = math.ceil(images / classes)
    if (card.model or {}).get("classifier") == "ridge":
        each = min(each, card.support_per_class)
    return dataclasses.replace(card, support_per_class=each)


def open_cell(cell: StudyCell, bench: Bench, params: Params) -> Adapts:
    """The cell's model, ready to adapt to groups."""
    if cell.spec.kind in SCRATCH:
        spec, config = cell.spec, ScratchConfig(**cell.spec.model)
        target = build_target(spec.target, len(bench.images.mean), bench.images.image_size)
        how = {"precision": spec.train["precision"], "compiled": compiles(bench, target, params, config.epochs)}
        return scratch_method(spec.kind, config, target, bench.images, **how)
    state = load_state(cell.checkpoint) if cell.checkpoint else None
    card = card_of(cell.spec, open_store(Path(cell.spec.store), verify=False), state)
    if cell.images is not None:
        card = given_labels(card, cell.images, bench.test_classes)
    torch.manual_seed(cell.spec.split_seed)  # for untrained models
    model, target = untrained(cell.spec, card)
    if state is not None:
        model.load_state_dict(state["model"])
    model.to(bench.images.device)
    if cell.spec.kind in LEARNED:
        return Adapter(model, card, target, cell.head)
    predictor = Predictor(model, card, target, sketch_images=cell.images)
    if cell.finetune is None:
        return predictor
    compiled = compiles(bench, target, params, cell.finetune.epochs)
    return FineTunedPrediction(predictor, cell.finetune, bench.bf16, compiled)


def measure_cell(folder: str, params: Params, cell: StudyCell) -> pd.DataFrame:
    """In a Ray task: the rows of `Bench.accuracies` for one cell."""
    bench = open_in_task(folder, params, cell.spec.split_seed, None)
    adapts = open_cell(cell, bench, params)
    if cell.slow:
        groups = range(min(params.baselines.scratch_groups, len(bench.tables["test"])))
        return trained_accuracies(bench, {cell.spec.name: adapts}, groups)
    sketches = SKETCHES[f"{cell.sketch}_sketch"](bench, adapts, params) if cell.sketch != "own" else None
    return bench.accuracies(cell.spec.name, adapts, sketches=sketches)


def time_in_turns(folder: str, params: Params, cells: Sequence[tuple[str, StudyCell]]) -> pd.DataFrame:
    """In a Ray task: each `row` and the median `milliseconds` of adapting its cell to a group, measured in turns."""
    bench = open_in_task(folder, params, params.seed, params.evaluate.timing_groups)
    times = median_times(bench, {name: open_cell(cell, bench, params) for name, cell in cells})
    return pd.DataFrame({"row": list(times), "milliseconds": list(times.values())})
