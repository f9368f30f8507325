"""Which rate PudNet+ and its nearest opponents are best at, on validation groups of `domains`.

    dvc repro groups    # with setting: domains, groups.search_groups: 500, groups.validation_groups: 300
    OMP_NUM_THREADS=1 python reference/rates.py    # some 40 minutes on two cores of a CPU

The study `domains` trains all of them at PudNet+'s rate. It writes studies/results/rates.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from pipeline.params import PLUS, Params, load_params
from pipeline.project import group_folder
from pipeline.reporting.numbers import plus_minus
from pipeline.runs.class_split import images_of_a_class
from pipeline.runs.trial import MetaTraining, TrialSpec
from pipeline.studies.definition import Row, row_spec
from pipeline.studies.page import table_of
from pudnet.baselines.method import Adapter
from pudnet.data.groups import open_groups
from pudnet.evaluation import mean_interval, twin_accuracies
from pudnet.predictor import Predictor

PAGE = Path("studies/results/rates.md")
RATES = (0.0015, 0.003, 0.006, 0.012)
USUAL = 0.006  # PudNet+'s, at which `domains` trains every method
METHODS = {  # rows of each, with the head that is put on it
    "pudnet": {"PudNet+": None},
    "r2d2": {"R2-D2": None},
    "pretrained": {"Pretrained, ridge": "ridge", "Pretrained, logistic regression": "logistic"},
}
REFERENCE = "PudNet+"
TEXT = """# Which rate each method is best at

PudNet+ and its nearest opponents of the setting `domains`, each trained once at each rate, on {groups:,} groups, with
PudNet+'s schedule. The study `domains` trains all of them at {usual:g}. Accuracy in percent, with its 95% interval, on
{validation} validation groups of classes that were not trained on, from 90 labelled images of each. Test groups had no
part in it. In brackets: the difference to the rate of {usual:g}, paired over the groups. The intervals do not include
what another training seed would change. The last column compares each method at its best rate with PudNet+ at its own.

Made by `python reference/rates.py`.

"""


def spec_of(params: Params, method: str, rate: float) -> TrialSpec:
    """A training at a rate, as in a study, but without the validation classes."""
    row = Row(method=method, variant=PLUS, changes={"learning_rate": rate})
    spec = row_spec(params, f"{method}-{rate:g}", row, 0, images_of_a_class(params))
    return dataclasses.replace(spec, table="search_train")


def measured(params: Params, method: str, rate: float) -> dict[str, np.ndarray]:
    """Train a method at a rate -> each of its rows' accuracy in percent on each validation group."""
    torch.set_num_threads(1)
    spec = spec_of(params, method, rate)
    trial = MetaTraining(spec, torch.device("cpu"))
    for _ in trial.run():
        pass
    table = open_groups(group_folder(0))[1]["validation"]
    trainer, parts = trial.trainer, (trial.trainer.learner.model, trial.card, trial.target)

    def accuracies(head: str | None) -> np.ndarray:
        adapts = Predictor(*parts) if spec.kind == "pudnet" else Adapter(*parts, head)
        return twin_accuracies(adapts, trainer.images, table, trainer.autocast)

    return {name: accuracies(head) for name, head in METHODS[method].items()}


def page(results: Mapping[tuple[str, float], np.ndarray], groups: int) -> str:
    """Accuracies on validation groups by row and rate, as Markdown."""
    names = [name for own in METHODS.values() for name in own]
    columns = {"": names} | {f"rate {rate:g}": [_cell(results, name, rate) for name in names] for rate in RATES}
    best = {name: max((results[name, rate] for rate in RATES), key=np.mean) for name in names}
    columns["best, less PudNet+"] = [
        "" if name == REFERENCE else plus_minus(*mean_interval(own - best[REFERENCE]), "+")
        for name, own in best.items()
    ]
    return TEXT.format(groups=groups, usual=USUAL, validation=len(best[REFERENCE])) + table_of(columns)


def _cell(results: Mapping[tuple[str, float], np.ndarray], name: str, rate: float) -> str:
    own = results[name, rate]
    less = plus_minus(*mean_interval(own - results[name, USUAL]), "+")
    return plus_minus(*mean_interval(own)) + ("" if rate == USUAL else f" ({less})")


def main() -> None:
    """Train all, two at a time, and write the page."""
    params, results = load_params(), {}
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        jobs = {pool.submit(measured, params, m, rate): rate for rate in RATES for m in METHODS}
        for job in as_completed(jobs):
            results |= {(name, jobs[job]): own for name, own in job.result().items()}
            print(*(f"{name}, {jobs[job]:g}: {own.mean():.2f}" for name, own in job.result().items()), flush=True)
    PAGE.write_text(page(results, params.groups.search_groups), encoding="utf-8")


if __name__ == "__main__":
    main()
