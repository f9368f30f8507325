"""What is finished and need not be done again, by a hash of all that it depends on; in .pud/kept.

Ray restores an experiment as a whole, with the trials it began with. Here a trial, or a table of accuracies, stands
for itself: a list of methods can grow, shrink or change, and only what is missing runs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from pipeline.experiment import Experiment, Finished, run_trials, trial_key
from pipeline.params import Params
from pipeline.stage import root, write, write_json
from pipeline.tracking import Tracking
from pipeline.trial import TrialSpec


def run_missing(
    stage: str,
    specs: Sequence[TrialSpec],
    params: Params,
    tracking: Tracking,
    parent: str | None = None,
    fresh: bool = False,
) -> list[Finished]:
    """The finished trials of the specs, in their order: those that are kept, and those that had to run for it.

    The arguments, and what is raised, are `run_trials`'s.
    """
    kept = {} if fresh else {spec.name: found for spec in specs if (found := _read(spec))}
    missing = [spec for spec in specs if spec.name not in kept]
    if kept:
        print(f"  {len(kept)} of {len(specs)} trials are finished already", flush=True)
    if missing:
        for trial in run_trials(Experiment(stage, missing), params, tracking, parent, fresh):
            checkpoint = os.path.relpath(trial.checkpoint, folder())  # the project may be moved
            write_json(_trial_path(trial.spec), asdict(trial) | {"checkpoint": checkpoint})
            kept[trial.spec.name] = trial
    return [kept[spec.name] for spec in specs]


def _read(spec: TrialSpec) -> Finished | None:
    """A finished trial, unless its checkpoint is gone."""
    path = _trial_path(spec)
    if not path.is_file():
        return None
    values = json.loads(path.read_text())
    values |= {"spec": spec, "checkpoint": folder() / values["checkpoint"]}
    return Finished(**values) if values["checkpoint"].is_dir() else None


def _trial_path(spec: TrialSpec) -> Path:
    return folder() / f"{trial_key(spec)}.json"


def read_table(key: str) -> pd.DataFrame | None:
    """A kept table; None where there is none."""
    path = folder() / f"{key}.csv"
    return pd.read_csv(path) if path.is_file() else None


def keep_table(key: str, table: pd.DataFrame) -> None:
    """Keep a table."""
    write(folder() / f"{key}.csv", table.to_csv(index=False))


def folder() -> Path:
    """Where all of it lies."""
    return root() / ".pud" / "kept"
