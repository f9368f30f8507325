"""Classifiers on a network's features: cosines to class centroids (Eq. 6), or a linear layer by ridge regression."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pudnet.card import Card
from pudnet.config import Penalty
from pudnet.device import full_precision
from pudnet.ridge import at_least_fp32, left_out, one_hot, ridge_weights

PENALTY_PARTS = (1.0, 0.5, 0.25, 0.125)  # of the learned penalty, what `penalty: leave_one_out` chooses from


def centroids(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Mean feature of each class, u_k of Eq. 6: features (..., N, d), labels (N,) in 0..k-1 -> (..., k, d), in fp32."""
    features = at_least_fp32(features)
    own = one_hot(labels, classes).to(features.dtype)  # (N, k), for a product: index_add varies from run to run on GPUs
    with full_precision(features.device):
        return own.mT @ features / own.sum(-2).unsqueeze(-1)


def metric_logits(features: Tensor, class_centroids: Tensor, temperature: Tensor | float) -> Tensor:
    """Eq. 6 before its softmax: tau times the cosine of features (..., N, d) and centroids (..., k, d) -> (..., N, k).

    In fp32 even under autocast: in bf16, the two largest cosines are equal for one image in a hundred.
    """
    with full_precision(features.device):
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
    with full_precision(features.device):
        balanced = _balanced(features, labels, classes)
        weight = scale * ridge_weights(balanced.x, balanced.y, ridge) / balanced.norm
        return weight, scale / classes - (weight @ balanced.mean.mT).squeeze(-1)


class _Balanced(NamedTuple):
    """Features and labels whose plain sums of squares are those of `ridge_layer`, where all classes count the same."""

    x: Tensor  # features about their mean, over `norm`, times the root of the image's weight: (..., N, d)
    y: Tensor  # one-hot labels about their mean, times the same root: (N, k)
    share: Tensor  # the images' weights, which sum to 1: (N, 1)
    mean: Tensor  # of the features: (..., 1, d)
    norm: Tensor  # of the features about it: (..., 1, 1)


def _balanced(features: Tensor, labels: Tensor, classes: int) -> _Balanced:
    features = at_least_fp32(features)
    y = one_hot(labels, classes).to(features.dtype)
    share = (y / (classes * y.sum(0))).sum(1, keepdim=True)
    mean = (share * features).sum(-2, keepdim=True)
    x = features - mean
    norm = (share * x.square()).sum((-2, -1), keepdim=True).clamp_min(1e-12).sqrt()
    root = (len(labels) * share).sqrt()
    return _Balanced(root * x / norm, root * (y - 1 / classes), share, mean, norm)


def _left_out_errors(features: Tensor, labels: Tensor, classes: int, penalties: Tensor) -> Tensor:
    """Squared errors (M, N) of images that are left out of `ridge_layer`, for each of penalties (M,).

    At the best scale, since a classifier's scale changes no decision.
    """
    with full_precision(features.device):
        x, y, share, *_ = _balanced(features, labels, classes)
        known = x.nan_to_num()  # features that are not finite have no eigenvalues; as zeros they keep the first penalty
        return _scale_free_errors(left_out(known, y, penalties[:, None, None], share), y)


def _scale_free_errors(predicted: Tensor, y: Tensor) -> Tensor:
    """Each row's squared error (..., N) of predictions (..., N, k) of y (N, k), at the scale with the least of all."""
    products, squares = ((predicted * each).sum((-2, -1), keepdim=True) for each in (y, predicted))
    scale = (products / squares.clamp_min(1e-12)).clamp_min(0)  # a negative one would turn decisions round
    return (y - scale * predicted).square().sum(-1)


def _first_not_clearly_worse(errors: Tensor) -> int:
    """Of errors (M, N), the first of M that is worse than the best by at most two standard errors of the difference."""
    worse = errors - errors[errors.mean(1).argmin()]
    clearly = worse.mean(1) > 2 * worse.std(1) / math.sqrt(errors.shape[1])
    return int((~clearly).float().argmax())


class Regression(nn.Module):
    """A classifier by `ridge_layer` whose penalty and scale are learned in training.

    The scale is needed because regression gives values within 0..1, which a softmax hardly tells apart. The gradient
    passes through the solution, so that training finds features on which a linear layer fitted to few images does well
    (Bertinetto et al., 2019).
    """

    def __init__(self, ridge: float, scale: float, penalty: Penalty = "learned") -> None:
        super().__init__()
        self.log_ridge = nn.Parameter(torch.tensor(math.log(ridge)))
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.penalty = penalty

    def forward(self, queries: Tensor, support: Tensor, labels: Tensor, classes: int) -> Tensor:
        """Queries (..., Q, d) and support features (..., S, d) with labels (S,) in 0..k-1 -> logits (..., Q, k)."""
        weight, bias = ridge_layer(support, labels, classes, self.log_ridge.exp(), self.log_scale.exp())
        with full_precision(queries.device):
            return at_least_fp32(queries) @ weight.mT + bias.unsqueeze(-2)

    def choose(self, candidates: Sequence[Tensor], labels: Tensor, classes: int) -> tuple[int, Tensor]:
        """Which of several features (S, d) of a group's images, labels (S,), to solve the layer for, and its penalty.

        With `penalty: leave_one_out`, it may also be a half, a quarter or an eighth of the learned penalty: images of
        another kind than those that it was learned on may want a smaller one. Each image is left out of the layer in
        turn, and the squared errors of these predictions judge the pairs of features and penalty, in the order of
        features and then of falling penalties. The first is taken that is not clearly worse than the best: not by more
        than two standard errors of the paired difference. (Class filters are not left out: they were solved from all
        images.)
        """
        learned = self.log_ridge.exp()
        parts = PENALTY_PARTS if self.penalty == "leave_one_out" else (1.0,)
        penalties = learned * learned.new_tensor(parts)
        if len(candidates) == len(parts) == 1:
            return 0, learned
        errors = torch.cat([_left_out_errors(each, labels, classes, penalties) for each in candidates])
        candidate, penalty = divmod(_first_not_clearly_worse(errors), len(penalties))
        return candidate, penalties[penalty]


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
    """Features (N, d) -> a linear layer's logits, in fp32 even under autocast (in fp64 if the features are)."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.head_weight = nn.Parameter(weight, requires_grad=False)  # (k, d)
        self.head_bias = nn.Parameter(bias, requires_grad=False)  # (k,)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (N, k)."""
        with full_precision(features.device):
            features = at_least_fp32(features)
            return F.linear(features, self.head_weight.to(features.dtype), self.head_bias.to(features.dtype))

    def plain(self) -> nn.Module:
        """The same classifier in plain layers, for exporters, which cannot handle autocast."""
        layer = nn.utils.skip_init(nn.Linear, *reversed(self.head_weight.shape), dtype=self.head_weight.dtype)
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
