"""Accuracy on twin groups, its interval, and the time of a prediction. Every method is measured here, the same way."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from scipy.special import stdtrit  # `scipy.stats` takes a second to import
from torch import Tensor

from pudnet.data.images import StoreImages
from pudnet.device import clock
from pudnet.predictor import Predictor
from pudnet.scratch import ScratchConfig, scratch_network, train_epoch
from pudnet.targets import Weights

FROM, ON = 0, 1  # twins in a table: a method adapts to the first group and is measured on the second


class Classifies(Protocol):
    """A network that classifies a group's classes."""

    def logits(self, images: Tensor) -> Tensor:
        """Normalised images (N, C, H, W) -> logits (N, k)."""


class Adapts(Protocol):
    """A trained method, which adapts to a new group. PudNet does so by predicting weights."""

    def rows(self, labels: Tensor) -> Tensor:
        """Rows of the images that `adapt` needs, for labels (N,) in 0..k-1."""

    def adapt(self, images: Tensor, labels: Tensor, classes: tuple) -> Classifies:
        """Normalised images (N, C, H, W) and labels (N,) in 0..k-1 -> a classifier of the k classes."""


def mean_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean of one value for each group, and the half-width of its 95% interval (Student's t)."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()), float("nan")
    error = values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(stdtrit(len(values) - 1, 0.975) * error)


def stratified_interval(strata: Sequence[np.ndarray]) -> tuple[float, float]:
    """Mean of the means of strata (class splits), and its 95% half-width for exactly these strata.

    If every stratum has one value (a whole set as test group), the interval is over the strata instead.
    """
    if all(len(values) == 1 for values in strata):
        return mean_interval(np.concatenate(strata))
    parts = [mean_interval(values) for values in strata]
    return float(np.mean([m for m, _ in parts])), float(np.sqrt(sum(h**2 for _, h in parts)) / len(parts))


def mean_half_width(measured: Sequence[tuple[float, int]]) -> float:
    """Half-width of the 95% interval (Wilson's) of a mean accuracy, from (accuracy in percent, number of images)."""
    widths = [high - low for low, high in itertools.starmap(wilson_interval, measured)]
    return float(np.linalg.norm(widths)) / 2 / len(widths)


def wilson_interval(accuracy: float, images: int) -> tuple[float, float]:
    """Ends of the 95% interval (Wilson's), in percent, of an accuracy in percent that so many images gave."""
    z, p = 1.959964, accuracy / 100
    middle = (p + z**2 / (2 * images)) / (1 + z**2 / images)
    half = z / (1 + z**2 / images) * math.sqrt(p * (1 - p) / images + z**2 / (4 * images**2))
    return max(0.0, 100 * (middle - half)), min(100.0, 100 * (middle + half))  # rounding may leave 0 to 100


def block_labels(images: StoreImages, indices: np.ndarray) -> Tensor:
    """A group's labels (N,), as positions in its list of classes."""
    classes = images.block_classes(indices)
    position = np.empty(classes.max() + 1, dtype=np.int64)
    position[classes] = np.arange(len(classes))
    return torch.from_numpy(position[images.labels[images.rows(indices)]]).to(images.device)


def adapt_input(method: Adapts, images: StoreImages, indices: np.ndarray) -> tuple[Tensor, Tensor]:
    """Those images of a group that a method adapts to: normalised (n, C, H, W), with their labels (n,)."""
    labels = block_labels(images, indices)
    rows = method.rows(labels)
    return images(indices[rows.cpu().numpy()]), labels[rows]


@torch.no_grad()
def twin_accuracies(
    method: Adapts,
    images: StoreImages,
    table: np.ndarray,
    bf16: bool,
    sketches: Sequence[Tensor] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """Adapt a method to each group of a table (G, 2, N) -> its accuracy on the group's twin, in percent (G,).

    `sketches`, one for each group, replace the groups' own sketches in PudNet's prediction.
    """
    accuracies = np.zeros(len(table))
    for g, (group, twin) in enumerate(table):
        given = () if sketches is None else (sketches[g],)
        accuracies[g] = twin_accuracy(_adapted(method, images, group, bf16, *given), images, twin, bf16)
        progress(g + 1)
    return accuracies


def timed_adaptation(method: Adapts, images: StoreImages, group: np.ndarray, bf16: bool) -> tuple[Classifies, float]:
    """Adapt a method to a group (N,), and time it: milliseconds from images in memory to a classifier."""
    start = clock(images.device)
    adapted = _adapted(method, images, group, bf16)
    return adapted, clock(images.device) - start


@torch.no_grad()
def twin_accuracy(adapted: Classifies, images: StoreImages, twin: np.ndarray, bf16: bool) -> float:
    """Accuracy in percent on a twin (N,) of the group that the classifier was adapted to."""
    truth = block_labels(images, twin)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        logits = adapted.logits(images(twin))
    return 100 * (logits.argmax(1) == truth).float().mean().item()


def _adapted(method: Adapts, images: StoreImages, group: np.ndarray, bf16: bool, *sketch: Tensor) -> Classifies:
    """Adapt a method to a group (N,); for PudNet, a given `sketch` replaces the group's own."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        return method.adapt(*adapt_input(method, images, group), _classes(images, group), *sketch)


def _classes(images: StoreImages, group: np.ndarray) -> tuple[int, ...]:
    return tuple(images.block_classes(group).tolist())


@torch.no_grad()
def group_sketches(predictor: Predictor, images: StoreImages, groups: np.ndarray, bf16: bool) -> list[Tensor]:
    """The sketch of each group of a table (G, N), as the hypernetwork takes it."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        return [predictor.sketch(*adapt_input(predictor, images, group)) for group in groups]


def shuffled(sketches: Sequence[Tensor], classes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Give each group the sketch of the next group with other classes (of the next group, if all have the same)."""
    sets = [frozenset(c) for c in classes]
    count = len(sketches)

    def other(g: int) -> int:
        return next((h for h in range(g + 1, g + count) if sets[h % count] != sets[g]), g + 1) % count

    return [sketches[other(g)] for g in range(count)]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a prediction: medians over groups, after warm-up, with the device synchronised."""

    device: str
    threads: int
    images: int  # in the group
    sketch_images: int  # of these, the sketch uses
    calibration_images: int
    # includes normalising the images; with class filters, the pass up to their layer and their solution
    sketch_ms: float
    generation_ms: float
    calibration_ms: float  # includes making the classifier, which uses the features of the same pass
    total_ms: float
    epoch_ms: float  # one epoch of training the same network from scratch on the same images
    epoch_ratio: float  # epoch_ms / total_ms


def time_prediction(
    predictor: Predictor, images: StoreImages, groups: np.ndarray, bf16: bool, warm_up: int = 2
) -> Timing:
    """Time predictions from the groups of a table (G, N), each followed by one epoch from scratch on the group."""
    rows = []
    warm_up = min(warm_up, len(groups))
    for group in np.concatenate([groups[:warm_up], groups]):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            steps = _prediction_steps(predictor, images, group)
        labels = block_labels(images, group)
        rows.append([*steps, _epoch(predictor, images(group), labels, bf16)])
    uses = predictor.uses(labels)
    sketch, generation, calibration, epoch = np.median(np.array(rows[warm_up:]), axis=0).tolist()
    total = float(np.median(np.array(rows[warm_up:])[:, :3].sum(1)))
    return Timing(
        device=str(torch.cuda.get_device_name(images.device) if images.device.type == "cuda" else images.device),
        threads=torch.get_num_threads(),
        images=groups.shape[1],
        sketch_images=len(uses.sketch),
        calibration_images=len(uses.calibration),
        sketch_ms=sketch,
        generation_ms=generation,
        calibration_ms=calibration,
        total_ms=total,
        epoch_ms=epoch,
        epoch_ratio=epoch / total,
    )


@torch.no_grad()
def _prediction_steps(predictor: Predictor, images: StoreImages, group: np.ndarray) -> list[float]:
    """Time sketch, generation and calibration, in milliseconds."""
    model, times = predictor.model, [clock(images.device)]

    def generate(sketch: Tensor) -> Weights:
        times.append(clock(images.device))
        weights = type(model).generate(model, sketch)
        times.append(clock(images.device))
        return weights

    model.generate = generate  # only now: no prediction elsewhere waits for a clock
    try:
        batch, labels = adapt_input(predictor, images, group)
        normalised = clock(images.device)
        predictor.adapt(batch, labels, _classes(images, group))
    finally:
        del model.generate
    if len(times) == 1:  # a model that writes no weights
        times += [normalised, normalised]
    return np.diff([*times, clock(images.device)]).tolist()


def _epoch(predictor: Predictor, images: Tensor, labels: Tensor, bf16: bool) -> float:
    """Time one epoch of Adam on the plain target with a linear head, in milliseconds."""
    network = scratch_network(predictor.target, int(labels.max()) + 1, images.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    start = clock(images.device)
    train_epoch(network, optimizer, images, labels, ScratchConfig(), bf16)
    return clock(images.device) - start
