"""What the paper reports, beside which a report and a study show what was measured."""

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
    """One figure of the paper: accuracy and its +/- in %, GPU seconds, and where it stands."""

    accuracy: float
    ci95: float | None
    seconds: float | None
    table: str


@cache
def load_reported() -> Mapping[str, Any]:
    """The paper's tables as data."""
    return yaml.safe_load(Path(__file__).with_name("paper.yaml").read_text())


def paper_figures(reported: Mapping[str, Any], setting: str, target: str) -> dict[str, Reported]:
    """All that the paper reports for a setting and target, by method; empty where it has nothing.

    The first table that has a method wins.
    """
    found: dict[str, Reported] = {}
    for name, table in reported.items():
        rows = _rows(table, setting, target) if isinstance(table, Mapping) else {}
        for method, row in rows.items():
            figure = Reported(row["acc"], row.get("ci"), row.get("time"), name.replace("table", "table "))
            found.setdefault(method, figure)
    return found


def _rows(table: Mapping[str, Any], setting: str, target: str) -> Mapping[str, Any]:
    """A table's rows for a setting and target: it is fixed to one of them and keyed by the other, or by both."""
    if "target" in table:
        return table.get(setting, {}) if table["target"] == target else {}
    if "setting" in table:
        return table.get(target, {}) if table["setting"] == setting else {}
    return table.get(target, {}).get(setting, {})


def paper_figure(path: str) -> Reported:
    """One figure by its place in paper.yaml: `table9.cifar100.mean`, or `table11.cifar100.2`, third of a list.

    Raises `UserError` where nothing stands there.
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
