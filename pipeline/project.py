"""The project's folder: paths, reading and writing files, locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml

from pudnet.errors import UserError
from pudnet.files import replacing

PREPARED = Path("data/prepared")
STORE = PREPARED / "train"
TEST_STORE = PREPARED / "test"  # inter-dataset settings only
GROUPS = Path("data/groups")
MODELS = Path("models")
PUDNET = MODELS / "pudnet.safetensors"  # the first split's model, for users who want just one
BASELINES = MODELS / "baselines"
RESULTS = Path("results")
WEIGHTS = RESULTS / "weights"  # predicted for some test groups

T = TypeVar("T")


class Busy(UserError):
    """Another process does the same."""


def root() -> Path:
    """The repository that has the state and tracking, even if a stage runs in a workspace of `dvc exp run --queue`."""
    return Path(os.environ.get("DVC_ROOT", ".")).resolve()


def read_result(path: Path, parse: Callable[[Path], T], stage: str) -> T:
    """Read what an earlier stage wrote. `UserError` if it is missing or damaged."""
    if not path.exists():
        raise UserError(f"{path} is missing; `dvc repro {stage}` writes it")
    try:
        return parse(path)
    except (ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError):
        raise UserError(f"{path} is damaged; `dvc repro -f -s {stage}` writes it anew") from None


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold a lock inside the block, so that two processes do not write the same files at once.

    If another process holds it, `wait` until it is free, or raise `Busy`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                where = path.parent.absolute()
                raise UserError(
                    f"{where}: files cannot be locked there ({error.strerror}); use another file system"
                ) from None
            lock.seek(0)
            name, (owner, _, host) = path.name.partition(".")[0], lock.read().strip().partition(" ")
            there = f" on {host}" if host not in ("", socket.gethostname()) else ""
            raise Busy(f"{name}: is already running as process {owner}{there}; wait for it or stop it") from None
        lock.truncate(0)
        print(os.getpid(), socket.gethostname(), file=lock, flush=True)
        yield


def folder_locked(name: str) -> contextlib.AbstractContextManager[None]:
    """Hold the lock of a command that writes results into this folder.

    It is not in `root`, since each workspace of `dvc exp run --queue` has results of its own.
    """
    return locked(Path(".pud") / f"{name}.lock")


OF_A_RUN = [f":(top,exclude,glob)**/{name}" for name in ("params.yaml", "dvc.lock", "results/**")]


def git_commit() -> str:
    """The commit that is checked out, with `-dirty` if files differ from it; empty outside git.

    Not those that a run changes: params.yaml, which `-S` writes, locks and results. The files are all of the checkout,
    since a study works in a folder of its own.
    """
    done = subprocess.run(["git", "rev-parse", "--verify", "-q", "HEAD"], capture_output=True, text=True, check=False)
    same = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", ":/", *OF_A_RUN], capture_output=True, check=False)
    return done.stdout.strip() + "-dirty" * bool(done.stdout and same.returncode)


def committed(path: Path) -> str:
    """What the commit that is checked out has of a file in this folder; empty outside git, or if it lacks the file."""
    done = subprocess.run(["git", "show", f"HEAD:./{path}"], capture_output=True, text=True, check=False)
    return done.stdout


def group_folder(split_seed: int) -> Path:
    """The folder with the group tables of one class split."""
    return GROUPS / f"split-{split_seed}"


def split_model(method: str, split_seed: int) -> Path:
    """The file of a method's final model for one class split."""
    folder = MODELS / "splits" if method == "pudnet" else BASELINES
    return folder / method / f"split-{split_seed}.safetensors"


def write(path: Path, content: str | bytes) -> None:
    """Write a file, all or nothing."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, values: Any) -> None:
    """Write plain values as JSON, with keys in their given order and NaN as null."""
    write(path, json.dumps(_without_nan(values), indent=2, allow_nan=False) + "\n")


def _without_nan(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _without_nan(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_without_nan(value) for value in values]
    return None if isinstance(values, float) and math.isnan(values) else values
