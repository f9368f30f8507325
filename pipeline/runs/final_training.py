"""Final meta-training on all training classes, for `train` and `baselines`: one trial for each method and split."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from pipeline.params import PLUS, STATIC, Params
from pipeline.project import BASELINES, PUDNET, RESULTS, STORE, git_commit, group_folder, read_result, split_model
from pipeline.runs.executor import Experiment, run_missing
from pipeline.runs.trial import card_of, make_spec
from pipeline.runs.trial_folder import Finished
from pipeline.tracking.datasets import dataset
from pipeline.tracking.registry import Validation, register
from pipeline.tracking.runs import Tracking, open_tracking
from pudnet.baselines import LEARNED
from pudnet.card import write_tensors
from pudnet.data.groups import open_groups
from pudnet.data.store import open_store
from pudnet.errors import UserError

BEST = RESULTS / "best.yaml"
CURVE_COLUMNS = ["groups", "loss", "metric_loss", "full_loss", "kl_loss", "train_accuracy"]

Cells = Mapping[int, Mapping[str, Any]]  # split seed -> the cell that was chosen for one method


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What the search chose for a class split, and its accuracy on validation groups, in percent."""

    cell: Mapping[str, Any]
    accuracy: float


def read_best(params: Params) -> dict[int, Chosen]:
    """What the search chose for each split seed. Raises `UserError` if a split has nothing."""
    best = read_result(BEST, _chosen, "search")
    if lacking := set(params.split_seeds) - set(best):
        raise UserError(f"{BEST}: nothing was chosen for split {min(lacking)}; run the search again (`dvc repro`)")
    return best


def _chosen(path: Path) -> dict[int, Chosen]:
    splits = yaml.safe_load(path.read_text())["splits"]
    return {
        int(seed): Chosen({key: value for key, value in best.items() if key != "accuracy"}, best["accuracy"])
        for seed, best in splits.items()
    }


def train_pudnet(params: Params, best: Mapping[int, Chosen], fresh: bool) -> pd.DataFrame:
    """Train PudNet on each split as the search chose, and register the models. Returns the loss curves."""
    cells = {seed: chosen.cell for seed, chosen in best.items()}
    return train_all(params, "train", {"pudnet": cells}, fresh, partial(_register, params, best))


def train_all(
    params: Params,
    stage: str,
    methods: Mapping[str, Cells],
    fresh: bool,
    log: Callable[[Tracking, Finished, Path], None],
) -> pd.DataFrame:
    """Train each method on each split in an open Ray session, and write the models. Returns the loss curves.

    `log` tells MLflow of a model, by its trial and its file.
    """
    named = [(method, seed) for method in methods for seed in params.split_seeds]
    specs = [
        make_spec(params, f"train-{method}-split{seed}", method, seed, dict(methods[method][seed]), "train", validate=0)
        for method, seed in named
    ]
    # A final training never stops early, so patience is no part of its key.
    specs = [dataclasses.replace(spec, train={**spec.train, "patience": None}) for spec in specs]
    tracking = open_tracking(params, stage)
    print(f"{stage}: {len(specs)} final training(s) on {params.groups.train_groups:,} groups")
    finished = run_missing(
        Experiment(f"{stage}-final", specs, workers=params.resources.workers), params, tracking, fresh=fresh
    )
    for (method, _), trial in zip(named, finished, strict=True):
        path = _write_model(params, method, trial)
        tracking.submit(partial(log, tracking, trial, path))
    curves = [_curve(method, trial) for (method, _), trial in zip(named, finished, strict=True)]
    return pd.concat(curves, ignore_index=True)


def train_baselines(
    params: Params, methods: Sequence[str], choices: Mapping[tuple[str, int], Sequence[Mapping[str, Any]]], fresh: bool
) -> pd.DataFrame:
    """Train those methods of the bench that are trained on groups. Returns the loss curves, PudNet's first."""
    curves = read_result(RESULTS / "train_curves.csv", pd.read_csv, "train")
    learned = [m for m in methods if m in (*LEARNED, PLUS, STATIC)]
    cells = {m: {seed: choices[m, seed][0] for seed in params.split_seeds} for m in learned}
    BASELINES.mkdir(parents=True, exist_ok=True)  # DVC expects this output even if nothing is trained
    return pd.concat([curves, train_all(params, "baselines", cells, fresh, _log)]) if cells else curves


def _log(tracking: Tracking, trial: Finished, path: Path) -> None:
    """Log a baseline's model to the run of its training."""
    run_id = tracking.find_or_create(trial.key, trial.spec.name)
    tracking.client.log_artifact(run_id, str(path), "model")
    tracking.finish(run_id)


def _register(params: Params, best: Mapping[int, Chosen], tracking: Tracking, trial: Finished, path: Path) -> None:
    """Log PudNet's model to the run of its training, and register it."""
    seed, asked = trial.spec.split_seed, params.groups.validation_groups
    judged_on = dataset(STORE.resolve(), group_folder(seed).resolve(), "validation", asked)
    validation = Validation(best[seed].accuracy, judged_on.dataset.digest)
    run_id = tracking.find_or_create(trial.key, trial.spec.name)
    name = f"pudnet-{params.setting}-{params.target}".replace(":", ".")  # a model's name may have no colon
    tracking.log_tags(run_id, {"registered_version": register(tracking, run_id, path, name, validation)})
    tracking.finish(run_id)


def _write_model(params: Params, method: str, trial: Finished) -> Path:
    """Write the model with a card of what it was trained on; PudNet's first split also as `PUDNET`."""
    store = open_store(STORE, verify=False)
    split, tables = open_groups(group_folder(trial.spec.split_seed))
    provenance = {
        "setting": params.setting,
        "source": store.source,
        "variant": PLUS if method == PLUS else params.variant,
        "split_seed": trial.spec.split_seed,
        "seed": params.seed,
        "train_classes": [store.class_names[c] for c in split.train_classes],
        "train_groups": len(tables["train"]),
        "git_commit": git_commit(),
        **trial.spec.cell,
        "passes": trial.spec.train["passes"],
    }
    state = trial.state()
    card = dataclasses.replace(card_of(trial.spec, store, state), provenance=provenance)
    path = split_model(method, trial.spec.split_seed)
    write_tensors(path, state["model"], card)
    if method == "pudnet" and trial.spec.split_seed == params.seed:
        write_tensors(PUDNET, state["model"], card)
    return path


def _curve(method: str, trial: Finished) -> pd.DataFrame:
    """A trial's loss curve."""
    frame = pd.DataFrame(trial.history)[CURVE_COLUMNS]
    frame.insert(0, "split_seed", trial.spec.split_seed)
    frame.insert(0, "method", method)
    return frame


def curves_csv(frame: pd.DataFrame) -> str:
    """Loss curves as CSV text."""
    return frame.to_csv(index=False, float_format="%.6g")
