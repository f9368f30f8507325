"""What Ray runs for one trial: it trains on from the newest whole checkpoint in the trial's own folder.

The folder is named by the trial's key and lies on storage that all nodes share, so that it does not matter which
process trained before, nor where. A checkpoint holds the trial's state and all of its reports so far. Ray is told the
reports, and never gets a checkpoint.
"""

from __future__ import annotations

import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.runs.trial import (
    DIVERGED,
    STATE,
    FromScratch,
    MetaTraining,
    TrialSpec,
    load_state,
    open_trial,
    own_device,
)
from pudnet.errors import RunFailed, is_out_of_memory
from pudnet.files import replacing

REPORTS = "reports"  # in a checkpoint, beside the trial's state
AT = "reported_at"  # in a report: the time, in seconds
REPLAYED = "replayed"  # in a report: it was made before this process began
SYSTEM = ("system/cpu_cores_used", "system/peak_memory_megabytes", "system/gpu_peak_memory_megabytes")
NOTE = "note"  # a report with only this key is a message to print

Report = Callable[[dict[str, Any]], None]


def run_trial(config: dict[str, Any]) -> None:
    """Ray Tune's trainable: repeat the reports of before, then train on, in this process or in several workers."""
    from ray import tune

    trial = config["trial"]
    checkpoint, reports = _newest(Path(trial["folder"]), tune.report)
    for report in reports:
        tune.report(report | {REPLAYED: True})
    if trial["ended"]:  # it is here for the scheduler to compare others with
        return
    if reports:
        tune.report({NOTE: f"goes on from group {reports[-1]['groups']}"})
    if config["workers"] == 1:
        _train(config, checkpoint, tune.report)
    else:
        _train_by_workers(config, checkpoint)


def _newest(trial_folder: Path, report: Report) -> tuple[Path | None, list[dict[str, Any]]]:
    """The newest checkpoint that is whole, None where there is none, and the reports in it."""
    for file in sorted(trial_folder.glob(f"*/{STATE}"), reverse=True):
        try:
            return file.parent, load_state(file.parent)[REPORTS]
        except Exception as error:  # a damaged file can fail in nearly every way
            if is_out_of_memory(error):
                raise
            report({NOTE: f"checkpoint {file.parent.name} is damaged; it goes on from what was before"})
    return None, []


def checkpoint_folder(trial_folder: Path, groups: int) -> Path:
    """Where the checkpoint after so many groups lies."""
    return trial_folder / f"{groups:09}"


def _save(trial_folder: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint, whole or not at all, and delete all older checkpoints except the most recent one."""
    own = checkpoint_folder(trial_folder, state[REPORTS][-1]["groups"])
    with replacing(own / STATE) as path, path.open("wb") as file:  # given a path, torch.save hides a full disk
        torch.save(state, file)
    for before in sorted(file.parent for file in trial_folder.glob(f"*/{STATE}") if file.parent.name < own.name)[:-1]:
        shutil.rmtree(before, ignore_errors=True)


def _train(config: Mapping[str, Any], checkpoint: Path | None, report: Report, rank: int = 0, workers: int = 1) -> None:
    """Train from a checkpoint, or from the beginning, to the end. Of several workers the first writes checkpoints."""
    spec, device = TrialSpec(**config["trial"]["spec"]), own_device(config)
    trial = open_trial(spec, device) if workers == 1 else MetaTraining(spec, device, rank, workers)
    reports, usage = _resume(trial, checkpoint) if checkpoint else [], Usage()
    try:
        for metrics in trial.run():
            reports.append(metrics | {AT: time.time()} | usage.since_last())
            if rank == 0:
                _save(Path(config["trial"]["folder"]), trial.state_dict() | {REPORTS: reports})
            report(reports[-1])
    except RunFailed as error:  # the loss does not stay finite; it would not another time, so this is no failure to Ray
        report({DIVERGED: str(error)})


class Usage:
    """What this process uses, as MLflow's "System metrics" show it; the peaks are since the process began."""

    def __init__(self) -> None:
        self.at = time.process_time(), time.monotonic()

    def since_last(self) -> dict[str, float]:
        """The numbers of `SYSTEM`, of the GPU only where one is used."""
        before, self.at = self.at, (time.process_time(), time.monotonic())
        cores = (self.at[0] - before[0]) / max(self.at[1] - before[1], 1e-3)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux gives KiB
        gpu = [torch.cuda.max_memory_allocated() / 2**20] if torch.cuda.is_initialized() else []
        return dict(zip(SYSTEM, (cores, memory, *gpu), strict=False))


def _resume(trial: MetaTraining | FromScratch, checkpoint: Path) -> list[dict[str, Any]]:
    """Load a checkpoint; the reports in it."""
    state = load_state(checkpoint)
    trial.load_state_dict(state)
    return state[REPORTS]


def _train_by_workers(config: Mapping[str, Any], checkpoint: Path | None) -> None:
    """Train by Ray Train: several processes, each with a trial's share, split the groups of each step."""
    from ray import train
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    share = config["share"]
    with tempfile.TemporaryDirectory() as scratch:  # Ray Train's own notes, which nobody reads again
        TorchTrainer(
            _work,
            train_loop_config={**config, "checkpoint": checkpoint},
            scaling_config=train.ScalingConfig(
                num_workers=config["workers"],
                use_gpu=share["gpu"] > 0,
                resources_per_worker={"CPU": share["cpu"], "GPU": share["gpu"]},
            ),
            run_config=train.RunConfig(storage_path=scratch, callbacks=[TuneReportCallback()]),
        ).fit()


def _work(config: dict[str, Any]) -> None:
    """One worker of Ray Train."""
    from ray import train

    context = train.get_context()
    _train(config, config["checkpoint"], train.report, context.get_world_rank(), context.get_world_size())
