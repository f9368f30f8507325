"""PudNet: the hypernetwork as a whole. Read it with the files it is made of, in their order."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pudnet.classifier import Regression
from pudnet.config import ModelConfig
from pudnet.errors import UserError
from pudnet.hypernet.class_filters import ClassFilters
from pudnet.hypernet.context import CONTEXTS
from pudnet.hypernet.generator import WeightGenerator
from pudnet.hypernet.sketch import Sketch
from pudnet.ridge import at_least_fp32
from pudnet.targets import SharedTarget, Target, Weights


class PudNet(nn.Module):
    r"""The hypernetwork :math:`H_\theta`: images of a group -> sketch -> context -> weights of the target.

    Besides what predicts, it holds `shared`, what all groups share of the target. Beyond the paper, and off
    unless the configuration says so (the variant `pudnet_plus` does):

    - `base`: :math:`w_t = b_t + g_t(\hat a_t)`, a learned kernel that the generator changes, from no change on;
    - `class_filters`: the last convolution gets filters that tell the group's classes apart;
    - `regression`: what is learned of a classifier that is solved for.
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
        if config.class_filters and not target.dense:
            raise UserError("model.class_filters: the target has no convolution that sees all of its input's channels")
        self.filters = ClassFilters(target.dense[-1], config.filter_grid) if config.class_filters else None
        self.regression = Regression(config.ridge, config.ridge_scale) if config.classifier == "ridge" else None
        self._set_scales(torch.randn(64, target.channels, target.image_size, target.image_size))

    @property
    def class_aware(self) -> bool:
        """Whether a group's labels enter its sketch."""
        return self.filters is not None

    def sketch(self, images: Tensor, labels: Tensor | None = None, classes: int | None = None) -> Tensor:
        """Compress normalised images (..., N, C, H, W) to a sketch (..., l, m); the control returns its constant.

        A class-aware one takes their labels (N,) in 0..k-1, of every group alike, and is flat: the paper's (l m;
        nothing where there is no change to predict), then the class filters (R k p). Of a GPU's labels the number of
        `classes` is best given: to look for it is to wait for all that the GPU has to do.
        """
        if not self.class_aware:
            return self._summary(images)
        filters = self._solve(images, labels, classes or int(labels.max()) + 1).flatten(-2)
        return torch.cat([self._summary(images).flatten(-2), filters], -1) if self.config.change else filters

    def _summary(self, images: Tensor) -> Tensor:
        """The paper's sketch (..., l, m)."""
        if self.extractor is not None:
            return self.extractor(images)
        return self.constant.expand(*images.shape[:-4], *self.constant.shape)

    def _solve(self, images: Tensor, labels: Tensor, classes: int) -> Tensor:
        """The groups' class filters (..., R k, p), from what the layer is given under the base."""
        conv = self.filters.layer(self.shared.body)
        maps = self.shared.input_of(conv, images, self.base_weights())
        with torch.autocast(images.device.type, enabled=False):
            return self.filters.solve(maps, conv, labels, classes)

    def base_weights(self) -> dict[str, Tensor]:
        """The learned kernels that predictions are a change of; none without a base."""
        return {conv.name: kernel for conv, kernel in zip(self.shared.convs, self.base, strict=self.config.base)}

    def generate(self, sketch: Tensor) -> Weights:
        """Predict all convolution weights from a sketch, in fp32 whatever the autocast.

        Leading dimensions are groups; kernels that no group changes are one for all, without them.
        """
        with torch.autocast(sketch.device.type, enabled=False):
            sketch = at_least_fp32(sketch)
            if not self.class_aware:
                return self._changed(sketch)
            shape = (self.config.depth if self.config.change else 0, self.config.hidden)
            summary, filters = sketch[..., : math.prod(shape)], sketch[..., math.prod(shape) :]
            weights, name = self._changed(summary.unflatten(-1, shape)), self.filters.conv.name
            filters = filters.unflatten(-1, (-1, math.prod(self.filters.conv.shape[1:])))
            return weights | {name: weights[name] + self.filters(filters)}

    def _changed(self, summary: Tensor) -> dict[str, Tensor]:
        """The base under a group's change, or whichever of the two there is, from the paper's sketch (..., l, m)."""
        base = self.base_weights()
        if not self.config.change:
            return {name: kernel.view_as(kernel) for name, kernel in base.items()}  # not the parameters themselves
        contexts = self._contexts(summary)
        made = {own.conv.name: own(context) for own, context in zip(self.generators, contexts, strict=True)}
        return {name: base[name] + change for name, change in made.items()} if base else made

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
