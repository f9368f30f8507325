"""What may make training faster on a GPU: its many small operators compiled, or replayed as CUDA graphs.

A step of one group is some hundred operators for ConvNet-3, some thousand for a ResNet, most of them small: to
launch one by one takes longer than to compute. Several groups a step (`train.groups_per_step`) share the launches;
`train.compile` makes fewer of them. Which of the two pays is for `python -m benchmarks.gpu` to say: neither was
measured on a GPU yet.
"""

from __future__ import annotations

import torch
from torch import nn

from pudnet.hypernet import PudNet
from pudnet.targets import SharedTarget

MODES = {"kernels": "default", "graphs": "reduce-overhead"}  # `train.compile`, and what torch calls it


def compile_parts(learner: nn.Module, how: str) -> None:
    """Have torch.compile make kernels, or graphs, of a target's passes and of weight generation, in place.

    It does so at the first step, once for each size: a minute or so.
    """
    options = {"mode": MODES[how], "dynamic": False}
    for module in learner.modules():
        if isinstance(module, SharedTarget):
            module.compile(**options)
        if isinstance(module, PudNet):
            module.generate = torch.compile(module.generate, **options)
