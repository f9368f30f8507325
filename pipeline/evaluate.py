"""Stage `evaluate`: predicts weights for every test group, and measures their accuracy and the time it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.entities import DatasetInput

from pipeline.params import Params
from pipeline.project import RESULTS, split_model, write, write_json
from pipeline.runs.bench import Bench, identity, open_bench, summary
from pipeline.stage import run_stage
from pipeline.tracking.datasets import test_sets
from pipeline.tracking.runs import Tracking, open_tracking
from pudnet.data.store import whole_folder
from pudnet.evaluation import FROM, adapt_input, time_prediction
from pudnet.predictor import Predictor

WEIGHTS = RESULTS / "weights"


def evaluate(params: Params) -> None:
    """Write results/metrics.json, timing.json, pudnet.csv and the kept weights; log them as one MLflow run."""
    opened = [open_bench(params, seed) for seed in params.split_seeds]
    predictors = [bench.load(split_model("pudnet", bench.seed)) for bench in opened]
    pairs = list(zip(opened, predictors, strict=True))
    frame = pd.concat([bench.accuracies("pudnet", predictor) for bench, predictor in pairs], ignore_index=True)
    with whole_folder(WEIGHTS) as folder:
        for bench, predictor in pairs:
            _keep_weights(bench, predictor, params.evaluate.keep_weights, folder)
    groups = opened[0].tables["test"][: params.evaluate.timing_groups, FROM]
    timing = asdict(time_prediction(predictors[0], opened[0].images, groups, opened[0].bf16))
    metrics = _metrics(params, frame, pairs)
    write(RESULTS / "pudnet.csv", frame.to_csv(index=False, float_format="%.4f"))
    write_json(RESULTS / "timing.json", timing)
    write_json(RESULTS / "metrics.json", metrics)
    tracking = open_tracking(params, "evaluate")
    tested = test_sets(params)
    tracking.submit(lambda: _log(tracking, params, metrics, timing, tested))
    print(f"evaluate: {metrics['accuracy']:.2f} +/- {metrics['ci95']:.2f} % over {len(frame)} test groups")
    print(
        f"evaluate: prediction {timing['total_ms']:.1f} ms, one epoch from scratch {timing['epoch_ratio']:.1f} x that"
    )


def _keep_weights(bench: Bench, predictor: Predictor, count: int, folder: Path) -> None:
    """Write the predicted networks of the first `count` test groups, in fp32."""
    for g, group in enumerate(bench.tables["test"][:count, FROM]):
        network = predictor.adapt(*adapt_input(predictor, bench.images, group), tuple(bench.names(group)))
        provenance = {**predictor.card.provenance, "split_seed": bench.seed, "group": g}
        network.card = dataclasses.replace(network.card, provenance=provenance)
        network.save(folder / f"split-{bench.seed}" / f"group-{g:03}.safetensors")


def _metrics(params: Params, frame: pd.DataFrame, pairs: list[tuple[Bench, Predictor]]) -> dict[str, Any]:
    """The headline accuracy, and each split's classes and groups. Times are left out, since they vary between runs."""
    metrics = {"setting": params.setting, "target": params.target, "variant": params.variant, **summary(frame)}
    metrics["train_groups"] = params.groups.train_groups
    for bench, predictor in pairs:
        model = predictor.card.model
        searched = {key: model[key] for key in ("eta", "depth")} if model["change"] else {}  # else they have no effect
        metrics["splits"][str(bench.seed)] |= searched | {
            "test_groups": len(bench.tables["test"]),
            "test_classes": [bench.class_names[c] for c in bench.split.test_classes],
            "train_classes": [bench.train_class_names[c] for c in bench.split.train_classes],
        }
    return metrics


def _log(
    tracking: Tracking,
    params: Params,
    metrics: dict[str, Any],
    timing: dict[str, Any],
    tested: Sequence[DatasetInput],
) -> None:
    run_id = tracking.find_or_create(f"evaluate/{identity(params)}", f"evaluate-{params.variant}")
    note = (
        f"Test of `{params.variant}`: it predicts a network for each of {metrics['test_groups']:,} test groups, whose "
        f"classes no training has seen: {metrics['accuracy']:.2f} ± {metrics['ci95']:.2f} % accuracy on other images "
        "of these classes. Artifacts: `report.html` (the page of all stages), `plots` (figures, predicted filters), "
        "`weights` (predicted networks)."
    )
    plain = {"splits": params.splits, "seed": params.seed, **asdict(params.groups)}
    tracking.describe(run_id, note, plain, tested)
    numbers = {"test_accuracy": metrics["accuracy"], "test_ci95": metrics["ci95"]}
    numbers |= {f"test_accuracy_split_{seed}": part["accuracy"] for seed, part in metrics["splits"].items()}
    tracking.log_metrics(run_id, numbers | {k: v for k, v in timing.items() if k.endswith(("_ms", "_ratio"))})
    for name in ("pudnet.csv", "metrics.json", "timing.json"):
        tracking.client.log_artifact(run_id, str(RESULTS / name))
    tracking.client.log_artifacts(run_id, str(WEIGHTS), "weights")
    if Path("dvc.lock").is_file():
        tracking.client.log_artifact(run_id, "dvc.lock")
    tracking.finish(run_id)


if __name__ == "__main__":
    run_stage(evaluate)
