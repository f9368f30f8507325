"""Task groups: small labelled datasets, kept as tables of image indices into a store.

All images of a group have one look (pudnet/data/looks.py), which its indices name too, and are of one set.

A row of a table is a group: one block of images for each class. In a table of twins, each group has two rows. Weights
are predicted from the first row. Accuracy is measured on the second, which has other images of the same classes, in
the same order.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from pudnet.data.looks import LOOKS
from pudnet.data.store import Store, whole_folder
from pudnet.errors import UserError

LARGEST_TABLE = 10**9  # indices, 4 GB; the paper's largest, 100,000 groups of 500 images, is a twentieth of it

# Each table has its own stream of random numbers, so that changing the size of one does not change the others.
SPLIT_STREAM = 0
ROLE_STREAMS = {"search_train": 1, "validation": 2, "train": 3, "test": 4}


@dataclass(frozen=True)
class Split:
    """Which classes are for training and which for testing. It decides how hard a set is, so every result states it.

    Class ids are sorted. `validation_classes` are those of the `train_classes` on which the search validates.
    `test_classes` are ids in the test store. If that is also the training store, no test class is a training class.
    """

    seed: int
    train_classes: tuple[int, ...]
    validation_classes: tuple[int, ...]
    test_classes: tuple[int, ...]

    @property
    def search_classes(self) -> tuple[int, ...]:
        """The training classes that the search trains on, which are all but the validation classes."""
        return tuple(sorted(set(self.train_classes) - set(self.validation_classes)))


@dataclass(frozen=True)
class GroupSizes:
    """The size of groups, and how many of them each table has.

    `images_per_group` None: each class gets half as many images as the smallest class has. With `test_whole`, all test
    images are one test group, of two halves. Otherwise, test groups may have other numbers of classes and images than
    training groups (None: the same).
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
        """The same, but with the sizes of a test group for all groups."""
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
    test_classes_per_group: int | None = None,
) -> Split:
    """Split `classes` class ids at random into `train_classes` for training and the rest for test.

    With `test_store_classes`, the number of classes in another store, all of these are the test classes instead. Of the
    test classes only the last `test_classes` are kept (None: all), so that they do not change with `train_classes`.
    The search validates on about a fifth of the training classes. Raises `UserError` if a part has fewer classes than
    a group (a test group: `test_classes_per_group`; None: as others).
    """
    tested = test_classes_per_group or classes_per_group
    order = np.random.default_rng([seed, SPLIT_STREAM]).permutation(classes).tolist()
    train, rest = order[:train_classes], order[train_classes:]
    test = rest if test_store_classes is None else list(range(test_store_classes))
    if test_classes is not None and test_classes > len(test):
        raise UserError(f"test_classes is {test_classes}, but {len(test)} are left for test; lower it or train_classes")
    test = test if test_classes is None else test[-test_classes:]
    validating = max(classes_per_group, round(train_classes / 5))
    if train_classes > classes:
        raise UserError(f"train_classes is {train_classes}, but the training set has {classes} classes; lower it")
    if tested > len(test):
        raise UserError(
            f"a group has {tested} classes, but {len(test)} are left for test; "
            "lower train_classes, or the number of classes in a test group"
        )
    if train_classes - validating < classes_per_group:
        raise UserError(
            f"of {train_classes} training classes {validating} validate the search, which leaves fewer than "
            f"the {classes_per_group} classes of a group; lower classes_per_group or raise train_classes"
        )
    return Split(seed, *(tuple(sorted(ids)) for ids in (train, train[:validating], test)))


def split_sets(
    store: Store,
    train_classes: Sequence[int],
    classes_per_group: int,
    seed: int,
    test_store: Store | None = None,
    test_classes: int | None = None,
    test_classes_per_group: int | None = None,
) -> Split:
    """Split the classes of each set of a store as `split_classes` does, whichever other sets there are.

    `train_classes` has a number for each set, `test_classes` is of each.
    """
    other, parts = len(test_store.class_names) if test_store else None, []
    for (name, ids), count in zip(store.set_classes.items(), train_classes, strict=True):
        try:
            own = split_classes(len(ids), count, classes_per_group, seed, other, test_classes, test_classes_per_group)
        except UserError as error:
            raise UserError(f"{name}: {error}" if name else str(error)) from None
        parts.append((ids, own))

    def joined(role: str) -> tuple[int, ...]:
        return tuple(ids[label] for ids, own in parts for label in getattr(own, role))

    test = joined("test_classes") if test_store is None else parts[0][1].test_classes
    return Split(seed, joined("train_classes"), joined("validation_classes"), test)


def sample_groups(
    labels: np.ndarray,
    classes: Sequence[int],
    class_names: Sequence[str],
    groups: int,
    classes_per_group: int,
    images_per_class: int,
    twins: bool,
    rng: np.random.Generator,
    sets: Sequence[Collection[int]] | None = None,
    looks: Sequence[str] = ("plain",),
) -> np.ndarray:
    """Draw groups -> indices into `labels`, and looks: (groups, N), or (groups, 2, N) with twins.

    N = classes_per_group x images_per_class. A row has a block for each class; classes, and images within a block, are
    in the random order in which they were drawn. A group's classes are of one of the `sets` (of classes; None: all are
    one set), and its images, and its twin's, have one of the looks; sets and looks are drawn with equal chances. From
    the same generator state, a longer table starts with the rows of a shorter one. Raises `UserError` if a class has
    too few images, a set too few classes, or the table is too large.
    """
    sides = 2 if twins else 1
    drawn = sides * images_per_class
    pools = [np.flatnonzero(np.isin(classes, list(own))) for own in sets or [classes]]
    if classes_per_group > (fewest := min(map(len, pools))):
        raise UserError(f"a group has {classes_per_group} classes, but only {fewest} are there to draw from")
    rows = [np.flatnonzero(labels == label) for label in classes]
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
    of_sets, of_looks = rng.spawn(2)  # of their own: with one set and one look, the rest is drawn as ever
    firsts = of_looks.choice(_firsts(labels, looks), groups)
    table = np.empty((groups, sides, classes_per_group, images_per_class), dtype=_index_type(labels, looks))
    for group, pool, first in zip(table, of_sets.integers(len(pools), size=groups), firsts, strict=True):
        for block, which in enumerate(rng.choice(pools[pool], classes_per_group, replace=False)):
            picked = rng.choice(rows[which], drawn, replace=False)
            group[:, block] = first + picked.reshape(sides, images_per_class)
    return table.reshape((groups, 2, -1) if twins else (groups, classes_per_group * images_per_class))


def halve(
    labels: np.ndarray, classes: Sequence[int], rng: np.random.Generator, looks: Sequence[str] = ("plain",)
) -> np.ndarray:
    """Make a group of twins from all images of the classes, once with each look: (looks, 2, N).

    Blocks are in the order of `classes`, and as large as half of their class. Of an odd number, one image is left out.
    """
    halves = []
    for label in classes:
        members = rng.permutation(np.flatnonzero(labels == label))
        halves.append(members[: len(members) // 2 * 2].reshape(2, -1))
    firsts = _firsts(labels, looks)[:, None, None]
    return (firsts + np.concatenate(halves, axis=1)).astype(_index_type(labels, looks))


def whole_class_images(labels: np.ndarray, classes: Sequence[int]) -> int:
    """How many images of each class a group can have if its twin gets as many: half of the smallest class."""
    counts = np.bincount(labels, minlength=max(classes) + 1)
    return int(counts[list(classes)].min()) // 2


def _firsts(labels: np.ndarray, looks: Sequence[str]) -> np.ndarray:
    """The first index with each of the looks."""
    return np.array([list(LOOKS).index(look) * len(labels) for look in looks])


def _index_type(labels: np.ndarray, looks: Sequence[str]) -> type[np.unsignedinteger]:
    """The smallest integer type that can hold every index, since tables of 100,000 groups are large."""
    return np.uint16 if _firsts(labels, looks).max() + len(labels) < 65_536 else np.uint32


def build_groups(
    split: Split,
    sizes: GroupSizes,
    train: Store,
    test: Store | None = None,
    looks: Sequence[str] = ("plain",),
    test_looks: Sequence[str] | None = None,
) -> dict[str, np.ndarray]:
    """Draw the tables `search_train`, `validation` (twins), `train` and `test` (twins), with the split's seed.

    The table `test` has indices into the store `test`, or into the training store if `test` is None, and the looks
    `test_looks` (None: those of the others). Raises `UserError` if there are too few classes or images for these sizes.
    """
    test_looks = test_looks or looks
    test = test or train

    def sample(
        role: str, store: Store, classes: Sequence[int], groups: int, twins: bool, own: GroupSizes = sizes
    ) -> np.ndarray:
        rng = np.random.default_rng([split.seed, ROLE_STREAMS[role]])
        k, images = own.classes_per_group, _images_per_class(split, own, train, test)
        sets, seen = list(store.set_classes.values()), test_looks if role == "test" else looks
        return sample_groups(store.labels, classes, store.class_names, groups, k, images, twins, rng, sets, seen)

    tables = {
        "search_train": sample("search_train", train, split.search_classes, sizes.search_groups, twins=False),
        "validation": sample("validation", train, split.validation_classes, sizes.validation_groups, twins=True),
        "train": sample("train", train, split.train_classes, sizes.train_groups, twins=False),
    }
    if sizes.test_whole:
        if not whole_class_images(test.labels, split.test_classes):
            raise UserError(f"{_smallest(test, split.test_classes)}, too few for two halves; add images to it")
        rng = np.random.default_rng([split.seed, ROLE_STREAMS["test"]])
        tables["test"] = halve(test.labels, split.test_classes, rng, test_looks)
    else:
        tables["test"] = sample("test", test, split.test_classes, sizes.test_groups, twins=True, own=sizes.of_test)
    return tables


def _images_per_class(split: Split, sizes: GroupSizes, train: Store, test: Store) -> int:
    """How many images of each class a group has. It is the same in all of the given tables."""
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
    """Name the class with the fewest images, and say how many it has."""
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
    """Write each table as NAME.npy, and the split's seed, class ids and names as split.json; all or nothing."""
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
    """Open a split and its tables, memory-mapped and read-only. Raises `UserError` if they are missing or damaged."""
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
