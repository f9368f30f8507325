"""Task groups: small labelled datasets, kept as tables of image indices into a store.

A group's row holds one block of images for each class. A table of twins has two rows for each group: weights are
predicted from the first, accuracy is measured on the second, which has the same classes in the same order and no
image in common.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from pudnet.data.store import Store, whole_folder
from pudnet.errors import UserError

LARGEST_TABLE = 10**9  # indices, 4 GB; the paper's largest, 100,000 groups of 500 images, is a twentieth of it

# Streams of random numbers, all of one seed: changing one table's size leaves the others as they are.
SPLIT_STREAM = 0
ROLE_STREAMS = {"search_train": 1, "validation": 2, "train": 3, "test": 4}


@dataclass(frozen=True)
class Split:
    """The class split: it decides how hard a set is, so it is part of every result.

    Class ids are sorted. `train_classes` and `validation_classes`, a subset of them that the search validates
    on, belong to the training store; `test_classes` to the test store, and are disjoint from the training
    classes where that is the same store.
    """

    seed: int
    train_classes: tuple[int, ...]
    validation_classes: tuple[int, ...]
    test_classes: tuple[int, ...]

    @property
    def search_classes(self) -> tuple[int, ...]:
        """The training classes that the search trains on: those it does not validate on."""
        return tuple(sorted(set(self.train_classes) - set(self.validation_classes)))


@dataclass(frozen=True)
class GroupSizes:
    """How large groups are and how many of them each table has.

    `images_per_group` None: half as many images of each class as the smallest class has. `test_whole` makes the test
    table one group of all test images, split in two halves. Otherwise test groups may have other numbers of classes and
    images than training groups (None: the same).
    """

    classes_per_group: int
    images_per_group: int | None
    train_groups: int
    search_groups: int
    validation_groups: int
    test_groups: int
    test_whole: bool
    test_classes_per_group: int | None = None
    test_images_per_group: int | None = None

    @property
    def of_test(self) -> GroupSizes:
        """The sizes with those of a test group as the sizes of every group."""
        classes = self.test_classes_per_group or self.classes_per_group
        images = self.test_images_per_group or self.images_per_group
        return replace(self, classes_per_group=classes, images_per_group=images)


def split_classes(
    classes: int,
    train_classes: int,
    classes_per_group: int,
    seed: int,
    test_store_classes: int | None = None,
    test_classes: int | None = None,
) -> Split:
    """Split `classes` class ids at random into `train_classes` for training and the rest for test.

    With `test_store_classes` the test classes are all those of another store instead. `test_classes` keeps only the
    last that many of the test classes (None: all), so that they do not change with `train_classes`. About a
    fifth of the training classes validates the search. Raises UserError where a part has fewer classes than a group.
    """
    order = np.random.default_rng([seed, SPLIT_STREAM]).permutation(classes).tolist()
    train, rest = order[:train_classes], order[train_classes:]
    test = rest if test_store_classes is None else list(range(test_store_classes))
    if test_classes is not None and test_classes > len(test):
        raise UserError(f"test_classes is {test_classes}, but {len(test)} are left for test; lower it or train_classes")
    test = test if test_classes is None else test[-test_classes:]
    validating = max(classes_per_group, round(train_classes / 5))
    if train_classes > classes:
        raise UserError(f"train_classes is {train_classes}, but the training set has {classes} classes; lower it")
    if classes_per_group > len(test):
        raise UserError(
            f"a group has {classes_per_group} classes, but {len(test)} are left for test; "
            "lower classes_per_group or train_classes"
        )
    if train_classes - validating < classes_per_group:
        raise UserError(
            f"of {train_classes} training classes {validating} validate the search, which leaves fewer than "
            f"the {classes_per_group} classes of a group; lower classes_per_group or raise train_classes"
        )
    return Split(seed, *(tuple(sorted(ids)) for ids in (train, train[:validating], test)))


def sample_groups(
    labels: np.ndarray,
    classes: Sequence[int],
    class_names: Sequence[str],
    groups: int,
    classes_per_group: int,
    images_per_class: int,
    twins: bool,
    rng: np.random.Generator,
) -> np.ndarray:
    """Draw groups: indices into `labels`, (groups, N), or (groups, 2, N) with twins.

    N = classes_per_group x images_per_class: class blocks in the order drawn, images within a block in random
    order. With the same generator state, a longer table starts with the rows of a shorter one. Raises UserError for
    a class with too few images, and for a table that is too large.
    """
    sides = 2 if twins else 1
    drawn = sides * images_per_class
    if classes_per_group > len(classes):
        raise UserError(f"a group has {classes_per_group} classes, but only {len(classes)} are there to draw from")
    rows = [np.flatnonzero(labels == label).astype(_index_type(labels)) for label in classes]
    for label, members in zip(classes, rows, strict=True):
        if len(members) < drawn:
            raise UserError(
                f"class {label} ({class_names[label]}) has {len(members)} images, but its groups need "
                f"{drawn}; lower images_per_group"
            )
    if groups * sides * classes_per_group * images_per_class > LARGEST_TABLE:
        raise UserError(
            f"{groups:,} groups of {classes_per_group * images_per_class} images are more than the "
            f"{LARGEST_TABLE:,} that a table may hold; lower the number of groups or images_per_group"
        )
    table = np.empty((groups, sides, classes_per_group, images_per_class), dtype=_index_type(labels))
    for group in table:
        for block, which in enumerate(rng.choice(len(rows), classes_per_group, replace=False)):
            picked = rng.choice(rows[which], drawn, replace=False)
            group[:, block] = picked.reshape(sides, images_per_class)
    return table.reshape((groups, 2, -1) if twins else (groups, classes_per_group * images_per_class))


def halve(labels: np.ndarray, classes: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """One group of twins, (1, 2, N), from all images of the classes; an odd count leaves one image out.

    Blocks stand in the order of `classes` and differ in size where the classes do.
    """
    halves = []
    for label in classes:
        members = rng.permutation(np.flatnonzero(labels == label).astype(_index_type(labels)))
        halves.append(members[: len(members) // 2 * 2].reshape(2, -1))
    return np.concatenate(halves, axis=1)[None]


def whole_class_images(labels: np.ndarray, classes: Sequence[int]) -> int:
    """The most images of each class that a group can have if its twin gets as many: half of the smallest class."""
    counts = np.bincount(labels, minlength=max(classes) + 1)
    return int(counts[list(classes)].min()) // 2


def _index_type(labels: np.ndarray) -> type[np.unsignedinteger]:
    """The smallest type that holds every image index: tables of 100,000 groups are large."""
    return np.uint16 if len(labels) < 65_536 else np.uint32


def build_groups(split: Split, sizes: GroupSizes, train: Store, test: Store | None = None) -> dict[str, np.ndarray]:
    """The tables `search_train`, `validation` (twins), `train` and `test` (twins), from the split's seed.

    Indices of `test` refer to the test store, which is the training store where `test` is None. Raises
    UserError where the sizes do not fit the classes or the images.
    """
    test = test or train

    def sample(
        role: str, store: Store, classes: Sequence[int], groups: int, twins: bool, own: GroupSizes = sizes
    ) -> np.ndarray:
        rng = np.random.default_rng([split.seed, ROLE_STREAMS[role]])
        k, images = own.classes_per_group, _images_per_class(split, own, train, test)
        return sample_groups(store.labels, classes, store.class_names, groups, k, images, twins, rng)

    tables = {
        "search_train": sample("search_train", train, split.search_classes, sizes.search_groups, twins=False),
        "validation": sample("validation", train, split.validation_classes, sizes.validation_groups, twins=True),
        "train": sample("train", train, split.train_classes, sizes.train_groups, twins=False),
    }
    if sizes.test_whole:
        if not whole_class_images(test.labels, split.test_classes):
            raise UserError(f"{_smallest(test, split.test_classes)}, too few for two halves; add images to it")
        rng = np.random.default_rng([split.seed, ROLE_STREAMS["test"]])
        tables["test"] = halve(test.labels, split.test_classes, rng)
    else:
        tables["test"] = sample("test", test, split.test_classes, sizes.test_groups, twins=True, own=sizes.of_test)
    return tables


def _images_per_class(split: Split, sizes: GroupSizes, train: Store, test: Store) -> int:
    """Images of each class in a group of these sizes, the same in every table that they are for."""
    k, n = sizes.classes_per_group, sizes.images_per_group
    if n is not None:
        if n < k or n % k:
            raise UserError(f"images_per_group is {n}; it must be a positive multiple of classes_per_group ({k})")
        return n // k
    fitting = whole_class_images(train.labels, split.train_classes)
    if not sizes.test_whole:
        fitting = min(fitting, whole_class_images(test.labels, split.test_classes))
    if fitting == 0:
        lacking = test, split.test_classes
        if not whole_class_images(train.labels, split.train_classes):
            lacking = train, split.train_classes
        raise UserError(f"{_smallest(*lacking)}, too few for a group and its twin; add images to it")
    return fitting


def _smallest(store: Store, classes: Sequence[int]) -> str:
    """Which class has the fewest images, and how many."""
    counts = np.bincount(store.labels, minlength=len(store.class_names))
    label = min(classes, key=lambda each: counts[each])
    return f"class '{store.class_names[label]}' has {counts[label]} image(s)"


def write_groups(
    folder: Path,
    split: Split,
    tables: Mapping[str, np.ndarray],
    train_class_names: Sequence[str],
    test_class_names: Sequence[str],
) -> None:
    """Write NAME.npy for each table, and split.json with the split's seed, class ids and names; all or nothing."""
    names = {
        "train_class_names": [train_class_names[label] for label in split.train_classes],
        "validation_class_names": [train_class_names[label] for label in split.validation_classes],
        "test_class_names": [test_class_names[label] for label in split.test_classes],
    }
    with whole_folder(folder) as partial:
        for name, table in tables.items():
            np.save(partial / f"{name}.npy", table)
        content = {**asdict(split), **names, "tables": sorted(tables)}
        (partial / "split.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def open_groups(folder: Path) -> tuple[Split, dict[str, np.ndarray]]:
    """The split and its tables, memory-mapped and read-only; UserError where they are missing or damaged."""
    path = folder / "split.json"
    if not path.is_file():
        raise UserError(f"{folder} has no task groups; run `dvc repro` to make them")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        roles = ("train_classes", "validation_classes", "test_classes")
        split = Split(content["seed"], *(tuple(content[role]) for role in roles))
        tables = {}
        for name in content["tables"]:
            path = folder / f"{name}.npy"
            tables[name] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise UserError(f"{path} is damaged; delete {folder} and run `dvc repro` again") from error
    return split, tables
