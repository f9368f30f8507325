"""Controls: what PudNet must beat to show that its predictions depend on the dataset.

The static trunk has the two steps of a hypernetwork, `sketch` and `generate`, so that the same code trains and
measures it. Two other controls are sketches, which a trained PudNet is given instead of a group's own: the constant
sketch (the mean over training groups) and the shuffled sketch (another group's).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pudnet.targets import SharedTarget, Target, Weights


class StaticTrunk(nn.Module):
    """The target's convolution weights as plain parameters: one network for all groups.

    Trained with PudNet's losses, groups and updates, it shows what predicting weights adds. Untrained, it is the
    control `random_weights`.
    """

    reads_labels = False
    regression = None  # it classifies by class centroids

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.shared = SharedTarget(target)
        plain = target.network.state_dict()
        self.kernels = nn.ParameterList(plain[conv.name].clone() for conv in target.convs)

    def sketch(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Ignore the images (..., N, C, H, W) -> an empty tensor (..., 0)."""
        return torch.empty(*images.shape[:-4], 0, device=images.device)

    def generate(self, sketch: Tensor) -> Weights:
        """The one set of weights, whatever the sketch (..., 0)."""
        return {name: kernel.view_as(kernel) for name, kernel in self.base_weights().items()}

    def base_weights(self) -> dict[str, Tensor]:
        """The one set of weights."""
        return {conv.name: kernel for conv, kernel in zip(self.shared.convs, self.kernels, strict=True)}
