"""A class split, opened as a bench: measures a method's accuracy on the split's test groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pipeline.params import Params
from pipeline.project import STORE, TEST_STORE, group_folder
from pipeline.runs.display import progress
from pipeline.runs.trial import pick_device
from pudnet.data.groups import Split, open_groups
from pudnet.data.images import StoreImages
from pudnet.data.store import Store, open_store
from pudnet.device import wants_bf16
from pudnet.evaluation import FROM, Adapts, twin_accuracies
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
        groups = range(len(self.tables["test"])) if groups is None else groups
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

    @property
    def test_classes(self) -> int:
        """The number of classes of a test group."""
        return len(self.images.block_classes(self.tables["test"][0, FROM]))

    def names(self, indices: np.ndarray) -> list[str]:
        """The names of a test group's classes, in the order of its images."""
        return [self.class_names[c] for c in self.images.block_classes(indices)]

    def load(self, path: Path) -> Predictor:
        """Load a model file to this bench's device."""
        return Predictor.load(path, self.images.device, self.target)


def open_bench(params: Params, seed: int, test_groups: int | None = None) -> Bench:
    """Open the bench of one class split, with the first `test_groups` of its test groups (None: all)."""
    return open_benches(params, [seed], test_groups)[0]


def open_benches(params: Params, seeds: Sequence[int], test_groups: int | None = None) -> list[Bench]:
    """Open the benches of several class splits. On a GPU they share the images."""
    device = pick_device(params.resources.gpus)
    store = open_store(STORE, verify=False)
    test_store = open_store(TEST_STORE, verify=False) if params.prepare.test_source else store
    train_images = StoreImages(store, device)
    images = train_images if test_store is store else _as_trained(test_store, store, device)
    opened = [open_groups(group_folder(seed)) for seed in seeds]
    return [
        Bench(
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
        for seed, (split, tables) in zip(seeds, opened, strict=True)
    ]


def images_of_a_class(params: Params) -> int:
    """The number of images of each class in a training group."""
    _, tables = open_groups(group_folder(params.seed))
    return tables["train"].shape[1] // params.groups.classes_per_group


def _as_trained(test_store: Store, store: Store, device: torch.device) -> StoreImages:
    """Images of another set, normalised with the statistics of the training set."""
    images = StoreImages(test_store, device)
    images.mean, images.std = (torch.tensor(values, device=device) for values in (store.mean, store.std))
    return images
