"""A user's own images, in whatever form they come, as what a model takes; read only where they are looked at."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from pudnet.data.sources import convert, image_files, labelled_files, read_image, to_array
from pudnet.errors import UserError

AT_A_TIME = 500  # images where they do not depend on each other, of 32 px; fewer of larger ones
CHANNELS = (1, 2, 3, 4)  # grey, grey and alpha, RGB, RGB and alpha

Label = bool | int | float | str  # what a file can hold; other labels go by their `str`
Pixels = np.ndarray | Tensor
Images = Pixels | Sequence[Pixels | Image.Image] | str | Path | Dataset


class Form(Protocol):
    """What a model takes; a `Card` is one."""

    image_size: int
    channels: int


class ConvertedImages(UserWarning):
    """Images of another size or mode than the model's were converted as its training data was."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images that are read by their row, already in the form that a model takes; labels where they are known."""

    count: int
    read: Callable[[list[int]], Pixels]  # rows -> (n, S, S, C) of 0..255
    labels: Sequence | Pixels | None = None
    files: tuple[Path, ...] = ()  # of a folder
    skipped: tuple[Path, ...] = ()  # files that cannot be read

    def chunks(self, at_a_time: int) -> Iterator[Tensor]:
        """All images, in order, (n, S, S, C) of 0..255."""
        for first in range(0, self.count, at_a_time):
            yield torch.as_tensor(self.read(list(range(first, min(first + at_a_time, self.count)))))


def images_at_a_time(image_size: int) -> int:
    """How many images of this size go through a network at once: their maps stay within a few hundred MB."""
    return min(AT_A_TIME, max(1, AT_A_TIME * 32**2 // image_size**2))


def image_set(images: Images | ImageSet, form: Form, labels: Sequence | Pixels | None = None) -> ImageSet:
    """A user's images as an `ImageSet`, converted to the model's size and channels as its training data was.

    Takes an array or tensor: integers (N, H, W, C) or (N, H, W), uint8 or uint16, or floats (N, C, H, W) in 0..1
    (the channels may stand in the other place, where that is clear); a list of PIL images or arrays of any
    sizes; a torch Dataset of (image, label); a folder, with a subfolder of images a class or of images alone.

    Raises:
        UserError: for anything else, floats that are not in 0..1, no images, or a folder without any.
    """
    if isinstance(images, ImageSet):
        return images
    if isinstance(images, str | Path):
        return open_folder(Path(images), form)
    if isinstance(images, Dataset):
        return _of_dataset(images, form)
    if isinstance(images, list | tuple):
        return _of_list(images, form, labels)
    return _of_array(images, form, labels)


# Arrays and tensors


def _of_array(images: Pixels, form: Form, labels: Sequence | Pixels | None) -> ImageSet:
    if not isinstance(images, np.ndarray | Tensor):
        raise UserError(f"images: must be an array, a list of images, a Dataset or a folder, got {_kind(images)}")
    if isinstance(images, Tensor) and images.dtype == torch.uint16:
        images = images.cpu().numpy()  # torch cannot take rows of these
    _check_array(images)
    size, channels = _image_shape(images)
    if (*size, channels) != (form.image_size, form.image_size, form.channels):
        warnings.warn(
            f"images of {size[1]}x{size[0]} px and {channels} channel(s) become {form.image_size}x{form.image_size} "
            f"px and {form.channels}, as the model's training data",
            ConvertedImages,
            stacklevel=4,
        )
    return ImageSet(len(images), lambda rows: _pixels(images[rows], form), labels)


def _check_array(images: Pixels) -> None:
    """Raise `UserError` for an array that holds no images; floats are looked at a part at a time."""
    floating = images.is_floating_point() if isinstance(images, Tensor) else images.dtype.kind == "f"
    if not floating and str(images.dtype).removeprefix("torch.") not in ("uint8", "uint16"):
        raise UserError(f"images: must be uint8 (N, H, W, C) or float (N, C, H, W), got {images.dtype}")
    if _channel_axis(images) is None or 0 in images.shape:
        raise UserError(
            f"images: must be uint8 (N, H, W, C) or float (N, C, H, W) with 1 to 4 channels, "
            f"got shape {tuple(images.shape)}"
        )
    for first in range(0, len(images) if floating else 0, AT_A_TIME):
        part = images[first : first + AT_A_TIME]
        if not bool(((part >= 0) & (part <= 1)).all()):
            raise UserError("images: floats must lie in 0..1, these hold other values (or NaN)")


def _channel_axis(images: Pixels) -> int | None:
    """Which axis of (N, ...) holds the channels, 3 for grey images without one; None where it is not clear."""
    if images.ndim == 3:
        return 3
    if images.ndim != 4:
        return None
    floating = images.is_floating_point() if isinstance(images, Tensor) else images.dtype.kind == "f"
    usual, other = (1, 3) if floating else (3, 1)
    return next((axis for axis in (usual, other) if images.shape[axis] in CHANNELS), None)


def _image_shape(images: Pixels) -> tuple[tuple[int, int], int]:
    """Height and width of the images of an array, and their channels."""
    axis = _channel_axis(images)
    if images.ndim == 3:
        return tuple(images.shape[1:]), 1
    return tuple(n for a, n in enumerate(images.shape) if a not in (0, axis)), images.shape[axis]


def _pixels(images: Pixels, form: Form) -> Tensor:
    """An array of images that `_check_array` has passed -> (n, S, S, C) of 0..255."""
    axis = _channel_axis(images)
    pixels = torch.as_tensor(np.ascontiguousarray(images) if isinstance(images, np.ndarray) else images)
    pixels = pixels.unsqueeze(3) if pixels.ndim == 3 else pixels.movedim(axis, 3)
    if pixels.is_floating_point():
        pixels = pixels.float() * 255
    elif pixels.dtype == torch.uint16:
        pixels = ((pixels.int() * 255 + 32_767) // 65_535).to(torch.uint8)
    if tuple(pixels.shape[1:]) == (form.image_size, form.image_size, form.channels):
        return pixels
    eight_bits = pixels.round().to(torch.uint8).cpu().numpy()
    return torch.from_numpy(convert(eight_bits, form.image_size, form.channels))


# Lists and Datasets


def _of_list(images: Sequence, form: Form, labels: Sequence | Pixels | None) -> ImageSet:
    if not images:
        raise UserError("images: there are none")
    return ImageSet(len(images), lambda rows: torch.stack([_one(images[row], row, form) for row in rows]), labels)


def _one(image: Pixels | Image.Image, row: int, form: Form) -> Tensor:
    """One image, (H, W, C), (H, W) or float (C, H, W), or a PIL image -> (S, S, C) of 0..255."""
    try:
        if isinstance(image, Image.Image):
            return torch.from_numpy(to_array(image, form.image_size, form.channels))
        if not isinstance(image, np.ndarray | Tensor):
            raise UserError(f"images: must be PIL images, arrays or tensors, got {_kind(image)}")
        _check_array(image[None])
        return _pixels(image[None], form)[0]
    except (UserError, ValueError) as error:
        raise UserError(f"image {row}: {str(error).removeprefix('images: ')}") from None


def _of_dataset(dataset: Dataset, form: Form) -> ImageSet:
    if not hasattr(dataset, "__len__"):
        raise UserError("images: a Dataset must have a length (and items by their row); an iterable one has not")
    if not len(dataset):
        raise UserError("images: the Dataset has none")

    def read(rows: list[int]) -> Tensor:
        return torch.stack([_one(_item(dataset, row)[0], row, form) for row in rows])

    return ImageSet(len(dataset), read, _dataset_labels(dataset))


def _dataset_labels(dataset: Dataset) -> Sequence:
    """A Dataset's labels: its `targets`, as torchvision's sets have them, or else from all of its items."""
    targets = getattr(dataset, "targets", None)
    own = isinstance(targets, list | np.ndarray | Tensor) and len(targets) == len(dataset)
    if own and getattr(dataset, "target_transform", None) is None:
        return targets
    return [_item(dataset, row)[1] for row in range(len(dataset))]


def _item(dataset: Dataset, row: int) -> tuple[Any, Any]:
    try:
        image, label = dataset[row]
    except Exception as error:  # a user's own code
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"images: item {row} of the Dataset cannot be read as (image, label) ({reason})") from None
    return image, label


# Folders


def open_folder(folder: Path, form: Form, skip_bad: bool = False) -> ImageSet:
    """The images of a folder; their labels are the names of its subfolders, where it has any.

    `skip_bad`: files that cannot be read as images are left out (and counted), which reads every file once.

    Raises:
        UserError: for a folder without images; without `skip_bad`, when a file that cannot be read is looked at.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    flat = not any(child.is_dir() and not child.name.startswith(".") for child in folder.iterdir())
    files, names = (image_files(folder), []) if flat else labelled_files(folder)
    bad = _unreadable(files) if skip_bad else set()
    kept = [row for row, file in enumerate(files) if file not in bad]
    if not kept:
        raise UserError(f"{folder}: none of its {len(files)} images can be read")
    files, names = [files[row] for row in kept], [names[row] for row in kept] if names else None
    decode = partial(read_image, image_size=form.image_size, channels=form.channels)

    def read(rows: list[int]) -> np.ndarray:
        with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
            return np.stack(list(pool.map(decode, [files[row] for row in rows])))

    return ImageSet(len(files), read, names, tuple(files), tuple(sorted(bad)))


def _unreadable(files: Sequence[Path]) -> set[Path]:
    """The files that cannot be read as images."""

    def bad(file: Path) -> bool:
        try:
            read_image(file, 8, 1)
        except UserError:
            return True
        return False

    with ThreadPoolExecutor() as pool:
        return {file for file, is_bad in zip(files, pool.map(bad, files), strict=True) if is_bad}


# Labels


def encode_labels(labels: Sequence | Pixels | None, images: int) -> tuple[Tensor, tuple[Label, ...]]:
    """Labels of any type -> (N,) in 0..k-1 and the k classes, sorted; what is no number or string goes by its `str`.

    Raises `UserError` when there are fewer than two classes or not one label an image.
    """
    if labels is None:
        raise UserError("labels: one an image is needed")
    values = _plain_labels(labels)
    if len(values) != images:
        raise UserError(f"labels: {images} images need as many labels, got {len(values)}")
    lacking = next((row for row, value in enumerate(values) if _is_missing(value)), None)
    if lacking is not None:
        raise UserError(f"labels: image {lacking} has none ({values[lacking]})")
    distinct = _sorted_distinct(values)
    if len(distinct) < 2:
        raise UserError(f"labels: need images of at least two classes, got {len(distinct)} ({distinct[0]})")
    names = tuple(value if isinstance(value, Label) else str(value) for value in distinct)
    if len(set(names)) < len(names):
        raise UserError("labels: two of them have the same name; use strings or integers")
    column = {value: position for position, value in enumerate(distinct)}
    return torch.tensor([column[value] for value in values]), names


def _plain_labels(labels: Sequence | Pixels) -> list:
    """Labels as a list of Python's own values."""
    if isinstance(labels, np.ndarray | Tensor):
        if labels.ndim != 1:
            raise UserError(f"labels: must be one an image, got shape {tuple(labels.shape)}")
        return labels.tolist()
    if isinstance(labels, str | bytes) or not isinstance(labels, Sequence) and not hasattr(labels, "__iter__"):
        raise UserError(f"labels: must be one an image, got {_kind(labels)}")
    return [value.item() if isinstance(value, np.generic | Tensor) and not value.ndim else value for value in labels]


def _is_missing(value: Any) -> bool:
    return value is None or isinstance(value, float) and math.isnan(value)


def _sorted_distinct(values: list) -> list:
    try:
        distinct = set(values)
    except TypeError:
        raise UserError("labels: must be one an image, as an integer or a string; these are collections") from None
    try:
        return sorted(distinct)
    except TypeError:  # of several types
        return sorted(distinct, key=lambda value: (type(value).__name__, str(value)))


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"
