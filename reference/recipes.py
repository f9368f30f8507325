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
from pipeline.studies.page import table_of
from pipeline.studies.tasks.cell import given_labels
from pudnet.data.groups import open_groups
from pudnet.evaluation import mean_interval, twin_accuracies

PAGES = Path("studies/results")
METHODS = {  # rows of each, with the head that is put on it
    "pudnet": {"PudNet+": None},
    "r2d2": {"R2-D2": None},
    "pretrained": {"Pretrained, ridge": "ridge", "Pretrained, logistic regression": "logistic"},
}
REFERENCE = "PudNet+"
IMAGES = 90  # labelled images of a validation group that a method is given, unless a question says otherwise
Changes = Mapping[str, Any]  # of PudNet+'s recipe, with the method's own keys
Results = dict[tuple[str, str, int], np.ndarray]  # by row, recipe and images: accuracy in percent on validation groups


@dataclasses.dataclass(frozen=True)
class Question:
    """Recipes by name, with what each changes for each method. They are compared with the `usual` one."""

    title: str
    text: str
    usual: str
    recipes: Mapping[str, Mapping[str, Changes]]
    images: tuple[int, ...] = (IMAGES,)  # from how many; if there are several, each has a column, and a recipe a row

    def trainings(self) -> Iterator[tuple[str, str, Changes]]:
        """Method, recipe and its changes."""
        for recipe, methods in self.recipes.items():
            for method, changes in methods.items():
                yield method, recipe, changes


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
MANY_LABELLED = MIRRORED | {"sketch_images": 250}  # of PudNet+: 50 of each of five classes
PRETRAINED = MIRRORED | {"pretraining_share": 1.0}
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
        "each trained once with each recipe, on {groups:,} groups, at a rate of 0.006 unless the row has another. All "
        "choose their penalty and blocks, as the models that ship. “Pretrained”: not trained on groups, but on their "
        "images, mixed, to tell all training classes apart; of R2-D2 only the classifier is then left (at rate 0.012, "
        "this is the variant `pretrained_ridge` with the same `train.augment`, `penalty` and `blocks`). “Half "
        "pretrained”, “0.8 pretrained”: on this share of the groups, then on groups. “Mirrored”: on images that are "
        "shifted and mirrored at random. “50 labelled”: in training, a group has 50 labelled images of each class, and "
        "not 18. [`best_recipes`](best_recipes.md) measures the best of them on test groups.",
        "usual",
        {
            "usual": {"pudnet": CHOOSES, "r2d2": CHOOSES},
            "50 labelled": {"pudnet": CHOOSES | {"sketch_images": 250}},
            "mirrored": {"r2d2": MIRRORED},
            "mirrored, 50 labelled": {
                "pudnet": MANY_LABELLED,
                "r2d2": MIRRORED | {"support_per_class": 50},
            },
            "half pretrained, mirrored, 50 labelled": {"pudnet": MANY_LABELLED | {"pretraining_share": 0.5}},
            "0.8 pretrained, mirrored, 50 labelled": {"pudnet": MANY_LABELLED | {"pretraining_share": 0.8}},
            "0.8 pretrained, mirrored, 50 labelled, rate 0.012": {
                "pudnet": MANY_LABELLED | {"pretraining_share": 0.8, "learning_rate": 0.012}
            },
            **{
                f"pretrained, mirrored, rate {rate:g}": {"r2d2": PRETRAINED | {"learning_rate": rate}}
                for rate in (0.003, 0.006, 0.012, 0.024)
            },
        },
        images=(90, 250, 500),
    ),
}
TEXT = """PudNet+ and its nearest opponents of the setting `{setting}`, {text} Accuracy in percent, with its 95%
interval, on {validation} validation groups of classes that were not trained on, from {images} labelled images of each.
Test groups had no part in it. In brackets: the difference to {reference}, paired over the groups. The intervals do not
include what another training seed would change.{end}"""
END = " The last column compares each method at its best with PudNet+ at its own."


def spec_of(params: Params, method: str, changes: Mapping[str, Any]) -> TrialSpec:
    """A training, as in a study, but without the validation classes."""
    row = Row(method=method, variant=PLUS, changes=dict(changes))
    spec = row_spec(params, f"{method}-" + "-".join(map(str, changes.values())), row, 0, images_of_a_class(params))
    return dataclasses.replace(spec, table="search_train")


def measured(params: Params, method: str, changes: Changes, counts: Sequence[int]) -> dict[tuple[str, int], np.ndarray]:
    """Train a method with changes of PudNet+'s recipe -> accuracies on the validation groups, by its rows and images.

    `counts`: from how many labelled images of a group.
    """
    torch.set_num_threads(1)
    spec = spec_of(params, method, changes)
    trial = MetaTraining(spec, torch.device("cpu"))
    for _ in trial.run():
        pass
    table, trainer, card, found = open_groups(group_folder(0))[1]["validation"], trial.trainer, trial.card, {}
    for images in counts:
        given = given_labels(card, images, params.groups.classes_per_group)
        trial.card = dataclasses.replace(given, sketch_images=images)
        for row, head in METHODS[method].items():
            found[row, images] = twin_accuracies(trial.adapter(head), trainer.images, table, trainer.autocast)
    return found


def page(name: str, results: Results, setting: str, groups: int) -> str:
    """The answer to a question: accuracies by row and recipe, as Markdown."""
    question = QUESTIONS[name]
    several = len(question.images) > 1
    about = TEXT.format(
        setting=setting,
        text=question.text.format(groups=groups),
        validation=len(next(iter(results.values()))),
        images=listed(question.images) if several else IMAGES,
        reference=f"{REFERENCE}, {question.usual}" if several else f"“{question.usual}”",
        end="" if several else END,
    )
    text = textwrap.fill(about, 120, break_on_hyphens=False)
    made_by = f"Made by `python reference/recipes.py {name}`."
    columns = _by_images(question, results) if several else _by_recipe(question, results)
    return f"# {question.title}\n\n{text}\n\n{made_by}\n\n{table_of(columns)}"


def listed(counts: Sequence[int]) -> str:
    """Numbers in words: 90, 250 or 500."""
    return ", ".join(map(str, counts[:-1])) + f" or {counts[-1]}"


def _by_images(question: Question, results: Results) -> dict[str, list[str]]:
    """A row for each method and recipe, a column for each number of images. All are compared with PudNet+ as usual."""
    rows = [
        (row, recipe)
        for method, own in METHODS.items()
        for row in own
        for recipe, methods in question.recipes.items()
        if method in methods
    ]
    columns = {"": [f"{row}, {recipe}" for row, recipe in rows]}
    for images in question.images:
        usual = results[REFERENCE, question.usual, images]
        columns[f"{images} images"] = [_cell(results[*row, images], usual) for row in rows]
    return columns


def _by_recipe(question: Question, results: Results) -> dict[str, list[str]]:
    """A row for each method, a column for each recipe, and one for the best of them."""
    found = {(row, recipe): own for (row, recipe, _), own in results.items()}
    rows = [row for own in METHODS.values() for row in own]
    columns = {"": rows}
    for recipe in question.recipes:
        columns[recipe] = [
            _cell(found[row, recipe], found[row, question.usual]) if (row, recipe) in found else "" for row in rows
        ]
    best = {row: max((own for (of, _), own in found.items() if of == row), key=np.mean) for row in rows}
    columns["best, less PudNet+"] = [
        "" if row == REFERENCE else plus_minus(*mean_interval(best[row] - best[REFERENCE]), "+") for row in rows
    ]
    return columns


def _cell(own: np.ndarray, usual: np.ndarray) -> str:
    less = "" if own is usual else f" ({plus_minus(*mean_interval(own - usual), '+')})"
    return plus_minus(*mean_interval(own)) + less


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
            recipe, found = jobs[job], job.result()
            results |= {(row, recipe, images): own for (row, images), own in found.items()}
            for (row, images), own in found.items():
                print(f"{row}, {recipe}, from {images} images: {own.mean():.2f}", flush=True)
    (PAGES / f"{name}.md").write_text(page(name, results, params.setting, groups), encoding="utf-8")


if __name__ == "__main__":
    main()
