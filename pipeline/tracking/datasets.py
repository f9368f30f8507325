"""The images that a run trains on or is measured on, as datasets: MLflow shows them in the column "Dataset"."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.types import ColSpec, Schema

from pipeline.params import Params
from pipeline.project import STORE, TEST_STORE, group_folder
from pudnet.data.groups import Split, open_groups
from pudnet.data.sources import set_name
from pudnet.data.store import Store, open_store

# Group table -> what a run uses it for, and its part in the dataset's name.
USES = {
    "search_train": ("training", "search"),
    "train": ("training", "train"),
    "validation": ("validation", "validation"),
    "test": ("test", "test"),
}
SCHEMA = json.dumps({"mlflow_colspec": Schema([ColSpec("binary", "image"), ColSpec("string", "label")]).to_dict()})


@cache  # the trials of an experiment share their datasets
def dataset(store_folder: Path, groups_folder: Path, table: str, groups: int | None = None) -> DatasetInput:
    """The first `groups` task groups (None: all) of a group table, whose images are in this store.

    Its digest is of the images and of the table, so equal digests mean equal groups.
    """
    store, (split, tables) = open_store(store_folder, verify=False), open_groups(groups_folder)
    rows = tables[table][:groups]
    digest = hashlib.sha256((store_folder / "meta.json").read_bytes())  # has the images' checksum
    digest.update(np.ascontiguousarray(rows))
    context, part = USES[table]
    name = "+".join(store.sets) or set_name(store.source)
    logged = Dataset(
        name=f"{name}-split{split.seed}-{part}",
        digest=digest.hexdigest()[:8],
        source_type="local",
        source=json.dumps({"uri": store.source}),
        schema=SCHEMA,
        profile=json.dumps(_profile(store, split, table, rows)),
    )
    return DatasetInput(logged, [InputTag("mlflow.data.context", context)])


def test_sets(params: Params, test_groups: int | None = None) -> list[DatasetInput]:
    """The first `test_groups` test groups (None: all) of each class split, as MLflow's datasets."""
    store = TEST_STORE if params.prepare.test_source else STORE
    return [dataset(store.resolve(), group_folder(seed).resolve(), "test", test_groups) for seed in params.split_seeds]


def _profile(store: Store, split: Split, table: str, rows: np.ndarray) -> dict[str, Any]:
    """How much there is in a table of groups, (G, N) or (G, 2, N) with twins."""
    classes = split.search_classes if table == "search_train" else getattr(split, f"{table}_classes")
    first = rows[:1].reshape(-1, rows.shape[-1])[:1] % len(store.labels)  # whatever their looks
    return {
        "groups": len(rows),
        "classes": len(classes),
        "images": int(np.isin(store.labels, classes).sum()),
        "classes_per_group": len(np.unique(store.labels[first])),
        "images_per_group": rows.shape[-1],
        "image_size": store.image_size,
        "channels": store.channels,
        "class_names": [store.class_names[c] for c in classes],
    }
