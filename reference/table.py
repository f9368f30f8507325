"""Write reference/README.md from the committed results beside it: `python reference/table.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

HERE = Path(__file__).parent
REPORTED = HERE.parent / "pipeline" / "reporting" / "paper.yaml"
TABLES = {"convnet3": "table1", "resnet18": "table2", "resnet34": "table8"}

HEAD = """# Every run

Each folder holds what one run of the pipeline left: its `params.yaml`, the search, metrics and times.
`python reference/table.py` makes this page from those files.

The runs were made by `dvc repro` with the `params.yaml` of the folder, on 2 CPU cores (bf16, AMX, unless the run says
otherwise), no GPU. Each was made at a commit of its day. If you run it with today's code, keys of `params.yaml` that
came later have today's values. `prepare.source: npz:data/raw/cifar100.npz` is torchvision's CIFAR100 as arrays,
training and test part together, its 100 fine classes as `labels`; `prepare.source: null` downloads the same images.

Accuracy is in percent, ± its 95% interval over test groups with the class splits held fixed. Differences to PudNet are
paired over the same test groups (the first ones, where a method has fewer).

What was tried on validation groups of CIFAR-100 (split 0, ConvNet-3, 200 training groups,
`search.space` over the key; ± over 40 validation groups, 60 for the first). The defaults keep the paper's losses, and
use no augmentation, all the same:

| key | accuracy on validation groups |
|---|---|
| `normalization` (with `kl_teaches: both`) | batch 49.5 ± 2.0, group 50.0 ± 2.0, layer 50.0 ± 2.0: no difference |
| `kl_teaches` | full 52.4 ± 2.8, metric 49.7 ± 2.6 |
| `kl_weight: 0` (without L3) | with L2 53.1 ± 2.7, without L2 too (L1 alone) 56.8 ± 2.7 |
| `pretraining_share` (ResNet-18, PudNet+, 300 groups, ± over 100) | 0: 60.9 ± 1.5, 0.5: 69.3 ± 1.4, 0.8: 72.3 ± 1.4 |
| `learning_rate` (ResNet-18, PudNet+, 300 groups, ± over 150) | 0.002: 68.6 ± 1.2, 0.006: 72.4 ± 1.1 |
| `augment` (ResNet-18, PudNet+, 1,000 groups, ± over 150) | none: 73.0 ± 1.1, shift_mirror: 77.7 ± 1.1 |
| the same, from all 500 labelled images | none: 78.9 ± 0.9, shift_mirror: 83.2 ± 0.9 |
| `augment` (ConvNet-3, PudNet+, 1,000 groups, ± over 150) | none: 79.8 ± 1.0, shift_mirror: 79.8 ± 1.0 |
| the same, from all 500 labelled images | none: 85.5 ± 0.8, shift_mirror: 85.8 ± 0.8 |
| `pretraining_share` (ConvNet-3, PudNet+, `domains`, less 0, ± over 300) | 0.5: -0.8 ± 0.2, 0.8: -1.4 ± 0.3 |
| the same for R2-D2 | 0.5: +0.1 ± 0.3 |
| `pretraining_share` (ConvNet-3, PudNet+, 3,000 groups, `shift_mirror`) | 0: 82.6 ± 1.0, 0.8: 80.8 ± 1.0 (-1.8 ± 0.3) |
| the same, from all 500 labelled images | 0: 87.1 ± 0.8, 0.8: 87.2 ± 0.7 (+0.1 ± 0.2) |

The two lines of `domains` are differences, of trainings on 1,000 groups. The two lines below them are over 150 groups.
For ResNet-18 class filters were left out, too, which makes it R2-D2, or put into an earlier layer (1,000 groups,
`shift_mirror`, ± over 150):

| class filters of ResNet-18 | from 90 labelled images | from all 500 |
|---|---|---|
| none (R2-D2) | 78.6 ± 1.0 | 83.4 ± 0.9 |
| in the last convolution, whose map has one position (PudNet+), less none | -1.0 ± 0.3 | -0.4 ± 0.3 |
| in the last convolution of 4 x 4 positions, less none | -0.4 ± 0.3 | -0.4 ± 0.2 |
"""


def section(folder: Path) -> str:
    """One run: the table of methods, each split by itself, the times."""
    read = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("metrics", "baselines", "timing")}
    metrics, methods, timing = read["metrics"], read["baselines"]["methods"], read["timing"]
    reported = yaml.safe_load(REPORTED.read_text())
    paper = reported[TABLES[metrics["target"]]].get(metrics["setting"], {})
    own, times = {"pudnet": metrics, **methods}, _times(folder)
    seeds = list(metrics["splits"])
    apart = seeds if len(seeds) > 1 else []  # the accuracy on one split is the accuracy
    lines = [
        f"## {metrics['setting']}, {metrics['target']}: {metrics['train_groups']:,} training groups",
        "",
        f"Folder: [`{folder.name}`]({folder.name}/params.yaml).",
        "",
        f"One update a training group; {metrics['test_groups']:,} test groups of "
        f"{len(seeds)} class split(s). The paper's PudNet: {_paper(paper.get('pudnet'))}"
        f"{_by_groups(metrics, reported['table10'])}.",
        *_remarks(folder),
        "",
        "| method | test groups | accuracy | difference to PudNet | time a group |"
        f"{''.join(f' split {seed} |' for seed in apart)}",
        f"|---|---|---|---|---|{'---|' * len(apart)}",
        *(_row(name, numbers, apart, times.get(name)) for name, numbers in own.items()),
        "",
        "| split | training classes | test classes | chosen by the search |",
        "|---|---|---|---|",
        *(_split(seed, part, _chosen(folder, seed)) for seed, part in metrics["splits"].items()),
        "",
        f"Prediction: {timing['total_ms']:.1f} ms ({_parts(timing)}) from {timing['images']} images "
        f"({timing['sketch_images']} looked at for the sketch, {timing['calibration_images']} for calibration) on "
        f"{timing['device']}, {timing['threads']} threads; one epoch from scratch takes {timing['epoch_ratio']:.1f} "
        "times as long.",
    ]
    return "\n".join(lines)


def _parts(timing: dict[str, Any]) -> str:
    names = [key for key in timing if key.endswith("_ms") and key not in ("total_ms", "epoch_ms")]
    return ", ".join(f"{name.removesuffix('_ms')} {timing[name]:.1f}" for name in names)


def _by_groups(metrics: dict[str, Any], table: dict[str, Any]) -> str:
    """The paper's accuracy after other numbers of training groups, where its table 10 has them."""
    if (metrics["setting"], metrics["target"]) != ("cifar100", "convnet3"):
        return ""
    pairs = zip(table["groups"], table["train_c80"]["acc"], strict=True)
    return " after 100,000 groups; by groups (table 10): " + ", ".join(f"{a} at {n:,}" for n, a in pairs)


def _remarks(folder: Path) -> list[str]:
    """What has to be known of a run beside its params, from its remarks.md."""
    path = folder / "remarks.md"
    return ["", path.read_text().strip()] if path.exists() else []


def _paper(figure: dict[str, Any] | None) -> str:
    return f"{figure['acc']} ± {figure['ci']}" if figure else "no figure"


def _times(folder: Path) -> dict[str, float]:
    """Milliseconds that methods take for a group; the older runs have none."""
    path = folder / "adaptation.json"
    return json.loads(path.read_text())["milliseconds"] if path.exists() else {}


def _row(name: str, numbers: dict[str, Any], seeds: list[str], milliseconds: float | None) -> str:
    difference = f"{numbers['difference']:+.2f} ± {numbers['difference_ci95']:.2f}" if "difference" in numbers else ""
    splits = [f"{numbers['splits'][s]['accuracy']:.2f} ± {numbers['splits'][s]['ci95']:.2f}" for s in seeds]
    accuracy = f"{numbers['accuracy']:.2f} ± {numbers['ci95']:.2f}"
    time = "" if milliseconds is None else f"{milliseconds:,.0f} ms" if milliseconds > 100 else f"{milliseconds:.1f} ms"
    groups = f"{numbers['test_groups']:,}"
    return f"| {' | '.join([name, groups, accuracy, difference, time, *splits])} |"


def _split(seed: str, part: dict[str, Any], chosen: str) -> str:
    train, test = (_names(part[f"{role}_classes"]) for role in ("train", "test"))
    return f"| {seed} | {train} | {test} | {chosen} |"


def _chosen(folder: Path, seed: str) -> str:
    """The best cell of a split's search."""
    trials = pd.read_csv(folder / "search.csv")
    own = trials[trials.split_seed == int(seed)]
    cell = own.loc[own.accuracy.idxmax()].drop(["split_seed", "groups", "accuracy", "ci95", "loss"])
    return ", ".join(f"{key} {value:g}" for key, value in cell.items())


def _names(classes: list[str]) -> str:
    return ", ".join(classes) if len(classes) <= 20 else f"the other {len(classes)}"


def page() -> str:
    """All runs, one below the other."""
    folders = sorted(path.parent for path in HERE.glob("*/metrics.json"))
    return "\n\n".join([HEAD.rstrip(), *map(section, folders)]) + "\n"


if __name__ == "__main__":
    (HERE / "README.md").write_text(page())
