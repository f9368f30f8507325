"""Pretrained: a trunk trained to classify all training classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic.dataclasses import dataclass
from torch import Tensor

from pudnet.baselines.learners import Stages
from pudnet.baselines.method import Method
from pudnet.classifier import centroids, metric_logits
from pudnet.config import STRICT, TrainConfig
from pudnet.learner import Learner


@dataclass(frozen=True, config=STRICT)
class PretrainedConfig:
    """No options: only those of the training itself (`learning_rate`, `schedule`)."""


class Pretrained(Method):
    """Trained with a linear head over all training classes; classifies a new group by cosines to its class centroids.

    The paper does not say how its pretrained model classifies unseen classes. Cosines to centroids are PudNet's own
    rule (Eq. 6), so that only the trunks differ; they are also the Classifier-Baseline of the Meta-Baseline paper.
    """

    Config = PretrainedConfig
    takes_pretraining_share = False

    @classmethod
    def begins_alike(cls, config: Mapping[str, Any], share: float) -> bool:
        """It has one stage."""
        return True

    def learner(self, train_classes: int, k: int, config: TrainConfig) -> Learner:
        """Mixed batches of all training classes."""
        return Stages(self, train_classes, k, config, pretraining=1.0)

    def logits(self, queries: Tensor, support: Tensor, labels: Tensor, k: int) -> Tensor:
        """Cosines to the class centroids. They need no temperature, which would not change the predicted class."""
        return metric_logits(queries, centroids(support, labels, k), 1.0)
