"""Stage `baselines`: what PudNet is measured against, on the same groups and by the same evaluator."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from pipeline import cluster
from pipeline.bench import Bench, identity, open_bench, summary
from pipeline.final import read_best, train_all, write_curves
from pipeline.params import Params
from pipeline.stage import RESULTS, run_stage, split_model, wants_fresh, write, write_json
from pipeline.tracking import open_tracking
from pudnet.evaluation import FROM, group_sketches, shuffled
from pudnet.predictor import Predictor

# isort: split
import ray  # after cluster, which sets its environment


def baselines(params: Params) -> None:
    """Write results/accuracies.csv (all methods, PudNet's rows first), baselines.json and loss_curves.csv."""
    fresh, curves = wants_fresh(), [pd.read_csv(RESULTS / "train_curves.csv")]
    pudnet = pd.read_csv(RESULTS / "pudnet.csv")
    methods = _possible(params)
    with cluster.session():
        if "static_trunk" in methods:
            curves.append(train_all(params, "static_trunk", read_best(), fresh))
        frame = pd.concat([pudnet, *_measure_all(params, methods)], ignore_index=True)
    compared = {method: _compare(frame, pudnet, method) for method in methods}
    write(RESULTS / "accuracies.csv", frame.to_csv(index=False, float_format="%.4f"))
    write(RESULTS / "loss_curves.csv", write_curves(pd.concat(curves, ignore_index=True)))
    write_json(RESULTS / "baselines.json", {"methods": compared})
    _log(params, compared)
    for method, numbers in compared.items():
        print(
            f"baselines: {method}: {numbers['accuracy']:.2f} +/- {numbers['ci95']:.2f} %, "
            f"{numbers['difference']:+.2f} +/- {numbers['difference_ci95']:.2f} to pudnet"
        )


def _measure_all(params: Params, methods: list[str]) -> list[pd.DataFrame]:
    """Every method on every class split, side by side as Ray tasks."""
    folder, resources = str(Path.cwd()), cluster.share(params)
    measure = ray.remote(num_cpus=resources["cpu"], num_gpus=resources["gpu"])(_measure)
    jobs = [measure.remote(folder, params, method, seed) for method in methods for seed in params.split_seeds]
    waiting = list(jobs)
    while waiting:
        (job,), waiting = ray.wait(waiting)
        done: pd.DataFrame = ray.get(job)
        print(f"  {done.method[0]}, split {done.split_seed[0]}: {len(done)} test groups done", flush=True)
    return ray.get(jobs)


def _measure(folder: str, params: Params, method: str, seed: int) -> pd.DataFrame:
    os.chdir(folder)  # a worker starts elsewhere
    torch.set_num_threads(params.resources.cpus)
    return METHODS[method](open_bench(params, seed, params.baselines.test_groups), params)


def _possible(params: Params) -> list[str]:
    """The methods asked for, less the shuffled sketch where there is no other group to take it from."""
    if params.groups.test_groups > 1 and params.baselines.test_groups != 1:
        return list(params.baselines.methods)
    print("baselines: shuffled_sketch is left out: there is one test group")
    return [method for method in params.baselines.methods if method != "shuffled_sketch"]


def static_trunk(bench: Bench, params: Params) -> pd.DataFrame:
    """One trunk for all groups, trained with the same losses on the same groups."""
    predictor = bench.load(split_model("static_trunk", bench.seed))
    return bench.accuracies("static_trunk", predictor)


def constant_sketch(bench: Bench, params: Params) -> pd.DataFrame:
    """The trained PudNet, given the mean sketch of training groups in place of the group's own."""
    predictor = bench.load(split_model("pudnet", bench.seed))
    groups = bench.tables["train"][: params.baselines.sketch_groups]
    constant = torch.stack(group_sketches(predictor, bench.train_images, groups, bench.bf16)).mean(0)
    return bench.accuracies("constant_sketch", predictor, [constant] * len(bench.tables["test"]))


def shuffled_sketch(bench: Bench, params: Params) -> pd.DataFrame:
    """The trained PudNet, given the sketch of another test group, of other classes."""
    predictor = bench.load(split_model("pudnet", bench.seed))
    groups = bench.tables["test"][:, FROM]
    sketches = group_sketches(predictor, bench.images, groups, bench.bf16)
    others = shuffled(sketches, [bench.images.block_classes(group).tolist() for group in groups])
    return bench.accuracies("shuffled_sketch", predictor, others)


def random_weights(bench: Bench, params: Params) -> pd.DataFrame:
    """The target as He initialisation leaves it, calibrated on the group like every other."""
    card = bench.load(split_model("pudnet", bench.seed)).card
    torch.manual_seed(bench.seed)
    plain = dataclasses.replace(card, kind="static_trunk", model=None, provenance={})
    return bench.accuracies("random_weights", Predictor.from_card(plain, bench.target, bench.images.device))


METHODS: dict[str, Callable[[Bench, Params], pd.DataFrame]] = {
    method.__name__: method for method in (static_trunk, constant_sketch, shuffled_sketch, random_weights)
}


def _compare(frame: pd.DataFrame, pudnet: pd.DataFrame, method: str) -> dict[str, Any]:
    """A method's accuracy, and its difference to PudNet paired over the same test groups."""
    own = frame[frame.method == method]
    paired = own.merge(pudnet, on=["split_seed", "group"], suffixes=("", "_pudnet"), validate="one_to_one")
    paired["difference"] = paired.accuracy - paired.accuracy_pudnet
    difference = summary(paired, "difference")
    return {**summary(own), "difference": difference["accuracy"], "difference_ci95": difference["ci95"]}


def _log(params: Params, compared: dict[str, Any]) -> None:
    """An MLflow run with every method's figures and the table behind them."""
    tracking = open_tracking(params)
    run_id = tracking.find_or_create(f"baselines/{identity(params)}", f"baselines-{params.variant}")
    tracking.log_params(run_id, {"splits": params.splits, "seed": params.seed, **asdict(params.groups)})
    for method, numbers in compared.items():
        metrics = {f"{method}_{name}": numbers[name] for name in ("accuracy", "ci95", "difference", "difference_ci95")}
        tracking.log_metrics(run_id, metrics)
    tracking.client.log_artifact(run_id, str(RESULTS / "accuracies.csv"))
    tracking.client.log_artifact(run_id, str(RESULTS / "baselines.json"))
    tracking.finish(run_id)


if __name__ == "__main__":
    run_stage(baselines)
