"""Controls: what PudNet has to beat to show that the dataset itself matters.

Each has the two steps of a hypernetwork, `sketch` and `generate`, so that one loop trains them and one
evaluator measures them. The other two controls are sketches, not networks: the constant sketch (the mean
over training groups) and the shuffled sketch (another group's) are fed to a trained PudNet.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pudnet.targets import SharedTarget, Target, Weights


class StaticTrunk(nn.Module):
    """The target's convolution weights as plain parameters: one network for all groups.

    Trained with the same losses, groups and updates it is the honest opponent; untrained it is the control
    `random_weights`.
    """

    class_aware = False  # labels make no difference to its weights
    regression = None  # class centroids classify: none was trained

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.shared = SharedTarget(target)
        plain = target.network.state_dict()
        self.kernels = nn.ParameterList(plain[conv.name].clone() for conv in target.convs)

    def sketch(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Look at nothing: images (..., N, C, H, W) -> an empty tensor (..., 0)."""
        return torch.empty(*images.shape[:-4], 0, device=images.device)

    def generate(self, sketch: Tensor) -> Weights:
        """Return the one set of weights, for however many groups the sketch (..., 0) is of."""
        return {name: kernel.view_as(kernel) for name, kernel in self.base_weights().items()}

    def base_weights(self) -> dict[str, Tensor]:
        """The one set of weights."""
        return {conv.name: kernel for conv, kernel in zip(self.shared.convs, self.kernels, strict=True)}
