"""What else of a network could be made for a group, beside class filters: tried on validation groups of `domains`.

    dvc repro groups    # with setting: domains, groups.search_groups: 1000, groups.validation_groups: 300
    python reference/ingredients.py    # some 5 minutes for each of the nine, on one core of a CPU

All parts of a layer are made from its input maps for the labelled images, in the one pass over them. It writes
studies/results/ingredients.md.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from pipeline.project import STORE, group_folder
from pipeline.reporting.numbers import plus_minus
from pipeline.studies.page import table_of
from pudnet.baselines.learners import episode, losses
from pudnet.classifier import Regression
from pudnet.config import ModelConfig, TrainConfig, apply_variant
from pudnet.data.groups import open_groups
from pudnet.data.images import StoreImages
from pudnet.data.rows import first_rows
from pudnet.data.store import open_store
from pudnet.device import full_precision
from pudnet.evaluation import FROM, mean_interval, twin_accuracies
from pudnet.hypernet.class_filters import ClassFilters
from pudnet.learner import Learner
from pudnet.network import Classifier
from pudnet.objective import Losses, in_blocks
from pudnet.ridge import one_hot
from pudnet.targets import Block, Target, build_target, calibrate
from pudnet.targets.target import forget_statistics
from pudnet.training import Trainer

PAGE = Path("studies/results/ingredients.md")
LABELLED = 90  # images of a group
SHRINKAGE = 0.1  # of a covariance, towards a multiple of the identity


@dataclass(frozen=True)
class Ingredients:
    """What is made for each group, beside the classifier."""

    filters: tuple[int, ...] = (3,)  # in these layers, class filters are added to the kernels
    whitened: tuple[int, ...] = ()  # in these layers, kernels see decorrelated channels
    experts: int = 1  # kernels of each layer, mixed by weights that a small network gives
    film: bool = False  # a small network changes the scale and shift of each layer's BatchNorm
    weighted: bool = False  # a feature counts for more if its class means are far apart


TRIED = {
    "the classifier alone (R2-D2)": Ingredients(filters=()),
    "class filters in the last layer (PudNet+)": Ingredients(),
    "class filters in the last two layers": Ingredients(filters=(2, 3)),
    "PudNet+, four kernels a layer, mixed": Ingredients(experts=4),
    "PudNet+, scale and shift of BatchNorm (FiLM)": Ingredients(film=True),
    "FiLM without class filters": Ingredients(filters=(), film=True),
    "PudNet+, whitened colours": Ingredients(whitened=(1,)),
    "PudNet+, whitened input of each layer": Ingredients(whitened=(1, 2, 3)),
    "PudNet+, weighted features": Ingredients(weighted=True),
}
REFERENCE = "class filters in the last layer (PudNet+)"
TEXT = """# What else could be made for a group

Parts of a ConvNet-3 that are made from a group's labelled images, beside the classifier. Each was trained once on
{groups:,} groups of the setting `domains`, at PudNet+'s rate and schedule, and measured on {validation} validation
groups of classes that it was not trained on, from {labelled} labelled images of each. Test groups had no part in it.
Accuracy in percent, with its 95% interval over validation groups; differences are paired over them.

Made by `python reference/ingredients.py`, which says what each of them is.

"""


@torch.no_grad()
def spread(values: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Variances between and within classes (d,), of values (N, d) with one-hot labels (N, k)."""
    means = own.T @ values / own.sum(0)[:, None]
    return (means - values.mean(0)).square().mean(0), (values - own @ means).square().mean(0) + 1e-6


@torch.no_grad()
def summary(maps: Tensor, own: Tensor) -> Tensor:
    """What the maps (N, c, H, W) of labelled images say of each channel: (3 c,).

    The mean in standard deviations, the log deviation, and how far apart the class means are.
    """
    maps = maps.float()
    deviation, mean = torch.std_mean(maps, (0, 2, 3))
    between, within = spread(maps.mean((2, 3)), own)
    deviation = deviation + 1e-3
    return torch.cat([mean / deviation, deviation.log(), (between / within + 1e-4).log()])


@torch.no_grad()
def whitening(maps: Tensor) -> Tensor:
    """The symmetric matrix (c, c) that decorrelates the channels of maps (N, c, H, W)."""
    values = maps.movedim(1, -1).flatten(0, -2).float()
    covariance = torch.cov(values.T, correction=0)
    scale = covariance.trace() / len(covariance)
    covariance = covariance + SHRINKAGE * scale * torch.eye(len(covariance))
    lengths, directions = torch.linalg.eigh(covariance)
    return scale.sqrt() * (directions / lengths.sqrt()) @ directions.T


class FromSummary(nn.Sequential):
    """A small network from a layer's summary to some numbers; `start` scales them before training."""

    def __init__(self, values: int, numbers: int, start: float) -> None:
        super().__init__(nn.LayerNorm(values), nn.Linear(values, 64), nn.GELU(), nn.Linear(64, numbers))
        nn.init.normal_(self[-1].weight, std=start / math.sqrt(64))
        nn.init.zeros_(self[-1].bias)


class Adapted(nn.Module):
    """ConvNet-3, parts of which are made for a group, and a classifier by ridge regression."""

    def __init__(self, target: Target, own: Ingredients) -> None:
        super().__init__()
        self.own, self.regression = own, Regression(ModelConfig().ridge, ModelConfig().ridge_scale)
        body = copy.deepcopy(target.network)
        forget_statistics(body)
        self.blocks = nn.ModuleList(block for block in body if isinstance(block, Block))
        shapes = [conv.shape for conv in target.convs]
        self.kernels = nn.ModuleList(
            nn.ParameterList(torch.randn(shape) * conv.he_std for _ in range(own.experts))
            for shape, conv in zip(shapes, target.convs, strict=True)
        )
        for block in self.blocks:
            block.conv.weight = None
        self.filters = nn.ModuleDict({str(n): ClassFilters(target.convs[n - 1], grid=2) for n in own.filters})
        self.mixes = nn.ModuleList(FromSummary(3 * shape[1], own.experts, 1.0) for shape in shapes if own.experts > 1)
        self.changes = nn.ModuleList(FromSummary(3 * shape[1], 2 * shape[0], 0.0) for shape in shapes if own.film)
        self.exponent = nn.Parameter(torch.zeros(())) if own.weighted else None

    def layer(self, index: int, maps: Tensor, labels: Tensor, classes: int) -> dict[str, Tensor]:
        """The parameters of a block, from its input maps (N, c, H, W) for the labelled images."""
        block, kernels, own = self.blocks[index], self.kernels[index], one_hot(labels, classes)
        kernel, scale, shift = kernels[0], block.norm.weight, block.norm.bias
        if self.mixes:
            shares = self.mixes[index](summary(maps, own)).softmax(0)
            kernel = sum(share * each for share, each in zip(shares, kernels, strict=True))
        if str(index + 1) in self.filters:
            filters = self.filters[str(index + 1)]
            kernel = kernel + filters(filters.solve(maps.float(), block.conv, labels, classes))
        if index + 1 in self.own.whitened:
            kernel = torch.einsum("oihw,ij->ojhw", kernel, whitening(maps))
        if self.changes:
            factor, term = self.changes[index](summary(maps, own)).chunk(2)
            scale, shift = scale * (1 + factor), shift + term
        kernel = kernel.contiguous(memory_format=torch.channels_last)
        return {"conv.weight": kernel, "norm.weight": scale, "norm.bias": shift}

    def features(self, images: Tensor, rows: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, list]:
        """Features (N, d) of a group's images (N, C, H, W), and each block's parameters.

        `rows` are those of the labelled images, `labels` theirs.
        """
        maps, made = images, []
        for index, block in enumerate(self.blocks):
            with full_precision(images.device):
                made.append(self.layer(index, maps[rows], labels, classes))
            maps = functional_call(block, made[-1], (maps,))
        return maps.flatten(1).float(), made

    def weights(self, support: Tensor, labels: Tensor, classes: int) -> Tensor:
        """How much each feature counts, from support features (S, d): (d,)."""
        if self.exponent is None:
            return torch.ones(support.shape[1])
        between, within = spread(support, one_hot(labels, classes))
        ratio = (between + 1e-3 * between.mean()) / (within + 1e-3 * within.mean())
        return (self.exponent * (ratio / ratio.mean()).clamp_min(1e-2).log()).exp()

    def logits(self, queries: Tensor, support: Tensor, labels: Tensor, classes: int) -> Tensor:
        """Logits (Q, k) of features (Q, d), from support features (S, d) and their labels (S,)."""
        weights = self.weights(support, labels, classes)
        return self.regression(queries * weights, support * weights, labels, classes)


class Episodes(Learner):
    """Trains on groups: from the labelled images of each class, the first ones, to the others."""

    def __init__(self, model: Adapted, k: int) -> None:
        super().__init__()
        self.model, self.k = model, k

    def losses(self, images: Tensor, labels: Tensor, done: float) -> Losses:
        """The cross-entropy of one group's other images."""
        group, support = images[0].contiguous(memory_format=torch.channels_last), LABELLED // self.k
        rows = first_rows(in_blocks(self.k, len(group) // self.k, group.device), support)
        features, _ = self.model.features(group, rows, in_blocks(self.k, support, group.device), self.k)
        with full_precision(group.device):
            first, own, queries, truth = episode(features, self.k, support)
            logits = self.model.logits(queries, first, own, self.k)
            return losses(logits[None], truth[None])


@torch.no_grad()
def made_for(model: Adapted, target: Target, seen: Tensor, labels: Tensor, k: int) -> tuple[nn.Module, Tensor]:
    """The plain network that is made from labelled images (N, C, H, W), and its features (N, d) of them."""
    _, made = model.features(seen, torch.arange(len(seen)), labels, k)
    network = copy.deepcopy(target.network)
    state = {f"block{n + 1}.{name}": value for n, layer in enumerate(made) for name, value in layer.items()}
    network.load_state_dict(state, strict=False)
    features = calibrate(network, seen).float()
    return network.eval(), features


class Adapter:
    """A trained model, ready to adapt to groups (`pudnet.evaluation.Adapts`)."""

    def __init__(self, model: Adapted, target: Target) -> None:
        self.model, self.target = model.eval(), target

    def rows(self, labels: Tensor) -> Tensor:
        """Rows of a group's labelled images, for labels (N,) in 0..k-1."""
        return first_rows(labels, LABELLED // int(labels.max() + 1))

    def adapt(self, images: Tensor, labels: Tensor, classes: tuple) -> Classifier:
        """Labelled images (N, C, H, W) and labels (N,) in 0..k-1 -> a classifier of the k classes."""
        images, k = images.contiguous(memory_format=torch.channels_last), len(classes)
        network, support = made_for(self.model, self.target, images, labels, k)

        def rule(queries: Tensor) -> Tensor:
            return self.model.logits(queries, support, labels, k)

        return Classifier(network, rule)


def measured(own: Ingredients, images: StoreImages, tables: Mapping[str, np.ndarray], classes: tuple) -> np.ndarray:
    """Train with some ingredients -> accuracy in percent on each validation group."""
    _, config = apply_variant("pudnet_plus", ModelConfig(), TrainConfig())
    torch.manual_seed(0)
    target = build_target("convnet3", len(images.mean), images.image_size)
    table = tables["search_train"]
    model = Adapted(target, own)
    trainer = Trainer(Episodes(model, len(images.block_classes(table[0]))), images, table, classes, config)
    for _ in trainer.run():
        pass
    return twin_accuracies(Adapter(model, target), images, tables["validation"], trainer.autocast)


def page(results: Mapping[str, np.ndarray], of_cifar: np.ndarray, groups: int) -> str:
    """Accuracies on validation groups, some of which are `of_cifar`, as Markdown."""
    reference = results[REFERENCE]
    columns = {"": list(results)}
    for title, some in (("all groups", slice(None)), ("groups of CIFAR-100", of_cifar)):
        columns[title] = [plus_minus(*mean_interval(values[some])) for values in results.values()]
        columns[f"{title}, less PudNet+"] = [
            "" if name == REFERENCE else plus_minus(*mean_interval(values[some] - reference[some]), "+")
            for name, values in results.items()
        ]
    return TEXT.format(groups=groups, validation=len(reference), labelled=LABELLED) + table_of(columns)


def main() -> None:
    """Measure all, and write the page after each."""
    torch.set_num_threads(1)
    split, tables = open_groups(group_folder(0))
    store, results = open_store(STORE, verify=False), {}
    images = StoreImages(store, torch.device("cpu"))
    cifar = next(iter(store.set_classes.values()))
    of_cifar = np.array([images.block_classes(group)[0] in cifar for group in tables["validation"][:, FROM]])
    for name in sorted(TRIED, key=lambda name: name != REFERENCE):  # the reference first
        results[name] = measured(TRIED[name], images, tables, split.search_classes)
        print(f"{name}: {results[name].mean():.2f}", flush=True)
        ordered = {known: results[known] for known in TRIED if known in results}
        PAGE.write_text(page(ordered, of_cifar, len(tables["search_train"])), encoding="utf-8")


if __name__ == "__main__":
    main()
