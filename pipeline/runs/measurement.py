"""What Ray runs for one measurement: it opens a class split and methods, and measures or times them on test groups."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch

from pipeline.digests import model_key
from pipeline.params import PLUS, Params
from pipeline.project import split_model
from pipeline.runs.class_split import Bench, open_bench
from pipeline.runs.keys import measurement_key
from pipeline.runs.trial import Cell, Choices, own_device, scratch_method
from pudnet.baselines import LEARNED, SCRATCH, Scratch, ScratchConfig, load_method
from pudnet.cpu import compiling_pays
from pudnet.evaluation import FROM, Adapts, group_sketches, shuffled, timed_adaptation
from pudnet.predictor import Predictor
from pudnet.targets import Target, build_target
from pudnet.training import group_seed

WARM_UP = 2  # adaptations that are not timed
SCRATCH_TIMINGS = 2  # groups that training from scratch is timed on, since it takes long and hardly varies


@dataclasses.dataclass(frozen=True)
class Job:
    """One task: measure a method on some test groups of a split (None: on all)."""

    method: str
    seed: int
    cells: tuple[Cell, ...] = dataclasses.field(hash=False)  # chosen by tuning
    groups: tuple[int, int] | None = None  # first group, and the first one after the last

    def key(self, params: Params) -> str:
        """A hash of everything that the job's accuracies depend on."""
        # From the labels of one class and of very many follow those of any number of classes.
        own = {"test_groups": params.baselines.test_groups, "labels": [params.labels(k) for k in (1, 10**9)]}
        if self.method == "constant_sketch":
            own |= {"sketch_groups": params.baselines.sketch_groups}
        if self.method in SCRATCH:
            own = {"epochs": params.baselines.scratch_epochs, "cells": self.cells, "groups": self.groups}
        plain = [params.train.precision, params.evaluate.precision, own]
        if self.method not in SCRATCH:
            needs_pudnet = self.method in SKETCHES or self.method == "random_weights"
            plain.append(model_key(split_model("pudnet" if needs_pudnet else self.method, self.seed)))
        key = measurement_key(self.method, params.target, self.seed, plain, [])
        return f"{self.method}-split{self.seed}-{key}"


def measure_job(folder: str, params: Params, job: Job) -> pd.DataFrame:
    """Measure one job: the rows of `Bench.accuracies`."""
    bench = open_in_task(folder, params, job.seed, params.baselines.test_groups)
    if job.method in SCRATCH:
        return trained_accuracies(bench, open_scratch(bench, params, job.method, job.cells), range(*job.groups))
    if job.method in SKETCHES:
        predictor = bench.load(split_model("pudnet", job.seed))
        return bench.accuracies(job.method, predictor, sketches=SKETCHES[job.method](bench, predictor, params))
    return bench.accuracies(job.method, open_method(bench, params, job.method))


def trained_accuracies(bench: Bench, methods: Mapping[str, Scratch], groups: range) -> pd.DataFrame:
    """Train by each method on one test group after the other, each group with its own seed."""
    rows = []
    for g in groups:
        for name, method in methods.items():
            torch.manual_seed(group_seed(bench.seed, g))
            rows.append(bench.accuracies(name, method, range(g, g + 1)))
    return pd.concat(rows, ignore_index=True)


def time_methods(folder: str, params: Params, methods: Sequence[str], choices: Choices) -> dict[str, float]:
    """Median milliseconds of adapting PudNet and each other method to a group of the first split, in turns."""
    bench = open_in_task(folder, params, params.seed, params.evaluate.timing_groups)
    opened = {m: open_method(bench, params, m) for m in ["pudnet", *methods] if m not in SCRATCH}
    for method in [m for m in methods if m in SCRATCH]:
        opened |= open_scratch(bench, params, method, choices[method, params.seed])
    return median_times(bench, opened)


def median_times(bench: Bench, methods: Mapping[str, Adapts]) -> dict[str, float]:
    """Median milliseconds of each method's adaptation to a test group, in turns."""
    groups = bench.tables["test"][:, FROM]
    long = {name: method for name, method in methods.items() if isinstance(method, Scratch)}
    short = {name: method for name, method in methods.items() if name not in long}
    warm_up = groups[:WARM_UP]
    times = _in_turns(bench, short, [*warm_up, *groups], len(warm_up))
    if long:
        fewest = min(scratch.config.epochs for scratch in long.values())
        _in_turns(bench, {name: one for name, one in long.items() if one.config.epochs == fewest}, groups[:1])
        times |= _in_turns(bench, long, groups[:SCRATCH_TIMINGS])
    return times


def _in_turns(
    bench: Bench, methods: Mapping[str, Adapts], groups: Sequence[np.ndarray], warm_up: int = 0
) -> dict[str, float]:
    """Adapt all methods to one group after the other -> each one's median time. The first `warm_up` are not counted."""
    rows = [
        {name: timed_adaptation(method, bench.images, group, bench.bf16)[1] for name, method in methods.items()}
        for group in groups
    ]
    return pd.DataFrame(rows[warm_up:]).median().to_dict()


def open_in_task(folder: str, params: Params, seed: int, test_groups: int | None) -> Bench:
    """Open a class split in a Ray task, on the task's share of the device, with so many test groups (None: all)."""
    os.chdir(folder)  # a Ray worker starts in another folder
    own_device({"cpu": params.resources.cpus, "gpu": params.resources.gpus})
    return open_bench(params, seed, test_groups)


def open_method(bench: Bench, params: Params, method: str) -> Adapts:
    """Open a method (trained, if it has to be) that needs no training on the group.

    It is given as many labels of a test group as the variant uses, whose number of classes may not be that of training.
    """
    if method in LEARNED:
        adapter = load_method(split_model(method, bench.seed), bench.images.device, bench.target)
        adapter.predictor.support_per_class = params.labels(bench.test_classes)
        return adapter
    predictor = _random_weights(bench) if method == "random_weights" else bench.load(split_model(method, bench.seed))
    own = dataclasses.replace(params, variant=PLUS) if method == PLUS else params
    predictor.support_per_class = own.labels(bench.test_classes)
    return predictor


def _random_weights(bench: Bench) -> Predictor:
    card = bench.load(split_model("pudnet", bench.seed)).card
    plain = dataclasses.replace(card, kind="static_trunk", model=None, provenance={})
    torch.manual_seed(bench.seed)
    return Predictor.from_card(plain, bench.target, bench.images.device)


def open_scratch(bench: Bench, params: Params, method: str, cells: Sequence[Cell]) -> dict[str, Scratch]:
    """Training from scratch for each number of epochs, which counts as a method of its own (`scratch_adam_30`).

    Each has the cell that was tuned for the nearest number.
    """
    target = build_target(params.target, params.prepare.channels, params.prepare.image_size)
    compiled, opened = compiles(bench, target, params, sum(params.baselines.scratch_epochs)), {}
    for epochs in params.baselines.scratch_epochs:
        nearest = min(cells, key=lambda cell: abs(math.log(cell["epochs"] / epochs)))
        config = ScratchConfig(**{**nearest, "epochs": epochs})
        opened[f"{method}_{epochs}"] = scratch_method(
            method, config, target, bench.images, params.train.precision, compiled
        )
    return opened


def compiles(bench: Bench, target: Target, params: Params, epochs: int) -> bool:
    """Whether compiled layers save time in so many epochs on each of `baselines.scratch_groups` test groups."""
    images, size = bench.tables["test"].shape[2], bench.images.image_size
    on_cpu = bench.images.device.type == "cpu"
    return on_cpu and compiling_pays(target.network, params.baselines.scratch_groups * epochs, images, size)


def constant_sketches(bench: Bench, predictor: Predictor, params: Params) -> list[torch.Tensor]:
    """The mean sketch of training groups, once for every test group."""
    groups = bench.tables["train"][: params.baselines.sketch_groups]
    constant = torch.stack(group_sketches(predictor, bench.train_images, groups, bench.bf16)).mean(0)
    return [constant] * len(bench.tables["test"])


def shuffled_sketches(bench: Bench, predictor: Predictor, params: Params) -> list[torch.Tensor]:
    """For every test group, the sketch of another test group with other classes."""
    groups = bench.tables["test"][:, FROM]
    sketches = group_sketches(predictor, bench.images, groups, bench.bf16)
    return shuffled(sketches, [bench.images.block_classes(group).tolist() for group in groups])


SKETCHES = {"constant_sketch": constant_sketches, "shuffled_sketch": shuffled_sketches}  # controls with PudNet's model
