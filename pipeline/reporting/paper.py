"""The paper's results, which the report and the studies show beside ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from pudnet.errors import UserError


@dataclass(frozen=True)
class Reported:
    """One result of the paper: accuracy and its +/- in %, GPU seconds, and the table it is from."""

    accuracy: float
    ci95: float | None
    seconds: float | None
    table: str


@cache
def load_reported() -> Mapping[str, Any]:
    """The paper's tables as data."""
    return yaml.safe_load(Path(__file__).with_name("paper.yaml").read_text())


def paper_figures(reported: Mapping[str, Any], setting: str, target: str) -> dict[str, Reported]:
    """All results of the paper for a setting and target, by method; empty if it has none.

    If several tables have a method, the first one counts.
    """
    found: dict[str, Reported] = {}
    for name, table in reported.items():
        rows = _rows(table, setting, target) if isinstance(table, Mapping) else {}
        for method, row in rows.items():
            figure = Reported(row["acc"], row.get("ci"), row.get("time"), name.replace("table", "table "))
            found.setdefault(method, figure)
    return found


def _rows(table: Mapping[str, Any], setting: str, target: str) -> Mapping[str, Any]:
    """A table's rows for a setting and target. A table is either for one of these and keyed by the other, or for none
    and keyed by both.
    """
    if "target" in table:
        return table.get(setting, {}) if table["target"] == target else {}
    if "setting" in table:
        return table.get(target, {}) if table["setting"] == setting else {}
    return table.get(target, {}).get(setting, {})


def paper_figure(path: str) -> Reported:
    """One result by its path in paper.yaml: `table9.cifar100.mean`, or `table11.cifar100.2` for the third of a list.

    Raises `UserError` if there is nothing at that path.
    """
    *parts, last = path.split(".")
    place: Any = load_reported()
    for part in parts:
        place = place.get(part) if isinstance(place, Mapping) else None
    if isinstance(place, Mapping) and isinstance(place.get("acc"), list) and last in map(str, range(len(place["acc"]))):
        place = {last: {key: values[int(last)] for key, values in place.items() if int(last) < len(values)}}
    found = place.get(last) if isinstance(place, Mapping) else None
    accuracy = found.get("acc", found.get("acc_top5")) if isinstance(found, Mapping) else None
    if not isinstance(accuracy, int | float):
        raise UserError(f"paper: nothing is reported at {path!r}; pipeline/reporting/paper.yaml has what is")
    return Reported(accuracy, found.get("ci"), found.get("time"), parts[0].replace("table", "table "))
