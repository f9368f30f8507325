"""How baselines are trained: on all training classes at once, on episodes, or first the one and then the other.

In every case, an update uses as many images as one task group has, from the same table of groups.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pudnet.baselines.method import Method
from pudnet.learner import Learner
from pudnet.objective import Losses, accuracy, cross_entropy, in_blocks
from pudnet.ridge import at_least_fp32


class MethodLearner(Learner):
    """A method in training."""

    def __init__(self, method: Method, k: int, support: int) -> None:
        super().__init__()
        self.model, self.k, self.support = method, k, support

    def features(self, images: Tensor) -> Tensor:
        """Features (..., N, d) in fp32, with the trunk's weights and the groups' own BatchNorm statistics."""
        trunk = self.model.trunk
        return at_least_fp32(trunk.shared(images, trunk.generate(trunk.sketch(images))))

    def episode(self, features: Tensor) -> Losses:
        """Losses of episodes, from the groups' features (..., k * n, d) ordered by class."""
        support, own, queries, truth = episode(features, self.k, self.support)
        with torch.autocast(features.device.type, enabled=False):
            return losses(self.model.logits(queries, support, own, self.k), truth)


class Episodic(MethodLearner):
    """Each group is an episode: its support set, the first images of each class, classifies the others."""

    def losses(self, images: Tensor, labels: Tensor, done: float) -> Losses:
        """Cross-entropy of the queries under the method's own rule. Each group's images are ordered by class."""
        return self.episode(self.features(images))


class Pretraining(MethodLearner):
    """Trains with a linear head over all training classes, which is thrown away afterwards.

    A batch has as many images as a group, but of all classes: the images of a whole pass are mixed. In batches of a
    group's few classes, the head would only learn which classes the last groups had.
    """

    mixes = 1.0

    def __init__(self, method: Method, train_classes: int, k: int, support: int, dropout: float = 0.0) -> None:
        super().__init__(method, k, support)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(method.features, train_classes))

    def losses(self, images: Tensor, labels: Tensor, done: float) -> Losses:
        """Cross-entropy of the full head."""
        features = self.features(images)
        with torch.autocast(features.device.type, enabled=False):
            return losses(self.head(features), labels)


class TwoStages(Pretraining):
    """Pretraining on a share of the groups, then episodes on the rest, at another learning rate."""

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
        self.mixes, self.meta_rate = pretraining, meta_rate

    def losses(self, images: Tensor, labels: Tensor, done: float) -> Losses:
        """The full head's loss, then the method's own."""
        if done < self.mixes:
            return super().losses(images, labels, done)
        return self.episode(self.features(images))

    def rate(self, done: float) -> float:
        """The second stage's learning rate is `meta_rate` times the first's."""
        return 1.0 if done < self.mixes else self.meta_rate


def episode(features: Tensor, k: int, support: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split features (..., k * n, d), ordered by class, into support set and queries.

    Returns support features (..., k * s, d), their labels (k * s,), query features and their labels.
    """
    blocks = features.unflatten(-2, (k, -1))  # (..., k, n, d)
    first, rest = (part.flatten(-3, -2) for part in (blocks[..., :support, :], blocks[..., support:, :]))
    own, truth = (in_blocks(k, count, features.device) for count in (support, blocks.shape[-2] - support))
    return first, own, rest, truth


def losses(logits: Tensor, truth: Tensor) -> Losses:
    """The cross-entropy of logits (..., N, k) as the groups' losses."""
    loss = cross_entropy(logits, truth)
    nothing = torch.zeros_like(loss)
    return Losses(loss, loss.detach(), nothing, nothing, accuracy(logits, truth))
