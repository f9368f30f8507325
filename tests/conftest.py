"""What several test files use."""

import gc
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from pudnet.data.groups import GroupSizes, Split, build_groups, split_classes
from pudnet.data.images import StoreImages
from pudnet.data.sources import open_source
from pudnet.data.store import Store, open_store, write_store

torch.set_num_threads(1)  # tests are tiny: a second thread costs more than it does

# Minutes, by real stages; the longest first.
LONG = ("test_pipeline.py", "test_study.py", "test_final_training.py", "test_benchmarks.py")
LONGEST = 1800  # seconds that one of their tests may take, on a slow machine

SIZES = GroupSizes(2, 40, train_groups=60, search_groups=2, validation_groups=2, test_groups=12, test_whole=False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files first, one to a worker, since one that begins late is waited for; and they have more time."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    for item in items:
        if item.path.name in LONG:
            item.add_marker(pytest.mark.timeout(LONGEST))


def pytest_collection_finish() -> None:
    """Leave what has been imported out of later collections, of which reading a damaged image makes one."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Else Python ends with all of it alive, and a library of torch's calls that a leak."""
    gc.unfreeze()


@dataclass(frozen=True)
class Digits:
    """Real digits, prepared as the pipeline prepares them: small groups of 2 classes x 20 images."""

    store: Store
    split: Split
    train: np.ndarray  # (60, 40)
    test: np.ndarray  # (12, 2, 40)
    images: StoreImages


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    write_store(open_source("sklearn:digits", folder, image_size=8, channels=1), folder / "store")
    store = open_store(folder / "store", verify=False)
    split = split_classes(10, train_classes=6, classes_per_group=2, seed=0)
    tables = build_groups(split, SIZES, store)
    return Digits(store, split, tables["train"], tables["test"], StoreImages(store, torch.device("cpu")))
