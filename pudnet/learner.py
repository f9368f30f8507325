"""What the trainer trains: a model, and what its training costs on a task group."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from pudnet.config import TrainConfig
from pudnet.controls import StaticTrunk
from pudnet.hypernet import PudNet
from pudnet.objective import Losses, Objective
from pudnet.targets import Target


class Learner(nn.Module):
    """A method in training.

    `model` is what is kept of it: what weights come from for a new group. Other modules serve training alone.
    """

    model: nn.Module

    def losses(self, images: Tensor, labels: Tensor, done: float) -> list[Losses]:
        """What each of several groups costs: images (B, N, C, H, W), labels (B, N) in 0..K-1, training classes.

        `done` is the share of the training that is over, 0..1.
        """
        raise NotImplementedError

    def arrange(self, table: np.ndarray) -> np.ndarray:
        """The order in which a table of groups (G, N) is seen: as it is, unless a method mixes the groups."""
        return table

    def rate(self, done: float) -> float:
        """What the learning rate is multiplied by when a share of the training is over."""
        return 1.0


class MetaLearner(Learner):
    """PudNet, or the static trunk, with the losses of section 3.5: weights first, then the features under them."""

    def __init__(self, model: PudNet | StaticTrunk, target: Target, config: TrainConfig, classes: int, k: int) -> None:
        super().__init__()
        self.model, self.k = model, k
        self.objective = Objective(config, target.features, classes)

    def losses(self, images: Tensor, labels: Tensor, done: float) -> list[Losses]:
        """Eq. 10 of each group; its images stand in k blocks of one class."""
        sketch, seen = self._sketch(images)
        features = self.model.shared(images, self.model.generate(sketch))
        columns = labels.unflatten(1, (self.k, -1))[..., 0]  # (B, k)
        with torch.autocast(images.device.type, enabled=False):
            groups = zip(features, columns, strict=True)
            return [self.objective(*group, seen, self.model.regression) for group in groups]

    def _sketch(self, images: Tensor) -> tuple[Tensor, int]:
        """The groups' sketches, and of how many images of each class the labels are in them.

        A sketch is of all images; where labels enter it, of as many as a prediction looks at, or of half.
        """
        if not self.model.class_aware:
            return self.model.sketch(images), 0
        blocks = images.unflatten(1, (self.k, -1))  # (B, k, n, C, H, W)
        seen = self.model.config.labelled(self.k, blocks.shape[2])
        labels = torch.arange(self.k, device=images.device).repeat_interleave(seen)
        return self.model.sketch(blocks[:, :, :seen].flatten(1, 2), labels.expand(len(blocks), -1)), seen
