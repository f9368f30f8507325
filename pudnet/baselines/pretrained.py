"""Pretrained: a trunk trained to tell all training classes apart."""

from __future__ import annotations

from pydantic.dataclasses import dataclass
from torch import Tensor

from pudnet.baselines.learners import Pretraining
from pudnet.baselines.method import Method
from pudnet.classifier import centroids, metric_logits
from pudnet.config import STRICT
from pudnet.learner import Learner


@dataclass(frozen=True, config=STRICT)
class PretrainedConfig:
    """Nothing is left open but the training itself (`learning_rate`, `schedule`)."""


class Pretrained(Method):
    """A linear head over all training classes in training; class centroids and cosines on a new group.

    The paper does not say how its pretrained model classifies unseen classes. Centroids compared by cosine are
    PudNet's own rule (Eq. 6), so that the trunk alone is compared, and the Classifier-Baseline of Meta-Baseline.
    """

    Config = PretrainedConfig

    def learner(self, train_classes: int, k: int, support: int) -> Learner:
        """Mixed batches of all training classes."""
        return Pretraining(self, train_classes, k, support)

    def logits(self, queries: Tensor, support: Tensor, labels: Tensor, k: int) -> Tensor:
        """Cosines to the class centroids: no temperature, which changes no decision."""
        return metric_logits(queries, centroids(support, labels, k), 1.0)
