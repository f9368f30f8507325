"""Fine-tuning: trains predicted weights further on images, and random weights the same way for comparison."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from pudnet.augmentation import AUGMENTATIONS
from pudnet.card import Card
from pudnet.classifier import fit
from pudnet.data.folders import one_form
from pudnet.data.rows import CALIBRATION_IMAGES, first_rows, spread_rows
from pudnet.data.user_images import Images, ImageSet, Label, Pixels, images_at_a_time, labelled_set, noting
from pudnet.device import clock, seed_random, wants_bf16
from pudnet.errors import RunFailed, UserError
from pudnet.network import PredictedNetwork, features_in_parts
from pudnet.scratch import ScratchConfig, train, with_head
from pudnet.targets import calibrate, draw_convolutions


@dataclass(frozen=True)
class Epoch:
    """One point of a fine-tuning curve. Accuracy is in percent, on the held-out images."""

    start: str  # which weights training started from: "predicted" or "random"
    epoch: int  # 0: before training
    seconds: float  # spent on training so far, without the measurements
    loss: float
    accuracy: float


@dataclass(frozen=True)
class FineTuned:
    """The fine-tuned network, and the curves from predicted and from random weights."""

    network: PredictedNetwork
    curve: tuple[Epoch, ...]
    trained_on: int  # number of images
    held_out: int  # number of images


@dataclass(frozen=True)
class Parts:
    """Training images and held-out test images: normalised (N, C, H, W), with the column (N,) of each one's class."""

    images: Tensor
    columns: Tensor
    test_images: Tensor
    test_columns: Tensor


@torch.inference_mode(False)  # training needs gradients, which a caller's inference mode would not record
def finetune(
    network: PredictedNetwork,
    images: Images | ImageSet,
    labels: Sequence | Pixels | None = None,
    epochs: int = 10,
    held_out: float = 0.2,
    learning_rate: float = 3e-3,
    seed: int = 0,
    augment: str = "shift",
) -> FineTuned:
    """Train a predicted network's weights and classifier on labelled images, and the same target from random weights.

    The share `held_out` of each class, at least one image, is kept from training and gives the accuracies. For both
    starts, BatchNorm and the classifier are first fitted to training images, the classifier to as many of each class as
    in the prediction; then both are trained on the same batches, with the same loss (cross-entropy) and schedule
    (`ScratchConfig`: AdamW, with a rate that rises and then falls to zero). `augment` is one of `AUGMENTATIONS`. With
    "none" the fitted classifier is right about nearly all training images, and there is little left to learn.

    The prediction may have seen images that are held out here, but never their labels: images whose labels it used
    (PudNet+), or that an earlier fine-tuning trained on, always become training images. All images are
    kept in memory, at the network's size.

    Raises:
        UserError: if images cannot be used, a label is unknown to the network, a class has no images or too few to
            hold any out, `epochs`, `held_out` or `learning_rate` is out of range, or `augment` is unknown.
        RunFailed: if the loss of the predicted network does not stay finite.
    """
    config = _config(epochs, held_out, learning_rate, augment)
    network, seen = copy.deepcopy(network).float(), {}
    normalized, columns = _all_images(network, images, labels, seen)
    with torch.random.fork_rng([columns.device] if columns.is_cuda else []):
        seed_random(seed, columns.device)
        used = _labels_used(network.card)
        known = torch.tensor([seen[row] in used for row in range(len(columns))], device=columns.device)
        kept, tested = _hold_out(columns, known, held_out, network.classes)
        parts = Parts(normalized[kept], columns[kept], normalized[tested], columns[tested])
        starts = {"predicted": _ready(network, parts), "random": _ready(_random(network), parts)}
        _warm_up(starts["random"], parts, config)  # so that neither curve's seconds include one-time costs
        found, curve = {}, []
        with _progress() as progress:
            for name, start in starts.items():
                seed_random(seed, columns.device)
                found[name], points = _train(start, name, parts, config, progress)
                curve += points
    tuned = found["predicted"]
    if not all(bool(tensor.isfinite().all()) for tensor in tuned.state_dict().values()):
        raise RunFailed("fine-tuning: the loss did not stay finite; lower the learning rate")
    trained_on = {seen[row] for row in kept.tolist()}
    looked_at = tuple(sorted(trained_on | {*network.card.looked_at}))
    tuned.card = dataclasses.replace(tuned.card, looked_at=looked_at, labelled=tuple(sorted(trained_on | used)))
    return FineTuned(tuned, tuple(curve), len(kept), len(tested))


def _config(epochs: int, held_out: float, learning_rate: float, augment: str) -> ScratchConfig:
    """Check the arguments and make the training run's configuration."""
    if isinstance(epochs, bool) or not isinstance(epochs, Integral) or epochs < 1:
        raise UserError(f"epochs: must be an integer of at least 1, got {epochs!r}")
    if not isinstance(held_out, Real) or not 0 < held_out < 1:
        raise UserError(f"held_out: must lie between 0 and 1, got {held_out!r}")
    if not isinstance(learning_rate, Real) or not 0 < learning_rate < math.inf:
        raise UserError(f"learning_rate: must be positive, got {learning_rate!r}")
    if augment not in AUGMENTATIONS:
        raise UserError(f"augment: must be one of {', '.join(AUGMENTATIONS)}, got {augment!r}")
    return ScratchConfig(epochs=int(epochs), learning_rate=float(learning_rate), augment=augment)


def _all_images(
    network: PredictedNetwork, images: Images | ImageSet, labels: Sequence | Pixels | None, seen: dict[int, str]
) -> tuple[Tensor, Tensor]:
    """Normalised images (N, C, H, W), and the column (N,) of each one's class in the network's logits.

    `seen` collects the checksum of each image by its row.
    """
    own, encoded, names = labelled_set(images, labels, network.card)
    # A folder's labels are strings, in one Unicode form.
    column = {one_form(name): position for position, name in enumerate(network.classes)}
    if unknown := [name for name in names if one_form(name) not in column]:
        known = ", ".join(map(str, network.classes))
        raise UserError(f"labels: the network does not know {unknown[0]!r}; it knows {known}")
    if absent := set(column) - set(map(one_form, names)):
        raise UserError(f"labels: no images of class {min(absent)!r}, which the network knows")
    columns = torch.tensor([column[one_form(name)] for name in names])[encoded]
    return network.normalize(noting(own, seen)), columns.to(network.mean.device)


def _labels_used(card: Card) -> set[str]:
    """Checksums of the images whose labels made the weights: all that were looked at, if an older file does not say."""
    return {*(card.labelled or (card.looked_at if card.labels_per_class else ()))}


def _hold_out(columns: Tensor, known: Tensor, part: float, classes: tuple[Label, ...]) -> tuple[Tensor, Tensor]:
    """Draw training and test rows from each class. Those of `known` (N,), whose labels made the weights, only train."""
    kept, tested = [], []
    sizes = columns.bincount().tolist()
    wanted = [max(1, round(part * size)) for size in sizes]
    for column, count in enumerate(wanted):
        rows = torch.nonzero(columns == column).squeeze(1)
        learned, rest = rows[known[rows]], rows[~known[rows]]
        if count > len(rest) or count == len(rows):
            has = f"labels: class {classes[column]!r} has {len(rows)} image(s)"
            if not len(learned):
                raise UserError(f"{has}, too few to hold {count} out")
            used = f"{len(learned)} of which the network was predicted from or trained on with their labels"
            each = min(size - held for size, held in zip(sizes, wanted, strict=True))
            fewer = f"--sketch {each * len(classes)} --support {each}; in Python sketch_images, support_per_class"
            advice = f", or predict from fewer ({fewer})" * (each > 0)
            raise UserError(f"{has}, {used}, too few to hold {count} out; give more{advice}")
        rest = rest[torch.randperm(len(rest), device=rest.device)]
        tested.append(rest[:count])
        kept.append(torch.cat([learned, rest[count:]]))
    return torch.cat(kept), torch.cat(tested)


def _random(network: PredictedNetwork) -> PredictedNetwork:
    """The same target, newly initialised: convolutions as He, all other parameters by their layers' own rules."""
    body = copy.deepcopy(network.body)
    for module in body.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    draw_convolutions(body)
    return PredictedNetwork(body, network.classifier, network.card)


def _ready(network: PredictedNetwork, parts: Parts) -> PredictedNetwork:
    """A copy whose BatchNorm and classifier (its penalty is the prediction's) are fitted to the training images."""
    body = copy.deepcopy(network.body)
    _calibrate(body, parts)
    rows = first_rows(parts.columns, network.card.support_per_class)
    features = features_in_parts(body, parts.images[rows])
    return PredictedNetwork(body, fit(features, parts.columns[rows], network.card), network.card)


def _calibrate(body: nn.Module, parts: Parts) -> None:
    """Calibrate BatchNorm, in place, on one batch of training images spread over the classes."""
    count = max(CALIBRATION_IMAGES, images_at_a_time(parts.images.shape[-1]))
    calibrate(body.eval(), parts.images[spread_rows(parts.columns, count)])


def trainable(start: PredictedNetwork, compiled: bool = False) -> nn.Sequential:
    """A copy of a network in which all weights and the classifier are trainable."""
    return with_head(copy.deepcopy(start.body), copy.deepcopy(start.classifier), compiled)


def _warm_up(start: PredictedNetwork, parts: Parts, config: ScratchConfig) -> None:
    """Train a copy for one epoch and throw it away."""
    train(trainable(start), parts.images, parts.columns, dataclasses.replace(config, epochs=1), _bf16(parts))


def _train(
    start: PredictedNetwork, name: str, parts: Parts, config: ScratchConfig, progress: Progress
) -> tuple[PredictedNetwork, list[Epoch]]:
    """Train a copy of `start` -> the trained network and its curve, from epoch 0."""
    model = trainable(start)
    task = progress.add_task(f"from {name} weights", total=config.epochs, accuracy=0.0)

    def show(point: Epoch) -> None:
        progress.update(task, completed=point.epoch, accuracy=point.accuracy)

    curve = train_on(model, name, parts, config, _bf16(parts), show)
    before = start.card.provenance
    epochs = before.get("finetuned_epochs", 0) + config.epochs  # it may have been fine-tuned before
    provenance = {**before, "finetuned_epochs": epochs, "finetuned_on": len(parts.images)}
    card = dataclasses.replace(start.card, provenance=provenance)
    return PredictedNetwork(model.body.requires_grad_(False), model.head.requires_grad_(False), card), curve


def train_on(
    model: nn.Sequential,
    name: str,
    parts: Parts,
    config: ScratchConfig,
    bf16: bool,
    after_epoch: Callable[[Epoch], None] = lambda point: None,
) -> list[Epoch]:
    """Train a network of `body`, `flat` and `head` in place and calibrate its BatchNorm -> its curve, from epoch 0.

    `after_epoch` is called with each point of the curve.
    """
    curve, spent, begun = [], 0.0, clock(parts.images.device)

    def measure(epoch: int, loss: float) -> None:
        nonlocal spent, begun
        spent += (clock(parts.images.device) - begun) / 1000 if epoch else 0.0
        curve.append(Epoch(name, epoch, round(spent, 4), loss, round(_accuracy(model, parts), 4)))
        after_epoch(curve[-1])
        begun = clock(parts.images.device)

    measure(0, math.nan)
    train(model, parts.images, parts.columns, config, bf16, after_epoch=measure)
    _calibrate(model.body, parts)
    return curve


def _accuracy(model: nn.Sequential, parts: Parts) -> float:
    """Accuracy in percent on the held-out images, with BatchNorm calibrated on the training images."""
    model.eval()
    _calibrate(model.body, parts)
    found = features_in_parts(model, parts.test_images).argmax(1)  # the model includes the head: these are logits
    return 100 * int((found == parts.test_columns).sum()) / len(parts.test_columns)


def _bf16(parts: Parts) -> bool:
    return wants_bf16("auto", parts.images.device)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"))
    accuracy = TextColumn("held out {task.fields[accuracy]:.1f} %")
    return Progress(*columns, accuracy, TimeRemainingColumn(), console=Console(stderr=True))
