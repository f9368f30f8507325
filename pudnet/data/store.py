"""Writes and opens prepared stores: a source's images as one uint8 array, with labels, statistics and checksums."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np

from pudnet.data.sources import Source
from pudnet.errors import UserError, is_full
from pudnet.files import to_disk

META = "meta.json"  # of a store: what it holds, with the checksum of its images
ONE_GREY_LEVEL = 1 / 255


@dataclass(frozen=True, eq=False)
class Store:
    """A source on disk, memory-mapped and read-only.

    Images are uint8 (N, S, S, C), labels int64 (N,). `mean` and `std` (C) are of pixels in 0..1, over all classes. They
    are the only thing about test classes that training sees. `sets` is as in `Source`.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str
    sets: Mapping[str, int] = field(default_factory=dict)

    @property
    def set_classes(self) -> dict[str, range]:
        """The class ids of each set, by its name; a single set has none."""
        sizes = self.sets or {"": len(self.class_names)}
        ends = accumulate(sizes.values())
        return {name: range(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}

    @property
    def image_size(self) -> int:
        return self.images.shape[1]

    @property
    def channels(self) -> int:
        return self.images.shape[3]


@contextlib.contextmanager
def whole_folder(destination: Path) -> Iterator[Path]:
    """Yield a new folder to write to. It replaces `destination` if the block ends without an error.

    Raises `UserError` if it cannot be written; the old folder is then still there.
    """
    partial, old = (destination.with_name(f".{destination.name}.{name}") for name in ("partial", "old"))
    _clear(destination, partial, old)  # of what a killed process may have left
    try:
        if destination.is_file():
            raise FileExistsError("it is a file")
        partial.mkdir(parents=True)
        yield partial
        for file in filter(Path.is_file, partial.rglob("*")):
            to_disk(file)
        if destination.exists():
            destination.rename(old)
        partial.rename(destination)
    except OSError as error:
        if is_full(error):
            raise
        raise UserError(f"{destination}: cannot be written ({error})") from error
    finally:
        _clear(destination, partial, old)


def _clear(destination: Path, partial: Path, old: Path) -> None:
    """Remove what `whole_folder` leaves, but put the old folder back if no new one has taken its place."""
    if old.exists() and not destination.exists():
        old.rename(destination)
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)


def write_store(source: Source, destination: Path) -> None:
    """Write a source as a store, all or nothing. The same source always gives the same bytes."""
    with whole_folder(destination) as folder:
        counts, shape = _write_images(source, folder / "images.npy")
        np.save(folder / "labels.npy", source.labels.astype(np.int64))
        mean, std = _mean_and_std(counts)
        meta = {
            "source": source.name,
            "class_names": list(source.class_names),
            "image_size": shape[1],
            "channels": shape[3],
            "count": shape[0],
            "mean": mean,
            "std": std,
            "sha256": {name: _sha256(folder / name) for name in ("images.npy", "labels.npy")},
            **({"sets": source.sets} if source.sets else {}),
        }
        (folder / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _write_images(source: Source, path: Path) -> tuple[np.ndarray, tuple[int, ...]]:
    """Write all batches as one .npy file. Returns how often each pixel value occurs, (C, 256), and the array's shape.

    It does not write through a memory map, since a full disk would then kill the process (SIGBUS).
    """
    counts, shape, row = None, (), 0
    with path.open("wb") as file:
        for batch in source.batches():
            if counts is None:
                shape = (len(source.labels), *batch.shape[1:])
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                counts = np.zeros((batch.shape[3], 256), dtype=np.int64)
            file.write(np.ascontiguousarray(batch, dtype=np.uint8).data)
            row += len(batch)
            for channel in range(len(counts)):
                counts[channel] += np.bincount(batch[..., channel].ravel(), minlength=256)
    if counts is None or row != len(source.labels):
        raise ValueError(f"source {source.name} gave {row} images for {len(source.labels)} labels")
    return counts, shape


def _mean_and_std(counts: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation (C) of pixels in 0..1, from how often each value occurs in each channel (C, 256).

    The deviation of a constant channel is set to one grey level, so that it is never zero.
    """
    values = np.arange(256) / 255
    weights = counts / counts.sum(axis=1, keepdims=True)
    mean = weights @ values
    variance = (weights * (values - mean[:, None]) ** 2).sum(axis=1)
    return mean.tolist(), np.maximum(np.sqrt(variance), ONE_GREY_LEVEL).tolist()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_store(path: Path, verify: bool) -> Store:
    """Open a store. With `verify`, all files are read and compared with their checksums.

    Raises `UserError`, which names the file, if the store is missing or damaged.
    """
    if not (path / META).is_file():
        raise UserError(f"{path} is no prepared store; run `dvc repro` to prepare it")
    try:
        meta = json.loads((path / META).read_text(encoding="utf-8"))
        checksums = {name: meta["sha256"][name] for name in ("images.npy", "labels.npy")}
        shape = (meta["count"], meta["image_size"], meta["image_size"], meta["channels"])
        class_names, mean, std = (tuple(meta[key]) for key in ("class_names", "mean", "std"))
        source, sets = meta["source"], dict(meta.get("sets", {}))
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path / META, "cannot be read") from error
    for name, checksum in checksums.items():
        if verify and (not (path / name).is_file() or _sha256(path / name) != checksum):
            raise _damaged(path / name, "does not match its checksum")
    images, labels = (_load(path / name, shape[:axes]) for name, axes in (("images.npy", 4), ("labels.npy", 1)))
    return Store(images, labels, class_names, mean, std, source, sets)


def _load(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Memory-map an array read-only, and check its shape."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path, "is missing or cannot be read") from error
    if array.shape != shape:
        raise _damaged(path, f"has shape {array.shape}, not {shape} as meta.json says")
    return array


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path} {what}; delete {path.parent} and run `dvc repro` again")
