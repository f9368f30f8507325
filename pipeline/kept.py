"""What is finished and need not be done again, by a hash of all that it depends on; in .pud/kept.

Ray restores an experiment as a whole, with the trials it began with. Here a trial, or a table of accuracies, stands
for itself: a list of methods can grow, shrink or change, and only what is missing runs.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.dependencies import trial_key
from pipeline.stage import root, write, write_json
from pipeline.trial import DIVERGED, METRICS, TrialSpec, load_state

REPORTS = "reports.jsonl"


@dataclass(frozen=True)
class Finished:
    """A finished trial: what it was, its reports, its last checkpoint, its MLflow run's key."""

    spec: TrialSpec
    history: list[dict[str, Any]]
    checkpoint: Path
    run_key: str

    @property
    def metrics(self) -> dict[str, Any]:
        """The last report."""
        return self.history[-1]

    def state(self) -> dict:
        """The trial's state at its end."""
        return load_state(self.checkpoint)


@dataclass(frozen=True)
class Diverged:
    """A trial whose loss would not stay finite, and nor would it another time."""

    spec: TrialSpec
    why: str


def add_report(trial_folder: Path, row: Mapping[str, Any]) -> None:
    """Write down a report as soon as it is made: Ray's own file of them lies elsewhere until its next checkpoint."""
    plain = {key: row[key] for key in ("groups", "timestamp", *METRICS) if key in row}
    with contextlib.suppress(OSError):  # a full disk: the checkpoint says it
        trial_folder.mkdir(parents=True, exist_ok=True)
        with (trial_folder / REPORTS).open("a") as file:
            file.write(f"\n{json.dumps(plain)}")  # after what a kill may have left of a line
            file.flush()
            os.fsync(file.fileno())  # no snapshot of Ray's is to know of a report that a power cut takes from here


def written(trial_folder: Path) -> list[dict[str, Any]]:
    """A trial's reports, less a line that a kill left half there."""
    rows = []
    with contextlib.suppress(OSError):
        for line in (trial_folder / REPORTS).read_text().splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return rows


def reports(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A trial's reports without what Ray adds to them; of those made twice, after an interruption, the last."""
    plain = [{key: row[key] for key in ("groups", *METRICS) if key in row} for row in rows]
    return list({row["groups"]: row for row in plain}.values())


def keep_trial(trial: Finished) -> None:
    """Keep a finished trial; its checkpoint stays where it is."""
    checkpoint = os.path.relpath(trial.checkpoint, _folder())  # the project may be moved
    values = {"history": trial.history, "checkpoint": checkpoint, "run_key": trial.run_key}
    write_json(_trial_path(trial.spec), values)


def keep_diverged(trial: Diverged) -> None:
    """Remember that a trial diverged."""
    write_json(_trial_path(trial.spec), {DIVERGED: trial.why})


def read_trial(spec: TrialSpec) -> Finished | Diverged | None:
    """A trial that has ended; None where there is none, or its checkpoint is gone or damaged."""
    path = _trial_path(spec)
    if not path.is_file():
        return None
    with contextlib.suppress(ValueError, KeyError, TypeError):
        values = json.loads(path.read_text())
        if DIVERGED in values:
            return Diverged(spec, str(values[DIVERGED]))
        trial = Finished(spec, values["history"], _folder() / values["checkpoint"], values["run_key"])
        if trial.history and is_whole(trial.checkpoint):
            return trial
    print(f"  {spec.name}: its last checkpoint is gone or damaged; it is trained again", flush=True)
    return None


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint can be read."""
    try:
        load_state(checkpoint)
    except Exception:  # a damaged file can fail in nearly every way
        return False
    return True


def forget_trials(specs: Iterable[TrialSpec]) -> None:
    """Let these trials run again."""
    for spec in specs:
        _trial_path(spec).unlink(missing_ok=True)


def read_tables(keys: Mapping[Any, str]) -> dict[Any, pd.DataFrame]:
    """The tables that are kept, of those that stand under these keys; one that is damaged is not."""
    tables = {}
    for name, key in keys.items():
        with contextlib.suppress(OSError, ValueError):  # of which pyarrow's errors are
            tables[name] = pd.read_parquet(_table_path(key))
    return tables


def keep_table(key: str, table: pd.DataFrame) -> None:
    """Keep a table."""
    write(_table_path(key), table.to_parquet(index=False))


def forget_tables(keys: Iterable[str]) -> None:
    """Let these tables be made again."""
    for key in keys:
        _table_path(key).unlink(missing_ok=True)


def _folder() -> Path:
    return root() / ".pud" / "kept"


def _trial_path(spec: TrialSpec) -> Path:
    return _folder() / f"{trial_key(spec)}.json"


def _table_path(key: str) -> Path:
    return _folder() / f"{key}.parquet"
