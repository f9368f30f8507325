"""Shows how far things are: bars in a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

COLUMNS = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


def bars() -> Progress:
    """Progress bars that go when they are done. Without a terminal there are none."""
    console = Console(file=sys.stdout)
    return Progress(*COLUMNS, console=console, transient=True, disable=not console.is_terminal)


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar, and one line at the end. Yields a function of the number done."""
    with bars() as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=done)
    print(f"  {title}: {total} test groups done", flush=True)


class TrialBars:
    """In a terminal: a bar for all trials together and one for each that runs, with the reports in a log file.

    Elsewhere each report is a line. Use it as a context manager, around the time in which trials run.
    """

    def __init__(self, trials: int, log: Path) -> None:
        self.trials, self.log, self.bars = trials, log, bars()
        self.seen: dict[str, int] = {}  # by trial: its groups so far
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> TrialBars:
        if not self.bars.disable:
            print(f"  all reports are in {self.log}")
            self.tasks.clear()
            self.all = self.bars.add_task("all trials", total=None)
            self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def report(self, name: str, groups: int, total: int, line: str) -> None:
        """Show that a trial has passed so many of its groups; `line` says more."""
        if self.bars.disable:
            print(line, flush=True)
            return
        with contextlib.suppress(OSError):  # a full disk ends the run elsewhere, with a better message
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a") as file:
                file.write(f"{line.strip()}\n")
        if name not in self.tasks:
            self.tasks[name] = self.bars.add_task(name, total=total)
        self.seen[name] = groups
        self.bars.update(self.tasks[name], completed=groups)
        self.bars.update(self.all, completed=sum(self.seen.values()), total=total * self.trials)

    def end(self, name: str, line: str) -> None:
        """Take a trial's bar away, and print a line."""
        if name in self.tasks:
            self.bars.remove_task(self.tasks.pop(name))
        print(line, flush=True)
