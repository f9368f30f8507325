"""Stage `evaluate`: predicts weights for every test group, and measures their accuracy and the time it takes."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.made_for import check_groups
from pipeline.params import Params
from pipeline.project import RESULTS, WEIGHTS, split_model, write, write_json
from pipeline.runs.class_split import Bench, open_benches
from pipeline.runs.summary import summary
from pipeline.stage import run_stage
from pipeline.tracking.evaluation import log_evaluation
from pipeline.tracking.runs import open_tracking
from pudnet.data.store import whole_folder
from pudnet.evaluation import FROM, adapt_input, time_prediction
from pudnet.predictor import Predictor


def evaluate(params: Params) -> None:
    """Write results/metrics.json, timing.json, pudnet.csv and the kept weights; log them as one MLflow run."""
    check_groups(params)
    opened = open_benches(params, params.split_seeds)
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
    tracking.submit(lambda: log_evaluation(tracking, params, metrics, timing))
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
    metrics["passes"] = float(np.mean([predictor.card.provenance.get("passes", 1) for _, predictor in pairs]))
    for bench, predictor in pairs:
        model = predictor.card.model
        searched = {key: model[key] for key in ("eta", "depth")} if model["change"] else {}  # else they have no effect
        metrics["splits"][str(bench.seed)] |= searched | {
            "test_groups": len(bench.tables["test"]),
            "test_classes": [bench.class_names[c] for c in bench.split.test_classes],
            "train_classes": [bench.train_class_names[c] for c in bench.split.train_classes],
        }
    return metrics


if __name__ == "__main__":
    run_stage(evaluate)
