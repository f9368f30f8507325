"""Are the predictions of the models that ship better than long training from scratch?

    OMP_NUM_THREADS=1 python -m reference.long_training    # 40 minutes on two cores of a CPU without bf16

CIFAR-100 is read from data/raw, or from where `study.sources` of params.yaml says that your copy is. It writes
studies/results/long_training.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from pipeline.studies.page import table_of
from pudnet.baselines.finetuned import FineTunedPrediction
from pudnet.device import wants_bf16
from pudnet.evaluation import Adapts
from pudnet.predictor import Predictor
from pudnet.scratch import Scratch, ScratchConfig
from reference.shipped import BESIDE, REFERENCE, Group, Kind, column, groups, percent_right

PAGE, MODEL, WORKERS = Path("studies/results/long_training.md"), "cifar100-convnet3", 2
EPOCHS, MORE_EPOCHS = (50, 100), 20  # from scratch; from the prediction
TEXT = """# Shipped predictions beside long training from scratch

Is the prediction of a shipped model, made in a fraction of a second, better than training a network of the same kind
on the same labelled images for a long time? {groups} groups have {classes} classes of CIFAR-100, with {labelled}
labelled images of each. The models were trained on none of these classes. Accuracy is measured on {measured} other
images of each class. Groups are drawn from the same images of 20 classes again and again, and intervals are over such
draws. In brackets: the difference to {reference}, paired over the groups.

Training from scratch has the recipe that was the best of five after 50 epochs, as measured on test groups
([`scratch_recipes`](scratch_recipes.md)): images are shifted and mirrored at random, and the rate rises to 0.003 and
falls to 0. That choice favours training from scratch. That PudNet+'s parts were chosen on groups of the same 20 classes
favours its prediction.

Made by `OMP_NUM_THREADS=1 python -m reference.long_training`. Accuracy in percent, with its 95% interval over groups.

"""
KIND, AUGMENT = Kind("torchvision:CIFAR100", classes=5, labelled=100, measured=400, groups=24), "shift_mirror"


def methods(predictor: Predictor, other: Predictor) -> Mapping[str, Adapts]:
    """The rows of the page: two predictions, and training on the group."""
    bf16 = wants_bf16("auto", predictor.device)
    more = ScratchConfig(MORE_EPOCHS, augment=AUGMENT)
    scratch = {
        f"from scratch, {epochs} epochs": Scratch(
            ScratchConfig(epochs, augment=AUGMENT), predictor.target, predictor.device, bf16, gc=False, compiled=True
        )
        for epochs in EPOCHS
    }
    return {
        REFERENCE: predictor,
        f"the prediction of `…{BESIDE}`": other,
        f"the prediction, then trained for {MORE_EPOCHS} epochs": FineTunedPrediction(
            predictor, more, bf16, compiled=True
        ),
        **scratch,
    }


def measured(rows: Mapping[str, Adapts], group: Group) -> dict[str, float]:
    """Percent right of the group's other images, by each method."""
    classes, found = tuple(range(int(group.labels.max()) + 1)), {}
    for name, method in rows.items():
        torch.manual_seed(0)
        looked_at = method.rows(group.labels)
        network = method.adapt(group.images[looked_at], group.labels[looked_at], classes)
        found[name] = percent_right(network, group)
    return found


def part(worker: int) -> list[dict[str, float]]:
    """A worker's share of the groups: the accuracies of each, by row."""
    torch.set_num_threads(1)
    predictor, other, found = Predictor.load(MODEL), Predictor.load(MODEL + BESIDE), []
    rows = methods(predictor, other)
    for group in groups(KIND, predictor, slice(worker, None, WORKERS)):
        found.append(measured(rows, group))
        print(found[-1], flush=True)
    return found


def page(found: Sequence[Mapping[str, float]]) -> str:
    """The table, as Markdown; `found`: the accuracies of every group, by row."""
    accuracies = {name: np.array([one[name] for one in found]) for name in found[0]}
    return TEXT.format(**asdict(KIND), reference=REFERENCE) + table_of(
        {"": [*accuracies], "accuracy": column(accuracies)}
    )


def main() -> None:
    """Measure all groups, two at a time, and write the page."""
    with ProcessPoolExecutor(WORKERS, get_context("spawn")) as pool:
        parts = list(pool.map(part, range(WORKERS)))
    PAGE.write_text(page([one for own in parts for one in own]), encoding="utf-8")


if __name__ == "__main__":
    main()
