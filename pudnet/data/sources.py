"""Opens labelled images from scikit-learn, torchvision, folders, .npz files and Datasets, each as a `Source`."""

import contextlib
import gzip
import importlib
import io
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from pudnet.data.datasets import is_dataset
from pudnet.data.decode import convert, read_images
from pudnet.data.folders import look_in
from pudnet.data.user_images import labelled_set
from pudnet.errors import UserError, one_line, words

BATCH = 256
DIGITS = "sklearn:digits"
# The official numbers of training and test images of each torchvision set that can be used.
TORCHVISION_COUNTS = {
    "FashionMNIST": (60_000, 10_000),
    "MNIST": (60_000, 10_000),
    "KMNIST": (60_000, 10_000),
    "CIFAR10": (50_000, 10_000),
    "CIFAR100": (50_000, 10_000),
}


@dataclass(frozen=True, eq=False)
class Source:
    """Labelled images that are read in order, a batch at a time, already at their final size.

    `labels` (N,) int64 are indices into `class_names`. `batches()` starts a new pass over the images, and yields uint8
    arrays (B, image_size, image_size, channels) in the order of `labels`. A source of several sets has the classes of
    one set after the other; `sets` then has the number of classes of each, by its name.
    """

    name: str
    class_names: tuple[str, ...]
    labels: np.ndarray
    batches: Callable[[], Iterator[np.ndarray]]
    passed_over: tuple[Path, ...] = ()  # files of a folder whose type cannot be read
    sets: Mapping[str, int] = field(default_factory=dict)


def open_sources(specs: Sequence[str], raw: Path, image_size: int, channels: int) -> Source:
    """Open one or several sources as one. Of several, class names begin with the name of their set."""
    parts = [open_source(spec, raw, image_size, channels) for spec in specs]
    if len(parts) == 1:
        return parts[0]
    sets = {set_name(spec): len(part.class_names) for spec, part in zip(specs, parts, strict=True)}
    if len(sets) < len(parts):
        raise UserError(
            f"sources {', '.join(specs)}: two have the same name, {', '.join(map(set_name, specs))}; rename"
        )
    firsts = np.cumsum([0, *sets.values()])  # each set's first class
    return Source(
        name=" + ".join(part.name for part in parts),
        class_names=tuple(f"{name} {own}" for name, part in zip(sets, parts, strict=True) for own in part.class_names),
        labels=np.concatenate([first + part.labels for first, part in zip(firsts, parts, strict=False)]),
        batches=lambda: chain.from_iterable(part.batches() for part in parts),
        passed_over=tuple(file for part in parts for file in part.passed_over),
        sets=sets,
    )


def set_name(spec: str) -> str:
    """What to call the set of a source: `CIFAR100` for `torchvision:CIFAR100` or `npz:data/raw/CIFAR100.npz`."""
    return Path(spec.partition(":")[2]).stem or spec


def open_source(spec: str, raw: Path, image_size: int, channels: int) -> Source:
    """Open `sklearn:digits`, `torchvision:NAME`, `folder:PATH`, `npz:PATH` or `python:MODULE:NAME`.

    `python:` names your own Dataset (torch's or Hugging Face's) or DataLoader, or a function that returns one.
    torchvision downloads to the folder `raw`. A relative PATH starts at the current directory. `channels` is 1 (grey)
    or 3 (RGB). Raises `UserError` for an unknown spec, and for files that are missing or damaged.
    """
    check_source(spec)
    kind, _, rest = spec.partition(":")
    try:
        if kind == "torchvision":
            return _open_torchvision(rest, raw, image_size, channels)
        if kind == "folder":
            return _open_folder(Path(rest).expanduser(), image_size, channels)
        if kind == "npz":
            return _open_npz(Path(rest).expanduser(), image_size, channels)
        if kind == "python":
            return _open_python(rest, image_size, channels)
        return _open_digits(image_size, channels)
    except (OSError, RuntimeError) as error:  # no permission, an impossible file name, ~user of an unknown user
        raise UserError(f"source '{spec}' cannot be read ({error})") from error


def check_source(spec: str) -> None:
    """Raise `UserError` unless `spec` is of a form that `open_source` takes."""
    kind, _, rest = spec.partition(":")
    if kind == "torchvision" and rest not in TORCHVISION_COUNTS:
        raise UserError(f"torchvision:{rest} is not known; use one of {', '.join(TORCHVISION_COUNTS)}")
    path, code = kind in ("folder", "npz") and rest, kind == "python" and ":" in rest
    if not (spec == DIGITS or kind == "torchvision" or path or code):
        known = f"{DIGITS}, torchvision:NAME, folder:PATH, npz:PATH or python:MODULE:NAME"
        raise UserError(f"source '{spec}' is not known; use {known}")


def _array_source(
    name: str,
    images: np.ndarray,
    labels: np.ndarray,
    class_names: tuple[str, ...],
    image_size: int,
    channels: int,
) -> Source:
    """Make a source of uint8 images (N, H, W) or (N, H, W, C) that are in memory."""

    def batches() -> Iterator[np.ndarray]:
        for start in range(0, len(images), BATCH):
            yield convert(images[start : start + BATCH], image_size, channels)

    return Source(name, class_names, labels.astype(np.int64), batches)


# scikit-learn


def _open_digits(image_size: int, channels: int) -> Source:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels. Their values 0..16 are scaled to 0..255."""
    from sklearn.datasets import load_digits  # here: slow to import, and needed for this source alone

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    names = tuple(str(digit) for digit in range(10))
    return _array_source(DIGITS, images, digits.target, names, image_size, channels)


# torchvision


def _open_torchvision(name: str, raw: Path, image_size: int, channels: int) -> Source:
    """All official images of a torchvision set, training images first. Downloads what is missing in `raw`."""
    from torchvision import datasets  # here: slow to import, and needed for this source alone

    dataset_class = getattr(datasets, name)
    if hasattr(dataset_class, "resources"):
        _check_idx_files(raw / name / "raw", TORCHVISION_COUNTS[name])
    try:
        with _quiet_unless_tty():
            parts = [dataset_class(root=raw, train=train, download=True) for train in (True, False)]
    except Exception as error:  # network, file system, or torchvision's own checks: it raises many types
        raise UserError(_how_to_get(dataset_class, raw, error)) from error
    images = np.concatenate([np.asarray(part.data) for part in parts])
    labels = np.concatenate([np.asarray(part.targets) for part in parts])
    counts, names = tuple(len(part.data) for part in parts), tuple(parts[0].classes)
    if counts != TORCHVISION_COUNTS[name] or labels.min() < 0 or labels.max() >= len(names):
        raise UserError(f"the files of {name} in {raw} are damaged; delete them and run again")
    return _array_source(f"torchvision:{name}", images, labels, names, image_size, channels)


def _quiet_unless_tty() -> contextlib.AbstractContextManager:
    """Hide torchvision's progress bars outside a terminal: they would fill a log with thousands of lines."""
    if sys.stderr.isatty():
        return contextlib.nullcontext()
    return contextlib.redirect_stderr(io.StringIO())


def _check_idx_files(folder: Path, counts: tuple[int, int]) -> None:
    """Raise `UserError` if an unpacked IDX file is damaged, since torchvision only checks the .gz file."""
    for part, count in zip(("train", "t10k"), counts, strict=True):
        image_header = struct.pack(">4I", 0x803, count, 28, 28)
        label_header = struct.pack(">2I", 0x801, count)
        _check_idx(folder / f"{part}-images-idx3-ubyte", image_header, count * 28 * 28, highest=255)
        _check_idx(folder / f"{part}-labels-idx1-ubyte", label_header, count, highest=9)


def _check_idx(path: Path, header: bytes, body: int, highest: int) -> None:
    """Check an unpacked IDX file, if there is one: its header, size and values, and whether it equals its .gz."""
    if not path.exists():
        return
    content = path.read_bytes()
    values = np.frombuffer(content, np.uint8)[len(header) :]
    if not content.startswith(header) or len(values) != body or values.max() > highest:
        raise UserError(f"{path} is damaged (wrong header, size or values); delete it and run again")
    archive = path.with_name(path.name + ".gz")
    if not archive.exists():
        return
    try:
        same = gzip.decompress(archive.read_bytes()) == content
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{archive} is damaged ({error}); delete it and run again") from error
    if not same:
        raise UserError(f"{path} differs from what its .gz holds; delete it and run again")


def _how_to_get(dataset_class: type, raw: Path, error: Exception) -> str:
    """Say in one line what could not be downloaded, which files to put where, and what else can be done."""
    from torchvision.datasets.utils import check_integrity

    name = dataset_class.__name__
    if hasattr(dataset_class, "resources"):
        folder, files = raw / name / "raw", dataset_class.resources
    else:
        folder, files = raw, [(dataset_class.filename, dataset_class.tgz_md5)]
    lacking = [file for file, checksum in files if not check_integrity(folder / file, checksum)]
    damaged = [str(folder / file) for file in lacking if (folder / file).exists()]
    reason = f"{' and '.join(damaged)} failed the checksum, and " if damaged else ""
    cause = words(error, 200)
    return (
        f"{reason}torchvision:{name} could not be downloaded ({cause}); put "
        f"{', '.join(lacking) or 'its files'} into {folder}/, or use your own images "
        "with folder:PATH or npz:PATH"
    )


# Folders of images


def _open_folder(folder: Path, image_size: int, channels: int) -> Source:
    """A folder with one subfolder for each class, sorted by name. Images may be at any depth."""
    found = look_in(folder)
    files, names = found.files, found.class_names()
    position = {name: label for label, name in enumerate(dict.fromkeys(names))}
    labels = np.array([position[name] for name in names], np.int64)

    def batches() -> Iterator[np.ndarray]:
        for start in range(0, len(files), BATCH):
            yield read_images(files[start : start + BATCH], image_size, channels)

    return Source(f"folder:{folder}", tuple(position), labels, batches, tuple(found.passed_over))


# Datasets of the user's own


def _open_python(path: str, image_size: int, channels: int) -> Source:
    """The user's own Dataset or DataLoader at `package.module:name`, or what a function of that name returns."""
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
        found = found if is_dataset(found) else found()
    except (Exception, SystemExit) as error:  # whatever the user's own code may raise
        raise UserError(f"source 'python:{path}' gives no Dataset ({one_line(error)})") from None
    if not is_dataset(found):
        raise UserError(f"source 'python:{path}' gives a {type(found).__name__}; it has to be a Dataset or DataLoader")
    images, labels, names = labelled_set(found, None, _Form(image_size, channels))

    def batches() -> Iterator[np.ndarray]:
        for pixels in images.chunks(BATCH):
            yield pixels.round().to(torch.uint8).numpy() if pixels.is_floating_point() else pixels.numpy()

    return Source(f"python:{path}", tuple(map(str, names)), labels.numpy(), batches)


@dataclass(frozen=True)
class _Form:
    image_size: int
    channels: int


# .npz files


def _open_npz(path: Path, image_size: int, channels: int) -> Source:
    """An .npz file with `images`, uint8 (N, H, W) or (N, H, W, C), `labels` (N,), and perhaps `class_names`."""
    arrays = _read_npz(path)
    for key in ("images", "labels"):
        if key not in arrays:
            raise UserError(f"{path} has no array '{key}'; it needs 'images' and 'labels'")
    images, labels = arrays["images"], arrays["labels"]
    shape_fits = images.ndim == 3 or (images.ndim == 4 and images.shape[-1] in (1, 3))
    if images.dtype != np.uint8 or not shape_fits or images.size == 0:
        raise UserError(
            f"{path}: 'images' is {images.dtype} {images.shape}; it must be uint8 (N, H, W) or (N, H, W, C) "
            "with C 1 or 3"
        )
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise UserError(f"{path}: 'labels' is {labels.dtype} {labels.shape}; it must be {len(images)} integers")
    names = _npz_class_names(path, labels, arrays.get("class_names"))
    return _array_source(f"npz:{path}", images, labels, names, image_size, channels)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    """Read all arrays of the file, and unpickle nothing. Raises `UserError` if it is missing, damaged or no .npz."""
    if not path.is_file():
        raise UserError(f"npz:{path} does not exist; give the path of an .npz file")
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = {key: archive[key] for key in archive.files}
    except Exception as error:  # zipfile, zlib and numpy raise many types for a damaged file
        raise UserError(f"{path} cannot be read as an .npz of plain arrays ({error}); write it again") from error
    return {
        key: value for key, value in found.items() if isinstance(value, np.ndarray)
    }  # numpy gives files that are no arrays as bytes


def _npz_class_names(path: Path, labels: np.ndarray, names: np.ndarray | None) -> tuple[str, ...]:
    """The class names; "0", "1", ... if there are none. Raises `UserError` if labels and names do not fit."""
    present = np.unique(labels).tolist()
    if names is None:
        names = np.array([str(label) for label in range(len(present))])
    try:
        distinct = names.ndim == 1 and names.dtype.kind == "U" and len(set(names.tolist())) == len(names)
    except SystemError:  # numpy raises it for invalid code points
        distinct = False
    if not distinct:
        raise UserError(f"{path}: 'class_names' must be a one-dimensional array of distinct strings")
    if present != list(range(len(names))):
        raise UserError(
            f"{path}: 'labels' must use every class from 0 to {len(names) - 1}; found {len(present)} labels "
            f"from {present[0]} to {present[-1]}"
        )
    return tuple(names.tolist())
