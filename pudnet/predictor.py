"""From labelled images to a network that classifies them: predict, calibrate, centroids; load and save."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pudnet.config import ModelConfig, default_extractor, parse
from pudnet.controls import StaticTrunk
from pudnet.cpu import accelerate, keep_freed_memory
from pudnet.data.images import normalize
from pudnet.device import wants_bf16
from pudnet.errors import UserError
from pudnet.hypernet import PudNet
from pudnet.objective import centroids, metric_logits
from pudnet.targets import Calibrator, Target, Weights, build_target, is_import_path, target_name

METADATA = "pudnet"  # one key: safetensors orders several at random, and the file's hash would change
FORMAT = 2
SKETCH_IMAGES = 50  # how few are enough: benchmarks/README.md
CALIBRATION_IMAGES = 50
WEIGHTS_AT_A_TIME = 2**26
CHUNK = 500  # images at a time where they do not depend on each other


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Card:
    """What a saved file says of itself, beside its tensors."""

    kind: str  # "pudnet", "static_trunk": what predicts; "network": what was predicted
    target: str
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    temperature: float
    support_per_class: int
    model: dict | None = None  # ModelConfig, for kind "pudnet"
    classes: tuple[str | int, ...] = ()  # for kind "network"
    predicted: tuple[str, ...] = ()  # for kind "network": the tensors that were predicted, in the order of use
    provenance: dict = dataclasses.field(default_factory=dict)  # setting, class split, seeds, commit, ...
    format: int = FORMAT


def write_tensors(path: Path, tensors: dict[str, Tensor], card: Card) -> None:
    """Write tensors and their card as .safetensors, all or nothing; the same content gives the same bytes.

    Raises `UserError` when the path cannot be written.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(plain, partial, metadata={METADATA: json.dumps(asdict(card), sort_keys=True)})
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({error})") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Card]:
    """Read what `write_tensors` wrote. Raises `UserError`, in one line, for any other file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        values = json.loads(metadata[METADATA])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(f"{path}: not a PudNet file, or a damaged one ({error})") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else None
        raise UserError(f"{path}: written in format {found}, this version reads {FORMAT}")
    return tensors, parse(Card, values, f"{path}: card")


class PredictedNetwork(nn.Module):
    """A target network with predicted weights and class centroids, ready to classify, in eval mode."""

    def __init__(self, body: nn.Module, class_centroids: Tensor, card: Card) -> None:
        super().__init__()
        self.body, self.card = body, card
        self.register_buffer("centroids", class_centroids)  # (k, d)
        mean, std = (torch.tensor(values, device=class_centroids.device) for values in (card.mean, card.std))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.eval()

    @property
    def classes(self) -> tuple[str | int, ...]:
        """The labels that the columns of the logits stand for."""
        return self.card.classes

    def normalize(self, images: np.ndarray | Tensor) -> Tensor:
        """What the target itself is fed: uint8 (N, H, W, C) or 0..1 float (N, C, H, W) -> float (N, C, H, W)."""
        return normalize(as_pixels(images, self.card).to(self.mean.device), self.mean, self.std)

    @torch.no_grad()
    def features(self, images: np.ndarray | Tensor, batch: int = CHUNK) -> Tensor:
        """The target's output, (N, d), for images as `normalize` takes them."""
        chunks = as_pixels(images, self.card).to(self.mean.device).split(batch)
        return torch.cat([self.body(normalize(chunk, self.mean, self.std)).flatten(1) for chunk in chunks])

    def forward(self, images: np.ndarray | Tensor) -> Tensor:
        """Logits (N, k), tau times the cosine to each class's centroid (Eq. 6)."""
        return metric_logits(self.features(images), self.centroids, self.card.temperature)

    @torch.no_grad()
    def logits(self, normalized: Tensor, batch: int = CHUNK) -> Tensor:
        """`forward` on images (N, C, H, W) that are normalised already."""
        features = torch.cat([self.body(chunk).flatten(1) for chunk in normalized.split(batch)])
        return metric_logits(features, self.centroids, self.card.temperature)

    def target_state_dict(self) -> dict[str, Tensor]:
        """The state dict of the plain target network, running statistics included."""
        return dict(self.body.state_dict())

    def save(self, path: str | Path) -> None:
        """Write the plain target's tensors, the centroids and the card as .safetensors."""
        write_tensors(Path(path), {**self.target_state_dict(), "centroids": self.centroids}, self.card)

    @classmethod
    def load(cls, path: str | Path, target: str | nn.Module | None = None) -> PredictedNetwork:
        """Read a network that `save` wrote; `UserError` for another file. `target`: as for `Predictor.load`."""
        tensors, card = read_tensors(Path(path))
        if card.kind != "network":
            raise UserError(f"{path}: holds a {card.kind} model, not a predicted network")
        with torch.random.fork_rng(devices=[]):
            body = _build_target(card, target).network
        centroids = tensors.pop("centroids", torch.empty(0))
        if centroids.ndim != 2 or len(centroids) != len(card.classes):
            raise UserError(f"{path}: its centroids do not fit its {len(card.classes)} classes")
        return cls(loaded(body, tensors, path), centroids, card)


def as_pixels(images: np.ndarray | Tensor, card: Card) -> Tensor:
    """Images as a tensor (N, H, W, C) of 0..255.

    Takes uint8 (N, H, W, C), or (N, H, W) for grey, or float (N, C, H, W) in 0..1.

    Raises:
        UserError: for another type or size than the model's, or floats that are not in 0..1.
    """
    if isinstance(images, np.ndarray):
        if images.dtype.kind not in "uif":
            raise UserError(f"images: must be an array of numbers, got {images.dtype}")
        images = np.ascontiguousarray(images)  # torch takes no negative strides, as of `bgr[..., ::-1]`
    pixels = torch.as_tensor(images)
    if pixels.is_floating_point():
        if pixels.numel() and not bool(((pixels >= 0) & (pixels <= 1)).all()):
            raise UserError("images: floats must lie in 0..1, these hold other values (or NaN)")
        pixels = pixels.movedim(1, -1) * 255 if pixels.ndim == 4 else pixels
    elif pixels.dtype != torch.uint8:
        raise UserError(f"images: must be uint8 (N, H, W, C) or float (N, C, H, W), got {pixels.dtype}")
    elif pixels.ndim == 3:
        pixels = pixels.unsqueeze(-1)
    expected = (card.image_size, card.image_size, card.channels)
    if pixels.ndim != 4 or not len(pixels) or tuple(pixels.shape[1:]) != expected:
        raise UserError(
            f"images: the model takes {expected[0]}x{expected[1]} px of {expected[2]} channel(s), "
            f"got shape {tuple(torch.as_tensor(images).shape)}"
        )
    return pixels


def encode_labels(labels: Sequence | np.ndarray | Tensor, images: int) -> tuple[Tensor, tuple[str | int, ...]]:
    """Labels of integers or strings -> (N,) in 0..k-1 and the k classes, sorted.

    Raises `UserError` when there are fewer than two classes or not one label an image.
    """
    try:
        values = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    except ValueError:  # a ragged list
        raise UserError("labels: must be one integer or string an image") from None
    if values.shape != (images,):
        raise UserError(f"labels: {images} images need as many labels, got shape {values.shape}")
    mixed = values.dtype.kind == "U" and not all(isinstance(label, str) for label in labels)
    if values.dtype.kind not in "iuU" or mixed:
        raise UserError(f"labels: must be integers or strings, got {values.dtype.name} values")
    classes, encoded = np.unique(values, return_inverse=True)
    if len(classes) < 2:
        raise UserError(f"labels: need images of at least two classes, got {len(classes)}")
    return torch.from_numpy(encoded), tuple(classes.tolist())


def first_rows(labels: Tensor, per_class: int) -> Tensor:
    """Rows of the first `per_class` images of each class, in order, for labels (N,) in 0..k-1."""
    order = labels.argsort(stable=True)
    counts = labels.bincount()
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)  # of each image's class, in `order`
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(labels), device=labels.device) - starts
    return torch.nonzero(ranks < per_class).squeeze(1)


class Predictor:
    """A trained hypernetwork (or a control) and all it takes to use it on new images.

    `predict` is the one call; its steps stand alone, on normalised images, for evaluation and timing. The sketch
    and BatchNorm's statistics are averages, and a part of a group's images is enough for them: `sketch_images`
    and `calibration_images` are how many, spread evenly over its classes (the first of each; at least one).
    Statistics are taken in bf16 where the device has it; the network itself is fp32, as it is exported. On a
    CPU the process keeps the memory that it frees (`keep_freed_memory`).
    """

    def __init__(
        self,
        model: PudNet | StaticTrunk,
        card: Card,
        target: Target,
        sketch_images: int = SKETCH_IMAGES,
        calibration_images: int = CALIBRATION_IMAGES,
    ) -> None:
        self.model, self.card, self.target = model.eval(), card, target
        self.sketch_images, self.calibration_images = sketch_images, calibration_images
        self.device = next(model.parameters()).device
        self.bf16 = wants_bf16("auto", self.device)
        target.network.to(self.device, memory_format=torch.channels_last)
        self.calibrate = Calibrator(target, model.shared)
        if self.device.type == "cpu":
            keep_freed_memory()
            accelerate(self.calibrate.empty)
        self.mean, self.std = (torch.tensor(v, device=self.device) for v in (card.mean, card.std))

    @classmethod
    def load(
        cls, path: str | Path, device: str | torch.device = "cpu", target: str | nn.Module | None = None
    ) -> Predictor:
        """Read a trained model from a .safetensors file; `UserError` for anything else. Nothing is unpickled.

        A model of a network of your own needs that network again, as `target`: no file says what to import.
        """
        tensors, card = read_tensors(Path(path))
        if card.kind not in ("pudnet", "static_trunk"):
            raise UserError(f"{path}: holds a {card.kind}, not a trained model")
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers are the caller's
            predictor = cls.from_card(card, target, device)
        loaded(predictor.model, tensors, path)
        return predictor

    @classmethod
    def untrained(cls, target: str | nn.Module, channels: int, image_size: int, seed: int = 0) -> Predictor:
        """A random hypernetwork, for benchmarks and tests."""
        half, name = (0.5,) * channels, target_name(target)
        config = asdict(ModelConfig(extractor=default_extractor(name)))
        card = Card("pudnet", name, channels, image_size, half, half, 10.0, 10, config)
        with torch.random.fork_rng():  # the caller's random numbers are the caller's
            torch.manual_seed(seed)
            return cls.from_card(card, target)

    @classmethod
    def from_card(
        cls, card: Card, target: str | nn.Module | None = None, device: str | torch.device = "cpu"
    ) -> Predictor:
        """The untrained model that a card describes. Raises `UserError` for a card that describes none."""
        model, built = build_model(card, target)
        return cls(model.to(device), card, built)

    def save(self, path: str | Path) -> None:
        """Write the model and its card as .safetensors."""
        write_tensors(Path(path), self.model.state_dict(), self.card)

    def predict(self, images: np.ndarray | Tensor, labels: Sequence | np.ndarray | Tensor) -> PredictedNetwork:
        """Predict a network for labelled images, in one forward pass of the hypernetwork.

        Images are uint8 (N, H, W, C) or float (N, C, H, W) in 0..1; labels (N,) integers or strings. The first
        `support_per_class` images of each class give its centroid. Raises `UserError` for unfit input.
        """
        return self.predict_many([(images, labels)])[0]

    def predict_many(
        self, groups: Sequence[tuple[np.ndarray | Tensor, Sequence | np.ndarray | Tensor]]
    ) -> list[PredictedNetwork]:
        """`predict` for each of several groups; the hypernetwork runs once for as many as have 64 M weights."""
        networks, batch = [], max(1, WEIGHTS_AT_A_TIME // self.target.predicted)
        for first in range(0, len(groups), batch):
            prepared = [self._prepare(images, labels) for images, labels in groups[first : first + batch]]
            sketches = torch.stack([self.sketch(images, labels) for images, labels, _ in prepared])
            with torch.no_grad():
                weights = self.model.generate(sketches)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                for g, (images, labels, classes) in enumerate(prepared):
                    networks.append(self.network({n: w[g] for n, w in weights.items()}, images, labels, classes))
        return networks

    def _prepare(self, images: np.ndarray | Tensor, labels: Sequence | np.ndarray | Tensor) -> tuple:
        """What a prediction looks at: normalised images (N, C, H, W), labels (N,) and the k classes."""
        pixels = as_pixels(images, self.card)
        encoded, classes = encode_labels(labels, len(pixels))
        rows = self.rows(encoded)
        normalized = normalize(pixels[rows].to(self.device), self.mean, self.std)
        return normalized, encoded[rows].to(self.device), classes

    def rows(self, labels: Tensor) -> Tensor:
        """Rows of the images that a prediction looks at, for labels (N,) in 0..k-1."""
        for name in ("sketch_images", "calibration_images"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise UserError(f"{name}: must be an integer of at least 1, got {value!r}")
        classes = int(labels.max()) + 1
        shares = [math.ceil(count / classes) for count in (self.sketch_images, self.calibration_images)]
        return first_rows(labels, max(*shares, self.card.support_per_class))

    @torch.no_grad()
    def adapt(self, images: Tensor, labels: Tensor, classes: tuple, sketch: Tensor | None = None) -> PredictedNetwork:
        """`predict` on normalised images (N, C, H, W) and labels (N,) in 0..k-1; a given sketch replaces theirs."""
        weights = self.model.generate(self.sketch(images, labels) if sketch is None else sketch)
        return self.network(weights, images, labels, classes)

    @torch.no_grad()
    def sketch(self, images: Tensor, labels: Tensor) -> Tensor:
        """The sketch (l, m) of a group, from `sketch_images` of its normalised images (N, C, H, W).

        In fp32: to cast the extractor's weights would cost more than so few images save.
        """
        share = math.ceil(self.sketch_images / (int(labels.max()) + 1))
        with torch.autocast(self.device.type, enabled=False):
            return self.model.sketch(images[first_rows(labels, share)])

    @torch.no_grad()
    def network(self, weights: Weights, images: Tensor, labels: Tensor, classes: tuple) -> PredictedNetwork:
        """Weights -> a network in eval mode: BatchNorm calibrated, class centroids of the support images."""
        body, features, own = self.support(weights, images, labels)
        return PredictedNetwork(body, centroids(features, own, len(classes)), self.network_card(classes))

    def support_rows(self, labels: Tensor) -> Tensor:
        """Rows of the support set: the first `support_per_class` images of each class."""
        return first_rows(labels, self.card.support_per_class)

    @torch.no_grad()
    def support(self, weights: Weights, images: Tensor, labels: Tensor) -> tuple[nn.Module, Tensor, Tensor]:
        """Weights -> a calibrated network in eval mode, and the support set's features (S, d) and labels (S,)."""
        share = math.ceil(self.calibration_images / (int(labels.max()) + 1))
        chosen = first_rows(labels, share)
        body, features = self.calibrate(weights, images[chosen])
        if share < self.card.support_per_class:
            chosen = self.support_rows(labels)
            features = torch.cat([body(chunk).flatten(1) for chunk in images[chosen].split(CHUNK)])
        rows = self.support_rows(labels[chosen])
        return body, features[rows], labels[chosen][rows]

    def network_card(self, classes: tuple) -> Card:
        """The card of a network predicted by this model."""
        predicted = tuple(conv.name for conv in self.target.convs)
        return dataclasses.replace(self.card, kind="network", model=None, classes=classes, predicted=predicted)


def build_model(card: Card, target: str | nn.Module | None = None) -> tuple[PudNet | StaticTrunk, Target]:
    """The untrained model that a card describes, and its target.

    Raises `UserError` for a card that describes none, or whose target it takes a `target` to know.
    """
    built = _build_target(card, target)
    if card.kind == "static_trunk":
        return StaticTrunk(built), built
    return PudNet(parse(ModelConfig, card.model or {}, "model"), built), built


def _build_target(card: Card, target: str | nn.Module | None) -> Target:
    """The card's target. A file does not decide what is imported: a network of the user's own has to be given."""
    if target is None and is_import_path(card.target):
        raise UserError(f"target: this file is for {card.target}; give that network as `target` (--target)")
    if target is not None and target_name(target) != card.target:
        raise UserError(f"target: this file is for {card.target}, not for {target_name(target)}")
    return build_target(card.target if target is None else target, card.channels, card.image_size)


def loaded(module: nn.Module, tensors: dict[str, Tensor], path: str | Path) -> nn.Module:
    """The module with a file's tensors in it; `UserError` where they do not fit."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: its tensors do not fit its card ({reason})") from None
    return module
