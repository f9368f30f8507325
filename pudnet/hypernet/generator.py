"""Weight generator (Eq. 5, appendix A.1): turns a context vector into one layer's convolution weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pudnet.targets import ConvShape


class WeightGenerator(nn.Module):
    r"""The generator of one target layer: a linear layer and two 1x1 convolutions (written as linear layers).

    :math:`F = GELU(C_1\, GELU(L \hat a))`, where L gives (hid, f, f) and C_1 gives (2 hid, f, f); then
    :math:`w = \sqrt{2 / fan\_in}\; C_2 F`, where C_2 gives (d_out d_in, f, f). So only the 2 hid maps F depend on the
    group; how they are combined into kernels is fixed after training. The fan-in scale and `set_scale` give w the
    variance of He initialisation from the first step.
    """

    def __init__(self, conv: ConvShape, hidden: int, width: int) -> None:
        super().__init__()
        d_out, d_in, f, _ = conv.shape
        self.conv = conv
        self.positions = f * conv.shape[3]
        self.linear = nn.Linear(hidden, width * self.positions)
        self.mix = nn.Linear(width, 2 * width)
        bias = torch.zeros(d_out * d_in, 1)  # as the last column, so that one product applies weights and bias
        self.expand = nn.Parameter(torch.cat([torch.randn(d_out * d_in, 2 * width), bias], 1))

    def forward(self, context: Tensor) -> Tensor:
        """Context (..., m) -> weights (..., d_out, d_in, f, f)."""
        groups = context.shape[:-1]
        maps = F.gelu(self.linear(context)).view(*groups, -1, self.positions)  # (..., hid, f * f)
        mixed = F.pad(F.gelu(self.mix(maps.mT)), (0, 1), value=1.0)  # (..., f * f, 2 hid + 1)
        columns = self.conv.he_std * mixed
        if torch.is_grad_enabled():  # all groups in one product, so that backward computes one gradient of `expand`
            kernels = (self.expand @ columns.flatten(0, -2).T).view(len(self.expand), *groups, self.positions)
            kernels = kernels.movedim(0, -2)
        else:  # one product for each group gives the final layout without a copy
            kernels = self.expand @ columns.mT
        return kernels.reshape(*groups, *self.conv.shape)

    @torch.no_grad()
    def set_scale(self, context: Tensor) -> None:
        """Rescale the last layer so that `context` (m,) gives weights of He's standard deviation."""
        self.expand.mul_(
            self.conv.he_std / self(context).square().mean().sqrt()
        )  # root mean square, since a single weight has no deviation
