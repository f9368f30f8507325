"""Part `scale`: PudNet and what it is compared with, for ConvNet-3, at as many groups as there is time for."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_report import Report, Run
from pipeline.runs.trial import TrialSpec, card_of, make_learner
from pudnet.baselines import LEARNED, Adapter
from pudnet.config import ModelConfig, TrainConfig, apply_variant
from pudnet.data.groups import GroupSizes, Split, build_groups, split_classes
from pudnet.data.images import StoreImages
from pudnet.data.sources import open_source
from pudnet.data.store import Store, open_store, write_store
from pudnet.device import clock
from pudnet.evaluation import mean_interval, twin_accuracies
from pudnet.predictor import Predictor
from pudnet.training import Trainer

GROUPS = 100_000  # the paper's
MILESTONES = (1_000, 3_000, 10_000, 30_000, 100_000)
TRAINING, ALONE = 0.6, 0.95  # of a method's time: with accuracies to measure, and without (noise)


@dataclass(frozen=True)
class Method:
    """A row: what is trained, as which variant says, and how many labels of a class it is given."""

    kind: str
    variant: str
    labels: int


METHODS = {
    "PudNet": Method("pudnet", "pudnet", 10),
    "PudNet+": Method("pudnet", "pudnet_plus", 18),
    "static trunk": Method("static_trunk", "pudnet_plus", 18),
    "R2-D2": Method("r2d2", "pudnet_plus", 18),
    "Pretrained": Method("pretrained", "pudnet_plus", 18),
}


@dataclass(frozen=True)
class Scale:
    """How much there is to do. The default: CIFAR-100 as the paper has it, and 16 groups a step."""

    source: str | None
    image_size: int = 32
    channels: int = 3
    train_classes: int = 80
    sizes: GroupSizes = GroupSizes(5, 500, GROUPS, 1, 1, 500, test_whole=False)
    groups_per_step: int = 16
    report_every: int = 1_000
    timed: tuple[int, int] = (5, 30)  # steps that tell how fast a method is: to warm up, and to time


def smallest(source: str | None) -> Scale:
    """Real digits, so that there is an accuracy."""
    sizes = GroupSizes(2, 40, 8, 1, 1, 2, test_whole=False)
    return Scale(source or "sklearn:digits", 8, 1, 6, sizes, groups_per_step=2, report_every=4, timed=(1, 1))


@dataclass(frozen=True)
class Bench:
    """Groups, and the images that they are of, on the device."""

    scale: Scale
    store: Store
    split: Split
    tables: dict[str, np.ndarray]
    images: StoreImages


def noise(scale: Scale) -> Store:
    """Images of CIFAR-100's shape and number."""
    shape = (100 * 600, scale.image_size, scale.image_size, scale.channels)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    names, grey = tuple(map(str, range(100))), (0.5,) * scale.channels
    return Store(images, np.repeat(np.arange(100), 600), names, grey, (0.29,) * scale.channels, "noise")


def make_bench(scale: Scale, device: torch.device, folder: Path) -> Bench:
    """Prepare the images in a folder and draw the groups, as the pipeline does."""
    if scale.source:
        write_store(open_source(scale.source, Path("data/raw"), scale.image_size, scale.channels), folder / "store")
        store = open_store(folder / "store", verify=False)
    else:
        store = noise(scale)
    split = split_classes(len(store.class_names), scale.train_classes, scale.sizes.classes_per_group, seed=0)
    return Bench(scale, store, split, build_groups(split, scale.sizes, store), StoreImages(store, device))


class Training:
    """One method, untrained, as the pipeline would train it on the first groups of the table."""

    def __init__(self, bench: Bench, method: Method, groups: int) -> None:
        scale = bench.scale
        model, train = apply_variant(method.variant, ModelConfig(eta=0.1), TrainConfig())
        train = dataclasses.replace(
            train,
            support_per_class=method.labels,
            groups_per_step=scale.groups_per_step,
            report_every=scale.report_every,
        )
        chosen = {} if method.kind != "pudnet" else asdict(model)
        plain = {"variant": "", "split_seed": 0, "seed": 0, "table": "train", "validate": 0, "cell": {}}
        own = {"kind": method.kind, "model": chosen, "train": asdict(train)}
        spec = TrialSpec(name="gpu", target="convnet3", store="", groups="", **own, **plain)
        torch.manual_seed(0)
        self.bench, self.card = bench, card_of(spec, bench.store)
        classes, k = bench.split.train_classes, scale.sizes.classes_per_group
        learner, self.target = make_learner(spec, self.card, train, len(classes), k)
        self.trainer = Trainer(learner, bench.images, bench.tables["train"][:groups], classes, train)

    def accuracy(self) -> tuple[float, float]:
        """Mean over the test groups and its interval, in percent."""
        kind = Adapter if self.card.kind in LEARNED else Predictor
        adapter = kind(self.trainer.learner.model, self.card, self.target)
        found = twin_accuracies(adapter, self.bench.images, self.bench.tables["test"], self.trainer.autocast)
        self.trainer.learner.train()
        return mean_interval(found)


def groups_in(bench: Bench, method: Method, seconds: float) -> int:
    """How many groups a method sees in so many seconds, by its first steps; no more than there are."""
    trainer = Training(bench, method, len(bench.tables["train"])).trainer
    marks = []
    for steps in bench.scale.timed:
        for _ in range(steps):
            trainer._step(trainer.table[trainer.groups : trainer.groups + bench.scale.groups_per_step])
        marks.append(clock(bench.images.device) / 1000)
    a_group = (marks[1] - marks[0]) / bench.scale.timed[1] / bench.scale.groups_per_step
    whole = int(seconds / a_group) // bench.scale.report_every * bench.scale.report_every
    return min(len(bench.tables["train"]), max(bench.scale.report_every, whole))


def measure(run: Run, report: Report) -> None:
    """Train one method after the other, each for as many groups as its share of the time gives.

    So that each one's schedule comes to its end, that number is settled first, by the speed of its first steps.
    """
    scale = smallest(run.data) if run.smallest else Scale(run.data)
    seconds = 60 * run.minutes / len(METHODS)
    report.put("data", scale.source or "noise of CIFAR-100's shape: no accuracy")
    report.put("groups_per_step", scale.groups_per_step)
    with tempfile.TemporaryDirectory() as folder:
        bench = make_bench(scale, run.device, Path(folder))
        for name, method in METHODS.items():
            groups = groups_in(bench, method, (TRAINING if scale.source else ALONE) * seconds)
            train(bench, name, method, groups, partial(report.add, "methods"))
        report.show("methods")


def train(bench: Bench, name: str, method: Method, groups: int, add: Callable[[dict[str, Any]], None]) -> None:
    """Train a method; a row at each milestone, and at the end. Its seconds are of training alone."""
    training, spent, start, before = Training(bench, method, groups), 0.0, time.perf_counter(), 0
    for step in training.trainer.run():  # waits for the device before each report
        spent += time.perf_counter() - start
        passed = any(before < milestone <= step.groups for milestone in MILESTONES)
        before = step.groups
        if passed or step.groups == groups:
            row = {"method": name, "groups": step.groups, "seconds": spent, "groups_a_second": step.groups / spent}
            row |= {"loss": step.loss, "train_accuracy": step.train_accuracy}
            if bench.scale.source:
                row |= dict(zip(("accuracy", "ci95"), training.accuracy(), strict=True))
            add(row | {"rollbacks": step.rollbacks})
        start = time.perf_counter()
