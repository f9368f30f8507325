"""What fine-tuning adds to a predicted network, on classes its model never saw: `python -m benchmarks.finetuning`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Column, Table

from benchmarks.data import positive
from pipeline.project import write_json
from pipeline.reporting.numbers import plus_minus
from pudnet.data.sources import Source, open_source
from pudnet.errors import UserError, exit_code
from pudnet.evaluation import mean_interval
from pudnet.files import check_writable
from pudnet.predictor import Predictor

CLASSES, SEED = 5, 0


def unseen_classes(predictor: Predictor, source: Source, fives: int, draws: np.random.Generator) -> list[np.ndarray]:
    """So many draws of five classes that the model was not trained on, by their numbers.

    Raises `UserError` where there are not five, or the model does not say what it was trained on.
    """
    if (seen := predictor.card.provenance.get("train_classes")) is None:
        raise UserError("model: does not say which classes it was trained on; take one that `dvc repro` made")
    known = {*seen, *(name.partition(" ")[2] for name in seen)}  # a model of several sets has the set before the name
    numbers = np.array([number for number, name in enumerate(source.class_names) if name not in known])
    if len(numbers) < CLASSES:
        raise UserError(f"{source.name}: {len(numbers)} classes that the model was not trained on; it takes {CLASSES}")
    return [np.sort(draws.choice(numbers, CLASSES, replace=False)) for _ in range(fives)]


def measure(
    predictor: Predictor,
    images: np.ndarray,
    labels: np.ndarray,
    classes: np.ndarray,
    own: int,
    new: int,
    epochs: int,
    augment: str,
    draws: np.random.Generator,
) -> dict[str, float]:
    """One five: percent right of its new images, as predicted and after fine-tuning, and of those held out in it.

    Both the prediction and fine-tuning are given four fifths of the user's images; the fifth that is left is held out.
    Of each class `own` images (uint8, N, H, W, C) are drawn to be the user's, and `new` others to be new. Raises
    `UserError` where a class has fewer.
    """
    if (there := np.bincount(labels)[classes].min()) < own + new:
        raise UserError(f"--images {own} and --new {new}: a class has {there} images; ask for fewer")
    rows = np.stack([draws.permutation(np.flatnonzero(labels == number))[: own + new] for number in classes])
    mine, others = rows[:, :own].ravel(), rows[:, own:].ravel()
    predictor.sketch_images = len(mine)
    everything = predictor.predict(images[mine], labels[mine])
    predictor.sketch_images = looked_at(len(mine))
    network = predictor.predict(images[mine], labels[mine])
    tuned = predictor.finetune(network, images[mine], labels[mine], epochs, augment=augment)
    right = {
        name: 100 * float(np.mean(np.array(of.classify(images[others])) == labels[others]))
        for name, of in (("predicted", network), ("of_all_images", everything), ("finetuned", tuned.network))
    }
    points = pd.DataFrame(map(asdict, tuned.curve))
    points = points[points.epoch.isin([0, epochs])].set_index(["start", "epoch"]).accuracy
    return right | {f"held_out_{start}_{epoch}": float(value) for (start, epoch), value in points.items()}


def looked_at(images: int) -> int:
    """Four fifths of so many images: the others can be held out of fine-tuning."""
    return images * 4 // 5


def show(rows: pd.DataFrame, own: int, epochs: int) -> None:
    """Print the means over fives, with their 95% intervals."""
    mean = {name: plus_minus(*mean_interval(rows[name])) for name in rows}
    few = looked_at(CLASSES * own)
    table = Table(f"percent right, mean of {len(rows)} times {CLASSES} classes", Column("", justify="right"))
    table.add_row(f"new images, as predicted from {few}", mean["predicted"])
    table.add_row(f"  as predicted from all {CLASSES * own}", mean["of_all_images"])
    table.add_row(f"  after {epochs} epochs on {few}", mean["finetuned"])
    gain = mean_interval(rows.finetuned - rows.predicted)
    table.add_row("  what these epochs add", plus_minus(*gain, "+"))
    for start in ("predicted", "random"):
        first, last = (mean[f"held_out_{start}_{epoch}"] for epoch in (0, epochs))
        table.add_row(f"the fifth held out, from {start} weights", f"{first} to {last}")
    Console().print(table)


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser("python -m benchmarks.finetuning", description=__doc__)
    parser.add_argument("--model", default="cifar100-convnet3", help="as for `pudnet predict` (%(default)s)")
    parser.add_argument("--source", default="torchvision:CIFAR100", help="or npz:FILE, folder:PATH (%(default)s)")
    parser.add_argument("--images", type=positive, default=100, help="of each class, to predict from and train on")
    parser.add_argument("--new", type=positive, default=400, help="of each class, new ones")
    parser.add_argument("--epochs", type=positive, default=20)
    parser.add_argument("--fives", type=positive, default=20, help="draws of five classes (%(default)s)")
    parser.add_argument("--augment", default="shift_mirror", help="as for `pudnet finetune` (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/finetuning.json"))
    options = parser.parse_args()
    check_writable(options.out)
    predictor = Predictor.load(options.model)
    source = open_source(options.source, Path("data/raw"), predictor.card.image_size, predictor.card.channels)
    images = np.concatenate(list(source.batches()))
    draws, sizes = np.random.default_rng(SEED), (options.images, options.new, options.epochs)
    rows = pd.DataFrame(
        measure(predictor, images, source.labels, classes, *sizes, options.augment, draws)
        for classes in unseen_classes(predictor, source, options.fives, draws)
    )
    show(rows, options.images, options.epochs)
    write_json(options.out, {"fives": rows.to_dict("records")})
    print(f"written: {options.out}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
