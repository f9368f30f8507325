"""Ray: many meta-trainings side by side, each resumable, on this machine or a cluster."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.params import Params
from pipeline.stage import root
from pipeline.trial import TrialSpec, load_state, open_trial, run_trial
from pudnet.errors import RunFailed, UserError

# A snapshot of the experiment every 5 s bounds what a kill -9 of the driver costs.
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "5")
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # its boxes say less than the callback

import ray
import torch
from ray import tune

OBJECT_STORE_BYTES = 200_000_000  # trials memory-map their arrays; little goes through the object store
ATTEMPTS_AFTER_A_FAULT = 2
METHOD_CODE = (
    "config",
    "settings",
    "targets",
    "controls",
    "objective",
    "training",
    "hypernet",
    "data",
    "evaluation",
    "predictor",
)


@dataclass(frozen=True)
class Finished:
    """A finished trial: what it was, its last report, and its last checkpoint."""

    spec: TrialSpec
    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    checkpoint: Path

    def state(self) -> dict:
        """The trainer's state at the end: the model's tensors, the objective's, ..."""
        return load_state(self.checkpoint)


def experiment_key(stage: str, specs: Sequence[TrialSpec], asha: bool) -> str:
    """A hash of all that the trials depend on: their specs, the data, and the method's own code.

    Ray would restore an experiment under changed settings without a word; under another name it cannot.
    """
    digest = hashlib.sha256(json.dumps([stage, asha, *map(asdict, specs)], sort_keys=True).encode())
    for folder in sorted({spec.store for spec in specs}):
        digest.update((Path(folder) / "meta.json").read_bytes())
    for folder, table in sorted({(spec.groups, spec.table) for spec in specs}):
        for name in ("split.json", f"{table}.npy"):
            digest.update((Path(folder) / name).read_bytes())
    code = Path(__file__).resolve().parent.parent / "pudnet"
    for name in METHOD_CODE:
        for path in sorted((code / name).glob("*.py")) or [code / f"{name}.py"]:
            digest.update(path.read_bytes())
    return f"{stage}-{digest.hexdigest()[:12]}"


def run_trials(
    specs: Sequence[TrialSpec],
    key: str,
    params: Params,
    progress: tune.Callback,
    asha: bool = False,
    fresh: bool = False,
) -> list[Finished]:
    """Run all trials, going on where an earlier run of the same key stopped. Returns them in the order of `specs`.

    Raises:
        RunFailed: when a trial is unfinished at the end: interrupted, or failed for good.
        UserError: when another process runs the same trials, or a trial cannot start; then none is.
    """
    for spec in specs:
        open_trial(spec, torch.device("cpu"))
    folder = root() / ".pud" / "ray" / key
    with _alone(folder), _ray():
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        results = _tuner(specs, folder, params, progress, asha).fit()
        trials = {t.config["spec"]["name"]: t for t in results._experiment_analysis.trials}  # statuses: no public way
        found = {r.config["spec"]["name"]: r for r in results if r.config}
        unfinished = [s.name for s in specs if trials[s.name].status != "TERMINATED" or not found[s.name].metrics]
        if unfinished:
            raise RunFailed(_why(unfinished, found, len(specs)))
        return [_finished(spec, found[spec.name]) for spec in specs]


def _finished(spec: TrialSpec, result: tune.Result) -> Finished:
    history = result.metrics_dataframe.to_dict("records")
    return Finished(spec, result.metrics, history, Path(result.checkpoint.path))


def _why(unfinished: Sequence[str], found: dict[str, tune.Result], total: int) -> str:
    failed = [found[name] for name in unfinished if name in found and found[name].error]
    state = f"{total - len(unfinished)} of {total} trials are done"
    if not failed:
        return f"{state}, the others were interrupted; the same command continues"
    reason = str(failed[0].error).strip().splitlines()[-1].removeprefix("pudnet.errors.RunFailed: ")
    return f"{state}; {reason} (all of it in {failed[0].path}/error.txt); the same command continues"


def _tuner(specs: Sequence[TrialSpec], folder: Path, params: Params, progress: tune.Callback, asha: bool) -> tune.Tuner:
    trainable = tune.with_resources(run_trial, _resources(params))
    if tune.Tuner.can_restore(str(folder)):
        print(f"  going on with {folder.relative_to(root())}: finished trials are not run again", flush=True)
        return tune.Tuner.restore(str(folder), trainable, resume_errored=True)
    space = {"spec": tune.grid_search([asdict(spec) for spec in specs]), "cpus": params.resources.cpus}
    every = {spec.train["report_every"] for spec in specs}
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            reuse_actors=True,
            metric="validation_accuracy" if asha else None,
            mode="max" if asha else None,
            scheduler=tune.schedulers.ASHAScheduler(
                time_attr="groups", max_t=params.groups.search_groups, grace_period=max(every)
            )
            if asha
            else None,
            trial_dirname_creator=lambda trial: trial.config["spec"]["name"],
        ),
        run_config=tune.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            callbacks=[progress],
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=ATTEMPTS_AFTER_A_FAULT),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=2),
        ),
    )


def _resources(params: Params) -> dict[str, float]:
    """A trial's share. A GPU is asked for only where there is one: Ray would wait for it for ever."""
    gpus = params.resources.gpus if ray.cluster_resources().get("GPU", 0) else 0
    cpus = ray.cluster_resources().get("CPU", 0)
    if params.resources.cpus > cpus:
        raise UserError(f"resources.cpus: {params.resources.cpus} a trial, but there are {cpus:.0f}")
    return {"cpu": params.resources.cpus, "gpu": gpus}


@contextlib.contextmanager
def _ray() -> Iterator[None]:
    """A Ray of our own, or the cluster that RAY_ADDRESS names (with this project's code sent along)."""
    logging.getLogger("ray").setLevel(logging.CRITICAL)  # a failed trial's traceback is in its error.txt
    if os.environ.get("RAY_ADDRESS"):
        excludes = ["data", "mlartifacts", ".pud", ".dvc", ".venv", "models"]
        ray.init(runtime_env={"working_dir": str(root()), "excludes": excludes}, log_to_driver=False)
    else:
        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            logging_level=logging.CRITICAL,
            log_to_driver=False,  # the callback says what there is to say
        )
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the experiment's lock: a second search on one experiment would mix with the first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder.name}: another process runs these trials; wait for it or stop it") from None
        yield
