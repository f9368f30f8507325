"""MLflow's parent runs, whose children are the trials of a search or of the baselines' tuning."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from pipeline.params import Params
from pipeline.runs.executor import Experiment
from pipeline.runs.trial_log import datasets
from pipeline.tracking.runs import Tracking
from pudnet.errors import RunFailed


@contextlib.contextmanager
def closed_if_failed(tracking: Tracking, experiment: Experiment, name: str) -> Iterator[None]:
    """Mark the parent run of an experiment as failed if the block raises `RunFailed`."""
    try:
        yield
    except RunFailed:
        tracking.submit(lambda: tracking.finish(tracking.find_or_create(experiment.key, name), "FAILED"))
        raise


def close_search(
    tracking: Tracking, experiment: Experiment, params: Params, split_seed: int, best: dict[str, Any]
) -> None:
    """Log what a search chose for a split, and close its run."""
    run_id = tracking.find_or_create(experiment.key, experiment.stage)
    searched = [name for name in best if name != "accuracy"]
    chosen = ", ".join(f"{name} {best[name]}" for name in searched) or "nothing, as the grid has one cell"
    note = (
        f"Search over {' and '.join(searched) or 'nothing'} for class split {split_seed}: {len(experiment.specs)} "
        f"trial(s), this run's children, each trained on {params.groups.search_groups:,} task groups. Chosen by "
        f"accuracy on {params.groups.validation_groups} validation groups: {chosen} ({best['accuracy']:.2f} %)."
    )
    space = {
        f"space.{name}": values for name, values in params.search.space.items() if name in experiment.specs[0].cell
    }
    tracking.describe(run_id, note, space, datasets(experiment.specs[0]))
    tracking.log_metrics(run_id, {"best_validation_accuracy": best["accuracy"]})
    tracking.finish(run_id)


def close_tuning(tracking: Tracking, experiment: Experiment, params: Params, name: str) -> None:
    """Describe the run of the baselines' tuning, and close it."""
    run_id = tracking.find_or_create(experiment.key, name)
    note = (
        f"Tuning of the baselines: {len(experiment.specs)} trials, this run's children. For each method the cell with "
        f"the best accuracy on {params.groups.validation_groups} validation groups is chosen "
        f"(from scratch: on {params.baselines.scratch_search_groups})."
    )
    tracking.describe(run_id, note, {})
    tracking.finish(run_id)
