"""Datasets and DataLoaders, torch's and Hugging Face's, as rows of images and their labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, Dataset, RandomSampler, SequentialSampler, Subset

from pudnet.errors import UserError

IMAGE_KEYS = ("image", "img", "images", "pixel_values")  # usual names of a column, the likeliest first
LABEL_KEYS = ("label", "labels", "target", "fine_label", "class")


@dataclass(frozen=True)
class Rows:
    """A Dataset's images and labels, each read when it is asked for."""

    count: int
    image: Callable[[int], Any]  # row -> a PIL image, array or tensor
    labels: Callable[[], Sequence]  # of all rows; `UserError` where it has none


def is_dataset(images: object) -> bool:
    """Whether it is a torch Dataset or DataLoader, or works as a Hugging Face Dataset does."""
    return isinstance(images, Dataset | DataLoader) or _is_table(images)


def _is_table(images: object) -> bool:
    """Hugging Face's Dataset: items are dicts, and `features` says what each of their values is."""
    return isinstance(getattr(images, "features", None), Mapping) and hasattr(images, "column_names")


def rows_of(dataset: object) -> Rows:
    """The rows of a Dataset in its own order, or those that a DataLoader's sampler picks of its Dataset.

    Raises `UserError` for one without a length, without rows, or without a column of images.
    """
    if isinstance(dataset, DataLoader):
        return _of_loader(dataset)
    if not hasattr(dataset, "__len__"):
        raise UserError("images: a Dataset must have a length (and items by their row); an iterable one has not")
    if not len(dataset):
        raise UserError("images: the Dataset has none")
    if _is_table(dataset):
        return _of_table(dataset)
    return Rows(len(dataset), lambda row: _image_of(_item(dataset, row)), lambda: _labels(dataset))


def _of_loader(loader: DataLoader) -> Rows:
    """Images as the Dataset has them: neither batches nor `collate_fn` matter. In the Dataset's order."""
    own, batches = rows_of(loader.dataset), loader.batch_sampler
    picked = batches.sampler if type(batches) is BatchSampler else loader.sampler
    if batches is not None and type(batches) is not BatchSampler:  # one of the user's own
        picked = (row for batch in batches for row in batch)
    elif isinstance(picked, SequentialSampler | RandomSampler):
        return own
    return _picked(own, sorted({int(row) for row in picked}))


def _picked(own: Rows, rows: Sequence[int]) -> Rows:
    def labels() -> list:
        all_labels = own.labels()
        return [all_labels[row] for row in rows]

    return Rows(len(rows), lambda row: own.image(rows[row]), labels)


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
    """A Dataset's labels without reading an image where that can be: below wrappers, by its `targets`."""
    if type(dataset) is Subset:
        labels = _labels(dataset.dataset)
        return [labels[row] for row in dataset.indices]
    if type(dataset) is ConcatDataset:
        return [label for part in dataset.datasets for label in _labels(part)]
    if _is_table(dataset):
        return _of_table(dataset).labels()
    targets = getattr(dataset, "targets", None)
    own = isinstance(targets, list | np.ndarray | Tensor) and len(targets) == len(dataset)
    if own and getattr(dataset, "target_transform", None) is None:
        return targets
    return [_label_of(_item(dataset, row), row) for row in range(len(dataset))]


def _item(dataset: Any, row: int) -> Any:
    try:
        return dataset[row]
    except Exception as error:  # a user's own code
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"images: item {row} of the Dataset cannot be read ({reason})") from None


# Hugging Face's Datasets


def _of_table(table: Any) -> Rows:
    def image(row: int) -> Any:
        item = _item(table, row)
        name = _column(table, "Image", IMAGE_KEYS, "image")
        return item[name] if name in item else _image_of(item)  # a transform may have renamed it

    return Rows(len(table), image, lambda: _table_labels(table))


def _table_labels(table: Any) -> list:
    """A column of labels, without reading an image; integers become the names that the features give them."""
    name = _column(table, "ClassLabel", LABEL_KEYS, "label")
    column = table.select_columns([name]).with_format(None)[name]  # without a transform, which may want the images
    labels = [label.item() if hasattr(label, "item") else label for label in column]
    names = getattr(table.features[name], "names", None)
    if not names:
        return labels
    return [None if label is None or label < 0 else names[label] for label in labels]  # -1: not known


def _column(table: Any, kind: str, usual: Sequence[str], what: str) -> str:
    """The only column whose feature is of this kind, or else the one with the likeliest name."""
    of_kind = [name for name, feature in table.features.items() if type(feature).__name__ == kind]
    return of_kind[0] if len(of_kind) == 1 else _key(of_kind or table.features, usual, what)


def _key(names: Any, usual: Sequence[str], what: str) -> str:
    found = next((name for name in usual if name in names), None)
    if found is None:
        have, columns = ", ".join(map(str, names)), " or ".join(usual)
        raise UserError(f"images: no column of the Dataset is clearly its {what} (it has {have}); name it {columns}")
    return found
