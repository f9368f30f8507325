"""May make training faster on a GPU, by compiling its many small operators or replaying them as CUDA graphs.

A step of one group has some hundred operators for ConvNet-3 and some thousand for a ResNet. Most are so small that
launching them takes longer than computing them. With several groups in a step (`train.groups_per_step`) one launch
serves them all; `train.compile` reduces the number of launches. Neither was measured on a GPU yet:
`python -m benchmarks.gpu` tells which is faster.
"""

from __future__ import annotations

import torch
from torch import nn

from pudnet.hypernet import PudNet
from pudnet.targets import SharedTarget

MODES = {"kernels": "default", "graphs": "reduce-overhead"}  # values of `train.compile` -> torch's names


def compile_parts(learner: nn.Module, how: str) -> None:
    """Compile the target's forward pass and weight generation into kernels or graphs, in place.

    torch.compile does its work at the first step with each size, which takes about a minute.
    """
    torch.compiler.reset()  # else graphs of an earlier model in this process count towards torch's limit
    options = {"mode": MODES[how], "dynamic": False}
    for module in learner.modules():
        if isinstance(module, SharedTarget):
            module.compile(**options)
        if isinstance(module, PudNet):
            module.generate = torch.compile(module.generate, **options)
