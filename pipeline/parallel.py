"""One training by several workers, each with a trial's share, by Ray Train: they split the groups of each step.

The trial is still one of Ray Tune's, and reports as any other; it only drives the workers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ray.tune import Checkpoint

from pipeline.trial import DIVERGED, STATE, MetaTraining, TrialSpec, load_state, own_device
from pudnet.errors import RunFailed

WORKERS = "-workers"  # after a trial's name, the folder of its workers' checkpoints


def run_parallel(config: dict[str, Any]) -> None:
    """Ray Tune's trainable for a training by `workers` workers. They go on from their last checkpoint."""
    from ray import train
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    share = config["share"]
    TorchTrainer(
        _work,
        train_loop_config=config,
        scaling_config=train.ScalingConfig(
            num_workers=config["workers"],
            use_gpu=share["gpu"] > 0,
            resources_per_worker={"CPU": share["cpu"], "GPU": share["gpu"]},
        ),
        run_config=train.RunConfig(
            name=f"{config['spec']['name']}{WORKERS}",
            storage_path=config["storage"],
            callbacks=[TuneReportCallback()],
            checkpoint_config=train.CheckpointConfig(num_to_keep=2),
        ),
    ).fit()


def checkpoint_folder(checkpoint: Checkpoint | None, result: Mapping[str, Any]) -> Path:
    """Where a trial's last checkpoint lies: Tune knows its own; of workers' it is told the path alone."""
    from ray.tune.integration.ray_train import CHECKPOINT_PATH_KEY

    return Path(checkpoint.path if checkpoint else result[CHECKPOINT_PATH_KEY])


def _work(config: dict[str, Any]) -> None:
    """One worker. All report, so that they keep step; the first gives the checkpoint."""
    from ray import train

    context, device = train.get_context(), own_device(config)
    rank = context.get_world_rank()
    trial = MetaTraining(TrialSpec(**config["spec"]), device, rank, context.get_world_size())
    if checkpoint := train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            trial.load_state_dict(load_state(Path(folder)))
    try:
        for metrics in trial.run():
            with tempfile.TemporaryDirectory() as folder:
                if rank == 0:
                    torch.save(trial.state_dict(), Path(folder) / STATE)
                train.report(metrics, checkpoint=train.Checkpoint.from_directory(folder) if rank == 0 else None)
    except RunFailed as error:
        train.report({DIVERGED: str(error)})
