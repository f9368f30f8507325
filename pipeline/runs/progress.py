"""What the driver does as trials report: a line in the terminal, a step in MLflow; a trial's end is noted at once."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from mlflow.entities import DatasetInput
from ray.tune import Callback
from ray.tune.experiment import Trial

from pipeline.params import Params
from pipeline.project import root
from pipeline.runs import cluster
from pipeline.runs.display import TrialBars
from pipeline.runs.trainable import AT, SYSTEM
from pipeline.runs.trial import DIVERGED, TOTAL, TrialSpec
from pipeline.runs.trial_folder import Finished, mark_ended
from pipeline.tracking.datasets import dataset
from pipeline.tracking.runs import Tracking
from pudnet.baselines import SCRATCH
from pudnet.errors import RunFailed

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
PATIENCE = 60  # seconds without a trial at work before it is said


class TrialProgress(Callback):
    """Prints and logs each report once, even if a resumed trial replays it, and notes which trials have ended.

    `keys` are the trials' by their names; `parent`: the key and name of the MLflow run that theirs are children of.
    """

    def __init__(
        self, params: Params, tracking: Tracking, keys: Mapping[str, str], parent: tuple[str, str] | None
    ) -> None:
        self.params, self.tracking, self.keys, self.parent = params, tracking, keys, parent
        self.ended: dict[str, Finished] = {}
        self.reports: dict[str, dict[int, Mapping]] = {name: {} for name in keys}  # by the number of groups
        self.runs: dict[str, tuple[str, int]] = {}  # of MLflow, by the trial's name: the id, and the last step in it
        log = root() / ".pud" / "log" / f"{time.strftime('%Y-%m-%d-%H%M%S')}.txt"
        self.bars = TrialBars(len(keys), self.ended, log)
        self._is_at_work()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Ray pickles callbacks into a file that nobody reads."""
        return {}

    def on_trial_result(self, trial: Trial, result: dict[str, Any], **info: Any) -> None:
        """Print a line and log a step, unless that was done before."""
        self._is_at_work()
        spec, reports = _spec(trial), self.reports[_spec(trial).name]
        if "groups" not in result or result["groups"] in reports or spec.name in self.ended:
            return
        if result["rollbacks"] > max((row["rollbacks"] for row in reports.values()), default=0):
            print(f"  {spec.name}: the loss was not finite; went on from the last good weights")
        line = f"  [{len(self.ended)}/{len(self.keys)} done] {spec.name}: {_words(result)}"
        self.bars.report(spec.name, result["groups"], result[TOTAL], line)
        reports[result["groups"]] = {name: result[name] for name in ("groups", AT, *METRICS) if name in result}
        self.log(spec, reports.values())

    def on_trial_complete(self, trial: Trial, **info: Any) -> None:
        """Note the trial's end at once, whatever becomes of the others."""
        spec, diverged = _spec(trial), trial.last_result.get(DIVERGED)
        if spec.name not in self.ended:
            ended = Finished(spec, self.keys[spec.name], max(self.reports[spec.name], default=0), diverged)
            mark_ended(ended)
            self.ended[spec.name] = ended
            self._end(spec, "FAILED" if diverged else "FINISHED")

    def on_trial_error(self, trial: Trial, **info: Any) -> None:
        """Close the trial's MLflow run as failed."""
        self._end(_spec(trial), "FAILED")

    def on_step_end(self, trials: list[Trial], **info: Any) -> None:
        """Print once that trials wait for resources: a node may have been lost.

        Raises `RunFailed` if this machine's own Ray has died.
        """
        workers, share = trials[0].config["workers"], trials[0].config["share"]
        if workers == 1 and any(trial.status == Trial.RUNNING for trial in trials):
            self._is_at_work()
        elif time.monotonic() - self.at_work > PATIENCE:
            if cluster.is_lost():
                raise RunFailed("the Ray of this machine is gone (out of memory?); the same command continues")
            if workers > 1 and cluster.has_room(self.params, workers):  # the process that starts them always runs
                self._is_at_work()
            elif not self.said_to_wait:
                wanted = f"{share['cpu']} CPU(s) and {share['gpu']:g} GPU(s)"
                each = f" for each of {workers} workers" if workers > 1 else ""
                print(f"  no trial is at work; waiting for a node with {wanted} free{each}", flush=True)
                self.said_to_wait = True

    def _is_at_work(self) -> None:
        self.at_work, self.said_to_wait = time.monotonic(), False

    def _end(self, spec: TrialSpec, status: str) -> None:
        self.log(spec, self.reports[spec.name].values(), status)
        self.bars.end(spec.name, f"  {spec.name}: {status.lower()}")

    def log(self, spec: TrialSpec, reports: Iterable[Mapping], status: str | None = None) -> None:
        """Log what MLflow does not have of a trial, now or when it answers again."""
        self.tracking.submit(partial(self._log, spec, reports, status))

    def _log(self, spec: TrialSpec, reports: Iterable[Mapping], status: str | None) -> None:
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
        key = self.run_key(spec)
        found = self.tracking.find(key)
        if found and found.info.status == "FINISHED":
            return None
        parent_id = self.tracking.find_or_create(*self.parent) if self.parent else None
        run_id = self.tracking.find_or_create(key, spec.name, parent_id)
        seeds = {"method": spec.kind, "split_seed": spec.split_seed, "seed": spec.seed}
        plain = {**spec.train, **spec.model, **asdict(self.params.groups), **seeds}
        self.tracking.describe(run_id, _about(spec, self.params), plain, datasets(spec))
        return run_id, self.tracking.last_step(run_id, "groups_per_second")

    def run_key(self, spec: TrialSpec) -> str:
        """The key of a trial's MLflow run: a trial of several experiments is a child of each one's parent."""
        return f"{self.parent[0]}/{spec.name}" if self.parent else self.keys[spec.name]


def _spec(trial: Trial) -> TrialSpec:
    return TrialSpec(**trial.config["trial"]["spec"])


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


def _words(result: Mapping[str, Any]) -> str:
    """A report as it is printed."""
    parts = [f"group {result['groups']:>5} of {result[TOTAL]}"]
    parts += [f"loss {result['loss']:.3f}"] if "loss" in result else []
    if "validation_accuracy" in result:
        interval = f" +/- {result['validation_ci95']:.2f}" if math.isfinite(result["validation_ci95"]) else ""
        parts.append(f"validation {result['validation_accuracy']:5.2f}{interval} %")
    else:
        parts.append(f"training {result['train_accuracy']:5.2f} %")
    return ", ".join([*parts, f"{result['groups_per_second']:.2f} groups/s"])
