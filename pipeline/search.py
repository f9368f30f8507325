"""Stage `search`: trains every cell of the grid with Ray Tune, and picks the one with the best validation accuracy."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd
import yaml

from pipeline.made_for import check_groups
from pipeline.params import Params
from pipeline.project import RESULTS, write
from pipeline.runs import cluster
from pipeline.runs.executor import Experiment, run_missing
from pipeline.runs.parents import close_search, closed_if_failed
from pipeline.runs.trial import TrialSpec, make_spec
from pipeline.runs.trial_folder import Finished
from pipeline.stage import run_stage
from pipeline.tracking.runs import open_tracking
from pudnet.errors import RunFailed


def search(params: Params, fresh: bool = False) -> None:
    """Train every cell of the grid on every class split; write results/search.csv and results/best.yaml."""
    check_groups(params)
    tracking = open_tracking(params, "search")
    cells, groups = params.grid(), params.groups.search_groups
    print(f"search: {len(cells)} trials of {groups} groups on each of {params.splits} class splits")
    if left := [key for key in params.search.space if key not in cells[0]]:
        print(f"search: {params.variant} sets {', '.join(left)} itself; not searched")
    rows, best = [], {}
    with cluster.session():
        for seed in params.split_seeds:
            specs = [_spec(params, cell, seed) for cell in cells]
            experiment = Experiment(f"search-split{seed}", specs, params.search.asha, keep_going=True)
            with closed_if_failed(tracking, experiment, experiment.stage):
                finished = run_missing(experiment, params, tracking, experiment.stage, fresh)
                if not finished:
                    raise RunFailed(f"search: no trial of split {seed} ended well; change search.space or train")
            rows += [_row(trial) for trial in finished]
            best[seed] = _best(finished, params)
            tracking.submit(partial(close_search, tracking, experiment, params, seed, best[seed]))
    write(RESULTS / "search.csv", pd.DataFrame(rows).to_csv(index=False, float_format="%.6g"))
    write(RESULTS / "best.yaml", yaml.safe_dump({"splits": best}, sort_keys=False))
    for seed, cell in best.items():
        values = ", ".join(f"{key} {value}" for key, value in cell.items() if key != "accuracy")
        print(f"search: best of split {seed}: {cell['accuracy']:.2f} % on validation groups{values and ': '}{values}")


def _spec(params: Params, cell: dict[str, Any], split_seed: int) -> TrialSpec:
    name = "-".join([f"split{split_seed}", *(f"{key}{value}" for key, value in cell.items())])
    spec = make_spec(params, name, "pudnet", split_seed, cell, "search_train", params.groups.validation_groups)
    return replace(spec, train={**spec.train, "report_every": params.search.report_every})


def _row(trial: Finished) -> dict[str, Any]:
    return {
        "split_seed": trial.spec.split_seed,
        **trial.spec.cell,
        "groups": trial.metrics["groups"],
        "accuracy": trial.metrics["validation_accuracy"],
        "ci95": trial.metrics["validation_ci95"],
        "loss": trial.metrics["loss"],
    }


def _best(trials: list[Finished], params: Params) -> dict[str, Any]:
    """The cell with the highest validation accuracy, and that accuracy; among equals, the first in the grid.

    With `train.patience`, `passes` says how often the groups were passed until then.
    """
    best = max(trials, key=lambda trial: trial.metrics["validation_accuracy"])
    passes = best.passes(params.groups.search_groups)
    return {**best.spec.cell, **passes, "accuracy": best.metrics["validation_accuracy"]}


if __name__ == "__main__":
    run_stage(search, resumes=True)
