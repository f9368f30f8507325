"""What a result depends on: files of code and data, and a hash of them with plain values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.runs.trial import TrialSpec
from pudnet.baselines import LEARNED, SCRATCH
from pudnet.data.groups import open_groups
from pudnet.targets import is_import_path, target_code

CODE = Path(__file__).resolve().parents[2]
TRAINING_CODE = ("config", "cpu", "device", "gpu", "targets", "controls", "objective", "learner", "training")
TRAINING_CODE += ("hypernet", "classifier", "data/images", "ridge")
VALIDATION_CODE = ("evaluation", "predictor", "network", "card", "data/own", "data/rows")
# dvc.yaml names these files too; tests/test_params.py compares both with what is imported.


def digest(plain: Any, files: Iterable[Path]) -> str:
    """A short hash of plain values and of what files hold; a file that is missing counts as empty."""
    found = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for path in sorted(set(files)):
        found.update(path.read_bytes() if path.is_file() else b"")
    return found.hexdigest()[:12]


def trial_key(spec: TrialSpec) -> str:
    """A hash of all that one trial depends on; not of what it is called nor of where the project lies."""
    split, _ = open_groups(Path(spec.groups))  # of its classes those that are not trained on do not matter
    plain = {key: value for key, value in asdict(spec).items() if key not in ("name", "store", "groups")}
    plain |= {"train_classes": split.train_classes, "validation_classes": split.validation_classes}
    return f"{spec.kind}-split{spec.split_seed}-{digest(plain, _trial_files(spec))}"


def _trial_files(spec: TrialSpec) -> list[Path]:
    """What a trial reads: data (a store's checksums stand for it) and code."""
    tables = [spec.table, *(["validation"] if spec.validate else [])]
    names = TRAINING_CODE + (VALIDATION_CODE if spec.validate else ())
    groups = Path(spec.groups)
    data = [Path(spec.store) / "meta.json", *(groups / f"{t}.npy" for t in tables)]
    return [*data, CODE / "pipeline" / "runs" / "trial.py", *code_files(names), *method_files(spec.kind, spec.target)]


def code_files(names: Sequence[str]) -> list[Path]:
    """The files of the method's own code, from names without suffix; a folder's name is all of it."""
    paths = [CODE / "pudnet" / name for name in names]
    parts = [sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")] for path in paths]
    return [file for part in parts for file in part]


def method_files(kind: str, target: str) -> list[Path]:
    """The code that is one method's alone, and that of a target of the user's own."""
    own = target_code(target) if is_import_path(target) else []
    if kind in LEARNED:
        own += code_files([f"baselines/{name}" for name in ("__init__", "method", "learners", kind)])
    if kind in SCRATCH:
        own += code_files(["baselines/__init__", "baselines/method", "scratch", "gradient_centralization"])
    return own
