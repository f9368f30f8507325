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
from pudnet.data.groups import Split, open_groups
from pudnet.data.images import StoreImages
from pudnet.data.store import Store, open_store
from pudnet.evaluation import mean_interval, twin_accuracies
from pudnet.predictor import Card, Predictor, build_model
from pudnet.training import Trainer, wants_bf16

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
        model=asdict(model),
        train=asdict(train),
        cell=cell,
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
        model=spec.model if spec.kind == "pudnet" else None,
    )


def pick_device() -> torch.device:
    """A GPU where this process may use one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_trainer(spec: TrialSpec, store: Store, split: Split, table: np.ndarray, device: torch.device) -> Trainer:
    """Model, data and objective of a trial, at its start."""
    torch.manual_seed(spec.seed)
    model = build_model(card_of(spec, store))
    classes = split.search_classes if spec.table == "search_train" else split.train_classes
    return Trainer(model, StoreImages(store, device), table, classes, TrainConfig(**spec.train))


def run_trial(config: dict[str, Any]) -> None:
    """Ray Tune's trainable: train, and report with a checkpoint every `report_every` groups."""
    from ray import tune

    spec = TrialSpec(**config["spec"])
    torch.set_num_threads(config["cpus"])
    store = open_store(Path(spec.store), verify=False)
    split, tables = open_groups(Path(spec.groups))
    trainer = make_trainer(spec, store, split, tables[spec.table], pick_device())
    if checkpoint := tune.get_checkpoint():
        with checkpoint.as_directory() as folder:
            trainer.load_state_dict(load_state(Path(folder)))
    for report in trainer.run():
        metrics = asdict(report)
        if spec.validate:
            metrics |= validate(trainer, spec, store, tables["validation"])
        with tempfile.TemporaryDirectory() as folder:
            torch.save(trainer.state_dict(), Path(folder) / STATE)
            tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))


def load_state(folder: Path) -> dict:
    """A checkpoint's tensors and numbers; nothing else is unpickled."""
    return torch.load(folder / STATE, map_location="cpu", weights_only=True)


def validate(trainer: Trainer, spec: TrialSpec, store: Store, table: np.ndarray) -> dict[str, float]:
    """Accuracy and its interval, in percent, on validation groups: classes that the trial does not train on."""
    bf16 = wants_bf16(trainer.config.precision, trainer.device)
    trainer.model.eval()
    accuracies = twin_accuracies(Predictor(trainer.model, card_of(spec, store)), trainer.images, table, bf16)
    trainer.model.train()
    mean, half = mean_interval(accuracies)
    return {"validation_accuracy": mean, "validation_ci95": half}
