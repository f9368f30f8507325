"""Meta DeepBDC (Xie et al., 2022, "Joint distribution matters: deep Brownian distance covariance ...")."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from pudnet.baselines.learners import Stages
from pudnet.baselines.method import Method, squared_distances
from pudnet.classifier import centroids
from pudnet.config import STRICT, Fraction, Positive, PositiveFloat, TrainConfig
from pudnet.device import full_precision
from pudnet.errors import UserError
from pudnet.learner import Learner
from pudnet.ridge import at_least_fp32
from pudnet.targets import Block, Level, Target, map_at


@dataclass(frozen=True, config=STRICT)
class MetaDeepBDCConfig:
    """Options of the two stages and of the features.

    `channels`: a map with more channels is reduced to this many, since the number of features grows with their square
    (the authors' 640 are for ResNet-12 on 84 px). `positions`: the features are made from the last map with at least
    this many positions, and later layers are cut off (in a ResNet on 32 px, the last stage). In a map of one position,
    distances between channels would compare single numbers. `pretraining` and `meta_rate` are Meta-Baseline's, whose
    two stages this method has too; its authors' rates are 0.05 and 0.0001. `dropout`, before the first stage's head, is
    theirs. tau is trained at the trunk's learning rate, whose default is their rate for tau.
    """

    channels: Positive = 64
    positions: Positive = 4
    pretraining: Fraction = 0.5
    meta_rate: PositiveFloat = 0.1
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.8


class MetaDeepBDC(Method):
    """Pretraining with a linear head on BDC features, then episodes by squared distances to the class means.

    This is what its authors use with more than one support image for each class; with one they use the inner product.
    """

    Config = MetaDeepBDCConfig
    takes_pretraining_share = False

    @classmethod
    def begins_alike(cls, config: Mapping[str, Any], share: float) -> bool:
        """Only if it has one stage."""
        return config["pretraining"] in (0, 1)

    @classmethod
    def network(cls, config: MetaDeepBDCConfig, target: Target) -> nn.Module:
        """The plain target up to its last map that is large enough, with the BDC module on top."""
        return BDCNetwork(target, config)

    def learner(self, train_classes: int, k: int, config: TrainConfig) -> Learner:
        """Both stages."""
        stages = (self.config.pretraining, self.config.meta_rate, self.config.dropout)
        return Stages(self, train_classes, k, config, *stages)

    def logits(self, queries: Tensor, support: Tensor, labels: Tensor, k: int) -> Tensor:
        """Minus the squared distances to the class means, (Q, k)."""
        return -squared_distances(queries, centroids(support, labels, k))


class BDCNetwork(nn.Module):
    """A network whose features are the BDC matrix of one of its maps: images (N, C, S, S) -> (N, c (c + 1) / 2)."""

    def __init__(self, target: Target, config: MetaDeepBDCConfig) -> None:
        super().__init__()
        self.body = copy.deepcopy(target.network)
        images = torch.zeros(2, target.channels, target.image_size, target.image_size)
        self.layer, (channels, positions) = _last_map(self.body, images, config.positions)
        _cut_off_after(self.body, self.layer, images)
        self.reduce = nn.Identity()
        if channels > config.channels:
            channels, wide = config.channels, channels
            conv, norm = nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels)
            self.reduce = nn.Sequential(conv, norm, nn.ReLU())
        self.tau = nn.Parameter(torch.tensor(-math.log(2 * positions)))

    def forward(self, images: Tensor) -> Tensor:
        """The upper triangle, with the diagonal, of each image's BDC matrix, in fp32 even under autocast."""
        maps = map_at(self.body.get_submodule(self.layer), partial(self.body, images), after=True)
        with full_precision(images.device):
            matrices = bdc(self.reduce(at_least_fp32(maps)).flatten(2), self.tau)  # (N, c, c)
        rows, columns = torch.triu_indices(*matrices.shape[1:], device=matrices.device)
        return matrices[:, rows, columns]


def bdc(features: Tensor, tau: Tensor) -> Tensor:
    r"""Brownian distance covariance (BDC) matrices: maps (N, c, M) of M positions -> (N, c, c).

    .. math:: A_{kl} = \sqrt{e^\tau \lVert x_k - x_l \rVert^2 + 10^{-5}}, \quad B = J A J, \quad J = I - 11^T / c

    where x_k are the M values of channel k. J A J subtracts the means of rows and columns.
    """
    gram = features @ features.mT
    squares = gram.diagonal(dim1=1, dim2=2)
    distances = (squares.unsqueeze(2) + squares.unsqueeze(1) - 2 * gram).clamp_min(0)
    a = (tau.exp() * distances + 1e-5).sqrt()
    rows = a.mean(2, keepdim=True)
    return a - rows - rows.mT + rows.mean(1, keepdim=True)


@torch.no_grad()
def _last_map(body: nn.Module, images: Tensor, positions: int) -> tuple[str, tuple[int, int]]:
    """The layer with the last map of at least `positions` positions, and the map's channels and positions.

    A ConvNet-3 block counts as one layer; levels beside the blocks do not count. Raises `UserError` if the network has
    no such map.
    """
    found: list[tuple[str, tuple[int, int]]] = []
    passed_by = tuple(
        f"{path}." if isinstance(module, Block) else path  # what is inside a block, or a level with what is inside it
        for path, module in body.named_modules()
        if isinstance(module, Block | Level)
    )

    def note(path: str, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output[0, 0].numel() >= positions:
            found.append((path, (output.shape[1], output[0, 0].numel())))

    network = copy.deepcopy(body).eval()
    for path, module in network.named_modules():
        if not path.startswith(passed_by):
            module.register_forward_hook(lambda _, __, output, path=path: note(path, output))
    network(images)
    if not found:
        raise UserError(f"meta_deepbdc: the target has no map of {positions} positions at {images.shape[-1]} px")
    return found[-1]


@torch.no_grad()
def _cut_off_after(body: nn.Module, layer: str, images: Tensor) -> None:
    """Replace, in place, all layers that run only after `layer` by identities."""
    network, needed = copy.deepcopy(body).eval(), {""}

    def note(path: str) -> None:
        parts = path.split(".")
        needed.update(".".join(parts[: i + 1]) for i in range(len(parts)))  # and the containers around it

    for path, module in network.named_modules():
        module.register_forward_pre_hook(lambda _, __, path=path: note(path))
    map_at(network.get_submodule(layer), partial(network, images), after=True)
    for path, _ in list(body.named_modules()):
        parent, _, name = path.rpartition(".")
        if path not in needed and parent in needed:
            setattr(body.get_submodule(parent), name, nn.Identity())
