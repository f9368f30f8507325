"""PudNet: the hypernetwork as a whole. Read it with the files it is made of, in their order."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pudnet.config import ModelConfig
from pudnet.hypernet.context import CONTEXTS
from pudnet.hypernet.generator import WeightGenerator
from pudnet.hypernet.sketch import Sketch
from pudnet.targets import SharedTarget, Weights


class PudNet(nn.Module):
    r"""The hypernetwork :math:`H_\theta`: images of a group -> sketch -> context -> weights of the target.

    Besides what predicts, it holds `shared`, what all groups share of the target.
    """

    def __init__(self, config: ModelConfig, target: nn.Module, channels: int, image_size: int) -> None:
        super().__init__()
        self.config = config
        self.shared = SharedTarget(target)
        convs = self.shared.convs
        self.extractor = Sketch(config, channels, image_size) if config.sketch == "images" else None
        shape = (config.depth, config.hidden)
        self.constant = nn.Parameter(torch.randn(shape)) if config.sketch == "constant" else None
        self.register_buffer("random_state", torch.randn(shape) if config.initial_state == "random" else None)
        self.context = CONTEXTS[config.context](config, len(convs))
        self.generators = nn.ModuleList(WeightGenerator(conv, config.hidden, config.generator_hidden) for conv in convs)
        self._set_scales(torch.randn(64, channels, image_size, image_size))

    def sketch(self, images: Tensor) -> Tensor:
        """Compress normalised images (N, C, H, W) to a sketch (l, m); the control returns its constant."""
        return self.constant if self.extractor is None else self.extractor(images)

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
