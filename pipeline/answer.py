"""Says what the last run found, and what to do with it: `python -m pipeline.answer`. `make repro` ends with it."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from pipeline.params import PLUS, Params
from pipeline.project import PUDNET, RESULTS, split_model
from pipeline.reporting.answer import Row, answer_rows, labels_note
from pipeline.reporting.methods import target_name
from pipeline.reporting.numbers import duration, plus_minus
from pipeline.reporting.results import read_results
from pipeline.stage import run_stage
from pudnet.targets import is_import_path


def answer(params: Params) -> None:
    """Print five rows of results, where the report is, and how to use the model."""
    results = read_results(RESULTS)
    rows = answer_rows(results)
    by_method = {row.method: row.accuracy for row in rows}
    model = split_model(PLUS, params.seed) if by_method.get(PLUS, 0) > by_method["pudnet"] else PUDNET
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"\n{params.setting}, {target_name(params.target)}: accuracy on classes that were never trained on\n")
    console.print(_table(rows))
    console.print(f"\n± is a 95 % interval over test groups. {labels_note(results, params)}")
    console.print(f"\nthe whole report   {RESULTS / 'report.html'}")
    console.print("all runs           make ui (MLflow)")
    size, colour = params.prepare.image_size, "grey" if params.prepare.channels == 1 else "colour"
    network = f" --target {params.target}" if is_import_path(params.target) else ""
    command = f".venv/bin/pudnet predict --model {model}{network} --data FOLDER --out mine.safetensors"
    console.print(f"your own images    {command}")
    console.print(
        f"                   FOLDER has a folder of images for each class; they are made {size}x{size} px, {colour}"
    )
    console.print("                   without --model: a model that ships with the project, for photographs")


def _table(rows: list[Row]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 4, 0, 0), header_style="bold")
    table.add_column("method")
    table.add_column("accuracy, %", justify="right")
    table.add_column("test groups", justify="right")
    table.add_column("time a group", justify="right")
    for row in rows:
        time = "" if row.milliseconds is None else duration(row.milliseconds)
        table.add_row(row.label, plus_minus(row.accuracy, row.ci95), f"{row.groups:,}", time)
    return table


if __name__ == "__main__":
    run_stage(answer)
