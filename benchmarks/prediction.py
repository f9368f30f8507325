"""What a prediction costs, from 500 images in memory to a network in eval mode: `python -m benchmarks.prediction`.

With a trained model (`models/pudnet.safetensors` and its data, as `dvc repro` leaves them) also what it saves:
training from scratch to the same accuracy, and how accuracy depends on how many images are looked at.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median

import numpy as np
import torch
from rich.console import Console
from rich.table import Column, Table

from benchmarks.data import CHANNELS, SIZE, make_groups, make_images
from benchmarks.floors import synchronize
from benchmarks.training import peak_rss
from pudnet.data.groups import open_groups
from pudnet.data.images import StoreImages
from pudnet.data.store import open_store
from pudnet.device import wants_bf16
from pudnet.evaluation import (
    FROM,
    ON,
    block_labels,
    mean_interval,
    scratch_network,
    time_prediction,
    train_epoch,
    twin_accuracies,
)
from pudnet.predictor import Predictor

TARGETS = ("convnet3", "resnet18", "resnet34")
SEVERAL = 16  # groups in one call
COUNTS = (10, 25, 50, 100, 250, 500)  # images looked at


def on_device(target: str, device: torch.device) -> Predictor:
    """An untrained predictor: speed does not depend on training."""
    untrained = Predictor.untrained(target, CHANNELS, SIZE)
    return Predictor(untrained.model.to(device), untrained.card, untrained.target)


def measure(target: str, images: StoreImages, repeats: int) -> dict[str, object]:
    """One target's row: the parts of a prediction, an epoch from scratch, one call and several groups in one call."""
    predictor = on_device(target, images.device)
    bf16 = wants_bf16("auto", images.device)
    parts = time_prediction(predictor, images, make_groups(repeats), bf16)
    groups = [(images.raw(group), images.labels[group]) for group in make_groups(SEVERAL)]
    singles, together = take_turns(
        [lambda: [predictor.predict(*group) for group in groups], lambda: predictor.predict_many(groups)],
        images.device,
        max(2, repeats // 8),
    )
    return {
        "target": target,
        "weights": predictor.target.predicted,
        "parts": asdict(parts),
        "one_call_ms": singles / SEVERAL,
        "several_ms_a_group": together / SEVERAL,
        "peak_memory_mb": _peak_memory(target),
    }


def take_turns(versions: list[Callable[[], object]], device: torch.device, rounds: int) -> list[float]:
    """Median milliseconds of each version, in turns after one round of warm-up."""
    times: list[list[float]] = [[] for _ in versions]
    for _ in range(1 + rounds):
        for version, row in zip(versions, times, strict=True):
            start = time.perf_counter()
            version()
            synchronize(device)
            row.append(1000 * (time.perf_counter() - start))
    return [median(row[1:]) for row in times]


def _peak_memory(target: str) -> float:
    command = [sys.executable, "-m", "benchmarks.prediction", "--memory", target]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _measure_memory(target: str) -> None:
    """Peak memory (MB) of a process that predicts three networks."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    predictor, images = on_device(target, device), make_images(device)
    for group in make_groups(3):
        predictor.predict(images.raw(group), images.labels[group])
    print(torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else peak_rss())


# With a trained model


def measure_trained(model: Path, data: Path, groups: int, epochs: int) -> dict[str, object]:
    """What a trained model's predictions save, and how few images they need."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    predictor = Predictor.load(model, device)
    images = StoreImages(open_store(data / "prepared" / "train", verify=False), device)
    split_seed = predictor.card.provenance["split_seed"]
    table = open_groups(data / "groups" / f"split-{split_seed}")[1]["test"]
    return {
        "model": {k: predictor.card.provenance.get(k) for k in ("setting", "train_groups", "split_seed")},
        "target": predictor.card.target,
        "scratch": [_to_same_accuracy(predictor, images, pair, epochs) for pair in table[: max(3, groups // 10)]],
        "images": _accuracy_by_images(predictor, images, table[:groups]),
    }


def _accuracy_by_images(predictor: Predictor, images: StoreImages, table: np.ndarray) -> list[dict[str, object]]:
    """Accuracy with few images for the sketch, or for calibration, less that with all: paired over test groups."""
    everything = table.shape[-1]
    bf16, counts = wants_bf16("auto", images.device), [count for count in COUNTS if count < everything]
    cells = [("sketch", n, everything) for n in counts] + [("calibration", everything, n) for n in counts]
    cells += [("both", n, n) for n in counts]
    predictor.sketch_images = predictor.calibration_images = everything
    full, rows = twin_accuracies(predictor, images, table, bf16), []
    for what, predictor.sketch_images, predictor.calibration_images in cells:
        difference, half = mean_interval(twin_accuracies(predictor, images, table, bf16) - full)
        count = min(predictor.sketch_images, predictor.calibration_images)
        rows.append({"few_for": what, "images": count, "difference": difference, "ci95": half, "groups": len(table)})
    return rows


def _to_same_accuracy(predictor: Predictor, images: StoreImages, pair: np.ndarray, epochs: int) -> dict[str, object]:
    """Seconds that Adam takes from scratch to a predicted network's accuracy on the twin; None: not in `epochs`."""
    bf16 = wants_bf16("auto", images.device)
    wanted = twin_accuracies(predictor, images, pair[None], bf16)[0]
    (labels, _), (truth, _) = (block_labels(images, indices) for indices in pair)
    inputs, queries = images(pair[FROM]), images(pair[ON])
    network = scratch_network(predictor, inputs, int(labels.max()) + 1)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    elapsed = 0.0
    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        train_epoch(network, optimizer, inputs, labels, bf16)
        synchronize(images.device)
        elapsed += time.perf_counter() - start  # the check itself is free
        with torch.no_grad():
            accuracy = 100 * (network.eval()(queries).argmax(1) == truth).float().mean().item()
        if accuracy >= wanted:
            return {"accuracy": wanted, "epochs": epoch, "seconds": elapsed}
    return {"accuracy": wanted, "epochs": None, "seconds": None}


# What is shown


def show(rows: list[dict], trained: dict | None) -> None:
    """Print the tables."""
    first = rows[0]["parts"]
    print(
        f"{first['device']}, {first['threads']} threads. A prediction from {first['images']} images in memory: "
        f"{first['sketch_images']} for the sketch and {first['calibration_images']} for calibration"
    )
    table = Table("milliseconds", *(Column(row["target"], justify="right") for row in rows))
    for name in ("sketch", "generation", "calibration", "total"):
        table.add_row(name, *(f"{row['parts'][f'{name}_ms']:.1f}" for row in rows))
    table.add_row("predict(images, labels)", *(f"{row['one_call_ms']:.1f}" for row in rows))
    table.add_row(f"predict_many of {SEVERAL}, each", *(f"{row['several_ms_a_group']:.1f}" for row in rows))
    table.add_row("one epoch from scratch", *(f"{row['parts']['epoch_ms']:.0f}" for row in rows))
    table.add_row("  to a prediction", *(f"{row['parts']['epoch_ratio']:.0f} x" for row in rows))
    table.add_row("weights predicted", *(f"{row['weights']:,}" for row in rows))
    table.add_row("peak memory of a process, MB", *(f"{row['peak_memory_mb']:,.0f}" for row in rows))
    Console().print(table)
    if trained:
        _show_trained(trained)


def _show_trained(trained: dict) -> None:
    about = trained["model"]
    print(f"{trained['target']} trained on {about['train_groups']:,} groups of {about['setting']}:")
    seconds = [row["seconds"] for row in trained["scratch"] if row["seconds"] is not None]
    times = f", in {median(seconds):.2f} s (median)" if seconds else ""
    print(
        f"  from scratch to a predicted network's accuracy: {len(seconds)} of {len(trained['scratch'])} groups{times}"
    )
    groups = trained["images"][0]["groups"]
    print(f"  accuracy with few images less that with all, in points, paired over {groups} test groups:")
    table = Table(Column("images", justify="right"), "sketch from few", "calibration from few", "both from few")
    for count in sorted({row["images"] for row in trained["images"]}):
        cells = [row for row in trained["images"] if row["images"] == count]
        table.add_row(str(count), *(f"{row['difference']:+.2f} ± {row['ci95']:.2f}" for row in cells))
    Console().print(table)


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser("python -m benchmarks.prediction", description=__doc__)
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--model", type=Path, default=Path("models/pudnet.safetensors"), help="a trained model")
    parser.add_argument("--data", type=Path, default=Path("data"), help="the data that it was trained on")
    parser.add_argument("--groups", type=int, default=30, help="test groups for a trained model's tables")
    parser.add_argument("--epochs", type=int, default=20, help="from scratch, at most")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/prediction.json"))
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        _measure_memory(options.memory)
        return
    images = make_images(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    rows = [measure(target, images, options.repeats) for target in options.targets]
    trained = None
    if options.model.is_file() and (options.data / "prepared" / "train" / "meta.json").is_file():
        trained = measure_trained(options.model, options.data, options.groups, options.epochs)
    show(rows, trained)
    if trained is None:
        print(f"no trained model at {options.model}: what it saves was not measured; `dvc repro` makes one")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"rows": rows, "trained": trained}, indent=2) + "\n")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
