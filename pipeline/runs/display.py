"""Shows how far things are: bars in a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sized
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

COLUMNS = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
AWHILE = 3600  # seconds of the past from which the time left is estimated: reports may be minutes apart
LINES = 10  # that a trial has at most without a terminal


def bars() -> Progress:
    """Progress bars that go when they are done. Without a terminal there are none."""
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
    """In a terminal, a bar for all trials together and one for each that runs; elsewhere, up to `LINES` lines a trial.

    All reports go to the file `log`. Use it as a context manager, around the time in which trials run. `ended` has the
    trials that have ended, of so many `trials`.
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
        print(f"  every report: {os.path.relpath(self.log)}", flush=True)
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def report(self, name: str, groups: int, total: int, line: str) -> None:
        """Show that a trial has passed so many of its groups; `line` says more."""
        with contextlib.suppress(OSError):  # a full disk ends the run elsewhere, with a better message
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a") as file:
                file.write(f"{line.strip()}\n")
        before, self.shares[name] = self.shares.get(name, 0.0), groups / total
        if self.bars.disable:
            if int(LINES * self.shares[name]) > int(LINES * before):
                print(line, flush=True)
            return
        if name not in self.tasks:
            self.tasks[name] = self.bars.add_task(name, total=total)
        self.bars.update(self.tasks[name], completed=groups)
        self._move_all()

    def end(self, name: str, line: str) -> None:
        """Take a trial's bar away, and print a line."""
        self.shares.pop(name, None)
        if name in self.tasks:
            self.bars.remove_task(self.tasks.pop(name))
            self._move_all()
        print(line, flush=True)

    def _move_all(self) -> None:
        self.bars.update(self.all, completed=len(self.ended) + sum(self.shares.values()))
