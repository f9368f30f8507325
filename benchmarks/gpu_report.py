"""What the parts of `benchmarks.gpu` share: how they are run, and where their rows go."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table

from pipeline.project import write_json
from pudnet.files import check_writable


@dataclass(frozen=True)
class Run:
    """How the parts are run."""

    device: torch.device
    smallest: bool
    data: str | None  # a source of images, as `prepare.source`
    minutes: float  # for `scale`

    def about(self) -> dict[str, Any]:
        """The machine, the versions and the size, as they stand in every JSON."""
        cuda = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "device_memory_gb": torch.cuda.get_device_properties(0).total_memory / 1e9 if cuda else None,
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if cuda else None,
            "smallest": self.smallest,
        }


class Report:
    """One part's rows by section, in a file that is written anew with each: what a time limit cuts off is not lost."""

    def __init__(self, path: Path, run: Run) -> None:
        check_writable(path)
        self.path, self.content = path, {"about": run.about()}
        self.write()

    def write(self) -> None:
        """All that there is so far."""
        write_json(self.path, self.content)

    def put(self, name: str, value: Any) -> None:
        """One value."""
        self.content[name] = value
        self.write()

    def add(self, section: str, row: dict[str, Any]) -> None:
        """One row more."""
        self.content.setdefault(section, []).append(row)
        self.write()

    def show(self, section: str) -> None:
        """Print a section's rows as a table; a column for every key."""
        rows = self.content.get(section, [])
        names = list(dict.fromkeys(name for row in rows for name in row))
        table = Table(*(Column(name.replace("_", " "), justify="right") for name in names), title=section)
        for row in rows:
            table.add_row(*(_cell(row.get(name)) for name in names))
        Console(width=140).print(table)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
