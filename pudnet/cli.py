"""The command `pudnet`: weights for a folder of images, and what to do with them."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import numpy as np

from pudnet.errors import RunFailed, UserError


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Exit codes: 0; 1 a failed run; 2 a mistake in usage or input, said in one line."""
    options = _parser().parse_args(arguments)
    if getattr(options, "target", None):
        sys.path.insert(0, "")  # a network of the user's own is looked for where they are, as by `python -m`
    try:
        options.run(options)
    except UserError as error:
        return _say(error, 2)
    except RunFailed as error:
        return _say(error, 1)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("pudnet", description="Predict a network's weights for a folder of images.")
    commands = parser.add_subparsers(required=True)
    predict = commands.add_parser("predict", help="images, a subfolder a class -> a network's weights")
    predict.add_argument("--model", type=Path, required=True, help="a trained model, as models/pudnet.safetensors")
    predict.add_argument("--data", type=Path, required=True, help="a folder with a subfolder of images a class")
    predict.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    _add_target(predict)
    predict.set_defaults(run=_predict)
    classify = commands.add_parser("classify", help="weights and images -> a class for each image")
    classify.add_argument("--weights", type=Path, required=True, help="a file that `predict` wrote")
    classify.add_argument("--data", type=Path, required=True, help="a folder of images, or with a subfolder a class")
    classify.add_argument("--out", type=Path, help="write file, class and, where known, the true label as CSV")
    _add_target(classify)
    classify.set_defaults(run=_classify)
    info = commands.add_parser("info", help="what a model or weights file says of itself")
    info.add_argument("file", type=Path)
    info.set_defaults(run=_info)
    return parser


def _add_target(command: argparse.ArgumentParser) -> None:
    command.add_argument("--target", help="for a file of a network of your own: that network, as package.module:Name")


def _say(message: object, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def _predict(options: argparse.Namespace) -> None:
    from pudnet.data.sources import open_source
    from pudnet.predictor import Predictor

    predictor = Predictor.load(options.model, target=options.target)
    card = predictor.card
    source = open_source(f"folder:{options.data}", Path("data/raw"), card.image_size, card.channels)
    images = np.concatenate(list(source.batches()))
    network = predictor.predict(images, np.array(source.class_names)[source.labels])
    network.save(options.out)
    print(
        f"{options.out}: {card.target} for {len(network.classes)} classes, predicted from {len(images)} images "
        f"({card.image_size}x{card.image_size} px, {card.channels} channel(s), as the model's training data)"
    )


def _classify(options: argparse.Namespace) -> None:
    from pudnet.data.sources import image_files, read_image
    from pudnet.predictor import PredictedNetwork

    network = PredictedNetwork.load(options.weights, options.target)
    card = network.card
    files = image_files(options.data)
    rows = []
    for start in range(0, len(files), 256):
        chunk = files[start : start + 256]
        images = np.stack([read_image(file, card.image_size, card.channels) for file in chunk])
        columns = network(images).argmax(1).tolist()
        rows += [
            (str(file), card.classes[column], _truth(file.relative_to(options.data), card.classes))
            for file, column in zip(chunk, columns, strict=True)
        ]
    if options.out:
        _write_csv(options.out, rows)
    known = [predicted == truth for _, predicted, truth in rows if truth]
    print(
        f"{len(rows)} images" + (f", accuracy {100 * np.mean(known):.2f} % of {len(known)} labelled" if known else "")
    )


def _truth(file: Path, classes: tuple) -> str:
    """The label that an image's top folder gives it, empty where the folder is none of the classes."""
    return file.parts[0] if len(file.parts) > 1 and file.parts[0] in classes else ""


def _write_csv(path: Path, rows: list[tuple[str, str, str]]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", newline="") as file:
            csv.writer(file).writerows([("file", "class", "label"), *rows])
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error})") from None


def _info(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    import yaml

    from pudnet.predictor import read_tensors

    tensors, card = read_tensors(options.file)
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(card).items()}
    print(yaml.safe_dump(values, sort_keys=False).rstrip())
    print(f"tensors: {len(tensors)}, {sum(t.numel() for t in tensors.values()):,} numbers")


if __name__ == "__main__":
    sys.exit(main())
