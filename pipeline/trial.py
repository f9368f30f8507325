"""What an actor runs: one meta-training, from its checkpoint if it has one. Used by search, train and baselines."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.params import Params
from pipeline.stage import STORE, group_folder
from pudnet.config import TrainConfig
from pudnet.data.groups import open_groups
from pudnet.data.images import StoreImages
from pudnet.data.store import Store, open_store
from pudnet.evaluation import mean_interval, twin_accuracies
from pudnet.predictor import Card, Predictor, build_model
from pudnet.targets import Target
from pudnet.training import Trainer

STATE = "state.pt"


@dataclass(frozen=True)
class TrialSpec:
    """One meta-training, in plain values: it travels to the actor and is part of the search's hash.

    Paths are absolute: Ray gives each actor a working directory of its own.
    """

    name: str
    kind: str  # "pudnet" or "static_trunk"
    target: str
    split_seed: int
    seed: int
    store: str
    groups: str  # folder of one class split
    table: str  # "search_train" or "train"
    validate: bool
    model: dict[str, Any]
    train: dict[str, Any]
    cell: dict[str, Any]  # what the search varies, for tables and plots


def make_spec(
    params: Params, name: str, kind: str, split_seed: int, cell: dict[str, Any], table: str, validate: bool
) -> TrialSpec:
    """The trial that `params`, with one cell of the grid applied, ask for."""
    model, train = params.configured(cell)
    hypernetwork = kind == "pudnet"
    return TrialSpec(
        name=name,
        kind=kind,
        target=params.target,
        split_seed=split_seed,
        seed=params.seed,
        store=str(STORE.resolve()),
        groups=str(group_folder(split_seed).resolve()),
        table=table,
        validate=validate,
        model=asdict(model) if hypernetwork else {},
        train=asdict(train),
        cell=cell if hypernetwork else {},
    )


def card_of(spec: TrialSpec, store: Store) -> Card:
    """The card of the model that a trial trains."""
    return Card(
        kind=spec.kind,
        target=spec.target,
        channels=store.channels,
        image_size=store.image_size,
        mean=store.mean,
        std=store.std,
        temperature=spec.train["temperature"],
        support_per_class=spec.train["support_per_class"],
        model=spec.model or None,
    )


def pick_device() -> torch.device:
    """A GPU where this process may use one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class OpenTrial:
    """A trial at its start: the trainer and the data it needs."""

    trainer: Trainer
    target: Target
    store: Store
    validation: np.ndarray  # table (G, 2, N)


def open_trial(spec: TrialSpec, device: torch.device) -> OpenTrial:
    """Build model, data and objective. Raises `UserError` when they do not fit together."""
    torch.manual_seed(spec.seed)
    store = open_store(Path(spec.store), verify=False)
    split, tables = open_groups(Path(spec.groups))
    model, target = build_model(card_of(spec, store), spec.target)
    classes = split.search_classes if spec.table == "search_train" else split.train_classes
    trainer = Trainer(model, StoreImages(store, device), tables[spec.table], classes, TrainConfig(**spec.train))
    return OpenTrial(trainer, target, store, tables["validation"])


def run_trial(config: dict[str, Any]) -> None:
    """Ray Tune's trainable: train, and report with a checkpoint every `report_every` groups."""
    from ray import tune

    spec = TrialSpec(**config["spec"])
    torch.set_num_threads(config["cpus"])
    device = pick_device()
    if device.type == "cuda" and config["gpus"] < 1:
        torch.cuda.set_per_process_memory_fraction(config["gpus"])  # Ray shares a card's time, not its memory
    opened = open_trial(spec, device)
    if checkpoint := tune.get_checkpoint():
        with checkpoint.as_directory() as folder:
            opened.trainer.load_state_dict(load_state(Path(folder)))
    for report in opened.trainer.run():
        metrics = asdict(report) | (validate(opened, spec) if spec.validate else {})
        with tempfile.TemporaryDirectory() as folder:
            torch.save(opened.trainer.state_dict(), Path(folder) / STATE)
            tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))


def load_state(folder: Path) -> dict:
    """A checkpoint's tensors and numbers; nothing else is unpickled."""
    return torch.load(folder / STATE, map_location="cpu", weights_only=True)


def validate(opened: OpenTrial, spec: TrialSpec) -> dict[str, float]:
    """Accuracy and its interval, in percent, on validation groups: classes that the trial does not train on."""
    trainer = opened.trainer
    predictor = Predictor(trainer.model, card_of(spec, opened.store), opened.target)
    accuracies = twin_accuracies(predictor, trainer.images, opened.validation, trainer.autocast)
    trainer.model.train()
    mean, half = mean_interval(accuracies)
    return {"validation_accuracy": mean, "validation_ci95": half}
