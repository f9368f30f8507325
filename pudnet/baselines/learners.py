"""How baselines are trained: on all training classes at once, on episodes, or first the one and then the other.

An update uses as many images as one task group has, from the same table of groups.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pudnet.baselines.method import Method
from pudnet.config import TrainConfig
from pudnet.device import full_precision
from pudnet.learner import Learner
from pudnet.objective import Losses, accuracy, cross_entropy, in_blocks, pretraining_losses
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
        with full_precision(features.device):
            return losses(self.model.logits(queries, support, own, self.k), truth)


class Stages(MethodLearner):
    """First pretraining, on a share of the groups, then episodes on the others. Either may be all of the training.

    `pretraining` is the share (None: `train.pretraining_share`).

    In pretraining a linear head, which is thrown away afterwards, classifies all training classes. A batch has as many
    images as a group, but of all classes: the images of these groups are mixed. In batches of a group's few classes,
    the head would only learn which classes the last groups had. In the second stage each group is an episode: its
    support set, the first images of each class, classifies the others. The learning rate is `meta_rate` times that of
    the first stage.
    """

    def __init__(
        self,
        method: Method,
        train_classes: int,
        k: int,
        config: TrainConfig,
        pretraining: float | None = None,
        meta_rate: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(method, k, config.support_per_class)
        self.mixed_share = (config.pretraining_share or 0.0) if pretraining is None else pretraining
        self.meta_rate = meta_rate
        head = [nn.Dropout(dropout), nn.Linear(method.features, train_classes)] if self.mixed_share else []
        self.head = nn.Sequential(*head)

    def losses(self, images: Tensor, labels: Tensor, done: float) -> Losses:
        """The full head's cross-entropy, then that of the method's own rule, for groups ordered by class."""
        features = self.features(images)
        if done >= self.mixed_share:
            return self.episode(features)
        with full_precision(features.device):
            return pretraining_losses(self.head(features), labels)

    def rate(self, done: float) -> float:
        """1 in pretraining, then `meta_rate`."""
        return 1.0 if done < self.mixed_share else self.meta_rate


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
