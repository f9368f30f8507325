"""Reads images and labels from Datasets and DataLoaders, of torch and of Hugging Face."""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

from pudnet.errors import UserError, one_line

IMAGE_KEYS = ("image", "img", "images", "pixel_values")  # usual names of a column, the likeliest first
LABEL_KEYS = ("label", "labels", "target", "fine_label", "class")


@dataclass(frozen=True)
class Rows:
    """A Dataset's images and labels. Each is read only when it is needed."""

    count: int
    image: Callable[[int], Any]  # row -> a PIL image, array or tensor
    labels: Callable[[], Sequence]  # of all rows; raises `UserError` if there are none


def is_dataset(images: object) -> bool:
    """Whether this is a torch Dataset or DataLoader, or a Hugging Face Dataset (or a class that works like one)."""
    return isinstance(images, Dataset | DataLoader) or _is_table(images)


def _is_table(images: object) -> bool:
    """Whether this is a Hugging Face Dataset: its items are dicts, and `features` gives the type of each value."""
    return isinstance(getattr(images, "features", None), Mapping) and hasattr(images, "column_names")


def rows_of(dataset: object) -> Rows:
    """Open a Dataset, in its own order, or the Dataset of a DataLoader, with the rows that its sampler picks.

    The sampler is asked once. Raises `UserError` for a Dataset without a length, rows, or a column of images.
    """
    if isinstance(dataset, DataLoader):
        return _of_loader(dataset)
    if not hasattr(dataset, "__len__"):
        raise UserError("images: a Dataset must have a length and give items by number; this one has no length")
    if not len(dataset):
        raise UserError("images: the Dataset has none")
    if type(dataset) is Subset:
        return _picked(rows_of(dataset.dataset), dataset.indices)
    if type(dataset) is ConcatDataset:
        return _joined([rows_of(part) for part in dataset.datasets if len(part)])
    if _is_table(dataset):
        return _of_table(dataset)
    return Rows(len(dataset), lambda row: _image_of(_item(dataset, row)), lambda: _labels(dataset))


def _picked(own: Rows, rows: Sequence[int]) -> Rows:
    def labels() -> list:
        all_labels = own.labels()
        return [all_labels[row] for row in rows]

    return Rows(len(rows), lambda row: own.image(rows[row]), labels)


def _joined(parts: Sequence[Rows]) -> Rows:
    starts = list(accumulate((part.count for part in parts), initial=0))

    def image(row: int) -> Any:
        if not -starts[-1] <= row < starts[-1]:
            raise UserError(f"images: item {row} of the Dataset cannot be read (it has {starts[-1]})")
        row = row % starts[-1]  # torch takes negative rows, too
        part = bisect_right(starts, row) - 1
        return parts[part].image(row - starts[part])

    return Rows(starts[-1], image, lambda: [label for part in parts for label in part.labels()])


# DataLoaders


def _of_loader(loader: DataLoader) -> Rows:
    """The rows that the sampler picks, in its order; or all rows in the Dataset's order, if it only shuffles them.

    Images are those of the Dataset: batches and `collate_fn` do not matter.
    """
    own, batches = rows_of(loader.dataset), loader.batch_sampler
    sampler = batches.sampler if type(batches) is BatchSampler else loader.sampler
    if batches is not None and type(batches) is not BatchSampler:  # one of the user's own
        rows = _drawn(batches, own.count)
    elif type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == own.count:
        return own
    elif type(sampler) is SubsetRandomSampler:
        rows = sorted(_drawn(sampler.indices, own.count))
    else:
        rows = _drawn(sampler, own.count)
    if not rows:
        raise UserError("images: the DataLoader's sampler picks none")
    return _picked(own, rows)


def _drawn(sampler: Iterable, count: int) -> list[int]:
    """Draw row numbers below `count` from a sampler or batch sampler. The caller's random state stays as it was."""
    own = getattr(sampler, "generator", None)
    before = own.get_state() if own is not None else None
    try:
        with torch.random.fork_rng(devices=[]):
            rows = [operator.index(row) for part in sampler for row in np.ravel(part).tolist()]
    except Exception as error:  # a user's own code
        raise UserError(f"images: the DataLoader's sampler gives no rows ({one_line(error)})") from None
    finally:
        if own is not None:
            own.set_state(before)
    if outside := [row for row in rows if not -count <= row < count]:
        raise UserError(f"images: the DataLoader's sampler picks row {outside[0]} of a Dataset of {count}")
    return rows


# torch's Datasets


def _image_of(item: Any) -> Any:
    if isinstance(item, Mapping):
        return item[_key(item, IMAGE_KEYS, "image")]
    return item[0] if isinstance(item, tuple | list) else item


def _label_of(item: Any, row: int) -> Any:
    if isinstance(item, Mapping):
        return item[_key(item, LABEL_KEYS, "label")]
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise UserError(f"images: item {row} of the Dataset is not (image, label)")
    return item[1]


def _labels(dataset: Dataset) -> Sequence:
    """A Dataset's labels: its `targets`, if it has any. As in torchvision, its `classes` may give them names.

    A plain `TensorDataset` has them in its second tensor. Of any other Dataset, every item is read.
    """
    if type(dataset) is TensorDataset and len(dataset.tensors) == 2:
        return dataset.tensors[1]
    if getattr(dataset, "target_transform", None) is not None:
        return [_label_of(_item(dataset, row), row) for row in range(len(dataset))]
    labels = getattr(dataset, "targets", None)
    if not isinstance(labels, list | np.ndarray | Tensor) or len(labels) != len(dataset):
        labels = [_label_of(_item(dataset, row), row) for row in range(len(dataset))]
    return _named(labels, getattr(dataset, "classes", None))


def _named(labels: Sequence, names: object) -> Sequence:
    """Replace each integer label by the class name at that position; keep other labels."""
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return labels
    plain = labels.tolist() if isinstance(labels, np.ndarray | Tensor) else labels
    if all(type(label) is int and 0 <= label < len(names) for label in plain):
        return [names[label] for label in plain]
    return labels


def _item(dataset: Any, row: int) -> Any:
    try:
        return dataset[row]
    except Exception as error:  # a user's own code
        raise UserError(f"images: item {row} of the Dataset cannot be read ({one_line(error)})") from None


# Hugging Face's Datasets


def _of_table(table: Any) -> Rows:
    def image(row: int) -> Any:
        item, name = _item(table, row), _image_column(table)
        return item[name] if name in item else _image_of(item)  # a transform may have renamed the column

    return Rows(len(table), image, lambda: _table_labels(table))


def _table_labels(table: Any) -> list:
    """A column of labels, without reading an image. If the features have names for integer labels, gives the names.

    If the Dataset's transform changes labels, the changed labels are used. To find out, the transform is called for
    one row of each label, and if one of these labels changes, for every row.
    """
    name = _label_column(table)
    column = table.select_columns([name]).with_format(None)[name]
    labels = [label.item() if hasattr(label, "item") else label for label in column]
    if table.format["type"] == "custom":
        first = {label: row for row, label in reversed(list(enumerate(map(str, labels))))}
        if any(_transformed(table, row, name) not in (labels[row], None) for row in first.values()):
            return [_transformed(table, row, name) for row in range(len(table))]
    names = getattr(table.features[name], "names", None)
    if not names:
        return labels
    return [None if label is None or label < 0 else names[label] for label in labels]  # -1: not known


def _transformed(table: Any, row: int, name: str) -> Any:
    """The label that the transform gives a row; None if it gives none, or a vector (which some losses need)."""
    item = _item(table, row)
    label = next((item[key] for key in (name, *LABEL_KEYS) if key in item), None)
    label = label.item() if hasattr(label, "item") and label.ndim == 0 else label
    return label if isinstance(label, int | float | str) else None


def _image_column(table: Any) -> str:
    """The column of images: the one whose type says so, or else the one with a usual name."""
    kind, named = _of_kind(table, "Image"), [name for name in IMAGE_KEYS if name in table.features]
    return _only(table, "image", [name for name in kind if name in named], kind, named)


def _label_column(table: Any) -> str:
    """The column with a usual name. If no column has one, the only ClassLabel column."""
    named = [name for name in LABEL_KEYS if name in table.features]
    return _only(table, "label", named, [] if named else _of_kind(table, "ClassLabel"))


def _of_kind(table: Any, kind: str) -> list[str]:
    return [name for name, feature in table.features.items() if type(feature).__name__ == kind]


def _only(table: Any, what: str, *candidates: list[str]) -> str:
    """Of these lists, take the first that has exactly one column, and return that column."""
    found = next((names[0] for names in candidates if len(names) == 1), None)
    if found is None:
        raise _not_clear(table.features, IMAGE_KEYS if what == "image" else LABEL_KEYS, what)
    return found


def _key(names: Mapping, usual: Sequence[str], what: str) -> str:
    found = next((name for name in usual if name in names), None)
    if found is None:
        raise _not_clear(names, usual, what)
    return found


def _not_clear(names: Iterable, usual: Sequence[str], what: str) -> UserError:
    have, columns = ", ".join(map(str, names)), f"{', '.join(usual[:-1])} or {usual[-1]}"
    return UserError(
        f"images: no column of the Dataset is clearly its {what} (it has {have}); call just one of them {columns}"
    )
