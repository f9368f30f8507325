"""What the driver does as trials report: one line in the terminal, one step in MLflow; what has ended is kept."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import cached_property, partial
from typing import Any

from pipeline import cluster  # first: it sets Ray's environment

# isort: split
from ray.tune import Callback
from ray.tune.experiment import Trial

from pipeline.kept import Diverged, Finished, keep_trial, trial_folder
from pipeline.params import Params
from pipeline.tracking import Tracking, open_tracking
from pipeline.trainable import AT, NOTE, REPLAYED, checkpoint_folder
from pipeline.trial import DIVERGED, METRICS, TrialSpec
from pudnet.errors import RunFailed

PATIENCE = 60  # seconds without a trial at work before it is said

Ended = dict[str, Finished | Diverged]  # by the trials' names


class TrialProgress(Callback):
    """Prints each report once and logs it once, also when a trial that goes on reports it again.

    `keys` are those of all trials of an experiment, by name; `ended` are those of them that have ended.
    """

    def __init__(self, params: Params, key: str, parent: str | None, keys: Mapping[str, str], ended: Ended) -> None:
        self.params, self.key, self.parent, self.keys, self.ended = params, key, parent, keys, {**ended}
        self.got_on: set[str] = set()  # trials that reported something new
        self.reports: dict[str, dict[int, dict[str, Any]]] = {}  # of each trial, by the number of groups
        self.runs: dict[str, tuple[str, int]] = {}  # MLflow's of each trial, and the last step in it
        self._is_at_work()

    @cached_property
    def tracking(self) -> Tracking:
        """The open experiment; opened when it is first used, as Ray pickles callbacks before that."""
        return open_tracking(self.params)

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Find the trial's MLflow run, or create it."""
        spec = _spec(trial)
        if spec.name not in self.ended:
            self.reports.setdefault(spec.name, {})
            self._log(spec)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Print a line and log a step, unless they were before."""
        self._is_at_work()
        spec = _spec(trial)
        if NOTE in result:
            print(f"  {spec.name}: {result[NOTE]}", flush=True)
        if "groups" not in result or spec.name in self.ended:
            return
        reports = self.reports[spec.name]
        is_new = result["groups"] not in reports
        before = max((row["rollbacks"] for row in reports.values()), default=0)
        reports[result["groups"]] = {key: result[key] for key in ("groups", AT, *METRICS) if key in result}
        if is_new and not result.get(REPLAYED):
            self.got_on.add(spec.name)
            if result["rollbacks"] > before:
                print(f"  {spec.name}: the loss was not finite; went on from the last good weights")
            self._say(spec, result)
        if is_new:
            self._log(spec)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Keep the trial at once, whatever becomes of the others, and close its run."""
        spec = _spec(trial)
        if spec.name in self.ended:
            return
        if why := trial.last_result.get(DIVERGED):
            ended, status = Diverged(spec, why), "FAILED"
        else:
            history = [{key: row[key] for key in row if key != AT} for row in self.reports[spec.name].values()]
            checkpoint = checkpoint_folder(trial_folder(self.keys[spec.name]), history[-1]["groups"])
            ended, status = Finished(spec, history, checkpoint, f"{self.key}/{spec.name}"), "FINISHED"
        keep_trial(self.keys[spec.name], ended)
        self._end(spec, status)
        self.ended[spec.name] = ended

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Close the trial's run as failed."""
        self._end(_spec(trial), "FAILED")

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

    def _end(self, spec: TrialSpec, status: str) -> None:
        self._log(spec, status)
        print(f"  {spec.name}: {status.lower()}", flush=True)

    def _log(self, spec: TrialSpec, status: str | None = None) -> None:
        """Log what MLflow does not have of a trial, now or when it answers again."""
        self.tracking.attempt(partial(self._log_reports, spec, status))

    def _log_reports(self, spec: TrialSpec, status: str | None) -> None:
        found = self.runs.pop(spec.name, None)  # after a failure it is found anew, with what it holds
        run_id, last = found or open_run(self.tracking, self.params, spec, f"{self.key}/{spec.name}", self.parent)
        self.runs[spec.name] = run_id, log_reports(self.tracking, run_id, last, self.reports[spec.name].values())
        if status:
            self.tracking.finish(run_id, status)

    def _say(self, spec: TrialSpec, result: Mapping[str, Any]) -> None:
        parts = [f"loss {result['loss']:.3f}"] if "loss" in result else []
        if "validation_accuracy" in result:
            interval = result["validation_ci95"]
            told = f" +/- {interval:.2f}" if math.isfinite(interval) else ""
            parts.append(f"validation {result['validation_accuracy']:5.2f}{told} %")
        else:
            parts.append(f"training {result['train_accuracy']:5.2f} %")
        print(
            f"  [{len(self.ended)}/{len(self.keys)} done] {spec.name}: group {result['groups']:>5}, "
            f"{', '.join(parts)}, {result['groups_per_second']:.2f} groups/s",
            flush=True,
        )


def _spec(trial: Trial) -> TrialSpec:
    return TrialSpec(**trial.config["trial"]["spec"])


def open_run(tracking: Tracking, params: Params, spec: TrialSpec, key: str, parent: str | None) -> tuple[str, int]:
    """A trial's MLflow run, found or created, and the last step in it."""
    parent_id = tracking.find_or_create(key.rpartition("/")[0], parent) if parent else None
    run_id = tracking.find_or_create(key, spec.name, parent_id)
    seeds = {"method": spec.kind, "split_seed": spec.split_seed, "seed": spec.seed}
    tracking.log_params(run_id, {**spec.train, **spec.model, **asdict(params.groups), **seeds})
    return run_id, tracking.last_step(run_id, "groups_per_second")


def log_reports(tracking: Tracking, run_id: str, last: int, reports: Iterable[Mapping[str, Any]]) -> int:
    """Log what was reported after step `last`; the last step then."""
    for row in reports:
        if row["groups"] > last:  # an interval of one group, or a null of a file, is no number
            metrics = {key: row[key] for key in METRICS if row.get(key) is not None and math.isfinite(row[key])}
            tracking.log_metrics(run_id, metrics, row["groups"], row.get(AT))
            last = row["groups"]
    return last


def log_finished(tracking: Tracking, params: Params, trial: Finished, parent: str | None) -> None:
    """Log a finished trial, if that could not be done when it ended."""
    found = tracking.find(trial.run_key)
    if found and found.info.status == "FINISHED":
        return
    run_id, last = open_run(tracking, params, trial.spec, trial.run_key, parent)
    log_reports(tracking, run_id, last, trial.history)
    tracking.finish(run_id)
