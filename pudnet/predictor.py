"""Predicts a network from labelled images, in four steps: sketch, weights, calibration, classifier."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pudnet.card import Card, loaded, read_tensors, write_tensors
from pudnet.classifier import fit
from pudnet.config import ModelConfig, TrainConfig, apply_variant, default_extractor
from pudnet.controls import StaticTrunk
from pudnet.cpu import accelerate, keep_freed_memory
from pudnet.data.images import normalize
from pudnet.data.rows import CALIBRATION_IMAGES, first_rows, spread_rows
from pudnet.data.user_images import Images, ImageSet, Pixels, images_at_a_time, labelled_set, noting
from pudnet.device import full_precision, seed_random, wants_bf16
from pudnet.errors import UserError, words
from pudnet.hypernet import PudNet
from pudnet.locations import local_file
from pudnet.model import build_model
from pudnet.network import PredictedNetwork
from pudnet.targets import (
    ALL_BLOCKS,
    Calibrator,
    Target,
    Weights,
    all_blocks,
    last_block_alone,
    own_weights,
    target_name,
)

if TYPE_CHECKING:
    from pudnet.finetune import FineTuned

ALL_IMAGES = 10**9  # more than any group has
AT_ONCE = 100  # at least this many images go in one batch; more if they are small
WEIGHTS_AT_A_TIME, GROUPS_AT_A_TIME = 2**26, 100  # limits of one pass of the hypernetwork over several groups


def _columns(labels: Tensor) -> Tensor:
    """Renumber labels (N,) to 0..k-1, where k counts the classes that occur."""
    return labels.unique(return_inverse=True)[1]


class Streamed:
    """Normalised images that are read from disk when indexed, so that a group may be larger than memory."""

    def __init__(self, images: ImageSet, rows: Tensor, mean: Tensor, std: Tensor) -> None:
        self.images, self.rows, self.mean, self.std = images, rows, mean, std

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Rows (n,) -> float (n, C, H, W)."""
        pixels = torch.as_tensor(self.images.read(self.rows[rows.cpu()].tolist()))
        return normalize(pixels.to(self.mean.device), self.mean, self.std)


@dataclass(frozen=True)
class Noted:
    """Rows (n,) of a user's images that a prediction may look at, and the checksum of each row that it has read."""

    rows: Tensor
    checksums: dict[int, str]

    def on(self, card: Card, labels: Tensor) -> Card:
        """A predicted network's card that tells which images it was made from. `labels` (n,) are the rows'."""
        labelled = self.rows[first_rows(labels.cpu(), card.labels_per_class)].tolist()
        known = [self.checksums[row] for row in labelled if row in self.checksums]
        seen = self.checksums.values()
        return dataclasses.replace(card, looked_at=tuple(sorted(seen)), labelled=tuple(sorted(known)))


@dataclass(frozen=True)
class Uses:
    """What a prediction uses of a group's images: rows of its labels (N,), and how many images of a class."""

    sketch: Tensor  # rows that the sketch is of, or the class filters
    calibration: Tensor  # rows that BatchNorm's statistics are of
    support: Tensor  # rows that the classifier is made from: the first `support_per_class` of each class
    support_per_class: int
    labels_per_class: int  # whose labels make the weights, or choose the penalty or the blocks


class Predictor:
    """A trained hypernetwork (or a control), ready to predict networks for new images.

    `predict` does everything. Evaluation and timing call its steps one by one, on normalised images. Each step
    needs only some of a group's images:

    - The sketch averages over `sketch_images` images, spread evenly over the classes. In the constructor, None stands
      for as many as the card says (the shipped models: up to 1,000; others: the model's `sketch_images`).
    - BatchNorm's statistics come from `calibration_images` images, spread likewise. None means:
      - the sketch's images, for a model that reads labels (PudNet+);
      - else the support set, if it has more than 50 images and fits in one batch;
      - else 50 images.
    - The first `support_per_class` images of each class are the support set, from which the classifier is made.

    Use a predictor in one thread at a time: some models alter their shared trunk while they predict.

    The calibration pass runs in bf16 where the device supports it; the predicted network itself is fp32. On a CPU
    the process keeps the memory that it frees (`keep_freed_memory`).
    """

    def __init__(
        self,
        model: PudNet | StaticTrunk,
        card: Card,
        target: Target,
        sketch_images: int | None = None,
        calibration_images: int | None = None,
    ) -> None:
        self.model, self.card, self.target = model.eval(), card, target
        hypernetwork = isinstance(model, PudNet)  # else the trunk of a control or baseline
        self.reads_labels = hypernetwork and model.reads_labels
        self.regression = model.regression if hypernetwork else None
        # None: the classifier sees the last block, or whatever else the target gives
        self.all_blocks = all_blocks(target) if (card.model or {}).get("blocks", "last") != "last" else None
        usual = card.sketch_images or (model.config.sketch_images if hypernetwork else CALIBRATION_IMAGES)
        if hypernetwork and model.config.pooling == "sum" and not self.reads_labels:
            usual = ALL_IMAGES  # as in training, since a sum over fewer is smaller
        self.sketch_images = usual if sketch_images is None else sketch_images
        self.calibration_images = calibration_images
        self.support_per_class = card.support_per_class
        self.device = next(model.parameters()).device
        self.bf16 = wants_bf16("auto", self.device)
        built = self.all_blocks or target
        built.network.to(self.device, memory_format=torch.channels_last)
        self.calibrate = Calibrator(built, model.shared)
        if self.device.type == "cpu":
            keep_freed_memory()
            accelerate(self.calibrate.empty)
        self.mean, self.std = (torch.tensor(v, dtype=torch.float32, device=self.device) for v in (card.mean, card.std))

    @classmethod
    def load(
        cls, path: str | Path, device: str | torch.device = "cpu", target: str | nn.Module | None = None
    ) -> Predictor:
        """Read a trained model from a .safetensors file; `UserError` for anything else. Nothing is unpickled.

        Instead of a file, `path` may name a model that ships with the project (`cifar100-convnet3`), or be the URI of
        an MLflow run (`runs:/ID/model`) or registered model (`models:/pudnet-fashion-convnet3/1`). If the model was
        trained for a network of your own, pass that network as `target`, since a file must not decide what code is
        imported.
        """
        tensors, card = read_tensors(local_file(path))
        if card.kind not in ("pudnet", "static_trunk"):
            raise UserError(f"{path}: holds {card.holds}, not a trained PudNet")
        with torch.random.fork_rng(devices=[]):  # leave the caller's random state as it was
            predictor = cls.from_card(card, target, device)
        loaded(predictor.model, tensors, path)
        return predictor

    @classmethod
    def untrained(
        cls, target: str | nn.Module, channels: int, image_size: int, seed: int = 0, variant: str = "pudnet"
    ) -> Predictor:
        """A random hypernetwork, for benchmarks and tests."""
        half, name = (0.5,) * channels, target_name(target)
        config, _ = apply_variant(variant, ModelConfig(extractor=default_extractor(name)), TrainConfig())
        card = Card("pudnet", name, channels, image_size, half, half, 10.0, 10, asdict(config))
        with torch.random.fork_rng(devices=[]):  # leave the caller's random state as it was
            seed_random(seed, torch.device("cpu"))
            return cls.from_card(card, target)

    @classmethod
    def from_card(
        cls, card: Card, target: str | nn.Module | None = None, device: str | torch.device = "cpu"
    ) -> Predictor:
        """Build the untrained model that a card describes. Raises `UserError` if the card describes no model."""
        with torch.device("cpu"):  # whatever the caller's default is
            model, built = build_model(card, target)
        try:
            model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device: {device} cannot be used ({words(error, 100)})") from None
        return cls(model, card, built)

    def save(self, path: str | Path) -> None:
        """Write the model and its card as .safetensors."""
        write_tensors(Path(path), self.model.state_dict(), self.card)

    def predict(self, images: Images | ImageSet, labels: Sequence | Pixels | None = None) -> PredictedNetwork:
        """Predict a network for labelled images, in one forward pass of the hypernetwork.

        Images, of any size, are a uint8 array (N, H, W, C), a float array (N, C, H, W) in 0..1, a list of images, a
        Dataset, a DataLoader, or a folder with one subfolder for each class (`pudnet.data.user_images.image_set`).
        Labels (N,) are of any type; leave them out if the images come with labels. The classifier has each class's
        centroid, from its first `support_per_class` images, or (the shipped models) is a linear layer fitted to all
        images that are used. With `model.blocks: leave_one_out`, as the shipped models have it, the network may be a
        `convnet3_multilevel`, whose layer sees all blocks; its card says so.

        Raises:
            UserError: if the input cannot be used; the message is one line.
        """
        return self.predict_many([(images, labels)])[0]

    def finetune(
        self,
        network: PredictedNetwork,
        images: Images | ImageSet,
        labels: Sequence | Pixels | None = None,
        epochs: int = 10,
        held_out: float = 0.2,
        learning_rate: float = 3e-3,
        augment: str = "shift",
    ) -> FineTuned:
        """Train a predicted network on labelled images, and for comparison from random weights (`pudnet.finetune`)."""
        from pudnet.finetune import finetune  # here: a prediction does not need it

        return finetune(network, images, labels, epochs, held_out, learning_rate, augment=augment)

    def predict_many(
        self, groups: Sequence[tuple[Images | ImageSet, Sequence | Pixels | None]]
    ) -> list[PredictedNetwork]:
        """`predict` for several groups. One pass of the hypernetwork serves up to 100 groups and 64 M weights.

        A model that reads labels, as all that ship do, takes one group after the other.
        """
        together = max(1, min(GROUPS_AT_A_TIME, WEIGHTS_AT_A_TIME // self.target.predicted))
        # class filters make sketches of different lengths, so they do not stack
        networks, batch = [], 1 if self.reads_labels else together
        for first in range(0, len(groups), batch):
            part = groups[first : first + batch]
            prepared, noted = zip(*(self._prepare(*group) for group in part), strict=True)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                predicted = [self.adapt(*prepared[0])] if self.reads_labels else self._together(prepared)
            for network, (_, own, _), seen in zip(predicted, prepared, noted, strict=True):
                network.card = seen.on(network.card, own)
            networks += predicted
        return networks

    def _together(self, groups: Sequence[tuple]) -> list[PredictedNetwork]:
        sketches = torch.stack([self.sketch(images, labels) for images, labels, _ in groups])
        with torch.no_grad():
            weights = self.model.generate(sketches)
        return [self.network(own_weights(weights, g), *group) for g, group in enumerate(groups)]

    def _prepare(self, images: Images | ImageSet, labels: Sequence | Pixels | None) -> tuple[tuple, Noted]:
        """Pick the images that a prediction uses: normalised (N, C, H, W), their labels (N,), and the k classes."""
        own, encoded, classes = labelled_set(images, labels, self.card)
        rows = self.rows(encoded)
        noted = Noted(rows, {})
        looked_at = Streamed(noting(own, noted.checksums), rows, self.mean, self.std)
        if len(rows) <= images_at_a_time(self.card.image_size):
            looked_at = looked_at[torch.arange(len(rows), device="cpu")]  # few enough for memory: read each once
        return (looked_at, encoded[rows].to(self.device), classes), noted

    def rows(self, labels: Tensor) -> Tensor:
        """Rows of the images that a prediction uses, for labels (N,) in 0..k-1."""
        calibration = self.calibration_images
        if calibration is None:
            calibration = self.sketch_images if self.reads_labels else CALIBRATION_IMAGES
        counts = {"sketch_images": self.sketch_images, "calibration_images": calibration}
        counts["support_per_class"] = self.support_per_class
        for name, value in counts.items():
            if not isinstance(value, Integral) or value < 1:
                raise UserError(f"{name}: must be an integer of at least 1, got {value!r}")
        classes = int(labels.max()) + 1
        shares = [math.ceil(count / classes) for count in (self.sketch_images, calibration)]
        return first_rows(labels, max(*shares, self.support_per_class))

    def uses(self, labels: Tensor) -> Uses:
        """What a prediction uses of images with labels (N,) in 0..k-1.

        Class filters and ridge regression (the model `reads_labels`) use all labelled images that are looked at.
        """
        sketch, counts = spread_rows(labels, self.sketch_images), labels.bincount()
        read = min(math.ceil(self.sketch_images / len(counts)), int(counts.max())) if self.reads_labels else 0
        each = self.support_per_class if self.regression is None else max(self.support_per_class, read)
        support = first_rows(labels, each)
        chooses = self.regression is not None and (self.regression.penalty != "learned" or self.all_blocks is not None)
        calibration = self._calibration_rows(labels, sketch, support)
        return Uses(sketch, calibration, support, each, each if chooses else read)

    def _calibration_rows(self, labels: Tensor, sketch: Tensor, support: Tensor) -> Tensor:
        """If they include the support set, the calibration pass also gives its features: no second pass is needed."""
        if self.calibration_images is not None:
            return spread_rows(labels, self.calibration_images)
        if self.reads_labels:
            return sketch
        rows, most = spread_rows(labels, CALIBRATION_IMAGES), max(AT_ONCE, images_at_a_time(self.card.image_size))
        return support if len(rows) < len(support) <= most else rows

    @torch.no_grad()
    def adapt(
        self,
        images: Tensor | Streamed,
        labels: Tensor,
        classes: tuple,
        sketch: Tensor | None = None,
    ) -> PredictedNetwork:
        """`predict` on normalised images (N, C, H, W) and labels (N,) in 0..k-1; a given `sketch` replaces their own.

        If the model predicts at most class filters, and solves them on the images that calibrate BatchNorm, one pass
        does both: it solves the filters when it reaches their layer, and then goes on with them.
        """
        at_most_filters = self.reads_labels and not self.model.config.change
        if sketch is None and at_most_filters and self.calibration_images in (None, self.sketch_images):
            writes = self._filters_in_passing(labels)
            return self.network(self.model.base_weights(), images, labels, classes, writes)
        if sketch is None:
            sketch = self.sketch(images, labels)
        return self.network(self.model.generate(sketch), images, labels, classes)

    def _filters_in_passing(self, labels: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
        """What the calibration pass is to compute on its way: the layer with class filters, if the model has them."""
        filters = self.model.filters
        return {} if filters is None else {filters.conv.name: partial(self._class_kernels, labels)}

    def _class_kernels(self, labels: Tensor, maps: Tensor) -> Tensor:
        """The weight of the layer with class filters, solved from its input maps for the calibration images."""
        filters, own = self.model.filters, _columns(labels[self.uses(labels).calibration])
        with full_precision(self.device):
            solved = filters.solve(maps, filters.layer(self.calibrate.empty), own, int(own.max()) + 1)
        return self.model.generate(solved.flatten())[filters.conv.name]

    @torch.no_grad()
    def sketch(self, images: Tensor | Streamed, labels: Tensor) -> Tensor:
        """The sketch of a group, from `sketch_images` of its normalised images (N, C, H, W) and their labels (N,).

        In fp32: for so few images, casting the extractor's weights to bf16 costs more than it saves.
        """
        with full_precision(self.device):
            rows = spread_rows(labels, self.sketch_images)
            return self.model.sketch(images[rows], _columns(labels[rows]))

    @torch.no_grad()
    def network(
        self,
        weights: Weights,
        images: Tensor | Streamed,
        labels: Tensor,
        classes: tuple,
        writes: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> PredictedNetwork:
        """Weights -> a network in eval mode, with BatchNorm calibrated and a classifier made from the support set.

        `writes` gives the weights that are computed only during the calibration pass (`Calibrator`).
        """
        uses = self.uses(labels)
        body, features = self.calibrated(weights, images, uses, writes)
        own, card = labels[uses.support], self._network_card(classes, uses)
        if self.regression is not None:
            body, features, card = self._chosen(body, features, own, card)
        return PredictedNetwork(body, fit(features, own, card), card)

    def _chosen(self, body: nn.Module, features: Tensor, own: Tensor, card: Card) -> tuple[nn.Module, Tensor, Card]:
        """Choose what the ridge classifier sees, and its penalty, by the support set's features (S, d), labels (S,)."""
        last = features[:, : self.target.features]
        candidates = [last] if self.all_blocks is None else [last, features]
        choice, ridge = self.regression.choose(candidates, own, len(card.classes))
        solved = {"ridge": ridge.item(), "temperature": self.regression.log_scale.exp().item()}
        if choice == 1:
            return body, features, dataclasses.replace(card, **solved, target=ALL_BLOCKS)
        body = body if self.all_blocks is None else last_block_alone(body)
        return body, last, dataclasses.replace(card, **solved)

    @torch.no_grad()
    def calibrated(
        self,
        weights: Weights,
        images: Tensor | Streamed,
        uses: Uses,
        writes: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> tuple[nn.Module, Tensor]:
        """Weights -> a calibrated network in eval mode, and the support set's features (S, d)."""
        body, features = self.calibrate(weights, images[uses.calibration], writes)
        if bool(torch.isin(uses.support, uses.calibration).all()):
            return body, features[torch.searchsorted(uses.calibration, uses.support)]
        parts = uses.support.split(images_at_a_time(self.card.image_size))
        return body, torch.cat([body(images[part]).flatten(1) for part in parts])

    def _network_card(self, classes: tuple, uses: Uses) -> Card:
        """The card of a network that this model predicted."""
        looked_at = {
            "sketch_images": len(uses.sketch),
            "calibration_images": len(uses.calibration),
            "support_images": len(uses.support),
        }
        return dataclasses.replace(
            self.card,
            kind="network",
            model=None,
            sketch_images=None,
            classes=classes,
            support_per_class=uses.support_per_class,
            labels_per_class=uses.labels_per_class,
            predicted=tuple(conv.name for conv in self.target.convs),
            provenance={**self.card.provenance, **looked_at},
        )
