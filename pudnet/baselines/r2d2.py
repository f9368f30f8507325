"""R2-D2 (Bertinetto et al., 2019, "Meta-learning with differentiable closed-form solvers").

The paper does not compare with it. It is the control that PudNet+ needs: weights for this very dataset by ridge
regression, as PudNet+ has them, but those of the classifier alone.
"""

from __future__ import annotations

from pydantic.dataclasses import dataclass
from torch import Tensor

from pudnet.baselines.learners import Episodic
from pudnet.baselines.method import Method
from pudnet.classifier import Regression
from pudnet.config import STRICT, PositiveFloat
from pudnet.learner import Learner
from pudnet.targets import Target


@dataclass(frozen=True, config=STRICT)
class R2D2Config:
    """Where the two learned numbers begin: `ridge`, the penalty, and `scale`, of the logits. As PudNet+'s do: 100
    validation groups of CIFAR-100 were better for it with both."""

    ridge: PositiveFloat = 3.0
    scale: PositiveFloat = 5.0


class R2D2(Method):
    """A fixed trunk and `ridge_layer` on the support features."""

    Config = R2D2Config

    def __init__(self, config: R2D2Config, target: Target) -> None:
        super().__init__(config, target)
        self.regression = Regression(config.ridge, config.scale)

    def learner(self, train_classes: int, k: int, support: int) -> Learner:
        """Episodes."""
        return Episodic(self, k, support)

    def logits(self, queries: Tensor, support: Tensor, labels: Tensor, k: int) -> Tensor:
        """The scaled regression of queries (Q, d), (Q, k)."""
        return self.regression(queries, support, labels, k)
