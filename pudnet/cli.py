"""The command `pudnet`: weights for a folder of images, and what to do with them."""

from __future__ import annotations

import argparse
import csv
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pudnet.errors import UnreadableImage, UserError, exit_code
from pudnet.files import check_writable, replacing
from pudnet.locations import local_file, shipped

if TYPE_CHECKING:
    from pudnet.card import Card
    from pudnet.data.user_images import ImageSet
    from pudnet.network import PredictedNetwork

OTHER_FORMATS = {".pt", ".pth", ".pt2", ".bin", ".ckpt", ".onnx"}  # endings that promise another format

# Each command imports what is slow to import (torch) itself, so that --help is quick.


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Exit codes: 0 success; 1 a failed run; 2 a mistake in usage or input. Errors are one line."""
    options = _parser().parse_args(arguments)
    if getattr(options, "target", None):
        sys.path.insert(0, "")  # find the user's own network in the current folder, as `python -m` does
    for said in ("images of .* as the model's training data", "files passed over"):  # the commands print these
        warnings.filterwarnings("ignore", message=said)
    return exit_code(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    try:
        options.run(options)
    except UnreadableImage as error:
        raise UserError(f"{error}, or leave such files out with --skip-bad") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("pudnet", description="Predict a network's weights for a folder of images.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    predict = commands.add_parser("predict", help="images, with one subfolder for each class -> a network's weights")
    predict.add_argument(
        "--model",
        default="cifar100-convnet3",
        help=f"a trained model: a file, the name of one that ships with the project ({', '.join(shipped())}; default: "
        "%(default)s), or an MLflow URI (models:/NAME/VERSION, runs:/ID/model)",
    )
    _add_data(predict, "a folder with one subfolder of images for each class")
    predict.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    support = (
        "use at least N images of each class (default: 10, as in training); the paper's PudNet makes its classifier "
        "from these alone"
    )
    predict.add_argument("--support", type=int, metavar="N", help=support)
    sketch = (
        "use N images in all, but at least --support of each class (default: up to 1,000 for the models that ship, "
        "else as many as the model's card says)"
    )
    predict.add_argument("--sketch", type=int, metavar="N", help=sketch)
    _add_target(predict)
    predict.set_defaults(run=_predict)

    classify = commands.add_parser("classify", help="weights and images -> a class for each image")
    _add_weights(classify)
    _add_data(classify, "a folder of images, with or without one subfolder for each class")
    classify.add_argument("--out", type=Path, help="write each file, its class and, if known, its true label as CSV")
    classify.set_defaults(run=_classify)

    finetune = commands.add_parser("finetune", help="train predicted weights further, and random ones to compare")
    _add_weights(finetune)
    _add_data(finetune, "a folder with one subfolder of images for each class")
    finetune.add_argument("--epochs", type=int, default=10, help="(%(default)s)")
    finetune.add_argument("--learning-rate", type=float, default=3e-3, help="its highest value (%(default)s)")
    finetune.add_argument("--held-out", type=float, default=0.2, help="share of each class to test on (%(default)s)")
    finetune.add_argument(
        "--augment",
        default="shift",
        help="how training images are changed at random: none, shift, or, for photographs, shift_mirror (%(default)s)",
    )
    finetune.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    finetune.add_argument("--curve", type=Path, help="write both runs' loss and accuracy by epoch as CSV")
    finetune.set_defaults(run=_finetune)

    export = commands.add_parser("export", help="weights -> ONNX, torch.export or the plain target's state dict")
    _add_weights(export)
    export.add_argument("--out", type=Path, required=True, help="a file that ends in .onnx, .pt2 or .safetensors")
    export.set_defaults(run=_export)

    info = commands.add_parser("info", help="print what a model or weights file says about itself")
    info.add_argument("file", help="a file, or anything that `predict --model` takes")
    info.set_defaults(run=_info)
    return parser


def _add_weights(command: argparse.ArgumentParser) -> None:
    command.add_argument("--weights", required=True, help="a file that `predict` wrote, or its URI in MLflow")
    _add_target(command)


def _add_data(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("--data", type=Path, required=True, help=what)
    command.add_argument("--skip-bad", action="store_true", help="leave out files that cannot be read, and count them")


def _add_target(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--target", help="if the file is for a network of your own: that network, as package.module:Name"
    )


def _predict(options: argparse.Namespace) -> None:
    from pudnet.data.user_images import open_folder
    from pudnet.predictor import Predictor

    _check_ending(options.out)
    if options.out.exists():  # else --model is the name of a model that ships, if it is the same
        _check_other(options.out, options.model)
    predictor = Predictor.load(options.model, target=options.target)
    if options.support is not None:
        predictor.support_per_class = options.support
    if options.sketch is not None:
        predictor.sketch_images = options.sketch
    card = predictor.card
    check_writable(options.out)
    images = open_folder(options.data, card, options.skip_bad)
    network = predictor.predict(images)
    network.save(options.out)
    print(
        f"{options.out}: {network.card.target} for {len(network.classes)} classes, predicted from "
        f"{_looked_at(network)} of {images.count} images{_as_trained(card)}{_left_out(images)}"
    )


def _classify(options: argparse.Namespace) -> None:
    from pudnet.data.folders import one_form
    from pudnet.data.user_images import noting, open_folder
    from pudnet.network import PredictedNetwork

    _check_other(options.out, options.weights)
    network = PredictedNetwork.load(options.weights, options.target)
    if options.out:
        check_writable(options.out)
    images = open_folder(options.data, network.card, options.skip_bad)
    known = set(map(one_form, network.classes))
    seen: dict[int, str] = {}
    found = [one_form(label) for label in network.classify(noting(images, seen))]
    labels = [label or "" for label in images.labels or [""] * images.count]
    strange = [label for label in labels if label and label not in known]
    rows = list(zip(map(str, images.files), found, labels, strict=True))
    if options.out:
        _write_csv(options.out, ("file", "class", "label"), rows)
    right = [predicted == label for predicted, label in zip(found, labels, strict=True) if label in known]
    accuracy = ""
    if right:
        accuracy = f", accuracy {_accuracy(100 * sum(right) / len(right), len(right))} of {len(right)} labelled"
    looked_at = set(network.card.looked_at)
    again = sum(checksum in looked_at for checksum in seen.values())
    print(
        f"{len(rows)} images{_as_trained(network.card)}{accuracy}{_strange(strange)}{_again(again)}{_left_out(images)}"
    )


def _finetune(options: argparse.Namespace) -> None:
    from dataclasses import astuple, fields

    from pudnet.data.user_images import open_folder
    from pudnet.finetune import Epoch, finetune
    from pudnet.network import PredictedNetwork

    _check_ending(options.out)
    _check_other(options.curve, options.weights)
    _check_other(options.curve, options.out)
    network = PredictedNetwork.load(options.weights, options.target)
    for path in (options.out, options.curve):
        if path:
            check_writable(path)
    images = open_folder(options.data, network.card, options.skip_bad)
    found = finetune(
        network, images, None, options.epochs, options.held_out, options.learning_rate, augment=options.augment
    )
    found.network.save(options.out)
    if options.curve:
        _write_csv(options.curve, [field.name for field in fields(Epoch)], [astuple(point) for point in found.curve])
    for start in ("predicted", "random"):
        points = [point for point in found.curve if point.start == start]
        before, after = (_accuracy(point.accuracy, found.held_out) for point in (points[0], points[-1]))
        print(f"from {start} weights: {before} -> {after}")
    print(
        f"{options.out}: trained on {found.trained_on} images{_as_trained(network.card)}, accuracies on "
        f"{found.held_out} others{_left_out(images)}"
    )


def _export(options: argparse.Namespace) -> None:
    from pudnet.network import PredictedNetwork

    _check_other(options.out, options.weights)
    network = PredictedNetwork.load(options.weights, options.target)
    network.export(options.out)
    print(f"{options.out}: gives the same logits as {options.weights}")


def _info(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    import yaml

    from pudnet.card import read_tensors

    tensors, card = read_tensors(local_file(options.file))
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(card).items()}
    values |= {key: f"{len(getattr(card, key))} images, by their checksums" for key in ("looked_at", "labelled")}
    print(yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip())
    print(f"tensors: {len(tensors)}, {sum(t.numel() for t in tensors.values()):,} numbers")


def _check_ending(path: Path) -> None:
    """Raise `UserError` if a file that is written as .safetensors has the ending of another format."""
    if path.suffix.lower() in OTHER_FORMATS:
        raise UserError(
            f"{path}: this command writes .safetensors, so give that ending; `pudnet export` makes .onnx and .pt2 of it"
        )


def _check_other(path: Path | None, other: str | Path) -> None:
    """Raise `UserError` if a file that is to be written is `other`, which the command reads or writes, too."""
    if path is not None and path.resolve() == Path(other).resolve():
        raise UserError(f"{path}: this command would write it over another of its files; give another name")


def _looked_at(network: PredictedNetwork) -> int:
    """How many images a prediction used. Sketch, calibration and support overlap: each takes a class's first images."""
    return max(network.card.provenance[f"{use}_images"] for use in ("sketch", "calibration", "support"))


def _accuracy(percent: float, images: int) -> str:
    from pudnet.evaluation import wilson_interval

    low, high = wilson_interval(percent, images)
    return f"{percent:.2f} % (95% interval: {low:.1f} to {high:.1f})"


def _strange(labels: Sequence[str]) -> str:
    """What to say of images in folders that have the name of no class of the network."""
    if not labels:
        return ""
    names = sorted(set(labels))
    first = ", ".join(names[:5]) + ", ..." * (len(names) > 5)
    return f"; {len(labels)} are in folders that are none of its classes ({first})"


def _again(count: int) -> str:
    return f"; {count} of them are images that the weights were made from: for an accuracy, give new ones" * (count > 0)


def _as_trained(card: Card) -> str:
    colour = "grey" if card.channels == 1 else "colour"
    return f" (made {card.image_size}x{card.image_size} px, {colour}, as the model's training data was)"


def _left_out(images: ImageSet) -> str:
    from pudnet.data.folders import by_type

    bad, others = images.skipped, images.passed_over
    said = f"; {len(bad)} file(s) that cannot be read were left out, the first {bad[0]}" if bad else ""
    return said + (f"; passed over, since their type is not read: {by_type(others)}" if others else "")


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence]) -> None:
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows([header, *rows])


if __name__ == "__main__":
    sys.exit(main())
