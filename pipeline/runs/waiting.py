"""Says that no trial is at work, since a node that has room for one may have been lost."""

from __future__ import annotations

import time
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial

from pipeline.params import Params
from pipeline.runs import cluster


class WaitingNotice(Callback):
    """Prints once that trials wait for resources."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self._is_at_work()

    def on_trial_result(self, **info: Any) -> None:
        """Note that a trial is at work."""
        self._is_at_work()

    def on_step_end(self, trials: list[Trial], **info: Any) -> None:
        """Print it after `cluster.PATIENCE` seconds. Raises `RunFailed` if this machine's own Ray has died."""
        workers, share = trials[0].config["workers"], trials[0].config["share"]
        if workers == 1 and any(trial.status == Trial.RUNNING for trial in trials):
            self._is_at_work()
        elif time.monotonic() - self.at_work > cluster.PATIENCE:
            cluster.check_alive()
            if workers > 1 and cluster.has_room(self.params, workers):  # the process that starts them always runs
                self._is_at_work()
            elif not self.said:
                each = f" for each of {workers} workers" if workers > 1 else ""
                wanted = f"{cluster.in_words(share)} free{each}"
                print(f"  no trial is at work; waiting for a node with {wanted}", flush=True)
                self.said = True

    def _is_at_work(self) -> None:
        self.at_work, self.said = time.monotonic(), False
