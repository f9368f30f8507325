"""ProtoNet (Snell et al., 2017, "Prototypical networks for few-shot learning")."""

from __future__ import annotations

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from pudnet.baselines.learners import Episodic
from pudnet.baselines.method import Method
from pudnet.config import STRICT, PositiveFloat
from pudnet.learner import Learner
from pudnet.objective import centroids


@dataclass(frozen=True, config=STRICT)
class ProtoNetConfig:
    """`scale` multiplies the distances. The method has none (1); on many features distances are large and the
    softmax saturates, which others mend by dividing by the number of features."""

    scale: PositiveFloat = 1.0


class ProtoNet(Method):
    r"""Logits :math:`-s \lVert f(x) - c_k \rVert^2`, with c_k the mean support feature of class k."""

    Config = ProtoNetConfig

    def learner(self, train_classes: int, k: int, support: int) -> Learner:
        """Episodes."""
        return Episodic(self, k, support)

    def logits(self, queries: Tensor, support: Tensor, labels: Tensor, k: int) -> Tensor:
        """Minus the scaled squared distances to the prototypes, (Q, k)."""
        return -self.config.scale * squared_distances(queries, centroids(support, labels, k))


def squared_distances(queries: Tensor, points: Tensor) -> Tensor:
    """Squared Euclidean distances of queries (Q, d) to points (k, d) -> (Q, k).

    By products, :math:`q^2 - 2 q p + p^2`, about the points' mean, so that no digits are lost to an offset.
    """
    middle = points.mean(0)
    queries, points = queries - middle, points - middle
    squares = queries.square().sum(1, keepdim=True) + points.square().sum(1)
    return torch.addmm(squares, queries, points.T, alpha=-2)
