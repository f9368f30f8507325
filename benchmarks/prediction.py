"""What a prediction costs, from 500 images in memory to a network in eval mode: `python -m benchmarks.prediction`.

In a folder where `dvc repro` has run, also what its model saves (training from scratch to the same accuracy), and
how accuracy depends on how many images are looked at.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from rich.console import Console
from rich.table import Column, Table

from benchmarks.data import CHANNELS, SIZE, make_groups, make_images, positive
from benchmarks.memory import peak_of, peak_so_far
from pipeline.params import load_params
from pipeline.project import PUDNET, STORE, write_json
from pipeline.runs.class_split import Bench, open_bench
from pipeline.runs.trial import pick_device
from pudnet.data.images import StoreImages
from pudnet.device import clock, wants_bf16
from pudnet.errors import exit_code
from pudnet.evaluation import (
    FROM,
    ON,
    block_labels,
    mean_interval,
    time_prediction,
    twin_accuracies,
)
from pudnet.files import check_writable
from pudnet.predictor import Predictor
from pudnet.scratch import ScratchConfig, scratch_network, train_epoch

TARGETS = ("convnet3", "resnet18", "resnet34")
SEVERAL = 16  # groups in one call
COUNTS = (10, 25, 50, 100, 250, 500)  # images looked at


def on_device(target: str, device: torch.device, variant: str) -> Predictor:
    """An untrained predictor: speed does not depend on training."""
    untrained = Predictor.untrained(target, CHANNELS, SIZE, variant=variant)
    return Predictor(untrained.model.to(device), untrained.card, untrained.target)


def measure(target: str, images: StoreImages, repeats: int, variant: str) -> dict[str, object]:
    """One target's row: the parts of a prediction, an epoch from scratch, one call and several groups in one call."""
    predictor = on_device(target, images.device, variant)
    bf16 = wants_bf16("auto", images.device)
    parts = time_prediction(predictor, images, make_groups(repeats), bf16)
    groups = [(images.raw(group), images.labels[group]) for group in make_groups(SEVERAL)]
    singles, together = median_times(
        [lambda: [predictor.predict(*group) for group in groups], lambda: predictor.predict_many(groups)],
        images.device,
        max(2, repeats // 8),
    )
    return {
        "target": target,
        "variant": variant,
        "weights": predictor.target.predicted,
        "parts": asdict(parts),
        "one_call_ms": singles / SEVERAL,
        "several_ms_a_group": together / SEVERAL,
        "peak_memory_mb": peak_of("benchmarks.prediction", target, "--variant", variant),
    }


def median_times(versions: list[Callable[[], object]], device: torch.device, rounds: int) -> list[float]:
    """Median milliseconds of each version, in turns after one round of warm-up."""
    times: list[list[float]] = [[] for _ in versions]
    for _ in range(1 + rounds):
        for version, row in zip(versions, times, strict=True):
            start = clock(device)
            version()
            row.append(clock(device) - start)
    return [median(row[1:]) for row in times]


def _measure_memory(target: str, variant: str) -> None:
    """Print the peak memory (MB) of this process after three predictions."""
    device = pick_device()
    predictor, images = on_device(target, device, variant), make_images(device)
    for group in make_groups(3):
        predictor.predict(images.raw(group), images.labels[group])
    print(peak_so_far(device))


# With a trained model


@dataclass(frozen=True)
class Trained:
    """The run of the folder that the benchmark is called in: its hypernetwork and the bench to measure it on."""

    predictor: Predictor
    bench: Bench


def open_trained(groups: int) -> Trained | None:
    """What `dvc repro` left here, with the first test groups, or None. Raises `UserError` when it is damaged."""
    if not (PUDNET.is_file() and (STORE / "meta.json").is_file()):
        return None
    params = load_params()
    bench = open_bench(params, params.seed, groups)
    return Trained(bench.load(PUDNET), bench)


def measure_trained(trained: Trained, epochs: int) -> dict[str, object]:
    """What a trained model's predictions save, and how few images they need."""
    predictor, images, table = trained.predictor, trained.bench.images, trained.bench.tables["test"]
    provenance = predictor.card.provenance
    return {
        "model": {key: provenance.get(key) for key in ("setting", "train_groups", "split_seed")},
        "target": predictor.card.target,
        "scratch": [_to_same_accuracy(predictor, images, pair, epochs) for pair in table[: max(3, len(table) // 10)]],
        "images": _accuracy_by_images(predictor, images, table),
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
    labels, truth = (block_labels(images, indices) for indices in pair)
    inputs, queries = images(pair[FROM]), images(pair[ON])
    network = scratch_network(predictor.target, int(labels.max()) + 1, images.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    elapsed = 0.0
    for epoch in range(1, epochs + 1):
        start = clock(images.device)
        train_epoch(network, optimizer, inputs, labels, ScratchConfig(), bf16)
        elapsed += (clock(images.device) - start) / 1000  # the check itself is free
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
        f"{rows[0]['variant']}, {first['device']}, {first['threads']} threads. A prediction from {first['images']} "
        f"images in memory: {first['sketch_images']} for the sketch, {first['calibration_images']} for calibration"
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
    """Measure, print, write JSON. Raises `UserError` for a run that cannot be read."""
    parser = argparse.ArgumentParser("python -m benchmarks.prediction", description=__doc__)
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--variant", default="pudnet", choices=("pudnet", "pudnet_plus"))
    parser.add_argument("--repeats", type=positive, default=15)
    parser.add_argument("--groups", type=positive, default=20, help="test groups for a trained model's tables")
    parser.add_argument("--epochs", type=positive, default=20, help="from scratch, at most")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/prediction.json"))
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        _measure_memory(options.memory, options.variant)
        return
    check_writable(options.out)
    trained = open_trained(options.groups)
    images = make_images(pick_device())
    rows = [measure(target, images, options.repeats, options.variant) for target in options.targets]
    saved = measure_trained(trained, options.epochs) if trained else None
    show(rows, saved)
    if trained is None:
        print(f"no trained model at {PUDNET}: what it saves was not measured; `dvc repro` makes one")
    write_json(options.out, {"rows": rows, "trained": saved})
    print(f"written: {options.out}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
