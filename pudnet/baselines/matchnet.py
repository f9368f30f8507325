"""MatchNet (Vinyals et al., 2016, "Matching networks for one shot learning")."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor

from pudnet.baselines.learners import Episodic
from pudnet.baselines.method import Method
from pudnet.config import STRICT, PositiveFloat
from pudnet.learner import Learner


@dataclass(frozen=True, config=STRICT)
class MatchNetConfig:
    """`scale` multiplies the cosines: they lie in -1..1, and a softmax of them alone stays nearly flat.

    Reference codes differ (no scale, 100 after a ReLU); 10 is PudNet's own temperature.
    """

    scale: PositiveFloat = 10.0


class MatchNet(Method):
    r"""Attention over the support set: :math:`p(y | x) = \sum_i a(x, x_i) 1[y_i = y]`.

    The attention a is a softmax over the support images of the scaled cosine, both sides normalised. Without
    full-context embeddings, which read the support set by an LSTM one image at a time: a group's has tens to
    hundreds of images, not five.
    """

    Config = MatchNetConfig

    def learner(self, train_classes: int, k: int, support: int) -> Learner:
        """Episodes."""
        return Episodic(self, k, support)

    def logits(self, queries: Tensor, support: Tensor, labels: Tensor, k: int) -> Tensor:
        """Log-probabilities log p(y | x), (Q, k): their softmax is p again, so cross-entropy is the method's NLL."""
        cosines = F.normalize(queries, dim=-1) @ F.normalize(support, dim=-1).mT  # (..., Q, S)
        attention = (self.config.scale * cosines).log_softmax(-1)
        other = labels != torch.arange(k, device=labels.device).unsqueeze(1)  # (k, S)
        return attention.unsqueeze(-2).masked_fill(other, -torch.inf).logsumexp(-1)  # (..., Q, k)
