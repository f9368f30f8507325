"""What the trainer trains: a model and its losses on a task group."""

from __future__ import annotations

from torch import Tensor, nn

from pudnet.config import TrainConfig
from pudnet.controls import StaticTrunk
from pudnet.device import full_precision
from pudnet.errors import UserError
from pudnet.hypernet import PudNet
from pudnet.objective import Losses, Objective, in_blocks, pretraining_losses
from pudnet.ridge import at_least_fp32
from pudnet.targets import Target


class Learner(nn.Module):
    """A method in training.

    Only `model`, which gives the weights for a new group, is kept afterwards; the other modules only serve training.
    """

    model: nn.Module
    mixed_share = 0.0  # the share of the training, its beginning, in which images are shuffled across groups

    def losses(self, images: Tensor, labels: Tensor, done: float) -> Losses:
        """The losses (B,) of several groups: images (B, N, C, H, W), labels (B, N) in 0..K-1 (the training classes).

        `done` is the share of the training that is over, 0..1.
        """
        raise NotImplementedError

    def rate(self, done: float) -> float:
        """The factor of the learning rate when the share `done` of the training is over."""
        return 1.0


class MetaLearner(Learner):
    """PudNet or the static trunk, trained by the losses of section 3.5: it makes weights, and they give features."""

    def __init__(self, model: PudNet | StaticTrunk, target: Target, config: TrainConfig, classes: int, k: int) -> None:
        super().__init__()
        self.model, self.k, self.mixed_share = model, k, config.pretraining_share or 0.0
        self.objective = Objective(config, target.features, classes)
        if self.mixed_share and not model.base_weights():
            raise UserError("train.pretraining_share: without model.base there are no weights before a group is seen")

    def losses(self, images: Tensor, labels: Tensor, done: float) -> Losses:
        """Eq. 10 for each group, whose images are ordered in k blocks by class; in pretraining, L2 of mixed images."""
        if done < self.mixed_share:
            return self._pretrain(images, labels)
        sketch, seen = self._sketch(images)
        features = self.model.shared(images, self.model.generate(sketch))
        columns = labels.unflatten(1, (self.k, -1))[..., 0]  # (B, k)
        with full_precision(images.device):
            return self.objective(features, columns, seen, self.model.regression)

    def _pretrain(self, images: Tensor, labels: Tensor) -> Losses:
        """L2 of images (B, N, C, H, W) with labels (B, N) in 0..K-1, with the base weights."""
        features = self.model.shared(images, self.model.base_weights())
        with full_precision(images.device):
            return pretraining_losses(self.objective.head(at_least_fp32(features)), labels)

    def _sketch(self, images: Tensor) -> tuple[Tensor, int]:
        """The groups' sketches, and how many images of each class are used with their labels.

        The paper's uses all images and no labels. A model that reads labels uses as many images as a prediction does,
        but at most half of the group's, since the rest must serve as queries.
        """
        if not self.model.reads_labels:
            return self.model.sketch(images), 0
        blocks = images.unflatten(1, (self.k, -1))  # (B, k, n, C, H, W)
        seen = self.model.config.labelled(self.k, blocks.shape[2])
        labels = in_blocks(self.k, seen, images.device)
        return self.model.sketch(blocks[:, :, :seen].flatten(1, 2), labels, self.k), seen
