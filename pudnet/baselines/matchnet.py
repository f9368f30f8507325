"""MatchNet (Vinyals et al., 2016, "Matching networks for one shot learning")."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor

from pudnet.baselines.learners import Stages
from pudnet.baselines.method import Method
from pudnet.config import STRICT, PositiveFloat, TrainConfig
from pudnet.learner import Learner


@dataclass(frozen=True, config=STRICT)
class MatchNetConfig:
    """`scale` multiplies the cosines, which lie in -1..1, where a softmax is nearly flat.

    Reference codes differ (no scale; 100, after a ReLU). 10 is PudNet's temperature.
    """

    scale: PositiveFloat = 10.0


class MatchNet(Method):
    r"""Attention over the support set: :math:`p(y | x) = \sum_i a(x, x_i) 1[y_i = y]`.

    The attention a is a softmax, over the support images, of the scaled cosine. Full-context embeddings are left out:
    their LSTM reads the support set one image at a time, and here it has tens to hundreds of images, not five.
    """

    Config = MatchNetConfig

    def learner(self, train_classes: int, k: int, config: TrainConfig) -> Learner:
        """Episodes, after pretraining if the training asks for it."""
        return Stages(self, train_classes, k, config)

    def logits(self, queries: Tensor, support: Tensor, labels: Tensor, k: int) -> Tensor:
        """Log-probabilities log p(y | x), (Q, k). Their softmax is p, so cross-entropy gives the method's own loss."""
        cosines = F.normalize(queries, dim=-1) @ F.normalize(support, dim=-1).mT  # (..., Q, S)
        attention = (self.config.scale * cosines).log_softmax(-1)
        other = labels != torch.arange(k, device=labels.device).unsqueeze(1)  # (k, S)
        return attention.unsqueeze(-2).masked_fill(other, -torch.inf).logsumexp(-1)  # (..., Q, k)
