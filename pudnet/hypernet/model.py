"""PudNet: the hypernetwork as a whole. Read it with the files it is made of, in their order."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pudnet.config import ModelConfig
from pudnet.hypernet.context import CONTEXTS
from pudnet.hypernet.generator import WeightGenerator
from pudnet.hypernet.sketch import Sketch
from pudnet.targets import SharedTarget, Target, Weights


class PudNet(nn.Module):
    r"""The hypernetwork :math:`H_\theta`: images of a group -> sketch -> context -> weights of the target.

    Besides what predicts, it holds `shared`, what all groups share of the target.
    """

    def __init__(self, config: ModelConfig, target: Target) -> None:
        super().__init__()
        self.config = config
        self.shared = SharedTarget(target)
        size = (target.channels, target.image_size)
        self.extractor = Sketch(config, *size) if config.sketch == "images" else None
        shape = (config.depth, config.hidden)
        self.constant = nn.Parameter(torch.randn(shape)) if config.sketch == "constant" else None
        self.register_buffer("random_state", torch.randn(shape) if config.initial_state == "random" else None)
        self.context = CONTEXTS[config.context](config, len(target.convs))
        self.generators = nn.ModuleList(
            WeightGenerator(conv, config.hidden, config.generator_hidden) for conv in target.convs
        )
        self._set_scales(torch.randn(64, target.channels, target.image_size, target.image_size))

    def sketch(self, images: Tensor) -> Tensor:
        """Compress normalised images (..., N, C, H, W) to a sketch (..., l, m); the control returns its constant."""
        if self.extractor is not None:
            return self.extractor(images)
        return self.constant.expand(*images.shape[:-4], *self.constant.shape)

    def generate(self, sketch: Tensor) -> Weights:
        """Predict all convolution weights from a sketch (..., l, m), in fp32 whatever the autocast."""
        with torch.autocast(sketch.device.type, enabled=False):
            contexts = self._contexts(sketch.float())
            return {
                generator.conv.name: generator(context)
                for generator, context in zip(self.generators, contexts, strict=True)
            }

    def _contexts(self, sketch: Tensor) -> list[Tensor]:
        initial = sketch if self.random_state is None else self.random_state.expand_as(sketch)
        return self.context(sketch, initial)

    @torch.no_grad()
    def _set_scales(self, noise: Tensor) -> None:
        """Give predicted weights He's variance at the start, measured on noise normalised as images are."""
        for generator, context in zip(self.generators, self._contexts(self.sketch(noise)), strict=True):
            generator.set_scale(context)
