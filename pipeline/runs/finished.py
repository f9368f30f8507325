"""Stores finished trials and tables in .pud/kept, under a hash of everything they depend on.

Each trial, and each table of accuracies, is stored by itself, so if the list of methods changes, only what is missing
runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.project import root, write, write_json
from pipeline.runs.trial import DIVERGED, TrialSpec, load_state


@dataclass(frozen=True)
class Finished:
    """A trial that has ended: what it was, its reports, its last checkpoint, its MLflow run's key.

    `diverged`: why it ended early, where its loss did not stay finite. It would not another time, either.
    """

    spec: TrialSpec
    history: list[dict[str, Any]]
    checkpoint: Path
    run_key: str
    diverged: str | None = None

    @property
    def metrics(self) -> dict[str, Any]:
        """The report that is the trial's result: the last; with `train.patience` the most accurate."""
        return max(self.history, key=lambda row: row["validation_accuracy"]) if self.patient else self.history[-1]

    @property
    def patient(self) -> bool:
        """Whether the trial was to end once its accuracy on validation groups did not rise any more."""
        return bool(self.spec.validate and self.spec.train["patience"])

    def passes(self, of_a_pass: int) -> dict[str, float]:
        """The `passes` that the trial's result took, over a table of so many groups; nothing without `patience`."""
        return {"passes": self.metrics["groups"] / of_a_pass} if self.patient else {}

    def state(self) -> dict:
        """The trial's state at its end."""
        return load_state(self.checkpoint)


def trial_folder(key: str) -> Path:
    """A trial's own folder, with its checkpoints."""
    return root() / ".pud" / "trials" / key


def keep_trial(key: str, trial: Finished) -> None:
    """Keep a trial that has ended; its checkpoint stays where it is."""
    path = _path(f"{key}.json")
    checkpoint = os.path.relpath(trial.checkpoint, path.parent)  # the project may be moved
    values = {"history": trial.history, "checkpoint": checkpoint, "run_key": trial.run_key}
    write_json(path, {DIVERGED: trial.diverged} if trial.diverged else values)


def read_trial(key: str, spec: TrialSpec) -> Finished | None:
    """A trial that has ended; None where there is none, or its checkpoint is gone or damaged."""
    path = _path(f"{key}.json")
    if not path.is_file():
        return None
    with contextlib.suppress(Exception):  # a damaged file can fail in nearly every way
        values = json.loads(path.read_text())
        if DIVERGED in values:
            return Finished(spec, [], path, "", values[DIVERGED])
        trial = Finished(spec, values["history"], path.parent / values["checkpoint"], values["run_key"])
        if trial.history and trial.state():
            return trial
    print(f"  {spec.name}: its last checkpoint is gone or damaged; it is trained again", flush=True)
    return None


def forget_trial(key: str) -> None:
    """Let a trial run again, from its beginning."""
    _path(f"{key}.json").unlink(missing_ok=True)
    shutil.rmtree(trial_folder(key), ignore_errors=True)


def read_tables(keys: Mapping[Any, str]) -> dict[Any, pd.DataFrame]:
    """The tables that are stored under these keys. Damaged tables are skipped."""
    tables = {}
    for name, key in keys.items():
        with contextlib.suppress(OSError, ValueError):  # pyarrow's errors are subclasses
            tables[name] = pd.read_parquet(_path(f"{key}.parquet"))
    return tables


def keep_table(key: str, table: pd.DataFrame) -> None:
    """Keep a table."""
    write(_path(f"{key}.parquet"), table.to_parquet(index=False))


def forget_tables(keys: Iterable[str]) -> None:
    """Let these tables be made again."""
    for key in keys:
        _path(f"{key}.parquet").unlink(missing_ok=True)


def _path(name: str) -> Path:
    return root() / ".pud" / "kept" / name
