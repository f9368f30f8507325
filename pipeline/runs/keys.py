"""Keys of results: a hash of everything that a result depends on, which is values and files of code and data.

But not the versions of libraries, nor the processor: after an update of torch, finished results are kept.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.digests import digest
from pipeline.project import STORE, TEST_STORE, group_folder
from pipeline.runs.trial import TrialSpec
from pudnet.baselines import LEARNED, SCRATCH
from pudnet.data.groups import open_groups
from pudnet.data.store import META
from pudnet.targets import is_import_path, target_code

CODE = Path(__file__).resolve().parents[2]
TRAINING_CODE = ("config", "cpu", "device", "gpu", "targets", "controls", "objective", "learner", "training")
TRAINING_CODE += ("hypernet", "classifier", "data/images", "data/looks", "ridge", "augmentation", "card", "model")
VALIDATION_CODE = ("evaluation", "predictor", "network", "data/user_images", "data/rows")
# dvc.yaml lists these files too; tests/test_params.py compares both lists with the imports.


def trial_key(spec: TrialSpec) -> str:
    """A hash of everything that a trial's result depends on, but not of its name or the project's place."""
    split, _ = open_groups(Path(spec.groups))  # its test classes do not matter to a training
    plain = {key: value for key, value in asdict(spec).items() if key not in ("name", "variant", "store", "groups")}
    plain |= {"train_classes": split.train_classes, "validation_classes": split.validation_classes}
    plain["store"] = _contents(Path(spec.store))
    if spec.kind in SCRATCH:  # it reads nothing else of `train`
        plain["train"] = spec.train["precision"]
    return f"{spec.kind}-split{spec.split_seed}-{digest(plain, _trial_files(spec))}"


def _trial_files(spec: TrialSpec) -> list[Path]:
    """The files that a trial reads: tables of groups and code."""
    tables = [*([] if spec.kind in SCRATCH else [spec.table]), *(["validation"] if spec.validate else [])]
    names = TRAINING_CODE + (VALIDATION_CODE if spec.validate else ())
    groups = Path(spec.groups)
    data = [groups / f"{t}.npy" for t in tables]
    return [*data, CODE / "pipeline" / "runs" / "trial.py", *code_files(names), *method_files(spec.kind, spec.target)]


def measurement_key(kind: str, target: str, split_seed: int, plain: Any, files: Iterable[Path]) -> str:
    """A hash of what a measurement depends on: its data and code, and `plain` values and `files` of its own."""
    groups = group_folder(split_seed)
    data = [groups / "split.json", groups / "test.npy", *([] if kind in SCRATCH else [groups / "train.npy"])]
    plain = [plain, _contents(STORE), _contents(TEST_STORE)]
    code = code_files(TRAINING_CODE + VALIDATION_CODE) + method_files(kind, target)
    code += [CODE / "pipeline" / "runs" / name for name in ("class_split.py", "measurement.py")]
    return digest([kind, target, split_seed, plain], [*data, *code, *files])


def _contents(store: Path) -> dict[str, Any] | None:
    """What a prepared set holds, its checksum among it, but not where it was read from.

    None if there is no such set, or its file is damaged, which `open_store` says.
    """
    try:
        values = json.loads((store / META).read_text(encoding="utf-8"))
        return {key: value for key, value in values.items() if key != "source"}
    except (OSError, ValueError, AttributeError):
        return None


def code_files(names: Sequence[str]) -> list[Path]:
    """Files of `pudnet/`, from names without suffix; the name of a folder stands for all of its files."""
    return [file for name in names for form in (f"{name}.py", f"{name}/*.py") for file in (CODE / "pudnet").glob(form)]


def method_files(kind: str, target: str) -> list[Path]:
    """The code of one method, and of a user's own target."""
    own = target_code(target) if is_import_path(target) else []
    if kind in LEARNED:
        own += code_files([f"baselines/{name}" for name in ("__init__", "method", "learners")])
        own.append(Path(inspect.getsourcefile(LEARNED[kind])))
    if kind in SCRATCH:
        own += code_files(["baselines/__init__", "baselines/method", "scratch", "gradient_centralization"])
        own.append(CODE / "pipeline" / "runs" / "trial.py")  # `scratch_method`
    return own
