"""What the class filters of a model that ships are worth, beside a classifier alone on the same trunk.

    OMP_NUM_THREADS=1 python reference/shipped.py    # some 15 minutes on one core of a CPU

Among others on sets that nobody trained on. torchvision's sets are read from data/raw, or from where `study.sources`
of params.yaml says that your copy is. It writes studies/results/shipped.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.params import load_params
from pipeline.reporting.numbers import plus_minus
from pipeline.studies.page import table_of
from pudnet.baselines.heads import fit_head
from pudnet.classifier import fit
from pudnet.data.images import normalize
from pudnet.data.sources import open_source
from pudnet.evaluation import Classifies, mean_interval
from pudnet.network import Classifier
from pudnet.predictor import Predictor

RAW, PAGE = Path("data/raw"), Path("studies/results/shipped.md")
MODEL = "cifar100-convnet3"
REFERENCE = "the prediction"
TEXT = """# The shipped model beside a classifier alone

What `{model}` predicts for a group, and three classifiers on the trunk that it has for all groups,
without the filters that it makes for the group: the same ridge classifier, which also chooses its penalty on the
group, and scikit-learn's ridge and logistic regression. All are given the same labelled images, and measured on other
images of the same classes: {groups} groups of each kind. A group of Fashion-MNIST or of scikit-learn's digits has all
ten classes, of which the model has seen none; a group of CIFAR-100 has five of the 20 that it has not seen. Groups are
drawn from the same images again and again, of digits from 1,797, and intervals are over such draws. In brackets: the
difference to the prediction, paired over the groups.

Made by `OMP_NUM_THREADS=1 python reference/shipped.py`. Accuracy in percent, with its 95% interval over groups.

"""


@dataclass(frozen=True)
class Kind:
    """What groups to draw from a set."""

    source: str
    classes: int
    labelled: int  # images of a class
    measured: int  # other images of a class, to measure accuracy on
    groups: int = 50


KINDS = {
    "CIFAR-100, 90 images": Kind("torchvision:CIFAR100", 5, 18, 100),
    "CIFAR-100, 500": Kind("torchvision:CIFAR100", 5, 100, 100),
    "Fashion-MNIST, 90": Kind("torchvision:FashionMNIST", 10, 9, 100),
    "Fashion-MNIST, 1,000": Kind("torchvision:FashionMNIST", 10, 100, 100),
    "digits, 90": Kind("sklearn:digits", 10, 9, 90),
    "digits, 800": Kind("sklearn:digits", 10, 80, 90),
}


@dataclass(frozen=True)
class Group:
    """Images (N, C, H, W), normalised, with labels (N,) in 0..k-1, and others of the same classes."""

    images: Tensor
    labels: Tensor
    others: Tensor
    truth: Tensor


def groups(kind: Kind, predictor: Predictor) -> Iterator[Group]:
    """Draw groups of classes that the predictor's model was not trained on; of images, none is in a group twice."""
    card = predictor.card
    spec = load_params().study.sources.get(kind.source, kind.source)
    source = open_source(spec, RAW, card.image_size, card.channels)
    pixels = np.concatenate(list(source.batches()))
    trained = set(card.provenance["train_classes"]) if kind.source == card.provenance["source"] else set()
    unseen = [label for label, name in enumerate(source.class_names) if name not in trained]
    for seed in range(kind.groups):
        rng = np.random.default_rng(seed)
        classes = rng.choice(unseen, kind.classes, replace=False)
        each = kind.labelled + kind.measured
        rows = np.stack([rng.permutation(np.flatnonzero(source.labels == label))[:each] for label in classes])
        labelled, measured = rows[:, : kind.labelled], rows[:, kind.labelled :]
        parts = []
        for chosen in (labelled, measured):
            own = torch.arange(kind.classes).repeat_interleave(chosen.shape[1])
            parts += [normalize(torch.from_numpy(pixels[chosen.ravel()]), predictor.mean, predictor.std), own]
        yield Group(*parts)


@torch.no_grad()
def classifiers(predictor: Predictor, group: Group) -> dict[str, Classifies]:
    """The prediction for a group, and classifiers on the trunk without its filters."""
    labels, classes = group.labels, tuple(range(int(group.labels.max()) + 1))
    trunk = predictor.model.base_weights()
    body, features, own = predictor.support(trunk, group.images, labels)
    card = predictor.network_card(classes, labels, features, own)
    return {
        REFERENCE: predictor.adapt(group.images, labels, classes),
        "its trunk, the same ridge classifier": Classifier(body, fit(features, own, card)),
        "its trunk, scikit-learn's ridge": Classifier(body, fit_head("ridge", features, own)),
        "its trunk, logistic regression": Classifier(body, fit_head("logistic", features, own)),
    }


def measured(kind: Kind, predictor: Predictor) -> dict[str, np.ndarray]:
    """Accuracies in percent (G,) of each classifier on groups of one kind."""
    accuracies: dict[str, list[float]] = {}
    for group in groups(kind, predictor):
        for name, classifier in classifiers(predictor, group).items():
            right = classifier.logits(group.others).argmax(1) == group.truth
            accuracies.setdefault(name, []).append(100 * right.float().mean().item())
    return {name: np.array(values) for name, values in accuracies.items()}


def column(accuracies: dict[str, np.ndarray]) -> list[str]:
    """One cell for each classifier, as text."""
    cells = []
    for name, values in accuracies.items():
        less = plus_minus(*mean_interval(values - accuracies[REFERENCE]), "+")
        cells.append(plus_minus(*mean_interval(values)) + ("" if name == REFERENCE else f" ({less})"))
    return cells


def main() -> None:
    """Measure all kinds of groups, and write the page after each."""
    torch.set_num_threads(1)
    predictor, columns = Predictor.load(MODEL), {}
    text = TEXT.format(model=MODEL, groups=next(iter(KINDS.values())).groups)
    for title, kind in KINDS.items():
        accuracies = measured(kind, predictor)
        columns = {"": list(accuracies), **columns, title: column(accuracies)}
        print(f"{title}: {columns[title]}", flush=True)
        PAGE.write_text(text + table_of(columns), encoding="utf-8")


if __name__ == "__main__":
    main()
