"""MUSML (Jiang et al., 2022, "Subspace learning for effective meta-learning"): a group's weights lie in one of a
few subspaces."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from pudnet.baselines.learners import MethodLearner
from pudnet.baselines.method import Method
from pudnet.classifier import centroids, metric_logits
from pudnet.config import STRICT, Positive, PositiveFloat
from pudnet.learner import Learner
from pudnet.objective import Losses, cross_entropy, in_blocks
from pudnet.ridge import at_least_fp32, one_hot
from pudnet.targets import SharedTarget, Target, Weights


@dataclass(frozen=True, config=STRICT)
class MUSMLConfig:
    """What its paper tunes, or leaves to the reader here.

    `subspaces` K and `dimension` m: small, as a step costs K forward and backward passes. `inner_steps` T and
    `inner_rate` alpha: of the descent on v. `softness`: gamma at the start of training, the temperature of the
    softmax over the subspaces' losses; it falls linearly to a hundredth of that, so that at the end the best
    subspace alone learns. `temperature`: of the cosines, PudNet's.
    """

    subspaces: Positive = 2
    dimension: Positive = 2
    inner_steps: Positive = 3
    inner_rate: PositiveFloat = 0.1
    softness: PositiveFloat = 1.0
    temperature: PositiveFloat = 10.0


class Subspaces(nn.Module):
    """K bases S_k of m vectors each over the target's convolution weights; the rest of the target is shared.

    Biases and BatchNorm's affine parameters are shared, as PudNet's are, so that the same weights adapt.
    """

    def __init__(self, config: MUSMLConfig, target: Target) -> None:
        super().__init__()
        self.shared = SharedTarget(target)
        k, m = config.subspaces, config.dimension
        # w = S v at v = 1 / m is a mean of m vectors: drawn sqrt(m) times He's size, it has He's size.
        self.bases = nn.ParameterList(
            torch.randn(k, m, *conv.shape) * conv.he_std * m**0.5 for conv in self.shared.convs
        )

    def generate(self, k: int, v: Tensor) -> Weights:
        """w = S_k v, for v (..., m), in fp32 whatever the autocast."""
        pairs = zip(self.shared.convs, self.bases, strict=True)
        with torch.autocast(v.device.type, enabled=False):
            return {conv.name: torch.tensordot(v, basis[k], 1) for conv, basis in pairs}


class MUSML(Method):
    r"""In each subspace :math:`v \leftarrow v - \alpha \nabla_v L_{support}(S_k v)`, T times from v = 1/m.

    Then, in training, :math:`\sum_k \mathrm{softmax}_k(-o / \gamma) o_k` of the query losses o_k teaches the bases;
    on a new group the subspace of the lowest support loss is taken.

    Choices of ours: the classifier is PudNet's (cosines to centroids), as one set of head weights in the subspace
    cannot fit k classes in any order. A support image is compared with its own class's centroid without itself.
    Gradients do not pass through the inner steps (first order) nor through the softmax, which only weighs.
    """

    Config = MUSMLConfig

    def make_trunk(self, target: Target) -> Subspaces:
        """The bases."""
        return Subspaces(self.config, target)

    def learner(self, train_classes: int, k: int, support: int) -> Learner:
        """Its own."""
        return SubspaceLearner(self, k, support)

    def logits(self, queries: Tensor, support: Tensor, labels: Tensor, k: int) -> Tensor:
        """Scaled cosines to the class centroids, (Q, k)."""
        return metric_logits(queries, centroids(support, labels, k), self.config.temperature)

    def weights(self, images: Tensor, labels: Tensor) -> Weights:
        """Those of the subspace with the lowest support loss after the inner steps."""
        classes = int(labels.max()) + 1
        found = [self.descend(k, images, labels, classes) for k in range(self.config.subspaces)]
        losses = [self.support_loss_at(k, v, images, labels, classes).item() for k, v in enumerate(found)]
        best = losses.index(min(losses))
        return self.trunk.generate(best, found[best])

    @torch.enable_grad()
    def descend(self, k: int, images: Tensor, labels: Tensor, classes: int) -> Tensor:
        """The inner steps in subspace k on groups' support images (..., S, C, H, W), labels (S,): v (..., m)."""
        shape = (*images.shape[:-4], self.config.dimension)
        v = self.trunk.bases[0].new_full(shape, 1 / self.config.dimension)
        for _ in range(self.config.inner_steps):
            loss = self.support_loss_at(k, v.requires_grad_(), images, labels, classes)
            (gradient,) = torch.autograd.grad(loss.sum(), v)  # a group's loss is of its own v alone
            v = (v - self.config.inner_rate * gradient).detach()
        return v

    def support_loss_at(self, k: int, v: Tensor, images: Tensor, labels: Tensor, classes: int) -> Tensor:
        """`support_loss` of the support images under the weights S_k v."""
        features = self.trunk.shared(images, self.trunk.generate(k, v))
        return self.support_loss(at_least_fp32(features), labels, classes)

    def support_loss(self, support: Tensor, labels: Tensor, classes: int) -> Tensor:
        """Cross-entropy (...) of support features (..., S, d), each against its class's centroid less its own share."""
        with torch.autocast(support.device.type, enabled=False):
            means = centroids(support, labels, classes)
            cosines = metric_logits(support, means, self.config.temperature)
            count = one_hot(labels, classes).sum(0)[labels].unsqueeze(1)  # of each image's class
            rest = count * means[..., labels, :] - support  # a cosine needs its direction only
            own = self.config.temperature * F.cosine_similarity(support, rest, dim=-1).unsqueeze(-1)
            return cross_entropy(cosines.scatter(-1, labels.unsqueeze(1).expand_as(own), own), labels)


class SubspaceLearner(MethodLearner):
    """Training of the bases and of what the target shares."""

    def losses(self, images: Tensor, labels: Tensor, done: float) -> Losses:
        """The query losses of all subspaces, the better ones weighing more."""
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
