"""What the driver does as trials report: one line in the terminal, one step in MLflow."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial

from pipeline.kept import Finished, keep_trial, reports
from pipeline.parallel import checkpoint_folder
from pipeline.params import Params
from pipeline.tracking import Tracking, open_tracking
from pipeline.trial import METRICS, TrialSpec


class TrialProgress(Callback):
    """Prints and logs each report once, also when trials are replayed after an interruption.

    Ray pickles callbacks into the experiment: the tracking client is opened again where it is missing.
    """

    def __init__(self, params: Params, key: str, trials: int, parent: str | None) -> None:
        self.params, self.key, self.trials, self.parent = params, key, trials, parent
        self.runs: dict[str, str] = {}
        self.logged: dict[str, int] = {}
        self.rollbacks: dict[str, int] = {}
        self.reported: dict[str, list[dict[str, Any]]] = {}  # by this process
        self._tracking: Tracking | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tracking": None, "runs": {}, "logged": {}, "reported": {}}

    @property
    def tracking(self) -> Tracking:
        """The open experiment."""
        self._tracking = self._tracking or open_tracking(self.params)
        return self._tracking

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Find the trial's MLflow run, or create it."""
        spec = trial.config["spec"]
        run_id = self.tracking.find_or_create(f"{self.key}/{spec['name']}", spec["name"], self.parent)
        self.runs[trial.trial_id] = run_id
        self.logged[trial.trial_id] = self.tracking.last_step(run_id, "groups_per_second")
        seeds = {"method": spec["kind"], "split_seed": spec["split_seed"], "seed": spec["seed"]}
        self.tracking.log_params(run_id, {**spec["train"], **spec["model"], **asdict(self.params.groups), **seeds})

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Print a line and log a step, unless they were before an interruption."""
        self.reported.setdefault(trial.trial_id, []).append(result)
        if result["groups"] <= self.logged[trial.trial_id]:
            return
        self.logged[trial.trial_id] = result["groups"]
        if result["rollbacks"] > self.rollbacks.get(trial.trial_id, 0):
            self.rollbacks[trial.trial_id] = result["rollbacks"]
            print(f"  {trial.config['spec']['name']}: the loss was not finite; went on from the last good weights")
        metrics = {key: result[key] for key in METRICS if key in result}
        self.tracking.log_metrics(self.runs[trial.trial_id], metrics, step=result["groups"])
        self._say(trials, trial, result)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Keep the trial at once, whatever becomes of the others, and close its run."""
        spec, path = TrialSpec(**trial.config["spec"]), Path(trial.path)
        written = path / "result.json"  # Ray's own, which lags behind
        earlier = [json.loads(line) for line in written.read_text().splitlines()] if written.is_file() else []
        rows = reports([*earlier, *self.reported.get(trial.trial_id, [])])
        checkpoint = checkpoint_folder(trial.checkpoint, trial.last_result)
        keep_trial(Finished(spec, rows, checkpoint, f"{self.key}/{spec.name}"))
        self._end(trial, "FINISHED")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Close the trial's run as failed."""
        self._end(trial, "FAILED")

    def _end(self, trial: Trial, status: str) -> None:
        if trial.trial_id in self.runs:
            self.tracking.finish(self.runs[trial.trial_id], status)
        print(f"  {trial.config['spec']['name']}: {status.lower()}", flush=True)

    def _say(self, trials: list[Trial], trial: Trial, result: dict[str, Any]) -> None:
        done = sum(t.status == "TERMINATED" for t in trials)
        parts = [f"loss {result['loss']:.3f}"] if "loss" in result else []
        if "validation_accuracy" in result:
            parts.append(f"validation {result['validation_accuracy']:5.2f} +/- {result['validation_ci95']:.2f} %")
        else:
            parts.append(f"training {result['train_accuracy']:5.2f} %")
        print(
            f"  [{done}/{self.trials} done] {trial.config['spec']['name']}: group {result['groups']:>5}, "
            f"{', '.join(parts)}, {result['groups_per_second']:.2f} groups/s",
            flush=True,
        )
