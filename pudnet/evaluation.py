"""Accuracy on twin groups, its interval, and what a prediction costs. Every method is measured here alike."""

from __future__ import annotations

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

FROM, ON = 0, 1  # a table's twins: weights are predicted from the one, accuracy is measured on the other


class Classifies(Protocol):
    """A network that is ready for a group's classes."""

    def logits(self, images: Tensor) -> Tensor:
        """Normalised images (N, C, H, W) -> logits (N, k)."""


class Adapts(Protocol):
    """What every method does for a new group, once it is trained: PudNet predicts, others do as they do."""

    def rows(self, labels: Tensor) -> Tensor:
        """Rows of the images that `adapt` looks at, for labels (N,) in 0..k-1."""

    def adapt(self, images: Tensor, labels: Tensor, classes: tuple) -> Classifies:
        """Normalised images (N, C, H, W) and labels (N,) in 0..k-1 -> a classifier of the k classes."""


def mean_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and the half-width of its 95% interval (Student's t), of one value a group."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()), float("nan")
    error = values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(stdtrit(len(values) - 1, 0.975) * error)


def stratified_interval(strata: Sequence[np.ndarray]) -> tuple[float, float]:
    """Mean over strata (class splits) of their means, and its 95% half-width with the strata held fixed.

    Of strata of one value each (a whole set) there is only an interval over strata.
    """
    if all(len(values) == 1 for values in strata):
        return mean_interval(np.concatenate(strata))
    parts = [mean_interval(values) for values in strata]
    return float(np.mean([m for m, _ in parts])), float(np.sqrt(sum(h**2 for _, h in parts)) / len(parts))


def mean_half_width(measured: Sequence[tuple[float, int]]) -> float:
    """Half-width of the 95% interval of the mean of accuracies in percent, each of so many images (Wilson's)."""
    z, halves = 1.959964, []
    for accuracy, images in measured:
        p = accuracy / 100
        halves.append(z / (1 + z**2 / images) * np.sqrt(p * (1 - p) / images + z**2 / (4 * images**2)))
    return 100 * float(np.linalg.norm(halves)) / len(halves)


def block_labels(images: StoreImages, indices: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """A group's labels (N,) as positions in its class ids (k,), and those ids."""
    classes = images.block_classes(indices)
    position = np.empty(classes.max() + 1, dtype=np.int64)
    position[classes] = np.arange(len(classes))
    return torch.from_numpy(position[images.labels[indices]]).to(images.device), classes


def adapt_input(method: Adapts, images: StoreImages, indices: np.ndarray) -> tuple[Tensor, Tensor]:
    """Normalised images (n, C, H, W) and labels (n,) of those of a group that a method looks at."""
    labels, _ = block_labels(images, indices)
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
    """Accuracy in percent (G,) of the method adapted to each group of a table (G, 2, N), on its twin.

    Given `sketches`, one a group, PudNet's weights come from those in place of the groups' own.
    """
    accuracies = np.zeros(len(table))
    for g, (group, twin) in enumerate(table):
        given = () if sketches is None else (sketches[g],)
        accuracies[g] = twin_accuracy(_adapted(method, images, group, bf16, *given), images, twin, bf16)
        progress(g + 1)
    return accuracies


def timed_adaptation(method: Adapts, images: StoreImages, group: np.ndarray, bf16: bool) -> tuple[Classifies, float]:
    """A method adapted to a group (N,), and the milliseconds that took from its images in memory to a classifier."""
    start = clock(images.device)
    adapted = _adapted(method, images, group, bf16)
    return adapted, clock(images.device) - start


@torch.no_grad()
def twin_accuracy(adapted: Classifies, images: StoreImages, twin: np.ndarray, bf16: bool) -> float:
    """Accuracy in percent on a twin (N,) of the group that a classifier was adapted to."""
    truth, _ = block_labels(images, twin)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        logits = adapted.logits(images(twin))
    return 100 * (logits.argmax(1) == truth).float().mean().item()


def _adapted(method: Adapts, images: StoreImages, group: np.ndarray, bf16: bool, *sketch: Tensor) -> Classifies:
    """The method adapted to a group (N,); PudNet from a sketch, where one is given in place of the group's own."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        return method.adapt(*adapt_input(method, images, group), _classes(images, group), *sketch)


def _classes(images: StoreImages, group: np.ndarray) -> tuple[int, ...]:
    return tuple(images.block_classes(group).tolist())


@torch.no_grad()
def group_sketches(predictor: Predictor, images: StoreImages, groups: np.ndarray, bf16: bool) -> list[Tensor]:
    """The sketch (l, m) of each group of a table (G, N)."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        return [predictor.sketch(*adapt_input(predictor, images, group)) for group in groups]


def shuffled(sketches: Sequence[Tensor], classes: Sequence[Sequence[int]]) -> list[Tensor]:
    """For each group the sketch of the next one that has other classes (of the next one where all have the same)."""
    sets = [frozenset(c) for c in classes]
    count = len(sketches)

    def other(g: int) -> int:
        return next((h for h in range(g + 1, g + count) if sets[h % count] != sets[g]), g + 1) % count

    return [sketches[other(g)] for g in range(count)]


@dataclass(frozen=True)
class Timing:
    """What a prediction costs, in milliseconds: medians over groups, after warm-up, device synchronised."""

    device: str
    threads: int
    images: int  # in memory
    sketch_images: int  # of them used
    calibration_images: int
    sketch_ms: float  # with normalising the images; of class filters: the pass up to their layer
    generation_ms: float
    calibration_ms: float  # with the classifier, which comes from the same pass
    total_ms: float
    epoch_ms: float  # one epoch of training the same network from scratch on the same images
    epoch_ratio: float  # epoch_ms / total_ms


def time_prediction(
    predictor: Predictor, images: StoreImages, groups: np.ndarray, bf16: bool, warm_up: int = 2
) -> Timing:
    """Time predictions from the groups of a table (G, N) and, alternating, epochs from scratch on each."""
    rows = []
    warm_up = min(warm_up, len(groups))
    for group in np.concatenate([groups[:warm_up], groups]):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            steps = _prediction_steps(predictor, images, group)
        labels, _ = block_labels(images, group)
        rows.append([*steps, _epoch(predictor, images(group), labels, bf16)])
    sketch, generation, calibration, epoch = np.median(np.array(rows[warm_up:]), axis=0).tolist()
    total = float(np.median(np.array(rows[warm_up:])[:, :3].sum(1)))
    return Timing(
        device=str(torch.cuda.get_device_name() if images.device.type == "cuda" else images.device),
        threads=torch.get_num_threads(),
        images=groups.shape[1],
        sketch_images=predictor.sketch_images,
        calibration_images=len(predictor.calibration_rows(block_labels(images, groups[0])[0])),
        sketch_ms=sketch,
        generation_ms=generation,
        calibration_ms=calibration,
        total_ms=total,
        epoch_ms=epoch,
        epoch_ratio=epoch / total,
    )


@torch.no_grad()
def _prediction_steps(predictor: Predictor, images: StoreImages, group: np.ndarray) -> list[float]:
    """Milliseconds of sketch, generation and calibration."""
    marks = [clock(images.device)]

    def mark() -> None:
        marks.append(clock(images.device))

    batch, labels = adapt_input(predictor, images, group)
    predictor.adapt(batch, labels, _classes(images, group), mark=mark)
    mark()
    return np.diff(marks).tolist()


def _epoch(predictor: Predictor, images: Tensor, labels: Tensor, bf16: bool) -> float:
    """Milliseconds of one epoch of Adam on the plain target with a linear head."""
    network = scratch_network(predictor.target, int(labels.max()) + 1, images.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    start = clock(images.device)
    train_epoch(network, optimizer, images, labels, ScratchConfig(), bf16)
    return clock(images.device) - start
