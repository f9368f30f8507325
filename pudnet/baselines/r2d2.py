"""R2-D2 (Bertinetto et al., 2019, "Meta-learning with differentiable closed-form solvers").

The paper does not compare with it. It is the control that PudNet+ needs: weights for this very dataset by ridge
regression, as PudNet+ has them, but those of the classifier alone.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from pudnet.baselines.learners import Episodic
from pudnet.baselines.method import Method
from pudnet.config import STRICT, PositiveFloat
from pudnet.learner import Learner
from pudnet.ridge import normalized_rows, ridge_weights
from pudnet.targets import Target


@dataclass(frozen=True, config=STRICT)
class R2D2Config:
    """Where the two learned numbers begin: `ridge`, of support features of unit mean square norm, and `scale` of the
    logits, which regression leaves within 0..1, where a softmax hardly tells them apart."""

    ridge: PositiveFloat = 0.3
    scale: PositiveFloat = 10.0


class R2D2(Method):
    r"""Ridge regression of the one-hot labels on support features, :math:`s\,(\bar y + R (f(x) - \bar f))`.

    The gradient goes through the solution R, so that the trunk learns features from which it is good.
    """

    Config = R2D2Config

    def __init__(self, config: R2D2Config, target: Target) -> None:
        super().__init__(config, target)
        self.log_ridge = nn.Parameter(torch.tensor(math.log(config.ridge)))
        self.log_scale = nn.Parameter(torch.tensor(math.log(config.scale)))

    def learner(self, train_classes: int, k: int, support: int) -> Learner:
        """Episodes."""
        return Episodic(self, k, support)

    def logits(self, queries: Tensor, support: Tensor, labels: Tensor, k: int) -> Tensor:
        """The scaled regression of queries (Q, d), (Q, k)."""
        y = F.one_hot(labels, k).float()
        x, mean, norm = normalized_rows(support)
        weights = ridge_weights(x, y - y.mean(0), self.log_ridge.exp())  # (k, d)
        return self.log_scale.exp() * (y.mean(0) + (queries - mean) / norm @ weights.T)
