"""Measures methods on the test groups, in parallel as Ray tasks (`measurement.py`), and keeps what was measured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import ray

from pipeline.digests import digest
from pipeline.params import Params
from pipeline.project import root, write
from pipeline.runs import cluster
from pipeline.runs.display import bars
from pipeline.runs.measurement import SKETCHES, Job, measure_job, time_methods
from pipeline.runs.trial import Choices
from pudnet.baselines import SCRATCH

PART = 5  # test groups that one task trains on from scratch; an interruption loses at most one task


def measure_all(
    params: Params, methods: Sequence[str], choices: Choices, fresh: bool
) -> tuple[pd.DataFrame, dict[str, str]]:
    """Measure all methods on all splits: the rows of `Bench.accuracies`, and for each method a key of its rows.

    Jobs whose rows were kept are not run again.
    """
    jobs = [job for method in methods for seed in params.split_seeds for job in _jobs(params, method, seed, choices)]
    keys = {job: job.key(params) for job in jobs}
    tables = measure_missing(params, measure_job, keys, _done, fresh)
    of_method = {method: "+".join(keys[job] for job in jobs if job.method == method) for method in methods}
    return pd.concat([tables[job] for job in jobs], ignore_index=True), {m: digest(k, []) for m, k in of_method.items()}


def measure_missing(
    params: Params,
    function: Callable[..., pd.DataFrame],
    keys: Mapping[Any, str],
    done: Callable[[Any, pd.DataFrame], str],
    fresh: bool = False,
) -> dict[Any, pd.DataFrame]:
    """Measure a table for each item of `keys` by `function`, as Ray tasks.

    Tables are kept in .pud/measurements under their keys, and reused unless `fresh`. `done` gives the line that says
    without a terminal that an item is done.
    """
    files = {one: root() / ".pud" / "measurements" / f"{key}.parquet" for one, key in keys.items()}
    tables = {}
    for one in () if fresh else keys:
        with contextlib.suppress(OSError, ValueError):  # missing or damaged; pyarrow's errors are subclasses
            tables[one] = pd.read_parquet(files[one])
    if tables:
        print(f"  {len(tables)} of {len(keys)} measurements are done already", flush=True)
    start = task(params, function)
    running = {start(one): one for one in keys if one not in tables}
    with bars() as bar:
        task_bar = bar.add_task("all measurements", total=len(keys), completed=len(tables))
        while running:
            ended = cluster.first_of(list(running), params)
            one = running.pop(ended)
            tables[one] = cluster.result(ended)
            write(files[one], tables[one].to_parquet(index=False))
            if bar.disable:
                print(f"  {done(one, tables[one])}", flush=True)
            bar.update(task_bar, completed=len(tables))
    return tables


def _done(job: Job, table: pd.DataFrame) -> str:
    return f"{job.method}, split {job.seed}: {table.group.nunique()} test groups done"


def time_all(params: Params, methods: Sequence[str], choices: Choices) -> dict[str, float]:
    """Median milliseconds of adapting PudNet and each other method to a group, in turns, with nothing else running."""
    timing = task(params, time_methods)([m for m in methods if m not in SKETCHES], choices)
    return cluster.result(cluster.first_of([timing], params))


def task(params: Params, function: Callable[..., Any]) -> Callable[..., ray.ObjectRef]:
    """Make a function a Ray task with a trial's resources. It gets this folder and `params` as first arguments."""
    share = cluster.share(params)
    remote = ray.remote(num_cpus=share["cpu"], num_gpus=share["gpu"])(function)
    return partial(remote.remote, str(Path.cwd()), params)


def _jobs(params: Params, method: str, seed: int, choices: Choices) -> list[Job]:
    if method not in SCRATCH:
        return [Job(method, seed, ())]
    count = params.trained_test_groups
    parts = [(first, min(first + PART, count)) for first in range(0, count, PART)]
    return [Job(method, seed, tuple(choices[method, seed]), part) for part in parts]
