"""A column's workspace: a folder of `.pud/` with its data and groups, which studies that need the same share."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from pipeline.digests import digest
from pipeline.groups import groups as make_groups
from pipeline.params import Params
from pipeline.prepare import prepare
from pipeline.project import GROUPS, PREPARED, locked, root
from pipeline.runs.keys import CODE, code_files
from pudnet.data.folders import look_in

# What the stages `prepare` and `groups` run, whose results a study keeps for itself.
PREPARE_CODE = tuple(f"data/{n}" for n in ("datasets", "decode", "folders", "sources", "store", "user_images"))
GROUPS_CODE = ("data/groups", "data/looks")


def get_data(params: Params) -> None:
    """Prepare the data of a column, unless it is there already. Raises `UserError` if its source is missing."""
    folder = _data_folder(params)
    with _one_at_a_time(folder), contextlib.chdir(root()):  # where the source's path begins
        if not (folder / PREPARED).is_dir():
            prepare(params, folder)


@contextlib.contextmanager
def workspace(params: Params) -> Iterator[None]:
    """Make a folder with the data and groups of a column, and make it the working directory inside the block."""
    data = _data_folder(params)
    folder = data / digest([asdict(params.groups), params.split_seeds], stage_code("groups", GROUPS_CODE))
    with _one_at_a_time(folder):
        _link(folder / PREPARED, data / PREPARED)
        with _working_in(folder):
            if not GROUPS.is_dir():
                make_groups(params)
    with _working_in(folder):
        yield


def _one_at_a_time(folder: Path) -> contextlib.AbstractContextManager[None]:
    """A lock, since another study may be making the same folder."""
    return locked(folder.with_suffix(".lock"), wait=True)


def _data_folder(params: Params) -> Path:
    sources = filter(None, (*params.prepare.source, params.prepare.test_source))
    with contextlib.chdir(root()):
        there = [files_of(*source.split(":", 1)) for source in sources]
    code = stage_code("prepare", PREPARE_CODE)
    return root() / ".pud" / "studies" / digest([asdict(params.prepare), there], code)


def stage_code(stage: str, names: Sequence[str]) -> list[Path]:
    """The file of a stage, and those of `pudnet/` that it runs."""
    return [CODE / "pipeline" / f"{stage}.py", *code_files(names)]


def files_of(kind: str, place: str = "") -> list[tuple[str, int, int]]:
    """The size and time of each file of a source, to notice changed images. (torchvision's sets do not change.)

    What the code of a source `python:MODULE:NAME` reads is not known.
    """
    if kind not in ("folder", "npz"):
        return []
    try:
        path = Path(place).expanduser()
    except RuntimeError:  # there is no such user, which `prepare` says
        return []
    files = look_in(path).files if path.is_dir() else [path]
    found = [(str(file.relative_to(path)), file.stat()) for file in files if file.is_file()]
    return [(name, status.st_size, status.st_mtime_ns) for name, status in found]


def _link(path: Path, prepared: Path) -> None:
    """Make a relative link to prepared data, since the project may be moved."""
    path.parent.mkdir(parents=True, exist_ok=True)
    to = Path(os.path.relpath(prepared, path.parent))
    if not path.is_symlink() or path.readlink() != to:
        path.unlink(missing_ok=True)
        path.symlink_to(to)


@contextlib.contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    """Work in a folder; `root` still gives the project's own folder."""
    before, project = os.environ.get("DVC_ROOT"), root()
    os.environ["DVC_ROOT"] = str(project)
    try:
        with contextlib.chdir(folder):
            yield
    finally:
        if before is None:
            del os.environ["DVC_ROOT"]
