"""What Ray runs for one trial: it trains on from the newest whole checkpoint in the trial's own folder.

Ray is told the reports, and never gets a checkpoint.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray import train, tune
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from pipeline.runs.trial import DIVERGED, TrialSpec, open_trial, own_device
from pipeline.runs.trial_folder import ENDED, REPORTS, newest_checkpoint, save_checkpoint
from pipeline.runs.usage import Usage
from pudnet.errors import RunFailed

AT = "reported_at"  # in a report: when it was made, in seconds since 1970
REPLAYED = "replayed"  # in a report: it was made before this process began


def run_trial(config: dict[str, Any]) -> None:
    """Ray Tune's trainable: repeat the checkpoint's reports, then train on, in this process or in several workers."""
    folder = Path(config["trial"]["folder"])
    state = newest_checkpoint(folder)
    for report in state[REPORTS]:
        tune.report(report | {REPLAYED: True})
    if (folder / ENDED).is_file():  # it only runs so that the scheduler can compare others with it
        return
    if config["workers"] == 1:
        _train(config, state, tune.report)
    else:
        _train_by_workers(config)


def _train(
    config: Mapping[str, Any],
    state: dict[str, Any],
    report: Callable[[dict[str, Any]], None],
    rank: int = 0,
    workers: int = 1,
) -> None:
    """Train on from a checkpoint's state to the end. Of several workers the first writes checkpoints."""
    trial = open_trial(TrialSpec(**config["trial"]["spec"]), own_device(config["share"]), rank, workers)
    if reports := state.pop(REPORTS):
        trial.load_state_dict(state)
    state.clear()  # free it, since the trial has copied all of it
    usage = Usage()
    try:
        for metrics in trial.run():
            reports.append(metrics | {AT: time.time()} | usage.since_last())
            if rank == 0:
                save_checkpoint(Path(config["trial"]["folder"]), trial.state_dict() | {REPORTS: reports})
            report(reports[-1])
    except RunFailed as error:  # the loss did not stay finite; Ray must not try again, so for Ray the trial ends well
        report({DIVERGED: str(error)})


def _train_by_workers(config: dict[str, Any]) -> None:
    """Train by Ray Train: several processes, each with a trial's share, split the groups of each step."""
    share = config["share"]
    with tempfile.TemporaryDirectory() as scratch:  # for Ray Train's own files; none is read again
        TorchTrainer(
            _run_worker,
            train_loop_config=config,
            scaling_config=train.ScalingConfig(
                num_workers=config["workers"],
                use_gpu=share["gpu"] > 0,
                resources_per_worker={"CPU": share["cpu"], "GPU": share["gpu"]},
            ),
            run_config=train.RunConfig(storage_path=scratch, callbacks=[TuneReportCallback()]),
        ).fit()


def _run_worker(config: dict[str, Any]) -> None:
    """Ray Train's training function, which each worker runs."""
    context, state = train.get_context(), newest_checkpoint(Path(config["trial"]["folder"]))
    _train(config, state, train.report, context.get_world_rank(), context.get_world_size())
