"""How baselines are trained: on all training classes at once, on episodes, or on the one and then the other.

Whichever it is, every update sees one task group's worth of images of the same table of groups.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from pudnet.baselines.method import Method
from pudnet.learner import Learner, mixed
from pudnet.objective import Losses, accuracy, cross_entropy, in_blocks
from pudnet.ridge import at_least_fp32


class MethodLearner(Learner):
    """A method in training."""

    def __init__(self, method: Method, k: int, support: int) -> None:
        super().__init__()
        self.model, self.k, self.support = method, k, support

    def features(self, images: Tensor) -> Tensor:
        """Features (..., N, d) under the one set of weights, with the groups' own BatchNorm statistics, in fp32."""
        trunk = self.model.trunk
        return at_least_fp32(trunk.shared(images, trunk.generate(trunk.sketch(images))))

    def episode(self, features: Tensor) -> Losses:
        """What groups' features (..., k * n, d), in k blocks of a class, cost as episodes."""
        support, own, queries, truth = episode(features, self.k, self.support)
        with torch.autocast(features.device.type, enabled=False):
            return losses(self.model.logits(queries, support, own, self.k), truth)


class Episodic(MethodLearner):
    """Each group is an episode: its support set, the first images of each class, classifies the others."""

    def losses(self, images: Tensor, labels: Tensor, done: float) -> Losses:
        """Cross-entropy of the queries under the method's own rule. Groups stand in k blocks of a class."""
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

    def losses(self, images: Tensor, labels: Tensor, done: float) -> Losses:
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

    def losses(self, images: Tensor, labels: Tensor, done: float) -> Losses:
        """The full head's loss, then the method's own."""
        if done < self.pretraining:
            return super().losses(images, labels, done)
        return self.episode(self.features(images))

    def rate(self, done: float) -> float:
        """The second stage's learning rate is `meta_rate` times the first's."""
        return 1.0 if done < self.pretraining else self.meta_rate


def episode(features: Tensor, k: int, support: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features (..., k * n, d) in blocks of a class -> support (..., k * s, d), labels (k * s,), queries, theirs."""
    blocks = features.unflatten(-2, (k, -1))  # (..., k, n, d)
    first, rest = (part.flatten(-3, -2) for part in (blocks[..., :support, :], blocks[..., support:, :]))
    own, truth = (in_blocks(k, count, features.device) for count in (support, blocks.shape[-2] - support))
    return first, own, rest, truth


def losses(logits: Tensor, truth: Tensor) -> Losses:
    """Cross-entropy of logits (..., N, k) as what groups cost."""
    loss = cross_entropy(logits, truth)
    nothing = torch.zeros_like(loss)
    return Losses(loss, loss.detach(), nothing, nothing, accuracy(logits, truth))
