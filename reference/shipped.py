"""What the parts of the models that ship are worth: all blocks, the filters that they make for a group, and the trunk.

    OMP_NUM_THREADS=1 python reference/shipped.py    # 50 minutes on one core of a CPU

Mostly on sets that nobody trained on. torchvision's sets are read from data/raw, or from where `study.sources` of
params.yaml says that your copy is. It writes studies/results/shipped.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.params import load_params
from pipeline.reporting.numbers import plus_minus
from pipeline.studies.page import table_of
from pudnet.baselines.heads import fit_head
from pudnet.card import Card
from pudnet.classifier import centroids, metric_logits
from pudnet.data.images import normalize
from pudnet.data.sources import open_source
from pudnet.evaluation import Classifies, mean_interval
from pudnet.network import Classifier, features_in_parts
from pudnet.predictor import Predictor
from pudnet.targets import ALL_BLOCKS

RAW, PAGE = Path("data/raw"), Path("studies/results/shipped.md")
REFERENCE = "the prediction"
FIRST_DRAW = 100  # draws 0 to 11 were looked at when the scale of earlier blocks was chosen
BESIDE = "-pretrained-ridge"  # at the end of the name of a model that has another trunk
TEXT = """# What the shipped models add to a trunk with a classifier

For groups of images, mostly from sets that the models were not trained on, these classifiers are compared:

- the prediction of a shipped PudNet+;
- that of the shipped model whose trunk is pretrained;
- of the PudNet+, its ridge classifier on the last block alone, without the choice of blocks;
- the same on the trunk that PudNet+ has for all groups, without the filters that it makes for the group (beside the one
  above, this says what filters are worth);
- scikit-learn's ridge on the last block of that trunk;
- on the last block of the pretrained trunk: class centroids (by cosines), and scikit-learn's ridge and logistic
  regression.

All but class centroids choose their penalty on the group. They are given the same labelled images, and measured on
other images of the same classes: {groups} groups of each kind. A group has all ten classes of scikit-learn's digits or
of Fashion-MNIST, five of CIFAR-100, or two of Fashion-MNIST for `fashion-convnet3`; the model has seen none of them.
Images are made as the model's training data was: for `fashion-convnet3`, those of CIFAR-100 are grey and of 28 pixels.
Groups are drawn from the same images again and again, of digits from 1,797, and intervals are over such draws. The
scale of earlier blocks, a half or one, was chosen on twelve other draws. In brackets: the difference to the prediction,
paired over the groups.

Made by `OMP_NUM_THREADS=1 python reference/shipped.py`. Accuracy in percent, with its 95% interval over groups. "all
blocks" is how many of the groups were predicted a classifier of all blocks.
"""


@dataclass(frozen=True)
class Kind:
    """What groups to draw from a set."""

    source: str
    classes: int
    labelled: int  # images of a class
    measured: int  # other images of a class, to measure accuracy on
    groups: int = 50


DIGITS = {"digits, 90": Kind("sklearn:digits", 10, 9, 90), "digits, 800": Kind("sklearn:digits", 10, 80, 90)}
CIFAR = {
    "CIFAR-100, 90 images": Kind("torchvision:CIFAR100", 5, 18, 100),
    "CIFAR-100, 500": Kind("torchvision:CIFAR100", 5, 100, 100),
}
KINDS = {
    "cifar100-convnet3": {
        **CIFAR,
        "Fashion-MNIST, 90": Kind("torchvision:FashionMNIST", 10, 9, 100),
        "Fashion-MNIST, 1,000": Kind("torchvision:FashionMNIST", 10, 100, 100),
        **DIGITS,
    },
    "fashion-convnet3": {
        "Fashion-MNIST, 90 images": Kind("torchvision:FashionMNIST", 2, 45, 300),
        "Fashion-MNIST, 600": Kind("torchvision:FashionMNIST", 2, 300, 300),
        **CIFAR,
        **DIGITS,
    },
}


@dataclass(frozen=True)
class Group:
    """Images (N, C, H, W), normalised, with labels (N,) in 0..k-1, and others of the same classes."""

    images: Tensor
    labels: Tensor
    others: Tensor
    truth: Tensor


def not_trained_on(source: str, class_names: Sequence[str], card: Card) -> list[int]:
    """The classes of a source, by their position, that a model was not trained on."""
    trained = set(card.provenance["train_classes"]) if source == card.provenance["source"] else set()
    return [label for label, name in enumerate(class_names) if name not in trained]


def groups(kind: Kind, predictor: Predictor, share: slice = slice(None)) -> Iterator[Group]:
    """Draw groups of classes that the predictor's model was not trained on; of images, none is in a group twice.

    `share`: which of them.
    """
    card = predictor.card
    spec = load_params().study.sources.get(kind.source, kind.source)
    source = open_source(spec, RAW, card.image_size, card.channels)
    pixels = np.concatenate(list(source.batches()))
    unseen = not_trained_on(kind.source, source.class_names, card)
    for seed in range(FIRST_DRAW, FIRST_DRAW + kind.groups)[share]:
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


@dataclass(frozen=True)
class Models:
    """A PudNet+ that ships and the model with a pretrained trunk beside it, and both without the choice of blocks."""

    predictor: Predictor
    other: Predictor
    alone: Predictor
    other_alone: Predictor

    @classmethod
    def load(cls, name: str) -> Models:
        """The PudNet+ of this name, and the others."""
        predictor, other = Predictor.load(name), Predictor.load(name + BESIDE)
        assert other.card.provenance["train_classes"] == predictor.card.provenance["train_classes"]
        assert (other.card.mean, other.card.std) == (predictor.card.mean, predictor.card.std)
        return cls(predictor, other, last_block(predictor), last_block(other))


def last_block(predictor: Predictor) -> Predictor:
    """The same model, which does not choose blocks."""
    card = predictor.card
    alone = Predictor.from_card(dataclasses.replace(card, model={**card.model, "blocks": "last"}))
    alone.model.load_state_dict(predictor.model.state_dict())
    return alone


@torch.no_grad()
def classifiers(models: Models, group: Group) -> dict[str, Classifies]:
    """The prediction for a group, that of the other model, and classifiers with less."""
    own = group.images, group.labels, tuple(range(int(group.labels.max()) + 1))
    alone, pretrained = models.alone, models.other_alone.adapt(*own).body
    trunk = alone.network(alone.model.base_weights(), *own)
    return {
        REFERENCE: models.predictor.adapt(*own),
        f"the prediction of `…{BESIDE}`": models.other.adapt(*own),
        "the last block alone": alone.adapt(*own),
        "and without filters of the group": trunk,
        "scikit-learn's ridge on that": with_head(trunk.body, "ridge", group),
        "pretrained trunk, class centroids": with_centroids(pretrained, group),
        "pretrained trunk, scikit-learn's ridge": with_head(pretrained, "ridge", group),
        "pretrained trunk, logistic regression": with_head(pretrained, "logistic", group),
    }


def with_head(body: nn.Module, head: str, group: Group) -> Classifier:
    """A head of scikit-learn's on a body's features."""
    return Classifier(body, fit_head(head, features_in_parts(body, group.images), group.labels))


def with_centroids(body: nn.Module, group: Group) -> Classifier:
    """Cosines to the centroids of a body's features."""
    points = centroids(features_in_parts(body, group.images), group.labels, int(group.labels.max()) + 1)
    return Classifier(body, lambda features: metric_logits(features, points, 1.0))


def percent_right(classifier: Classifies, group: Group) -> float:
    """Percent of the group's other images that a classifier is right about."""
    right = classifier.logits(group.others).argmax(1) == group.truth
    return 100 * right.float().mean().item()


def measured(kind: Kind, models: Models) -> tuple[dict[str, np.ndarray], int]:
    """Accuracies in percent (G,) of each classifier on groups of one kind, and how many chose all blocks."""
    accuracies, wide = {}, 0
    for group in groups(kind, models.predictor):
        for name, classifier in classifiers(models, group).items():
            accuracies.setdefault(name, []).append(percent_right(classifier, group))
            wide += name == REFERENCE and classifier.card.target == ALL_BLOCKS
    return {name: np.array(values) for name, values in accuracies.items()}, wide


def column(accuracies: Mapping[str, np.ndarray]) -> list[str]:
    """One cell for each classifier, as text."""
    cells = []
    for name, values in accuracies.items():
        less = plus_minus(*mean_interval(values - accuracies[REFERENCE]), "+")
        cells.append(plus_minus(*mean_interval(values)) + ("" if name == REFERENCE else f" ({less})"))
    return cells


def table(model: str) -> str:
    """Measure all kinds of groups by one model -> a Markdown table."""
    models, columns = Models.load(model), {}
    for title, kind in KINDS[model].items():
        accuracies, wide = measured(kind, models)
        columns = {"": [*accuracies, "all blocks"], **columns, title: [*column(accuracies), f"{wide} of {kind.groups}"]}
        print(f"{model}, {title}: {columns[title]}", flush=True)
    return f"\n## {model}\n\n{table_of(columns)}"


def main() -> None:
    """Measure the models, and write the page."""
    torch.set_num_threads(1)
    text = TEXT.format(groups=next(iter(CIFAR.values())).groups)
    PAGE.write_text(text + "".join(map(table, KINDS)), encoding="utf-8")


if __name__ == "__main__":
    main()
