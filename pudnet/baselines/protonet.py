"""ProtoNet (Snell et al., 2017, "Prototypical networks for few-shot learning")."""

from __future__ import annotations

from pydantic.dataclasses import dataclass
from torch import Tensor

from pudnet.baselines.learners import Stages
from pudnet.baselines.method import Method, squared_distances
from pudnet.classifier import centroids
from pudnet.config import STRICT, PositiveFloat, TrainConfig
from pudnet.learner import Learner


@dataclass(frozen=True, config=STRICT)
class ProtoNetConfig:
    """`scale` multiplies the distances; the method itself has none (1).

    With many features distances are large and the softmax saturates, so others divide by the number of features.
    """

    scale: PositiveFloat = 1.0


class ProtoNet(Method):
    r"""Logits :math:`-s \lVert f(x) - c_k \rVert^2`, where c_k is the mean support feature of class k."""

    Config = ProtoNetConfig

    def learner(self, train_classes: int, k: int, config: TrainConfig) -> Learner:
        """Episodes, after pretraining if the training asks for it."""
        return Stages(self, train_classes, k, config)

    def logits(self, queries: Tensor, support: Tensor, labels: Tensor, k: int) -> Tensor:
        """Minus the scaled squared distances to the prototypes, (Q, k)."""
        return -self.config.scale * squared_distances(queries, centroids(support, labels, k))
