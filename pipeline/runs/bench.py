"""The bench of `evaluate` and `baselines`: measures a method's accuracy on the test groups of a class split."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from pipeline.params import Params
from pipeline.project import STORE, TEST_STORE, group_folder, split_model
from pipeline.runs.trial import pick_device
from pudnet.data.groups import Split, open_groups
from pudnet.data.images import StoreImages
from pudnet.data.store import Store, open_store
from pudnet.device import wants_bf16
from pudnet.evaluation import FROM, Adapts, stratified_interval, twin_accuracies
from pudnet.predictor import Predictor


@dataclass(frozen=True)
class Bench:
    """One class split, ready to measure methods on: images on the device, group tables, precision."""

    seed: int
    split: Split
    tables: dict[str, np.ndarray]
    train_images: StoreImages
    images: StoreImages  # of the test groups
    class_names: tuple[str, ...]  # of the test groups
    train_class_names: tuple[str, ...]
    bf16: bool
    target: str

    def accuracies(
        self, method: str, adapts: Adapts, groups: range | None = None, sketches: Sequence[Tensor] | None = None
    ) -> pd.DataFrame:
        """Measure a method: a row for each test group in `groups`, with its classes and the accuracy in percent."""
        groups = groups or range(len(self.tables["test"]))
        table = self.tables["test"][groups.start : groups.stop]
        with progress(f"{method}, split {self.seed}", len(table)) as advance:
            values = twin_accuracies(adapts, self.images, table, self.bf16, sketches, advance)
        return pd.DataFrame(
            {
                "method": method,
                "split_seed": self.seed,
                "group": groups,
                "classes": ["; ".join(self.names(group)) for group in table[:, FROM]],
                "accuracy": values,
            }
        )

    def names(self, indices: np.ndarray) -> list[str]:
        """The names of a test group's classes, in the order of its images."""
        return [self.class_names[c] for c in self.images.block_classes(indices)]

    def load(self, path: Path) -> Predictor:
        """Load a model file to this bench's device."""
        return Predictor.load(path, self.images.device, self.target)


def open_bench(params: Params, seed: int, test_groups: int | None = None) -> Bench:
    """Open the bench of one class split, with the first `test_groups` of its test groups (None: all)."""
    device = pick_device(params.resources.gpus)
    store = open_store(STORE, verify=False)
    test_store = open_store(TEST_STORE, verify=False) if params.prepare.test_source else store
    train_images = StoreImages(store, device)
    images = train_images if test_store is store else _as_trained(test_store, store, device)
    split, tables = open_groups(group_folder(seed))
    return Bench(
        seed=seed,
        split=split,
        tables={**tables, "test": tables["test"][:test_groups]},
        train_images=train_images,
        images=images,
        class_names=test_store.class_names,
        train_class_names=store.class_names,
        bf16=wants_bf16(params.evaluate.precision, device),
        target=params.target,
    )


def images_of_a_class(params: Params) -> int:
    """The number of images of each class in a training group."""
    _, tables = open_groups(group_folder(params.seed))
    return tables["train"].shape[1] // params.groups.classes_per_group


def identity(params: Params) -> str:
    """A hash of an evaluation's models, test groups and params, so that repeating it continues its MLflow run."""
    plain = [params.setting, params.target, params.variant, asdict(params.evaluate)]
    digest = hashlib.sha256(json.dumps(plain).encode())
    for seed in params.split_seeds:
        digest.update(split_model("pudnet", seed).read_bytes())
        digest.update((group_folder(seed) / "test.npy").read_bytes())
    return digest.hexdigest()[:12]


def _as_trained(test_store: Store, store: Store, device: torch.device) -> StoreImages:
    """Images of another set, normalised with the statistics of the training set."""
    images = StoreImages(test_store, device)
    images.mean, images.std = (torch.tensor(values, device=device) for values in (store.mean, store.std))
    return images


def summary(frame: pd.DataFrame, column: str = "accuracy") -> dict[str, object]:
    """Mean and 95% interval over test groups, for exactly these class splits; and the same for each split."""
    strata = {int(seed): part[column].to_numpy() for seed, part in frame.groupby("split_seed")}
    mean, half = stratified_interval(list(strata.values()))
    splits = {}
    for seed, values in strata.items():
        own_mean, own_half = stratified_interval([values])
        splits[str(seed)] = {"accuracy": round(own_mean, 4), "ci95": round(own_half, 4)}
    return {"accuracy": round(mean, 4), "ci95": round(half, 4), "test_groups": len(frame), "splits": splits}


def compare(own: pd.DataFrame, reference: pd.DataFrame) -> dict[str, object]:
    """A method's accuracy, and its difference to a reference method's, paired over the same test groups."""
    keys = ["split_seed", "group"]
    paired = own.merge(reference, on=keys, suffixes=("", "_reference"), validate="one_to_one")
    paired["difference"] = paired.accuracy - paired.accuracy_reference
    difference = summary(paired, "difference")
    return {**summary(own), "difference": difference["accuracy"], "difference_ci95": difference["ci95"]}


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar in a terminal, or one line at the end in a log. Yields a function of the number done."""
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(file=sys.stdout)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=done)
    print(f"  {title}: {total} test groups done", flush=True)
