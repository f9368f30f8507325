"""Context (section 3.4): a recurrent unit steps through the target's layers and gives each its context vector.

Each module here maps a sketch (..., l, m) to one vector (..., m) for each target layer, including the initial residual
of Eq. 4. Leading dimensions are groups.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pudnet.config import ModelConfig


def residual(a: Tensor, sketch: Tensor, eta: float) -> Tensor:
    """Eq. 4: a^_t = (1 - eta) a_t + eta s, where s is the mean of the l slices of the sketch (..., l, m)."""
    return (1 - eta) * a + eta * sketch.mean(-2)


class GRUCell(nn.Module):
    r"""Section 3.4's recurrent unit (Cho et al., 2014).

    :math:`r = \sigma(W_r [h, a])`, :math:`z = \sigma(W_z [h, a])`, :math:`\tilde h = \tanh(W_h [r h, a])`,
    :math:`h' = (1 - z) h + z \tilde h`. `nn.GRU` is not the same: it applies r after the product with W_h.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gates = nn.Linear(2 * size, 2 * size)  # W_r and W_z
        self.candidate = nn.Linear(2 * size, size)  # W_h

    def forward(self, h: Tensor, a: Tensor) -> Tensor:
        """State (..., m) and input (..., m) -> next state (..., m)."""
        r, z = self.gates(torch.cat([h, a], -1)).sigmoid().chunk(2, -1)
        candidate = self.candidate(torch.cat([r * h, a], -1)).tanh()
        return (1 - z) * h + z * candidate


class GRUContext(nn.Module):
    r"""The paper's stacked GRU: h_0 = s, one slice for each GRU layer; :math:`a_t = \sigma(W_o h_t)`; a_0 is learned.

    The lowest GRU layer's input is a_{t-1}; the input of every other one is the state of the layer below.
    """

    def __init__(self, config: ModelConfig, steps: int) -> None:
        super().__init__()
        self.steps, self.eta = steps, config.eta
        self.first = nn.Parameter(torch.zeros(config.hidden))
        self.cells = nn.ModuleList(GRUCell(config.hidden) for _ in range(config.depth))
        self.output = nn.Linear(config.hidden, config.hidden)

    def forward(self, sketch: Tensor, initial: Tensor) -> list[Tensor]:
        """Sketch and initial state (..., l, m) -> `steps` vectors (..., m)."""
        states = list(initial.unbind(-2))
        a = self.first.expand_as(states[0])
        contexts = []
        for _ in range(self.steps):
            below = a
            for layer, cell in enumerate(self.cells):
                below = states[layer] = cell(states[layer], below)
            a = self.output(below).sigmoid()
            contexts.append(residual(a, sketch, self.eta))
        return contexts


class AHRUContext(nn.Module):
    r"""The later paper's adaptive hyper-recurrent unit, whose output and state are both fed back.

    :math:`o, h = GRU(a, h)`, :math:`a = ReLU(W o)`, :math:`h = LN(h)`, and one LayerNorm for each target layer on
    the residual: :math:`\hat a_t = LN_t((1 - \eta) a_t + \eta \bar s)`. The first input is learned. (The published code
    draws it anew in every process, so that a saved model cannot be reloaded.)
    """

    def __init__(self, config: ModelConfig, steps: int) -> None:
        super().__init__()
        self.eta = config.eta
        self.first = nn.Parameter(torch.randn(config.hidden))
        self.gru = nn.GRU(config.hidden, config.hidden, config.depth)
        self.output = nn.Linear(config.hidden, config.hidden)
        self.state_norm = nn.LayerNorm(config.hidden)
        self.norms = nn.ModuleList(nn.LayerNorm(config.hidden) for _ in range(steps))

    def forward(self, sketch: Tensor, initial: Tensor) -> list[Tensor]:
        """Sketch and initial state (..., l, m) -> one vector (..., m) for each target layer."""
        groups = initial.shape[:-2]
        states = initial.flatten(0, -3) if groups else initial.unsqueeze(0)  # (B, l, m)
        states = states.transpose(0, 1).contiguous()  # (l, B, m), as nn.GRU takes it
        a = self.first.expand(states.shape[1], -1)
        contexts = []
        for norm in self.norms:
            output, states = self.gru(a.unsqueeze(0), states)
            a, states = self.output(output[0]).relu(), self.state_norm(states)
            contexts.append(norm(residual(a.view(*groups, -1), sketch, self.eta)))
        return contexts


class NoContext(nn.Module):
    """Ablation `without_context`: every weight generator gets the sketch itself."""

    def __init__(self, config: ModelConfig, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, sketch: Tensor, initial: Tensor) -> list[Tensor]:
        """Sketch (..., l, m) -> the mean of its slices (..., m), for every target layer."""
        return [sketch.mean(-2)] * self.steps


CONTEXTS = {"gru": GRUContext, "ahru": AHRUContext, "none": NoContext}
