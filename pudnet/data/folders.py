"""Finds the image files of a folder that has one subfolder for each class."""

from __future__ import annotations

import contextlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from PIL import Image

from pudnet.errors import UserError, not_its_fault

HEIC = {".heic", ".heics", ".heif", ".heifs", ".hif"}
LET_HEIC_BE_READ = "`pip install 'pillow-heif==1.8.1'` lets HEIC be read"
NEVER_READ = {"MPEG", "HDF5", "BUFR", "GRIB", "WMF"}  # formats that Pillow knows, but does not decode on Linux
PART = re.compile(  # usual names of the parts of a dataset
    r"(train|training|val|valid|validation|dev|test|testing|eval|evaluation|holdout|fold|split)"
    r"([ _-]?(set|split|data|images))?[ _-]?\d*",
    re.IGNORECASE,
)

Identity = tuple[int, int]


@dataclass(frozen=True)
class Found:
    """The files of a folder, without hidden ones."""

    folder: Path
    classes: dict[Path, list[Path]]  # subfolder -> all images below it; both sorted
    loose: list[Path]  # images beside the subfolders
    passed_over: list[Path]  # files of a type that cannot be read
    shared: str = ""  # a message if two subfolders share a folder (by links); else empty

    @property
    def files(self) -> list[Path]:
        return [file for files in (*self.classes.values(), self.loose) for file in files]

    @property
    def labels(self) -> list[str | None]:
        """The name of each file's subfolder, in the order of `files`; None for files beside the subfolders."""
        return [class_name(child) for child, files in self.classes.items() for _ in files] + [None] * len(self.loose)

    def without(self, bad: set[Path]) -> Found:
        """The same folder without some files. Raises `UserError` if a class loses all of its files."""
        classes = {child: [file for file in files if file not in bad] for child, files in self.classes.items()}
        left = replace(self, classes=classes, loose=[file for file in self.loose if file not in bad])
        for lost in [child.name for child, files in classes.items() if not files] or ["it"] * (not left.files):
            raise UserError(f"{self.folder}: none of the images of {lost} can be read")
        return left

    def class_names(self) -> list[str]:
        """The class of each of `files`. Raises `UserError` if the subfolders cannot be classes."""
        if not self.classes:
            raise UserError(f"{self.folder}: has no subfolders; it needs one subfolder of images for each class")
        _refuse_parts(self.folder, self.classes)
        if self.loose:
            raise UserError(f"{self.loose[0]}: lies beside the subfolders, so it has no class; move or remove it")
        names = Counter(map(class_name, self.classes))
        if twice := next((name for name, count in names.items() if count > 1), None):
            raise UserError(f"{self.folder}: two subfolders are called {twice}, in two Unicode forms; make them one")
        if self.shared:
            raise UserError(f"{self.folder}: {self.shared}; give each image one class")
        return self.labels


def class_name(folder: Path) -> str:
    """A folder's name, in the one Unicode form (`one_form`) that is used here."""
    return one_form(folder.name)


def one_form(name: object) -> str:
    """A class's name in Unicode's form NFC: folders that come from a Mac have another."""
    return unicodedata.normalize("NFC", str(name))


def look_in(folder: Path) -> Found:
    """Find the images of a folder. Links are followed, unless they lead to a folder above.

    Raises `UserError` if there is no such folder or no permission to read it, if the folder or one of its subfolders
    has no images, and for a broken link. (A broken link with the suffix of an image counts as an unreadable image.)
    """
    try:
        return _look_in(folder)
    except OSError as error:
        where = Path(error.filename or folder)
        raise not_its_fault(where, error) or UserError(f"{where}: cannot be read ({error.strerror})") from None


def _look_in(folder: Path) -> Found:
    if not folder.is_dir():
        raise UserError(f"{folder}: {'is a file, not a folder' if folder.exists() else 'no such folder'}")
    starts = (folder.absolute(), folder.resolve())
    walk = _Walk({_identity(above) for start in starts for above in (start, *start.parents)})
    children = _children(folder)
    subfolders = sorted((child for child in children if child.is_dir()), key=class_name)
    found = {child: _by_kind(walk.below(child)) for child in subfolders}
    loose, passed_over = _by_kind(child for child in children if _is_file(child))
    for child, (images, others) in found.items():
        if not images and _identity(child) in walk.above:
            raise UserError(f"{child}: is a link that leads back up, to {child.resolve()}; remove it")
        if not images:
            raise UserError(f"{_no_images(child, others)}; add some or remove the folder")
    passed_over = [file for _, others in found.values() for file in others] + passed_over
    if not found and not loose:
        raise UserError(f"{_no_images(folder, passed_over)}; add some")
    classes = {child: images for child, (images, _) in found.items()}
    return Found(folder, classes, loose, passed_over, next(iter(walk.shared), ""))


@dataclass
class _Walk:
    """Lists the files below one subfolder after the other, also through links.

    For one subfolder it enters each folder at most once. It never enters `above`: the whole folder and its parents.
    """

    above: set[Identity]
    # folder -> the subfolder from which it was first reached, and its path there
    entered: dict[Identity, tuple[Path, Path]] = field(default_factory=dict)
    shared: list[str] = field(default_factory=list)

    def below(self, child: Path) -> list[Path]:
        return sorted(self._files(child, child, set(self.above)))

    def _files(self, folder: Path, child: Path, entered: set[Identity]) -> Iterator[Path]:
        if (identity := _identity(folder)) in entered:
            return
        entered.add(identity)
        other, first = self.entered.setdefault(identity, (child, folder))
        if other != child:
            self.shared.append(f"{folder} is the same folder as {first}")
        for inner in _children(folder):
            if inner.is_dir():
                yield from self._files(inner, child, entered)
            elif _is_file(inner):
                yield inner


def _children(folder: Path) -> list[Path]:
    """The visible files and folders in a folder, links last."""
    children = [child for child in folder.iterdir() if not child.name.startswith(".")]
    return sorted(children, key=lambda path: (path.is_symlink(), path.name))


def _is_file(path: Path) -> bool:
    """Whether this is a file; a broken link counts if it has the name of an image, else it raises `UserError`."""
    if path.is_file() or not path.is_symlink() or path.exists():
        return path.is_file()
    if not _is_image(path):
        raise UserError(f"{path}: is a link to {path.readlink()}, which is not there; repair or remove it")
    return True


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in image_suffixes()


def _by_kind(files: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """Split files into images and files of a type that cannot be read."""
    files = list(files)
    return [file for file in files if _is_image(file)], [file for file in files if not _is_image(file)]


def by_type(files: Sequence[Path]) -> str:
    """Count files by type, as text: `50 .heic, 1 .txt`. If there are HEIC files, says what to install for them."""
    counts = Counter(file.suffix.lower() or "without an ending" for file in files)
    said = ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common())
    return f"{said} ({LET_HEIC_BE_READ})" if HEIC & set(counts) else said


def _no_images(folder: Path, others: Sequence[Path]) -> str:
    """Say that a folder has no images, and what it has."""
    held = f", only files that are not read as such: {by_type(others)}" if others else ""
    return f"folder {folder} has no images{held}"


def _identity(folder: Path) -> Identity:
    status = folder.stat()
    return status.st_dev, status.st_ino


@cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of the files that Pillow can read, with those of HEIC if pillow-heif is installed."""
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    kinds = Image.registered_extensions()  # fills Image.OPEN, too
    return frozenset(suffix for suffix, kind in kinds.items() if kind in Image.OPEN and kind not in NEVER_READ)


# The parts of a dataset


def _refuse_parts(folder: Path, classes: Mapping[Path, Sequence[Path]]) -> None:
    """Raise `UserError` if subfolders look like the parts of a dataset (`train`, `val`) or contain such parts.

    Parts are recognised by their names, or because their own subfolders have the same names (`a/cat`, `b/cat`).
    """
    while len(classes) == 1 and not PART.fullmatch(min(classes).name):  # the dataset may be further down
        ((folder, files),) = classes.items()
        classes = _by_subfolder(folder, files)
    parts = [child for child in classes if PART.fullmatch(child.name)]
    nested = [child for child in parts if _by_subfolder(child, classes[child])]
    if nested and (len(parts) > 1 or len(parts) == len(classes)):
        first = next((child for child in nested if child.name.lower().startswith("train")), nested[0])
        names = ", ".join(child.name for child in parts[:5])
        raise UserError(
            f"{folder}: subfolders called {names} are taken for parts of a dataset, not for classes; give one of "
            f"them, as {first} (or rename them, if they are classes)"
        )
    for child, files in classes.items():
        inner = sorted(part.name for part in _by_subfolder(child, files) if PART.fullmatch(part.name))
        train = next((name for name in inner if name.lower().startswith("train")), None)
        if train and len(inner) > 1:
            raise UserError(
                f"{child}: holds {' and '.join(inner[:5])}, which are taken for parts of a dataset; use one part only "
                f"(a folder with a link {child.name} to {child / train}, and so on), or rename them to use all images"
            )
    _refuse_repeated(folder, classes)


def _refuse_repeated(folder: Path, classes: Mapping[Path, Sequence[Path]]) -> None:
    """Raise `UserError` if all images are in folders inside the subfolders, and two or more names of these repeat.

    Numeric names may repeat: they may be years and months inside a class.
    """
    if any(file.parent == child for child, files in classes.items() for file in files):
        return
    inner = Counter(
        name for child, files in classes.items() for name in {str(file.relative_to(child).parent) for file in files}
    )
    repeated = sorted(name for name, count in inner.items() if count > 1 and re.search("[^\\W\\d_]", name))
    if len(repeated) > 1:
        names, first = ", ".join(child.name for child in list(classes)[:5]), min(classes)
        raise UserError(
            f"{folder}: the subfolders {names} hold no images of their own, but folders of the same names "
            f"({', '.join(repeated[:3])}). If those are the classes, give one subfolder, as {first}; if not, rename "
            "them so that they differ"
        )


def _by_subfolder(folder: Path, files: Sequence[Path]) -> dict[Path, list[Path]]:
    """Sort those files of a folder that are in subfolders by subfolder."""
    below: dict[Path, list[Path]] = {}
    for file in files:
        if file.parent != folder:
            below.setdefault(folder / file.relative_to(folder).parts[0], []).append(file)
    return below
