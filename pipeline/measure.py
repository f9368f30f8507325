"""One method on one class split's test groups: what a Ray task of `baselines` does."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from dataclasses import asdict
from typing import Any

import pandas as pd
import torch

from pipeline.bench import Bench, open_bench, progress
from pipeline.experiment import CODE, TRAINING_CODE, VALIDATION_CODE, code_files, method_files
from pipeline.params import Params
from pipeline.stage import STORE, TEST_STORE, group_folder, split_model
from pudnet.baselines import LEARNED, SCRATCH, Scratch, load_method
from pudnet.cpu import compiling_pays
from pudnet.evaluation import (
    FROM,
    Adapts,
    group_sketches,
    shuffled,
    timed_adaptation,
    twin_accuracy,
)
from pudnet.predictor import Predictor

OF_PUDNET = ("constant_sketch", "shuffled_sketch")  # controls that are PudNet's own weights, and no adaptation
WARM_UP = 2  # adaptations before the first that is timed


def measure(folder: str, params: Params, method: str, seed: int, cell: dict[str, Any]) -> pd.DataFrame:
    """One row a test group, as `Bench.accuracies` gives them; training from scratch: one a number of epochs too."""
    os.chdir(folder)  # a worker starts elsewhere
    torch.set_num_threads(params.resources.cpus)
    torch.manual_seed(seed)
    if method in SCRATCH:
        return _scratch(open_bench(params, seed, _fewer(params)), params, method, cell)
    bench = open_bench(params, seed, params.baselines.test_groups)
    if method in OF_PUDNET:
        sketches = {"constant_sketch": _constant, "shuffled_sketch": _shuffled}[method]
        predictor = bench.load(split_model("pudnet", seed))
        return bench.accuracies(method, predictor, sketches(bench, predictor, params))
    return bench.accuracies(method, open_method(bench, method))


def time_methods(folder: str, params: Params, methods: list[str]) -> dict[str, float]:
    """Median milliseconds that each method takes for a group of the first split, in turns in one process."""
    os.chdir(folder)
    torch.set_num_threads(params.resources.cpus)
    bench = open_bench(params, params.seed, params.evaluate.timing_groups)
    opened = {method: open_method(bench, method) for method in methods}
    rows = []
    for g, group in enumerate([*bench.tables["test"][:WARM_UP, FROM], *bench.tables["test"][:, FROM]]):
        times = {name: timed_adaptation(own, bench.images, group, bench.bf16)[1] for name, own in opened.items()}
        rows += [times] if g >= WARM_UP else []
    return pd.DataFrame(rows).median().to_dict()


def open_method(bench: Bench, method: str) -> Adapts:
    """A method that adapts, trained where it has to be."""
    if method in LEARNED:
        return load_method(split_model(method, bench.seed), bench.images.device, bench.target)
    if method == "random_weights":
        card = bench.load(split_model("pudnet", bench.seed)).card
        plain = dataclasses.replace(card, kind="static_trunk", model=None, provenance={})
        torch.manual_seed(bench.seed)
        return Predictor.from_card(plain, bench.target, bench.images.device)
    return bench.load(split_model(method, bench.seed))


def measure_key(params: Params, method: str, seed: int, cell: dict[str, Any]) -> str:
    """A hash of all that `measure` depends on."""
    own = {name: getattr(params.baselines, name) for name in ("test_groups", "sketch_groups")}
    if method in SCRATCH:
        own = {name: getattr(params.baselines, name) for name in ("scratch_groups", "scratch_epochs")} | {"cell": cell}
    plain = [method, seed, params.target, params.train.support_per_class, asdict(params.evaluate), own]
    digest = hashlib.sha256(repr(plain).encode())
    models = [split_model("pudnet", seed), split_model(method, seed)]
    data = [STORE / "meta.json", TEST_STORE / "meta.json", *sorted(group_folder(seed).iterdir())]
    code = code_files(TRAINING_CODE + VALIDATION_CODE) + method_files(method, params.target)
    code += [CODE / "pipeline" / name for name in ("bench.py", "measure.py")]
    for path in [*models, *data, *code]:
        digest.update(path.read_bytes() if path.is_file() else b"")
    return f"{method}-split{seed}-{digest.hexdigest()[:12]}"


def _fewer(params: Params) -> int:
    return min(params.baselines.scratch_groups, params.baselines.test_groups or params.groups.test_groups)


def _constant(bench: Bench, predictor: Predictor, params: Params) -> list[torch.Tensor]:
    """For every test group the mean sketch of training groups."""
    groups = bench.tables["train"][: params.baselines.sketch_groups]
    constant = torch.stack(group_sketches(predictor, bench.train_images, groups, bench.bf16)).mean(0)
    return [constant] * len(bench.tables["test"])


def _shuffled(bench: Bench, predictor: Predictor, params: Params) -> list[torch.Tensor]:
    """For every test group the sketch of another one, of other classes."""
    groups = bench.tables["test"][:, FROM]
    sketches = group_sketches(predictor, bench.images, groups, bench.bf16)
    return shuffled(sketches, [bench.images.block_classes(group).tolist() for group in groups])


def _scratch(bench: Bench, params: Params, method: str, cell: dict[str, Any]) -> pd.DataFrame:
    """A row a test group and number of epochs, with what the training took, and a prediction of PudNet beside it."""
    predictor = bench.load(split_model("pudnet", bench.seed))
    base, _ = params.baseline(method, cell)
    runs = {epochs: dataclasses.replace(base, epochs=epochs) for epochs in params.baselines.scratch_epochs}
    table, rows, device = bench.tables["test"], [], bench.images.device
    epochs_in_all = len(table) * sum(runs)
    compiled = device.type == "cpu" and compiling_pays(epochs_in_all, table.shape[2], bench.images.image_size)
    opened = {
        epochs: Scratch(config, predictor.target, device, bench.bf16, method == "scratch_gc", compiled)
        for epochs, config in runs.items()
    }
    for adapts in (predictor, opened[min(opened)]):
        for _ in range(WARM_UP):
            timed_adaptation(adapts, bench.images, table[0, FROM], bench.bf16)
    with progress(f"{method}, split {bench.seed}", len(table)) as advance:
        for g, (group, twin) in enumerate(table):
            _, of_pudnet = timed_adaptation(predictor, bench.images, group, bench.bf16)
            for epochs, scratch in opened.items():
                torch.manual_seed(bench.seed * len(table) + g)  # a group's result does not depend on the others
                adapted, elapsed = timed_adaptation(scratch, bench.images, group, bench.bf16)
                accuracy = twin_accuracy(adapted, bench.images, twin, bench.bf16)
                rows.append((f"{method}_{epochs}", bench.seed, g, "; ".join(bench.names(group)), accuracy))
                rows[-1] += (epochs, elapsed, of_pudnet)
            advance(g + 1)
    columns = ["method", "split_seed", "group", "classes", "accuracy", "epochs", "elapsed_ms", "pudnet_ms"]
    return pd.DataFrame(rows, columns=columns)
