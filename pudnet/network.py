"""A network whose weights were predicted: what a user classifies with, keeps and deploys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from pudnet.card import Card, card_target, loaded, read_tensors, write_tensors
from pudnet.classifier import unfilled
from pudnet.data.images import normalize
from pudnet.data.own import Images, ImageSet, Label, image_set, images_at_a_time
from pudnet.errors import UserError
from pudnet.locations import local_file


@torch.no_grad()
def features_in_parts(body: nn.Module, images: Tensor) -> Tensor:
    """A network's output (N, d) for normalised images (N, C, H, W), so many at a time as fit in memory."""
    return torch.cat([body(part).flatten(1) for part in images.split(images_at_a_time(images.shape[-1]))])


class PredictedNetwork(nn.Module):
    """A target network with predicted weights and a classifier (features (N, d) -> logits (N, k)), in eval mode.

    Images are whatever `Predictor.predict` takes; they pass through a part at a time.
    """

    def __init__(self, body: nn.Module, classifier: nn.Module, card: Card) -> None:
        super().__init__()
        self.body, self.classifier, self.card = body, classifier, card
        device = next(classifier.parameters()).device
        mean, std = (torch.tensor(values, device=device) for values in (card.mean, card.std))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.eval()

    @property
    def classes(self) -> tuple[Label, ...]:
        """The labels that the columns of the logits stand for."""
        return self.card.classes

    def normalize(self, images: Images | ImageSet) -> Tensor:
        """What the target itself is fed: uint8 (N, H, W, C) or 0..1 float (N, C, H, W) -> (N, C, H, W) of its dtype."""
        return torch.cat(list(self._chunks(images)))

    def features(self, images: Images | ImageSet) -> Tensor:
        """The target's output, (N, d), for images as `normalize` takes them."""
        return torch.cat([self._features(chunk) for chunk in self._chunks(images)])

    def forward(self, images: Images | ImageSet) -> Tensor:
        """Logits (N, k): tau times the cosine to each class's centroid (Eq. 6), or what was solved for."""
        return torch.cat([self._logits(chunk) for chunk in self._chunks(images)])

    def classify(self, images: Images | ImageSet) -> list[Label]:
        """The class of each image."""
        columns = [self._logits(chunk).argmax(1) for chunk in self._chunks(images)]
        return [self.classes[column] for column in torch.cat(columns).tolist()]

    def logits(self, normalized: Tensor) -> Tensor:
        """`forward` on images (N, C, H, W) that are normalised already."""
        return self.classifier(features_in_parts(self.body, normalized.to(self._dtype)))

    @property
    def _dtype(self) -> torch.dtype:
        """Of the body: another one after `half()`, `bfloat16()` or `double()`."""
        return next(self.body.parameters()).dtype

    @torch.no_grad()
    def _features(self, normalized: Tensor) -> Tensor:
        return self.body(normalized).flatten(1)

    @torch.no_grad()
    def _logits(self, normalized: Tensor) -> Tensor:
        return self.classifier(self._features(normalized))

    def _chunks(self, images: Images | ImageSet) -> Iterator[Tensor]:
        for pixels in image_set(images, self.card).chunks(images_at_a_time(self.card.image_size)):
            yield normalize(pixels.to(self.mean.device), self.mean.float(), self.std.float()).to(self._dtype)

    def target_state_dict(self) -> dict[str, Tensor]:
        """The state dict of the plain target network, running statistics and layers' versions included."""
        return self.body.state_dict()

    def save(self, path: str | Path) -> None:
        """Write the plain target's tensors, the classifier's and the card as .safetensors."""
        write_tensors(Path(path), {**self.target_state_dict(), **self.classifier.state_dict()}, self.card)

    def export(self, path: str | Path) -> None:
        """Write for use without this library, by suffix: .onnx, .pt2 or .safetensors (`pudnet.export`)."""
        from pudnet.export import export  # here: ONNX is needed for this alone

        export(self.body, self.classifier, self.card, Path(path))

    @classmethod
    def load(cls, path: str | Path, target: str | nn.Module | None = None) -> PredictedNetwork:
        """Read a network that `save` wrote; `UserError` for another file.

        `path` may be a URI, and a `target` may be needed, as for `Predictor.load`.
        """
        tensors, card = read_tensors(local_file(path))
        if card.kind != "network":
            raise UserError(f"{path}: holds a {card.kind}, not a predicted network (`pudnet predict` makes one)")
        with torch.random.fork_rng(devices=[]):
            built = card_target(card, target)
        classifier = unfilled(card, built.features)
        own = {name: tensors.pop(name) for name in classifier.state_dict() if name in tensors}
        return cls(loaded(built.network, tensors, path), loaded(classifier, own, path), card)


class Classifier:
    """A network in eval mode and a rule that turns its features into logits: what other methods make of a group."""

    def __init__(self, body: nn.Module, rule: Callable[[Tensor], Tensor]) -> None:
        self.body, self.rule = body, rule

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Normalised images (N, C, H, W) -> logits (N, k)."""
        features = features_in_parts(self.body, images)
        with torch.autocast(images.device.type, enabled=False):
            return self.rule(features.float())
