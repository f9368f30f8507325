"""One training by several workers, each with a trial's share, by Ray Train: they split the groups of each step.

The trial is still one of Ray Tune's, and reports as any other; it only drives the workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.tune import Checkpoint

from pipeline.trial import MetaTraining, TrialSpec, own_device, report_all

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
    """One worker. The first saves the checkpoints."""
    from ray import train

    context = train.get_context()
    rank = context.get_world_rank()
    trial = MetaTraining(TrialSpec(**config["spec"]), own_device(config), rank, context.get_world_size())
    report_all(trial, train, saves=rank == 0)
