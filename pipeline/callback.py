"""What the driver does as trials report: one line in the terminal, one step in MLflow."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline import cluster  # first: it sets Ray's environment

# isort: split
from ray.tune import Callback
from ray.tune.experiment import Trial

from pipeline.kept import Diverged, Finished, add_report, keep_diverged, keep_trial, reports, written
from pipeline.parallel import checkpoint_folder
from pipeline.params import Params
from pipeline.tracking import Tracking, open_tracking
from pipeline.trial import DIVERGED, METRICS, TrialSpec
from pudnet.errors import RunFailed

PATIENCE = 60  # seconds without a trial at work before it is said


class TrialProgress(Callback):
    """Prints and logs each report once, also when trials are replayed after an interruption.

    Ray pickles callbacks into the experiment: what is open is opened again where it is missing.
    """

    def __init__(self, params: Params, key: str, trials: int, parent: str | None, keep: bool) -> None:
        self.params, self.key, self.trials, self.parent, self.keep = params, key, trials, parent, keep
        self.rollbacks: dict[str, int] = {}
        self._open()

    def _open(self) -> None:
        self.reported: dict[str, list[dict[str, Any]]] = {}  # earlier, and by this process
        self.unlogged: dict[str, list[dict[str, Any]]] = {}
        self.runs: dict[str, tuple[str, int]] = {}  # and the last step when it was opened
        self._tracking: Tracking | None = None
        self._is_at_work()  # when some trial last was, and whether it was said that none is

    def __getstate__(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("params", "key", "trials", "parent", "keep", "rollbacks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._open()

    @property
    def tracking(self) -> Tracking:
        """The open experiment."""
        self._tracking = self._tracking or open_tracking(self.params)
        return self._tracking

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Find the trial's MLflow run, or create it."""
        if trial.trial_id not in self.reported:
            earlier = written(Path(trial.path))
            self.reported[trial.trial_id], self.unlogged[trial.trial_id] = earlier, [*earlier]
        self._log(trial)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Print a line and log a step, unless they were before an interruption."""
        earlier = self.reported[trial.trial_id]
        self._is_at_work()
        if DIVERGED in result:
            return
        trial.run_metadata.num_failures = 0  # it gets on: what counts are failures in a row. (There is no public way.)
        if result["groups"] <= max((row["groups"] for row in earlier), default=-1):
            return
        earlier.append(result)
        add_report(Path(trial.path), result)
        if result["rollbacks"] > self.rollbacks.get(trial.trial_id, 0):
            self.rollbacks[trial.trial_id] = result["rollbacks"]
            print(f"  {trial.config['spec']['name']}: the loss was not finite; went on from the last good weights")
        self._say(trials, trial, result)
        self.unlogged[trial.trial_id].append(result)
        self._log(trial)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Keep the trial at once, whatever becomes of the others, and close its run."""
        spec, rows = TrialSpec(**trial.config["spec"]), self.reported.get(trial.trial_id, [])
        if why := trial.last_result.get(DIVERGED):
            keep_diverged(Diverged(spec, why))
            self._end(trial, "FAILED")
            return
        if self.keep:
            checkpoint = checkpoint_folder(trial.checkpoint, trial.last_result)
            keep_trial(Finished(spec, reports(rows), checkpoint, f"{self.key}/{spec.name}"))
        self._end(trial, "FINISHED")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Close the trial's run as failed."""
        self._end(trial, "FAILED")

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Say, once, that trials wait for room: a node that has it may have been lost.

        Raises `RunFailed` where none can come: the Ray of this machine alone is gone.
        """
        workers, share = trials[0].config["workers"], trials[0].config["share"]
        if any(trial.status == Trial.RUNNING for trial in trials) and workers == 1:
            self._is_at_work()
        elif time.monotonic() - self.at_work > PATIENCE:
            if cluster.is_lost():
                raise RunFailed("the Ray of this machine is gone (out of memory?); the same command continues")
            if workers > 1 and cluster.has_room(self.params, workers):  # the process that drives them always runs
                self._is_at_work()
            elif not self.said_to_wait:
                wanted = f"{share['cpu']} CPU(s) and {share['gpu']:g} GPU(s)"
                each = f" for each of {workers} workers" if workers > 1 else ""
                print(f"  no trial is at work; waiting for a node with {wanted} free{each}", flush=True)
                self.said_to_wait = True

    def _is_at_work(self) -> None:
        self.at_work, self.said_to_wait = time.monotonic(), False

    def _end(self, trial: Trial, status: str) -> None:
        self._log(trial, status)
        print(f"  {trial.config['spec']['name']}: {status.lower()}", flush=True)

    def _log(self, trial: Trial, status: str | None = None) -> None:
        """Log what MLflow does not have of a trial, as far as it answers."""
        if trial.trial_id in self.unlogged:
            self.tracking.attempt(lambda: self._log_rows(trial, status))

    def _log_rows(self, trial: Trial, status: str | None) -> None:
        rows, spec = self.unlogged[trial.trial_id], TrialSpec(**trial.config["spec"])
        run_id, last = self.runs.pop(trial.trial_id, (None, -1))
        if run_id is None:
            run_id, last = open_run(self.tracking, self.params, spec, f"{self.key}/{spec.name}", self.parent)
        while rows:
            if rows[0]["groups"] > last:
                log_row(self.tracking, run_id, rows[0])
            del rows[0]
        if status:
            self.tracking.finish(run_id, status)
        self.runs[trial.trial_id] = (run_id, last)  # after a failure it is found anew, with what it holds

    def _say(self, trials: list[Trial], trial: Trial, result: dict[str, Any]) -> None:
        done = sum(t.status == "TERMINATED" for t in trials)
        parts = [f"loss {result['loss']:.3f}"] if "loss" in result else []
        if "validation_accuracy" in result:
            interval = result["validation_ci95"]
            told = f" +/- {interval:.2f}" if math.isfinite(interval) else ""
            parts.append(f"validation {result['validation_accuracy']:5.2f}{told} %")
        else:
            parts.append(f"training {result['train_accuracy']:5.2f} %")
        print(
            f"  [{done}/{self.trials} done] {trial.config['spec']['name']}: group {result['groups']:>5}, "
            f"{', '.join(parts)}, {result['groups_per_second']:.2f} groups/s",
            flush=True,
        )


def open_run(tracking: Tracking, params: Params, spec: TrialSpec, key: str, parent: str | None) -> tuple[str, int]:
    """A trial's MLflow run, found or created, and the last step in it."""
    parent_id = tracking.find_or_create(key.rpartition("/")[0], parent) if parent else None
    run_id = tracking.find_or_create(key, spec.name, parent_id)
    seeds = {"method": spec.kind, "split_seed": spec.split_seed, "seed": spec.seed}
    tracking.log_params(run_id, {**spec.train, **spec.model, **asdict(params.groups), **seeds})
    return run_id, tracking.last_step(run_id, "groups_per_second")


def log_row(tracking: Tracking, run_id: str, row: Mapping[str, Any]) -> None:
    """Log a trial's report, but what is not a number: an interval of one group, or a null of a file."""
    metrics = {key: row[key] for key in METRICS if row.get(key) is not None and math.isfinite(row[key])}
    tracking.log_metrics(run_id, metrics, row["groups"], row.get("timestamp"))


def log_finished(tracking: Tracking, params: Params, trial: Finished, parent: str | None) -> None:
    """Log a finished trial, if that could not be done when it ended."""
    found = tracking.find(trial.run_key)
    if found and found.info.status == "FINISHED":
        return
    run_id, last = open_run(tracking, params, trial.spec, trial.run_key, parent)
    for row in trial.history:
        if row["groups"] > last:
            log_row(tracking, run_id, row)
    tracking.finish(run_id)
