"""Predicted weights as an initialisation: training them on the images, beside the same training from random ones."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from pudnet.baselines.scratch import ScratchConfig, train
from pudnet.card import Label
from pudnet.cpu import accelerate
from pudnet.data.images import normalize
from pudnet.data.own import Images, ImageSet, Pixels, encode_labels, image_set, images_at_a_time
from pudnet.device import wants_bf16
from pudnet.errors import UserError
from pudnet.network import PredictedNetwork
from pudnet.objective import centroids, metric_logits
from pudnet.targets import calibrate


@dataclass(frozen=True)
class Epoch:
    """One point of a fine-tuning curve; epoch 0 is the start. Accuracy in percent, on the held-out images."""

    start: str  # "predicted", "random"
    epoch: int
    seconds: float  # of training, since the start; measuring is not counted
    loss: float
    accuracy: float


@dataclass(frozen=True)
class FineTuned:
    """A network that was trained on, and the curves from predicted and from random weights."""

    network: PredictedNetwork
    curve: tuple[Epoch, ...]
    trained_on: int  # images
    held_out: int


class CentroidHead(nn.Module):
    """The metric classifier with centroids (k, d) that learn: features (N, d) -> tau cos(f, c_k) (Eq. 6)."""

    def __init__(self, start: Tensor, temperature: float) -> None:
        super().__init__()
        self.centroids = nn.Parameter(start.clone())
        self.temperature = temperature

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, d) -> logits (N, k)."""
        return metric_logits(features, self.centroids, self.temperature)


def finetune(
    network: PredictedNetwork,
    images: Images | ImageSet,
    labels: Sequence | Pixels | None = None,
    epochs: int = 10,
    held_out: float = 0.2,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> FineTuned:
    """Train a predicted network's weights and centroids on labelled images, and the same target from random weights.

    Both get the same images, batches, loss (cross-entropy of Eq. 6's logits) and schedule (`ScratchConfig`:
    AdamW, a rate that rises and falls to zero). A part `held_out` of each class is kept from training and gives
    the accuracies, at least one image of it. All images are in memory at the network's size.

    Raises:
        UserError: for unfit images, labels that the network does not know, classes with too few images to hold
            any out, or an `epochs`, `held_out` or `learning_rate` out of range.
    """
    if not (isinstance(epochs, int) and epochs >= 1):
        raise UserError(f"epochs: must be an integer of at least 1, got {epochs!r}")
    if not 0 < held_out < 1:
        raise UserError(f"held_out: must lie between 0 and 1, got {held_out!r}")
    if not learning_rate > 0:
        raise UserError(f"learning_rate: must be positive, got {learning_rate!r}")
    normalized, columns = _all_images(network, images, labels)
    config = ScratchConfig(epochs=epochs, learning_rate=learning_rate, batch=min(50, len(columns)))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        kept, tested = _hold_out(columns, held_out, network.classes)
        parts = (normalized[kept], columns[kept], normalized[tested], columns[tested])
        with _progress() as progress:
            predicted, curve = _train(network, "predicted", parts, config, progress)
            _, other = _train(_random_start(network, *parts[:2]), "random", parts, config, progress)
    return FineTuned(predicted, (*curve, *other), len(kept), len(tested))


def _all_images(
    network: PredictedNetwork, images: Images | ImageSet, labels: Sequence | Pixels | None
) -> tuple[Tensor, Tensor]:
    """Normalised images (N, C, H, W), and of each the column of its label in the network's logits."""
    own = image_set(images, network.card, labels)
    encoded, names = encode_labels(own.labels, own.count)
    unknown = [name for name in names if name not in network.classes]
    if unknown:
        known = ", ".join(map(str, network.classes))
        raise UserError(f"labels: the network does not know {unknown[0]!r}; it knows {known}")
    device = network.mean.device
    chunks = own.chunks(images_at_a_time(network.card.image_size))
    normalized = torch.cat([normalize(chunk.to(device), network.mean, network.std) for chunk in chunks])
    return normalized, torch.tensor([network.classes.index(name) for name in names])[encoded].to(device)


def _hold_out(columns: Tensor, part: float, classes: Sequence[Label]) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows to test on, drawn from each class."""
    kept, tested = [], []
    for column in columns.unique().tolist():
        rows = torch.nonzero(columns == column).squeeze(1)
        rows = rows[torch.randperm(len(rows), device=rows.device)]
        count = max(1, round(part * len(rows)))
        if count >= len(rows):
            raise UserError(f"labels: class {classes[column]!r} has {len(rows)} image(s), too few to hold {count} out")
        tested.append(rows[:count])
        kept.append(rows[count:])
    return torch.cat(kept), torch.cat(tested)


def _random_start(network: PredictedNetwork, images: Tensor, columns: Tensor) -> PredictedNetwork:
    """The same target, He-initialised anew, with the centroids that it gives the classes."""
    body = copy.deepcopy(network.body)
    for module in body.modules():
        if isinstance(module, nn.Conv2d):
            weight = torch.empty_like(module.weight)
            nn.init.kaiming_normal_(weight, nonlinearity="relu")
            module.weight = nn.Parameter(weight)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_parameters()
    start = network.centroids.clone()
    rows = _spread(images)
    seen = columns[rows].unique()  # a class without images keeps its centroid
    features = calibrate(body, images[rows])
    start[seen] = centroids(features, torch.searchsorted(seen, columns[rows]), len(seen))
    return PredictedNetwork(body, start, network.card)


def _train(
    start: PredictedNetwork,
    name: str,
    parts: tuple[Tensor, Tensor, Tensor, Tensor],
    config: ScratchConfig,
    progress: Progress,
) -> tuple[PredictedNetwork, list[Epoch]]:
    """Train a copy; the curve begins with what it starts from."""
    images, columns, test_images, test_columns = parts
    body = copy.deepcopy(start.body)
    for parameter in body.parameters():
        parameter.requires_grad_(True)
    if images.device.type == "cpu":
        accelerate(body)
    head = CentroidHead(start.centroids.float(), start.card.temperature)
    model = nn.Sequential(OrderedDict(body=body, flat=nn.Flatten(), head=head)).to(images.device)
    task = progress.add_task(f"from {name} weights", total=config.epochs, accuracy=0.0)
    curve, spent, begun = [], 0.0, time.perf_counter()

    def measure(epoch: int, loss: float) -> None:
        nonlocal spent, begun
        spent += time.perf_counter() - begun
        accuracy = _accuracy(model, images, test_images, test_columns)
        curve.append(Epoch(name, epoch, spent, loss, accuracy))
        progress.update(task, completed=epoch, accuracy=accuracy)
        begun = time.perf_counter()

    measure(0, float("nan"))
    curve[0] = dataclasses.replace(curve[0], seconds=0.0)
    spent = 0.0
    train(model, images, columns, config, wants_bf16("auto", images.device), after_epoch=measure)
    calibrate(body.eval(), images[_spread(images)])
    provenance = {**start.card.provenance, "finetuned_epochs": config.epochs}
    card = dataclasses.replace(start.card, provenance=provenance)
    for parameter in body.parameters():
        parameter.requires_grad_(False)
    return PredictedNetwork(body, head.centroids.detach(), card), curve


def _accuracy(model: nn.Sequential, images: Tensor, test_images: Tensor, test_columns: Tensor) -> float:
    """Accuracy in percent on the held-out images, with BatchNorm's statistics from the training images."""
    with torch.no_grad():
        model.eval()
        calibrate(model.body, images[_spread(images)])
        found = [model(part).argmax(1) for part in test_images.split(images_at_a_time(images.shape[-1]))]
    return 100 * (torch.cat(found) == test_columns).float().mean().item()


def _spread(images: Tensor) -> Tensor:
    """Rows of the images, spread over all of them, that BatchNorm's running statistics are taken from."""
    count = min(len(images), images_at_a_time(images.shape[-1]))
    return torch.arange(count, device=images.device) * len(images) // count


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"))
    accuracy = TextColumn("held out {task.fields[accuracy]:.1f} %")
    return Progress(*columns, accuracy, TimeRemainingColumn())
