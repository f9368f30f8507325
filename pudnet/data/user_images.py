"""Converts a user's images of any form to the model's form. Images are read only when needed."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pudnet.data.datasets import is_dataset, rows_of
from pudnet.data.decode import convert, eight_bits, read_images, to_array, unreadable
from pudnet.data.folders import by_type, look_in
from pudnet.errors import UserError, one_line

AT_A_TIME = 500  # images of 32 px in one batch; of larger images fewer
ROUNDING = 1e-3  # floats may lie so far outside of 0..1: resizing rounds white to a little more than 1
CHANNELS = (1, 2, 3, 4)  # grey, grey and alpha, RGB, RGB and alpha

Label = bool | int | float | str  # what a file can store; other labels are converted by `str`
Pixels = np.ndarray | Tensor
Images = Pixels | Sequence[Pixels | Image.Image] | str | Path | Dataset | DataLoader


class Form(Protocol):
    """The form of images that a model takes. A `Card` has these attributes."""

    image_size: int
    channels: int


class ConvertedImages(UserWarning):
    """Warns that images were converted to the model's size and channels, as its training data was."""


class Conversion:
    """The conversion of a set of images to the model's form. It warns once, of the first image that it changes."""

    def __init__(self, form: Form) -> None:
        self.form, self.warned = form, False

    def warn_of(self, image: Image.Image) -> None:
        """Warn, if it is the first such image, that an image has another size or other channels than the model."""
        self.warn((image.height, image.width), 3 if image.mode == "P" else len(image.getbands()))

    def warn(self, size: tuple[int, int], channels: int) -> None:
        """The same for images of such a height, width and number of channels."""
        (height, width), side = size, self.form.image_size
        if self.warned or (height, width, channels) == (side, side, self.form.channels):
            return
        self.warned = True
        _warn(
            f"images of {width}x{height} px and {channels} channel(s) become {side}x{side} px and "
            f"{self.form.channels}, as the model's training data",
            ConvertedImages,
        )


class PassedOver(UserWarning):
    """Warns that files of a folder were passed over, since their type cannot be read."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A user's images, read row by row when they are needed, in the form that a model takes."""

    count: int
    read: Callable[[list[int]], Pixels]  # rows -> (n, S, S, C) of 0..255
    own_labels: Callable[[], Sequence] | None = None  # of a folder or Dataset; raises `UserError` if it has none
    labels: Sequence[str | None] | None = None  # of a folder that has subfolders
    files: tuple[Path, ...] = ()  # of a folder
    skipped: tuple[Path, ...] = ()  # files that cannot be read
    passed_over: tuple[Path, ...] = ()  # files of a folder whose type cannot be read

    def chunks(self, at_a_time: int) -> Iterator[Tensor]:
        """All images, in order, (n, S, S, C) of 0..255."""
        for first in range(0, self.count, at_a_time):
            yield torch.as_tensor(self.read(list(range(first, min(first + at_a_time, self.count)))))


def images_at_a_time(image_size: int) -> int:
    """How many images of this size go through a network at once, so that its maps take at most a few hundred MB."""
    return min(AT_A_TIME, max(1, AT_A_TIME * 32**2 // image_size**2))


def image_set(images: Images | ImageSet, form: Form) -> ImageSet:
    """Open a user's images as an `ImageSet`. They are converted to the model's size and channels, as its training data.

    `images` may be:

    - an array or tensor: uint8 or uint16 (N, H, W, C) or (N, H, W), or floats (N, C, H, W) in 0..1 (the axis of
      channels may be in the other place, if it is clear which one it is);
    - a list of PIL images or arrays of any sizes;
    - a Dataset of images or of (image, label), torch's or Hugging Face's, or a DataLoader of one;
    - a folder.

    Raises:
        UserError: for anything else, for floats outside 0..1, and if there are no images.
    """
    if isinstance(images, ImageSet):
        return images
    if isinstance(images, str | Path):
        return open_folder(Path(images), form)
    if is_dataset(images):
        rows, to = rows_of(images), Conversion(form)

        def read(wanted: list[int]) -> Tensor:
            return torch.stack([_one(rows.image(row), row, to) for row in wanted])

        return ImageSet(rows.count, read, own_labels=rows.labels)
    if isinstance(images, Sequence) and not isinstance(images, bytes | bytearray):
        return _of_list(images, Conversion(form))
    return _of_array(images, Conversion(form))


def labelled_set(
    images: Images | ImageSet, labels: Sequence | Pixels | None, form: Form
) -> tuple[ImageSet, Tensor, tuple[Label, ...]]:
    """Open labelled images: the `ImageSet`, the labels (N,) in 0..k-1, and the k classes.

    A folder (with a subfolder of images for each class) and a Dataset of (image, label) have their own labels. For
    other images, `labels` must be given.

    Raises `UserError`:

    - as `image_set` and `encode_labels` do;
    - if `labels` are passed for a folder or a Dataset;
    - for a folder whose subfolders are not classes.
    """
    own = image_set(images, form)
    if own.own_labels and labels is not None:
        raise UserError("labels: a folder or Dataset has its own labels; do not pass any")
    return own, *encode_labels(own.own_labels() if own.own_labels else labels, own.count)


def noting(images: ImageSet, seen: dict[int, str]) -> ImageSet:
    """The same images. The checksum of each image that is read is noted in `seen`, under its row."""

    def read(rows: list[int]) -> Pixels:
        pixels = images.read(rows)
        seen.update(zip(rows, checksums(pixels), strict=True))
        return pixels

    return dataclasses.replace(images, read=read)


def checksums(pixels: Pixels) -> list[str]:
    """A short checksum of each image (n, S, S, C) of 0..255, by which to tell whether an image was seen before."""
    plain = torch.as_tensor(pixels)
    whole = plain.round().to(torch.uint8) if plain.is_floating_point() else plain
    return [f"{zlib.crc32(image):08x}" for image in np.ascontiguousarray(whole.cpu().numpy())]


# Arrays and tensors


def _of_array(images: Pixels, to: Conversion) -> ImageSet:
    if not isinstance(images, np.ndarray | Tensor):
        if isinstance(images, Mapping) and images and all(is_dataset(part) for part in images.values()):
            first = next(iter(images))
            raise UserError(f"images: these are the parts of a dataset ({', '.join(images)}); give one, [{first!r}]")
        raise UserError(f"images: must be an array, a list of images, a Dataset or a folder, got {_kind(images)}")
    if isinstance(images, Tensor) and images.dtype == torch.uint16:
        images = images.cpu().numpy()  # torch cannot index rows of this type
    _check_array(images, to.form)
    to.warn(*_image_shape(images))
    return ImageSet(len(images), lambda rows: _pixels(images[rows], to.form))


def _warn(message: str, kind: type[UserWarning]) -> None:
    """Warn, and name the line of the user's code."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("pudnet", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, kind, stacklevel=level)


def _check_array(images: Pixels, form: Form) -> None:
    """Raise `UserError` if an array does not hold images. Floats are checked in parts, to save memory.

    To a model of grey images, floats (3, H, W) are three of them, to another they look like one in colour.
    """
    if not _is_float(images) and _integers(images) not in ("uint8", "uint16"):
        raise UserError(f"images: must be uint8 or uint16 (N, H, W, C), or float (N, C, H, W), got {images.dtype}")
    several = _is_float(images) and form.channels == 1
    if images.ndim == 3 and not several and images.shape[0 if _is_float(images) else 2] in (3, 4):
        raise UserError(f"images: shape {tuple(images.shape)} looks like one image; give (N, ...), as `image[None]`")
    if _channel_axis(images) is None or 0 in images.shape:
        raise UserError(
            f"images: must be uint8 or uint16 (N, H, W, C), or float (N, C, H, W), with 1 to 4 channels, "
            f"got shape {tuple(images.shape)}"
        )
    for first in range(0, len(images) if _is_float(images) else 0, AT_A_TIME):
        part = images[first : first + AT_A_TIME]
        if not bool(((part >= -ROUNDING) & (part <= 1 + ROUNDING)).all()):
            raise UserError("images: floats must lie in 0..1, these hold other values (or NaN)")


def _integers(images: Pixels) -> str:
    """The name of an array's dtype, whatever its byte order."""
    return str(images.dtype).removeprefix("torch.") if isinstance(images, Tensor) else images.dtype.name


def _is_float(images: Pixels) -> bool:
    return images.is_floating_point() if isinstance(images, Tensor) else images.dtype.kind == "f"


def _channel_axis(images: Pixels) -> int | None:
    """The axis of (N, ...) that holds the channels; 3 for grey images, which have none; None if it is not clear."""
    if images.ndim == 3:
        return 3
    if images.ndim != 4:
        return None
    usual, other = (1, 3) if _is_float(images) else (3, 1)
    return next((axis for axis in (usual, other) if images.shape[axis] in CHANNELS), None)


def _image_shape(images: Pixels) -> tuple[tuple[int, int], int]:
    """Height and width of the images of an array, and their channels."""
    axis = _channel_axis(images)
    if images.ndim == 3:
        return tuple(images.shape[1:]), 1
    return tuple(n for a, n in enumerate(images.shape) if a not in (0, axis)), images.shape[axis]


def _pixels(images: Pixels, form: Form) -> Tensor:
    """Convert an array of images, checked by `_check_array`, to (n, S, S, C) of 0..255."""
    axis = _channel_axis(images)
    if isinstance(images, np.ndarray):  # of any byte order, read-only or not
        narrowed = eight_bits(images) if _integers(images) == "uint16" else images
        images = torch.from_numpy(narrowed.astype(np.float32 if _is_float(narrowed) else np.uint8))
    pixels = images.unsqueeze(3) if images.ndim == 3 else images.movedim(axis, 3)
    if pixels.is_floating_point():
        pixels = pixels.float().clamp(0, 1) * 255
    if tuple(pixels.shape[1:]) == (form.image_size, form.image_size, form.channels):
        return pixels
    rounded = pixels.round().to(torch.uint8).cpu().numpy()
    return torch.from_numpy(convert(rounded, form.image_size, form.channels))


# Lists


def _of_list(images: Sequence, to: Conversion) -> ImageSet:
    if not images:
        raise UserError("images: there are none")
    return ImageSet(len(images), lambda rows: torch.stack([_one(images[row], row, to) for row in rows]))


def _one(image: Pixels | Image.Image, row: int, to: Conversion) -> Tensor:
    """Convert one image, (H, W, C), (H, W), float (C, H, W) or a PIL image, to (S, S, C) of 0..255."""
    try:
        if isinstance(image, Image.Image):
            to.warn_of(image)
            return torch.from_numpy(to_array(image, to.form.image_size, to.form.channels))
        if not isinstance(image, np.ndarray | Tensor):
            raise UserError(f"images: must be PIL images, arrays or tensors, got {_kind(image)}")
        one = _of_array(image[None], to)
        return torch.as_tensor(one.read([0]))[0].cpu()  # others in the list may be on the CPU
    except (UserError, ValueError) as error:
        raise UserError(f"image {row}: {str(error).removeprefix('images: ')}") from None
    except (OSError, SyntaxError) as error:  # Pillow reads an image when it is first used
        raise UserError(f"image {row}: {one_line(error)}") from None


# Folders


def open_folder(folder: Path, form: Form, skip_bad: bool = False) -> ImageSet:
    """Open all images of a folder, except hidden ones. Their labels are the names of its subfolders, if it has any.

    An image beside the subfolders has no label (None). With `skip_bad`, every file is read once, and files that are no
    images are left out and listed in `skipped`.

    Raises:
        UserError: if a folder or subfolder has no images, or a file that is needed cannot be read; with `skip_bad`, if
            no file of a class can be read.
    """
    found = look_in(folder)
    bad = unreadable(found.files) if skip_bad else set()
    found = found.without(bad)
    files = found.files
    with contextlib.suppress(Exception), Image.open(files[0]) as first:  # a damaged file is reported when it is needed
        Conversion(form).warn_of(first)
    if found.passed_over:
        _warn(f"files passed over, since their type is not read: {by_type(found.passed_over)}, in {folder}", PassedOver)

    def read(rows: list[int]) -> np.ndarray:
        return read_images([files[row] for row in rows], form.image_size, form.channels)

    labels = found.labels if found.classes else None
    return ImageSet(
        len(files), read, found.class_names, labels, tuple(files), tuple(sorted(bad)), tuple(found.passed_over)
    )


# Labels


def encode_labels(labels: Sequence | Pixels | None, images: int) -> tuple[Tensor, tuple[Label, ...]]:
    """Encode labels of any type: (N,) in 0..k-1, and the k classes, sorted.

    Values other than numbers and strings are converted by `str`. Raises `UserError` if there are fewer than two
    classes, or not exactly one label for each image.
    """
    if labels is None:
        raise UserError("labels: give one label for each image")
    values = plain_labels(labels)
    if len(values) != images:
        raise UserError(f"labels: {images} images need as many labels, got {len(values)}")
    lacking = next((row for row, value in enumerate(values) if is_missing(value)), None)
    if lacking is not None:
        raise UserError(f"labels: image {lacking} has none ({values[lacking]})")
    keys = [(type(value), value) for value in values]  # so that 1 and True are different labels
    distinct = _sorted_distinct(keys)
    names = tuple(value if isinstance(value, Label) else str(value) for _, value in distinct)
    if len(names) < 2:
        raise UserError(
            f"labels: need images of at least two classes, got 1 ({names[0]}); in a folder, a subfolder for each"
        )
    if len(set(map(str, names))) < len(names):
        raise UserError("labels: two classes have the same name; use strings or integers")
    column = {key: position for position, key in enumerate(distinct)}
    return torch.tensor([column[key] for key in keys]), names


def plain_labels(labels: Sequence | Pixels) -> list:
    """Labels as a list of plain Python values. Missing labels (`is_missing`) stay missing.

    Raises `UserError` if there is not one label for each image.
    """
    if isinstance(labels, np.ndarray | Tensor):
        if labels.ndim != 1:
            raise UserError(f"labels: give one label for each image, got shape {tuple(labels.shape)}")
        labels = labels if isinstance(labels, np.ndarray) and labels.dtype.kind in "mM" else labels.tolist()
    if hasattr(labels, "columns"):
        raise UserError(
            f"labels: give one label for each image, got {_kind(labels)}; give one of its columns, as df['label']"
        )
    if isinstance(labels, set | frozenset):
        raise UserError(f"labels: give one label for each image, in the images' order; {_kind(labels)} has no order")
    if isinstance(labels, str | bytes | Mapping) or not hasattr(labels, "__iter__"):
        raise UserError(f"labels: give one label for each image, got {_kind(labels)}")
    return [_plain_label(label) for label in labels]


def _plain_label(label: Any) -> Any:
    if isinstance(label, np.datetime64 | np.timedelta64):
        return None if np.isnat(label) else str(label)
    if isinstance(label, np.generic | np.ndarray | Tensor):
        return label.tolist()  # of a vector, a list, which is refused
    if hasattr(label, "as_py"):  # a pyarrow scalar
        return label.as_py()
    return label.decode(errors="replace") if isinstance(label, bytes) else label


def is_missing(value: Any) -> bool:
    """Whether a label is missing: None, NaN, NaT or pandas' NA."""
    try:
        return value is None or bool(value != value)  # NaN and NaT are not equal to themselves
    except (TypeError, ValueError):  # pandas' NA cannot be compared; an array gives several values
        return type(value).__name__ == "NAType"


def _sorted_distinct(keys: list[tuple[type, Any]]) -> list[tuple[type, Any]]:
    try:
        distinct = set(keys)
    except TypeError:
        raise UserError(
            "labels: give one label for each image, an integer or a string; these are collections"
        ) from None
    try:
        return sorted(distinct, key=lambda key: (key[1], key[0].__name__))
    except TypeError:  # labels of several types cannot be sorted
        return sorted(distinct, key=lambda key: (key[0].__name__, str(key[1])))


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"
