"""A trial's folder: its last two checkpoints, each with all reports so far, and whether the trial has ended.

The folder is named by the trial's key and lies on storage that all nodes share, so that it does not matter which
process trained before, nor where.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.project import root, write_json
from pipeline.runs.trial import DIVERGED, STATE, TrialSpec, load_state
from pudnet.errors import is_out_of_memory
from pudnet.files import replacing

REPORTS = "reports"  # in a checkpoint, beside the trial's state
ENDED = "ended.json"


@dataclass(frozen=True)
class Finished:
    """A trial that has ended. `diverged`: why its loss stopped being finite; None if it did not."""

    spec: TrialSpec
    key: str
    history: Sequence[Mapping[str, Any]]  # its reports; none, if it diverged before the first
    diverged: str | None

    @property
    def checkpoint(self) -> Path:
        """The last checkpoint."""
        return _checkpoint(trial_folder(self.key), self.history[-1]["groups"])

    def state(self) -> dict[str, Any]:
        """The trial's state at its end. Raises some error if it is gone or damaged."""
        return load_state(self.checkpoint)

    @property
    def metrics(self) -> Mapping[str, Any]:
        """The report that is the trial's result: the last; with `train.patience` the most accurate."""
        return max(self.history, key=lambda row: row["validation_accuracy"]) if self.patient else self.history[-1]

    @property
    def patient(self) -> bool:
        """Whether the trial was to end once its accuracy on validation groups did not rise any more."""
        return bool(self.spec.validate and self.spec.patience)

    def passes(self, of_a_pass: int) -> dict[str, float]:
        """With `train.patience`: how often the groups had been passed at the trial's result, under the key `passes`.

        `of_a_pass` is the number of groups in one pass. Without `patience` the dict is empty.
        """
        return {"passes": self.metrics["groups"] / of_a_pass} if self.patient else {}


def trial_folder(key: str) -> Path:
    """The folder of the trial with this key."""
    return root() / ".pud" / "trials" / key


def _checkpoint(folder: Path, groups: int) -> Path:
    return folder / f"{groups:09}"


def save_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint, whole or not at all, and delete all older checkpoints except the most recent one."""
    own = _checkpoint(folder, state[REPORTS][-1]["groups"])
    with replacing(own / STATE) as path, path.open("wb") as file:  # given a path, torch.save hides a full disk
        torch.save(state, file)
    for before in sorted(file.parent for file in folder.glob(f"*/{STATE}") if file.parent.name < own.name)[:-1]:
        shutil.rmtree(before, ignore_errors=True)


def newest_checkpoint(folder: Path) -> dict[str, Any]:
    """The state in the newest checkpoint that is not damaged. If there is none: no reports."""
    for file in sorted(folder.glob(f"*/{STATE}"), reverse=True):
        try:
            return load_state(file.parent)
        except Exception as error:  # a damaged file can fail in nearly every way
            if is_out_of_memory(error):
                raise
            print(f"  checkpoint {file} is damaged; its trial goes on from what was before", flush=True)
    return {REPORTS: []}


def mark_ended(trial: Finished) -> None:
    """Note in the folder that the trial has ended, and after how many groups."""
    write_json(trial_folder(trial.key) / ENDED, {"groups": _groups(trial.history), DIVERGED: trial.diverged})


def read_trial(key: str, spec: TrialSpec) -> tuple[list[dict[str, Any]], Finished | None]:
    """What is in a trial's folder: its reports, and the trial itself if it has ended."""
    reports, marker = newest_checkpoint(trial_folder(key))[REPORTS], trial_folder(key) / ENDED
    if not marker.is_file():
        return reports, None
    with contextlib.suppress(ValueError, KeyError, TypeError):  # a damaged file
        ended = json.loads(marker.read_text())
        if ended["groups"] == _groups(reports):
            return reports, Finished(spec, key, reports, ended[DIVERGED])
    print(f"  {spec.name}: its folder is damaged; it goes on from the newest whole checkpoint, if any", flush=True)
    marker.unlink()
    return reports, None


def _groups(reports: Sequence[Mapping[str, Any]]) -> int:
    return reports[-1]["groups"] if reports else 0
