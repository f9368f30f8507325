"""A trial: one training, which a Ray actor runs, or continues from a checkpoint. For search, train and baselines."""

from __future__ import annotations

import time
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.params import PLUS, STATIC, Params
from pipeline.project import STORE, group_folder
from pudnet.baselines import LEARNED, SCRATCH, Adapter, Method, Scratch, ScratchConfig, make_method
from pudnet.card import Card
from pudnet.config import TrainConfig
from pudnet.data.groups import open_groups
from pudnet.data.images import StoreImages
from pudnet.data.store import Store, open_store
from pudnet.device import wants_bf16
from pudnet.evaluation import Adapts, mean_interval, twin_accuracies
from pudnet.learner import Learner, MetaLearner
from pudnet.model import build_model
from pudnet.predictor import Predictor
from pudnet.targets import Target, build_target
from pudnet.training import Trainer, group_seed

STATE = "state.pt"
TOTAL = "total"  # the key, in a report, of the most groups that the trial will see
CONTEXT = 600_000_000  # bytes of a GPU that a process uses beside its tensors
DIVERGED = "diverged"  # the key of a last report that says why the trial ended early; Ray must not try it again
Cell = dict[str, Any]  # of a grid: a value for each key that is varied
Choices = dict[tuple[str, int], list[Cell]]  # (method, split seed) -> a cell; from scratch: one per number of epochs


@dataclass(frozen=True)
class TrialSpec:
    """The description of one training, in plain values, which is sent to the actor and hashed for the trial's key.

    Paths are absolute, because each Ray actor has its own working directory.
    """

    name: str
    kind: str  # "pudnet", "static_trunk" or a baseline
    target: str
    variant: str  # its name, for MLflow; what it sets is in `model` and `train`
    split_seed: int
    seed: int
    store: str
    groups: str  # the folder of one class split
    table: str  # "search_train" or "train"
    validate: int  # number of validation groups; 0: no validation
    model: dict[str, Any]  # ModelConfig, or a baseline's own configuration
    train: dict[str, Any]
    cell: Cell  # for tables and plots

    @property
    def patience(self) -> int | None:
        """`train.patience`; None for a training whose beginning is not a shorter training of the same kind.

        So it is if the learning rate falls to 0 by the end, or if a first stage (pretraining) is a share of the whole.
        """
        method, share = LEARNED.get(self.kind, Method), self.train["pretraining_share"] or 0.0
        alike = self.train["schedule"] == "constant" and method.begins_alike(self.model, share)
        return self.train["patience"] if alike else None


def make_spec(
    params: Params, name: str, method: str, split_seed: int, cell: Cell, table: str, validate: int
) -> TrialSpec:
    """The trial of `params` with one cell of the grid applied. The method `pudnet_plus` is PudNet by that variant."""
    kind, params = ("pudnet", replace(params, variant=PLUS)) if method == PLUS else (method, params)
    baseline = kind in LEARNED or kind in SCRATCH
    model, train = params.baseline(kind, cell) if baseline else params.configured(cell)
    static = kind == STATIC
    if static:  # it learns from groups, even if the variant is only pretrained
        train = params.with_pretraining(replace(train, pretraining_share=params.train.pretraining_share), model)
    return TrialSpec(
        name=name,
        kind=kind,
        target=params.target,
        variant=params.variant,
        split_seed=split_seed,
        seed=params.seed,
        store=str(STORE.resolve()),
        groups=str(group_folder(split_seed).resolve()),
        table=table,
        validate=validate,
        model={} if static else asdict(model),
        train=asdict(train),
        cell=cell,
    )


def card_of(spec: TrialSpec, store: Store, state: Mapping[str, Any] | None = None) -> Card:
    """The card of the model that a trial trains. `state`: its checkpoint, for what it has learned of the card."""
    learned = state and state["trainer"]["learner"].get("objective.temperature")  # with train.learn_temperature
    return Card(
        kind=spec.kind,
        target=spec.target,
        channels=store.channels,
        image_size=store.image_size,
        mean=store.mean,
        std=store.std,
        temperature=spec.train["temperature"] if learned is None else learned.item(),
        support_per_class=spec.train["support_per_class"],
        model=spec.model or None,
    )


def pick_device(gpus: float = 1) -> torch.device:
    """The GPU, if there is one and this process was given some of it, else the CPU. (Ray does not hide GPUs.)"""
    return torch.device("cuda" if gpus and torch.cuda.is_available() else "cpu")


class MetaTraining:
    """A trial that trains a method on task groups. Raises `UserError` if its configurations do not fit together."""

    def __init__(self, spec: TrialSpec, device: torch.device, rank: int = 0, workers: int = 1) -> None:
        torch.manual_seed(spec.seed)
        store = open_store(Path(spec.store), verify=False)
        split, tables = open_groups(Path(spec.groups))
        table, images = tables[spec.table], StoreImages(store, device)
        classes = split.search_classes if spec.table == "search_train" else split.train_classes
        self.card, self.validation = card_of(spec, store), tables["validation"][: spec.validate]
        k, config = len(images.block_classes(table[0])), TrainConfig(**spec.train)
        learner, self.target = make_learner(spec, self.card, config, len(classes), k)
        self.trainer = Trainer(learner, images, table, classes, config, spec.seed, rank, workers)
        self.patience, self.accuracies = spec.patience, []  # on validation groups, by report

    def run(self) -> Iterator[dict[str, float]]:
        """Train, and yield the trainer's reports, with validation accuracy.

        With `train.patience` it ends early, once accuracy has not risen for so many reports.
        """
        reports = self.trainer.run()
        while not self._is_over() and (report := next(reports, None)):
            validation = self._validate() if len(self.validation) else {}
            self.accuracies += [validation["validation_accuracy"]] if validation else []
            yield asdict(report) | validation | {TOTAL: self.trainer.total}

    def _is_over(self) -> bool:
        if self.patience is None or not self.accuracies:
            return False
        best = self.accuracies.index(max(self.accuracies))  # among equals, the first
        return len(self.accuracies) - 1 - best >= self.patience

    def _validate(self) -> dict[str, float]:
        """Accuracy and its interval, in percent, on validation groups, whose classes the trial does not train on."""
        trainer = self.trainer
        accuracies = twin_accuracies(self.adapter(), trainer.images, self.validation, trainer.autocast)
        trainer.learner.train()
        return _validation(accuracies)

    def adapter(self, head: str | None = None) -> Adapts:
        """What adapts the model to a group; with a `head` of pudnet/baselines/heads.py on a baseline's features."""
        parts = (self.trainer.learner.model, self.card, self.target)
        return Adapter(*parts, head) if self.card.kind in LEARNED else Predictor(*parts)

    def state_dict(self) -> dict:
        """The trainer's state, and separately the state of the model, which is what remains after training."""
        model = self.trainer.learner.model.state_dict()
        return {"trainer": self.trainer.state_dict(), "model": model, "accuracies": self.accuracies}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a checkpoint."""
        self.trainer.load_state_dict(state["trainer"])
        self.accuracies = list(state["accuracies"])


def make_learner(spec: TrialSpec, card: Card, config: TrainConfig, classes: int, k: int) -> tuple[Learner, Target]:
    """The learner that the trial trains, and its target network."""
    model, target = untrained(spec, card)
    if spec.kind in LEARNED:
        return model.learner(classes, k, config), target
    return MetaLearner(model, target, config, classes, k), target


def untrained(spec: TrialSpec, card: Card) -> tuple[nn.Module, Target]:
    """A trial's untrained model, and its target network."""
    if spec.kind in LEARNED:
        return make_method(spec.kind, spec.model, build_target(spec.target, card.channels, card.image_size))
    return build_model(card, spec.target)


def scratch_method(
    kind: str, config: ScratchConfig, target: Target, images: StoreImages, precision: str, compiled: bool = False
) -> Scratch:
    """Training from scratch (of this `kind`, a name in `SCRATCH`) for the groups of a store."""
    bf16 = wants_bf16(precision, images.device)
    return Scratch(config, target, images.device, bf16, kind == "scratch_gc", compiled)


class FromScratch:
    """A trial of training from scratch, which only measures its accuracy on validation groups."""

    def __init__(self, spec: TrialSpec, device: torch.device) -> None:
        store = open_store(Path(spec.store), verify=False)
        self.spec, self.images, self.accuracies = spec, StoreImages(store, device), []
        self.table = open_groups(Path(spec.groups))[1]["validation"][: spec.validate]
        target = build_target(spec.target, store.channels, store.image_size)
        config, precision = ScratchConfig(**spec.model), spec.train["precision"]
        self.method = scratch_method(spec.kind, config, target, self.images, precision)
        self.bf16 = self.method.bf16

    def run(self) -> Iterator[dict[str, float]]:
        """Train on one validation group after the other, and report after each."""
        for g in range(len(self.accuracies), len(self.table)):
            start = time.perf_counter()
            torch.manual_seed(group_seed(self.spec.seed, g))
            self.accuracies += twin_accuracies(self.method, self.images, self.table[g : g + 1], self.bf16).tolist()
            speed = {"groups": g + 1, "groups_per_second": 1 / (time.perf_counter() - start), "rollbacks": 0}
            yield speed | _validation(self.accuracies) | {TOTAL: len(self.table)}

    def state_dict(self) -> dict:
        """The accuracies so far."""
        return {"accuracies": self.accuracies}

    def load_state_dict(self, state: dict) -> None:
        """Continue after the groups that are done."""
        self.accuracies = list(state["accuracies"])


def _validation(accuracies: Any) -> dict[str, float]:
    mean, half = mean_interval(accuracies)
    mean = round(mean, 4)  # so that equally many correct images never count as a rise
    return {"validation_accuracy": mean, "validation_ci95": half}


def open_trial(spec: TrialSpec, device: torch.device, rank: int = 0, workers: int = 1) -> MetaTraining | FromScratch:
    """Build a trial, or one worker's part of it. Raises `UserError` if its configurations do not fit together."""
    return FromScratch(spec, device) if spec.kind in SCRATCH else MetaTraining(spec, device, rank, workers)


def own_device(share: Mapping[str, float]) -> torch.device:
    """This process's device, limited to the trial's share of it."""
    torch.set_num_threads(int(share["cpu"]))
    device = pick_device(share["gpu"])
    if device.type == "cuda" and share["gpu"] < 1:  # Ray shares a card's time, not its memory
        own = CONTEXT / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(max(share["gpu"] - own, share["gpu"] / 2))
    return device


def load_state(folder: Path) -> dict:
    """Read a checkpoint's tensors and numbers; nothing else is unpickled.

    Raises some error if the file is damaged: torch checks no checksums, so zipfile does.
    """
    with zipfile.ZipFile(folder / STATE) as records:
        if damaged := records.testzip():
            raise zipfile.BadZipFile(f"{folder / STATE}: {damaged} is damaged")
    return torch.load(folder / STATE, map_location="cpu", weights_only=True, mmap=True)  # tensors are read when used
