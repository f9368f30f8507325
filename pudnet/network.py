"""A network with predicted weights, which a user classifies with, saves and deploys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from pudnet.card import Card, card_target, loaded, read_tensors, write_tensors
from pudnet.classifier import unfilled
from pudnet.data.images import normalize
from pudnet.data.user_images import Images, ImageSet, Label, image_set, images_at_a_time
from pudnet.device import full_precision
from pudnet.errors import UserError
from pudnet.locations import local_file


@torch.no_grad()
def features_in_parts(body: nn.Module, images: Tensor) -> Tensor:
    """A network's output (N, d) for normalised images (N, C, H, W), in batches that fit in memory."""
    return torch.cat([body(part).flatten(1) for part in images.split(images_at_a_time(images.shape[-1]))])


class PredictedNetwork(nn.Module):
    """A target network with predicted weights and a classifier (features (N, d) -> logits (N, k)), in eval mode.

    It takes the same kinds of images as `Predictor.predict`, and processes them in batches. Its weights are its own and
    ask for no gradient, and its methods give none: to train it, call `network.body.requires_grad_(True)`, and then
    `network.body` and `network.classifier` on what `network.normalize(images)` gives.
    """

    def __init__(self, body: nn.Module, classifier: nn.Module, card: Card) -> None:
        super().__init__()
        self.body, self.classifier, self.card = body, classifier, card
        device = next(classifier.parameters()).device
        mean, std = (torch.tensor(values, dtype=torch.float32, device=device) for values in (card.mean, card.std))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.eval().requires_grad_(False)

    @property
    def classes(self) -> tuple[Label, ...]:
        """The label of each column of the logits."""
        return self.card.classes

    def normalize(self, images: Images | ImageSet) -> Tensor:
        """Normalise images for the target: uint8 (N, H, W, C) or 0..1 float (N, C, H, W) -> (N, C, H, W), its dtype."""
        return torch.cat(list(self._chunks(images)))

    def features(self, images: Images | ImageSet) -> Tensor:
        """The target's features (N, d) for images that are not normalised yet."""
        return torch.cat([features_in_parts(self.body, chunk) for chunk in self._chunks(images)])

    def forward(self, images: Images | ImageSet) -> Tensor:
        """Logits (N, k): tau times the cosine to each class's centroid (Eq. 6), or those of a fitted linear layer."""
        return torch.cat([self.logits(chunk) for chunk in self._chunks(images)])

    def classify(self, images: Images | ImageSet) -> list[Label]:
        """The class of each image."""
        return [self.classes[column] for column in self(images).argmax(1).tolist()]

    @torch.no_grad()
    def logits(self, normalized: Tensor) -> Tensor:
        """`forward` on images (N, C, H, W) that are normalised already."""
        return self.classifier(features_in_parts(self.body, normalized.to(self._dtype)))

    @property
    def _dtype(self) -> torch.dtype:
        """The body's dtype, which `half()`, `bfloat16()` and `double()` change."""
        return next(self.body.parameters()).dtype

    def _chunks(self, images: Images | ImageSet) -> Iterator[Tensor]:
        for pixels in image_set(images, self.card).chunks(images_at_a_time(self.card.image_size)):
            yield normalize(pixels.to(self.mean.device), self.mean.float(), self.std.float()).to(self._dtype)

    def target_state_dict(self) -> dict[str, Tensor]:
        """The state dict of the plain target network, with running statistics and the versions of its layers."""
        return self.body.state_dict()

    def save(self, path: str | Path) -> None:
        """Write the tensors of the target and of the classifier, and the card, as .safetensors."""
        write_tensors(Path(path), {**self.target_state_dict(), **self.classifier.state_dict()}, self.card)

    def export(self, path: str | Path) -> None:
        """Write the network for use without this library, as .onnx, .pt2 or .safetensors (`pudnet.export`)."""
        from pudnet.export import export  # here: only an export needs ONNX

        export(self.body, self.classifier, self.card, Path(path))

    @classmethod
    def load(cls, path: str | Path, target: str | nn.Module | None = None) -> PredictedNetwork:
        """Read a network that `save` wrote; `UserError` for any other file.

        As in `Predictor.load`, `path` may be a URI, and a network of your own must be given as `target`.
        """
        tensors, card = read_tensors(local_file(path))
        if card.kind != "network":
            raise UserError(f"{path}: holds {card.holds}, not a predicted network (`pudnet predict` makes one)")
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # whatever the caller's default is
            built = card_target(card, target)
            classifier = unfilled(card, built.features).float()
        own = {name: tensors.pop(name) for name in classifier.state_dict() if name in tensors}
        return cls(loaded(built.network, tensors, path), loaded(classifier, own, path), card)


class Classifier:
    """A network in eval mode and a rule from features to logits: what a baseline makes from a group."""

    def __init__(self, body: nn.Module, rule: Callable[[Tensor], Tensor]) -> None:
        self.body, self.rule = body, rule

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Normalised images (N, C, H, W) -> logits (N, k)."""
        features = features_in_parts(self.body, images)
        with full_precision(images.device):
            return self.rule(features.float())
