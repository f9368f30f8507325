"""PudNet, the complete hypernetwork. Its parts are in sketch.py, context.py, generator.py and class_filters.py."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pudnet.classifier import Regression
from pudnet.config import ModelConfig
from pudnet.device import full_precision
from pudnet.errors import UserError
from pudnet.hypernet.class_filters import ClassFilters
from pudnet.hypernet.context import CONTEXTS
from pudnet.hypernet.generator import WeightGenerator
from pudnet.hypernet.sketch import Sketch
from pudnet.ridge import at_least_fp32
from pudnet.targets import SharedTarget, Target, Weights, has_all_blocks


class PudNet(nn.Module):
    r"""The hypernetwork :math:`H_\theta`: images of a group -> sketch -> context -> weights of the target.

    It also holds `shared`, the target's parameters that are the same for all groups. Three parts go beyond the paper
    and are off by default (the variant `pudnet_plus` turns them on):

    - `base`: :math:`w_t = b_t + g_t(\hat a_t)`, learned kernels b to which predictions are added, at first zeros;
    - `class_filters`: filters in the last convolution that tell the group's classes apart;
    - `regression`: a classifier by ridge regression, whose penalty and scale are learned.
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
        if config.penalty != "learned" and config.classifier != "ridge":
            raise UserError(
                "model.penalty: leave_one_out needs classifier: ridge, which pudnet_plus and pretrained_ridge have"
            )
        if config.blocks != "last" and not (config.classifier == "ridge" and has_all_blocks(target)):
            raise UserError("model.blocks: leave_one_out needs target: convnet3, and classifier: ridge")
        self.filters = ClassFilters(target.dense[-1], config.filter_grid) if config.class_filters else None
        ridge = (config.ridge, config.ridge_scale, config.penalty)
        self.regression = Regression(*ridge) if config.classifier == "ridge" else None
        self._set_scales(torch.randn(64, target.channels, target.image_size, target.image_size))

    @property
    def reads_labels(self) -> bool:
        """Whether the labels of the sketch's images count (`ModelConfig.reads_labels`)."""
        return self.config.reads_labels

    def sketch(self, images: Tensor, labels: Tensor | None = None, classes: int | None = None) -> Tensor:
        """Compress normalised images (..., N, C, H, W) to a sketch (..., l, m); the control returns its constant.

        With class filters it also needs labels (N,) in 0..k-1, the same for every group. It is then flat: the paper's
        sketch (l m; left out if `change` is false), followed by the class filters (R k p). If the labels are on a GPU,
        give the number of `classes` too, since counting them waits for the GPU.
        """
        summary = self._summary(images)
        if self.filters is None:
            return summary
        filters = self._solve(images, labels, classes or int(labels.max()) + 1).flatten(-2)
        return torch.cat([summary.flatten(-2), filters], -1) if self.config.change else filters

    def _summary(self, images: Tensor) -> Tensor:
        """The paper's sketch (..., l, m); if `change` is false, an empty tensor (..., 0, m)."""
        if not self.config.change:
            return images.new_empty(*images.shape[:-4], 0, self.config.hidden)
        if self.extractor is not None:
            return self.extractor(images)
        return self.constant.expand(*images.shape[:-4], *self.constant.shape)

    def _solve(self, images: Tensor, labels: Tensor, classes: int) -> Tensor:
        """The groups' class filters (..., R k, p), solved from the layer's input maps under the base weights."""
        conv = self.filters.layer(self.shared.body)
        maps = self.shared.input_of(conv, images, self.base_weights())
        with full_precision(images.device):
            return self.filters.solve(maps, conv, labels, classes)

    def base_weights(self) -> dict[str, Tensor]:
        """The learned kernels that predictions are added to; empty if `base` is false."""
        return {conv.name: kernel for conv, kernel in zip(self.shared.convs, self.base, strict=self.config.base)}

    def generate(self, sketch: Tensor) -> Weights:
        """Predict all convolution weights from a sketch, in fp32 even under autocast.

        Leading dimensions are groups. Kernels that are the same for all groups have no leading dimensions.
        """
        with full_precision(sketch.device):
            sketch = at_least_fp32(sketch)
            if self.filters is None:
                return self._changed(sketch)
            shape = (self.config.depth if self.config.change else 0, self.config.hidden)
            summary, filters = sketch[..., : math.prod(shape)], sketch[..., math.prod(shape) :]
            weights, name = self._changed(summary.unflatten(-1, shape)), self.filters.conv.name
            filters = filters.unflatten(-1, (-1, math.prod(self.filters.conv.shape[1:])))
            return weights | {name: weights[name] + self.filters(filters)}

    def _changed(self, summary: Tensor) -> dict[str, Tensor]:
        """Weights from the paper's sketch (..., l, m): base plus predicted change, or only one of the two."""
        base = self.base_weights()
        if not self.config.change:
            return {
                name: kernel.view_as(kernel) for name, kernel in base.items()
            }  # views, not the parameters themselves
        contexts = self._contexts(summary)
        made = {own.conv.name: own(context) for own, context in zip(self.generators, contexts, strict=True)}
        return {name: base[name] + change for name, change in made.items()} if base else made

    def _contexts(self, sketch: Tensor) -> list[Tensor]:
        initial = sketch if self.random_state is None else self.random_state.expand_as(sketch)
        return self.context(sketch, initial)

    @torch.no_grad()
    def _set_scales(self, noise: Tensor) -> None:
        """Give the untrained model's predictions He's variance, measured on noise that stands for normalised images.

        With a base, which has that variance itself, predictions start at zero.
        """
        if not self.config.change:
            return
        for generator, context in zip(self.generators, self._contexts(self._summary(noise)), strict=True):
            if self.config.base:
                generator.expand.zero_()
            else:
                generator.set_scale(context)
