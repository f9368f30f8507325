"""What else of a network could be made for a group, beside class filters: tried on validation groups of `domains`.

    dvc repro groups    # with setting: domains, groups.search_groups: 1000, groups.validation_groups: 300
    python reference/ingredients.py    # some 5 minutes for each of the nine, on one core of a CPU

All parts of a layer are made from its input maps for the labelled images, in the one pass over them. It writes
studies/results/ingredients.md.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from pipeline.project import STORE, group_folder
from pipeline.reporting.numbers import plus_minus
from pudnet.baselines.learners import episode, losses
from pudnet.classifier import Regression
from pudnet.config import ModelConfig, TrainConfig, apply_variant
from pudnet.data.groups import open_groups
from pudnet.data.images import StoreImages
from pudnet.data.store import open_store
from pudnet.device import wants_bf16
from pudnet.evaluation import FROM, ON, mean_interval
from pudnet.hypernet.class_filters import ClassFilters
from pudnet.learner import Learner
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

| | all groups | less PudNet+ | groups of CIFAR-100 | less PudNet+ |
|---|---|---|---|---|"""


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


class Says(nn.Sequential):
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
        self.mixes = nn.ModuleList(Says(3 * shape[1], own.experts, 1.0) for shape in shapes if own.experts > 1)
        self.changes = nn.ModuleList(Says(3 * shape[1], 2 * shape[0], 0.0) for shape in shapes if own.film)
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
            with torch.autocast(images.device.type, enabled=False):
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


class Episodes(Learner):
    """Trains on groups: from the labelled images of each class, the first ones, to the others."""

    def __init__(self, model: Adapted, k: int) -> None:
        super().__init__()
        self.model, self.k = model, k

    def losses(self, images: Tensor, labels: Tensor, done: float) -> Losses:
        """The cross-entropy of one group's other images."""
        group, support = images[0].contiguous(memory_format=torch.channels_last), LABELLED // self.k
        rows = (torch.arange(self.k)[:, None] * (len(group) // self.k) + torch.arange(support)).flatten()
        features, _ = self.model.features(group, rows, in_blocks(self.k, support, group.device), self.k)
        with torch.autocast(group.device.type, enabled=False):
            first, own, queries, truth = episode(features, self.k, support)
            weights = self.model.weights(first, own, self.k)
            logits = self.model.regression(queries * weights, first * weights, own, self.k)
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


@torch.no_grad()
def accuracy(model: Adapted, target: Target, images: StoreImages, group: np.ndarray, twin: np.ndarray, k: int) -> float:
    """Accuracy in percent on a group's twin, of the network that is made from its labelled images."""
    blocks = group.reshape(k, -1)[:, : LABELLED // k]
    labels = in_blocks(k, LABELLED // k, images.device)
    seen = images(blocks.ravel()).contiguous(memory_format=torch.channels_last)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=wants_bf16("auto", images.device)):
        network, support = made_for(model, target, seen, labels, k)
        queries = network(images(twin)).flatten(1).float()
    weights = model.weights(support, labels, k)
    found = model.regression(queries * weights, support * weights, labels, k).argmax(1)
    truth = in_blocks(k, len(twin) // k, images.device)
    return 100 * (found == truth).float().mean().item()


def measured(own: Ingredients) -> tuple[np.ndarray, np.ndarray]:
    """Train with some ingredients -> accuracy on each validation group, and whether it is of CIFAR-100."""
    split, tables = open_groups(group_folder(0))
    store = open_store(STORE, verify=False)
    images, k = StoreImages(store, torch.device("cpu")), 3
    _, config = apply_variant("pudnet_plus", ModelConfig(), TrainConfig())
    torch.manual_seed(0)
    target = build_target("convnet3", store.channels, store.image_size)
    model = Adapted(target, own)
    for _ in Trainer(Episodes(model, k), images, tables["search_train"], split.search_classes, config).run():
        pass
    model.eval()
    validation = tables["validation"]
    values = [accuracy(model, target, images, group[FROM], group[ON], k) for group in validation]
    first = next(iter(store.set_classes.values()))
    of_first = [images.block_classes(group[FROM])[0] in first for group in validation]
    return np.array(values), np.array(of_first)


def page(results: dict[str, tuple[np.ndarray, np.ndarray]], groups: int) -> str:
    """The results as Markdown."""
    reference, of_first = results[REFERENCE]
    lines = [TEXT.format(groups=groups, validation=len(reference), labelled=LABELLED)]
    for name, (values, _) in results.items():
        cells = []
        for some in (slice(None), of_first):
            difference = plus_minus(*mean_interval(values[some] - reference[some]), "+") if name != REFERENCE else ""
            cells += [plus_minus(*mean_interval(values[some])), difference]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure all, and write the page after each."""
    torch.set_num_threads(1)
    groups, results = len(open_groups(group_folder(0))[1]["search_train"]), {}
    for name, own in sorted(TRIED.items(), key=lambda each: each[0] != REFERENCE):  # the reference first
        results[name] = measured(own)
        print(f"{name}: {results[name][0].mean():.2f}", flush=True)
        ordered = {known: results[known] for known in TRIED if known in results}
        PAGE.write_text(page(ordered, groups), encoding="utf-8")


if __name__ == "__main__":
    main()
