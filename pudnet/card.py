"""The files of trained models and predicted networks: .safetensors with a card that says what they are."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict
from pathlib import Path

from pydantic import ConfigDict, model_validator
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from pudnet.config import Positive, PositiveFloat, parse
from pudnet.data.user_images import Label
from pudnet.errors import UserError, words
from pudnet.files import replacing
from pudnet.targets import Target, build_target, is_import_path, put_tensors, target_name

METADATA = "pudnet"  # a single key: safetensors orders several at random, which would change the file's hash
FORMAT = 2
CONTENTS = {
    "network": "a predicted network",
    "state_dict": "a state dict",
    "pudnet": "a trained PudNet",
    "static_trunk": "a trained static trunk",
}


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Card:
    """What a saved file says about its tensors."""

    kind: str  # "pudnet", "static_trunk" or a baseline: a trained model; "network": a predicted network
    target: str
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[PositiveFloat, ...]
    temperature: PositiveFloat  # tau of Eq. 6; the scale of the logits if there is a `ridge`
    support_per_class: Positive
    model: dict | None = None  # ModelConfig for kind "pudnet", a baseline's own configuration for a baseline
    sketch_images: Positive | None = None  # how many images a prediction looks at; None: as many as `model` says
    # The rest up to `labelled` is for kind "network".
    classes: tuple[Label, ...] = ()
    ridge: PositiveFloat | None = None  # the penalty, if the classifier was fitted by ridge regression
    labels_per_class: int = 0  # the first so many images of each class were used with their labels
    predicted: tuple[str, ...] = ()  # names of the target's convolution weights, in the order of the forward pass
    looked_at: tuple[str, ...] = ()  # checksums of the images that the network was predicted from or trained on
    labelled: tuple[str, ...] = ()  # the ones of these whose labels made the weights
    provenance: dict = dataclasses.field(default_factory=dict)  # setting, class split, seeds, commit, ...
    format: int = FORMAT

    @model_validator(mode="after")
    def _fits_itself(self) -> Card:
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean and std must have one value for each channel ({self.channels})")
        if len(set(map(str, self.classes))) < len(self.classes):
            raise ValueError("two classes have the same name")
        return self

    @property
    def holds(self) -> str:
        """What the file holds, in words."""
        return CONTENTS.get(self.kind, f"a trained {self.kind}")

    def json(self) -> str:
        """The card as one line of JSON; equal cards give equal lines."""
        return json.dumps(asdict(self), sort_keys=True)


def write_tensors(path: Path, tensors: dict[str, Tensor], card: Card) -> None:
    """Write tensors and their card as .safetensors, all or nothing. Equal content gives equal bytes.

    Raises `UserError` if the path cannot be written.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as partial:
        partial.write_bytes(save(plain, metadata={METADATA: card.json()}))  # `save_file` makes files others cannot read


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Card]:
    """Read what `write_tensors` wrote. Raises `UserError`, in one line, for any other file."""
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'no such file'}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        values = json.loads(metadata.get(METADATA) or "")
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a PudNet file, or a damaged one ({error})") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else None
        raise UserError(f"{path}: written in format {found}, this version reads {FORMAT}")
    return tensors, parse(Card, values, f"{path}: card")


def card_target(card: Card, target: str | nn.Module | None = None) -> Target:
    """Build the card's target. If that is a user's own network, it must be given: a file must not decide on imports."""
    if target is None and is_import_path(card.target):
        raise UserError(f"target: this file is for {card.target}; give that network as `target` (--target)")
    if target is not None and target_name(target) != card.target:
        raise UserError(f"target: this file is for {card.target}, not for {target_name(target)}")
    return build_target(card.target if target is None else target, card.channels, card.image_size)


def loaded(module: nn.Module, tensors: dict[str, Tensor], path: str | Path) -> nn.Module:
    """Load a file's tensors into a module, and return it; `UserError` if they do not fit."""
    try:
        put_tensors(module, tensors)
    except RuntimeError as error:
        reason = words(error, 200)
        raise UserError(f"{path}: its tensors do not fit its card ({reason})") from None
    return module
