"""From labelled images to a network that classifies them: sketch, weights, calibration, centroids."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pudnet.card import Card, card_target, loaded, read_tensors, write_tensors
from pudnet.classifier import fit
from pudnet.config import ModelConfig, TrainConfig, apply_variant, default_extractor, parse
from pudnet.controls import StaticTrunk
from pudnet.cpu import accelerate, keep_freed_memory
from pudnet.data.images import normalize
from pudnet.data.own import Images, ImageSet, Pixels, images_at_a_time, labelled_set, noting
from pudnet.data.rows import CALIBRATION_IMAGES, first_rows, spread_rows
from pudnet.device import wants_bf16
from pudnet.errors import UserError
from pudnet.hypernet import PudNet
from pudnet.locations import local_file
from pudnet.network import PredictedNetwork
from pudnet.targets import Calibrator, Target, Weights, own_weights, target_name

if TYPE_CHECKING:
    from pudnet.finetune import FineTuned

AT_ONCE = 100  # that may pass whatever their size; more where they are small
WEIGHTS_AT_A_TIME, GROUPS_AT_A_TIME = 2**26, 100


def _columns(labels: Tensor) -> Tensor:
    """Labels (N,) as 0..k-1 of those classes alone that occur."""
    return labels.unique(return_inverse=True)[1]


class Streamed:
    """Normalised images by their row, read when they are asked for: more than fit in memory can be adapted to."""

    def __init__(self, images: ImageSet, rows: Tensor, mean: Tensor, std: Tensor) -> None:
        self.images, self.rows, self.mean, self.std = images, rows, mean, std

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Rows (n,) -> float (n, C, H, W)."""
        pixels = torch.as_tensor(self.images.read(self.rows[rows.cpu()].tolist()))
        return normalize(pixels.to(self.mean.device), self.mean, self.std)


class Predictor:
    """A trained hypernetwork (or a control) and all it takes to use it on new images.

    `predict` is the one call; its steps stand alone, on normalised images, for evaluation and timing. The sketch
    and BatchNorm's statistics are averages, and a part of a group's images is enough for them: `sketch_images`
    (None: as many as the model was made for) and `calibration_images` (None: 50; where labels enter the sketch those
    that it is of, also when that changes) are how many, spread evenly over its classes; the first
    `support_per_class` of each class make its centroid, and where those are more than 50, but may pass at once, they
    are the ones that calibrate.
    Statistics are taken in bf16 where the device has it; the network itself is fp32, as it is exported. On a
    CPU the process keeps the memory that it frees (`keep_freed_memory`).
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
        hypernetwork = isinstance(model, PudNet)  # and not a trunk of a control or baseline
        self.class_aware = hypernetwork and model.class_aware
        self.regression = model.regression if hypernetwork else None
        own = model.config.sketch_images if hypernetwork else CALIBRATION_IMAGES
        self.sketch_images = own if sketch_images is None else sketch_images
        self._calibration_images = calibration_images
        self.support_per_class = card.support_per_class
        self.device = next(model.parameters()).device
        self.bf16 = wants_bf16("auto", self.device)
        target.network.to(self.device, memory_format=torch.channels_last)
        self.calibrate = Calibrator(target, model.shared)
        if self.device.type == "cpu":
            keep_freed_memory()
            accelerate(self.calibrate.empty)
        self.mean, self.std = (torch.tensor(v, device=self.device) for v in (card.mean, card.std))

    @property
    def calibration_images(self) -> int:
        """How many images BatchNorm's statistics are of, unless a larger support set gives them."""
        if self._calibration_images is not None:
            return self._calibration_images
        return self.sketch_images if self.class_aware else CALIBRATION_IMAGES

    @calibration_images.setter
    def calibration_images(self, count: int | None) -> None:
        self._calibration_images = count

    @classmethod
    def load(
        cls, path: str | Path, device: str | torch.device = "cpu", target: str | nn.Module | None = None
    ) -> Predictor:
        """Read a trained model from a .safetensors file; `UserError` for anything else. Nothing is unpickled.

        `path` is also the name of a model that ships with the project (`cifar100-convnet3`), or a URI: an MLflow
        run's (`runs:/ID/model`) or a registered model's (`models:/pudnet-fashion-convnet3/1`). A model of a
        network of your own needs that network again, as `target`: no file says what to import.
        """
        tensors, card = read_tensors(local_file(path))
        if card.kind not in ("pudnet", "static_trunk"):
            raise UserError(f"{path}: holds a {card.kind}, not a trained model")
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers are the caller's
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
        with torch.random.fork_rng():  # the caller's random numbers are the caller's
            torch.manual_seed(seed)
            return cls.from_card(card, target)

    @classmethod
    def from_card(
        cls, card: Card, target: str | nn.Module | None = None, device: str | torch.device = "cpu"
    ) -> Predictor:
        """The untrained model that a card describes. Raises `UserError` for a card that describes none."""
        model, built = build_model(card, target)
        try:
            model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device: {device} cannot be used ({' '.join(str(error).split())[:100]})") from None
        return cls(model, card, built)

    def save(self, path: str | Path) -> None:
        """Write the model and its card as .safetensors."""
        write_tensors(Path(path), self.model.state_dict(), self.card)

    def predict(self, images: Images | ImageSet, labels: Sequence | Pixels | None = None) -> PredictedNetwork:
        """Predict a network for labelled images, in one forward pass of the hypernetwork.

        Images are uint8 (N, H, W, C) or float (N, C, H, W) in 0..1, a list of images, a Dataset or DataLoader or
        a folder with a subfolder a class (`pudnet.data.own.image_set`), of any size; labels (N,) of any type, where the
        images do not bring theirs. The first `support_per_class` images of each class give its centroid, or all that
        are looked at a layer that is solved for.

        Raises:
            UserError: for unfit input, in one line.
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
    ) -> FineTuned:
        """Train a predicted network on labelled images, beside the same from random weights (`pudnet.finetune`)."""
        from pudnet.finetune import finetune  # here: it needs the baselines, which need this

        return finetune(network, images, labels, epochs, held_out, learning_rate)

    def predict_many(
        self, groups: Sequence[tuple[Images | ImageSet, Sequence | Pixels | None]]
    ) -> list[PredictedNetwork]:
        """`predict` for each of several groups; the hypernetwork runs once for up to 100, of 64 M weights."""
        networks, batch = [], max(1, min(GROUPS_AT_A_TIME, WEIGHTS_AT_A_TIME // self.target.predicted))
        for first in range(0, len(groups), batch):
            part = groups[first : first + batch]
            seen: list[dict[int, str]] = [{} for _ in part]
            prepared = [self._prepare(*group, noted) for group, noted in zip(part, seen, strict=True)]
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                predicted = self._one_by_one(prepared) if self.class_aware else self._together(prepared)
            for network, noted in zip(predicted, seen, strict=True):
                network.card = dataclasses.replace(network.card, looked_at=tuple(sorted(noted.values())))
            networks += predicted
        return networks

    def _one_by_one(self, groups: Sequence[tuple]) -> list[PredictedNetwork]:
        """Where labels enter the sketch: it is as long as its group has classes."""
        return [self.adapt(*group) for group in groups]

    def _together(self, groups: Sequence[tuple]) -> list[PredictedNetwork]:
        sketches = torch.stack([self.sketch(images, labels) for images, labels, _ in groups])
        with torch.no_grad():
            weights = self.model.generate(sketches)
        return [self.network(own_weights(weights, g), *group) for g, group in enumerate(groups)]

    def _prepare(
        self, images: Images | ImageSet, labels: Sequence | Pixels | None, seen: dict[int, str]
    ) -> tuple[Tensor | Streamed, Tensor, tuple]:
        """What a prediction looks at: normalised images (N, C, H, W), labels (N,) and the k classes.

        `seen` gets the checksum of each image, as it is read.
        """
        own, encoded, classes = labelled_set(images, labels, self.card)
        rows = self.rows(encoded)
        looked_at = Streamed(noting(own, seen), rows, self.mean, self.std)
        if len(rows) <= images_at_a_time(self.card.image_size):
            looked_at = looked_at[torch.arange(len(rows))]  # each is read once
        return looked_at, encoded[rows].to(self.device), classes

    def rows(self, labels: Tensor) -> Tensor:
        """Rows of the images that a prediction looks at, for labels (N,) in 0..k-1."""
        for name in ("sketch_images", "calibration_images", "support_per_class"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise UserError(f"{name}: must be an integer of at least 1, got {value!r}")
        classes = int(labels.max()) + 1
        shares = [math.ceil(count / classes) for count in (self.sketch_images, self.calibration_images)]
        return first_rows(labels, max(*shares, self.support_per_class))

    @torch.no_grad()
    def adapt(
        self,
        images: Tensor | Streamed,
        labels: Tensor,
        classes: tuple,
        sketch: Tensor | None = None,
        mark: Callable[[], None] = lambda: None,
    ) -> PredictedNetwork:
        """`predict` on normalised images (N, C, H, W) and labels (N,) in 0..k-1; a given sketch replaces theirs.

        `mark` is called when the sketch is there, and when the weights are. Where class filters are all that is
        predicted, and of the images that calibrate, one pass of those gives both: the filters are solved for when it
        comes to their layer.
        """
        alone = self.class_aware and not self.model.config.change
        if sketch is None and alone and self.sketch_images == self.calibration_images:
            writes = {self.model.filters.conv.name: partial(self._class_kernels, labels, mark)}
            return self.network(self.model.base_weights(), images, labels, classes, writes)
        if sketch is None:
            sketch = self.sketch(images, labels)
        mark()
        weights = self.model.generate(sketch)
        mark()
        return self.network(weights, images, labels, classes)

    def _class_kernels(self, labels: Tensor, mark: Callable[[], None], maps: Tensor) -> Tensor:
        """The weight of the layer that has class filters, from what it is given for the images that calibrate."""
        mark()
        filters, own = self.model.filters, _columns(labels[self.calibration_rows(labels)])
        with torch.autocast(self.device.type, enabled=False):
            solved = filters.solve(maps, filters.layer(self.calibrate.empty), own, int(own.max()) + 1)
        weights = self.model.generate(solved.flatten())
        mark()
        return weights[filters.conv.name]

    @torch.no_grad()
    def sketch(self, images: Tensor | Streamed, labels: Tensor) -> Tensor:
        """The sketch of a group, from `sketch_images` of its normalised images (N, C, H, W) and their labels (N,).

        In fp32: to cast the extractor's weights would cost more than so few images save.
        """
        with torch.autocast(self.device.type, enabled=False):
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
        """Weights -> a network in eval mode: BatchNorm calibrated, a classifier from the support images.

        `writes` are those that are made in passing (`Calibrator`).
        """
        body, features, own = self.support(weights, images, labels, writes)
        card = self.network_card(classes, labels, len(own))
        return PredictedNetwork(body, fit(features, own, card), card)

    def support_rows(self, labels: Tensor) -> Tensor:
        """Rows of the support set: the first images of each class."""
        return first_rows(labels, self._support_count(labels))

    def _support_count(self, labels: Tensor) -> int:
        """Images of each class in the support set. A classifier that is solved for is of all that are looked at."""
        if self.regression is None:
            return self.support_per_class
        return max(self.support_per_class, self._labelled(labels))

    def _labelled(self, labels: Tensor) -> int:
        """Images of a class whose labels enter the sketch, at most."""
        if not self.class_aware:
            return 0
        counts = labels.bincount()
        return min(math.ceil(self.sketch_images / len(counts)), int(counts.max()))

    def calibration_rows(self, labels: Tensor) -> Tensor:
        """Rows of the images that calibrate BatchNorm. One pass gives the features of a support set that they hold."""
        rows = spread_rows(labels, self.calibration_images)
        if self._calibration_images is None and not self.class_aware:
            support = self.support_rows(labels)
            if len(rows) < len(support) <= max(AT_ONCE, images_at_a_time(self.card.image_size)):
                return support
        return rows

    @torch.no_grad()
    def support(
        self,
        weights: Weights,
        images: Tensor | Streamed,
        labels: Tensor,
        writes: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> tuple[nn.Module, Tensor, Tensor]:
        """Weights -> a calibrated network in eval mode, and the support set's features (S, d) and labels (S,)."""
        chosen = self.calibration_rows(labels)
        body, features = self.calibrate(weights, images[chosen], writes)
        support = self.support_rows(labels)
        if not bool(torch.isin(support, chosen).all()):
            at_a_time = images_at_a_time(self.card.image_size)
            return (
                body,
                torch.cat([body(images[part]).flatten(1) for part in support.split(at_a_time)]),
                labels[support],
            )
        rows = self.support_rows(labels[chosen])
        return body, features[rows], labels[chosen][rows]

    def network_card(self, classes: tuple, labels: Tensor, support_images: int) -> Card:
        """The card of a network that this model predicted for a group of labels (N,)."""
        looked_at = {
            "sketch_images": len(spread_rows(labels, self.sketch_images)),
            "calibration_images": len(self.calibration_rows(labels)),
            "support_images": support_images,
        }
        solved = {} if self.regression is None else self.regression.card_values()
        return dataclasses.replace(
            self.card,
            **solved,
            kind="network",
            model=None,
            classes=classes,
            support_per_class=self._support_count(labels),
            labels_per_class=self._labelled(labels),
            predicted=tuple(conv.name for conv in self.target.convs),
            provenance={**self.card.provenance, **looked_at},
        )


def build_model(card: Card, target: str | nn.Module | None = None) -> tuple[PudNet | StaticTrunk, Target]:
    """The untrained model that a card describes, and its target.

    Raises `UserError` for a card that describes none, or whose target it takes a `target` to know.
    """
    built = card_target(card, target)
    if card.kind == "static_trunk":
        return StaticTrunk(built), built
    return PudNet(parse(ModelConfig, card.model or {}, "model"), built), built
