"""Shows how far things are: bars in a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pipeline.project import root
from pipeline.runs.trial import TOTAL

COLUMNS = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
AWHILE = 3600  # seconds of the past from which the time left is estimated: reports may be minutes apart
LINES = 20  # an experiment prints at most this many reports if there is no terminal


def bars() -> Progress:
    """Progress bars that disappear when they are done. Without a terminal there are none."""
    console = Console(file=sys.stdout)
    often = {"refresh_per_second": 2, "speed_estimate_period": AWHILE}
    return Progress(*COLUMNS, console=console, transient=True, disable=not console.is_terminal, **often)


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar, and one line at the end. Yields a function of the number done."""
    with bars() as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=done)
    print(f"  {title}: {total} test groups done", flush=True)


class TrialBars:
    """In a terminal, a bar for all trials together and one for each that runs; elsewhere, a line now and then.

    The file `log` gets a line for every report and every end. Use it as a context manager, around the time in which
    trials run. `ended` has the trials that have ended, of so many `trials`.
    """

    def __init__(self, trials: int, ended: Sized, log: Path) -> None:
        self.trials, self.ended, self.log = trials, ended, log
        self.shares: dict[str, float] = {}  # by running trial: the share of its groups that it has passed
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> TrialBars:
        self.bars = bars()
        self.shares, self.tasks = {}, {}
        self.all = self.bars.add_task("all trials", total=self.trials, completed=len(self.ended))
        self.bars.start()
        print(f"  every report: {os.path.relpath(self.log, root())}", flush=True)
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def report(self, name: str, report: Mapping[str, Any]) -> None:
        """Show a trial's report."""
        line = f"  [{len(self.ended)}/{self.trials} done] {name}: {_words(report)}"
        before = self._passed()
        self.shares[name] = report["groups"] / report[TOTAL]
        if self.bars.disable and int(LINES * self._passed() + 1e-6) > int(LINES * before + 1e-6):
            print(line, flush=True)
        if name not in self.tasks:
            self.tasks[name] = self.bars.add_task(name, total=report[TOTAL])
        self.bars.update(self.tasks[name], completed=report["groups"])
        self._note(line)

    def end(self, name: str, reports: Sequence[Mapping[str, Any]], failed: bool) -> None:
        """Take a trial's bar away. `reports` are all that the trial made."""
        self.shares.pop(name, None)
        if name in self.tasks:
            self.bars.remove_task(self.tasks.pop(name))
        line = f"  {name}: failed" if failed else f"  {name}: finished, {_accuracy(reports[-1])}"
        if failed or self.bars.disable:
            print(line, flush=True)
        self._note(line)

    def _note(self, line: str) -> None:
        self.bars.update(self.all, completed=self.trials * self._passed())
        with contextlib.suppress(OSError):  # a full disk ends the run elsewhere, with a better message
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a") as file:
                file.write(f"{line.strip()}\n")

    def _passed(self) -> float:
        """The share of all trials' groups that has been passed."""
        return (len(self.ended) + sum(self.shares.values())) / self.trials


def _words(report: Mapping[str, Any]) -> str:
    """A report as it is printed."""
    loss = [f"loss {report['loss']:.3f}"] if "loss" in report else []
    speed = f"{report['groups_per_second']:.2f} groups/s"
    return ", ".join([f"group {report['groups']:>5} of {report[TOTAL]}", *loss, _accuracy(report), speed])


def _accuracy(report: Mapping[str, Any]) -> str:
    if "validation_accuracy" not in report:
        return f"training {report['train_accuracy']:5.2f} %"
    interval = f" +/- {report['validation_ci95']:.2f}" if math.isfinite(report["validation_ci95"]) else ""
    return f"validation {report['validation_accuracy']:5.2f}{interval} %"
