"""Write the tables of pages that are made from committed results: `python reference/readme.py`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.reporting.numbers import duration, plus_minus
from pipeline.studies.accuracy import on_all_groups
from pipeline.studies.page import table_of

HERE = Path(__file__).parent
RESULTS = HERE.parent / "studies" / "results"
STUDY, RECIPES = "instead_of_training", "scratch_recipes"
CAPTION = """\
Each row makes a ConvNet-3 for a *group*: 500 labelled images of five classes of CIFAR-100, or 1,000 of ten classes of
Fashion-MNIST. The table has the network's accuracy in percent on other images of these classes, ± its 95% interval over
test groups. The classes of test groups are in no training group. A → B: trained on A, tested on B.
"""
NOTES = """\
About the table:

- Both rows from scratch, and the row that trains for 20 epochs, train on each group. That is slow, so they have fewer
  test groups (in brackets). Their accuracy here is PudNet+'s on all groups, plus their difference to it on these few.
- The models of the other rows were trained once on each class split, on {train_groups:,} groups. Those that ship had
  5,000, on one class split: [85.5 and 86.7 % from 500 images](docs/use/index.md#which-model) of CIFAR-100. On this
  split, [PudNet+](docs/results/classifier.md) has 83.9 to 84.2 % after 1,000 groups. Two that ship, called
  `pretrained-ridge`, are made as the fourth row, at twice its rate.
- "Tuned" was for CIFAR-100 alone. The best of [five recipes](studies/results/{recipes}.md) for each of the
  first two columns is {less} points below PudNet+, on 30 groups.
- `python -m pipeline.study {name}` made it, in 3 hours. It downloads both sets, or takes your copies from
  `study.sources` in `params.yaml`. [Its page](studies/results/{name}.md) has all rows, as they were measured.
"""
COLUMNS_SHOWN = (
    "CIFAR-100, 5 classes",
    "CIFAR-100 → Fashion-MNIST, 10 classes",
    "Fashion-MNIST → CIFAR-100, 5 classes",
)  # and time
ROWS = {  # the study's name of a row -> the page's
    "from scratch / 1 epoch": "trained from scratch, 1 epoch",
    "from scratch / 50 epochs": "trained from scratch, 50 epochs, tuned",
    "Pretrained, logistic / all images": "pretrained on the training classes, logistic regression",
    "Pretrained, R2-D2's / all images": "the same, with R2-D2's classifier (ridge)",
    "R2-D2 / all images": "R2-D2: trained on groups, with this classifier",
    "PudNet+ / all images": "**PudNet+: predicted**",
    "PudNet+, fine-tuned / 20 epochs": "PudNet+, then trained for 20 epochs",
}
REFERENCE = "PudNet+ / all images"
COUNTS = "*test groups (for the rows that train on each), class splits*"
BENCHES = {"CIFAR-100": "cifar100-convnet3-bench", "Fashion-MNIST": "fashion-convnet3-bench"}
BENCH_CAPTION = """\
Two runs from before `r2d2` and `pudnet_plus` were added, with ConvNet-3 in fp32 on one thread:
accuracy, difference to PudNet paired over the same test groups, and time a group. PudNet has the losses that its search
chose, L1 alone but for one split; training from scratch (`_gc`: with centralised gradients) has the labels of all of a
group's images, the others those of 10 a class.

{about}
"""
EPOCHS_SHOWN = (1, 5, 20, 50)  # of training from scratch; reference/README.md has them all


def opening() -> str:
    """The table of prediction beside training."""
    table = pd.read_csv(RESULTS / f"{STUDY}.csv")
    less = " and ".join(_best_from_scratch(column) for column in COLUMNS_SHOWN[:2])
    notes = NOTES.format(train_groups=table.train_groups.max(), name=STUDY, recipes=RECIPES, less=less)
    lines = {(line.row, line.column): line for line in on_all_groups(table, REFERENCE).itertuples()}
    cells = {
        column: [plus_minus(lines[row, column].accuracy, lines[row, column].ci95) for row in ROWS]
        for column in COLUMNS_SHOWN
    }
    for column, own in cells.items():
        own.append(_count(table[table.column == column]))
    timed = COLUMNS_SHOWN[0]
    times = [duration(lines[row, timed].milliseconds) for row in ROWS]
    cells[f"time, {timed.partition(',')[0]}, one core"] = [*times, ""]
    return f"{CAPTION}\n{table_of({'': [*ROWS.values(), COUNTS], **cells})}\n{notes}"


def _best_from_scratch(column: str) -> str:
    """How far the best recipe of training from scratch is below PudNet+."""
    table = pd.read_csv(RESULTS / f"{RECIPES}.csv")
    recipes = table[(table.column == column) & (table.train_groups == 0)]
    best = recipes.loc[recipes.difference.idxmax()]
    return plus_minus(-best.difference, best.difference_ci95)


def matters() -> str:
    """The overview of the study `matters`."""
    lines = (RESULTS / "matters.md").read_text().splitlines(keepends=True)
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    return "".join(takewhile(lambda line: line.startswith("|"), lines[first:]))


def _count(part: pd.DataFrame) -> str:
    """Test groups of a column, how many of them a network is trained on, and class splits."""
    return f"{part.test_groups.max()} ({part.test_groups.min()}), {part.splits.max()}"


@dataclass(frozen=True)
class Bench:
    """What one run left: its metrics, every method's, and the milliseconds that each takes for a group."""

    title: str
    metrics: dict[str, Any]
    methods: dict[str, Any]
    times: dict[str, float]

    @property
    def about(self) -> str:
        """What it was measured on, with a link to its params."""
        metrics, scratch = self.metrics, self.methods["scratch_adam_1"]["test_groups"]
        return (
            f"- {self.title}: {metrics['train_groups']} training groups, {metrics['test_groups']} test groups, "
            f"{scratch} of them for training from scratch, class splits: {len(metrics['splits'])} "
            f"([params and tuning](../../reference/README.md))"
        )

    def cells(self, method: str) -> list[str]:
        """Accuracy, difference to PudNet and time of a method."""
        own = self.methods[method]
        accuracy = f"{own['accuracy']:.2f} ± {own['ci95']:.2f}"
        difference = f"{own['difference']:+.2f} ± {own['difference_ci95']:.2f}" if "difference" in own else ""
        return [accuracy, difference, duration(self.times.get(method))]


def bench() -> str:
    """Every method on the two benches, side by side."""
    runs = [_read(title, HERE / folder) for title, folder in BENCHES.items()]
    rows = [["", *(head for run in runs for head in (run.title, "to PudNet", "time"))]]
    rows.append(["---"] * len(rows[0]))
    for method in filter(_shown, runs[0].methods):
        rows.append([_label(method), *(cell for run in runs for cell in run.cells(method))])
    caption = BENCH_CAPTION.format(about="\n".join(run.about for run in runs))
    return f"{caption}\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _read(title: str, folder: Path) -> Bench:
    metrics, compared, adaptation = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("metrics", "baselines", "adaptation")
    )
    return Bench(title, metrics, {"pudnet": metrics, **compared["methods"]}, adaptation["milliseconds"])


def _shown(method: str) -> bool:
    epochs = method.rpartition("_")[2]
    return not method.startswith("scratch") or int(epochs) in EPOCHS_SHOWN


def _label(method: str) -> str:
    if not method.startswith("scratch"):
        return "PudNet" if method == "pudnet" else f"`{method}`"
    name, _, epochs = method.rpartition("_")
    return f"`{name}`, {epochs} epoch{'s' if epochs != '1' else ''}"


# A page -> the part of it that is made here
PAGES = {"README.md": opening, "docs/results/group.md": matters, "docs/results/paper.md": bench}


def written(page: str) -> str:
    """The text of a page of `PAGES`, with what stands between its marks made anew."""
    part = PAGES[page].__name__
    begin, end = f"<!-- {part}: python reference/readme.py -->\n", f"<!-- end of {part} -->\n"
    before, found, rest = (HERE.parent / page).read_text().partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise SystemExit(f"error: {page} lacks {begin.strip()} or {end.strip()}")
    return before + begin + PAGES[page]() + end + after


if __name__ == "__main__":
    for page in PAGES:
        (HERE.parent / page).write_text(written(page))
