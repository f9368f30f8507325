"""What the stages `evaluate`, `baselines` and `report` log to MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.digests import digest, model_key
from pipeline.params import Params
from pipeline.project import RESULTS, WEIGHTS, group_folder, split_model
from pipeline.tracking.datasets import test_sets
from pipeline.tracking.runs import Tracking
from pudnet.baselines import SCRATCH


def evaluation_run(tracking: Tracking, params: Params) -> str:
    """Find or create the run; its id. A repeated evaluation continues its run."""
    return tracking.find_or_create(f"evaluate/{_identity(params)}", f"evaluate-{params.variant}")


def _identity(params: Params) -> str:
    """A hash of the models, the test groups and the params."""
    models = [model_key(split_model("pudnet", seed)) for seed in params.split_seeds]
    plain = [params.setting, params.target, params.variant, asdict(params.evaluate), models]
    return digest(plain, [group_folder(seed) / "test.npy" for seed in params.split_seeds])


def log_evaluation(tracking: Tracking, params: Params, metrics: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
    """Log an evaluation: its metrics and times, its tables and the kept weights."""
    run_id = evaluation_run(tracking, params)
    note = (
        f"Test of `{params.variant}`: it predicts a network for each of {metrics['test_groups']:,} test groups, whose "
        "classes no training has seen, and measures its accuracy on other images of these classes. Artifacts: "
        "`report.html` (the page of all stages), `plots` (figures, predicted filters), `weights` (predicted networks)."
    )
    plain = {"splits": params.splits, "seed": params.seed, **asdict(params.groups)}
    tracking.describe(run_id, note, plain, test_sets(params))
    numbers = {"test_accuracy": metrics["accuracy"], "test_ci95": metrics["ci95"]}
    numbers |= {f"test_accuracy_split_{seed}": part["accuracy"] for seed, part in metrics["splits"].items()}
    tracking.log_metrics(run_id, numbers | {k: v for k, v in timing.items() if k.endswith(("_ms", "_ratio"))})
    for name in ("pudnet.csv", "metrics.json", "timing.json"):
        tracking.client.log_artifact(run_id, str(RESULTS / name))
    tracking.client.log_artifacts(run_id, str(WEIGHTS), "weights")
    if Path("dvc.lock").is_file():
        tracking.client.log_artifact(run_id, "dvc.lock")
    tracking.finish(run_id)


def log_report(tracking: Tracking, params: Params) -> None:
    """Log the page and its plots to the evaluation's run."""
    run_id = evaluation_run(tracking, params)
    tracking.client.log_artifact(run_id, str(RESULTS / "report.html"))
    tracking.client.log_artifacts(run_id, str(RESULTS / "plots"), "plots")
    tracking.finish(run_id)


def log_baseline(
    tracking: Tracking,
    params: Params,
    method: str,
    key: str,
    measured: pd.DataFrame,
    compared: Mapping[str, Any],
    times: Mapping[str, float],
    chosen: Mapping[str, str],
) -> None:
    """Log a method's MLflow run: its chosen cells, results and rows. From scratch, steps are numbers of epochs."""
    run_id = tracking.find_or_create(f"baselines/{method}/{key}", f"baseline-{method}")
    note = f"Test of `{method}` on the test groups of `{params.variant}`: accuracy, the difference to it, and the time"
    note += f" for a group.{' A step is a number of epochs.' if method in SCRATCH else ''}"
    plain = {"method": method, "splits": params.splits, "seed": params.seed, **chosen}
    groups = params.trained_test_groups if method in SCRATCH else params.baselines.test_groups
    tracking.describe(run_id, note, plain, test_sets(params, groups))
    epochs = {f"{method}_{count}": count for count in params.baselines.scratch_epochs} if method in SCRATCH else {}
    for name, step in (epochs or {method: 0}).items():
        numbers = compared[name]
        metrics = {"test_accuracy": numbers["accuracy"], "test_ci95": numbers["ci95"]}
        metrics |= {key: numbers[key] for key in ("difference", "difference_ci95")}
        metrics |= {f"test_accuracy_split_{seed}": part["accuracy"] for seed, part in numbers["splits"].items()}
        metrics |= {"adapt_ms": times[name]} if name in times else {}
        tracking.log_metrics(run_id, metrics, step)
    rows = measured[measured.method.isin(epochs or [method])]
    tracking.client.log_text(run_id, rows.to_csv(index=False, float_format="%.4f"), "accuracies.csv")
    tracking.finish(run_id)
