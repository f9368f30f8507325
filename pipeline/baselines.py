"""Stage `baselines`: tunes, trains and measures the methods that PudNet is compared with, on the same groups.

Every finished part is kept (in `.pud/`), so that the stage, run again, only does what is missing.
"""

from __future__ import annotations

from functools import partial

import pandas as pd

from pipeline.made_for import check_groups
from pipeline.params import UNTRAINED, Params
from pipeline.project import RESULTS, read_result, write, write_json
from pipeline.runs import cluster
from pipeline.runs.class_split import images_of_a_class
from pipeline.runs.final_training import curves_csv, train_baselines
from pipeline.runs.measurement import SKETCHES
from pipeline.runs.measuring import measure_all, time_all
from pipeline.runs.summary import compare
from pipeline.runs.tuning import named, tune
from pipeline.stage import run_stage
from pipeline.tracking.evaluation import log_baseline
from pipeline.tracking.runs import open_tracking
from pudnet.errors import UserError


def baselines(params: Params, fresh: bool = False) -> None:
    """Tune, train, measure and time every method; write the tables, and log one run for each method."""
    check_groups(params)
    trained = params.for_baselines(images_of_a_class(params))
    methods, tracking = _possible(params), open_tracking(params, "baselines")
    pudnet = read_result(RESULTS / "pudnet.csv", pd.read_csv, "evaluate")
    with cluster.session():
        tuning, choices = tune(trained, [m for m in methods if m not in UNTRAINED], tracking, fresh)
        curves = train_baselines(trained, methods, choices, fresh)
        measured, keys = measure_all(params, methods, choices, fresh)
        times = time_all(params, methods, choices)
    compared = {name: compare(rows, pudnet) for name, rows in measured.groupby("method", sort=False)}
    write(RESULTS / "accuracies.csv", pd.concat([pudnet, measured]).to_csv(index=False, float_format="%.4f"))
    write(RESULTS / "tuning.csv", tuning.to_csv(index=False, float_format="%.6g"))
    write(RESULTS / "loss_curves.csv", curves_csv(curves))
    write_json(RESULTS / "baselines.json", {"methods": compared})
    write_json(RESULTS / "adaptation.json", {"threads": params.resources.cpus, "milliseconds": times})
    for method, key in keys.items():
        own = {seed: cells for (name, seed), cells in choices.items() if name == method and any(cells)}
        chosen = {f"chosen_split_{seed}": "; ".join(map(named, cells)) for seed, cells in own.items()}
        tracking.submit(partial(log_baseline, tracking, params, method, key, measured, compared, times, chosen))
    for name, numbers in compared.items():
        print(
            f"baselines: {name}: {numbers['accuracy']:.2f} +/- {numbers['ci95']:.2f} %, "
            f"{numbers['difference']:+.2f} +/- {numbers['difference_ci95']:.2f} relative to pudnet"
        )


def _possible(params: Params) -> list[str]:
    """The methods to run: PudNet+ only beside another variant, the shuffled sketch only if another group has one."""
    methods, one = params.methods_beside, 1 in (params.groups.test_groups, params.baselines.test_groups)
    if one and "shuffled_sketch" in methods:
        print("baselines: shuffled_sketch is left out: there is one test group")
        methods.remove("shuffled_sketch")
    model, _ = params.configured({})
    if not model.makes_weights:
        methods = [method for method in methods if method not in SKETCHES]  # another sketch would change nothing
    if not methods:
        raise UserError("baselines.methods: no method is left; add another, or use more test groups")
    return methods


if __name__ == "__main__":
    run_stage(baselines, resumes=True)
