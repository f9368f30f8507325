"""MUSML (Jiang et al., 2022, "Subspace learning for effective meta-learning"): each group's weights lie in one of a
few learned subspaces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from pudnet.baselines.learners import MethodLearner
from pudnet.baselines.method import Method
from pudnet.classifier import centroids, metric_logits
from pudnet.config import STRICT, Positive, PositiveFloat, TrainConfig
from pudnet.device import full_precision
from pudnet.learner import Learner
from pudnet.objective import Losses, cross_entropy, in_blocks
from pudnet.ridge import at_least_fp32, one_hot
from pudnet.targets import SharedTarget, Target, Weights


@dataclass(frozen=True, config=STRICT)
class MUSMLConfig:
    """Options that its paper tunes or leaves open.

    `subspaces` K and `dimension` m are small, since a step costs K forward and backward passes. `inner_steps` T and
    `inner_rate` alpha are those of the descent on v. `softness` is the initial gamma, the temperature of the softmax
    over the subspaces' losses; gamma falls linearly to a hundredth of it, so that at the end only the best subspace
    learns. `temperature`, of the cosines, is PudNet's.
    """

    subspaces: Positive = 2
    dimension: Positive = 2
    inner_steps: Positive = 3
    inner_rate: PositiveFloat = 0.1
    softness: PositiveFloat = 1.0
    temperature: PositiveFloat = 10.0


class Subspaces(nn.Module):
    """K bases S_k of m vectors each, in the space of the target's convolution weights.

    Biases and BatchNorm's affine parameters are the same for all groups, as in PudNet, so that both methods adapt the
    same weights.
    """

    def __init__(self, config: MUSMLConfig, target: Target) -> None:
        super().__init__()
        self.shared = SharedTarget(target)
        k, m = config.subspaces, config.dimension
        # w = S v at v = 1 / m is a mean of m vectors; sqrt(m) gives it He's standard deviation.
        self.bases = nn.ParameterList(
            torch.randn(k, m, *conv.shape) * conv.he_std * m**0.5 for conv in self.shared.convs
        )

    def generate(self, k: int, v: Tensor) -> Weights:
        """w = S_k v, for v (..., m), in fp32 even under autocast."""
        pairs = zip(self.shared.convs, self.bases, strict=True)
        with full_precision(v.device):
            return {conv.name: torch.tensordot(v, basis[k], 1) for conv, basis in pairs}


class MUSML(Method):
    r"""In each subspace :math:`v \leftarrow v - \alpha \nabla_v L_{support}(S_k v)`, T times from v = 1/m.

    Training then minimises :math:`\sum_k \mathrm{softmax}_k(-o / \gamma) o_k` over the bases, where o_k are the query
    losses. On a new group, the subspace with the lowest support loss is used.

    Our choices: the classifier is PudNet's (cosines to centroids), because head weights in the subspace could not fit k
    classes in every order. The centroid that a support image is compared with leaves that image out. Gradients
    do not pass through the inner steps (first order), nor through the softmax, which only gives weights.
    """

    Config = MUSMLConfig
    takes_pretraining_share = False

    @classmethod
    def begins_alike(cls, config: Mapping[str, Any], share: float) -> bool:
        """No: gamma falls over the whole training."""
        return False

    def make_trunk(self, target: Target) -> Subspaces:
        """The bases."""
        return Subspaces(self.config, target)

    def learner(self, train_classes: int, k: int, config: TrainConfig) -> Learner:
        """A learner of its own, which has no pretraining."""
        return SubspaceLearner(self, k, config.support_per_class)

    def logits(self, queries: Tensor, support: Tensor, labels: Tensor, k: int) -> Tensor:
        """Scaled cosines to the class centroids, (Q, k)."""
        return metric_logits(queries, centroids(support, labels, k), self.config.temperature)

    def weights(self, images: Tensor, labels: Tensor) -> Weights:
        """The weights in the subspace with the lowest support loss after the inner steps."""
        classes = int(labels.max()) + 1
        found = [self.descend(k, images, labels, classes) for k in range(self.config.subspaces)]
        losses = [self.support_loss_at(k, v, images, labels, classes).item() for k, v in enumerate(found)]
        best = losses.index(min(losses))
        return self.trunk.generate(best, found[best])

    @torch.enable_grad()
    def descend(self, k: int, images: Tensor, labels: Tensor, classes: int) -> Tensor:
        """Do the inner steps in subspace k on support images (..., S, C, H, W) with labels (S,): v (..., m)."""
        shape = (*images.shape[:-4], self.config.dimension)
        v = self.trunk.bases[0].new_full(shape, 1 / self.config.dimension)
        for _ in range(self.config.inner_steps):
            loss = self.support_loss_at(k, v.requires_grad_(), images, labels, classes)
            (gradient,) = torch.autograd.grad(loss.sum(), v)  # a group's loss depends only on its own v
            v = (v - self.config.inner_rate * gradient).detach()
        return v

    def support_loss_at(self, k: int, v: Tensor, images: Tensor, labels: Tensor, classes: int) -> Tensor:
        """`support_loss` of the support images under the weights S_k v."""
        features = self.trunk.shared(images, self.trunk.generate(k, v))
        return self.support_loss(at_least_fp32(features), labels, classes)

    def support_loss(self, support: Tensor, labels: Tensor, classes: int) -> Tensor:
        """Cross-entropy (...) of support features (..., S, d). An image is no part of its own centroid."""
        with full_precision(support.device):
            means = centroids(support, labels, classes)
            cosines = metric_logits(support, means, self.config.temperature)
            count = one_hot(labels, classes).sum(0)[labels].unsqueeze(1)  # size of each image's class
            rest = count * means[..., labels, :] - support  # not divided: a cosine depends only on the direction
            own = self.config.temperature * F.cosine_similarity(support, rest, dim=-1).unsqueeze(-1)
            return cross_entropy(cosines.scatter(-1, labels.unsqueeze(1).expand_as(own), own), labels)


class SubspaceLearner(MethodLearner):
    """Trains the bases and the parameters that all groups share."""

    def losses(self, images: Tensor, labels: Tensor, done: float) -> Losses:
        """The query losses of all subspaces, weighted in favour of the better ones."""
        method, config = self.model, self.model.config
        support = images.unflatten(1, (self.k, -1))[:, :, : self.support].flatten(1, 2)
        own = in_blocks(self.k, self.support, images.device)
        outcomes = []
        for k in range(config.subspaces):
            v = method.descend(k, support, own, self.k)
            outcomes.append(self.episode(at_least_fp32(method.trunk.shared(images, method.trunk.generate(k, v)))))
        totals = torch.stack([outcome.total for outcome in outcomes])
        shares = (-totals.detach() / (config.softness * max(0.01, 1 - done))).softmax(0)
        total = (shares * totals).sum(0)
        accuracy = (shares * torch.stack([outcome.accuracy for outcome in outcomes])).sum(0)
        return replace(outcomes[0], total=total, metric=total.detach(), accuracy=accuracy)
