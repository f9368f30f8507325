"""Which image files lie in a folder that has a subfolder a class."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from PIL import Image

from pudnet.errors import UserError

HEIC = {".heic", ".heif"}
PARTS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"}  # of a data set


def class_folders(folder: Path) -> list[Path]:
    """The subfolders of a folder, links to folders among them, hidden ones left aside, by sorted name.

    Raises `UserError` for a link that looks like a class and leads nowhere.
    """
    children = [child for child in sorted(folder.iterdir()) if not child.name.startswith(".")]
    for child in children:
        if leads_nowhere(child) and not child.suffix:
            raise UserError(f"{child}: is a link to {child.readlink()}, which is not there; repair or remove it")
    return [child for child in children if child.is_dir()]


def leads_nowhere(path: Path) -> bool:
    """Whether it is a link to something that is not there."""
    return path.is_symlink() and not path.exists()


def image_files(folder: Path, above: Path | None = None) -> tuple[list[Path], list[Path]]:
    """Sorted image files at any depth below a folder, and all other files; hidden files and folders are left aside.

    Links are followed. No folder is entered twice, and none from within that is `above` it: a link that leads back
    ends there. A link that leads nowhere counts as a file, which cannot be read.
    """
    files = sorted(_walk(folder, {_identity(above)} if above else set()))
    images = [file for file in files if file.suffix.lower() in image_suffixes()]
    return images, [file for file in files if file.suffix.lower() not in image_suffixes()]


def _walk(folder: Path, entered: set[tuple[int, int]]) -> Iterator[Path]:
    if (identity := _identity(folder)) in entered:
        return
    entered.add(identity)
    for child in sorted(folder.iterdir(), key=lambda path: (path.is_symlink(), path.name)):  # links last
        if child.name.startswith("."):
            continue
        if child.is_dir():
            yield from _walk(child, entered)
        elif child.is_file() or leads_nowhere(child):
            yield child


def by_type(files: Sequence[Path]) -> str:
    """How many files there are of each type: `50 .heic, 1 .txt`."""
    counts = Counter(file.suffix.lower() or "without an ending" for file in files)
    return ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common())


def no_images(folder: Path, others: Sequence[Path]) -> UserError:
    """The error for a folder in which no file is of a type that is read."""
    held = f", only files that are not read as such ({by_type(others)})" if others else ""
    heic = any(file.suffix.lower() in HEIC for file in others)
    remedy = "`pip install pillow-heif` lets HEIC be read" if heic else "add some or remove the folder"
    return UserError(f"folder {folder} has no images{held}; {remedy}")


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


@cache
def image_suffixes() -> frozenset[str]:
    """The endings of the files that Pillow reads, and where pillow-heif is installed, HEIC's."""
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def refuse_parts(folder: Path, classes: Mapping[Path, Sequence[Path]]) -> None:
    """Raise `UserError` where the subfolders of a folder look like parts of a data set (`train`, `val`), not classes.

    `classes` maps each subfolder to its image files. Parts hold no image of their own, and folders of the same names:
    of one name, if they are called as parts usually are, of several, if not.
    """
    while len(classes) == 1:  # the data set may lie further down
        ((folder, files),) = classes.items()
        if any(file.parent == folder for file in files):
            return
        classes = _by_subfolder(folder, files)
    nested = {child: files for child, files in classes.items() if not any(file.parent == child for file in files)}
    usual = {child.name.lower() for child in nested} <= PARTS
    shared = _shared([{file.relative_to(child).parts[0] for file in files} for child, files in nested.items()])
    deepest = _shared([{str(file.relative_to(child).parent) for file in files} for child, files in nested.items()])
    several = len(nested) == len(classes) and max(len(shared), len(deepest)) > 1
    if shared and (usual or several):
        first = next((child for child in nested if child.name.lower().startswith("train")), min(nested))
        names = ", ".join(sorted(child.name for child in nested)[:5])
        raise UserError(
            f"{folder}: {names} look like parts of a data set, not classes (their subfolders have the same names, "
            f"{', '.join(shared[:3])}); give one of them, as {first}"
        )


def _by_subfolder(folder: Path, files: Sequence[Path]) -> dict[Path, list[Path]]:
    below: dict[Path, list[Path]] = {}
    for file in files:
        below.setdefault(folder / file.relative_to(folder).parts[0], []).append(file)
    return below


def _shared(names: Sequence[set[str]]) -> list[str]:
    """The names that stand in more than one set."""
    counts = Counter(name for each in names for name in each)
    return sorted(name for name, count in counts.items() if count > 1)
