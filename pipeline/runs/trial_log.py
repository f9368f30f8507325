"""Logs trials to MLflow: each trial is a run, and each of its reports a step, logged once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from mlflow.entities import DatasetInput

from pipeline.params import Params
from pipeline.runs.trainable import AT
from pipeline.runs.trial import TrialSpec
from pipeline.runs.usage import SYSTEM
from pipeline.tracking.datasets import dataset
from pipeline.tracking.runs import Tracking
from pudnet.baselines import SCRATCH

METRICS = (  # MLflow's compare page first shows the first one
    "validation_accuracy",
    "validation_ci95",
    "loss",
    "metric_loss",
    "full_loss",
    "kl_loss",
    "train_accuracy",
    "grad_norm",
    "groups_per_second",
    "rollbacks",
    *SYSTEM,
)


class TrialLog:
    """Logs the trials of one experiment.

    `keys`: trial name -> key. `parent`: key and name of the MLflow run that is the parent of theirs.
    """

    def __init__(
        self, params: Params, tracking: Tracking, keys: Mapping[str, str], parent: tuple[str, str] | None
    ) -> None:
        self.params, self.tracking, self.keys, self.parent = params, tracking, keys, parent
        self.runs: dict[str, tuple[str, int]] = {}  # of MLflow, by the trial's name: the id, and the last step in it

    def supersede_parent(self) -> None:
        """Let the trials, if they all run anew, have a new parent."""
        if self.parent:
            self.tracking.submit(partial(self.tracking.supersede, self.parent[0]))

    def supersede(self, spec: TrialSpec) -> None:
        """Let a trial that runs anew have a new run."""
        self.tracking.submit(partial(self.tracking.supersede, self._key(spec)))

    def write(self, spec: TrialSpec, reports: Sequence[Mapping], status: str | None = None) -> None:
        """Log what MLflow does not have of a trial, now or when it answers again."""
        self.tracking.submit(partial(self._log, spec, reports, status))

    def _log(self, spec: TrialSpec, reports: Sequence[Mapping], status: str | None) -> None:
        run = self.runs.pop(spec.name, None) or self._open(spec)  # after a failure it is found anew
        if not run:
            return
        run_id, last = run
        for row in reports:
            if row["groups"] > last:
                metrics = {m: row[m] for m in METRICS if row.get(m) is not None and math.isfinite(row[m])}
                self.tracking.log_metrics(run_id, metrics, row["groups"], row.get(AT))
                last = row["groups"]
        if status:
            self.tracking.finish(run_id, status)
        else:
            self.runs[spec.name] = run_id, last

    def _open(self, spec: TrialSpec) -> tuple[str, int] | None:
        """A trial's MLflow run, found or created, and the last step in it; None where it has all there is."""
        key = self._key(spec)
        found = self.tracking.find(key)
        if found and found.info.status == "FINISHED":
            return None
        parent_id = self.tracking.find_or_create(*self.parent) if self.parent else None
        run_id = self.tracking.find_or_create(key, spec.name, parent_id)
        seeds = {"method": spec.kind, "split_seed": spec.split_seed, "seed": spec.seed}
        plain = {**spec.train, **spec.model, **asdict(self.params.groups), **seeds}
        self.tracking.describe(run_id, _about(spec, self.params), plain, datasets(spec))
        # A study's row, or PudNet+ on the bench, may have others than params.yaml.
        self.tracking.log_tags(run_id, {"target": spec.target, "variant": spec.variant})
        return run_id, self.tracking.last_step(run_id, "groups_per_second")

    def _key(self, spec: TrialSpec) -> str:
        """The key of a trial's MLflow run: a trial of several experiments is a child of each one's parent."""
        return f"{self.parent[0]}/{spec.name}" if self.parent else self.keys[spec.name]


def datasets(spec: TrialSpec) -> list[DatasetInput]:
    """What a trial trains on, and what it is judged on. (From scratch both are the two halves of validation groups.)"""
    store, groups = Path(spec.store), Path(spec.groups)
    found = [] if spec.kind in SCRATCH else [dataset(store, groups, spec.table)]
    return found + ([dataset(store, groups, "validation", spec.validate)] if spec.validate else [])


def _about(spec: TrialSpec, params: Params) -> str:
    """The description of a trial's MLflow run."""
    trained = f"Training `{spec.name}`, of `{spec.kind}` for class split {spec.split_seed}"
    if spec.kind in SCRATCH:
        return f"{trained}, by itself on each of {spec.validate} validation groups."
    groups = params.groups.search_groups if spec.table == "search_train" else params.groups.train_groups
    judged = f", judged on {spec.validate} validation groups of classes that it has not seen" if spec.validate else ""
    return f"{trained} on {groups:,} task groups{judged}. A step is a task group."
