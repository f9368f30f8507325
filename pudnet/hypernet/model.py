"""PudNet: the hypernetwork as a whole. Read it with the files it is made of, in their order."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pudnet.config import ModelConfig
from pudnet.hypernet.class_filters import ClassFilters, mean_patches
from pudnet.hypernet.context import CONTEXTS
from pudnet.hypernet.generator import WeightGenerator
from pudnet.hypernet.sketch import Sketch
from pudnet.targets import SharedTarget, Target, Weights


class PudNet(nn.Module):
    r"""The hypernetwork :math:`H_\theta`: images of a group -> sketch -> context -> weights of the target.

    Besides what predicts, it holds `shared`, what all groups share of the target. Beyond the paper, and off
    unless the configuration says so (the variant `pudnet_plus` does):

    - `base`: :math:`w_t = b_t + g_t(\hat a_t)`, a learned kernel that the generator changes, from no change on;
    - `class_filters`: the last convolutions get filters that tell the group's classes apart.
    """

    def __init__(self, config: ModelConfig, target: Target) -> None:
        super().__init__()
        self.config = config
        self.shared = SharedTarget(target)
        size = (target.channels, target.image_size)
        shape = (config.depth, config.hidden)
        images, constant = config.sketch == "images", config.sketch == "constant"
        self.extractor = Sketch(config, *size) if config.change and images else None
        self.constant = nn.Parameter(torch.randn(shape)) if config.change and constant else None
        self.register_buffer("random_state", torch.randn(shape) if config.initial_state == "random" else None)
        self.context = CONTEXTS[config.context](config, len(target.convs)) if config.change else None
        self.generators = nn.ModuleList(
            WeightGenerator(conv, config.hidden, config.generator_hidden) for conv in target.convs if config.change
        )
        plain = target.network.state_dict()
        self.base = nn.ParameterList(plain[conv.name].clone() for conv in target.convs if config.base)
        filtered = target.dense[max(0, len(target.dense) - config.class_filters) :]
        self.filters = nn.ModuleList(ClassFilters(conv) for conv in filtered)
        self._set_scales(torch.randn(64, target.channels, target.image_size, target.image_size))

    @property
    def class_aware(self) -> bool:
        """Whether a group's labels enter its sketch."""
        return len(self.filters) > 0

    def sketch(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Compress normalised images (..., N, C, H, W) to a sketch (..., l, m); the control returns its constant.

        A class-aware one takes their labels (..., N) in 0..k-1, and is flat: (..., l m + k p), of which the second
        part is the class filters; no l m where there is no change to predict.
        """
        if not self.class_aware:
            return self._summary(images)
        if images.ndim > 4:
            return torch.stack([self.sketch(*group) for group in zip(images, labels, strict=True)])
        filters = self._solve(images, labels).flatten()
        return torch.cat([self._summary(images).flatten(), filters]) if self.config.change else filters

    def _summary(self, images: Tensor) -> Tensor:
        """The paper's sketch (..., l, m)."""
        if self.extractor is not None:
            return self.extractor(images)
        return self.constant.expand(*images.shape[:-4], *self.constant.shape)

    def _solve(self, images: Tensor, labels: Tensor) -> Tensor:
        """One group's class filters (k, p), those of all layers that have some side by side."""
        convs = [self.shared.body.get_submodule(own.conv.module) for own in self.filters]
        base = {conv.name: kernel for conv, kernel in zip(self.shared.convs, self.base, strict=True)}
        maps = self.shared.inputs(images, base, convs)
        classes = int(labels.max()) + 1
        with torch.autocast(images.device.type, enabled=False):
            patches = [mean_patches(*layer) for layer in zip(maps, convs, strict=True)]
            solved = [own.solve(x, labels, classes) for own, x in zip(self.filters, patches, strict=True)]
        return torch.cat(solved, 1)

    def generate(self, sketch: Tensor) -> Weights:
        """Predict all convolution weights from a sketch, in fp32 whatever the autocast."""
        with torch.autocast(sketch.device.type, enabled=False):
            summary, filters = self._parts(sketch.float())
            weights = self._changed(summary)
            for own, solved in zip(self.filters, filters, strict=True):
                weights[own.conv.name] = weights[own.conv.name] + own(solved)
            return weights

    def _parts(self, sketch: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """The paper's sketch (..., l, m) in a sketch (empty where no change is predicted), and each layer's filters."""
        if not self.class_aware:
            return sketch, ()
        size = self.config.depth * self.config.hidden if self.config.change else 0
        summary = sketch[..., :size].unflatten(-1, (self.config.depth, self.config.hidden)) if size else sketch[..., :0]
        widths = [math.prod(own.conv.shape[1:]) for own in self.filters]
        return summary, sketch[..., size:].unflatten(-1, (-1, sum(widths))).split(widths, -1)

    def _changed(self, summary: Tensor) -> dict[str, Tensor]:
        """The base under a group's change, or whichever of the two there is."""
        convs = self.shared.convs
        if not self.config.change:
            groups = summary.shape[:-1]
            return {c.name: kernel.expand(*groups, *c.shape) for c, kernel in zip(convs, self.base, strict=True)}
        contexts = self._contexts(summary)
        made = [generator(context) for generator, context in zip(self.generators, contexts, strict=True)]
        if self.config.base:
            made = [change + kernel for change, kernel in zip(made, self.base, strict=True)]
        return {conv.name: weight for conv, weight in zip(convs, made, strict=True)}

    def _contexts(self, sketch: Tensor) -> list[Tensor]:
        initial = sketch if self.random_state is None else self.random_state.expand_as(sketch)
        return self.context(sketch, initial)

    @torch.no_grad()
    def _set_scales(self, noise: Tensor) -> None:
        """Give predicted weights He's variance at the start, measured on noise normalised as images are.

        Where there is a base, which has it, the change starts at zero.
        """
        if not self.config.change:
            return
        for generator, context in zip(self.generators, self._contexts(self._summary(noise)), strict=True):
            if self.config.base:
                generator.expand.zero_()
            else:
                generator.set_scale(context)
