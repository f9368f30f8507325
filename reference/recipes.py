"""Which recipe PudNet+ and its nearest opponents are best with, on validation groups.

    dvc repro groups    # with setting: domains, groups.search_groups: 500, groups.validation_groups: 300
    OMP_NUM_THREADS=1 python reference/recipes.py rates        # some 40 minutes on two cores of a CPU
    OMP_NUM_THREADS=1 python reference/recipes.py schedules    # as long

    dvc repro groups    # with setting: cifar100, groups.search_groups: 1000, groups.validation_groups: 150
    OMP_NUM_THREADS=1 python reference/recipes.py pretraining    # some 35 minutes

Studies train all of them with PudNet+'s recipe, unless they say otherwise. This script writes rates.md, schedules.md or
pretraining.md in studies/results/.
"""

from __future__ import annotations

import argparse
import dataclasses
import textwrap
from collections.abc import Iterator, Mapping, Sequence
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
from pipeline.studies.measuring import given_labels
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
IMAGES = 90  # labelled images of a validation group, of which a method is given so many, unless a question has others
Changes = Mapping[str, Any]  # of PudNet+'s recipe, with the method's own keys
Results = dict[tuple[str, str], np.ndarray]  # by row and recipe: accuracy in percent on each validation group


@dataclasses.dataclass(frozen=True)
class Question:
    """Recipes by name, with what each changes for each method. They are compared with the `usual` one."""

    title: str
    text: str
    usual: str
    recipes: Mapping[str, Mapping[str, Changes]]
    images: tuple[int, ...] = (IMAGES,)

    def trainings(self) -> Iterator[tuple[str, str, Changes]]:
        """Method, recipe and its changes."""
        for recipe, methods in self.recipes.items():
            for method, changes in methods.items():
                yield method, recipe, changes

    def rows(self) -> dict[str, str]:
        """The rows of its page, and for each PudNet+'s row from as many images."""
        methods = {method for method, *_ in self.trainings()}
        names = [name for method, names in METHODS.items() if method in methods for name in names]
        return {row_name(name, each): row_name(REFERENCE, each) for name in names for each in self.images}


def row_name(name: str, images: int) -> str:
    """The name of a method's row, measured from so many labelled images."""
    return name if images == IMAGES else f"{name}, {images} images"


def with_scale(scale: float) -> dict[str, Changes]:
    """The changes for a scale of the logits, of the methods that have one."""
    return {
        "pudnet": {"learning_rate": 0.003, "ridge_scale": scale},
        "r2d2": {"learning_rate": 0.003, "scale": scale},
    }


def for_all(**changes: Any) -> dict[str, Changes]:
    """The same changes for all methods."""
    return dict.fromkeys(METHODS, changes)


CHOOSES = {"penalty": "leave_one_out", "blocks": "leave_one_out"}  # as the models that ship
MIRRORED = CHOOSES | {"augment": "shift_mirror"}
QUESTIONS = {
    "rates": Question(
        "Which rate each method is best at",
        "each trained once at each rate, with PudNet+'s schedule, on {groups:,} groups. The study `domains` trains all "
        "of them at 0.006.",
        "rate 0.006",
        {f"rate {rate:g}": for_all(learning_rate=rate) for rate in (0.0015, 0.003, 0.006, 0.012)},
    ),
    "schedules": Question(
        "Which schedule and scale each method is best with",
        "each trained once with each schedule and scale, on {groups:,} groups, at a rate of 0.003, at which all are "
        "nearly at their best ([`rates`](rates.md)). The study `domains` trains all of them with `one_cycle`. The "
        "scale is that of the logits when training begins, elsewhere 5; the pretrained network has none.",
        "one_cycle",
        {
            "one_cycle": for_all(learning_rate=0.003),
            "cosine": for_all(learning_rate=0.003, schedule="cosine"),
            "constant": for_all(learning_rate=0.003, schedule="constant"),
            "constant at 0.001": for_all(learning_rate=0.001, schedule="constant"),
            "scale 2.5": with_scale(2.5),
            "scale 10": with_scale(10.0),
        },
    ),
    "pretraining": Question(
        "Groups or pretraining, for a classifier from many images",
        "each trained once with each recipe, on {groups:,} groups. All choose their penalty and blocks, as the models "
        "that ship. “Pretrained”: not trained on groups, but on their images, mixed, to tell all training classes "
        "apart. “Half”: first so, then on groups. “Mirrored”: on images that are shifted and mirrored at random. "
        "“50 labelled”: in training, a group has 50 labelled images of each class, and not 18.",
        "usual",
        {
            "usual": {"pudnet": CHOOSES, "r2d2": CHOOSES},
            "50 labelled": {"pudnet": CHOOSES | {"sketch_images": 250}},
            "mirrored": {"r2d2": MIRRORED},
            "mirrored, 50 labelled": {
                "pudnet": MIRRORED | {"sketch_images": 250},
                "r2d2": MIRRORED | {"support_per_class": 50},
            },
            "mirrored, half, 50 labelled": {"pudnet": MIRRORED | {"sketch_images": 250, "pretraining_share": 0.5}},
            "mirrored, pretrained": {"r2d2": MIRRORED | {"pretraining_share": 1.0}},
            "the same at rate 0.003": {"r2d2": MIRRORED | {"pretraining_share": 1.0, "learning_rate": 0.003}},
        },
        images=(90, 250, 500),
    ),
}
TEXT = """PudNet+ and its nearest opponents of the setting `{setting}`, {text} Accuracy in percent, with its 95%
interval, on {validation} validation groups of classes that were not trained on, from {images} of each.
Test groups had no part in it. In brackets: the difference to “{usual}”, paired over the groups. The intervals do not
include what another training seed would change. The last column compares each method at its best with PudNet+ at its
own."""


def spec_of(params: Params, method: str, changes: Mapping[str, Any]) -> TrialSpec:
    """A training, as in a study, but without the validation classes."""
    row = Row(method=method, variant=PLUS, changes=dict(changes))
    spec = row_spec(params, f"{method}-" + "-".join(map(str, changes.values())), row, 0, images_of_a_class(params))
    return dataclasses.replace(spec, table="search_train")


def measured(params: Params, method: str, changes: Changes, counts: Sequence[int]) -> dict[str, np.ndarray]:
    """Train a method with changes of PudNet+'s recipe -> each of its rows' accuracies on the validation groups.

    `counts`: from how many labelled images of a group.
    """
    torch.set_num_threads(1)
    spec = spec_of(params, method, changes)
    trial = MetaTraining(spec, torch.device("cpu"))
    for _ in trial.run():
        pass
    table, trainer, card, found = open_groups(group_folder(0))[1]["validation"], trial.trainer, trial.card, {}
    for images in counts:
        if images != IMAGES:
            given = given_labels(card, images, params.groups.classes_per_group)
            trial.card = dataclasses.replace(given, sketch_images=images)
        for name, head in METHODS[method].items():
            accuracies = twin_accuracies(trial.adapter(head), trainer.images, table, trainer.autocast)
            found[row_name(name, images)] = accuracies
    return found


def page(name: str, results: Results, setting: str, groups: int) -> str:
    """The answer to a question: accuracies by row and recipe, as Markdown."""
    question = QUESTIONS[name]
    rows = question.rows()
    columns = {"": [*rows]}
    for recipe in question.recipes:
        columns[recipe] = [_cell(results, row, recipe, question.usual) for row in rows]
    best = {row: max((own for (of, _), own in results.items() if of == row), key=np.mean) for row in rows}
    columns["best, less PudNet+"] = [
        "" if row == plus else plus_minus(*mean_interval(best[row] - best[plus]), "+") for row, plus in rows.items()
    ]
    about = TEXT.format(
        setting=setting,
        text=question.text.format(groups=groups),
        validation=len(best[REFERENCE]),
        images=f"{IMAGES} labelled images" + ", or as many as the row says," * (len(question.images) > 1),
        usual=question.usual,
    )
    text = textwrap.fill(about, 120, break_on_hyphens=False)
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
    question, groups = QUESTIONS[name], params.groups.search_groups
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        jobs = {
            pool.submit(measured, params, method, changes, question.images): recipe
            for method, recipe, changes in question.trainings()
        }
        for job in as_completed(jobs):
            results |= {(row, jobs[job]): own for row, own in job.result().items()}
            print(*(f"{row}, {jobs[job]}: {own.mean():.2f}" for row, own in job.result().items()), flush=True)
    (PAGES / f"{name}.md").write_text(page(name, results, params.setting, groups), encoding="utf-8")


if __name__ == "__main__":
    main()
