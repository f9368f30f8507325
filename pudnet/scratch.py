"""Training from scratch on one group, by Adam or by Adam with gradient centralization."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from pudnet.augmentation import Augmentation, augmented
from pudnet.config import STRICT, Fraction, Positive, PositiveFloat, Weight
from pudnet.cpu import accelerate, keep_freed_memory, plain_layers
from pudnet.data.rows import spread_rows
from pudnet.device import flushing_denormals
from pudnet.gradient_centralization import centralized
from pudnet.network import Classifier
from pudnet.targets import Target, calibrate, draw_convolutions

CALIBRATED_ON = 1000  # images, spread over the classes: they are one batch, so a whole set may not fit in memory


@dataclass(frozen=True, config=STRICT)
class ScratchConfig:
    """A training run as one would set it up for a few hundred images.

    The learning rate rises linearly over the share `warm_up` of all steps and falls linearly to zero over the rest, so
    a run of 5 epochs is not the beginning of a run of 50. `batch` is small, for many steps in each epoch.
    `weight_decay` is decoupled (AdamW's).
    """

    epochs: Positive = 50
    learning_rate: PositiveFloat = 3e-3
    warm_up: Fraction = 0.2
    batch: Positive = 50
    weight_decay: Weight = 0.01
    augment: Augmentation = "none"


class Scratch:
    """The He-initialised target with a linear head, trained on all images of the group and on nothing else.

    BatchNorm is treated as in every method: it uses batch statistics in training, and is calibrated on the group's
    images at the end, on up to `CALIBRATED_ON` of them.
    """

    def __init__(
        self, config: ScratchConfig, target: Target, device: torch.device, bf16: bool, gc: bool, compiled: bool = False
    ) -> None:
        self.config, self.target, self.device, self.bf16, self.gc = config, target, device, bf16, gc
        self.compiled = compiled  # on a CPU: pays off if many networks are trained (`compiling_pays`)
        if device.type == "cpu":
            keep_freed_memory()

    def rows(self, labels: Tensor) -> Tensor:
        """All rows, for labels (N,): training looks at every image."""
        return torch.arange(len(labels), device=labels.device)

    def adapt(self, images: Tensor, labels: Tensor, classes: tuple) -> Classifier:
        """Train on normalised images (N, C, H, W) and labels (N,) in 0..k-1 -> a classifier of the classes."""
        network = self.start(images, labels, classes)
        train(network, images, labels, self.config, self.bf16, self.gc)
        body = network.requires_grad_(False).body.eval()
        plain_layers(body)  # compiled layers keep no running statistics
        if self.device.type == "cpu":
            accelerate(body)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            calibrate(body, images[spread_rows(labels, CALIBRATED_ON)])
        return Classifier(body, network.head)

    def start(self, images: Tensor, labels: Tensor, classes: tuple) -> nn.Sequential:
        """The network (`body`, `flat`, `head`) as training begins."""
        return scratch_network(self.target, len(classes), self.device, self.compiled)


def train(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    config: ScratchConfig,
    bf16: bool,
    gc: bool = False,
    after_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> None:
    """Train a network in place. `after_epoch` is called with each epoch's number, from 1, and its mean loss."""
    optimizer = torch.optim.AdamW(
        network.parameters(), config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    if gc:
        centralized(optimizer)
    steps = config.epochs * batches_of(len(images), config.batch)
    rate = partial(rise_and_fall, steps=steps, warm_up=config.warm_up)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for epoch in range(1, config.epochs + 1):
        with flushing_denormals(images.device):
            loss = train_epoch(network, optimizer, images, labels, config, bf16, schedule)
        after_epoch(epoch, loss)


def scratch_network(target: Target, classes: int, device: torch.device, compiled: bool = False) -> nn.Sequential:
    """The plain target, newly He-initialised, with a linear head. Compiled layers keep no running statistics."""
    body = copy.deepcopy(target.network)
    draw_convolutions(body)
    body = body.to(device, memory_format=torch.channels_last)
    return with_head(body, nn.Linear(target.features, classes, device=device), compiled)


def with_head(body: nn.Module, head: nn.Module, compiled: bool = False) -> nn.Sequential:
    """Both as one trainable network of `body`, `flat` and `head`, on a CPU with faster layers, as in meta-training."""
    if next(head.parameters()).device.type == "cpu":
        accelerate(body, compiled)
    return nn.Sequential(OrderedDict(body=body, flat=nn.Flatten(), head=head)).requires_grad_(True)


def train_epoch(
    network: nn.Sequential,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    config: ScratchConfig,
    bf16: bool,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> float:
    """Train for one epoch on shuffled batches of equal size (`batches_of`) -> the mean cross-entropy.

    Autocast's cache is off, because it would keep casts of weights that the step has changed since.
    """
    network.train()
    total = torch.zeros((), device=images.device)
    for rows in torch.randperm(len(images), device=images.device).tensor_split(batches_of(len(images), config.batch)):
        optimizer.zero_grad()
        batch = augmented(images[rows], config.augment)
        with torch.enable_grad():
            with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
                logits = network(batch)
            loss = F.cross_entropy(logits.float(), labels[rows])
            loss.backward()
        optimizer.step()
        total += loss.detach() * len(rows)
        if schedule:
            schedule.step()
    return total.item() / len(images)


def batches_of(images: int, batch: int) -> int:
    """How many batches of at most `batch` images; fewer if one had a single image, which BatchNorm cannot train on."""
    return max(1, min(math.ceil(images / batch), images // 2))


def rise_and_fall(step: int, steps: int, warm_up: float) -> float:
    """The factor of the learning rate at a step: rises linearly over `warm_up` of the steps, then falls to zero."""
    rise = max(1.0, warm_up * steps)
    return min(1.0, (step + 1) / rise, max(0.0, (steps - step) / max(1.0, steps - rise)))
