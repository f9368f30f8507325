"""What the driver does as trials report: it shows and logs the report, and notes at once that a trial has ended."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial

from pipeline.project import root
from pipeline.runs.display import TrialBars
from pipeline.runs.trainable import AT
from pipeline.runs.trial import DIVERGED, TrialSpec
from pipeline.runs.trial_folder import Finished, mark_ended
from pipeline.runs.trial_log import METRICS, TrialLog


class TrialProgress(Callback):
    """Prints and logs each report once, even if a resumed trial replays it, and notes which trials have ended.

    `keys`: trial name -> key.
    """

    def __init__(self, keys: Mapping[str, str], log: TrialLog) -> None:
        self.keys, self.log = keys, log
        self.ended: dict[str, Finished] = {}
        self.reports: dict[str, list[dict[str, Any]]] = {name: [] for name in keys}
        lines = root() / ".pud" / "log" / f"{time.strftime('%Y-%m-%d-%H%M%S')}.txt"
        self.bars = TrialBars(len(keys), self.ended, lines)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Ray pickles callbacks into a file that nobody reads."""
        return {}

    def on_trial_result(self, trial: Trial, result: dict[str, Any], **info: Any) -> None:
        """Print a line and log a step, unless that was done before."""
        spec, reports = _spec(trial), self.reports[_spec(trial).name]
        before = reports[-1] if reports else {"groups": 0, "rollbacks": 0}
        if spec.name in self.ended or result.get("groups", 0) <= before["groups"]:
            return
        if result["rollbacks"] > before["rollbacks"]:
            print(f"  {spec.name}: the loss was not finite; went on from the last good weights")
        self.bars.report(spec.name, result)
        reports.append({name: result[name] for name in ("groups", AT, *METRICS) if name in result})
        self.log.write(spec, reports)

    def on_trial_complete(self, trial: Trial, **info: Any) -> None:
        """Note the trial's end at once, whatever becomes of the others."""
        spec, diverged = _spec(trial), trial.last_result.get(DIVERGED)
        if spec.name not in self.ended:
            ended = Finished(spec, self.keys[spec.name], self.reports[spec.name], diverged)
            mark_ended(ended)
            self.ended[spec.name] = ended
            self._end(spec, failed=diverged is not None)

    def on_trial_error(self, trial: Trial, **info: Any) -> None:
        """Close the trial's MLflow run as failed."""
        self._end(_spec(trial), failed=True)

    def _end(self, spec: TrialSpec, failed: bool) -> None:
        self.log.write(spec, self.reports[spec.name], "FAILED" if failed else "FINISHED")
        self.bars.end(spec.name, self.reports[spec.name], failed)


def _spec(trial: Trial) -> TrialSpec:
    return TrialSpec(**trial.config["trial"]["spec"])
