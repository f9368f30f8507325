"""How baselines are trained: on all training classes at once, on episodes, or on the one and then the other.

Whichever it is, every update sees one task group's worth of images of the same table of groups.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pudnet.baselines.method import Method
from pudnet.learner import Learner, mixed
from pudnet.objective import Losses


class MethodLearner(Learner):
    """A method in training, a group at a time."""

    def __init__(self, method: Method, k: int, support: int) -> None:
        super().__init__()
        self.model, self.k, self.support = method, k, support

    def losses(self, images: Tensor, labels: Tensor, done: float) -> list[Losses]:
        """One loss a group."""
        return [self.loss(*group, done) for group in zip(images, labels, strict=True)]

    def loss(self, images: Tensor, labels: Tensor, done: float) -> Losses:
        """What images (N, C, H, W) with labels (N,) among the training classes cost."""
        raise NotImplementedError

    def features(self, images: Tensor) -> Tensor:
        """Features (N, d) under the one set of weights, with the images' own BatchNorm statistics, in fp32."""
        trunk = self.model.trunk
        return trunk.shared(images, trunk.generate(trunk.sketch(images))).float()

    def episode(self, features: Tensor) -> Losses:
        """What a group's features (k * n, d), in k blocks of a class, cost as an episode."""
        support, own, queries, truth = episode(features, self.k, self.support)
        with torch.autocast(features.device.type, enabled=False):
            return losses(self.model.logits(queries, support, own, self.k), truth)


class Episodic(MethodLearner):
    """Each group is an episode: its support set, the first images of each class, classifies the others."""

    def loss(self, images: Tensor, labels: Tensor, done: float) -> Losses:
        """Cross-entropy of the queries under the method's own rule. The group stands in k blocks of a class."""
        return self.episode(self.features(images))


class Pretraining(MethodLearner):
    """A linear head over all training classes, thrown away afterwards.

    A batch has as many images as a group, but of all classes: the images of the whole table, mixed. In batches
    of one group's few classes the head would learn which classes the last groups had.
    """

    def __init__(self, method: Method, train_classes: int, k: int, support: int, dropout: float = 0.0) -> None:
        super().__init__(method, k, support)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(method.features, train_classes))

    def arrange(self, table: np.ndarray) -> np.ndarray:
        """The same images, each as often, in an order that does not know of groups."""
        return mixed(table)

    def loss(self, images: Tensor, labels: Tensor, done: float) -> Losses:
        """Cross-entropy of the full head."""
        features = self.features(images)
        with torch.autocast(features.device.type, enabled=False):
            return losses(self.head(features), labels)


class TwoStages(Pretraining):
    """Pretraining for a share of the groups, then episodes for the rest, at a learning rate of their own."""

    def __init__(
        self,
        method: Method,
        train_classes: int,
        k: int,
        support: int,
        pretraining: float,
        meta_rate: float,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(method, train_classes, k, support, dropout)
        self.pretraining, self.meta_rate = pretraining, meta_rate

    def arrange(self, table: np.ndarray) -> np.ndarray:
        """The first groups' images mixed, the others as they are."""
        return mixed(table, self.pretraining)

    def loss(self, images: Tensor, labels: Tensor, done: float) -> Losses:
        """The full head's loss, then the method's own."""
        if done < self.pretraining:
            return super().loss(images, labels, done)
        return self.episode(self.features(images))

    def rate(self, done: float) -> float:
        """The second stage's learning rate is `meta_rate` times the first's."""
        return 1.0 if done < self.pretraining else self.meta_rate


def episode(features: Tensor, k: int, support: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features (k * n, d) in blocks of a class -> support (k * s, d), its labels, queries (k * (n - s), d), theirs."""
    blocks = features.unflatten(0, (k, -1))  # (k, n, d)
    classes = torch.arange(k, device=features.device)
    parts = blocks[:, :support], blocks[:, support:]
    (first, own), (rest, truth) = ((part.flatten(0, 1), classes.repeat_interleave(part.shape[1])) for part in parts)
    return first, own, rest, truth


def losses(logits: Tensor, truth: Tensor) -> Losses:
    """Cross-entropy of logits (N, k) as what a group cost."""
    loss = F.cross_entropy(logits, truth)
    nothing = torch.zeros_like(loss)
    accuracy = (logits.argmax(1) == truth).float().mean()
    return Losses(loss, loss.detach(), nothing, nothing, accuracy)
