"""What the driver does as trials report: it shows and logs the report, and notes at once that a trial has ended."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial

from pipeline.params import Params
from pipeline.project import root
from pipeline.runs import cluster
from pipeline.runs.display import TrialBars
from pipeline.runs.trainable import AT
from pipeline.runs.trial import DIVERGED, TrialSpec
from pipeline.runs.trial_folder import Finished, mark_ended
from pipeline.runs.trial_log import METRICS, TrialLog
from pudnet.errors import RunFailed

PATIENCE = 60  # seconds without a trial at work before it is said


class TrialProgress(Callback):
    """Prints and logs each report once, even if a resumed trial replays it, and notes which trials have ended.

    `keys` are the trials' by their names.
    """

    def __init__(self, params: Params, log: TrialLog, keys: Mapping[str, str]) -> None:
        self.params, self.log, self.keys = params, log, keys
        self.ended: dict[str, Finished] = {}
        self.reports: dict[str, dict[int, Mapping]] = {name: {} for name in keys}  # by the number of groups
        lines = root() / ".pud" / "log" / f"{time.strftime('%Y-%m-%d-%H%M%S')}.txt"
        self.bars = TrialBars(len(keys), self.ended, lines)
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
        self.bars.report(spec.name, result)
        reports[result["groups"]] = {name: result[name] for name in ("groups", AT, *METRICS) if name in result}
        self.log.write(spec, reports.values())

    def on_trial_complete(self, trial: Trial, **info: Any) -> None:
        """Note the trial's end at once, whatever becomes of the others."""
        spec, diverged = _spec(trial), trial.last_result.get(DIVERGED)
        if spec.name not in self.ended:
            ended = Finished(spec, self.keys[spec.name], max(self.reports[spec.name], default=0), diverged)
            mark_ended(ended)
            self.ended[spec.name] = ended
            self._end(spec, failed=diverged is not None)

    def on_trial_error(self, trial: Trial, **info: Any) -> None:
        """Close the trial's MLflow run as failed."""
        self._end(_spec(trial), failed=True)

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

    def _end(self, spec: TrialSpec, failed: bool) -> None:
        reports = [*self.reports[spec.name].values()]
        self.log.write(spec, reports, "FAILED" if failed else "FINISHED")
        self.bars.end(spec.name, reports[-1] if reports else None, failed)


def _spec(trial: Trial) -> TrialSpec:
    return TrialSpec(**trial.config["trial"]["spec"])
