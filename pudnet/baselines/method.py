"""What the learned baselines have in common: a trunk for all groups, and a rule that classifies by support features.

A `Method` is the trunk and its rule, which is what a file stores; a learner (`learners.py`) trains it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pudnet.baselines.heads import fit_head
from pudnet.card import Card
from pudnet.config import TrainConfig
from pudnet.controls import StaticTrunk
from pudnet.errors import UserError
from pudnet.learner import Learner
from pudnet.network import Classifier
from pudnet.predictor import Predictor
from pudnet.targets import Target, Weights


class Method(nn.Module):
    """A baseline that is trained on task groups. `Config` has the options that its paper, or PudNet's, leaves open."""

    Config: ClassVar[type]
    takes_pretraining_share: ClassVar[bool] = True  # whether `train.pretraining_share` says how it is trained

    def __init__(self, config: Any, target: Target) -> None:
        super().__init__()
        self.config, self.features = config, target.features
        self.trunk = self.make_trunk(target)

    def make_trunk(self, target: Target) -> nn.Module:
        """The module that holds the target's weights: one set of plain parameters, unless a method needs another."""
        return StaticTrunk(target)

    @classmethod
    def check(cls, config: Any, target: Target) -> None:
        """Raise `UserError` if a target has not what a configuration needs of it."""

    @classmethod
    def begins_alike(cls, config: Mapping[str, Any], share: float) -> bool:
        """Whether a shorter training is the beginning of a longer one, at a constant learning rate.

        Not if a part of it is a stage of its own. `share` is `train.pretraining_share`.
        """
        return share in (0, 1)

    @classmethod
    def network(cls, config: Any, target: Target) -> nn.Module:
        """The network that is trained: the plain target, unless a method adds something to it."""
        return target.network

    def learner(self, train_classes: int, k: int, config: TrainConfig) -> Learner:
        """The learner that trains it, on groups of `k` of the `train_classes` training classes."""
        raise NotImplementedError

    def logits(self, queries: Tensor, support: Tensor, labels: Tensor, k: int) -> Tensor:
        """Classify: queries (..., Q, d), support (..., S, d) with labels (S,) in 0..k-1 -> logits (..., Q, k), in fp32.

        Leading dimensions are groups.
        """
        raise NotImplementedError

    def rule(self, support: Tensor, labels: Tensor, k: int) -> Callable[[Tensor], Tensor]:
        """What classifies queries (Q, d) after adapting to support features (S, d), labels (S,): `logits`.

        A method that has something to solve for does it here, once.
        """
        return lambda queries: self.logits(queries, support, labels, k)

    def weights(self, images: Tensor, labels: Tensor) -> Weights:
        """The convolution weights for a group's support images (S, C, H, W): one set for all groups."""
        return self.trunk.generate(self.trunk.sketch(images))


class Adapter:
    """A trained method, ready to adapt to groups under the same rules as PudNet.

    Support set, BatchNorm calibration and precision are those of `Predictor`. A `head` (one of `heads.HEADS`), fitted
    to the support features, replaces the method's own rule.
    """

    def __init__(self, method: Method, card: Card, target: Target, head: str | None = None) -> None:
        self.method, self.head = method.eval(), head
        self.predictor = Predictor(method.trunk, card, target)
        if head is not None and self.predictor.all_blocks is not None:
            raise UserError(f"head: {head} replaces the classifier that blocks: leave_one_out is for")

    def rows(self, labels: Tensor) -> Tensor:
        """Rows of the images that `adapt` needs, for labels (N,) in 0..k-1."""
        return self.predictor.rows(labels)

    @torch.no_grad()
    def adapt(self, images: Tensor, labels: Tensor, classes: tuple) -> Classifier:
        """Normalised images (N, C, H, W) and labels (N,) in 0..k-1 -> a classifier of the group's classes."""
        uses = self.predictor.uses(labels)
        own = labels[uses.support]
        body, support = self.predictor.calibrated(self.method.weights(images[uses.support], own), images, uses)
        support = support.float()
        if self.head is not None:
            return Classifier(body, fit_head(self.head, support, own))
        return Classifier(body, self.method.rule(support, own, len(classes)))


def squared_distances(queries: Tensor, points: Tensor) -> Tensor:
    """Squared Euclidean distances of queries (..., Q, d) to points (..., k, d) -> (..., Q, k).

    Computed as :math:`q^2 - 2 q p + p^2`, about the points' mean, so that a common offset costs no precision.
    """
    middle = points.mean(-2, keepdim=True)
    queries, points = queries - middle, points - middle
    squares = queries.square().sum(-1, keepdim=True) + points.square().sum(-1).unsqueeze(-2)
    return squares - 2 * (queries @ points.mT)
