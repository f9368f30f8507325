"""Exports a predicted network for use without this library: ONNX, `torch.export`, or the target's state dict."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from pudnet.card import METADATA, Card, loaded, write_tensors
from pudnet.cpu import plain_layers
from pudnet.errors import RunFailed, UserError, one_line
from pudnet.files import replacing

LARGEST_DIFFERENCE = 1e-3  # between exported and original logits, which are about ten at most
CHECKED_IMAGES = 4
FOR_ONNX = ("onnx", "onnxscript", "onnxruntime")


class ReadyClassifier(nn.Module):
    """Normalisation, target network and classifier in one module, on the CPU and in fp32.

    Float images (N, C, H, W) in 0..1, of the model's size -> logits (N, k).
    """

    def __init__(self, body: nn.Module, classifier: nn.Module, card: Card) -> None:
        super().__init__()
        self.body, self.classifier = (copy.deepcopy(part).cpu().float() for part in (body, classifier))
        self.card = card
        self.register_buffer("mean", torch.tensor(card.mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(card.std, dtype=torch.float32).view(-1, 1, 1))
        self.eval()

    def plain(self) -> ReadyClassifier:
        """The same network in standard layers, for which every runtime has fast kernels."""
        same = copy.deepcopy(self)
        plain_layers(same.body)
        same.classifier = same.classifier.plain()
        return same

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, k)."""
        features = self.body((images - self.mean) / self.std).flatten(1)
        return self.classifier(features)


def export(body: nn.Module, classifier: nn.Module, card: Card, path: Path) -> None:
    """Write a predicted network in the format of the path's suffix, after checking that it gives the same logits.

    `.onnx`: the ready classifier, with its card in the file's metadata. `.pt2`: the same as a `torch.export`
    program, with its card in the extra file `pudnet.json`. `.safetensors`: the plain target's state dict.

    Raises:
        UserError: if the suffix is another one, the path cannot be written, or what ONNX needs is not installed.
        RunFailed: if the network cannot be exported, or its export gives other logits.
    """
    writers = {".onnx": _write_onnx, ".pt2": _write_program, ".safetensors": _write_state}
    if path.suffix not in writers:
        raise UserError(f"{path}: exports end in {', '.join(writers)}")
    if path.suffix == ".onnx" and (missing := [name for name in FOR_ONNX if not find_spec(name)]):
        raise UserError(f"{path}: first run `pip install {' '.join(missing)}`, or export as .pt2")
    own = ReadyClassifier(body, classifier, card)
    shape = (CHECKED_IMAGES, card.channels, card.image_size, card.image_size)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    with replacing(path) as partial, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' warnings do not help the user
        try:
            exported = writers[path.suffix](own, partial, images)
        except (OSError, UserError):
            raise
        except Exception as error:  # torch's exporters raise many types of error for users' own networks
            raise RunFailed(f"{path}: this network cannot be exported in this format ({one_line(error)})") from None
        with torch.no_grad():  # on the CPU: a GPU's convolutions round more (TF32)
            # Another batch size than the exporter saw, to check that it was not fixed.
            difference = (exported(images[1:]) - own(images[1:])).abs().max().item()
        if not difference <= LARGEST_DIFFERENCE:
            raise RunFailed(f"{path}: the exported network's logits differ by {difference:.2g}; nothing was written")


def _write_onnx(own: ReadyClassifier, path: Path, images: Tensor) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    batch = {0: torch.export.Dim("batch")}
    names = {"input_names": ["images"], "output_names": ["logits"]}
    program = torch.onnx.export(own.plain(), (images,), dynamo=True, dynamic_shapes=(batch,), verbose=False, **names)
    program.model.metadata_props[METADATA] = own.card.json()
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda other: torch.from_numpy(session.run(None, {"images": other.numpy()})[0])


def _write_program(own: ReadyClassifier, path: Path, images: Tensor) -> Callable[[Tensor], Tensor]:
    program = torch.export.export(own.plain(), (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    extra = {f"{METADATA}.json": own.card.json()}
    with path.open("wb") as file:  # torch refuses a path that does not end in .pt2, as the temporary one
        torch.export.save(program, file, extra_files=extra)
    with path.open("rb") as file:
        return torch.export.load(file).module()


def _write_state(own: ReadyClassifier, path: Path, images: Tensor) -> Callable[[Tensor], Tensor]:
    from safetensors.torch import load_file

    write_tensors(path, own.body.state_dict(), dataclasses.replace(own.card, kind="state_dict"))
    again = copy.deepcopy(own)
    loaded(again.body, load_file(path), path)
    return again
