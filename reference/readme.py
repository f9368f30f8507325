"""Write the table of ../README.md that is made from committed results: `python reference/readme.py`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BENCHES = {"CIFAR-100": "cifar100-convnet3-bench", "Fashion-MNIST": "fashion-convnet3-bench"}
TOLD = """Every method on one bench with ConvNet-3, fp32 on one thread: accuracy, difference to PudNet paired over the
same test groups, and time a group. PudNet has the losses that its search chose, L1 alone but for one split; training
from scratch has the labels of all of a group's images, the others those of 10 a class.

{about}
"""
BEGIN, END = "<!-- from here: python reference/readme.py -->\n", "<!-- to here -->\n"
EPOCHS_SHOWN = (1, 5, 20, 50)  # of training from scratch; reference/README.md has them all


@dataclass(frozen=True)
class Bench:
    """What one run left: its metrics, every method's, and the milliseconds that each takes for a group."""

    title: str
    metrics: dict[str, Any]
    methods: dict[str, Any]
    times: dict[str, float]

    @property
    def about(self) -> str:
        """What it was measured on."""
        metrics, scratch = self.metrics, self.methods["scratch_adam_1"]["test_groups"]
        return (
            f"- {self.title}: {metrics['train_groups']} training groups, {metrics['test_groups']} test groups, "
            f"{scratch} of them for training from scratch, class splits: {len(metrics['splits'])} "
            f"([params, tuning, report](reference/{BENCHES[self.title]}/))"
        )

    def cells(self, method: str) -> list[str]:
        """Accuracy, difference to PudNet and time of a method."""
        own, time = self.methods[method], self.times.get(method)
        accuracy = f"{own['accuracy']:.2f} ± {own['ci95']:.2f}"
        difference = f"{own['difference']:+.2f} ± {own['difference_ci95']:.2f}" if "difference" in own else ""
        return [accuracy, difference, "" if time is None else _duration(time)]


def bench() -> str:
    """Every method on the two benches, side by side."""
    runs = [_read(title, HERE / folder) for title, folder in BENCHES.items()]
    rows = [["", *(head for run in runs for head in (run.title, "to PudNet", "time"))]]
    rows.append(["---"] * len(rows[0]))
    for method in filter(_shown, runs[0].methods):
        rows.append([_label(method), *(cell for run in runs for cell in run.cells(method))])
    told = TOLD.format(about="\n".join(run.about for run in runs))
    return f"{told}\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


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


def _duration(milliseconds: float) -> str:
    return f"{milliseconds:.0f} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.1f} s"


def written(page: str) -> str:
    """README.md with what stands between the two marks replaced."""
    before, found, rest = page.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise SystemExit(f"error: {README.name} lacks {BEGIN.strip()} or {END.strip()}")
    return before + BEGIN + bench() + END + after


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
