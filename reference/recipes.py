"""Which rate, schedule and scale PudNet+ and its nearest opponents are best with, on validation groups of `domains`.

    dvc repro groups    # with setting: domains, groups.search_groups: 500, groups.validation_groups: 300
    OMP_NUM_THREADS=1 python reference/recipes.py rates        # some 40 minutes on two cores of a CPU
    OMP_NUM_THREADS=1 python reference/recipes.py schedules    # as long

The study `domains` trains all of them with PudNet+'s recipe. This script writes rates.md or schedules.md in
studies/results/.
"""

from __future__ import annotations

import argparse
import dataclasses
import textwrap
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.params import PLUS, Params, load_params
from pipeline.project import group_folder
from pipeline.reporting.numbers import plus_minus
from pipeline.runs.class_split import images_of_a_class
from pipeline.runs.trial import MetaTraining, TrialSpec
from pipeline.studies.columns import row_spec
from pipeline.studies.definition import Row
from pipeline.studies.page import table_of
from pudnet.data.groups import open_groups
from pudnet.evaluation import mean_interval, twin_accuracies

PAGES = Path("studies/results")
METHODS = {  # rows of each, with the head that is put on it
    "pudnet": {"PudNet+": None},
    "r2d2": {"R2-D2": None},
    "pretrained": {"Pretrained, ridge": "ridge", "Pretrained, logistic regression": "logistic"},
}
REFERENCE = "PudNet+"
SCALES = {"pudnet": "ridge_scale", "r2d2": "scale"}  # what each calls the initial scale of its logits
Results = dict[tuple[str, str], np.ndarray]  # by row and recipe: accuracy in percent on each validation group


@dataclasses.dataclass(frozen=True)
class Question:
    """Recipes by name, with what each changes in PudNet+'s. They are compared with the `usual` one."""

    title: str
    text: str
    usual: str
    recipes: Mapping[str, Mapping[str, Any]]

    def trainings(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Method, recipe and its changes, with the method's own keys. A method without a scale has no recipe for it."""
        for recipe, changes in self.recipes.items():
            for method in METHODS:
                if "scale" not in changes or method in SCALES:
                    yield method, recipe, {SCALES[method] if key == "scale" else key: changes[key] for key in changes}


QUESTIONS = {
    "rates": Question(
        "Which rate each method is best at",
        "each trained once at each rate, with PudNet+'s schedule, on {groups:,} groups. The study `domains` trains all "
        "of them at 0.006.",
        "rate 0.006",
        {f"rate {rate:g}": {"learning_rate": rate} for rate in (0.0015, 0.003, 0.006, 0.012)},
    ),
    "schedules": Question(
        "Which schedule and scale each method is best with",
        "each trained once with each schedule and scale, on {groups:,} groups, at a rate of 0.003, at which all are "
        "nearly at their best ([`rates`](rates.md)). The study `domains` trains all of them with `one_cycle`. The "
        "scale is that of the logits when training begins, elsewhere 5; the pretrained network has none.",
        "one_cycle",
        {
            "one_cycle": {"learning_rate": 0.003},
            "cosine": {"learning_rate": 0.003, "schedule": "cosine"},
            "constant": {"learning_rate": 0.003, "schedule": "constant"},
            "constant at 0.001": {"learning_rate": 0.001, "schedule": "constant"},
            "scale 2.5": {"learning_rate": 0.003, "scale": 2.5},
            "scale 10": {"learning_rate": 0.003, "scale": 10.0},
        },
    ),
}
TEXT = """PudNet+ and its nearest opponents of the setting `domains`, {text} Accuracy in percent, with its 95%
interval, on {validation} validation groups of classes that were not trained on, from 90 labelled images of each. Test
groups had no part in it. In brackets: the difference to “{usual}”, paired over the groups. The intervals do not include
what another training seed would change. The last column compares each method at its best with PudNet+ at its own."""


def spec_of(params: Params, method: str, changes: Mapping[str, Any]) -> TrialSpec:
    """A training, as in a study, but without the validation classes."""
    row = Row(method=method, variant=PLUS, changes=dict(changes))
    spec = row_spec(params, f"{method}-" + "-".join(map(str, changes.values())), row, 0, images_of_a_class(params))
    return dataclasses.replace(spec, table="search_train")


def measured(params: Params, method: str, changes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Train a method with changes of PudNet+'s recipe -> each of its rows' accuracies on the validation groups."""
    torch.set_num_threads(1)
    spec = spec_of(params, method, changes)
    trial = MetaTraining(spec, torch.device("cpu"))
    for _ in trial.run():
        pass
    table, trainer = open_groups(group_folder(0))[1]["validation"], trial.trainer
    return {
        name: twin_accuracies(trial.adapter(head), trainer.images, table, trainer.autocast)
        for name, head in METHODS[method].items()
    }


def page(name: str, results: Results, groups: int) -> str:
    """The answer to a question: accuracies by row and recipe, as Markdown."""
    question = QUESTIONS[name]
    rows = [row for own in METHODS.values() for row in own]
    columns = {"": rows}
    for recipe in question.recipes:
        columns[recipe] = [_cell(results, row, recipe, question.usual) for row in rows]
    best = {row: max((own for (of, _), own in results.items() if of == row), key=np.mean) for row in rows}
    columns["best, less PudNet+"] = [
        "" if row == REFERENCE else plus_minus(*mean_interval(best[row] - best[REFERENCE]), "+") for row in rows
    ]
    about = {"text": question.text.format(groups=groups), "validation": len(best[REFERENCE]), "usual": question.usual}
    text = textwrap.fill(TEXT.format(**about), 120, break_on_hyphens=False)
    made_by = f"Made by `python reference/recipes.py {name}`."
    return f"# {question.title}\n\n{text}\n\n{made_by}\n\n{table_of(columns)}"


def _cell(results: Results, row: str, recipe: str, usual: str) -> str:
    own = results.get((row, recipe))
    if own is None:
        return ""
    less = plus_minus(*mean_interval(own - results[row, usual]), "+")
    return plus_minus(*mean_interval(own)) + ("" if recipe == usual else f" ({less})")


def main() -> None:
    """Train all recipes of a question, two at a time, and write its page."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("question", choices=QUESTIONS)
    name, params, results = parser.parse_args().question, load_params(), {}
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        jobs = {
            pool.submit(measured, params, method, changes): recipe
            for method, recipe, changes in QUESTIONS[name].trainings()
        }
        for job in as_completed(jobs):
            results |= {(row, jobs[job]): own for row, own in job.result().items()}
            print(*(f"{row}, {jobs[job]}: {own.mean():.2f}" for row, own in job.result().items()), flush=True)
    (PAGES / f"{name}.md").write_text(page(name, results, params.groups.search_groups), encoding="utf-8")


if __name__ == "__main__":
    main()
