"""The meta-objective (Eq. 6 to 10, appendix A.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pudnet.classifier import Regression, metric_logits
from pudnet.config import TrainConfig
from pudnet.ridge import at_least_fp32


def consistency(full: Tensor, metric: Tensor, columns: Tensor) -> Tensor:
    """L3, Eq. 9: KL(q || p) (...), with q from the full head's logits (..., N, K), p from the metric's (..., N, k).

    The k metric logits are placed in the group's `columns` (..., k) of the K, with zeros elsewhere, *before* the
    softmax (A.2 pads logits; padding probabilities with zeros would make the divergence infinite).
    """
    padded = torch.zeros_like(full).scatter(-1, columns.unsqueeze(-2).expand_as(metric), metric)
    each = F.kl_div(F.log_softmax(padded, -1), F.log_softmax(full, -1), log_target=True, reduction="none")
    return each.sum((-2, -1)) / full.shape[-2]


def cross_entropy(logits: Tensor, truth: Tensor) -> Tensor:
    """Mean cross-entropy of each group: logits (..., N, k), truth (..., N) or, common to all groups, (N,) -> (...)."""
    truth = truth.expand(logits.shape[:-1])
    each = F.cross_entropy(logits.flatten(0, -2), truth.flatten(), reduction="none")
    return each.view_as(truth).mean(-1)


def accuracy(logits: Tensor, truth: Tensor) -> Tensor:
    """Each group's share of correctly classified images; shapes as in `cross_entropy`."""
    return (logits.argmax(-1) == truth).float().mean(-1)


def in_blocks(classes: int, images: int, device: torch.device) -> Tensor:
    """Labels (k n,) of images ordered by class: k blocks of n images."""
    return torch.arange(classes, device=device).repeat_interleave(images)


@dataclass(frozen=True)
class Losses:
    """The losses of some groups, one value for each: tensors (...) on the device. Only `total` has a gradient."""

    total: Tensor  # Eq. 10
    metric: Tensor  # L1
    full: Tensor  # L2
    kl: Tensor  # L3
    accuracy: Tensor  # the metric classifier's, on the group's queries; in pretraining the full head's, on all images


def pretraining_losses(logits: Tensor, labels: Tensor) -> Losses:
    """L2 alone, of the full head's logits (B, N, K) for images with labels (B, N) in 0..K-1."""
    loss = cross_entropy(logits, labels)
    nothing = torch.zeros_like(loss)
    return Losses(loss, nothing, loss.detach(), nothing, accuracy(logits, labels))


class Objective(nn.Module):
    """L_total = L1 + L2 + L3 (Eq. 10) of a group's features, with the full head Q of Eq. 8.

    The first `support_per_class` images of each class are the support set and give the centroids. The others are
    the queries, over which L1 and L3 are computed (Eq. 7 and 9 sum over all images, but then a support image would be
    compared with a centroid that it is part of). L2 needs no support set and uses all images. If the model classifies
    by ridge regression, that is fitted to all images but the queries, and its logits replace Eq. 6.
    """

    def __init__(self, config: TrainConfig, feature_size: int, train_classes: int) -> None:
        super().__init__()
        self.config = config
        self.head = nn.Linear(feature_size, train_classes)
        tau = torch.tensor(config.temperature)
        self.temperature = nn.Parameter(tau) if config.learn_temperature else tau.item()

    def forward(self, features: Tensor, columns: Tensor, seen: int = 0, regression: Regression | None = None) -> Losses:
        """Losses (...) of features (..., k * n, d), n images for each of k classes in turn.

        `columns` (..., k) are the classes' numbers among all training classes, 0..K-1. Leading dimensions are groups.
        The labels of the first `seen` images of each class were used to make the weights, so these images are not
        queries. `regression` replaces the centroids where the model has one.
        """
        k, seen = columns.shape[-1], max(seen, self.config.support_per_class)
        blocks = at_least_fp32(features).unflatten(-2, (k, -1))  # (..., k, n, d)
        images = blocks.shape[-2]
        metric = self._metric(blocks, seen, regression)  # (..., k * (n - seen), k)
        labels = in_blocks(k, images - seen, columns.device)
        loss = cross_entropy(metric, labels)
        full_loss = kl = torch.zeros_like(loss)
        if self.config.full_weight > 0 or self.config.kl_weight > 0:
            full = self.head(blocks)  # (..., k, n, K)
            full_loss = cross_entropy(full.flatten(-3, -2), columns.repeat_interleave(images, -1))
            kl = self._consistency(full[..., seen:, :].flatten(-3, -2), metric, columns)
        total = loss + self.config.full_weight * full_loss + self.config.kl_weight * kl
        return Losses(total, *(x.detach() for x in (loss, full_loss, kl)), accuracy(metric, labels))

    def _metric(self, blocks: Tensor, seen: int, regression: Regression | None) -> Tensor:
        """Logits (..., Q, k) of the queries, which come after the first `seen` images of each class."""
        k, queries = blocks.shape[-3], blocks[..., seen:, :].flatten(-3, -2)
        if regression is None:
            support = blocks[..., : self.config.support_per_class, :].mean(-2)
            return metric_logits(queries, support, self.temperature)
        support = blocks[..., :seen, :].flatten(-3, -2)
        return regression(queries, support, in_blocks(k, seen, blocks.device), k)

    def _consistency(self, full: Tensor, metric: Tensor, columns: Tensor) -> Tensor:
        """L3, with the gradient stopped at the classifier that does not learn from it.

        The paper does not say which classifier learns. If the metric classifier does, an untrained full head
        (q uniform over all K classes) pulls its k logits to zero: on CIFAR-100, accuracy on validation groups
        does not rise after the first 100 groups. So by default the full head learns from the metric classifier.
        """
        teaches = self.config.kl_teaches
        full = full.detach() if teaches == "metric" else full
        metric = metric.detach() if teaches == "full" else metric
        return consistency(full, metric, columns)
