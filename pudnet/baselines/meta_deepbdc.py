"""Meta DeepBDC (Xie et al., 2022, "Joint distribution matters: deep Brownian distance covariance ...")."""

from __future__ import annotations

import copy
import math

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from pudnet.baselines.learners import TwoStages
from pudnet.baselines.method import Method, squared_distances
from pudnet.config import STRICT, Fraction, Positive, PositiveFloat
from pudnet.errors import UserError
from pudnet.learner import Learner
from pudnet.objective import centroids
from pudnet.targets import Target


@dataclass(frozen=True, config=STRICT)
class MetaDeepBDCConfig:
    """What its two stages, and its features, are given.

    `channels`: to how many the map is reduced where it has more; the authors' 640 are for ResNet-12 on 84 px, and
    features grow with their square. `positions`: how many the map must have at least: with one, as ResNets leave
    of 32 px, distances between channels are of single numbers, so the last map with as many is taken.
    `pretraining`, `meta_rate`: as Meta-Baseline's, whose two stages these are; the authors' go from 0.05 to 0.0001.
    """

    channels: Positive = 64
    positions: Positive = 4
    pretraining: Fraction = 0.5
    meta_rate: PositiveFloat = 0.1


class MetaDeepBDC(Method):
    """Pretraining with a linear head on BDC features, then episodes with their squared distances to class means.

    For groups of more than one support image a class its authors score by minus the squared Euclidean distance;
    their inner product is for one.
    """

    Config = MetaDeepBDCConfig

    @classmethod
    def network(cls, config: MetaDeepBDCConfig, target: Target) -> nn.Module:
        """The plain target up to the last map large enough, and the BDC module on it."""
        return BDCNetwork(target, config)

    def learner(self, train_classes: int, k: int, support: int) -> Learner:
        """Both stages."""
        stages = (self.config.pretraining, self.config.meta_rate)
        return TwoStages(self, self.features, train_classes, k, support, *stages)

    def logits(self, queries: Tensor, support: Tensor, labels: Tensor, k: int) -> Tensor:
        """Minus the squared distances to the class means, (Q, k)."""
        return -squared_distances(queries, centroids(support, labels, k))


class BDCNetwork(nn.Module):
    """A network whose features are the BDC matrix of one of its maps: images (N, C, S, S) -> (N, c (c + 1) / 2)."""

    def __init__(self, target: Target, config: MetaDeepBDCConfig) -> None:
        super().__init__()
        self.body = copy.deepcopy(target.network)
        self.layer, (channels, positions) = _last_map(target, config.positions)
        self.reduce = nn.Identity()
        if channels > config.channels:
            channels, wide = config.channels, channels
            conv, norm = nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels)
            self.reduce = nn.Sequential(conv, norm, nn.ReLU())
        self.tau = nn.Parameter(torch.tensor(-math.log(2 * positions)))

    def forward(self, images: Tensor) -> Tensor:
        """The upper triangle, with its diagonal, of each image's BDC matrix. In fp32 whatever the autocast."""
        maps = []
        hook = self.body.get_submodule(self.layer).register_forward_hook(lambda *call: maps.append(call[2]))
        try:
            self.body(images)
        finally:
            hook.remove()
        with torch.autocast(images.device.type, enabled=False):
            matrices = bdc(self.reduce(maps[0].float()).flatten(2), self.tau)  # (N, c, c)
        rows, columns = torch.triu_indices(*matrices.shape[1:], device=matrices.device)
        return matrices[:, rows, columns]


def bdc(features: Tensor, tau: Tensor) -> Tensor:
    r"""Brownian distance covariance matrices of maps: features (N, c, M) of M positions -> (N, c, c).

    .. math:: A_{kl} = \sqrt{e^\tau \lVert x_k - x_l \rVert^2 + 10^{-5}}, \quad B = J A J, \quad J = I - 11^T / c

    with x_k the M values of channel k. J A J takes each row's and column's mean away.
    """
    gram = features @ features.mT
    squares = gram.diagonal(dim1=1, dim2=2)
    distances = (squares.unsqueeze(2) + squares.unsqueeze(1) - 2 * gram).clamp_min(0)
    a = (tau.exp() * distances + 1e-5).sqrt()
    rows = a.mean(2, keepdim=True)
    return a - rows - rows.mT + rows.mean(1, keepdim=True)


@torch.no_grad()
def _last_map(target: Target, positions: int) -> tuple[str, tuple[int, int]]:
    """The layer that gives the last map of at least so many positions; its channels and positions.

    Raises `UserError` for a target that has none.
    """
    found: list[tuple[str, tuple[int, int]]] = []

    def note(path: str, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output[0, 0].numel() >= positions:
            found.append((path, (output.shape[1], output[0, 0].numel())))

    body = copy.deepcopy(target.network).eval()
    for path, module in body.named_modules():
        module.register_forward_hook(lambda _, __, output, path=path: note(path, output))
    body(torch.zeros(2, target.channels, target.image_size, target.image_size))
    if not found:
        raise UserError(f"meta_deepbdc: the target has no map of {positions} positions at {target.image_size} px")
    return found[-1]
