"""Classifiers on a network's features: cosines to class centroids (Eq. 6), or a linear layer by ridge regression."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pudnet.card import Card
from pudnet.ridge import at_least_fp32, one_hot, ridge_weights


def centroids(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Mean feature of each class, u_k of Eq. 6: features (..., N, d), labels (N,) in 0..k-1 -> (..., k, d), in fp32."""
    features = at_least_fp32(features)
    own = one_hot(labels, classes).to(features.dtype)  # (N, k), for a product: index_add varies from run to run on GPUs
    with torch.autocast(features.device.type, enabled=False):
        return own.mT @ features / own.sum(-2).unsqueeze(-1)


def metric_logits(features: Tensor, class_centroids: Tensor, temperature: Tensor | float) -> Tensor:
    """Eq. 6 before its softmax: tau times the cosine of features (..., N, d) and centroids (..., k, d) -> (..., N, k).

    In fp32 even under autocast: in bf16, the two largest cosines are equal for one image in a hundred.
    """
    with torch.autocast(features.device.type, enabled=False):
        features, points = (F.normalize(at_least_fp32(each), dim=-1) for each in (features, class_centroids))
        return temperature * (features @ points.mT)


def ridge_layer(
    features: Tensor, labels: Tensor, classes: int, ridge: Tensor | float, scale: Tensor | float
) -> tuple[Tensor, Tensor]:
    r"""Ridge regression of the one-hot labels on support features: :math:`s\,(1/k + R (f - \bar f) / n)`.

    Features f (..., N, d), labels (N,) in 0..k-1 -> the solution as a linear layer, weight (..., k, d) and bias
    (..., k), in fp32. n is the root mean square norm of the features about their mean, so that the penalty does not
    depend on their size. Mean, norm and squared errors are weighted so that all classes count the same, however many
    images each has. Leading dimensions are groups; each gets its own layer.
    """
    with torch.autocast(features.device.type, enabled=False):
        features = at_least_fp32(features)
        y = one_hot(labels, classes).to(features.dtype)
        share = (y / (classes * y.sum(0))).sum(1, keepdim=True)  # (N, 1), the images' weights, which sum to 1
        mean = (share * features).sum(-2, keepdim=True)  # (..., 1, d)
        x = features - mean
        norm = (share * x.square()).sum((-2, -1), keepdim=True).clamp_min(1e-12).sqrt()  # (..., 1, 1)
        root = (len(labels) * share).sqrt()
        weight = scale * ridge_weights(root * x / norm, root * (y - 1 / classes), ridge) / norm
        return weight, scale / classes - (weight @ mean.mT).squeeze(-1)


class Regression(nn.Module):
    """A classifier by `ridge_layer` whose penalty and scale are learned in training.

    The scale is needed because regression gives values within 0..1, which a softmax hardly tells apart. The gradient
    passes through the solution, so that training finds features on which a linear layer fitted to few images does well
    (Bertinetto et al., 2019).
    """

    def __init__(self, ridge: float, scale: float) -> None:
        super().__init__()
        self.log_ridge = nn.Parameter(torch.tensor(math.log(ridge)))
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def forward(self, queries: Tensor, support: Tensor, labels: Tensor, classes: int) -> Tensor:
        """Queries (..., Q, d) and support features (..., S, d) with labels (S,) in 0..k-1 -> logits (..., Q, k)."""
        weight, bias = ridge_layer(support, labels, classes, self.log_ridge.exp(), self.log_scale.exp())
        with torch.autocast(queries.device.type, enabled=False):
            return at_least_fp32(queries) @ weight.mT + bias.unsqueeze(-2)

    def card_values(self) -> dict[str, float]:
        """Penalty and scale, as a network's card records them."""
        return {"ridge": self.log_ridge.exp().item(), "temperature": self.log_scale.exp().item()}


class CentroidClassifier(nn.Module):
    """Features (N, d) -> tau times the cosines to centroids (k, d) (Eq. 6)."""

    def __init__(self, class_centroids: Tensor, temperature: float) -> None:
        super().__init__()
        self.centroids = nn.Parameter(class_centroids, requires_grad=False)
        self.temperature = temperature

    def forward(self, features: Tensor) -> Tensor:
        """Logits (N, k)."""
        return metric_logits(features, self.centroids, self.temperature)

    def plain(self) -> nn.Module:
        """The same classifier in plain layers, for exporters, which cannot handle autocast."""
        return _Cosines(self)


class LinearClassifier(nn.Module):
    """Features (N, d) -> a linear layer's logits, in fp32 even under autocast."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.head_weight = nn.Parameter(weight, requires_grad=False)  # (k, d)
        self.head_bias = nn.Parameter(bias, requires_grad=False)  # (k,)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (N, k)."""
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(features.float(), self.head_weight.float(), self.head_bias.float())

    def plain(self) -> nn.Module:
        """The same classifier in plain layers, for exporters, which cannot handle autocast."""
        layer = nn.utils.skip_init(nn.Linear, *reversed(self.head_weight.shape))
        layer.load_state_dict({"weight": self.head_weight.detach(), "bias": self.head_bias.detach()})
        return layer


class _Cosines(nn.Module):
    """Cosines to class centroids that were normalised in advance."""

    def __init__(self, classifier: CentroidClassifier) -> None:
        super().__init__()
        self.temperature = classifier.temperature
        self.register_buffer("directions", F.normalize(classifier.centroids.detach().float().cpu(), dim=1))

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, d) -> logits (N, k)."""
        return self.temperature * F.normalize(features, dim=1) @ self.directions.T


def fit(features: Tensor, labels: Tensor, card: Card) -> CentroidClassifier | LinearClassifier:
    """Fit the kind of classifier that a network's card names to support features (S, d), labels (S,) in 0..k-1."""
    classes = len(card.classes)
    if card.ridge is None:
        return CentroidClassifier(centroids(features, labels, classes), card.temperature)
    return LinearClassifier(*ridge_layer(features, labels, classes, card.ridge, card.temperature))


def unfilled(card: Card, features: int) -> CentroidClassifier | LinearClassifier:
    """A classifier of the kind and size that a network's card names, with zeros in place of a file's tensors."""
    weight = torch.zeros(len(card.classes), features)
    if card.ridge is None:
        return CentroidClassifier(weight, card.temperature)
    return LinearClassifier(weight, torch.zeros(len(card.classes)))
