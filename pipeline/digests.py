"""Short hashes: of plain values and files, and of a trained model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from pudnet.card import read_tensors


def digest(plain: Any, files: Iterable[Path]) -> str:
    """A short hash of plain values, and of the names and contents of files.

    The folders of the files do not matter. A missing file counts as an empty one.
    """
    hashes = sorted((path.name, _checksum(path)) for path in set(files))
    return hashlib.sha256(json.dumps([plain, hashes], sort_keys=True).encode()).hexdigest()[:12]


def _checksum(path: Path) -> str:
    if not path.is_file():
        return hashlib.sha256().hexdigest()
    state = path.stat()
    return _read_once(path.resolve(), state.st_size, state.st_mtime_ns)


@cache
def _read_once(path: Path, size: int, changed: int) -> str:
    """A file's checksum. A study asks for those of the same code and tables some hundred times."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_key(path: Path) -> str:
    """A hash of a model's file, but for the commit that it was made from: another commit may make the same model."""
    tensors, card = read_tensors(path)
    provenance = {key: value for key, value in card.provenance.items() if key != "git_commit"}
    values = [[name, hashlib.sha256(value.numpy().tobytes()).hexdigest()] for name, value in sorted(tensors.items())]
    return digest([values, asdict(card) | {"provenance": provenance}], [])
