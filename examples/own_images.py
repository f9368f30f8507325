"""A network for a folder of images in one call: predict it, classify new images, look at filters and mistakes.

    python examples/own_images.py --data photos/ --new new_photos/ --out example/

`--data` has a subfolder of images for each class; `--new` has other images, in such subfolders or not. Without `--new`,
the images of `--data` are classified, and then the accuracy says little. Without both, scikit-learn's handwritten
digits are written out as such folders first (five classes, 20 images of each to predict from).
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, no window

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import ConfusionMatrixDisplay

from pudnet import PredictedNetwork, Predictor
from pudnet.data.user_images import open_folder
from pudnet.errors import exit_code
from pudnet.files import check_writable

FILTERS = 64  # of the last layer that are drawn


def main() -> None:
    """Predict, classify, plot; everything is written to the folder `--out`."""
    warnings.formatwarning = lambda message, *where, **line: f"{message}\n"
    options = parse_arguments()
    check_writable(options.out / "weights.safetensors")
    data, new = options.data, options.new
    if data is None:
        data, new = write_digits(options.out / "digits")

    predictor = Predictor.load(options.model)
    start = time.perf_counter()
    network = predictor.predict(data)
    milliseconds = 1000 * (time.perf_counter() - start)
    classes = ", ".join(map(str, network.classes))
    print(f"predicted {network.card.target} for {classes} in {milliseconds:.0f} ms, images read from disk")
    network.save(options.out / "weights.safetensors")
    plot_filters(network, options.out / "filters.png")

    images = open_folder(new or data, network.card)
    found = network.classify(images)
    pairs = [pair for pair in zip(images.labels or [], found, strict=False) if pair[0] in network.classes]
    print(f"classified {images.count} images of {new or data}, {len(pairs)} of them of a known class")
    if pairs:
        print(f"{100 * np.mean([truth == label for truth, label in pairs]):.1f} % right")
        plot_confusion(pairs, network, options.out / "confusion.png")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="cifar100-convnet3", help="as for `pudnet predict` (%(default)s)")
    parser.add_argument("--data", type=Path, help="images to predict from, a subfolder for each class")
    parser.add_argument("--new", type=Path, help="other images to classify; else those of --data")
    parser.add_argument("--out", type=Path, default=Path("example"), help="folder to write to (%(default)s)")
    options = parser.parse_args()
    if options.new and not options.data:
        parser.error("--new needs --data, the images to predict from")
    return options


def write_digits(folder: Path) -> tuple[Path, Path]:
    """The digits 0 to 4 as PNG files, a subfolder for each: folders `data` (20 of each) and `new` (the others)."""
    digits = load_digits(n_class=5)
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    for digit in range(5):
        for place, row in enumerate(np.flatnonzero(digits.target == digit)):
            file = folder / ("data" if place < 20 else "new") / f"digit {digit}" / f"{row:04}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[row]).resize((32, 32)).save(file)
    return folder / "data", folder / "new"


def plot_filters(network: PredictedNetwork, path: Path) -> None:
    """The last layer's kernels, the mean over their input channels."""
    kernels = network.target_state_dict()[network.card.predicted[-1]][:FILTERS].mean(1)  # (d, f, f)
    low, high = kernels.amin((1, 2), True), kernels.amax((1, 2), True)
    kernels = ((kernels - low) / (high - low)).numpy()
    figure, axes = plt.subplots(4, FILTERS // 4, figsize=(FILTERS // 8, 2.4))
    for axis in axes.flat:
        axis.axis("off")
    for axis, kernel in zip(axes.flat, kernels, strict=False):
        axis.imshow(kernel, cmap="gray")
    figure.suptitle(f"Kernels of {network.card.predicted[-1]}, mean over input channels")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def plot_confusion(pairs: list[tuple[str, str]], network: PredictedNetwork, path: Path) -> None:
    """Which class was taken for which."""
    truth, found = zip(*pairs, strict=True)
    figure, axis = plt.subplots(figsize=(1.5 + 0.6 * len(network.classes),) * 2)
    ConfusionMatrixDisplay.from_predictions(
        truth, found, labels=list(network.classes), xticks_rotation="vertical", colorbar=False, ax=axis
    )
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(exit_code(main))
