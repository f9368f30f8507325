"""What classifies by a network's features: cosines to class centroids (Eq. 6), or a linear layer that is solved for."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pudnet.card import Card
from pudnet.ridge import normalized_rows, ridge_weights


def centroids(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Mean feature of each class, u_k of Eq. 6: features (N, d), labels (N,) in 0..k-1 -> (k, d), in fp32."""
    one_hot = F.one_hot(labels, classes).float()  # (N, k); a product, since index_add is not reproducible on a GPU
    with torch.autocast(features.device.type, enabled=False):
        return one_hot.T @ features.float() / one_hot.sum(0).unsqueeze(1)


def metric_logits(features: Tensor, class_centroids: Tensor, temperature: Tensor | float) -> Tensor:
    """Eq. 6 before its softmax: tau times the cosine of features (N, d) and centroids (k, d) -> (N, k).

    In fp32 whatever the autocast: in bf16 the best two cosines of one image in a hundred are equal.
    """
    with torch.autocast(features.device.type, enabled=False):
        cosines = F.normalize(features.float(), dim=-1) @ F.normalize(class_centroids.float(), dim=-1).T
        return temperature * cosines


def ridge_layer(
    features: Tensor, labels: Tensor, classes: int, ridge: Tensor | float, scale: Tensor | float
) -> tuple[Tensor, Tensor]:
    r"""Ridge regression of the one-hot labels on support features: :math:`s\,(\bar y + R (f - \bar f) / n)`.

    Features (N, d), of root mean square norm n about their mean, labels (N,) in 0..k-1 -> the same as a linear layer,
    weight (k, d) and bias (k,), in fp32. The penalty is of features of unit mean square norm.
    """
    with torch.autocast(features.device.type, enabled=False):
        x, mean, norm = normalized_rows(features.float())
        y = F.one_hot(labels, classes).float()
        weight = scale * ridge_weights(x, y - y.mean(0), ridge) / norm
        return weight, scale * y.mean(0) - weight @ mean.squeeze(0)


class Ridge(nn.Module):
    """What training learns of `ridge_layer`: its penalty, and the scale of the logits, which regression leaves within
    0..1, where a softmax hardly tells them apart. The gradient goes through the solution, so that features become
    what a linear layer of few images is good on (Bertinetto et al., 2019)."""

    def __init__(self, ridge: float = 0.3, scale: float = 10.0) -> None:
        super().__init__()
        self.log_ridge = nn.Parameter(torch.tensor(math.log(ridge)))
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def forward(self, queries: Tensor, support: Tensor, labels: Tensor, classes: int) -> Tensor:
        """Queries (Q, d) and support features (S, d) with labels (S,) in 0..k-1 -> logits (Q, k)."""
        return F.linear(queries, *ridge_layer(support, labels, classes, self.log_ridge.exp(), self.log_scale.exp()))


class CentroidClassifier(nn.Module):
    """Features (N, d) -> tau times the cosines to centroids (k, d) (Eq. 6)."""

    def __init__(self, class_centroids: Tensor, temperature: float) -> None:
        super().__init__()
        self.centroids = nn.Parameter(class_centroids, requires_grad=False)
        self.temperature = temperature

    def forward(self, features: Tensor) -> Tensor:
        """Logits (N, k)."""
        return metric_logits(features, self.centroids, self.temperature)


class LinearClassifier(nn.Module):
    """Features (N, d) -> a linear layer's logits, in fp32 whatever the autocast."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.class_weight = nn.Parameter(weight, requires_grad=False)  # (k, d)
        self.class_bias = nn.Parameter(bias, requires_grad=False)  # (k,)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (N, k)."""
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(features.float(), self.class_weight, self.class_bias)


def fit(features: Tensor, labels: Tensor, card: Card) -> CentroidClassifier | LinearClassifier:
    """The classifier that a network's card asks for, from support features (S, d) and labels (S,) in 0..k-1."""
    classes = len(card.classes)
    if card.ridge is None:
        return CentroidClassifier(centroids(features, labels, classes), card.temperature)
    return LinearClassifier(*ridge_layer(features, labels, classes, card.ridge, card.temperature))


def taken_from(tensors: dict[str, Tensor], card: Card) -> CentroidClassifier | LinearClassifier | None:
    """The classifier among a network file's tensors, which are then without it; None where none fits the card."""
    names = ("centroids",) if card.ridge is None else ("class_weight", "class_bias")
    found = [tensors.pop(name, torch.empty(0)) for name in names]
    if [own.ndim for own in found] != [2, 1][: len(found)] or any(len(own) != len(card.classes) for own in found):
        return None
    return CentroidClassifier(*found, card.temperature) if card.ridge is None else LinearClassifier(*found)
