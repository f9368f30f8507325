"""Meta-Baseline (Chen et al., 2021, "Meta-Baseline: exploring simple meta-learning for few-shot learning")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from pudnet.baselines.learners import Stages
from pudnet.baselines.method import Method
from pudnet.classifier import centroids, metric_logits
from pudnet.config import STRICT, Fraction, PositiveFloat, TrainConfig
from pudnet.learner import Learner
from pudnet.targets import Target


@dataclass(frozen=True, config=STRICT)
class MetaBaselineConfig:
    """Options of the two stages.

    `pretraining`: the first stage's share of the groups; half, since the paper does not say.
    `meta_rate`: the second stage's learning rate, relative to the first's. The authors' SGD goes from 0.1 to 0.001,
    but had decayed by a factor of ten within the first stage. `temperature`: the initial one of the cosines, as theirs.
    """

    pretraining: Fraction = 0.5
    meta_rate: PositiveFloat = 0.1
    temperature: PositiveFloat = 10.0


class MetaBaseline(Method):
    r"""Pretraining with a linear head, then episodes with logits :math:`\tau \cos(f(x), c_k)`, tau learned.

    The class mean is computed before it is normalised, and gradients pass through it.
    """

    Config = MetaBaselineConfig
    takes_pretraining_share = False

    @classmethod
    def begins_alike(cls, config: Mapping[str, Any], share: float) -> bool:
        """Only if it has one stage."""
        return config["pretraining"] in (0, 1)

    def __init__(self, config: MetaBaselineConfig, target: Target) -> None:
        super().__init__(config, target)
        self.temperature = nn.Parameter(torch.tensor(config.temperature))

    def learner(self, train_classes: int, k: int, config: TrainConfig) -> Learner:
        """Both stages."""
        stages = (self.config.pretraining, self.config.meta_rate)
        return Stages(self, train_classes, k, config, *stages)

    def logits(self, queries: Tensor, support: Tensor, labels: Tensor, k: int) -> Tensor:
        """Scaled cosines to the class centroids, (Q, k)."""
        return metric_logits(queries, centroids(support, labels, k), self.temperature)
